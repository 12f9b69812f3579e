"""Whether a loss's code may be captured in a graph, which does again only what it did on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..traced_loss import written

Losses = Callable[[list[Any], int, int], Tensor]
"""`StepInput.loss`."""


class WatchedLoss(TorchDispatchMode):
    """A loss that is watched while it is called.

    Attributes:
        objection: the first thing it did that a graph would not do again, in words; empty if nothing was.
        own: tensors that it read and was not given, which a graph reads where they stand.
    """

    def __init__(self, loss: Losses, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.loss = loss
        self.device = device
        self.objection = ""
        self.own: list[Tensor] = []
        self._known: dict[int, Tensor] = {}
        """By memory, tensors that a call was given or has made; held, so that no other has the same."""

    def __call__(self, leaves: list[Any], copies: int, samples: int) -> Tensor:
        self._learn([*self.own, *leaves])
        try:
            with self:
                return self.loss(leaves, copies, samples)
        finally:
            self._known = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        read = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        made = [value for value in pytree.tree_leaves(found) if isinstance(value, Tensor)]
        foreign = [value for value in read if value.untyped_storage()._cdata not in self._known]
        self.own += foreign
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._object("draws random numbers")
        elif torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self._object("looks at numbers")
        elif any(value.device != self.device for value in (*read, *made)):
            self._object(f"computes on another device than {self.device}")
        elif any(value is other for value in written(func, args, kwargs or {}) for other in foreign):
            self._object("writes into tensors of its own")
        self._learn([*foreign, *made])
        return found

    def _learn(self, values: list[Any]) -> None:
        self._known.update((value.untyped_storage()._cdata, value) for value in values if isinstance(value, Tensor))

    def _object(self, what: str) -> None:
        self.objection = self.objection or f"the loss {what}"
