"""The user's loss as a step calls it: on the leaves of an output with so many copies of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._pytree import TreeSpec

from ..compiler.probe import copy_of
from ..passes.graph import Layout
from .loss import BatchLoss, SampleLoss
from .whole_loss import WholeLoss

Losses = Callable[[list[Any], int, int], Tensor]
"""``(output leaves, copies, samples) -> losses``: ``(copies, samples)``, or ``(copies, 1)`` with batch credit; what
each node adds, ``(copies, nodes)``, where `CompiledModel.credits_nodes`."""


@dataclass(frozen=True)
class StepLoss:
    """`Losses` for any target. It holds on to neither a program nor a batch.

    Attributes:
        spec: the structure of the model's output.
        layouts: of its leaves.
        by_node: whether it gives what each node adds.
    """

    loss: SampleLoss | BatchLoss
    spec: TreeSpec
    layouts: Sequence[Layout | None]
    by_node: bool

    def __call__(self, target: Any, device: torch.device) -> Losses:
        """Of a perturbed part of the batch the samples are its first; the numbers come on `device`."""
        loss, spec, layouts = self.loss, self.spec, self.layouts

        def per_sample(leaves: list[Any], copies: int, samples: int) -> Tensor:
            assert isinstance(loss, SampleLoss)
            output = pytree.tree_unflatten(leaves, spec)
            losses = loss(output, loss.repeat(target, copies, samples), copies * samples)
            return losses.reshape(copies, samples).to(device)

        def batch(leaves: list[Any], copies: int, samples: int) -> Tensor:
            rows = [
                pytree.tree_unflatten(
                    [copy_of(leaf, layout, row, copies) for leaf, layout in zip(leaves, layouts, strict=True)], spec
                )
                for row in range(copies)
            ]
            return torch.stack([loss(output, target, samples) for output in rows]).reshape(copies, 1).to(device)

        def by_node(leaves: list[Any], copies: int, samples: int) -> Tensor:
            assert isinstance(loss, WholeLoss)
            return loss.of_nodes(pytree.tree_unflatten(leaves, spec), target).to(device)

        if self.by_node:
            return by_node
        return per_sample if isinstance(loss, SampleLoss) else batch
