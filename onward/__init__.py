"""Onward: compile a PyTorch model into a trainer that never backpropagates.

What stands here is imported when it is first asked for: `onward.runtime.onnx` trains where there is no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import losses, models
    from .api import compile
    from .compiler.estimator import LikelihoodRatio
    from .compiler.from_onnx import load as load_onnx
    from .freezing import freeze
    from .passes import errors
    from .runtime.calibration.record import Calibration
    from .runtime.export.save import export
    from .runtime.program import Program
    from .runtime.training.history import EpochRecord, History
    from .runtime.training.trainer import Trainer

__version__ = version("onward")

_HOMES = {
    "Calibration": ".runtime.calibration.record",
    "EpochRecord": ".runtime.training.history",
    "History": ".runtime.training.history",
    "LikelihoodRatio": ".compiler.estimator",
    "Program": ".runtime.program",
    "Trainer": ".runtime.training.trainer",
    "compile": ".api",
    "errors": ".passes.errors",
    "export": ".runtime.export.save",
    "freeze": ".freezing",
    "load_onnx": ".compiler.from_onnx",
    "losses": ".losses",
    "models": ".models",
}
"""The module of each public name; of a module itself."""

_CALLED = {"load_onnx": "load"}
"""What a name is called in its module, where that is not the name."""

_EXTRAS = dict.fromkeys(("torch", "networkx", "safetensors", "typer", "rich", "sklearn"), "torch") | {"onnx": "onnx"}
"""By package the extra that brings it."""

__all__ = [
    "Calibration",
    "EpochRecord",
    "History",
    "LikelihoodRatio",
    "Program",
    "Trainer",
    "compile",
    "errors",
    "export",
    "freeze",
    "load_onnx",
    "losses",
    "models",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = import_module(_HOMES[name], __name__)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        raise ModuleNotFoundError(
            f"onward.{name} needs {error.name}, which is not installed: pip install 'onward[{_EXTRAS[error.name]}]'. "
            "Without torch, python -m onward.runtime.onnx trains what `onward export` has written.",
            name=error.name,
        ) from error
    found = home if _HOMES[name] == f".{name}" or name == "errors" else getattr(home, _CALLED.get(name, name))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
