"""Models of ONNX Runtime, called on values that stay on their device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...passes.errors import FolderError, OptionError
from .folder import Array

try:
    import onnxruntime as ort
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "training an exported folder needs onnxruntime, which is not installed: pip install 'onward[onnx]'",
        name=error.name,
    ) from error
if tuple(map(int, ort.__version__.split(".")[:2])) < (1, 24):
    raise ImportError(
        f"onnxruntime {ort.__version__} reads files outside of a model's folder, if the model says so: "
        "pip install --upgrade 'onnxruntime>=1.24'"
    )

Value = Any
"""An ``onnxruntime.OrtValue``."""

WITHOUT = ["MatMulScaleFusion"]
"""Rewritings that onnxruntime leaves out: this one moves factors past products, which rounds otherwise, so one model a
step would not have the bits of one a task."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class Device:
    """Where models run.

    Attributes:
        name: "cpu" or "cuda".
        asked: what was asked for; where it differs from `name`, that was not to be had.
    """

    name: str
    asked: str

    @classmethod
    def find(cls, asked: str) -> Device:
        """ "auto" is the GPU where onnxruntime can use one; "cuda" falls back to the CPU where it cannot.

        Raises OptionError for another name.
        """
        if asked not in ("auto", *PROVIDERS):
            raise OptionError(f"device {asked!r}: known are auto, cpu and cuda.")
        return cls("cuda" if asked != "cpu" and _has_gpu() else "cpu", asked)

    def note(self) -> str:
        """What a user has to know of the device."""
        if self.asked == "cuda" and self.name == "cpu":
            return (
                "running on the CPU: onnxruntime finds no GPU here (it takes one with its driver, "
                "CUDA with cuDNN, and pip install 'onward[gpu]')"
            )
        return f"running on {'the GPU' if self.name == 'cuda' else 'the CPU'}"

    def value(self, array: Array) -> Value:
        """An array on the device."""
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array).reshape(array.shape), self.name, 0)


def _has_gpu() -> bool:
    """Whether a GPU takes a value: onnxruntime-gpu lists its provider also where there is no card, driver or CUDA."""
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        return False
    ort.set_default_logger_severity(4)  # what it says of a library that is missing is not the user's concern
    try:
        ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), "cuda", 0)
    except Exception:  # onnxruntime has no common base of its errors but this
        return False
    finally:
        ort.set_default_logger_severity(2)
    return True


class Model:
    """A model, ready to run.

    Attributes:
        inputs, outputs: the names of what it reads and returns; `defaults` those that may be left out.
    """

    def __init__(self, path: Path, device: Device, threads: int = 0, alone: bool = True) -> None:
        """`threads` of one call, 0 for all cores; where others run in between or beside it, it is not `alone`.

        Raises:
            FolderError: the file is missing, damaged, or holds what this onnxruntime does not run.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what fails is raised, and says so once
        if threads == 1 or not alone:  # threads that wait for the next call spin, which costs the other models' time
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        chosen = [PROVIDERS[device.name]] if device.name == "cpu" else [PROVIDERS["cuda"], PROVIDERS["cpu"]]
        if not path.is_file():
            raise FolderError(f"{path} is missing: the folder is not whole. Export it again.")
        try:
            self.session = ort.InferenceSession(str(path), options, providers=chosen, disabled_optimizers=WITHOUT)
        except Exception as error:  # onnxruntime has a class for each status code, and no common base but this
            raise FolderError(f"{path} does not load in onnxruntime {ort.__version__}: {_first_line(error)}") from error
        self.path, self.device = path, device
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.defaults = [value.name for value in self.session.get_overridable_initializers()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        self._binding = self.session.io_binding()

    def check(self, reads: Iterable[str], writes: Iterable[str]) -> None:
        """Raise FolderError if the model reads anything else, or does not write all of these."""
        foreign, absent = sorted(set(self.inputs) - set(reads)), sorted(set(writes) - set(self.outputs))
        if foreign or absent:
            reason = f"reads {foreign[0]}" if foreign else f"does not write {absent[0]}"
            raise FolderError(f"{self.path} {reason}, which the manifest does not say. Export it again.")

    def __call__(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Run on what `values` has of the inputs; a call at a time, like everything of a `Model`.

        Raises:
            FolderError: an input is missing, or the model fails.
        """
        binding, names = self._binding, self.outputs
        binding.clear_binding_inputs()
        binding.clear_binding_outputs()
        try:
            for name in self.inputs:
                binding.bind_ortvalue_input(name, values[name])
        except KeyError as error:
            raise FolderError(f"{self.path} reads {error}, which nothing has made.") from error
        for name in self.defaults:
            if name in values:
                binding.bind_ortvalue_input(name, values[name])
        for name in names:
            binding.bind_output(name, self.device.name)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # as above
            raise FolderError(f"{self.path} failed: {_first_line(error)}") from error
        found = binding.get_outputs_as_ortvaluevector()  # get_outputs, before 1.32, gives what dies with the binding
        return {name: ort.OrtValue(found[place]) for place, name in enumerate(names)}


def number(value: Value) -> Any:
    """A 0-d value as a Python number. Raises FolderError if it holds more or less than one."""
    found = value.numpy()
    if found.size != 1:
        raise FolderError(f"a model of the folder gives {list(found.shape)} where one number is wanted.")
    return found.item()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
