"""Operators that act on every element by itself: arithmetic, comparison, logic, activations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .node import Node, operator, refuse
from .values import Array, dtype_of, number

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Neg": torch.neg, "Sqrt": torch.sqrt, "Exp": torch.exp, "Log": torch.log,
    "Reciprocal": torch.reciprocal, "Floor": torch.floor, "Ceil": torch.ceil, "Round": torch.round, "Sign": torch.sign,
    "Erf": torch.erf, "Sin": torch.sin, "Cos": torch.cos, "Tan": torch.tan, "Asin": torch.asin, "Acos": torch.acos,
    "Atan": torch.atan, "Sinh": torch.sinh, "Cosh": torch.cosh, "Tanh": torch.tanh, "Asinh": torch.asinh,
    "Acosh": torch.acosh, "Atanh": torch.atanh, "Relu": F.relu, "Sigmoid": torch.sigmoid, "Softplus": F.softplus,
    "Softsign": F.softsign, "HardSwish": F.hardswish, "Mish": F.mish, "Not": torch.logical_not, "IsNaN": torch.isnan,
    "BitwiseNot": torch.bitwise_not,
}  # fmt: skip

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Sub": torch.sub, "Equal": torch.eq, "Greater": torch.gt, "Less": torch.lt, "GreaterOrEqual": torch.ge,
    "LessOrEqual": torch.le, "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
}  # fmt: skip

_WEIGHED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"Add": torch.add, "Mul": torch.mul}

_FOLDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Sum": torch.add,
    "Max": torch.maximum,
    "Min": torch.minimum,
}


def _of_tensors(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda node, *inputs: compute(*inputs)


def _folded(compute: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, *inputs: functools.reduce(compute, inputs)


for _name, _one in _UNARY.items():
    operator(_name)(_of_tensors(_one))
for _name, _two in _BINARY.items():
    operator(_name)(_of_tensors(_two))
for _name, _two in _WEIGHED.items():
    operator(_name, trains=(0, 1))(_of_tensors(_two))
for _name, _two in _FOLDED.items():
    operator(_name)(_folded(_two))


@operator("Mean")
def mean(node: Node, *inputs: Tensor) -> Tensor:
    return functools.reduce(torch.add, inputs) / len(inputs)


@operator("Div")
def div(node: Node, left: Tensor, right: Tensor) -> Tensor:
    if left.is_floating_point():
        return left / right
    return torch.div(left, right, rounding_mode="trunc")


@operator("Mod")
def mod(node: Node, left: Tensor, right: Tensor) -> Tensor:
    return torch.fmod(left, right) if node.get("fmod", 0) else torch.remainder(left, right)


@operator("Pow")
def power(node: Node, base: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(base, exponent).to(base.dtype)


@operator("BitShift")
def bit_shift(node: Node, value: Tensor, amount: Tensor) -> Tensor:
    shift = torch.bitwise_left_shift if node.get("direction") == "LEFT" else torch.bitwise_right_shift
    wide = value.to(torch.int64)
    return shift(wide, amount.to(torch.int64)).to(value.dtype)


@operator("Where")
def where(node: Node, condition: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.where(condition, left, right)


@operator("IsInf")
def is_inf(node: Node, value: Tensor) -> Tensor:
    positive, negative = node.get("detect_positive", 1), node.get("detect_negative", 1)
    found = torch.isinf(value)
    if not positive:
        found = found & (value < 0)
    return found if negative else found & (value > 0)


@operator("Clip", static=(1, 2))
def clip(node: Node, value: Tensor, low: Array | None = None, high: Array | None = None) -> Tensor:
    least, most = number(low, node.get("min")), number(high, node.get("max"))
    return value if least is None and most is None else torch.clamp(value, least, most)


@operator("Cast")
def cast(node: Node, value: Tensor) -> Tensor:
    return value.to(dtype_of(node.get("to")))


@operator("CastLike")
def cast_like(node: Node, value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype)


@operator("LeakyRelu")
def leaky_relu(node: Node, value: Tensor) -> Tensor:
    return F.leaky_relu(value, node.get("alpha", 0.01))


@operator("PRelu", trains=(1,))
def prelu(node: Node, value: Tensor, slope: Tensor) -> Tensor:
    return torch.where(value < 0, value * slope, value)


@operator("Elu")
def elu(node: Node, value: Tensor) -> Tensor:
    return F.elu(value, node.get("alpha", 1.0))


@operator("Celu")
def celu(node: Node, value: Tensor) -> Tensor:
    return F.celu(value, node.get("alpha", 1.0))


@operator("Selu")
def selu(node: Node, value: Tensor) -> Tensor:
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    return torch.where(value > 0, value, alpha * torch.expm1(value)).mul(gamma)


@operator("ThresholdedRelu")
def thresholded_relu(node: Node, value: Tensor) -> Tensor:
    return torch.where(value > node.get("alpha", 1.0), value, torch.zeros_like(value))


@operator("HardSigmoid")
def hard_sigmoid(node: Node, value: Tensor) -> Tensor:
    return torch.clamp(node.get("alpha", 0.2) * value + node.get("beta", 0.5), 0.0, 1.0)


@operator("Swish")
def swish(node: Node, value: Tensor) -> Tensor:
    return value * torch.sigmoid(node.get("alpha", 1.0) * value)


@operator("Gelu")
def gelu(node: Node, value: Tensor) -> Tensor:
    return F.gelu(value, approximate=node.get("approximate", "none"))


@operator("Shrink")
def shrink(node: Node, value: Tensor) -> Tensor:
    bias, threshold = node.get("bias", 0.0), node.get("lambd", 0.5)
    zero = torch.zeros_like(value)
    return torch.where(value < -threshold, value + bias, torch.where(value > threshold, value - bias, zero))


def _softmax(node: Node, value: Tensor, compute: Callable[..., Tensor]) -> Tensor:
    """Since version 13 along one axis; before, along all from that axis on."""
    if node.opset >= 13:
        return compute(value, dim=node.get("axis", -1))
    axis = node.get("axis", 1) % value.dim()
    return compute(value.flatten(axis), dim=axis).reshape(value.shape)


@operator("Softmax")
def softmax(node: Node, value: Tensor) -> Tensor:
    return _softmax(node, value, torch.softmax)


@operator("LogSoftmax")
def log_softmax(node: Node, value: Tensor) -> Tensor:
    return _softmax(node, value, torch.log_softmax)


@operator("Hardmax")
def hardmax(node: Node, value: Tensor) -> Tensor:
    def largest(value: Tensor, dim: int) -> Tensor:
        index = value.argmax(dim, keepdim=True)
        return torch.zeros_like(value).scatter(dim, index, 1.0)

    return _softmax(node, value, largest)


@operator("Identity")
def identity(node: Node, value: Any) -> Any:
    return value


@operator("Dropout", static=(1, 2), limits="as in inference: nothing is dropped")
def dropout(node: Node, value: Tensor, ratio: Array | None = None, training: Array | None = None) -> Any:
    if number(training, 0):
        raise refuse(node, "training_mode")
    if len(node.outputs) == 1:
        return value
    return value, torch.ones_like(value, dtype=torch.bool)
