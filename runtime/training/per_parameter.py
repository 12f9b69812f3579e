"""An optimizer's step taken a parameter at a time: later than it was due, on any thread, with the bits of one step.

Most optimizers do to each parameter what its gradient, its state and its group's settings say, and look at no other.
Their step can be split, and its parts be tasks of the *next* training step, whose forward waits for no more than the
parts that it reads (`schedule.pipeline`, rule *chase*). What `ALONE` does not list goes whole: `coupling` says why.

A part is the step of a **sibling** of the optimizer: the same class and options, with one group of one parameter, as
the group was when the training step ended, and that parameter's own state. So threads share no group and no table of
states, and a scheduler that moves a learning rate meanwhile does not reach back. The whole, where no part has begun, is
the step of a sibling with all groups. What torch wraps around a step (hooks, profiling, dynamo), which costs a small
parameter more than its update, is left out.
"""

from __future__ import annotations

import inspect
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_hooks

from .update import scaled

Group = dict[str, Any]
"""A parameter group of an optimizer."""

State = defaultdict[Tensor, Any]
"""An optimizer's, by parameter."""

ALONE: dict[type[torch.optim.Optimizer], Any] = {
    kind: inspect.unwrap(kind.step)
    for kind in (
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.RMSprop,
        torch.optim.ASGD,
        torch.optim.Rprop,
    )
}
"""Optimizers that treat each parameter, and each of its elements, by itself, with their bare steps. Exact classes: a
subclass may couple parameters.
(Adafactor and Muon couple the elements of a parameter, in sums whose bits depend on the number of threads.)"""


def coupling(optimizer: torch.optim.Optimizer) -> str:
    """Why the optimizer's step has to be taken whole; "" if its parameters can be apart."""
    kind = type(optimizer)
    if torch.is_inference_mode_enabled():
        return "in inference mode the optimizer's state is of that mode"
    if kind not in ALONE:
        return f"{kind.__name__} may couple parameters"
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    if any(hooks) or torch_hooks._global_optimizer_pre_hooks or torch_hooks._global_optimizer_post_hooks:
        return f"{kind.__name__} has step hooks, which see all parameters"
    step = vars(optimizer).get("step")  # a learning-rate scheduler wraps it, to know that it was called
    if step is not None and getattr(step, "__wrapped__", None) is not kind.step:
        return f"the step of this {kind.__name__} was replaced"
    return ""


@dataclass
class _Part:
    """The update of one parameter."""

    name: str
    parameter: nn.Parameter
    group: Group
    trust: float
    state: Any = None
    """The optimizer's of this parameter, once it is updated."""

    def take(self, optimizer: torch.optim.Optimizer) -> None:
        own: State = defaultdict(dict)
        if self.parameter in optimizer.state:
            own[self.parameter] = optimizer.state[self.parameter]
        _step(optimizer, [{**self.group, "params": [self.parameter]}], own, [self])
        self.state = own.get(self.parameter)
        self.parameter.grad = None


class PendingUpdates:
    """The step of an optimizer of `ALONE`, not taken yet: `execution.step.Updates`.

    As if it were taken now: by the groups' present settings and `trust`. Until it is finished, gradients and optimizer
    are to be left alone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[int, str], trust: Mapping[str, float]) -> None:
        """
        Args:
            optimizer: with gradients in ``.grad``, which are cleared as they are used.
            names: of its parameters, by their ``id``.
            trust: the share of its update that each parameter takes, if not all.
        """
        self._optimizer = optimizer
        self._groups = [_copied(group) for group in optimizer.param_groups]
        parts = [
            _Part(names[id(parameter)], parameter, group, trust.get(names[id(parameter)], 1.0))
            for group in self._groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        self._parts = parts
        self._left = {part.name: part for part in parts}
        self._running = 0
        self._changed = threading.Condition()
        if "step" in vars(optimizer):
            optimizer._opt_called = True  # type: ignore[attr-defined]  # which a scheduler would warn of

    def gradient(self, parameter: str, /) -> Tensor | None:
        """What a parameter will be updated by; None if it has been, or has none."""
        part = self._left.get(parameter)
        return None if part is None else part.parameter.grad

    def apply(self, parameter: str, /) -> None:
        """Update a parameter, unless that is done or begun. Safe from any thread."""
        with self._changed:
            part = self._left.pop(parameter, None)
            if part is None:
                return
            self._running += 1
        try:
            part.take(self._optimizer)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def finish(self) -> None:
        """Update all that are left, in one step if those are all, and wait for those that other threads are at."""
        with self._changed:
            whole = bool(self._left) and len(self._left) == len(self._parts)
            if whole:
                self._left = {}
            self._changed.wait_for(lambda: not self._running)
        if whole:
            self._take_whole()
        for name in list(self._left):
            self.apply(name)
        state = self._optimizer.state
        for part in self._parts:  # in the order in which one step would make them
            if part.state is not None and part.parameter not in state:
                state[part.parameter] = part.state

    def __enter__(self) -> PendingUpdates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.finish()

    def _take_whole(self) -> None:
        _step(self._optimizer, self._groups, self._optimizer.state, self._parts)
        for part in self._parts:
            part.parameter.grad = None


def _copied(group: Group) -> Group:
    """The settings as they are now; a learning rate in a tensor is changed in place."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}


def _step(optimizer: torch.optim.Optimizer, groups: Sequence[Group], state: State, parts: Sequence[_Part]) -> None:
    """The bare step of an optimizer of the same class and options, with these groups and states, for these parts."""
    sibling: torch.optim.Optimizer = object.__new__(type(optimizer))
    vars(sibling).update(vars(optimizer))
    sibling.param_groups, sibling.state = list(groups), state
    with torch.no_grad():
        scaled(partial(ALONE[type(optimizer)], sibling), [(p.parameter, p.trust) for p in parts if p.trust < 1])
