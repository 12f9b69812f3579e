"""Operators that read or write at positions which other tensors hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .node import Node, operator
from .values import Array, number


def _wrapped(index: Tensor, extent: int) -> Tensor:
    """Indices with negative ones counted from the end."""
    index = index.to(torch.int64)
    return torch.where(index < 0, index + extent, index)


@operator("Gather", trains=(0,), limits="floats of rank 2 or more that it reads are an embedding, and trained")
def gather(node: Node, value: Tensor, index: Tensor) -> Tensor:
    axis = node.get("axis", 0) % value.dim()
    index = _wrapped(index, value.shape[axis])
    if axis == 0 and value.dim() == 2 and value.is_floating_point() and index.dim() > 0:
        return torch.nn.functional.embedding(index, value)
    if index.dim() == 0:
        return value.index_select(axis, index.reshape(1)).squeeze(axis)
    found = value.index_select(axis, index.reshape(-1))
    return found.reshape(*value.shape[:axis], *index.shape, *value.shape[axis + 1 :])


@operator("GatherElements")
def gather_elements(node: Node, value: Tensor, index: Tensor) -> Tensor:
    axis = node.get("axis", 0) % value.dim()
    return torch.gather(value, axis, _wrapped(index, value.shape[axis]))


@operator("GatherND")
def gather_nd(node: Node, value: Tensor, index: Tensor) -> Tensor:
    shared, depth = node.get("batch_dims", 0), index.shape[-1]
    leading = tuple(
        torch.arange(extent, device=value.device).reshape([-1 if k == axis else 1 for k in range(index.dim() - 1)])
        for axis, extent in enumerate(value.shape[:shared])
    )
    columns = tuple(_wrapped(index[..., k], value.shape[shared + k]) for k in range(depth))
    return value[leading + columns]


_REDUCED = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("ScatterElements", "Scatter")
def scatter_elements(node: Node, value: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    axis, how = node.get("axis", 0) % value.dim(), node.get("reduction", "none")
    index = _wrapped(index, value.shape[axis])
    if how == "none":
        return value.scatter(axis, index, updates)
    return value.scatter_reduce(axis, index, updates, _REDUCED[how])


@operator("ScatterND")
def scatter_nd(node: Node, value: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """As a scatter into the flattened tensor, whose rows the last axis of `index` names."""
    depth, how = index.shape[-1], node.get("reduction", "none")
    row = torch.zeros_like(index[..., 0], dtype=torch.int64)
    for k in range(depth):
        row = row * value.shape[k] + _wrapped(index[..., k], value.shape[k])
    width = math.prod(value.shape[depth:])
    flat, rows = value.reshape(-1, width), row.reshape(-1, 1).expand(-1, width)
    written = updates.reshape(-1, width)
    if how == "none":
        return flat.scatter(0, rows, written).reshape(value.shape)
    return flat.scatter_reduce(0, rows, written, _REDUCED[how]).reshape(value.shape)


@operator("OneHot", static=(1,))
def one_hot(node: Node, index: Tensor, depth: Array, values: Tensor) -> Tensor:
    count = int(number(depth))
    axis = node.get("axis", -1)
    axis = axis + index.dim() + 1 if axis < 0 else axis
    wrapped = _wrapped(index, count).unsqueeze(axis)
    places = torch.arange(count, device=index.device).reshape([-1 if k == axis else 1 for k in range(index.dim() + 1)])
    return torch.where(wrapped == places, values[1], values[0])


@operator("ReverseSequence")
def reverse_sequence(node: Node, value: Tensor, lengths: Tensor) -> Tensor:
    batch, time = node.get("batch_axis", 1), node.get("time_axis", 0)
    moved = value.movedim((batch, time), (0, 1))
    places = torch.arange(moved.shape[1], device=value.device)[None].expand(moved.shape[0], -1)
    reached = lengths.to(torch.int64)[:, None]
    index = torch.where(places < reached, reached - 1 - places, places)
    index = index.reshape(*index.shape, *[1] * (moved.dim() - 2)).expand(moved.shape)
    return torch.gather(moved, 1, index).movedim((0, 1), (batch, time))
