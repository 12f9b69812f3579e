"""Rules of the products of integers (`onward.models.integer`): int8 factors, int32 sums."""

from __future__ import annotations

import torch
from torch import fx

from ..emit import Emission, Value, rule, static


@rule("onward_models.integer_linear.default")
def _linear(e: Emission, node: fx.Node, x: Value, weight: Value, bias: Value, step: Value) -> str:
    columns = e.op("Transpose", e.as_type(weight, torch.int8), perm=[1, 0])
    sums = e.op("MatMulInteger", e.as_type(x, torch.int8), columns)
    return _scaled(e, x, e.op("Add", sums, e.as_type(bias, torch.int32)), step)


@rule("onward_models.integer_convolution.default")
def _convolution(
    e: Emission, node: fx.Node, x: Value, weight: Value, bias: Value, step: Value, stride: int, padding: int
) -> str:
    """As a product of unfolded windows: ``ConvInteger`` takes unsigned activations alone on some runtimes."""
    channels, inner, side, _ = (static(size) for size in weight.shape)
    height, width = (static(size) for size in node.meta["val"].shape[2:])
    whole = e.as_type(x, torch.int8)
    padded = e.op("Pad", whole, e.b.ints([0, 0, padding, padding] * 2), e.scalar(0, torch.int8))
    windows = []
    for row in range(side):
        for column in range(side):
            ends = [row + (height - 1) * stride + 1, column + (width - 1) * stride + 1]
            where = (e.b.ints([row, column]), e.b.ints(ends), e.b.ints([2, 3]), e.b.ints([stride, stride]))
            windows.append(e.op("Unsqueeze", e.op("Slice", padded, *where), e.b.ints([2])))
    opened = windows[0] if len(windows) == 1 else e.op("Concat", *windows, axis=2)  # (N, inner, side², height, width)
    rows = e.op("Reshape", e.op("Transpose", opened, perm=[0, 3, 4, 1, 2]), e.b.ints([-1, inner * side * side]))
    columns = e.op("Reshape", e.as_type(weight, torch.int8), e.b.ints([channels, inner * side * side]))
    sums = e.op("MatMulInteger", rows, e.op("Transpose", columns, perm=[1, 0]))
    sums = e.op("Add", sums, e.as_type(bias, torch.int32))
    return e.op(
        "Transpose", _scaled(e, x, e.op("Reshape", sums, e.b.ints([-1, height, width, channels])), step),
        perm=[0, 3, 1, 2],
    )  # fmt: skip


def _scaled(e: Emission, x: Value, sums: str, step: Value) -> str:
    return e.op("Mul", e.cast(sums, torch.int32, x.dtype), step)
