"""The folder that `onward export` writes, read with suspicion: nothing in it is executed or looked up outside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.npyio import NpzFile

from ...passes.errors import FolderError

FORMAT = "onward-training"
VERSION = 1

COUNTERS = ("feedback:steps", "feedback:next_probe")
"""What of the state says whether a step has perturbed runs, where not every step has."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Form:
    """What a key holds: a dtype's NumPy name and a shape, in which ``"N"`` is the batch size.

    Of class numbers also how many classes there are, and which other numbers the loss takes (``ignore_index``); of
    numbers that an embedding reads, how many it has.
    """

    key: str
    dtype: str
    shape: tuple[int | str, ...]
    classes: int | None = None
    ignored: tuple[int, ...] = ()

    def misfit(self, value: Array) -> str:
        """Why a value is not of this form; empty if it is."""
        wanted = "×".join(map(str, self.shape)) or "a number"
        if str(value.dtype) != self.dtype:
            return f"is {value.dtype}, and {self.dtype} is wanted"
        fits = len(value.shape) == len(self.shape) and all(
            isinstance(size, str) or size == found for size, found in zip(self.shape, value.shape, strict=True)
        )
        if not fits:
            return f"has shape {'×'.join(map(str, value.shape)) or '()'}, and {wanted} is wanted"
        if self.classes is None:
            return ""
        foreign = value[((value < 0) | (value >= self.classes)) & ~np.isin(value, self.ignored)]
        what, many = ("class", "classes") if self.key.startswith("target:") else ("number", "numbers")
        return f"holds {what} {foreign[0]}, and {many} are 0 to {self.classes - 1}" if foreign.size else ""


@dataclass(frozen=True)
class TaskFile:
    """A task of a step: its model's file, and the keys that it reads and writes."""

    name: str
    file: Path
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    perturbed: bool


@dataclass(frozen=True)
class Folder:
    """What a manifest says.

    Attributes:
        path: the folder.
        model: the model's name.
        least: samples that a batch must have: 2 where the model normalises by a batch's own statistics.
        inputs, targets: what a batch holds.
        state: what a step starts from.
        new: by key of the state the key of its new value; its own where a step leaves it as it is.
        parameters: names of those that are trained.
        tasks: the step's tasks in an order that can be run.
        seed, step: of the noise, and the number of the first step.
        optimizer: its name, learning rate and options.
        always: whether every step has perturbed runs; if not, those of the first `warmup` learning steps have, and
            then those that the state's ``feedback:next_probe`` says.
        whole: whether a batch is one whole graph, whose inputs have a dimension of 1 in front.
        training: epochs, batch size and schedule that the export was made with, as defaults.
        forwards: perturbed forwards of a sample in a step with perturbed runs.
    """

    path: Path
    model: str
    least: int
    inputs: tuple[Form, ...]
    targets: tuple[Form, ...]
    state: tuple[Form, ...]
    new: Mapping[str, str]
    parameters: tuple[str, ...]
    tasks: tuple[TaskFile, ...]
    seed: int
    step: int
    optimizer: Mapping[str, Any]
    always: bool
    warmup: int
    whole: bool
    training: Mapping[str, Any]
    forwards: float

    def digest(self) -> str:
        """SHA-256 of the step's model: of what is computed, but not from which numbers."""
        return hashlib.sha256(self.file("training_step.onnx").read_bytes()).hexdigest()

    def file(self, name: str) -> Path:
        """A file of the folder."""
        return inside(self.path, name)


def read_folder(path: str | Path) -> Folder:
    """The manifest of a folder.

    Raises:
        FolderError: there is none, it is damaged, of a newer version, or names files outside of the folder.
    """
    folder = Path(path)
    manifest = folder / "manifest.json"
    try:
        text = manifest.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FolderError(f"{manifest} cannot be read: {error}. `onward export` writes such a folder.") from error
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{manifest} is damaged: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise FolderError(f"{manifest} is not the manifest of an exported training step ({FORMAT!r}).")
    if found.get("version") != VERSION:
        raise FolderError(
            f"{manifest} has version {found.get('version')!r}, and this Onward reads version {VERSION}: use the Onward "
            "that wrote it, or a newer one."
        )
    try:
        return _folder(folder, found)
    except KeyError as error:
        raise FolderError(f"{manifest} is damaged: it lacks {error}.") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FolderError(f"{manifest} is damaged: {error}") from error


def _folder(folder: Path, found: dict[str, Any]) -> Folder:
    tasks = tuple(
        TaskFile(
            str(task["name"]), inside(folder, task["file"]), tuple(map(str, task["reads"])),
            tuple(map(str, task["writes"])), bool(task["perturbed"]),
        )
        for task in found["tasks"]
    )  # fmt: skip
    state = tuple(map(_form, found["state"]))
    made = Folder(
        path=folder,
        model=str(found["model"]),
        least=int(found["least"]),
        inputs=tuple(map(_form, found["inputs"])),
        targets=tuple(map(_form, found["targets"])),
        state=state,
        new={str(entry["key"]): str(entry["new"]) for entry in found["state"]},
        parameters=tuple(map(str, found["parameters"])),
        tasks=tasks,
        seed=int(found["seed"]),
        step=int(found["step"]),
        optimizer={
            **found["optimizer"], "name": str(found["optimizer"]["name"]), "lr": float(found["optimizer"]["lr"]),
        },
        always=bool(found["probe"]["always"]),
        warmup=int(found["probe"]["warmup"]),
        whole=bool(found["whole"]),
        training=_training(found["settings"].get("training", {})),
        forwards=float(found["forwards"]),
    )  # fmt: skip
    _check_tasks(made)
    return made


def _training(found: dict[str, Any]) -> dict[str, Any]:
    """Of the settings those that the trainer takes, as far as they are there."""
    types = {"epochs": int, "batch_size": int, "schedule": str}
    return {name: kind(found[name]) for name, kind in types.items() if name in found}


def _check_tasks(folder: Folder) -> None:
    """Raise FolderError unless every task can be run after those before it, and they make all that a step gives."""
    manifest = folder.path / "manifest.json"
    known = {form.key for form in (*folder.inputs, *folder.targets, *folder.state)}
    known |= {"runtime:key", "runtime:step", "runtime:lr"}
    for task in folder.tasks:
        missing = [key for key in task.reads if key not in known]
        if missing:
            raise FolderError(f"{manifest} is damaged: no task before {task.name} makes {missing[0]}.")
        known.update(task.writes)
    absent = [key for key in (*folder.new.values(), "loss", "finite") if key not in known]
    if absent:
        raise FolderError(f"{manifest} is damaged: no task makes {absent[0]}.")
    if not folder.always and not folder.new.keys() >= set(COUNTERS):
        raise FolderError(f"{manifest} is damaged: its state lacks {' or '.join(COUNTERS)}.")


def _form(entry: dict[str, Any]) -> Form:
    shape = tuple(size if isinstance(size, str) else int(size) for size in entry["shape"])
    classes = entry.get("classes")
    ignored = tuple(map(int, entry.get("ignored", ())))
    return Form(str(entry["key"]), str(entry["dtype"]), shape, None if classes is None else int(classes), ignored)


def inside(folder: Path, name: str) -> Path:
    """A file of a folder; FolderError for a name that leads out of it."""
    path = folder / name
    try:
        leaves = Path(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # a loop of links
        raise FolderError(f"{path} cannot be read: {error}") from error
    if leaves:
        raise FolderError(f"{folder} names {name!r}, which leads out of the folder.")
    return path


def loaded(path: str | Path, keys: Sequence[str] | None = None) -> dict[str, Array]:
    """The arrays of an ``.npz`` file, of `keys` those that are there; pickles are never read.

    Raises whatever a damaged file makes NumPy or zipfile raise.
    """
    with open(path, "rb") as file:  # closed also where NumPy finds no archive in it
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, NpzFile):
            raise ValueError("it holds one array, and no names")
        return {key: archive[key] for key in (archive.files if keys is None else keys) if key in archive.files}


def read_arrays(path: Path, forms: Sequence[Form]) -> dict[str, Array]:
    """All arrays of these forms in an ``.npz`` file.

    Raises:
        FolderError: the file cannot be read, lacks one of them, or has one of another form.
    """
    try:
        found = loaded(path, [form.key for form in forms])
    except Exception as error:
        raise FolderError(f"{path} cannot be read: {error}") from error
    for form in forms:
        if form.key not in found:
            raise FolderError(f"{path} lacks {form.key}.")
        if reason := form.misfit(found[form.key]):
            raise FolderError(f"{path}: {form.key} {reason}.")
    return found
