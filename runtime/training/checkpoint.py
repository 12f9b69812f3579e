"""Checkpoints: one folder a step, written atomically, verified when read, never pickled.

A checkpoint ``step-000000123/`` holds two files:

- ``state.safetensors``: every tensor (weights, buffers, optimizer state, the program's own tensors, generator states);
- ``state.json``: everything else as a tree in which ``{"!": "tensor", "name": …}`` stands for a tensor of the other
  file, the versions that wrote it, the SHA-256 of the tensor file, and the SHA-256 of the JSON itself.

**Writing** goes to a hidden folder beside, is flushed to the disk (files, folder, parent), and becomes visible by one
rename. A process killed at any moment leaves the earlier checkpoints, and possibly a ``.tmp-*`` folder that the next
run removes. Where a checkpoint of the same step exists it is first renamed to ``step-….old``, which reading still
knows, so that not even then there is a moment without it.

**Reading** verifies both checksums. `latest` passes over a damaged checkpoint with a warning that names it.

What is stored of a run, and how it is put back, is in `run_state`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...compiler.files import fsync
from ...passes.errors import CheckpointError
from ..versions import versions
from .state_tree import Encoder, decode

FORMAT = 1
TENSORS_FILE = "state.safetensors"
STATE_FILE = "state.json"

_NAME = re.compile(r"step-\d{9,}(\.old)?")


class _DamagedError(CheckpointError):
    """The files do not hold what was written: `latest` goes on to the checkpoint before."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified: its folder, its step and the tree that was stored."""

    path: Path
    step: int
    versions: dict[str, str]
    state: dict[str, Any]


def _digest(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write(directory: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write the tree `state` as the checkpoint of `step` into `directory` (made if missing); return its folder.

    Raises `CheckpointError` if the folder cannot be written, the disk is full, or the tree holds something that is
    neither a tensor nor a plain Python value (named by its place). What was there before is still there then.
    """
    encoder = Encoder()
    payload = encoder.encode(dict(state), "")
    final = directory / f"step-{step:09d}"
    temporary = directory / f".tmp-{final.name}-{os.getpid()}"
    old = directory / f"{final.name}.old"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        tensors_file, state_file = temporary / TENSORS_FILE, temporary / STATE_FILE
        save_file(encoder.tensors, tensors_file)
        fsync(tensors_file)
        with tensors_file.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        document: dict[str, Any] = {
            "format": FORMAT,
            "step": step,
            "versions": versions(),
            "tensors": {"file": TENSORS_FILE, "bytes": tensors_file.stat().st_size, "sha256": sha256},
            "state": payload,
        }
        document["sha256"] = _digest(document)
        state_file.write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
        fsync(state_file)
        fsync(temporary)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        os.rename(temporary, final)
        fsync(directory)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the checkpoint {final}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def read(path: Path) -> Checkpoint:
    """Read and verify the checkpoint in the folder `path`.

    Raises `CheckpointError` if a file is missing, cut short or altered, or was written in another format.
    """
    try:
        document = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise _DamagedError(f"{path / STATE_FILE} is damaged: it does not hold an object")
        sha256 = document.pop("sha256", None)
        if sha256 != _digest(document):
            raise _DamagedError(f"{path / STATE_FILE} is damaged: its checksum does not match")
        if document["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has checkpoint format {document['format']}, this version of Onward reads format {FORMAT}"
            )
        tensors_file = path / TENSORS_FILE
        size, expected = tensors_file.stat().st_size, document["tensors"]["bytes"]
        if size != expected:
            raise _DamagedError(f"{tensors_file} is damaged: it has {size} bytes instead of {expected}")
        with tensors_file.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != document["tensors"]["sha256"]:
                raise _DamagedError(f"{tensors_file} is damaged: its checksum does not match")
        tensors = load_file(tensors_file)
        return Checkpoint(path, document["step"], document["versions"], decode(document["state"], tensors))
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: neither JSON nor UTF-8
        raise _DamagedError(f"{path} cannot be read: {error}") from error


def candidates(directory: Path) -> list[Path]:
    """The checkpoint folders in `directory`, newest first, verified or not."""
    try:
        found = [entry for entry in directory.iterdir() if _NAME.fullmatch(entry.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"cannot look for checkpoints in {directory}: {error}") from error
    return sorted(found, key=lambda path: (_step_of(path), path.suffix != ".old"), reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removesuffix(".old").removeprefix("step-"))


def latest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint in `directory` that verifies; None if there is none at all.

    A damaged one is passed over with a `UserWarning` that names it. Raises `CheckpointError` if all are damaged.
    """
    damage: list[str] = []
    for path in candidates(directory):
        try:
            checkpoint = read(path)
        except _DamagedError as error:
            damage.append(str(error))
            continue
        for message in damage:
            warnings.warn(f"{message}. Using {checkpoint.path} instead.", UserWarning, stacklevel=2)
        return checkpoint
    if damage:
        raise CheckpointError(f"no checkpoint in {directory} can be used: " + "; ".join(damage))
    return None


def set_aside(directory: Path, step: int) -> None:
    """Rename what is newer than `step` (passed over as damaged) to ``step-….damaged``: pruning must not count it."""
    for path in candidates(directory):
        if _step_of(path) > step:
            target = path.with_name(f"{path.name.removesuffix('.old')}.damaged")
            shutil.rmtree(target, ignore_errors=True)
            os.rename(path, target)


def prune(directory: Path, keep: int | None) -> None:
    """Delete all but the `keep` newest checkpoints (None: delete none). A kill in between leaves no half ones."""
    found = candidates(directory)
    whole = [path for path in found if path.suffix != ".old"]
    doomed_paths = [path for path in found if path.suffix == ".old" and whole and _step_of(path) < _step_of(whole[0])]
    for path in doomed_paths + (whole[keep:] if keep is not None else []):
        doomed = path.with_name(f".tmp-pruned-{path.name}")
        with contextlib.suppress(OSError):
            os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def clean(directory: Path) -> None:
    """Make `directory` if missing, see that it can be written, and remove what killed processes left in it.

    Raises `CheckpointError` if it cannot be written.
    """
    probe = directory / f".tmp-probe-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.mkdir(exist_ok=True)
        for entry in list(directory.iterdir()):
            if entry.name.startswith(".tmp-") and entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name.startswith(".tmp-"):
                entry.unlink()
            elif entry.suffix == ".old" and _NAME.fullmatch(entry.name) and entry.with_suffix("").exists():
                with contextlib.suppress(CheckpointError):
                    read(entry.with_suffix(""))  # only a checkpoint that verifies replaces the one before
                    shutil.rmtree(entry, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoints into {directory}: {error}") from error
