"""Shape arithmetic: operators on arrays of known numbers (`values`), tried before those on tensors.

`STATIC` is asked where every input is an array. A function there may decline by returning ``NotImplemented``: a long
``Range`` becomes a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .node import Node
from .values import Array, dtype_of, elementwise, integers, objects

LONGEST = 64
"""Elements of the longest array that is worth while to compute with as one."""

Static = Callable[..., Any]


def _divide(left: Any, right: Any) -> Any:
    if isinstance(left, float) or isinstance(right, float):
        return left / right
    if isinstance(left, torch.SymInt) or isinstance(right, torch.SymInt):
        return left // right  # sizes are not negative
    return int(math.copysign(abs(left) // abs(right), left * right))


def _power(left: Any, right: Any) -> Any:
    return left**right


def _choose(condition: Any, left: Any, right: Any) -> Any:
    return left if condition else right


def _floor(value: Any) -> Any:
    return float(math.floor(value)) if isinstance(value, float) else value


def _ceil(value: Any) -> Any:
    return float(math.ceil(value)) if isinstance(value, float) else value


_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "Add": lambda left, right: left + right,
    "Sub": lambda left, right: left - right,
    "Mul": lambda left, right: left * right,
    "Div": _divide,
    "Mod": lambda left, right: left % right,
    "Pow": _power,
    "Neg": lambda value: -value,
    "Abs": abs,
    "Sqrt": lambda value: math.sqrt(value),
    "Reciprocal": lambda value: 1.0 / value,
    "Floor": _floor,
    "Ceil": _ceil,
    "Equal": lambda left, right: bool(left == right),
    "Greater": lambda left, right: bool(left > right),
    "Less": lambda left, right: bool(left < right),
    "GreaterOrEqual": lambda left, right: bool(left >= right),
    "LessOrEqual": lambda left, right: bool(left <= right),
    "Not": lambda value: not value,
    "And": lambda left, right: bool(left and right),
    "Or": lambda left, right: bool(left or right),
    "Where": _choose,
    "Max": max,
    "Min": min,
}


def _cast(node: Node, value: Array) -> Array:
    dtype = dtype_of(node.get("to"))
    if dtype == torch.bool:
        return elementwise(bool)(value)
    return elementwise(torch.sym_float if dtype.is_floating_point else torch.sym_int)(value)


def _identity(node: Node, value: Array) -> Array:
    return value


def _gather(node: Node, value: Array, index: Array) -> Any:
    if any(isinstance(each, torch.SymInt) for each in index.ravel().tolist()):
        return NotImplemented
    return np.take(value, index.astype(np.int64), axis=node.get("axis", 0))


def _slice(
    node: Node, value: Array, starts: Array | None = None, ends: Array | None = None, axes: Array | None = None,
    steps: Array | None = None,
) -> Any:  # fmt: skip
    first = integers(starts) if starts is not None else list(node.get("starts"))
    last = integers(ends) if ends is not None else list(node.get("ends"))
    if any(isinstance(each, torch.SymInt) for each in first + last):
        return NotImplemented
    which = integers(axes) if axes is not None else list(node.get("axes", range(len(first))))
    step = integers(steps) if steps is not None else [1] * len(first)
    index = [slice(None)] * value.ndim
    for axis, begin, end, by in zip(which, first, last, step, strict=True):
        index[axis] = slice(begin, None if by < 0 and end < -value.shape[axis] else end, by)
    return value[tuple(index)]


def _concat(node: Node, *values: Array) -> Array:
    return np.concatenate([np.asarray(value, dtype=object) for value in values], axis=node.get("axis"))


def _axes(node: Node, axes: Array | None) -> list[int] | None:
    return integers(axes) if axes is not None else node.get("axes")


def _squeeze(node: Node, value: Array, axes: Array | None = None) -> Array:
    which = _axes(node, axes)
    return np.squeeze(value, axis=None if which is None else tuple(which))


def _unsqueeze(node: Node, value: Array, axes: Array | None = None) -> Array:
    return np.expand_dims(value, tuple(_axes(node, axes) or ()))


def _reshape(node: Node, value: Array, shape: Array) -> Any:
    return value.reshape([each or value.shape[axis] for axis, each in enumerate(integers(shape))])


def _reduce(function: Callable[[list[Any]], Any]) -> Static:
    def apply(node: Node, value: Array, axes: Array | None = None) -> Any:
        if value.ndim != 1:
            return NotImplemented
        result = function(value.tolist())
        return objects([result]) if node.get("keepdims", 1) else objects([result], ())

    return apply


def _range(node: Node, start: Array, limit: Array, delta: Array) -> Any:
    ends = [start.item(), limit.item(), delta.item()]
    if any(isinstance(each, (torch.SymInt, torch.SymFloat, float)) for each in ends):
        return NotImplemented
    numbers = range(*ends)
    return objects(list(numbers)) if len(numbers) <= LONGEST else NotImplemented


def _constant_of_shape(node: Node, shape: Array) -> Any:
    sizes = integers(shape)
    if any(isinstance(each, torch.SymInt) for each in sizes) or math.prod(sizes) > LONGEST or min(sizes, default=0) < 0:
        return NotImplemented
    value = node.get("value")
    fill = 0.0 if value is None else np.asarray(value).ravel().tolist()[0]
    return objects([fill] * math.prod(sizes), tuple(sizes))


def _expand(node: Node, value: Array, shape: Array) -> Any:
    sizes = integers(shape)
    if any(isinstance(each, torch.SymInt) for each in sizes) or math.prod(sizes) > LONGEST:
        return NotImplemented
    return value * np.ones(sizes, dtype=np.int64)


def _split(node: Node, value: Array, split: Array | None = None) -> Any:
    axis = node.get("axis", 0)
    sizes = integers(split) if split is not None else node.get("split")
    if sizes is None:
        return tuple(np.array_split(value, len(node.outputs), axis=axis))
    return tuple(np.split(value, np.cumsum(sizes)[:-1], axis=axis))


def _transpose(node: Node, value: Array) -> Array:
    return np.transpose(value, node.get("perm"))


def _size(node: Node, value: Array) -> Array:
    return objects([value.size], ())


def _shape(node: Node, value: Array) -> Array:
    return objects(list(value.shape)[slice(node.get("start", 0), node.get("end"))])


STATIC: dict[str, Static] = {
    **{name: (lambda compute: lambda node, *values: compute(*values))(elementwise(each))
       for name, each in _ELEMENTWISE.items()},
    "Cast": _cast,
    "Identity": _identity,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "ReduceProd": _reduce(math.prod),
    "ReduceSum": _reduce(sum),
    "ReduceMax": _reduce(max),
    "ReduceMin": _reduce(min),
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Split": _split,
    "Transpose": _transpose,
    "Size": _size,
    "Shape": _shape,
}  # fmt: skip
"""Operator -> ``(node, *arrays) -> array or tuple of them``."""
