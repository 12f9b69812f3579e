"""Rules of the products of integers (`onward.models.integer`): int8 factors, int32 sums."""

from __future__ import annotations

import torch
from torch import fx

from ..emit import Emission, Value, rule, static
from .convolution import places, windows


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
    channels, _, *kernel = (static(size) for size in weight.shape)
    extents = [static(size) for size in node.meta["val"].shape[2:]]
    rows = windows(e, e.as_type(x, torch.int8), [padding] * 2, places(kernel), extents, [stride] * 2)
    columns = e.op("Transpose", e.as_type(weight, torch.int8), perm=[2, 3, 1, 0])
    sums = e.op("MatMulInteger", rows, e.op("Reshape", columns, e.b.ints([-1, channels])))
    scaled = _scaled(e, x, e.op("Add", sums, e.as_type(bias, torch.int32)), step)
    return e.op("Transpose", scaled, perm=[0, 3, 1, 2])


def _scaled(e: Emission, x: Value, sums: str, step: Value) -> str:
    return e.op("Mul", e.cast(sums, torch.int32, x.dtype), step)
