"""Whether a loss's code may be captured in a graph, which does again only what it did on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..out_of_memory import is_out_of_memory
from ..step_loss import Losses
from ..targets import target_tensors
from ..traced_loss import written
from .precision import uncached_autocast


class WatchedLoss(TorchDispatchMode):
    """A loss that is watched while it is called.

    Attributes:
        objection: the first thing it did that a graph would not do again, in words; empty if nothing was.
        own: tensors that it read and was not given, which a graph reads where they stand.
    """

    supports_higher_order_operators = True

    def __init__(self, loss: Losses, device: torch.device, target: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.loss = loss
        self.device = device
        self.target = target_tensors(target)
        self.objection = ""
        self.own: list[Tensor] = []
        self._known: dict[int, StorageWeakRef] = {}
        """By memory, what a call was given or has made."""

    def __call__(self, leaves: list[Any], copies: int, samples: int) -> Tensor:
        self._known = {}
        self._learn([*self.own, *self.target, *leaves])
        try:
            with uncached_autocast(), self:
                return self.loss(leaves, copies, samples)
        except Exception as error:  # a compiler within that takes no mode; or the loss's own, which it raises again
            if is_out_of_memory(error):
                raise
            self.objection = f"the loss cannot be watched ({type(error).__name__})"
        return self.loss(leaves, copies, samples)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not self.objection:
            self.objection = self._judged(func, args, kwargs or {}, found)
        return found

    def _judged(self, func: Any, args: Any, kwargs: Any, found: Any) -> str:
        """What is wrong with an operation, in words; nothing."""
        read, made = (
            [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]
            for values in ((args, kwargs), found)
        )
        if not isinstance(func, torch._ops.OpOverload):
            return f"the loss calls {func}, which has operations within"
        if any(value.layout is not torch.strided for value in (*read, *made)):
            return "the loss computes with sparse tensors"
        if torch.Tag.nondeterministic_seeded in func.tags:
            return "the loss draws random numbers"
        if _looks(func, args):
            return "the loss looks at numbers"
        if any(value.device != self.device for value in (*read, *made)):
            return f"the loss computes on another device than {self.device}"
        foreign = [value for value in read if not self._knows(value)]
        kept = {_memory(value) for value in (*foreign, *self.target, *self.own)}
        if any(_memory(value) in kept for value in written(func, args, kwargs)):
            return "the loss writes into tensors that it has not made"
        self.own += foreign
        self._learn([*foreign, *made])
        return ""

    def has_other(self, before: Sequence[Tensor]) -> bool:
        """Whether it read what it did not `before`, in another step: its own work, as an average that it follows."""
        known = {_memory(value) for value in before}
        return any(_memory(value) not in known for value in self.own)

    def _learn(self, values: list[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor) and value.layout is torch.strided:
                self._known[_memory(value)] = StorageWeakRef(value.untyped_storage())

    def _knows(self, value: Tensor) -> bool:
        known = self._known.get(_memory(value))
        return known is not None and not known.expired()


def _memory(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _looks(func: Any, args: Any) -> bool:
    """Whether what an operation does depends on a tensor's numbers, so that the host reads them."""
    if func is torch.ops.aten.index.Tensor:  # tagged so for its masks alone
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
