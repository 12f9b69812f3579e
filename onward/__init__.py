"""Onward: compile a PyTorch model into a trainer that never backpropagates."""

from . import models
from .api import compile
from .compiler.estimator import LikelihoodRatio
from .passes import errors
from .runtime.program import Program

__all__ = ["LikelihoodRatio", "Program", "compile", "errors", "models"]
