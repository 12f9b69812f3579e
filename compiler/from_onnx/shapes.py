"""Operators that move elements without looking at them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .node import Node, operator, refuse
from .values import Array, check_size, dtype_of, integer, integers, number, objects, to_tensor


@operator("Shape")
def shape(node: Node, value: Tensor) -> Array:
    return objects(list(value.shape)[slice(node.get("start", 0), node.get("end"))])


@operator("Size")
def size(node: Node, value: Tensor) -> Array:
    return objects([math.prod(value.shape)], ())


@operator("Reshape", static=(1,), limits="a shape that depends on values is refused")
def reshape(node: Node, value: Tensor, shape: Array) -> Tensor:
    """Where the file's batch size is fixed, the first of the extents that it writes down is left to be found."""
    sizes = integers(shape)
    if not node.get("allowzero", 0):
        sizes = [value.shape[axis] if extent == 0 else extent for axis, extent in enumerate(sizes)]
    if node.batch is not None and sizes and sizes[0] != -1:
        if -1 not in sizes and 0 not in sizes:
            sizes[0] = -1
        elif sizes[0] == node.batch:
            sizes[0] = value.shape[0]
    return value.reshape(sizes)


@operator("Flatten")
def flatten(node: Node, value: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    axis = axis + value.dim() if axis < 0 else axis
    if axis == 0:
        return value.reshape(1, -1)
    if axis == 1:
        return value.flatten(1) if value.dim() > 1 else value.reshape(value.shape[0], 1)
    rest = math.prod(value.shape[axis:])
    return value.reshape(-1, rest)


@operator("Transpose")
def transpose(node: Node, value: Tensor) -> Tensor:
    return value.permute(node.get("perm", tuple(reversed(range(value.dim())))))


def _listed(node: Node, axes: Array | None) -> list[int] | None:
    return integers(axes) if axes is not None else node.get("axes")


@operator("Squeeze", static=(1,))
def squeeze(node: Node, value: Tensor, axes: Array | None = None) -> Tensor:
    which = _listed(node, axes)
    if which is None:
        which = [axis for axis, extent in enumerate(value.shape) if isinstance(extent, int) and extent == 1]
    return value.squeeze([axis % value.dim() for axis in which])


@operator("Unsqueeze", static=(1,))
def unsqueeze(node: Node, value: Tensor, axes: Array | None = None) -> Tensor:
    which = _listed(node, axes) or []
    rank = value.dim() + len(which)
    for axis in sorted(axis % rank for axis in which):
        value = value.unsqueeze(axis)
    return value


@operator("Concat", trains=range(8), limits="a weight among its inputs is trained unless its elements are all equal")
def concat(node: Node, *values: Tensor) -> Tensor:
    """A constant of one sample beside a batch (a class token) is repeated for every sample."""
    axis = node.get("axis", 1) % values[0].dim()
    if axis != 0:
        batch = next((each.shape[0] for each in values if not _is_one(each.shape[0])), None)
        if batch is not None:
            values = tuple(each.expand(batch, *each.shape[1:]) if _is_one(each.shape[0]) else each for each in values)
    return torch.cat(values, axis)


def _is_one(extent: Any) -> bool:
    return isinstance(extent, int) and extent == 1


@operator("Split", static=(1,))
def split(node: Node, value: Tensor, sizes: Array | None = None) -> tuple[Tensor, ...]:
    axis = node.get("axis", 0) % value.dim()
    given = integers(sizes) if sizes is not None else node.get("split")
    if given is None:
        count = node.get("num_outputs", len(node.outputs))
        each = -(-value.shape[axis] // count)
        given = [each] * (count - 1) + [value.shape[axis] - each * (count - 1)]
    return torch.split(value, list(given), axis)


TO_THE_END = 10**8
"""Ends of a slice from here on are how exporters write "all of it"; the batch size needs no bound then."""


@operator("Slice", static=(1, 2, 3, 4))
def slice_(
    node: Node, value: Tensor, starts: Array | None = None, ends: Array | None = None, axes: Array | None = None,
    steps: Array | None = None,
) -> Tensor:  # fmt: skip
    """Negative steps, which torch does not have, run over the reversed axis."""
    first = integers(starts) if starts is not None else list(node.get("starts"))
    last = integers(ends) if ends is not None else list(node.get("ends"))
    which = integers(axes) if axes is not None else list(node.get("axes", range(len(first))))
    by = integers(steps) if steps is not None else [1] * len(first)
    index = [slice(None)] * value.dim()
    for axis, start, end, step in zip(which, first, last, by, strict=True):
        axis %= value.dim()
        extent = value.shape[axis]
        if step > 0:
            whole = isinstance(end, int) and end >= TO_THE_END
            index[axis] = slice(start, None if whole else end, step)
        else:
            begin = min(start + extent if start < 0 else start, extent - 1)
            stop = -1 if end < -extent else end + extent if end < 0 else end
            value = value.flip(axis)
            index[axis] = slice(extent - 1 - begin, max(extent - 1 - stop, 0), -step)
    return value[tuple(index)]


@operator("Expand", static=(1,))
def expand(node: Node, value: Tensor, shape: Array) -> Tensor:
    sizes = check_size(integers(shape))
    rank = max(value.dim(), len(sizes))
    sizes, own = [1] * (rank - len(sizes)) + sizes, [1] * (rank - value.dim()) + list(value.shape)
    target = [
        mine if isinstance(wanted, int) and wanted == 1 else wanted for mine, wanted in zip(own, sizes, strict=True)
    ]
    return value.expand(target)


@operator("Tile", static=(1,))
def tile(node: Node, value: Tensor, repeats: Array) -> Tensor:
    times = integers(repeats)
    check_size([extent * time for extent, time in zip(value.shape, times, strict=True)])
    return value.repeat(times)


@operator("ConstantOfShape", static=(0,))
def constant_of_shape(node: Node, shape: Array) -> Tensor:
    value = node.get("value")
    fill = to_tensor(np.zeros(1, np.float32) if value is None else value)
    return torch.full(check_size(integers(shape)), fill.reshape(-1)[0].item(), dtype=fill.dtype)


@operator("Range", static=(0, 1, 2))
def range_(node: Node, start: Array, limit: Array, delta: Array) -> Tensor:
    first, end, by = number(start), number(limit), number(delta)
    if all(isinstance(each, (int, float)) for each in (first, end, by)):
        check_size([max(math.ceil((end - first) / by), 0)])
    dtype = None if start.dtype == object else to_tensor(start).dtype
    return torch.arange(first, end, by, dtype=dtype)


@operator("EyeLike")
def eye_like(node: Node, value: Tensor) -> Tensor:
    dtype = dtype_of(node.get("dtype")) if node.get("dtype") is not None else value.dtype
    rows, columns = value.shape
    across = torch.arange(columns, device=value.device)[None] - torch.arange(rows, device=value.device)[:, None]
    return torch.eq(across, node.get("k", 0)).to(dtype)


@operator("Trilu", static=(1,))
def trilu(node: Node, value: Tensor, diagonal: Array | None = None) -> Tensor:
    k = 0 if diagonal is None else integer(diagonal)
    return torch.triu(value, k) if node.get("upper", 1) else torch.tril(value, k)


@operator("DepthToSpace")
def depth_to_space(node: Node, value: Tensor) -> Tensor:
    side = node.get("blocksize")
    batch, channels, height, width = value.shape
    if node.get("mode", "DCR") == "CRD":
        parts = value.reshape(batch, channels // side**2, side, side, height, width).permute(0, 1, 4, 2, 5, 3)
    else:
        parts = value.reshape(batch, side, side, channels // side**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(batch, channels // side**2, height * side, width * side)


@operator("SpaceToDepth")
def space_to_depth(node: Node, value: Tensor) -> Tensor:
    side = node.get("blocksize")
    batch, channels, height, width = value.shape
    order = (0, 1, 3, 5, 2, 4) if node.get("mode", "DCR") == "CRD" else (0, 3, 5, 1, 2, 4)
    parts = value.reshape(batch, channels, height // side, side, width // side, side).permute(order)
    return parts.reshape(batch, channels * side**2, height // side, width // side)


_PADDING = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@operator("Pad", static=(1, 2, 3))
def pad(
    node: Node, value: Tensor, pads: Array | None = None, fill: Array | None = None, axes: Array | None = None
) -> Tensor:
    amounts = integers(pads) if pads is not None else list(node.get("pads", node.get("paddings")))
    rank = value.dim()
    which = [axis % rank for axis in integers(axes)] if axes is not None else list(range(rank))
    before, after = dict.fromkeys(range(rank), 0), dict.fromkeys(range(rank), 0)
    before.update(zip(which, amounts[: len(which)], strict=True))
    after.update(zip(which, amounts[len(which) :], strict=True))
    mode = node.get("mode", "constant")
    if mode not in _PADDING:
        raise refuse(node, f"mode {mode!r}")
    if mode == "constant":
        flat = [each for axis in reversed(range(rank)) for each in (before[axis], after[axis])]
        check_size([extent + before[axis] + after[axis] for axis, extent in enumerate(value.shape)])
        filling = number(fill, node.get("value", 0.0))
        return F.pad(value, flat, value=filling if value.is_floating_point() else int(filling))
    for axis in range(rank):  # one axis at a time, which these modes do not mind
        if before[axis] or after[axis]:
            value = _pad_axis(value, axis, before[axis], after[axis], mode)
    return value


def _pad_axis(value: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    extent = value.shape[axis]
    value = value.narrow(axis, max(-before, 0), extent - max(-before, 0) - max(-after, 0))
    before, after, extent = max(before, 0), max(after, 0), value.shape[axis]
    positions = range(-before, extent + after)
    if mode == "edge":
        index = [min(max(each, 0), extent - 1) for each in positions]
    elif mode == "wrap":
        index = [each % extent for each in positions]
    else:
        period = max(2 * (extent - 1), 1)
        index = [min(each % period, period - each % period) if extent > 1 else 0 for each in positions]
    return value.index_select(axis, torch.tensor(index, device=value.device))


@operator("CenterCropPad", static=(1,))
def center_crop_pad(node: Node, value: Tensor, shape: Array) -> Tensor:
    axes: Sequence[int] = node.get("axes", range(value.dim()))
    for axis, wanted in zip(axes, integers(shape), strict=True):
        axis %= value.dim()
        extent = value.shape[axis]
        if wanted < extent:
            value = value.narrow(axis, (extent - wanted) // 2, wanted)
        elif wanted > extent:
            before = (wanted - extent) // 2
            check_size([wanted])
            after = [0, 0] * (value.dim() - 1 - axis) + [before, wanted - extent - before]
            value = F.pad(value, after)
    return value
