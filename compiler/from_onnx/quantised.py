"""Operators of 8-bit networks, and the reading of a quantised weight as one that can be trained.

What ``QuantizeLinear`` makes of an activation has no derivative, and none is declared: gradients behind it are
estimated. A *weight* that the file holds as whole numbers behind ``DequantizeLinear``, or as floats behind both, is a
float parameter that `fake_quantise` rounds in every forward, with the file's scale and zero point. That rounding is
declared to have the derivative of a clamp (Bengio et al. 2013, arXiv 1308.3432; Jacob et al. 2018, arXiv 1712.05877),
on the parameter alone. It is **biased** wherever the loss is not linear in the weights within a step of the scale.

``QLinearConv`` and ``QLinearMatMul`` are read as what they are defined to be, dequantise, compute, quantise
(`expanded`), so that their weights train in the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .convolution import conv
from .node import Node, operator, refuse
from .values import dtype_of

RANGES = {
    torch.uint8: (0, 255), torch.int8: (-128, 127), torch.uint16: (0, 65535), torch.int16: (-32768, 32767),
}  # fmt: skip
"""Smallest and largest whole number; int32, which biases have, is not clamped."""


def along(scale: Tensor, value: Tensor, node: Node) -> Tensor:
    """A scale or zero point with the axes of the value that it belongs to: one number, one an index of an axis, or one
    a block."""
    if scale.dim() == 0 or (scale.dim() == 1 and scale.shape[0] == 1 and value.dim() != 1):
        return scale.reshape([1] * value.dim()) if scale.dim() else scale
    axis, block = node.get("axis", 1) % value.dim(), node.get("block_size", 0)
    if scale.dim() == 1:
        return scale.reshape([-1 if k == axis else 1 for k in range(value.dim())])
    return scale.repeat_interleave(block, axis).narrow(axis, 0, value.shape[axis]) if block else scale


def quantise(node: Node, value: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Floats as whole numbers, of the floats' dtype still: halves go to even, as in ONNX."""
    whole = torch.round(value / along(scale, value, node))
    if zero is not None:
        whole = whole + along(zero, value, node).to(value.dtype)
    return torch.clamp(whole, *RANGES[dtype]) if dtype in RANGES else whole


def _target(node: Node, zero: Tensor | None) -> torch.dtype:
    if zero is not None:
        return zero.dtype
    return dtype_of(node.get("output_dtype", 0) or 2)


@operator("QuantizeLinear", limits="to 8 and 16 bits; rounding has no derivative")
def quantize_linear(node: Node, value: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    dtype = _target(node, zero)
    if dtype not in RANGES:
        raise refuse(node, f"output type {dtype}")
    return quantise(node, value.to(scale.dtype), scale, zero, dtype).to(dtype)


@operator("DequantizeLinear", trains=(), limits="from 8, 16 and 32 bits")
def dequantize_linear(node: Node, value: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    whole = value.to(scale.dtype)
    if zero is not None:
        whole = whole - along(zero, value, node).to(scale.dtype)
    return whole * along(scale, value, node)


def fake_quantise(node: Node, value: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """A float weight at the nearest values that the file's whole numbers stand for, with the derivative of a clamp.

    ``onward.dtype`` among the node's attributes is that of the whole numbers, where no zero point tells.
    """
    dtype = zero.dtype if zero is not None else node.get("onward.dtype", torch.uint8)
    whole = quantise(node, value, scale, zero, dtype)
    hard = dequantize_linear(node, whole, scale, zero)
    soft = value
    if dtype in RANGES:
        ends = [torch.full_like(scale, end) for end in RANGES[dtype]]
        low, high = (dequantize_linear(node, along(end, value, node), scale, zero) for end in ends)
        soft = torch.clamp(value, low, high)
    return hard.detach() - (soft.detach() - soft)


@operator("DynamicQuantizeLinear", limits="the scale is the batch's: samples are mixed")
def dynamic_quantize_linear(node: Node, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    high, low = value.max().clamp_min(0), value.min().clamp_max(0)
    scale = (high - low) / 255
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.clamp(torch.round(-low / safe), 0, 255)
    whole = torch.clamp(torch.round(value / safe) + zero, 0, 255)
    return whole.to(torch.uint8), scale, zero.to(torch.uint8)


def _shifted(value: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    """Whole numbers less their zero point, as float64, which holds every sum of products exactly."""
    wide = value.to(torch.float64)
    if zero is None:
        return wide
    if zero.dim() == 1 and zero.shape[0] > 1:
        zero = zero.reshape([-1 if k == axis % value.dim() else 1 for k in range(value.dim())])
    return wide - zero.to(torch.float64)


@operator("MatMulInteger", limits="its weight stays as it is: the scale is not the operator's")
def mat_mul_integer(
    node: Node, left: Tensor, right: Tensor, left_zero: Tensor | None = None, right_zero: Tensor | None = None
) -> Tensor:
    return torch.matmul(_shifted(left, left_zero, -2), _shifted(right, right_zero, -1)).to(torch.int32)


@operator("ConvInteger", limits="its weight stays as it is: the scale is not the operator's")
def conv_integer(
    node: Node, value: Tensor, weight: Tensor, zero: Tensor | None = None, weight_zero: Tensor | None = None
) -> Tensor:
    return conv(node, _shifted(value, zero, 1), _shifted(weight, weight_zero, 0)).to(torch.int32)


EXPANDED = {"QLinearConv": "as its definition: trains", "QLinearMatMul": "as its definition: trains"}
"""Operators that are read as other ones."""


def expanded(node: Node, fresh: Any) -> list[Node]:
    """``QLinearConv`` and ``QLinearMatMul`` as the nodes that define them; any other node as it is.

    `fresh` names a new value: ``fresh(node, "x")``.
    """
    if node.kind not in EXPANDED:
        return [node]
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, *bias = node.inputs
    names = {each: fresh(node, each) for each in ("x", "w", "b", "s", "y")}
    is_conv = node.op_type == "QLinearConv"

    def part(op_type: str, inputs: tuple[str, ...], output: str, **attributes: Any) -> Node:
        return Node(op_type, "", node.name, inputs, (output,), attributes, node.opset, node.place, node.batch)

    nodes = [
        part("DequantizeLinear", (x, x_scale, x_zero), names["x"], axis=-2),
        part("DequantizeLinear", (w, w_scale, w_zero), names["w"], axis=0 if is_conv else -1),
    ]
    operands = [names["x"], names["w"]]
    if bias and bias[0]:
        nodes.append(part("Mul", (x_scale, w_scale), names["s"]))
        nodes.append(part("DequantizeLinear", (bias[0], names["s"]), names["b"], axis=0))
        operands.append(names["b"])
    core = part("Conv" if is_conv else "MatMul", tuple(operands), names["y"], **node.attributes)
    last = part("QuantizeLinear", (names["y"], y_scale, y_zero), node.outputs[0], axis=-2)
    return [*nodes, core, last]
