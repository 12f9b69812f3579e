"""Targets: anything the loss takes, repeated for the copies of a batch, or of a part of its samples."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree


def target_leaves(target: Any, samples: int) -> list[Any]:
    """The parts of a target; a list of one entry a sample is one part."""
    return pytree.tree_leaves(target, is_leaf=lambda node: _is_column(node, samples))


def target_tensors(target: Any) -> list[Tensor]:
    """The tensors in a target, in order."""
    return [leaf for leaf in pytree.tree_leaves(target) if isinstance(leaf, Tensor)]


def repeat_target(target: Any, copies: int, samples: int) -> Any:
    """`target` for every copy: what holds one entry a sample (tensor, array, list) is tiled, copy after copy."""
    if copies == 1:
        return target

    def tile(leaf: Any) -> Any:
        if num_rows(leaf) != samples:
            return leaf
        if isinstance(leaf, Tensor):
            return leaf.repeat(copies, *[1] * (leaf.dim() - 1))
        if isinstance(leaf, np.ndarray):
            return np.tile(leaf, (copies, *[1] * (leaf.ndim - 1)))
        return leaf * copies

    return pytree.tree_map(tile, target, is_leaf=lambda node: _is_column(node, samples))


def take_rows(target: Any, rows: Tensor, samples: int) -> Any:
    """`target` for the samples with these numbers: of what holds one entry a sample, those entries."""
    numbers = rows.tolist()

    def take(leaf: Any) -> Any:
        if num_rows(leaf) != samples:
            return leaf
        if isinstance(leaf, Tensor):
            return leaf.index_select(0, rows.to(leaf.device))
        return leaf[numbers] if isinstance(leaf, np.ndarray) else [leaf[number] for number in numbers]

    return pytree.tree_map(take, target, is_leaf=lambda node: _is_column(node, samples))


def num_rows(leaf: Any) -> int | None:
    """First dimension of a tensor or an array, length of a list; None for anything else."""
    if isinstance(leaf, (Tensor, np.ndarray)):
        return leaf.shape[0] if leaf.ndim else None
    return len(leaf) if isinstance(leaf, list) else None


def _is_column(node: Any, samples: int) -> bool:
    """Whether a list is one entry a sample (numbers, names, boxes), and not a structure of tensors with all samples."""
    if not isinstance(node, list) or not node:
        return False
    tensors = [leaf for leaf in pytree.tree_leaves(node) if isinstance(leaf, (Tensor, np.ndarray))]
    return not tensors or (len(node) == samples and any(num_rows(tensor) != samples for tensor in tensors))
