"""The optimizers' steps as functions of tensors: torch's own formulas, one parameter at a time.

`UPDATES` has one row an optimizer. The tests hold each to ``torch.optim`` over many steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...passes.errors import ExportError

State = dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """An optimizer.

    Attributes:
        options: what it may be given, with torch's defaults; the learning rate is not one, it is an input of the graph.
        state: the names of what it keeps for each parameter, of the parameter's shape, zero at first.
        step: ``(weight, gradient, state, lr, count, options) -> (weight, state)``; `lr` is float32 ``()``, `count` the
            number of this step from 1, float64 ``()``.
    """

    options: Mapping[str, float]
    state: tuple[str, ...]
    step: Callable[[Tensor, Tensor, State, Tensor, Tensor, Mapping[str, float]], tuple[Tensor, State]]


def _sgd(
    weight: Tensor, gradient: Tensor, state: State, lr: Tensor, count: Tensor, options: Mapping[str, float]
) -> tuple[Tensor, State]:
    gradient = _decayed(gradient, weight, options)
    if not options["momentum"]:
        return weight - lr.to(weight.dtype) * gradient, {"momentum_buffer": state["momentum_buffer"]}
    moving = options["momentum"] * state["momentum_buffer"] + gradient  # torch starts it with the gradient: the same
    return weight - lr.to(weight.dtype) * moving, {"momentum_buffer": moving}


def _adam(
    weight: Tensor, gradient: Tensor, state: State, lr: Tensor, count: Tensor, options: Mapping[str, float]
) -> tuple[Tensor, State]:
    return _adam_step(weight, _decayed(gradient, weight, options), state, lr, count, options)


def _adamw(
    weight: Tensor, gradient: Tensor, state: State, lr: Tensor, count: Tensor, options: Mapping[str, float]
) -> tuple[Tensor, State]:
    kept = (1 - lr.double() * options["weight_decay"]).to(weight.dtype)
    return _adam_step(weight * kept, gradient, state, lr, count, options)


def _adam_step(
    weight: Tensor, gradient: Tensor, state: State, lr: Tensor, count: Tensor, options: Mapping[str, float]
) -> tuple[Tensor, State]:
    beta1, beta2 = options["beta1"], options["beta2"]
    first = state["exp_avg"] + (1 - beta1) * (gradient - state["exp_avg"])
    second = beta2 * state["exp_avg_sq"] + (1 - beta2) * (gradient * gradient)
    corrected1, corrected2 = 1 - beta1**count, 1 - beta2**count
    size = (lr.double() / corrected1).to(weight.dtype)
    spread = second.sqrt() / corrected2.sqrt().to(weight.dtype) + options["eps"]
    return weight - size * (first / spread), {"exp_avg": first, "exp_avg_sq": second}


def _decayed(gradient: Tensor, weight: Tensor, options: Mapping[str, float]) -> Tensor:
    return gradient + options["weight_decay"] * weight if options["weight_decay"] else gradient


_ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}

UPDATES: dict[str, Update] = {
    "sgd": Update({"momentum": 0.0, "weight_decay": 0.0}, ("momentum_buffer",), _sgd),
    "adam": Update(_ADAM, ("exp_avg", "exp_avg_sq"), _adam),
    "adamw": Update({**_ADAM, "weight_decay": 1e-2}, ("exp_avg", "exp_avg_sq"), _adamw),
}


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of `UPDATES` with its options and learning rate, and how many steps it has taken."""

    name: str
    lr: float
    options: Mapping[str, float]
    steps: int = 0

    @property
    def update(self) -> Update:
        """Its row."""
        return UPDATES[self.name]


_CLASSES = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}
_WITHOUT = ("nesterov", "dampening", "amsgrad", "maximize")


def described(optimizer: torch.optim.Optimizer) -> Optimizer:
    """A torch optimizer as one of `UPDATES`.

    Raises:
        ExportError: it is of another class, its parameters have several settings, or one of its options has no form
            here.
    """
    name = _CLASSES.get(type(optimizer))
    if name is None:
        known = ", ".join(f"torch.optim.{kind.__name__}" for kind in _CLASSES)
        raise ExportError(f"{type(optimizer).__name__} has no form in ONNX here; known are {known}.")
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    if any(group != groups[0] for group in groups[1:]):
        raise ExportError("the optimizer has groups of parameters with several settings; one group is exported.")
    given: dict[str, Any] = dict(groups[0])
    used = [option for option in _WITHOUT if given.get(option)]
    if used:
        raise ExportError(f"{type(optimizer).__name__}({used[0]}={given[used[0]]!r}) has no form in ONNX here.")
    if "betas" in given:
        given["beta1"], given["beta2"] = given["betas"]
    options = {key: float(given[key]) for key in UPDATES[name].options}
    counts = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    held = [parameter in optimizer.state for group in optimizer.param_groups for parameter in group["params"]]
    if len(counts) > 1 or (counts and not all(held)):
        raise ExportError("the optimizer's parameters have taken different numbers of steps; one number is exported.")
    return Optimizer(name, float(given["lr"]), options, max(counts, default=0))


def state_of(optimizer: torch.optim.Optimizer, parameter: Tensor, update: Update) -> State:
    """What the optimizer keeps for a parameter; zeros where it has made no step."""
    held = optimizer.state.get(parameter, {})
    found = {}
    for name in update.state:
        value = held.get(name)
        found[name] = torch.zeros_like(parameter) if value is None else value.detach().clone()
    return found


__all__ = ["UPDATES", "Optimizer", "State", "Update", "described", "state_of"]
