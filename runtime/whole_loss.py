"""The loss of a model whose sample is a whole graph: called on the outputs as the user's model returns them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..passes.errors import BatchError, LossShapeError
from .loss import Loss, SampleLoss, as_real


class WholeLoss(SampleLoss):
    """``(output, target) -> (samples,)``, a sample being a copy of the whole graph, from a loss of one graph.

    The loss may return one number, or one a node (of any shape, whose first dimension is the nodes). A torch loss with
    a ``reduction`` is asked for the latter. Of those the graph's loss is the mean, or the sum where that is its
    reduction; with an ``ignore_index`` it is the mean over the nodes that are not ignored, with class weights the
    weighted one, as torch's own reduction has it.
    """

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss)
        self.node_loss = self.loss
        self.ignored = _ignore_index(loss)
        self.class_weights: Tensor | None = loss.weight if isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)) else None
        self.loss = self.of_rows
        self.couples: bool | None = None
        """Whether a node's loss reads another node's output, so that only their sum counts; found at the first call."""

    def __call__(self, output: Any, target: Any, samples: int) -> Tensor:
        """Raises LossShapeError unless the loss gives real numbers of one shape."""
        return self.of_rows(output, target).detach()

    def repeat(self, target: Any, copies: int, samples: int) -> Any:
        """The graph's target, which is that of every copy."""
        return target

    def of_graph(self, output: Any, target: Any) -> Tensor:
        """The loss of one graph, ``(1,)``, of what the user's model returned."""
        return self._one(output, target).sum().reshape(1).detach()

    def of_rows(self, output: Any, target: Any) -> Tensor:
        """The loss of every copy, ``(copies,)``, with its derivative where the user's loss has one."""
        return torch.stack([row.sum() for row in self._rows(output, target)])

    def of_nodes(self, output: Any, target: Any) -> Tensor:
        """What every node adds to the loss of every copy, ``(copies, nodes)``; one column if the loss gives one number,
        or couples the nodes."""
        losses = self._by_node(output, target)
        if self.couples is None:
            self.couples = losses.shape[1] > 1 and self._couples(output, target, losses[0])
        return losses.sum(1, keepdim=True) if self.couples else losses

    def _by_node(self, output: Any, target: Any) -> Tensor:
        return torch.stack([row.flatten(1).sum(1) if row.dim() > 1 else row.reshape(-1)
                            for row in self._rows(output, target)]).detach()  # fmt: skip

    def _couples(self, output: Any, target: Any, losses: Tensor) -> bool:
        """Whether the loss of a node changes with the outputs of others, all of which are changed whose number has
        another bit than its own, bit by bit; also if there is not one loss a node, or the loss takes no others."""
        if not isinstance(output, Tensor) or output.dim() < 2 or output.shape[1] != len(losses):
            return True
        first, numbers = output[:1].detach(), torch.arange(len(losses), device=output.device)
        drawn = torch.rand(first.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(first)
        for others in (first + (first.abs().max() + 1) * (drawn - 0.5), first * drawn):  # probabilities stay in [0, 1]
            try:
                for bit in range((len(losses) - 1).bit_length()):
                    for kept in ((numbers >> bit) % 2 == 0, (numbers >> bit) % 2 == 1):
                        changed = torch.where(kept.view(-1, *[1] * (first.dim() - 2)), first, others)
                        now = self._by_node(changed, target)[0].to(losses.device)
                        mine = kept.to(losses.device)
                        if now.shape != losses.shape or not torch.allclose(now[mine], losses[mine], 1e-5, 1e-8):
                            return True
            except Exception:  # the user's loss does not take such outputs
                continue
            return False
        return True

    def _rows(self, output: Any, target: Any) -> list[Tensor]:
        leaves, spec = pytree.tree_flatten(output)
        copies = next(len(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        rows = []
        for copy in range(copies):
            parts = [leaf[copy] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            rows.append(self._one(pytree.tree_unflatten(parts, spec), target))
        return rows

    def _one(self, output: Any, target: Any) -> Tensor:
        """What the parts of one graph add to its loss: a tensor of any shape, whose sum the loss is."""
        found = self.node_loss(output, target)
        losses = found if isinstance(found, Tensor) and found.requires_grad else as_real(found, self.name)
        if losses.is_complex():
            raise LossShapeError(f"the loss {self.name} returned complex numbers; it has to be real.")
        if losses.dim() == 0 or self.reduction == "sum":
            return losses
        if self.reduction == "batchmean":
            return losses / len(losses)
        counted: Tensor | int = losses.numel()
        if self.ignored is not None and isinstance(target, Tensor) and not target.is_floating_point():
            counted = self._counted(target) if target.shape == losses.shape else counted
        return losses / counted

    def _counted(self, target: Tensor) -> Tensor:
        """How many nodes count, or the sum of their classes' weights."""
        assert self.ignored is not None
        kept = target.ne(self.ignored)
        if self.class_weights is None:
            return kept.sum().clamp(min=1)
        return (self.class_weights[target.where(kept, 0)] * kept).sum()

    def check(self, target: Any) -> None:
        """Raises BatchError if the target leaves no node: all ignored, or a mask that selects none."""
        if isinstance(target, Tensor) and self.ignored is not None and not target.is_floating_point():
            if target.numel() and bool((target == self.ignored).all()):
                raise BatchError(
                    f"the target leaves no node: all {target.numel()} are {self.ignored}, the loss's ignore_index. "
                    "Give at least one node its class; is the mask of the split empty?"
                )
            return
        for leaf in pytree.tree_leaves(target):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.bool and not bool(leaf.any()):
                raise BatchError(
                    f"the target's mask of shape {tuple(leaf.shape)} selects no node: nothing would be trained. Is the "
                    "mask of the split empty?"
                )


def _ignore_index(loss: Any) -> int | None:
    """The target that a loss does not count, if it has one."""
    if isinstance(found := getattr(loss, "ignore_index", None), int):
        return found
    try:
        parameter = inspect.signature(loss).parameters.get("ignore_index")
    except (TypeError, ValueError):
        return None
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None


__all__ = ["WholeLoss"]
