"""Rules of convolutions and poolings, and of their derivatives, which ONNX has no operators for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import fx

from ....passes.errors import ExportError
from ..emit import Emission, Value, rule, static
from .shapes import filled


def _pads(padding: Sequence[int], rank: int) -> list[int]:
    wide = list(padding) * rank if len(padding) == 1 else list(padding)
    return [*wide, *wide]


def _each(values: Sequence[int], rank: int) -> list[int]:
    return [int(v) for v in (list(values) * rank if len(values) == 1 else values)]


@rule("aten.convolution.default")
def _convolution(
    e: Emission, node: fx.Node, x: Value, weight: Value, bias: Value | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> str:  # fmt: skip
    rank = x.rank - 2
    extents = [static(size) for size in node.meta["val"].shape[2:]]
    if groups == 1 and not transposed and rank == 2 and math.prod(extents) <= SMALL:
        kernel = [static(size) for size in weight.shape[2:]]
        steps, gaps = _each(stride, rank), _each(dilation, rank)
        starts = [[p * d for p, d in zip(place, gaps, strict=True)] for place in places(kernel)]
        rows = windows(e, x, _each(padding, rank), starts, extents, steps)
        columns = e.op("Transpose", weight, perm=[2, 3, 1, 0])
        return _maps(e, rows, columns, bias, static(weight.shape[0]), extents)
    common: dict[str, Any] = {
        "strides": _each(stride, rank), "dilations": _each(dilation, rank), "group": groups,
        "pads": _pads(_each(padding, rank), rank), "kernel_shape": [static(size) for size in weight.shape[2:]],
    }  # fmt: skip
    if transposed:
        return e.op("ConvTranspose", x, weight, bias, output_padding=_each(output_padding, rank), **common)
    return e.op("Conv", x, weight, bias, **common)


SMALL = 16
"""Positions of a map up to which one product over all samples is faster than a convolution sample by sample, whose
weight is not known when the session is made (measured with onnxruntime 1.32 on a CPU: 5 times at 2 x 2, a fifth at
4 x 4, and slower at 8 x 8)."""


def places(kernel: Sequence[int]) -> list[tuple[int, ...]]:
    """Every place of a kernel, in the order of its elements."""
    return list(product(*(range(size) for size in kernel)))


def _parts(
    e: Emission, x: str, padding: Sequence[int], starts: Sequence[Sequence[int]], extents: Sequence[int],
    stride: Sequence[int],
) -> list[str]:  # fmt: skip
    """What every output position reads at each place, ``(N, …positions, channels)``, of x ``(N, channels, …)``."""
    rank = len(extents)
    last = e.op("Transpose", x, perm=[0, *range(2, rank + 2), 1])
    if any(padding):
        last = e.op("Pad", last, e.b.ints([0, *padding, 0] * 2))
    axes, steps = e.b.ints(range(1, rank + 1)), e.b.ints(stride)
    parts = []
    for start in starts:
        ends = [a + (n - 1) * s + 1 for a, n, s in zip(start, extents, stride, strict=True)]
        parts.append(e.op("Slice", last, e.b.ints(start), e.b.ints(ends), axes, steps))
    return parts


def windows(
    e: Emission, x: str, padding: Sequence[int], starts: Sequence[Sequence[int]], extents: Sequence[int],
    stride: Sequence[int],
) -> str:  # fmt: skip
    """What every output position reads, ``(N, …positions, places · channels)``, of x ``(N, channels, …)``."""
    parts = _parts(e, x, padding, starts, extents, stride)
    return parts[0] if len(parts) == 1 else e.op("Concat", *parts, axis=len(extents) + 1)


def _maps(e: Emission, rows: str, columns: str, bias: str | None, channels: int, extents: Sequence[int]) -> str:
    """Windows times columns ``(…places, inner, channels)``, as maps ``(N, channels, …)``."""
    matrix = e.op("Reshape", columns, e.b.ints([-1, channels]))
    rows = e.op("MatMul", rows, matrix)
    rows = rows if bias is None else e.op("Add", rows, bias)
    return e.op("Transpose", rows, perm=[0, len(extents) + 1, *range(1, len(extents) + 1)])


@rule("aten.convolution_backward.default")
def _convolution_backward(
    e: Emission, node: fx.Node, grad: Value, x: Value, weight: Value, bias_sizes: Any, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    mask: Sequence[bool],
) -> Sequence[str | None]:  # fmt: skip
    """By inputs a transposed convolution; by the weight, for each place of the kernel, one product of the cotangent
    with the inputs that the place reads."""
    rank = x.rank - 2
    steps, pads, gaps = _each(stride, rank), _each(padding, rank), _each(dilation, rank)
    kernel = [static(size) for size in weight.shape[2:]]
    found: list[str | None] = [None, None, None]
    if mask[0] and transposed:
        if any(extra >= step for extra, step in zip(_each(output_padding, rank), steps, strict=True)):
            raise ExportError(
                "the derivative of a transposed convolution whose output padding is not below its stride."
            )
        found[0] = e.op(
            "Conv", grad, weight, strides=steps, pads=_pads(pads, rank), dilations=gaps, group=groups,
            kernel_shape=kernel,
        )  # fmt: skip
    elif mask[0]:
        found[0] = _by_inputs(e, grad, x, weight, steps, pads, gaps, groups)
    if mask[1]:  # a transposed convolution exchanges the roles of inputs and cotangent
        first, second = (x, grad) if transposed else (grad, x)
        found[1] = _by_weight(e, first, second, weight, steps, pads, gaps, groups)
    if mask[2]:
        found[2] = e.op("ReduceSum", grad, e.b.ints([0, *range(2, grad.rank)]), keepdims=0)
    return found


def _by_inputs(
    e: Emission, grad: Value, x: Value, weight: Value, stride: list[int], padding: list[int], dilation: list[int],
    groups: int,
) -> str:  # fmt: skip
    rank, kernel = x.rank - 2, [static(size) for size in weight.shape[2:]]
    inner, outer = ([static(size) for size in each.shape[2:]] for each in (x, grad))
    turned = [k - 1 - p for k, p in zip(kernel, padding, strict=True)]
    plain = groups == 1 and rank == 2 and set(stride) == set(dilation) == {1} and min(turned) >= 0
    if plain and math.prod(inner) <= SMALL:
        starts = [[k - 1 - p for k, p in zip(kernel, place, strict=True)] for place in places(kernel)]
        rows = windows(e, grad, turned, starts, inner, stride)
        columns = e.op("Transpose", weight, perm=[2, 3, 0, 1])
        return _maps(e, rows, columns, None, static(weight.shape[1]), inner)
    extra = [
        inner[d] - ((outer[d] - 1) * stride[d] - 2 * padding[d] + dilation[d] * (kernel[d] - 1) + 1)
        for d in range(rank)
    ]
    return e.op(
        "ConvTranspose", grad, weight, strides=stride, pads=_pads(padding, rank), dilations=dilation, group=groups,
        output_padding=extra, kernel_shape=kernel,
    )  # fmt: skip


def _by_weight(
    e: Emission, grad: Value, x: Value, weight: Value, stride: list[int], padding: list[int], dilation: list[int],
    groups: int,
) -> str:  # fmt: skip
    out_channels, inner = static(weight.shape[0]), static(weight.shape[1])
    kernel, extents = [static(s) for s in weight.shape[2:]], [static(s) for s in grad.shape[2:]]
    # (groups, channels, samples and positions) times (groups, samples and positions, inner)
    by_channel = e.op("Transpose", grad, perm=[1, 0, *range(2, grad.rank)])
    rows = e.op("Reshape", by_channel, e.b.ints([groups, out_channels // groups, -1]))
    starts = [[p * d for p, d in zip(place, dilation, strict=True)] for place in places(kernel)]
    products = []
    for part in _parts(e, x, padding, starts, extents, stride):
        if groups == 1:
            columns = e.op("Reshape", part, e.b.ints([1, -1, inner]))
        else:
            split = e.op("Reshape", part, e.b.ints([-1, groups, inner]))
            columns = e.op("Transpose", split, perm=[1, 0, 2])
        products.append(e.op("Unsqueeze", e.op("MatMul", rows, columns), e.b.ints([3])))
    together = products[0] if len(products) == 1 else e.op("Concat", *products, axis=3)
    return e.op("Reshape", together, e.b.ints([out_channels, inner, *kernel]))


@rule("aten.max_pool2d_with_indices.default")
def _max_pool(
    e: Emission, node: fx.Node, x: Value, kernel: Sequence[int], stride: Sequence[int] = (),
    padding: Sequence[int] = (0,), dilation: Sequence[int] = (1,), ceil_mode: bool = False,
) -> Sequence[str]:  # fmt: skip
    """Indices count within a map, as torch's do; ONNX's count within the tensor."""
    rank = len(_each(kernel, 2))
    pooled, indices = e.b.ops(
        "MaxPool", [x], 2, kernel_shape=_each(kernel, rank), strides=_each(stride or kernel, rank),
        pads=_pads(_each(padding, rank), rank), dilations=_each(dilation, rank), ceil_mode=int(ceil_mode),
    )  # fmt: skip
    size = static(x.shape[-1]) * static(x.shape[-2])
    return pooled, e.op("Mod", indices, e.b.constant(size, np.int64))


@rule("aten.max_pool2d_with_indices_backward.default")
def _max_pool_backward(
    e: Emission, node: fx.Node, grad: Value, x: Value, kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], ceil_mode: bool, indices: Value,
) -> str:  # fmt: skip
    """Each cotangent to the place of its maximum; a place may be that of several windows."""
    shape = node.meta["val"].shape
    outer = list(shape[:-2])
    flat = filled(e, [*outer, static(shape[-2]) * static(shape[-1])], 0, grad.dtype)
    count = static(grad.shape[-1]) * static(grad.shape[-2])
    index, source = (e.reshape(each, [*outer, count]) for each in (indices, grad))
    return e.reshape(e.op("ScatterElements", flat, index, source, axis=len(outer), reduction="add"), shape)


@rule("aten.avg_pool2d.default")
def _avg_pool(
    e: Emission, node: fx.Node, x: Value, kernel: Sequence[int], stride: Sequence[int] = (),
    padding: Sequence[int] = (0,), ceil_mode: bool = False, count_include_pad: bool = True, divisor: Any = None,
) -> str:  # fmt: skip
    if divisor is not None:
        raise ExportError("an average pooling with a divisor of its own has no rule.")
    rank = x.rank - 2
    return e.op(
        "AveragePool", x, kernel_shape=_each(kernel, rank), strides=_each(stride or kernel, rank),
        pads=_pads(_each(padding, rank), rank), ceil_mode=int(ceil_mode), count_include_pad=int(count_include_pad),
    )  # fmt: skip


@rule("aten.avg_pool2d_backward.default")
def _avg_pool_backward(
    e: Emission, node: fx.Node, grad: Value, x: Value, kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], ceil_mode: bool, count_include_pad: bool, divisor: Any,
) -> str:  # fmt: skip
    """A transposed convolution with ones, channel by channel."""
    sides, steps, pads = _each(kernel, 2), _each(stride or kernel, 2), _each(padding, 2)
    if ceil_mode or divisor is not None or (not count_include_pad and any(pads)):
        raise ExportError("the derivative of an average pooling that counts its windows' elements has no rule.")
    height, width = (static(size) for size in x.shape[-2:])
    maps = e.op("Reshape", grad, e.b.ints([-1, 1, *(static(size) for size in grad.shape[-2:])]))
    share = e.b.constant(np.full((1, 1, *sides), 1 / (sides[0] * sides[1])), np.float32)
    extra = [
        size - ((static(n) - 1) * s - 2 * p + k)
        for size, n, s, p, k in zip((height, width), grad.shape[-2:], steps, pads, sides, strict=True)
    ]
    found = e.op(
        "ConvTranspose", maps, e.cast(share, torch.float32, grad.dtype), strides=steps, pads=_pads(pads, 2),
        output_padding=extra, kernel_shape=sides,
    )  # fmt: skip
    return e.reshape(found, x.shape)


@rule("aten._adaptive_avg_pool2d.default")
def _adaptive(e: Emission, node: fx.Node, x: Value, sizes: Sequence[int]) -> str:
    height, width = (static(size) for size in x.shape[-2:])
    rows, columns = (static(size) for size in sizes)
    if height % rows or width % columns:
        raise ExportError(f"an adaptive pooling from {height}x{width} to {rows}x{columns} has windows of two sizes.")
    sides = [height // rows, width // columns]
    return e.op("AveragePool", x, kernel_shape=sides, strides=sides)


@rule("aten._adaptive_avg_pool2d_backward.default")
def _adaptive_backward(e: Emission, node: fx.Node, grad: Value, x: Value) -> str:
    height, width = (static(size) for size in x.shape[-2:])
    rows, columns = (static(size) for size in grad.shape[-2:])
    if height % rows or width % columns:
        raise ExportError(f"an adaptive pooling from {height}x{width} to {rows}x{columns} has windows of two sizes.")
    sides = [height // rows, width // columns]
    shared = e.op("Div", grad, e.scalar(sides[0] * sides[1], grad.dtype))
    opened = e.reshape(shared, [*grad.shape[:-2], rows, 1, columns, 1])
    wide = e.op("Expand", opened, e.shape([*grad.shape[:-2], rows, sides[0], columns, sides[1]]))
    return e.reshape(wide, x.shape)
