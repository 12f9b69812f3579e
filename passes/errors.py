"""Everything that Onward raises on purpose. Each error says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OnwardError(Exception):
    """Base of every error that Onward raises on purpose."""


class CaptureError(OnwardError, RuntimeError):
    """The model could not be turned into a graph."""


class UnsupportedModelError(OnwardError, RuntimeError):
    """The graph holds something that Onward cannot train, named with module and source line."""


class UnreachedParameterError(OnwardError, ValueError):
    """A trainable parameter is reached by no site, so it would silently stay untrained.

    Attributes:
        parameters: the names of those that are not; frozen, they stay untrained knowingly.
    """

    def __init__(self, message: str, parameters: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.parameters = tuple(parameters)


class VerificationError(OnwardError, AssertionError):
    """A compiled program breaks one of the invariants. This is a bug in Onward or in a pass."""


class OptionError(OnwardError, ValueError):
    """An option has a value that cannot work."""


class UnknownNameError(OptionError):
    """A name (model, data set, pass, site, noise, …) is not known; the message shows the nearest match."""


class BatchError(OnwardError, ValueError):
    """A batch does not fit the compiled program: empty, or another structure, dtype, shape or device."""


class ModeError(OnwardError, RuntimeError):
    """The model's training/evaluation mode or its parameters changed since it was compiled."""


class LossShapeError(OnwardError, ValueError):
    """The loss did not return one number a sample (or one number, with ``credit="batch"``)."""


class NonFiniteLossError(OnwardError, FloatingPointError):
    """A loss is NaN or infinite. Gradients, buffers and weights are as before the step."""


class NonFiniteGradientError(OnwardError, FloatingPointError):
    """A gradient or a weight is NaN or infinite. Nothing was written from it: the last checkpoint is from before."""


class OutOfMemoryError(OnwardError, MemoryError):
    """A step ran out of memory; the message suggests a chunk of copies that fits."""


class CheckpointError(OnwardError, RuntimeError):
    """A checkpoint cannot be written, or is damaged, or belongs to another model."""


class CalibrationError(OnwardError, ValueError):
    """A calibration cannot be made, read, or used for this model."""


class OutputError(OnwardError, RuntimeError):
    """A file or folder cannot be written, or holds something that is not to be overwritten. It is as it was."""


class ModelFileError(OnwardError, RuntimeError):
    """A file of a model cannot be read: missing, damaged, not of its format, or reaching outside its folder."""


class FolderError(OnwardError, RuntimeError):
    """An exported folder cannot be used: damaged, not whole, or of another version."""


class ExportError(OnwardError, RuntimeError):
    """A program has no form in ONNX; the message names the operation or the setting."""


class DataError(OnwardError, RuntimeError):
    """A data set cannot be loaded, with the reason and what to install or do."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """The error for an unknown `name` of a `kind` ("model", "noise", …), showing the nearest of the `known` names."""
    names = sorted(known)
    nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return UnknownNameError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")
