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

What is stored of a run and how it is put back is `capture` and `restore`; `differences` says why a checkpoint does not
belong to a program.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import shutil
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..passes.errors import CheckpointError

FORMAT = 1
TENSORS_FILE = "state.safetensors"
STATE_FILE = "state.json"

_NAME = re.compile(r"step-(\d{9,})(\.old)?")
_TAG = "!"


class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


class CheckpointedProgram(Protocol):
    """What a checkpoint needs of a compiled program."""

    model: nn.Module
    seed: int

    def state_dict(self) -> dict[str, Any]:
        """Everything beyond the model's own state: step count, forwards spent, learned tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Take over what `state_dict` gave. The tensors are on the CPU, and the program's to keep."""
        ...


class _DamagedError(CheckpointError):
    """The files do not hold what was written: `latest` goes on to the checkpoint before."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified: its folder, its step and the tree that was stored."""

    path: Path
    step: int
    versions: dict[str, str]
    state: dict[str, Any]


# --- the tree ---------------------------------------------------------------------------------------------------------


class _Encoder:
    """Split a tree of Python values and tensors into JSON and a flat dict of tensors that share no memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._storages: set[int] = set()

    def encode(self, value: object, path: str) -> Any:
        """`value` as JSON; `path` is its dotted place in the tree, for tensor names and messages."""
        if value is None or isinstance(value, bool) or type(value) in (int, str):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, np.ndarray):
            return {_TAG: "numpy", "of": self._tensor(torch.from_numpy(value.copy()), path)}
        if isinstance(value, np.generic):
            return self.encode(value.item(), path)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {_TAG: "float", "of": repr(float(value))}
        if isinstance(value, torch.dtype | torch.device):
            return {_TAG: type(value).__name__, "of": str(value).removeprefix("torch.")}
        if type(value) in (dict, OrderedDict):
            return self._mapping(value, path)
        if type(value) is Counter:
            return {_TAG: "counter", "of": self._pairs(value, path)}
        if type(value) is list:
            return self._items(value, path)
        if type(value) in (tuple, torch.Size):
            return {_TAG: "tuple", "of": self._items(value, path)}
        if type(value) is deque:
            return {_TAG: "deque", "of": self._items(value, path), "maxlen": value.maxlen}
        raise CheckpointError(
            f"cannot store {path!r} in a checkpoint: it is a {type(value).__module__}.{type(value).__qualname__}. "
            "Checkpoints hold tensors, numbers, strings, None, and lists, tuples and dicts of them."
        )

    def _items(self, values: Any, path: str) -> list[Any]:
        return [self.encode(value, f"{path}.{index}") for index, value in enumerate(values)]

    def _pairs(self, values: Any, path: str) -> list[list[Any]]:
        return [[self.encode(k, path), self.encode(v, f"{path}.{k}")] for k, v in values.items()]

    def _mapping(self, values: Any, path: str) -> Any:
        if all(type(key) is str for key in values) and _TAG not in values:
            return {key: self.encode(value, f"{path}.{key}" if path else key) for key, value in values.items()}
        return {_TAG: "dict", "of": self._pairs(values, path)}

    def _tensor(self, tensor: Tensor, path: str) -> dict[str, Any]:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "quantized" if tensor.is_quantized else "meta" if tensor.is_meta else str(tensor.layout)
            raise CheckpointError(f"cannot store the {kind} tensor {path!r} in a checkpoint: only dense ones.")
        name, number = path, 1
        while name in self.tensors:
            name, number = f"{path}#{number}", number + 1
        tag: dict[str, Any] = {_TAG: "tensor", "name": name}
        data = tensor.detach().resolve_conj().resolve_neg()
        if data.is_complex():
            tag["complex"] = True
            data = torch.view_as_real(data)
        elif not data.is_contiguous():
            for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
                if data.dim() == dims and data.is_contiguous(memory_format=memory_format):
                    tag["memory_format"] = str(memory_format).removeprefix("torch.")
        data = data.cpu().contiguous()
        storage = data.untyped_storage()
        if storage.data_ptr() in self._storages or storage.nbytes() != data.numel() * data.element_size():
            data = data.clone()
        self._storages.add(data.untyped_storage().data_ptr())
        self.tensors[name] = data
        return tag


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_Encoder.encode`. Tensors come on the CPU in fresh, aligned memory."""
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {key: _decode(item, tensors) for key, item in value.items()}
    if kind == "tensor":
        data = tensors[value["name"]].clone()
        if value.get("complex"):
            data = torch.view_as_complex(data)
        if "memory_format" in value:
            data = data.contiguous(memory_format=getattr(torch, value["memory_format"]))
        return data
    of = value["of"]
    if kind == "numpy":
        return _decode(of, tensors).numpy()
    if kind == "float":
        return float(of)
    if kind == "dtype":
        return getattr(torch, of)
    if kind == "device":
        return torch.device(of)
    if kind in ("dict", "counter"):
        pairs = {_decode(key, tensors): _decode(item, tensors) for key, item in of}
        return pairs if kind == "dict" else Counter(pairs)
    items = [_decode(item, tensors) for item in of]
    return tuple(items) if kind == "tuple" else deque(items, value["maxlen"])


# --- the files --------------------------------------------------------------------------------------------------------


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def versions() -> dict[str, str]:
    """The versions that decide whether two runs can agree to the last bit."""
    try:
        onward = importlib.metadata.version("onward")
    except importlib.metadata.PackageNotFoundError:
        onward = "unknown"
    return {
        "onward": onward,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _digest(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write(directory: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write the tree `state` as the checkpoint of `step` into `directory` (made if missing); return its folder.

    Raises `CheckpointError` if the folder cannot be written, the disk is full, or the tree holds something that is
    neither a tensor nor a plain Python value (named by its place). What was there before is still there then.
    """
    encoder = _Encoder()
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
        return Checkpoint(path, document["step"], document["versions"], _decode(document["state"], tensors))
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: neither JSON nor UTF-8
        raise _DamagedError(f"{path} cannot be read: {error}") from error


def candidates(directory: Path) -> list[Path]:
    """The checkpoint folders in `directory`, newest first, verified or not."""
    try:
        entries = [(match, entry) for entry in directory.iterdir() if (match := _NAME.fullmatch(entry.name))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"cannot look for checkpoints in {directory}: {error}") from error
    entries.sort(key=lambda pair: (int(pair[0][1]), pair[0][2] is None), reverse=True)
    return [entry for _, entry in entries]


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


# --- what is stored of a run ------------------------------------------------------------------------------------------


def _class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _fingerprint(model: nn.Module) -> dict[str, str]:
    """Name → "dtype [shape], trainable" of every parameter and buffer."""
    parameters = {
        name: f"{parameter.dtype} {list(parameter.shape)}{', trainable' if parameter.requires_grad else ''}"
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    buffers = {
        name: f"{buffer.dtype} {list(buffer.shape)}, buffer"
        for name, buffer in model.named_buffers(remove_duplicate=False)
    }
    return parameters | buffers


def _group_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]


def _unsaved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name not in saved)


def capture_rng() -> dict[str, Any]:
    """The states of the global generators of torch (CPU and, where in use, CUDA), NumPy and Python."""
    version, numbers, gauss = random.getstate()
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if in_use else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": np.random.get_state(legacy=False),
        "python": {"version": version, "numbers": torch.tensor(numbers), "gauss": gauss},
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put the global generators back to what `capture_rng` saw."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    python = state["python"]
    random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))


def capture(
    program: CheckpointedProgram, optimizer: torch.optim.Optimizer, scheduler: _Stateful | None, position: object
) -> dict[str, Any]:
    """The tree to `write`: everything that decides how training goes on. `position` is the trainer's own part.

    It refers to the live tensors: write it before the next step.
    """
    return {
        "seed": program.seed,
        "fingerprint": _fingerprint(program.model),
        "optimizer_class": _class_name(optimizer),
        "optimizer_groups": _group_names(program.model, optimizer),
        "scheduler_class": None if scheduler is None else _class_name(scheduler),
        "position": position,
        "model": dict(program.model.state_dict()),
        "unsaved_buffers": dict(_unsaved_buffers(program.model)),
        "optimizer": optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "program": program.state_dict(),
        "rng": capture_rng(),
    }


def differences(
    state: Mapping[str, Any],
    program: CheckpointedProgram,
    optimizer: torch.optim.Optimizer,
    scheduler: _Stateful | None,
) -> list[str]:
    """In words, why the stored `state` does not belong to this program, optimizer and scheduler; empty if it does."""
    found: list[str] = []
    stored, here = state["fingerprint"], _fingerprint(program.model)
    for name in list(dict.fromkeys([*stored, *here])):
        if name not in here:
            found.append(f"{name!r} ({stored[name]}) is not in the model")
        elif name not in stored:
            found.append(f"the model's {name!r} ({here[name]}) is not in the checkpoint")
        elif stored[name] != here[name]:
            found.append(f"{name!r} is {stored[name]} in the checkpoint and {here[name]} in the model")
    if len(found) > 6:
        found[5:] = [f"and {len(found) - 5} more parameters and buffers differ"]
    if state["optimizer_class"] != _class_name(optimizer):
        found.append(f"the optimizer was {state['optimizer_class']} and is {_class_name(optimizer)}")
    elif not found and state["optimizer_groups"] != _group_names(program.model, optimizer):
        found.append("the optimizer's parameter groups hold other parameters, or in another order")
    scheduler_class = None if scheduler is None else _class_name(scheduler)
    if state["scheduler_class"] != scheduler_class:
        found.append(f"the scheduler was {state['scheduler_class']} and is {scheduler_class}")
    if state["seed"] != program.seed:
        found.append(f"the seed was {state['seed']} and is {program.seed}")
    return found


def _uncast(loaded: Any, saved: Any) -> Any:
    """`loaded`, with tensors in the dtype they were saved in and leaves that are no tensors as they were saved."""
    if isinstance(saved, Tensor):
        same = isinstance(loaded, Tensor) and loaded.dtype == saved.dtype
        return loaded if same else saved.to(loaded.device if isinstance(loaded, Tensor) else "cpu")
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return {key: _uncast(loaded.get(key), value) for key, value in saved.items()}
    if type(saved) in (list, tuple) and type(loaded) is type(saved) and len(loaded) == len(saved):
        return type(saved)(_uncast(x, y) for x, y in zip(loaded, saved, strict=True))
    return saved


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """`optimizer.load_state_dict`, which casts state to the dtype of its parameter, and then the exact values."""
    optimizer.load_state_dict(saved)
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in saved["state"]:
            optimizer.state[parameter] = _uncast(optimizer.state[parameter], saved["state"][number])


def restore(
    checkpoint: Checkpoint,
    program: CheckpointedProgram,
    optimizer: torch.optim.Optimizer,
    scheduler: _Stateful | None,
) -> Any:
    """Put program, model (in place), optimizer, scheduler and global generators back; return the trainer's part.

    Raises `CheckpointError`, saying what differs, before anything is changed, if the checkpoint is of another model,
    optimizer, scheduler or seed. Another version of torch is a `UserWarning`: the last bits may differ.
    """
    state = checkpoint.state
    found = differences(state, program, optimizer, scheduler)
    if found:
        raise CheckpointError(f"{checkpoint.path} is a checkpoint of another run: " + "; ".join(found) + ".")
    if checkpoint.versions["torch"] != versions()["torch"]:
        warnings.warn(
            f"{checkpoint.path} was written with torch {checkpoint.versions['torch']}, this is "
            f"{versions()['torch']}: the run goes on, but not to the last bit as it would have.",
            UserWarning,
            stacklevel=2,
        )
    try:
        program.load_state_dict(state["program"])
        weights = program.model.state_dict()  # for the metadata that the modules' own loading looks at
        for name in list(weights):
            weights[name] = state["model"][name]
        program.model.load_state_dict(weights)
        with torch.no_grad():
            for name, buffer in _unsaved_buffers(program.model):
                buffer.copy_(state["unsaved_buffers"][name])
        _load_optimizer(optimizer, state["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(state["scheduler"])
    except (KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{checkpoint.path} does not fit this run: {error}") from error
    restore_rng(state["rng"])
    return state["position"]
