"""Rules of operations that move, cut, join and make tensors, and of sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ....passes.errors import ExportError
from ..emit import Emission, Value, rule, size_of, static
from .pointwise import out_type


def axis_of(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim % max(rank, 1)


@rule("aten.sym_size.int")
def _size(e: Emission, node: fx.Node, x: Value, dim: int) -> str:
    size = x.shape[dim]
    if isinstance(size, torch.SymInt):
        expression = str(size.node.expr)
        return e.sizes.get(expression) or size_of(e, x, axis_of(dim, x.rank))
    return e.b.constant(static(size), np.int64)


@rule("aten.sym_numel.default")
def _numel(e: Emission, node: fx.Node, x: Value) -> str:
    return e.op("Size", x)


@rule("mul", "add", "sub", "floordiv", "sym_max")
def _arithmetic(e: Emission, node: fx.Node, x: Any, y: Any) -> str:
    """Of sizes, which are positive, and of numbers that they give."""
    operator = {"mul": "Mul", "add": "Add", "sub": "Sub", "floordiv": "Div", "sym_max": "Max"}[node.target.__name__]  # type: ignore[union-attr]
    wide = torch.float64 if isinstance(node.meta["val"], (float, torch.SymFloat)) else torch.int64
    return e.op(operator, e.as_type(x, wide), e.as_type(y, wide))


@rule("truediv")
def _ratio(e: Emission, node: fx.Node, x: Any, y: Any) -> str:
    return e.op("Div", e.as_type(x, torch.float64), e.as_type(y, torch.float64))


@rule("sym_float")
def _float_of(e: Emission, node: fx.Node, x: Value) -> str:
    return e.as_type(x, torch.float64)


@rule("aten.view.default", "aten._unsafe_view.default")
def _view(e: Emission, node: fx.Node, x: Value, sizes: Sequence[Any]) -> str:
    wanted = node.meta["val"].shape
    known = [static(s) if not isinstance(s, torch.SymInt) or not s.node.expr.free_symbols else s for s in wanted]
    symbolic = [size for size in known if isinstance(size, torch.SymInt)]
    if len(symbolic) == 1 and 0 not in known:
        return e.op("Reshape", x, e.b.ints([-1 if isinstance(size, torch.SymInt) else size for size in known]))
    return e.op("Reshape", x, e.shape(wanted))


@rule("aten.as_strided.default")
def _as_strided(e: Emission, node: fx.Node, x: Value, *form: Any) -> str:
    """Of all that lies in memory, in order: what torch makes of a pooling over maps whose channels come last."""
    _check_whole(node, x, 1)
    return e.reshape(x, node.meta["val"].shape)


@rule("aten.as_strided_scatter.default")
def _as_strided_scatter(e: Emission, node: fx.Node, x: Value, source: Value, *form: Any) -> str:
    """Into all of it, in order: its derivative."""
    _check_whole(node, x, 2)
    return e.reshape(source, x.shape)


def _check_whole(node: fx.Node, x: Value, place: int) -> None:
    """Raise ExportError unless the sizes, strides and offset from `place` on are those of all of `x`, in order."""
    given: Any = fx.node.map_arg(node.args[place:], lambda each: each.meta["val"])
    sizes, strides, offset = (*given, 0)[:3]
    expected: Any = 1
    whole = not offset and x.val.is_contiguous()
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        whole = whole and bool(size == 1 or stride == expected)
        expected = expected * size
    if not whole or bool(expected != x.val.numel()):
        raise ExportError("as_strided has a rule for the whole of a tensor only, in its order.")


@rule("aten.permute.default")
def _permute(e: Emission, node: fx.Node, x: Value, dims: Sequence[int]) -> str:
    return e.op("Transpose", x, perm=[axis_of(dim, x.rank) for dim in dims])


@rule("aten.t.default")
def _t(e: Emission, node: fx.Node, x: Value) -> str:
    return x if x.rank < 2 else e.op("Transpose", x, perm=[1, 0])


@rule("aten.transpose.int")
def _transpose(e: Emission, node: fx.Node, x: Value, first: int, second: int) -> str:
    order = list(range(x.rank))
    a, b = axis_of(first, x.rank), axis_of(second, x.rank)
    order[a], order[b] = b, a
    return e.op("Transpose", x, perm=order)


@rule("aten.unsqueeze.default")
def _unsqueeze(e: Emission, node: fx.Node, x: Value, dim: int) -> str:
    return e.op("Unsqueeze", x, e.b.ints([axis_of(dim, x.rank + 1)]))


@rule("aten.squeeze.dims")
def _squeeze(e: Emission, node: fx.Node, x: Value, dims: Sequence[int]) -> str:
    asked = [axis_of(dim, x.rank) for dim in dims]
    ones = [dim for dim in asked if not isinstance(x.shape[dim], torch.SymInt) and static(x.shape[dim]) == 1]
    return e.op("Squeeze", x, e.b.ints(ones)) if ones else str(x)


@rule("aten.expand.default")
def _expand(e: Emission, node: fx.Node, x: Value, sizes: Sequence[Any], **named: Any) -> str:
    wanted = node.meta["val"].shape
    if tuple(map(str, wanted)) == tuple(map(str, x.shape)):
        return x
    return e.op("Expand", x, e.shape(wanted))


@rule("aten.cat.default")
def _cat(e: Emission, node: fx.Node, parts: Sequence[Value], dim: int = 0) -> str:
    dtype = out_type(node)
    held = [e.as_type(part, dtype) for part in parts if part.shape != (0,)]
    return held[0] if len(held) == 1 else e.op("Concat", *held, axis=axis_of(dim, node.meta["val"].dim()))


@rule("aten.stack.default")
def _stack(e: Emission, node: fx.Node, parts: Sequence[Value], dim: int = 0) -> str:
    axis, dtype = axis_of(dim, node.meta["val"].dim()), out_type(node)
    opened = [e.op("Unsqueeze", e.as_type(part, dtype), e.b.ints([axis])) for part in parts]
    return opened[0] if len(opened) == 1 else e.op("Concat", *opened, axis=axis)


def _bound(e: Emission, value: Any, size: Any, default: Any) -> Any:
    """A slice's bound, negative ones counted from the end where the size is known."""
    if value is None:
        return default
    if isinstance(value, int) and isinstance(size, int):
        return max(0, min(value + size if value < 0 else value, size))
    return min(value, (1 << 63) - 1) if isinstance(value, int) else value


@rule("aten.slice.Tensor")
def _slice(
    e: Emission, node: fx.Node, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> str:
    axis = axis_of(dim, x.rank)
    size = x.shape[axis]
    size = size if isinstance(size, torch.SymInt) and size.node.expr.free_symbols else static(size)
    first, last = _bound(e, start, size, 0), _bound(e, end, size, (1 << 63) - 1)
    if first == 0 and step == 1 and isinstance(last, int) and last >= (size if isinstance(size, int) else 1 << 62):
        return x
    return e.slice(x, axis, first, last, step)


@rule("aten.select.int")
def _select(e: Emission, node: fx.Node, x: Value, dim: int, index: Any) -> str:
    if isinstance(index, int):
        axis = axis_of(dim, x.rank)
        return e.op("Squeeze", e.slice(x, axis, index, index + 1 if index != -1 else (1 << 63) - 1), e.b.ints([axis]))
    return e.op("Gather", x, index, axis=axis_of(dim, x.rank))


def _parts(e: Emission, x: Value, sizes: Sequence[int], axis: int) -> Sequence[str]:
    return e.b.ops("Split", [x, e.b.ints(sizes)], len(sizes), axis=axis)


@rule("aten.split.Tensor", "aten.split_with_sizes.default")
def _split(e: Emission, node: fx.Node, x: Value, sizes: Any, dim: int = 0) -> Sequence[str]:
    axis = axis_of(dim, x.rank)
    return _parts(e, x, [static(part.shape[axis]) for part in node.meta["val"]], axis)


@rule("aten.unbind.int")
def _unbind(e: Emission, node: fx.Node, x: Value, dim: int = 0) -> Sequence[str]:
    axis = axis_of(dim, x.rank)
    parts = _parts(e, x, [1] * len(node.meta["val"]), axis)
    return [e.op("Squeeze", part, e.b.ints([axis])) for part in parts]


@rule("aten.repeat.default")
def _repeat(e: Emission, node: fx.Node, x: Value, repeats: Sequence[Any]) -> str:
    opened = x if len(repeats) == x.rank else e.reshape(x, [1] * (len(repeats) - x.rank) + list(x.shape))
    return e.op("Tile", opened, e.shape(repeats))


@rule("aten.flip.default")
def _flip(e: Emission, node: fx.Node, x: Value, dims: Sequence[int]) -> str:
    axes = [axis_of(dim, x.rank) for dim in dims]
    ends = [-(1 << 63)] * len(axes)
    return e.op("Slice", x, e.b.ints([-1] * len(axes)), e.b.ints(ends), e.b.ints(axes), e.b.ints([-1] * len(axes)))


@rule("aten.constant_pad_nd.default")
def _pad(e: Emission, node: fx.Node, x: Value, pad: Sequence[int], value: float = 0) -> str:
    before, after = [0] * x.rank, [0] * x.rank
    for place in range(len(pad) // 2):
        before[x.rank - 1 - place], after[x.rank - 1 - place] = int(pad[2 * place]), int(pad[2 * place + 1])
    return e.op("Pad", x, e.b.ints([*before, *after]), e.scalar(value, x.dtype))


def filled(e: Emission, sizes: Sequence[Any], value: Any, dtype: torch.dtype) -> str:
    """A tensor of one number."""
    known = [e.size(size) for size in sizes]
    scalar = e.scalar(value, dtype)
    if not known:
        return scalar
    return e.op("Expand", scalar, e.shape(sizes))


@rule("aten.full.default", "aten.full_like.default")
def _full(e: Emission, node: fx.Node, like: Any, *more: Any, **named: Any) -> str:
    value = more[-1] if more else named["fill_value"]
    if isinstance(value, Value):
        return e.op("Expand", e.as_type(value, out_type(node)), e.shape(node.meta["val"].shape))
    return filled(e, node.meta["val"].shape, value, out_type(node))


@rule("aten.empty.memory_format", "aten.empty_permuted.default")
def _empty(e: Emission, node: fx.Node, *given: Any, **named: Any) -> str:
    return filled(e, node.meta["val"].shape, 0, out_type(node))


@rule("aten.scalar_tensor.default")
def _scalar(e: Emission, node: fx.Node, value: Any, **named: Any) -> str:
    return e.as_type(value, out_type(node))


@rule("aten.arange.start_step")
def _arange(e: Emission, node: fx.Node, start: Any, end: Any, step: Any = 1, **named: Any) -> str:
    wide = torch.int64 if out_type(node) in (torch.int32, torch.int16, torch.int8, torch.uint8) else out_type(node)
    numbers = e.op("Range", *(e.as_type(each, wide) for each in (start, end, step)))
    return e.cast(numbers, wide, out_type(node))


@rule("aten.tril.default", "aten.triu.default")
def _triangle(e: Emission, node: fx.Node, x: Value, diagonal: int = 0) -> str:
    wide = torch.int64 if x.dtype == torch.bool else x.dtype
    found = e.op("Trilu", e.as_type(x, wide), e.b.constant(diagonal, np.int64), upper=int("triu" in str(node.target)))
    return e.cast(found, wide, x.dtype)


@rule("aten.slice_scatter.default")
def _slice_scatter(
    e: Emission, node: fx.Node, x: Value, source: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> str:
    axis = axis_of(dim, x.rank)
    if tuple(map(str, x.shape)) == tuple(map(str, source.shape)):
        return source
    size = static(x.shape[axis])
    first, last = _bound(e, start, size, 0), _bound(e, end, size, size)
    rows = list(range(size))[first:last:step]
    if len(rows) == size:
        return source
    if step == 1:  # what stays before, the source, what stays behind
        parts = [e.slice(x, axis, 0, first)] if first else []
        parts += [source]
        parts += [e.slice(x, axis, last, size)] if last < size else []
        return e.op("Concat", *parts, axis=axis)
    where = [0 if row not in rows else 1 + rows.index(row) for row in range(size)]
    picked = e.op("Gather", source, e.b.ints([max(0, each - 1) for each in where]), axis=axis)
    mask = np.array(where).astype(bool).reshape([-1 if d == axis else 1 for d in range(x.rank)])
    return e.op("Where", e.b.constant(mask), picked, x)
