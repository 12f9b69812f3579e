"""Onward: compile a PyTorch model into a trainer that never backpropagates."""

from importlib.metadata import version

from . import losses, models
from .api import compile
from .compiler.estimator import LikelihoodRatio
from .freezing import freeze
from .passes import errors
from .runtime.calibration.record import Calibration
from .runtime.program import Program
from .runtime.training.history import EpochRecord, History
from .runtime.training.trainer import Trainer

__version__ = version("onward")

__all__ = [
    "Calibration",
    "EpochRecord",
    "History",
    "LikelihoodRatio",
    "Program",
    "Trainer",
    "compile",
    "errors",
    "freeze",
    "losses",
    "models",
]
