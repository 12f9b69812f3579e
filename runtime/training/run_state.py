"""What a checkpoint holds of a training run (`capture`) and how it is put back (`restore`).

`differences` says why a checkpoint does not belong to a program.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...passes.errors import CheckpointError
from ..versions import versions
from .checkpoint import Checkpoint
from .random_state import capture_rng, restore_rng
from .trainable import CheckpointedProgram


class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


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
