"""Rules of operations that pick and place entries by index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ....passes.errors import ExportError
from ..emit import Emission, Value, rule
from .pointwise import out_type
from .shapes import axis_of


@rule("aten.embedding.default")
def _embedding(e: Emission, node: fx.Node, weight: Value, indices: Value, *more: Any, **named: Any) -> str:
    return e.op("Gather", weight, indices, axis=0)


@rule("aten.index_select.default")
def _index_select(e: Emission, node: fx.Node, x: Value, dim: int, index: Value) -> str:
    return e.op("Gather", x, index, axis=axis_of(dim, x.rank))


@rule("aten.gather.default")
def _gather(e: Emission, node: fx.Node, x: Value, dim: int, index: Value, **named: Any) -> str:
    return e.op("GatherElements", x, index, axis=axis_of(dim, x.rank))


@rule("aten.scatter.src", "aten.scatter.value", "aten.scatter_add.default")
def _scatter(e: Emission, node: fx.Node, x: Value, dim: int, index: Value, source: Any, **named: Any) -> str:
    adds = "scatter_add" in str(node.target)
    if not isinstance(source, Value):
        source = e.op("Expand", e.scalar(source, x.dtype), e.shape(index.shape))
    more = {"reduction": "add"} if adds else {}
    return e.op("ScatterElements", x, index, source, axis=axis_of(dim, x.rank), **more)


@rule("aten.scatter_reduce.two")
def _scatter_reduce(
    e: Emission,
    node: fx.Node,
    x: Value,
    dim: int,
    index: Value,
    source: Value,
    reduce: str,
    *,
    include_self: bool = True,
) -> str:
    least, most = (-math.inf, math.inf) if x.dtype.is_floating_point else _limits(x.dtype)
    known = {"sum": ("add", 0), "prod": ("mul", 1), "amax": ("max", least), "amin": ("min", most)}
    if reduce not in known:
        raise ExportError(f"scatter_reduce(reduce={reduce!r}) has no rule.")
    name, neutral = known[reduce]
    axis, base = axis_of(dim, x.rank), str(x)
    if not include_self:  # what is written to does not count
        nothing = e.op("Expand", e.scalar(neutral, x.dtype), e.shape(index.shape))
        base = e.op("ScatterElements", x, index, nothing, axis=axis)
    return e.op("ScatterElements", base, index, source, axis=axis, reduction=name)


def _limits(dtype: torch.dtype) -> tuple[int, int]:
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


@rule("aten.index.Tensor")
def _index(e: Emission, node: fx.Node, x: Value, indices: Sequence[Value | None]) -> str:
    """One index tensor by ``Gather``; several that follow each other by ``GatherND``, their axes first."""
    places = _places(indices)
    if len(places) == 1:
        index = indices[places[0]]
        assert index is not None
        return e.op("Gather", x, e.as_type(index, torch.int64), axis=places[0])
    first, rank = places[0], x.rank
    front = str(x) if not first else e.op("Transpose", x, perm=_indexed_first(places, rank))
    found = e.op("GatherND", front, _together(e, [indices[place] for place in places]))
    return _back(e, found, node.meta["val"].dim(), first, rank - len(places))


@rule("aten.index_put.default")
def _index_put(
    e: Emission, node: fx.Node, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False
) -> str:
    """``ScatterND``, the indexed axes first."""
    places = _places(indices)
    first, rank = places[0], x.rank
    rows = [indices[place] for place in places]
    shape = torch.broadcast_shapes(*(tuple(each.shape) for each in rows if each is not None))
    wide = e.op("Expand", values, e.shape([*x.shape[:first], *shape, *x.shape[first + len(places) :]]))
    wide = e.cast(wide, values.dtype, out_type(node))
    front = str(x)
    if first:
        order = _indexed_first(places, rank)
        front = e.op("Transpose", x, perm=order)
        inner = list(range(first, first + len(shape)))
        wide = e.op(
            "Transpose", wide, perm=[*inner, *(d for d in range(rank - len(places) + len(shape)) if d not in inner)]
        )
    more = {"reduction": "add"} if accumulate else {}
    found = e.op("ScatterND", front, _together(e, rows), wide, **more)
    if not first:
        return found
    return e.op("Transpose", found, perm=[order.index(axis) for axis in range(rank)])


def _places(indices: Sequence[Value | None]) -> list[int]:
    places = [place for place, index in enumerate(indices) if index is not None]
    if any(index is not None and index.dtype == torch.bool for index in indices):
        raise ExportError("an index by a mask gives a size that depends on values; no shape could be inferred.")
    if places != list(range(places[0], places[0] + len(places))):
        raise ExportError("an index by several tensors with whole axes between them has no rule.")
    return places


def _indexed_first(places: Sequence[int], rank: int) -> list[int]:
    return [*places, *(axis for axis in range(rank) if axis not in places)]


def _back(e: Emission, found: str, rank: int, first: int, whole: int) -> str:
    """Axes of the index, which came first, behind the `first` whole ones."""
    if not first:
        return found
    inner = rank - whole
    return e.op("Transpose", found, perm=[*range(inner, inner + first), *range(inner), *range(inner + first, rank)])


def _together(e: Emission, indices: Sequence[Any]) -> str:
    """Index tensors that broadcast, as the rows of one."""
    shape = torch.broadcast_shapes(*(tuple(index.shape) for index in indices))
    wide = [e.op("Expand", e.as_type(index, torch.int64), e.shape(shape)) for index in indices]
    return e.op("Concat", *(e.op("Unsqueeze", each, e.b.ints([-1])) for each in wide), axis=-1)
