"""Data files, batches, and what a trained model is judged by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...passes.errors import DataError
from .folder import Array, Folder, Form, loaded
from .session import Device, Model, Value

IGNORED = -100
"""The class of a target that does not count (torch's ``ignore_index``)."""


@dataclass(frozen=True)
class Split:
    """Samples: arrays by key, ``input:i`` and ``target:i``, of one length each."""

    arrays: dict[str, Array]
    whole: bool

    @property
    def samples(self) -> int:
        """How many; a whole graph is one."""
        return 1 if self.whole else len(next(iter(self.arrays.values())))

    def batches(self, size: int, order: Array | None = None) -> Iterator[dict[str, Array]]:
        """Batches in an order, the last one shorter where it must be."""
        if self.whole:
            yield self.arrays
            return
        for start in range(0, self.samples, size):
            rows = slice(start, start + size) if order is None else order[start : start + size]
            yield {key: np.ascontiguousarray(array[rows]) for key, array in self.arrays.items()}


def read_splits(path: str | Path, folder: Folder) -> tuple[Split, Split | None]:
    """The training samples of an ``.npz`` file, and the test samples if it has any.

    The file holds ``x`` and ``y``, or ``x0``, ``x1``, … and ``y0``, … for several, and with ``_test`` behind the name
    the test samples. dtypes and shapes are those of the folder's manifest, the samples first.

    Raises:
        DataError: the file cannot be read, lacks an array, has one that is not wanted, or one of another form.
    """
    try:
        found = loaded(path)
    except Exception as error:  # whatever a damaged file makes NumPy or zipfile raise
        raise DataError(f"{path} cannot be read as an .npz file: {error}") from error
    names = {**_names("x", folder.inputs), **_names("y", folder.targets)}
    known = {*names, *(f"{name}_test" for name in names)}
    unknown = sorted(set(found) - known)
    if unknown:
        raise DataError(f"{path} holds {unknown[0]!r}; {folder.model} takes {', '.join(names)}, and {_tests(names)}.")
    train = _split(path, found, names, "", folder)
    has_tests = any(name.endswith("_test") for name in found)
    return train, _split(path, found, names, "_test", folder) if has_tests else None


def _tests(names: dict[str, Form]) -> str:
    return ", ".join(f"{name}_test" for name in names)


def _names(letter: str, forms: tuple[Form, ...]) -> dict[str, Form]:
    if len(forms) == 1:
        return {letter: forms[0]}
    return {f"{letter}{form.key.rsplit(':', 1)[1]}": form for form in forms}


def _split(path: str | Path, found: dict[str, Array], names: dict[str, Form], suffix: str, folder: Folder) -> Split:
    arrays: dict[str, Array] = {}
    for name, form in names.items():
        if name + suffix not in found:
            raise DataError(f"{path} lacks {name + suffix!r}: {form.dtype} of shape {'×'.join(map(str, form.shape))}.")
        value = found[name + suffix]
        if folder.whole and form.key.startswith("input:") and value.ndim == len(form.shape) - 1:
            value = value[None]  # a graph's one batch
        if reason := form.misfit(value):
            raise DataError(f"{path}: {name + suffix} {reason}.")
        arrays[form.key] = value
    lengths = [len(value) for value in arrays.values()]
    if not folder.whole and len(set(lengths)) > 1:
        called, counts = (" and ".join(map(str, each)) for each in ([name + suffix for name in names], lengths))
        raise DataError(f"{path}: {called} have {counts} samples.")
    if not folder.whole and not min(lengths):
        raise DataError(f"{path} holds no sample.")
    return Split(arrays, folder.whole)


@dataclass(frozen=True)
class Score:
    """Mean loss of the samples, and of each the share of right answers, where targets are classes (else NaN)."""

    loss: float
    accuracy: float


class Judge:
    """Evaluates weights on samples, in evaluation mode."""

    def __init__(self, folder: Folder, device: Device, threads: int = 0) -> None:
        self.model = Model(folder.file("inference.onnx"), device, threads)
        self.loss = Model(folder.file("loss.onnx"), device, threads)
        self.device = device
        self.model.check([*self.model.defaults, *(form.key for form in folder.inputs)], [])
        targets = [form.key for form in folder.targets]
        self.loss.check([*self.model.outputs, *targets], ["losses"])

    def __call__(self, state: dict[str, Value], split: Split, batch_size: int) -> Score:
        """The score of the state's weights."""
        losses, right, counted, samples = 0.0, 0.0, 0, 0
        for batch in split.batches(batch_size):
            values = {key: self.device.value(array) for key, array in batch.items()}
            outputs = self.model({**state, **values})
            found = self.loss({**outputs, **values})["losses"].numpy()
            losses += float(found.astype(np.float64).sum())
            samples += found.size
            shares = _right(outputs[self.model.outputs[0]].numpy(), batch.get("target:0"))
            if shares is not None:
                right, counted = right + float(shares.sum()), counted + shares.size
        return Score(losses / samples, right / counted if counted else math.nan)


def _right(output: Array, target: Array | None) -> Array | None:
    """The share of right answers of each sample: class scores (N, C, …) or (N, …, C) against class numbers (N, …).

    As `runtime.training.evaluation.accuracy`: answers to `IGNORED` do not count, nor samples without any other.
    """
    if target is None or not np.issubdtype(target.dtype, np.integer) or output.ndim < 2:
        return None
    if output.ndim == target.ndim + 2 and output.shape[0] == 1:  # a whole graph's
        output = output[0]
    for axis in (1, output.ndim - 1):
        if tuple(size for place, size in enumerate(output.shape) if place != axis) == target.shape:
            rows = (len(target), -1)
            right = (output.argmax(axis) == target).reshape(rows).sum(1)
            counted = (target != IGNORED).reshape(rows).sum(1)
            found: Array = right[counted > 0] / counted[counted > 0]
            return found
    return None
