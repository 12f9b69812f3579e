"""Rules of reductions, softmax and normalisations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ..emit import Emission, Value, rule, static
from .pointwise import out_type
from .shapes import axis_of

_REDUCTIONS = {
    "sum": "ReduceSum", "mean": "ReduceMean", "amax": "ReduceMax", "amin": "ReduceMin", "prod": "ReduceProd",
    "max": "ReduceMax", "min": "ReduceMin",
}  # fmt: skip


def _axes(dims: Any, rank: int) -> list[int]:
    if dims is None or (not isinstance(dims, int) and not len(dims)):
        return list(range(rank))
    return sorted(axis_of(dim, rank) for dim in ([dims] if isinstance(dims, int) else dims))


def _reduced(e: Emission, operator: str, x: str, axes: Sequence[int], keepdim: bool) -> str:
    return e.op(operator, x, e.b.ints(axes), keepdims=int(keepdim)) if axes else x


@rule(
    "aten.sum.dim_IntList", "aten.mean.dim", "aten.amax.default", "aten.amin.default", "aten.prod.dim_int",
)  # fmt: skip
def _reduce(e: Emission, node: fx.Node, x: Value, dims: Any = None, keepdim: bool = False, **named: Any) -> str:
    operator = _REDUCTIONS[str(node.target).split(".")[1]]
    return _reduced(e, operator, e.as_type(x, out_type(node)), _axes(named.get("dim", dims), x.rank), keepdim)


@rule("aten.mean.default", "aten.prod.default", "aten.max.default", "aten.min.default")
def _reduce_all(e: Emission, node: fx.Node, x: Value, **named: Any) -> str:
    operator = _REDUCTIONS[str(node.target).split(".")[1]]
    return _reduced(e, operator, e.as_type(x, out_type(node)), list(range(x.rank)), False)


@rule("aten.any.dim", "aten.any.dims", "aten.any.default")
def _any(e: Emission, node: fx.Node, x: Value, dims: Any = None, keepdim: bool = False) -> str:
    numbers = e.as_type(Value(e.as_type(x, torch.bool), x.val.bool()), torch.int32)
    found = _reduced(e, "ReduceMax", numbers, _axes(dims, x.rank), keepdim)
    return e.cast(found, torch.int32, torch.bool)


@rule("aten.argmax.default", "aten.argmin.default")
def _argmax(e: Emission, node: fx.Node, x: Value, dim: int | None = None, keepdim: bool = False) -> str:
    operator = "ArgMax" if "argmax" in str(node.target) else "ArgMin"
    if dim is None:
        return e.op(operator, e.op("Reshape", x, e.b.ints([-1])), axis=0, keepdims=0)
    return e.op(operator, x, axis=axis_of(dim, x.rank), keepdims=int(keepdim))


@rule("aten.max.dim", "aten.min.dim")
def _max_dim(e: Emission, node: fx.Node, x: Value, dim: int, keepdim: bool = False) -> Sequence[str]:
    kind, axis = ("Max" if ".max." in str(node.target) else "Min"), axis_of(dim, x.rank)
    value = _reduced(e, f"Reduce{kind}", x, [axis], keepdim)
    return value, e.op(f"Arg{kind}", x, axis=axis, keepdims=int(keepdim))


@rule("aten.var.correction", "aten.var_mean.correction")
def _variance(
    e: Emission, node: fx.Node, x: Value, dim: Any = None, correction: Any = 1, keepdim: bool = False
) -> str | Sequence[str]:
    axes = _axes(dim, x.rank)
    mean = _reduced(e, "ReduceMean", x, axes, True)
    centred = e.op("Sub", x, mean)
    found = _reduced(e, "ReduceMean", e.op("Mul", centred, centred), axes, keepdim)
    if correction:
        count = e.scalar(1, torch.int64)
        for axis in axes:
            count = e.op("Mul", count, e.as_type(_as_value(e, x.shape[axis]), torch.int64))
        wide = e.cast(count, torch.int64, x.dtype)
        less = e.op("Sub", wide, e.scalar(float(correction), x.dtype))
        found = e.op("Mul", found, e.op("Div", wide, less))
    if "var_mean" in str(node.target):
        return found, mean if keepdim else e.op("Squeeze", mean, e.b.ints(axes))
    return found


def _as_value(e: Emission, size: Any) -> Any:
    known = e.size(size)
    return known if isinstance(known, int) else Value(known, 0)


@rule("aten.linalg_vector_norm.default")
def _norm(
    e: Emission, node: fx.Node, x: Value, order: float = 2, dims: Any = None, keepdim: bool = False, **named: Any
) -> str:
    value, axes = e.as_type(x, out_type(node)), _axes(dims, x.rank)
    if order in (1, 2):
        return _reduced(e, f"ReduceL{int(order)}", value, axes, keepdim)
    size = e.op("Abs", value)
    if abs(order) == math.inf:
        return _reduced(e, "ReduceMax" if order > 0 else "ReduceMin", size, axes, keepdim)
    total = _reduced(e, "ReduceSum", e.op("Pow", size, e.scalar(order, out_type(node))), axes, keepdim)
    return e.op("Pow", total, e.scalar(1 / order, out_type(node)))


@rule("aten.cumsum.default")
def _cumsum(e: Emission, node: fx.Node, x: Value, dim: int, **named: Any) -> str:
    return e.op("CumSum", e.as_type(x, out_type(node)), e.b.constant(axis_of(dim, x.rank), np.int64))


@rule("aten._softmax.default", "aten._log_softmax.default")
def _softmax(e: Emission, node: fx.Node, x: Value, dim: int, half_to_float: bool) -> str:
    operator = "LogSoftmax" if "_log_softmax" in str(node.target) else "Softmax"
    return e.op(operator, e.as_type(x, out_type_of(node)), axis=axis_of(dim, x.rank))


def out_type_of(node: fx.Node) -> torch.dtype:
    """The dtype of a node's first result."""
    val = node.meta["val"]
    found: torch.dtype = (val[0] if isinstance(val, (tuple, list)) else val).dtype
    return found


@rule("aten.native_layer_norm.default")
def _layer_norm(
    e: Emission, node: fx.Node, x: Value, shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> Sequence[str]:
    axis = x.rank - len(shape)
    scale = weight if weight is not None else e.op("Expand", e.scalar(1, x.dtype), e.b.ints([static(s) for s in shape]))
    return e.b.ops("LayerNormalization", [x, scale, bias], 3, axis=axis, epsilon=float(eps))


@rule("aten.native_group_norm.default")
def _group_norm(
    e: Emission, node: fx.Node, x: Value, weight: Value | None, bias: Value | None, n: Any, c: int, hxw: Any,
    groups: int, eps: float,
) -> Sequence[str]:  # fmt: skip
    """The groups as rows of one normalisation, then the channels' scale and shift."""
    ones = e.op("Expand", e.scalar(1, x.dtype), e.b.ints([static(c) // groups * static(hxw)]))
    rows = e.op("Reshape", x, e.b.ints([-1, groups, static(c) // groups * static(hxw)]))
    normal, mean, spread = e.b.ops("LayerNormalization", [rows, ones], 3, axis=2, epsilon=float(eps))
    found = e.reshape(normal, x.shape)
    along = e.b.ints([1, static(c)] + [1] * (x.rank - 2))
    if weight is not None:
        found = e.op("Mul", found, e.op("Reshape", weight, along))
    if bias is not None:
        found = e.op("Add", found, e.op("Reshape", bias, along))
    flat = e.b.ints([-1, groups])
    return found, e.op("Reshape", mean, flat), e.op("Reshape", spread, flat)


@rule("aten._native_batch_norm_legit_no_training.default")
def _batch_norm(
    e: Emission, node: fx.Node, x: Value, weight: Value | None, bias: Value | None, mean: Value, variance: Value,
    momentum: float, eps: float,
) -> Sequence[str]:  # fmt: skip
    """By the running statistics."""
    one = e.op("Expand", e.scalar(1, x.dtype), e.b.ints([static(x.shape[1])]))
    zero = e.op("Expand", e.scalar(0, x.dtype), e.b.ints([static(x.shape[1])]))
    found = e.op("BatchNormalization", x, weight or one, bias or zero, mean, variance, epsilon=float(eps))
    empty = e.b.constant([], np.float32)
    return found, empty, empty


@rule("aten.topk.default")
def _topk(
    e: Emission, node: fx.Node, x: Value, count: int, dim: int = -1, largest: bool = True, ordered: bool = True
) -> Sequence[str]:
    axis = axis_of(dim, x.rank)
    return e.b.ops("TopK", [x, e.shape([count])], 2, axis=axis, largest=int(largest), sorted=int(ordered))


@rule("aten.sort.default")
def _sort(e: Emission, node: fx.Node, x: Value, dim: int = -1, descending: bool = False) -> Sequence[str]:
    axis = axis_of(dim, x.rank)
    return e.b.ops("TopK", [x, e.shape([x.shape[axis]])], 2, axis=axis, largest=int(descending), sorted=1)
