"""Reductions along axes, and what orders or counts along one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .node import Node, operator
from .values import Array, integer, integers


def _axes(node: Node, value: Tensor, axes: Array | None) -> list[int] | None:
    """The axes of a reduction; None where nothing is to be reduced."""
    which = integers(axes) if axes is not None else node.get("axes")
    if which:
        return [axis % value.dim() for axis in which]
    return None if node.get("noop_with_empty_axes", 0) else list(range(value.dim()))


def _product(value: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        value = value.prod(axis, keepdim=keep)
    return value


def _log_sum_exp(value: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(value, axes, keep) if value.is_floating_point() else value.exp().sum(axes, keep).log()


def _mean(value: Tensor, axes: list[int], keep: bool) -> Tensor:
    if value.is_floating_point():
        return value.mean(axes, keepdim=keep)
    return torch.div(
        value.sum(axes, keepdim=keep), math.prod(value.shape[axis] for axis in axes), rounding_mode="trunc"
    )


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceSum": lambda value, axes, keep: value.sum(axes, keepdim=keep),
    "ReduceMean": _mean,
    "ReduceMax": lambda value, axes, keep: _extreme(value, axes, keep, torch.amax),
    "ReduceMin": lambda value, axes, keep: _extreme(value, axes, keep, torch.amin),
    "ReduceProd": _product,
    "ReduceL1": lambda value, axes, keep: value.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda value, axes, keep: value.square().sum(axes, keepdim=keep).sqrt(),
    "ReduceSumSquare": lambda value, axes, keep: value.square().sum(axes, keepdim=keep),
    "ReduceLogSum": lambda value, axes, keep: value.sum(axes, keepdim=keep).log(),
    "ReduceLogSumExp": _log_sum_exp,
}


def _extreme(value: Tensor, axes: list[int], keep: bool, compute: Callable[..., Tensor]) -> Tensor:
    return compute(value, axes, keepdim=keep) if axes else value


_OF_NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "ReduceL1": torch.abs,
    "ReduceL2": torch.abs,
    "ReduceSumSquare": torch.square,
    "ReduceLogSum": torch.log,
}
"""What a reduction along no axis leaves of an element; the others leave it as it is."""


def _reduction(name: str) -> Callable[..., Tensor]:
    compute = _REDUCTIONS[name]

    def reduce(node: Node, value: Tensor, axes: Array | None = None) -> Tensor:
        which = _axes(node, value, axes)
        if not which:
            return _OF_NOTHING[name](value) if name in _OF_NOTHING else value
        dtype = value.dtype
        return compute(value, which, bool(node.get("keepdims", 1))).to(dtype)

    return reduce


for _name in _REDUCTIONS:
    operator(_name, static=(1,))(_reduction(_name))


def _arg(node: Node, value: Tensor, compute: Callable[..., Tensor]) -> Tensor:
    axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))
    last = bool(node.get("select_last_index", 0))
    found: Tensor = compute(value.flip(axis) if last else value, axis, keepdim=keep)
    return value.shape[axis] - 1 - found if last else found


@operator("ArgMax")
def arg_max(node: Node, value: Tensor) -> Tensor:
    return _arg(node, value, torch.argmax)


@operator("ArgMin")
def arg_min(node: Node, value: Tensor) -> Tensor:
    return _arg(node, value, torch.argmin)


@operator("TopK", static=(1,))
def top_k(node: Node, value: Tensor, count: Array | None = None) -> tuple[Tensor, Tensor]:
    """Of equal elements the first, which torch's own does not promise."""
    k = integer(count) if count is not None else node.get("k")
    axis = node.get("axis", -1)
    values, indices = torch.sort(value, dim=axis, descending=bool(node.get("largest", 1)), stable=True)
    return values.narrow(axis, 0, k), indices.narrow(axis, 0, k)


@operator("CumSum", static=(1,))
def cum_sum(node: Node, value: Tensor, axis: Array) -> Tensor:
    dim, reverse = integer(axis), node.get("reverse", 0)
    flipped = value.flip(dim) if reverse else value
    summed = flipped.cumsum(dim).to(value.dtype)
    if node.get("exclusive", 0):
        summed = summed - flipped
    return summed.flip(dim) if reverse else summed


@operator("LpNormalization")
def lp_normalization(node: Node, value: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(value, node.get("p", 2), node.get("axis", -1), keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(value), value / norm)
