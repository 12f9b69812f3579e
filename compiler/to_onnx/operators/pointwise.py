"""Rules of operations on each element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..emit import Emission, Value, rule

_UNARY = {
    "abs": "Abs", "neg": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "sin": "Sin", "cos": "Cos", "tan": "Tan",
    "tanh": "Tanh", "sigmoid": "Sigmoid", "erf": "Erf", "floor": "Floor", "ceil": "Ceil", "round": "Round",
    "sign": "Sign", "reciprocal": "Reciprocal", "relu": "Relu", "logical_not": "Not", "bitwise_not": "BitwiseNot",
    "isnan": "IsNaN", "isinf": "IsInf", "asin": "Asin", "acos": "Acos", "atan": "Atan", "sinh": "Sinh",
    "cosh": "Cosh", "asinh": "Asinh", "acosh": "Acosh", "atanh": "Atanh",
}  # fmt: skip
_BINARY = {
    "mul.Tensor": "Mul", "mul.Scalar": "Mul", "maximum.default": "Max", "minimum.default": "Min",
}  # fmt: skip
_COMPARISONS = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}
_LOGICAL = {"logical_and": "And", "logical_or": "Or", "logical_xor": "Xor"}
_BITWISE = {"bitwise_and": "And", "bitwise_or": "Or", "bitwise_xor": "Xor"}


def out_type(node: fx.Node) -> torch.dtype:
    """The dtype of a node's result."""
    found: torch.dtype = node.meta["val"].dtype
    return found


def _unary(operator: str) -> Callable[..., str]:
    def convert(e: Emission, node: fx.Node, x: Value) -> str:
        kind = "Not" if operator == "BitwiseNot" and x.dtype == torch.bool else operator
        dtype = torch.bool if kind == "Not" else x.dtype if kind.startswith("Is") else out_type(node)
        return e.op(kind, e.as_type(x, dtype))

    return convert


def _binary(operator: str) -> Callable[..., str]:
    def convert(e: Emission, node: fx.Node, x: Any, y: Any) -> str:
        dtype = out_type(node)
        if dtype == torch.bool and operator == "Mul":
            return e.op("And", e.as_type(x, dtype), e.as_type(y, dtype))
        return e.op(operator, e.as_type(x, dtype), e.as_type(y, dtype))

    return convert


def _comparison(operator: str, negated: bool = False) -> Callable[..., str]:
    def convert(e: Emission, node: fx.Node, x: Any, y: Any) -> str:
        dtype = torch.result_type(*(each.val if isinstance(each, Value) else each for each in (x, y)))
        if dtype == torch.bool and operator != "Equal":
            dtype = torch.int32
        found = e.op(operator, e.as_type(x, dtype), e.as_type(y, dtype))
        return e.op("Not", found) if negated else found

    return convert


def _logical(operator: str) -> Callable[..., str]:
    def convert(e: Emission, node: fx.Node, x: Any, y: Any) -> str:
        return e.op(operator, e.as_type(x, torch.bool), e.as_type(y, torch.bool))

    return convert


def _bitwise(operator: str) -> Callable[..., str]:
    def convert(e: Emission, node: fx.Node, x: Any, y: Any) -> str:
        dtype = out_type(node)
        kind = operator if dtype == torch.bool else f"Bitwise{operator}"
        return e.op(kind, e.as_type(x, dtype), e.as_type(y, dtype))

    return convert


for _name, _operator in _UNARY.items():
    rule(f"aten.{_name}.default")(_unary(_operator))
for _name, _operator in _BINARY.items():
    rule(f"aten.{_name}")(_binary(_operator))
for _name, _operator in _COMPARISONS.items():
    rule(f"aten.{_name}.Tensor", f"aten.{_name}.Scalar")(_comparison(_operator))
rule("aten.ne.Tensor", "aten.ne.Scalar")(_comparison("Equal", negated=True))
for _name, _operator in _LOGICAL.items():
    rule(f"aten.{_name}.default")(_logical(_operator))
for _name, _operator in _BITWISE.items():
    rule(f"aten.{_name}.Tensor", f"aten.{_name}.Scalar")(_bitwise(_operator))


@rule("aten.bitwise_right_shift.Tensor")
def _shift(e: Emission, node: fx.Node, x: Value, by: Value) -> str:
    return e.op("BitShift", x, by, direction="RIGHT")


@rule("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar")
def _sum(e: Emission, node: fx.Node, x: Any, y: Any, alpha: Any = 1, **more: Any) -> str:
    dtype = out_type(node)
    alpha = more.get("alpha", alpha)
    first, second = e.as_type(x, dtype), e.as_type(y, dtype)
    if dtype == torch.bool:
        return e.op("Or", first, second)
    if alpha != 1:
        second = e.op("Mul", second, e.scalar(alpha, dtype))
    return e.op("Add" if "add" in str(node.target) else "Sub", first, second)


@rule("aten.div.Tensor", "aten.div.Scalar", "aten.div.Tensor_mode")
def _quotient(e: Emission, node: fx.Node, x: Any, y: Any, rounding_mode: str | None = None) -> str:
    dtype = out_type(node)
    if rounding_mode is None or dtype.is_floating_point:
        found = e.op("Div", e.as_type(x, dtype), e.as_type(y, dtype))
        if rounding_mode == "floor":
            return e.op("Floor", found)
        return found if rounding_mode is None else e.op("Mul", e.op("Sign", found), e.op("Floor", e.op("Abs", found)))
    wide = torch.int64 if dtype == torch.int64 else torch.int32  # runtimes divide no narrower ones
    first, second = e.as_type(x, wide), e.as_type(y, wide)
    found = e.op("Div", first, second)
    if rounding_mode == "floor":
        left = e.op("Sub", first, e.op("Mul", found, second))
        zero = e.scalar(0, wide)
        below = e.op("Xor", e.op("Less", left, zero), e.op("Less", second, zero))
        off = e.op("And", below, e.op("Not", e.op("Equal", left, zero)))
        found = e.op("Sub", found, e.cast(off, torch.bool, wide))
    return e.cast(found, wide, dtype)


@rule("aten.remainder.Tensor", "aten.remainder.Scalar", "aten.fmod.Tensor", "aten.fmod.Scalar")
def _remainder(e: Emission, node: fx.Node, x: Any, y: Any) -> str:
    dtype = out_type(node)
    first, second = e.as_type(x, dtype), e.as_type(y, dtype)
    if "fmod" in str(node.target):
        return e.op("Mod", first, second, fmod=1)
    if not dtype.is_floating_point:
        return e.op("Mod", first, second)
    return e.op("Sub", first, e.op("Mul", e.op("Floor", e.op("Div", first, second)), second))


@rule("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar")
def _power(e: Emission, node: fx.Node, x: Any, y: Any) -> str:
    dtype = out_type(node)
    base = e.as_type(x, dtype)
    if not isinstance(y, Value):
        if y == 2:
            return e.op("Mul", base, base)
        if y == 3:
            return e.op("Mul", e.op("Mul", base, base), base)
        if y == 0.5:
            return e.op("Sqrt", base)
        if y in (-1, -0.5):
            return e.op("Reciprocal", base if y == -1 else e.op("Sqrt", base))
    return e.op("Pow", base, e.as_type(y, dtype))


@rule("aten.trunc.default")
def _trunc(e: Emission, node: fx.Node, x: Value) -> str:
    return e.op("Mul", e.op("Sign", x), e.op("Floor", e.op("Abs", x)))


@rule("aten.rsqrt.default")
def _rsqrt(e: Emission, node: fx.Node, x: Value) -> str:
    return e.op("Reciprocal", e.op("Sqrt", e.as_type(x, out_type(node))))


def _near_zero(e: Emission, x: str, near: str, far: str, dtype: torch.dtype) -> str:
    """One form where a sum with 1 would lose what is small, another elsewhere."""
    return e.op("Where", e.op("Less", e.op("Abs", x), e.scalar(0.5, dtype)), near, far)


@rule("aten.log1p.default", "aten.expm1.default", "aten.log2.default", "aten.log10.default", "aten.exp2.default")
def _logarithms(e: Emission, node: fx.Node, x: Value) -> str:
    dtype = out_type(node)
    given, one = e.as_type(x, dtype), e.scalar(1, dtype)
    match str(node.target).split(".")[1]:
        case "log1p":
            more = e.op("Add", given, one)
            plain = e.op("Log", more)
            left = e.op("Sub", more, one)  # what the sum kept of x
            ratio = e.op("Mul", plain, e.op("Div", given, left))
            near = e.op("Where", e.op("Equal", left, e.scalar(0, dtype)), given, ratio)
            return _near_zero(e, given, near, plain, dtype)
        case "expm1":
            half = e.op("Tanh", e.op("Mul", given, e.scalar(0.5, dtype)))
            near = e.op("Div", e.op("Add", half, half), e.op("Sub", one, half))
            return _near_zero(e, given, near, e.op("Sub", e.op("Exp", given), one), dtype)
        case "exp2":
            return e.op("Pow", e.scalar(2, dtype), given)
        case name:
            return e.op("Mul", e.op("Log", given), e.scalar(1 / math.log(2 if name == "log2" else 10), dtype))


@rule("aten.clamp.default", "aten.clamp.Tensor", "aten.hardtanh.default")
def _clamp(e: Emission, node: fx.Node, x: Value, low: Any = None, high: Any = None, **more: Any) -> str:
    dtype = out_type(node)
    low, high = more.get("min", low), more.get("max", high)
    value = e.as_type(x, dtype)
    if low is not None:
        value = e.op("Max", value, e.as_type(low, dtype))
    return value if high is None else e.op("Min", value, e.as_type(high, dtype))


@rule("aten.where.self")
def _where(e: Emission, node: fx.Node, condition: Value, x: Any, y: Any) -> str:
    dtype = out_type(node)
    return e.op("Where", e.as_type(condition, torch.bool), e.as_type(x, dtype), e.as_type(y, dtype))


@rule(
    "aten._to_copy.default", "aten.clone.default", "aten.alias.default", "aten.lift_fresh_copy.default",
    "aten.copy.default",
)  # fmt: skip
def _copied(e: Emission, node: fx.Node, x: Value, *more: Any, **named: Any) -> str:
    if "aten.copy." in str(node.target):
        source = more[0]
        value = e.as_type(source, out_type(node))
        return value if source.shape == x.shape else e.op("Expand", value, e.shape(node.meta["val"].shape))
    return e.as_type(x, out_type(node))


@rule("aten.threshold_backward.default")
def _threshold_backward(e: Emission, node: fx.Node, grad: Value, x: Value, threshold: float) -> str:
    """By a product: ``Where`` takes five times as long. Gradients are finite, or a step says that they are not."""
    passed = e.op("Greater", x, e.scalar(threshold, x.dtype))
    return e.op("Mul", grad, e.cast(passed, torch.bool, grad.dtype))


@rule("aten.gelu.default")
def _gelu(e: Emission, node: fx.Node, x: Value, approximate: str = "none") -> str:
    return e.op("Gelu", x, approximate=approximate)


@rule("aten.elu.default")
def _elu(e: Emission, node: fx.Node, x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> str:
    dtype = out_type(node)
    inner = x if input_scale == 1 else e.op("Mul", x, e.scalar(input_scale, dtype))
    negative = e.op("Mul", e.op("Sub", e.op("Exp", inner), e.scalar(1, dtype)), e.scalar(alpha, dtype))
    found = e.op("Where", e.op("Greater", x, e.scalar(0, dtype)), x, negative)
    return found if scale == 1 else e.op("Mul", found, e.scalar(scale, dtype))


@rule("aten.leaky_relu.default")
def _leaky_relu(e: Emission, node: fx.Node, x: Value, slope: float = 0.01) -> str:
    return e.op("LeakyRelu", x, alpha=float(slope))


@rule("aten.softplus.default")
def _softplus(e: Emission, node: fx.Node, x: Value, beta: float = 1.0, threshold: float = 20.0) -> str:
    dtype = out_type(node)
    scaled = e.op("Mul", x, e.scalar(beta, dtype))
    soft = e.op("Div", e.op("Softplus", scaled), e.scalar(beta, dtype))
    return e.op("Where", e.op("Greater", scaled, e.scalar(threshold, dtype)), x, soft)


@rule("aten.hardsigmoid.default", "aten.hardswish.default")
def _hardsigmoid(e: Emission, node: fx.Node, x: Value) -> str:
    return e.op("HardSigmoid", x, alpha=1 / 6, beta=0.5) if "sigmoid" in str(node.target) else e.op("HardSwish", x)
