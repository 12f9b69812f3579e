"""Operations that have a form in ONNX, one `Case` a form: a function of tensors and what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import onward.models.integer as integer

aten: Any = torch.ops.aten
B = (1,)
"""The batch size, as `Like` writes it."""
Size = int | tuple[int]


@dataclass(frozen=True)
class Sample:
    """What a case reads: a tensor by form and what is in it."""

    shape: tuple[Size, ...]
    dtype: torch.dtype
    make: Callable[[list[int], torch.Generator], Tensor]

    def of(self, batch: int, generator: torch.Generator) -> Tensor:
        shape = [size[0] * batch if isinstance(size, tuple) else size for size in self.shape]
        return self.make(shape, generator).to(self.dtype)


def real(*shape: Size, low: float = -2.0, high: float = 2.0, dtype: torch.dtype = torch.float32) -> Sample:
    return Sample(shape, dtype, lambda sizes, g: low + (high - low) * torch.rand(sizes, generator=g, dtype=dtype))


def ints(*shape: Size, low: int = -5, high: int = 6, dtype: torch.dtype = torch.int64) -> Sample:
    return Sample(shape, dtype, lambda sizes, g: torch.randint(low, high, sizes, generator=g))


def bits(*shape: Size) -> Sample:
    return ints(*shape, low=0, high=2, dtype=torch.bool)


def values(*shape: Size, among: Sequence[float], dtype: torch.dtype = torch.float32) -> Sample:
    """Numbers of a list in turn: ties, signs of zero, infinities."""

    def make(sizes: list[int], generator: torch.Generator) -> Tensor:
        count = int(np.prod(sizes))
        return torch.tensor([among[place % len(among)] for place in range(count)], dtype=dtype).reshape(sizes)

    return Sample(shape, dtype, make)


def distinct(*shape: Size) -> Sample:
    """No two entries equal, so that order and maxima are of one form."""
    return Sample(
        shape, torch.float32, lambda sizes, g: torch.randperm(int(np.prod(sizes)), generator=g).reshape(sizes)
    )


@dataclass(frozen=True)
class Case:
    """A function and what it reads; results may differ by `tolerance` of the largest of them."""

    name: str
    function: Callable[..., Any]
    given: tuple[Sample, ...]
    tolerance: float = 2e-6


def case(name: str, function: Callable[..., Any], *given: Sample, tolerance: float = 2e-6) -> Case:
    return Case(name, function, given, tolerance)


X, Y, D = real(B, 3), real(B, 3), real(B, 3, dtype=torch.float64)
INT, J, K = ints(B, 3), ints(B, 3, low=1), ints(B, 3, dtype=torch.int32)
P, Q = bits(B, 3), bits(B, 3)
PLUS = real(B, 3, low=0.1)
SPECIAL = values(B, 4, among=[0.0, -0.0, 0.5, -0.5, 1.5, -1.5, 2.5, -7.0])
ODD = values(B, 4, among=[1.0, float("nan"), float("inf"), -float("inf")])
IMAGE = real(B, 2, 6, 5)


def pointwise() -> Iterator[Case]:
    for name in ("neg", "exp", "sin", "cos", "tan", "tanh", "sigmoid", "erf", "atan", "sinh", "cosh", "asinh", "relu"):
        yield case(name, getattr(torch, name), X)
    for name in ("log", "sqrt", "rsqrt", "reciprocal", "log1p", "log2", "log10"):
        yield case(name, getattr(torch, name), PLUS)
    for name in ("asin", "acos", "atanh"):
        yield case(name, getattr(torch, name), real(B, 3, low=-0.9, high=0.9))
    yield case("acosh", torch.acosh, real(B, 3, low=1.1))
    yield case("relu's derivative", lambda g, x: aten.threshold_backward(g, x, 0.5), X, Y)
    shifts = torch.tensor([0, 3, 7], dtype=torch.uint8)
    octets = ints(B, 3, low=0, high=256, dtype=torch.uint8)
    yield case("right shift", lambda x: torch.bitwise_right_shift(x, shifts), octets)
    for name in ("abs", "floor", "ceil", "round", "sign", "trunc", "relu"):
        yield case(f"{name} at edges", getattr(torch, name), SPECIAL)
    for name in ("exp2", "expm1"):
        yield case(name, getattr(torch, name), X)
    yield case(
        "expm1 and log1p near zero", lambda x: (torch.expm1(x), torch.log1p(x)), values(B, 2, among=[1e-7, -1e-6])
    )
    for name in ("exp", "sqrt", "tanh", "sigmoid"):
        yield case(f"{name} of integers", getattr(torch, name), ints(B, 3, low=0))
    yield case(
        "double", lambda x: (torch.tanh(x), torch.sigmoid(x), torch.sin(x) + 1, torch.exp(x)), D, tolerance=1e-13
    )
    yield case("not", lambda p, i: (torch.logical_not(p), torch.logical_not(i), ~p, ~i), P, INT)
    yield case("not of floats", torch.logical_not, SPECIAL)
    yield case("isnan, isinf", lambda x: (x.isnan(), x.isinf(), x.isfinite()), ODD)
    yield case("nan_to_num", torch.nan_to_num, ODD)
    yield case("signs of integers", lambda i: (i.abs(), i.sign(), -i), INT)

    for name in ("mul", "add", "sub", "maximum", "minimum"):
        yield case(name, getattr(torch, name), X, Y)
        yield case(f"{name} of integers", getattr(torch, name), INT, J)
        yield case(f"{name} broadcasts", getattr(torch, name), real(B, 1, 3), real(4, 1))
    yield case("mixed", lambda x, i, p, d: (x + i, i * x, x * p, d + x, i + p, p * 2.5, p + p), X, INT, P, D)
    yield case("mul of booleans", lambda p, q: (p * q, p + q), P, Q)
    yield case("numbers", lambda x: (x + 2, 2 - x, x * 3, 1.5 * x, x - 0.5, torch.rsub(x, 2, alpha=3)), X)
    yield case("numbers and integers", lambda i: (i + 2, 2 - i, i * 3, i * 1.5, i + 0.5, 7 - i), K)
    yield case(
        "alpha",
        lambda x, y, i: (torch.add(x, y, alpha=2), torch.sub(x, y, alpha=0.5), torch.add(i, i, alpha=3)),
        X,
        Y,
        INT,
    )
    yield case("alpha of a number", lambda x: (torch.add(x, 2, alpha=3), torch.sub(x, 2, alpha=3)), X)
    yield case("a 0-d tensor", lambda x, s: (x * s, s - x, x / s), X, real(low=1))
    yield case(
        "scalar overloads",
        lambda x: (aten.add.Scalar(x, 2), aten.sub.Scalar(x, 1.5, 2), aten.mul.Scalar(x, 3), aten.div.Scalar(x, 3)),
        X,
    )
    yield case("rsub overload", lambda x: aten.rsub.Scalar(x, 2, 3), X)
    yield case("div", lambda x, y: (x / y, x / 3, 2 / y), X, PLUS)
    yield case("div of integers", lambda i, j: (i / j, i / 2, 1 / j), INT, J)
    for mode in ("floor", "trunc"):
        yield case(f"div {mode}", lambda x, y, mode=mode: torch.div(x, y, rounding_mode=mode), X, PLUS)
        yield case(f"div {mode} of integers", lambda i, j, mode=mode: torch.div(i, j, rounding_mode=mode), INT, J)
        yield case(
            f"div {mode} by a number",
            lambda i, x, mode=mode: (torch.div(i, -3, rounding_mode=mode), torch.div(x, -0.7, rounding_mode=mode)),
            INT,
            X,
        )
        yield case(f"div {mode} at edges", lambda x, mode=mode: torch.div(x, 0.5, rounding_mode=mode), SPECIAL)
        yield case(
            f"div {mode} of a large integer",
            lambda i, mode=mode: torch.div(i, 1, rounding_mode=mode),
            values(B, 2, among=[2**53 + 1, -(2**62) - 1], dtype=torch.int64),
        )
    yield case("floor divide", lambda i, j, x: (i // j, x // 0.7, i // 2, torch.floor_divide(i, 3)), INT, J, X)
    yield case("remainder", lambda i, j, x, y: (i % j, x % y, i % -3, x % -0.7), INT, J, X, PLUS)
    yield case(
        "fmod",
        lambda i, j, x, y: (torch.fmod(i, j), torch.fmod(x, y), torch.fmod(i, -3), torch.fmod(x, 0.7)),
        INT,
        J,
        X,
        PLUS,
    )
    yield case("pow by a number", lambda x: (x**2, x**3, x**0.5, x**-1, x**-0.5, x**1.7, x**0, x**1, x**4), PLUS)
    yield case("pow of integers", lambda i, x: (i**2, i**3, i**2.0, x ** i.abs()), INT, X, tolerance=1e-5)
    yield case("pow of negatives", lambda x: (x**2, x**3, x**4, x**-1), X, tolerance=1e-5)
    yield case("pow of a number", lambda x: (2**x, torch.pow(1.5, x)), X)
    yield case("pow of tensors", torch.pow, PLUS, Y)
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        kind = getattr(torch, name)
        yield case(
            name,
            lambda x, y, i, j, kind=kind: (kind(x, y), kind(x, x), kind(i, j), kind(x, i), kind(i, x)),
            X,
            Y,
            INT,
            J,
        )
        yield case(
            f"{name} a number",
            lambda x, i, p, kind=kind: (kind(x, 0.5), kind(i, 2), kind(i, 0.5), kind(p, 1), kind(i, -2)),
            X,
            INT,
            P,
        )
        yield case(f"{name} of booleans", lambda p, q, kind=kind: kind(p, q), P, Q)
    for name in ("and", "or", "xor"):
        logical, bitwise = getattr(torch, f"logical_{name}"), getattr(torch, f"bitwise_{name}")
        yield case(f"logical {name}", lambda p, q, x, i, f=logical: (f(p, q), f(x, p), f(i, q)), P, Q, SPECIAL_3, INT)
        yield case(
            f"bitwise {name}", lambda p, q, i, j, f=bitwise: (f(p, q), f(i, j), f(i, 3), f(p, True)), P, Q, INT, J
        )

    yield case(
        "clamp", lambda x: (x.clamp(-1, 1), x.clamp(min=0.5), x.clamp(max=0.5), x.clamp_min(0), x.clamp_max(0.25)), X
    )
    yield case(
        "clamp by tensors",
        lambda x, y: (x.clamp(y, y + 1), x.clamp(min=y), x.clamp(max=y), x.clamp_min(y), x.clamp_max(y)),
        X,
        Y,
    )
    yield case("clamp of integers", lambda i: (i.clamp(-1, 2), i.clamp(min=1), i.clamp_max(0), i.clamp(min=0.5)), INT)
    yield case("clamp of int32", lambda i: i.clamp(-1, 2), K)
    yield case(
        "where",
        lambda p, x, y, i: (
            torch.where(p, x, y),
            torch.where(p, x, 2.0),
            torch.where(p, 1, x),
            torch.where(p, 1, 0),
            torch.where(p, i, x),
        ),
        P,
        X,
        Y,
        INT,
    )
    yield case("where with numbers of two kinds", lambda p: torch.where(p, 1.5, 0.0), P)
    yield case(
        "masked fill",
        lambda x, p, s: (x.masked_fill(p, 7), x.masked_fill(p, float("-inf")), x.masked_fill(p, s)),
        X,
        P,
        real(),
    )
    yield case("masked fill of integers", lambda i, p: i.masked_fill(p, 7), INT, P)
    yield case(
        "lerp",
        lambda x, y, w: (torch.lerp(x, y, 0.3), torch.lerp(x, y, 0.8), torch.lerp(x, y, w)),
        X,
        Y,
        real(B, 3, low=0, high=1),
    )
    yield case(
        "lerp at its ends",
        lambda x, y, w: torch.lerp(x, y, w),
        real(B, 4),
        real(B, 4),
        values(B, 4, among=[0.0, 0.5, 1.0, 0.25]),
        tolerance=0,
    )
    yield case(
        "addcmul, addcdiv",
        lambda x, y, z: (torch.addcmul(x, y, z, value=0.5), torch.addcdiv(x, y, z, value=2)),
        X,
        Y,
        PLUS,
    )

    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    ):
        yield case(f"to {dtype}", lambda x, i, p, t=dtype: (x.abs().to(t), i.abs().to(t), p.to(t)), X, INT, P)
    yield case("copies", lambda x: (x.clone(), x.contiguous(), x.detach(), aten.alias(x), aten.lift_fresh_copy(x)), X)
    yield case("copy", lambda x, y, i: (x.clone().copy_(y), x.clone().copy_(i), x.clone().copy_(y[:, :1])), X, Y, INT)
    yield case("new tensors", lambda x: (x + torch.tensor(2.0), torch.tensor([1.0, 2.0, 3.0]) * x), X)
    yield case("type_as", lambda x, i: (i.type_as(x), x.to(i.dtype)), X, INT)

    for approximate in ("none", "tanh"):
        yield case(f"gelu {approximate}", lambda x, a=approximate: F.gelu(x, approximate=a), real(B, 3, low=-4, high=4))
    yield case("elu", lambda x: (F.elu(x), F.elu(x, 0.7), F.celu(x, 0.7), F.selu(x)), X)
    yield case("leaky relu", lambda x: (F.leaky_relu(x), F.leaky_relu(x, 0.3)), X)
    yield case("softplus", lambda x: (F.softplus(x), F.softplus(x, 2.0, 1.0), F.softplus(30 * x)), X)
    yield case(
        "hard",
        lambda x: (F.hardsigmoid(x), F.hardswish(x), F.hardtanh(x, -0.5, 0.7), F.relu6(x)),
        real(B, 3, low=-5, high=5),
    )
    yield case(
        "others",
        lambda x: (
            F.silu(x),
            F.mish(x),
            F.softsign(x),
            F.tanhshrink(x),
            F.logsigmoid(x),
            F.softshrink(x),
            F.hardshrink(x),
        ),
        X,
    )
    yield case("glu, prelu", lambda x, w: (F.glu(x, 1), F.prelu(x, w)), real(B, 4), real(4))
    yield case(
        "derivatives",
        gradients(
            lambda x: (F.gelu(x) + F.silu(x) + F.elu(x) + F.leaky_relu(x) + F.softplus(x) + F.hardswish(x)).sum()
        ),
        X,
    )


SPECIAL_3 = values(B, 3, among=[0.0, -0.0, 0.5, -0.5])


def gradients(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """A function's derivatives by all it reads that is floating."""

    def run(*given: Tensor) -> Any:
        with torch.enable_grad():
            read = [each.detach().requires_grad_(each.is_floating_point()) for each in given]
            wanted = [each for each in read if each.requires_grad]
            return torch.autograd.grad(function(*read), wanted)

    return run


def reductions() -> Iterator[Case]:
    c = real(B, 3, 4)
    for name in ("sum", "mean", "amax", "amin"):
        f = getattr(torch, name)
        yield case(
            name,
            lambda x, f=f: (
                f(x, dim=1),
                f(x, dim=-1, keepdim=True),
                f(x, dim=(0, 2)),
                f(x, dim=(-1, -2), keepdim=True),
            ),
            c,
        )
    yield case("reduce all", lambda x: (x.sum(), x.mean(), x.max(), x.min(), x.amax(), x.prod()), c, tolerance=1e-5)
    yield case("reduce all by no dims", lambda x: (x.sum([]), torch.amax(x, ()), x.sum(None)), c)
    yield case(
        "prod", lambda x, i: (x.prod(1), x.prod(-1, keepdim=True), i.prod(1), i.prod()), c, ints(B, 2, low=1, high=3)
    )
    yield case(
        "sum of integers",
        lambda i, k, p: (i.sum(1), k.sum(1), p.sum(1), p.sum(), k.sum(), i.sum(0, dtype=torch.float32)),
        INT,
        K,
        P,
    )
    yield case(
        "sum to another type",
        lambda x, p: (x.sum(1, dtype=torch.float64), p.float().mean(), x.mean(1, dtype=torch.float64)),
        X,
        P,
    )
    yield case("max of integers", lambda i: (i.max(), i.amax(1), i.min(), i.amin(-1)), INT)
    yield case("max by dim", lambda x, y: (*torch.max(x, 1), *torch.min(x, -1, keepdim=True)), distinct(B, 4), Y)
    yield case("max by dim of integers", lambda i: (*torch.max(i, 0), *torch.min(i, 1)), ints(B, 1, low=0))
    yield case(
        "argmax",
        lambda x: (x.argmax(1), x.argmin(-1, keepdim=True), x.argmax(), x.argmin(), x.argmax(0)),
        distinct(B, 4),
    )
    yield case("argmax of ties", lambda x: (x.argmax(1), x.argmin(1)), values(B, 4, among=[1.0, 2.0, 2.0, 1.0]))
    yield case(
        "any, all", lambda p: (p.any(1), p.any(), p.all(1), p.all(), p.any(-1, keepdim=True), p.all(0, keepdim=True)), P
    )
    yield case("any of numbers", lambda x, i: (x.any(1), i.any(1), x.all(1), i.all()), SPECIAL, INT)
    yield case("any by several dims", lambda p: aten.any.dims(p, [0, 2], True), bits(B, 3, 2))
    for correction in (0, 1, 2):
        yield case(
            f"var {correction}",
            lambda x, c=correction: (
                x.var((1, 2), correction=c),
                x.var(-1, correction=c, keepdim=True),
                x.std(1, correction=c),
            ),
            c,
            tolerance=1e-5,
        )
    yield case("var of all", lambda x: (x.var(), x.std()), c)
    yield case(
        "var and mean",
        lambda x: (
            *torch.var_mean(x, 1),
            *torch.var_mean(x, (0, 2), keepdim=True),
            *torch.var_mean(x, 0, correction=0),
        ),
        c,
        tolerance=1e-5,
    )
    yield case("cumsum", lambda x, i, p: (x.cumsum(1), x.cumsum(-1), x.cumsum(0), i.cumsum(1), p.cumsum(1)), c, INT, P)
    yield case("norms", lambda x: (x.norm(dim=1), x.norm(), F.normalize(x, dim=-1), x.logsumexp(1)), c)
    yield case(
        "norms of other orders",
        lambda x: tuple(
            torch.linalg.vector_norm(x, order, 1, keepdim=order == 1) for order in (1, 3, 0.5, torch.inf, -torch.inf)
        ),
        c,
        tolerance=1e-5,
    )
    yield case("softmax", lambda x: (x.softmax(1), x.softmax(-1), x.log_softmax(0), x.log_softmax(-1)), c)
    yield case("softmax double", lambda x: (x.softmax(1), x.log_softmax(-1)), D, tolerance=1e-13)
    yield case(
        "softmax to another type",
        lambda x: (F.softmax(x, 1, dtype=torch.float64), F.log_softmax(x, 1, dtype=torch.float64)),
        X,
        tolerance=1e-7,
    )
    yield case("softmax of -inf", lambda x: x.masked_fill(x > 1, -torch.inf).softmax(1), X)
    yield case(
        "cross entropy",
        lambda x, y: (
            F.cross_entropy(x, y, reduction="none"),
            F.cross_entropy(x, y),
            F.cross_entropy(x, y, label_smoothing=0.1),
        ),
        X,
        ints(B, low=0, high=3),
    )
    yield case(
        "cross entropy of sequences",
        lambda x, y: F.cross_entropy(x, y, ignore_index=1, reduction="none"),
        c,
        ints(B, 4, low=0, high=3),
    )
    yield case("cross entropy: derivative", gradients(lambda x, y: F.cross_entropy(x, y)), X, ints(B, low=0, high=3))
    yield case(
        "losses",
        lambda x, y: (
            F.mse_loss(x, y),
            F.smooth_l1_loss(x, y, reduction="none"),
            F.huber_loss(x, y),
            F.l1_loss(x, y),
            F.binary_cross_entropy_with_logits(x, y.sigmoid()),
        ),
        X,
        Y,
    )
    layer = real(B, 3, 4), real(4), real(4)
    yield case("layer norm", lambda x, w, b: F.layer_norm(x, (4,), w, b), *layer, tolerance=1e-5)
    yield case(
        "layer norm without affine", lambda x: (F.layer_norm(x, (4,)), F.layer_norm(x, (3, 4))), c, tolerance=1e-5
    )
    yield case("layer norm without bias", lambda x, w, b: F.layer_norm(x, (4,), w), *layer, tolerance=1e-5)
    yield case("layer norm double", lambda x: F.layer_norm(x, (3,)), D, tolerance=1e-9)
    yield case("layer norm by bias alone", lambda x, w, b: F.layer_norm(x, (4,), None, b), *layer, tolerance=1e-5)
    yield case(
        "layer norm: derivatives",
        gradients(lambda x, w, b: F.layer_norm(x, (4,), w, b).square().sum()),
        *layer,
        tolerance=1e-4,
    )
    group = real(B, 4, 3, 2), real(4), real(4)
    yield case("group norm", lambda x, w, b: F.group_norm(x, 2, w, b), *group, tolerance=1e-5)
    yield case(
        "group norm without affine", lambda x, w, b: (F.group_norm(x, 4), F.group_norm(x, 1)), *group, tolerance=1e-5
    )
    yield case("group norm of vectors", lambda x, w: F.group_norm(x, 2, w), real(B, 4), real(4), tolerance=1e-5)
    yield case(
        "group norm: derivatives",
        gradients(lambda x, w, b: F.group_norm(x, 2, w, b).square().sum()),
        *group,
        tolerance=1e-4,
    )
    batch = real(B, 3, 4), real(3), real(3), real(3), real(3, low=0.5)
    yield case("batch norm evaluated", lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b), *batch, tolerance=1e-5)
    yield case(
        "batch norm evaluated without affine", lambda x, w, b, m, v: F.batch_norm(x, m, v), *batch, tolerance=1e-5
    )
    yield case(
        "batch norm trained",
        lambda x, w, b, m, v: (F.batch_norm(x, None, None, w, b, True), F.batch_norm(x, None, None, training=True)),
        *batch,
        tolerance=1e-5,
    )
    yield case(
        "batch norm double",
        lambda x, m, v: aten._native_batch_norm_legit_no_training(x, None, None, m, v, 0.1, 1e-5)[0],
        D,
        real(3, dtype=torch.float64),
        real(3, low=0.5, dtype=torch.float64),
        tolerance=1e-12,
    )
    yield case(
        "batch norm: derivatives",
        gradients(
            lambda x, w, b, m, v: (
                (F.batch_norm(x, None, None, w, b, True) * torch.arange(4)).square().sum() + 0 * (m + v).sum()
            )
        ),
        *batch,
        tolerance=1e-4,
    )
    yield case("instance norm", lambda x: F.instance_norm(x), real(B, 2, 5), tolerance=1e-5)
    yield case(
        "rms norm", lambda x, w: (F.rms_norm(x, (4,), w), F.rms_norm(x, (4,))), real(B, 3, 4), real(4), tolerance=1e-5
    )
    yield case("topk", lambda x: (*x.topk(2), *x.topk(2, 1, largest=False), *x.topk(1, 0)), distinct(B, 4))
    yield case("sort", lambda x: (*x.sort(), *x.sort(1, descending=True), *x.sort(0)), distinct(B, 4))
    yield case("argsort", lambda x: (x.argsort(1), x.argsort(-1, descending=True)), distinct(B, 4))
    yield case("sort of integers", lambda i: i.sort(1)[0], INT)


def shapes() -> Iterator[Case]:
    c = real(B, 3, 4)
    yield case(
        "views", lambda x: (x.view(-1, 12), x.reshape(-1), x.flatten(1), x.view(x.shape[0], 2, 6), x.reshape(-1, 6)), c
    )
    yield case(
        "views of a multiple",
        lambda x: (x.view(x.shape[0] * 3, 4), x.view(-1, 2, 2).sum(0), x.reshape(x.shape[0], -1)),
        c,
    )
    yield case(
        "views that copy",
        lambda x: (x.transpose(0, 2).reshape(4, -1), x.permute(2, 1, 0).flatten(1), x.mT.contiguous().view(-1, 12)),
        c,
    )
    yield case("view of 0-d", lambda x: (x.sum().view(1, 1), x.sum().reshape(1)), c)
    yield case("unflatten", lambda x: x.unflatten(2, (2, 2)), c)
    yield case(
        "permutations",
        lambda x: (
            x.permute(2, 0, 1),
            x.permute(0, -1, -2),
            x.transpose(0, -1),
            x.movedim(0, 2),
            x.mT,
            x.swapaxes(1, 2),
        ),
        c,
    )
    yield case("t", lambda x, y: (x.t(), y.t(), aten.t(y)), X, real(3))
    yield case("unsqueeze", lambda x: (x[None], x.unsqueeze(-1), x[:, None], x.unsqueeze(1)), c)
    yield case(
        "squeeze",
        lambda x: (x.squeeze(1), x.squeeze((1, 3)), x.squeeze(2), x.squeeze(-1), aten.squeeze.dim(x, 1)),
        real(B, 1, 3, 1),
    )
    yield case("squeeze of all", lambda x: x.squeeze(), real(B, 1, 3, 1))
    yield case(
        "expand",
        lambda x, y: (x[:, None].expand(-1, 2, 3), y.expand(x.shape[0], 3), x.expand(x.shape), y.expand_as(x)),
        X,
        real(3),
    )
    yield case("expand the batch", lambda x: x[:1].expand(x.shape[0] * 2, -1), X)
    yield case("broadcast", lambda x, y: torch.broadcast_tensors(x, y), X, real(3))
    yield case(
        "cat",
        lambda x, y, i: (torch.cat([x, y]), torch.cat([x, y, x], -1), torch.cat([x, i], 1), torch.cat([x])),
        X,
        Y,
        INT,
    )
    yield case("cat with nothing", lambda x: torch.cat([torch.zeros(0), x]), X)
    yield case(
        "stack",
        lambda x, y, i: (torch.stack([x, y]), torch.stack([x, y], -1), torch.stack([x, i], 1), torch.stack([x], 0)),
        X,
        Y,
        INT,
    )
    yield case("slice", lambda x: (x[:, 1:], x[..., :-1], x[:, -2:], x[:, ::2], x[:, 1:3:2], x[:, :100]), c)
    yield case(
        "slice the batch",
        lambda x: (x[-1:], x[:1], torch.cat([x, x])[: x.shape[0]], torch.cat([x, x])[x.shape[0] :]),
        c,
    )
    yield case("slice of nothing", lambda x: (x[:, 2:1], x[:, 5:]), c)
    yield case("narrow", lambda x: (x.narrow(1, 1, 2), x.narrow(-1, 0, 3)), c)
    yield case("select", lambda x: (x[0], x[-1], x[:, 1], x[:, -1], x[..., -2], x.select(2, 0)), c)
    yield case("split", lambda x: (*x.split(2, 1), *x.split([1, 3], -1), *x.chunk(2, 2), *x.tensor_split(2, 1)), c)
    yield case("unbind", lambda x: (*x.unbind(1), *x.unbind(-1)), c)
    yield case(
        "repeat",
        lambda x: (x.repeat(1, 2), x.repeat(2, 1, 1), x.repeat(2, 3), x.tile(2), x[:1].repeat(x.shape[0], 1)),
        X,
    )
    yield case("repeat interleave", lambda x: x.repeat_interleave(2, 1), X)
    yield case("flip, roll", lambda x: (x.flip(1), x.flip(0, -1), x.fliplr(), x.roll(1, 1)), c)
    yield case("roll two ways", lambda x: x.roll((1, -2), (1, 2)), c)
    yield case(
        "pad",
        lambda x: (F.pad(x, (1, 2)), F.pad(x, (0, 1, 2, 0), value=3), F.pad(x, (-1, 1)), F.pad(x, (0, 0, -1, -1))),
        c,
    )
    yield case("pad of integers", lambda i, p: (F.pad(i, (1, 0), value=-1), F.pad(p, (1, 1), value=True)), INT, P)
    for mode in ("reflect", "replicate", "circular"):
        yield case(f"pad {mode}", lambda x, mode=mode: F.pad(x, (1, 2), mode=mode), c)
    yield case(
        "full",
        lambda x: (
            torch.full((2, 3), 1.5),
            torch.full((x.shape[0], 2), 7),
            torch.full_like(x, 3),
            x.new_full((2,), 4),
            torch.full((), 2.0),
        ),
        X,
    )
    yield case("full of a value", lambda x: torch.full((2,), 1.0) * x.sum(), X)
    yield case(
        "zeros",
        lambda x: (
            torch.zeros(2),
            torch.zeros(x.shape[0], 2),
            torch.zeros_like(x, dtype=torch.int64),
            x.new_zeros(3),
            torch.where(x > 100, aten.empty_like(x), 0.0),  # x is below, and what an empty tensor holds is anything
            x.new_zeros((), dtype=torch.bool),
        ),
        X,
    )
    yield case(
        "ones",
        lambda x: (torch.ones(2), torch.ones_like(x), x.new_ones(x.shape[0]), torch.ones(x.shape, dtype=torch.bool)),
        X,
    )
    yield case(
        "empty", lambda x: (torch.empty(2, 3).fill_(3), x.new_empty(2).fill_(1), torch.empty(x.shape[0]).zero_()), X
    )
    yield case("scalars", lambda x: x + torch.scalar_tensor(2.0), X)
    yield case(
        "arange",
        lambda x: (
            torch.arange(4),
            torch.arange(1, 4),
            torch.arange(0, 5, 2),
            torch.arange(x.shape[0]),
            torch.arange(0.0, 1.0, 0.25),
            torch.arange(3, dtype=torch.int32),
            torch.arange(5, 0, -2),
        ),
        X,
    )
    yield case(
        "arange of floats",
        lambda x: (torch.arange(x.shape[0], dtype=torch.float32) / 2, torch.arange(x.shape[0] * 2).float()),
        X,
    )
    yield case("linspace", lambda x: torch.linspace(-1, 1, 5), X)
    yield case(
        "triangles",
        lambda x, i, p: (x.tril(), x.triu(1), x.tril(-1), i.triu(), p.tril()),
        c,
        ints(B, 3, 3),
        bits(B, 3, 3),
    )
    yield case(
        "slice scatter",
        lambda x, y: (
            x.slice_scatter(y, 1, 0, 1),
            x.slice_scatter(y, 1, 2),
            x.slice_scatter(y, -2, -1),
            x.slice_scatter(x, 0),
        ),
        real(B, 3, 4),
        real(B, 1, 4),
    )
    yield case("slice scatter by steps", lambda x, y: x.slice_scatter(y, 1, 0, None, 2), real(B, 3, 4), real(B, 2, 4))
    yield case(
        "slice scatter of nothing", lambda x, y: x.slice_scatter(y[:, :0], 1, 1, 1), real(B, 3, 4), real(B, 2, 4)
    )
    yield case(
        "select scatter",
        lambda x, y: (x.select_scatter(y, 1, 0), x.select_scatter(y, 1, -1), x.select_scatter(y, 1, 1)),
        real(B, 3, 4),
        real(B, 4),
    )
    yield case("assignments", _assigned, real(B, 3, 4), real(B, 4))
    yield case(
        "sizes",
        lambda x: (
            x * x.shape[0],
            x + x.numel(),
            x / x.shape[0],
            x * (1.0 / x.shape[0]),
            x + (2 * x.shape[0] - 1),
            x * (x.shape[0] + 1),
        ),
        X,
    )
    yield case("sizes as floats", lambda x: (x / (x.shape[0] * 3), x * (x.shape[0] / 7)), X)
    yield case("halves of sizes", lambda x: x * (x.shape[0] // 2), X)
    yield case("meshgrid", lambda x, y: torch.meshgrid(x[0], y, indexing="ij"), X, real(2))


def _assigned(x: Tensor, y: Tensor) -> Any:
    a, b, c = x.clone(), x.clone(), x.clone()
    a[:, 1] = y
    b[:, :, 1:3] = 0
    c[:, ::2, -1] += 1
    return a, b, c


def products() -> Iterator[Case]:
    yield case("mm", lambda x, w: (x @ w, w.t() @ x.t(), torch.mm(x, w)), X, real(3, 4))
    yield case(
        "bmm", lambda x, y: (torch.bmm(x, y), x @ y, torch.einsum("bij,bjk->bik", x, y)), real(B, 2, 3), real(B, 3, 4)
    )
    yield case("matmul broadcasts", lambda x, w: (x @ w, torch.tensordot(x, w, 1)), real(B, 2, 3), real(3, 4))
    yield case("vectors", lambda x, v: (x @ v, torch.mv(x, v), torch.dot(v, v), v @ v, torch.outer(v, v)), X, real(3))
    yield case("linear", lambda x, w, b: (F.linear(x, w, b), F.linear(x, w)), X, real(4, 3), real(4))
    yield case("linear of sequences", lambda x, w, b: F.linear(x, w, b), real(B, 2, 3), real(4, 3), real(4))
    yield case(
        "addmm", lambda b, x, w: (torch.addmm(b, x, w), torch.addmm(b, x, w, beta=0.5, alpha=2)), real(4), X, real(3, 4)
    )
    yield case(
        "addmm double",
        lambda b, x, w: torch.addmm(b, x, w),
        real(2, dtype=torch.float64),
        D,
        real(3, 2, dtype=torch.float64),
        tolerance=1e-13,
    )
    yield case("addmm of whole matrices", lambda x, y, w: torch.addmm(x, y, w, alpha=0.5), X, Y, real(3, 3))
    yield case("mm of integers", lambda i, w: i @ w, INT, ints(3, 2))
    yield case("addmm of integers", lambda b, i, w: torch.addmm(b, i, w, alpha=2), ints(2), INT, ints(3, 2))
    yield case(
        "baddbmm",
        lambda b, x, y: (torch.baddbmm(b, x, y), torch.baddbmm(b, x, y, beta=2, alpha=0.5)),
        real(B, 2, 4),
        real(B, 2, 3),
        real(B, 3, 4),
    )
    attention = real(B, 2, 3, 4), real(B, 2, 3, 4), real(B, 2, 3, 4)
    yield case("attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *attention, tolerance=1e-5)
    yield case(
        "causal attention",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        *attention,
        tolerance=1e-5,
    )
    yield case(
        "masked attention",
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, scale=0.7),
        *attention,
        values(3, 3, among=[1, 0, 1], dtype=torch.bool),
        tolerance=1e-5,
    )
    yield case(
        "linear: derivatives",
        gradients(lambda x, w, b: F.linear(x, w, b).square().sum()),
        X,
        real(4, 3),
        real(4),
        tolerance=1e-5,
    )


def convolutions() -> Iterator[Case]:
    forms: list[tuple[str, Callable[..., Any], tuple[Sample, ...], dict[str, Any]]] = [
        ("conv1d", F.conv1d, (real(B, 4, 7), real(6, 4, 3), real(6)), {}),
        ("conv1d strided", F.conv1d, (real(B, 4, 7), real(6, 2, 3), real(6)), {"stride": 2, "padding": 1, "groups": 2}),
        ("conv2d", F.conv2d, (IMAGE, real(3, 2, 3, 2), real(3)), {}),
        ("conv2d strided", F.conv2d, (IMAGE, real(3, 2, 3, 2), real(3)), {"stride": (2, 3), "padding": (1, 2)}),
        ("conv2d strided past the end", F.conv2d, (IMAGE, real(3, 2, 2, 2), real(3)), {"stride": (4, 3)}),
        ("conv2d dilated", F.conv2d, (IMAGE, real(3, 2, 3, 2), real(3)), {"dilation": (2, 1), "padding": 1}),
        ("conv2d by channel", F.conv2d, (IMAGE, real(4, 1, 3, 3), real(4)), {"groups": 2, "padding": 1}),
        ("conv2d 1x1", F.conv2d, (IMAGE, real(3, 2, 1, 1), real(3)), {"stride": 2}),
        ("conv3d", F.conv3d, (real(B, 2, 4, 4, 3), real(3, 2, 2, 3, 2), real(3)), {"padding": 1, "stride": 2}),
    ]  # fmt: skip
    for name, function, given, options in forms:

        def run(x: Tensor, w: Tensor, b: Tensor, f: Any = function, o: Any = options) -> Any:
            return f(x, w, b, **o), f(x, w, **o)

        def total(x: Tensor, w: Tensor, b: Tensor, f: Any = function, o: Any = options) -> Any:
            return f(x, w, b, **o).square().sum()

        yield case(name, run, *given, tolerance=1e-5)
        yield case(f"{name}: derivatives", gradients(total), *given, tolerance=1e-5)
    yield case("conv2d same", lambda x, w: F.conv2d(x, w, padding="same"), IMAGE, real(3, 2, 3, 3), tolerance=1e-5)
    yield case(
        "conv2d same, even kernel", lambda x, w: F.conv2d(x, w, padding="same"), IMAGE, real(3, 2, 2, 4), tolerance=1e-5
    )
    yield case(
        "transposed",
        lambda x, w, b: (F.conv_transpose2d(x, w, b), F.conv_transpose2d(x, w, None, 2, 1, 1)),
        IMAGE,
        real(2, 3, 3, 3),
        real(3),
        tolerance=1e-5,
    )
    yield case(
        "transposed by groups",
        lambda x, w: F.conv_transpose2d(x, w, groups=2, dilation=2),
        IMAGE,
        real(2, 3, 3, 2),
        tolerance=1e-5,
    )
    yield case(
        "transposed 1d",
        lambda x, w: F.conv_transpose1d(x, w, stride=3, output_padding=2),
        real(B, 2, 4),
        real(2, 3, 2),
        tolerance=1e-5,
    )
    pools: list[tuple[str, dict[str, Any]]] = [
        ("plain", {"kernel_size": 2}),
        ("overlapping", {"kernel_size": 3, "stride": 1}),
        ("padded", {"kernel_size": 3, "stride": 2, "padding": 1}),
        ("of sides", {"kernel_size": (2, 1), "stride": (1, 2)}),
    ]
    maps = distinct(B, 2, 6, 5)
    for name, options in pools:
        yield case(f"max pool {name}", lambda x, o=options: F.max_pool2d(x, **o, return_indices=True), maps)
        yield case(
            f"max pool {name}: derivative", gradients(lambda x, o=options: F.max_pool2d(x, **o).square().sum()), maps
        )
        yield case(f"average pool {name}", lambda x, o=options: F.avg_pool2d(x, **o), IMAGE)
        yield case(
            f"average pool {name}: derivative",
            gradients(lambda x, o=options: F.avg_pool2d(x, **o).square().sum()),
            IMAGE,
        )
    yield case(
        "max pool of ties", lambda x: F.max_pool2d(x, 2, return_indices=True), values(B, 1, 4, 4, among=[0.0, 1.0, 1.0])
    )
    yield case(
        "max pool of ties: derivative",
        gradients(lambda x: (F.max_pool2d(x, 3, 1) * torch.arange(4.0).view(2, 2)).sum()),
        values(B, 1, 4, 4, among=[0.0, 1.0, 1.0]),
    )
    yield case("max pool dilated", lambda x: F.max_pool2d(x, 2, 1, 0, 2, return_indices=True), maps)
    yield case("max pool, ceiling", lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True), maps)
    yield case("max pool, ceiling and padding", lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), maps)
    yield case("max pool double", gradients(lambda x: F.max_pool2d(x, 2).sum()), real(B, 1, 4, 4, dtype=torch.float64))
    yield case("max pool 1d", lambda x: F.max_pool1d(x, 2), distinct(B, 2, 6))
    yield case("average pool 1d", lambda x: F.avg_pool1d(x, 2), real(B, 2, 6))
    yield case(
        "average pool without padding's zeros", lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), IMAGE
    )
    yield case(
        "average pool, ceiling",
        lambda x: (F.avg_pool2d(x, 2, 2, ceil_mode=True), F.avg_pool2d(x, 3, 2, 1, True, False)),
        IMAGE,
    )
    yield case("average pool, ceiling counts", lambda x: F.avg_pool2d(x, 3, 2, 1, True), IMAGE)
    yield case(
        "adaptive pool",
        lambda x: (F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, (2, 3)), F.adaptive_avg_pool2d(x, (None, 1))),
        real(B, 2, 4, 6),
    )
    yield case(
        "adaptive pool: derivative",
        gradients(
            lambda x: F.adaptive_avg_pool2d(x, (2, 3)).square().sum() + F.adaptive_avg_pool2d(x, 1).square().sum()
        ),
        real(B, 2, 4, 6),
    )
    yield case("adaptive pool of channels last", _pooled, real(B, 4, 4, 3))
    yield case(
        "adaptive pool of channels last: derivative", gradients(lambda x: _pooled(x).square().sum()), real(B, 4, 4, 3)
    )
    yield case("a size by another name", lambda x: x + torch.sym_max(x.shape[0], 1), X)
    yield case("adaptive pool 1d", lambda x: F.adaptive_avg_pool1d(x, 3), real(B, 2, 6))
    yield case(
        "unpool", lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), [2, 2]), distinct(B, 2, 4, 6)
    )
    yield case(
        "upsample nearest",
        lambda x: (F.interpolate(x, scale_factor=2), F.interpolate(x, size=(9, 7)), F.interpolate(x, size=(3, 3))),
        IMAGE,
    )
    yield case(
        "upsample bilinear",
        lambda x: (F.interpolate(x, scale_factor=2, mode="bilinear"), F.interpolate(x, size=(9, 7), mode="bilinear")),
        IMAGE,
        tolerance=1e-5,
    )
    yield case(
        "upsample bilinear aligned",
        lambda x: F.interpolate(x, size=(9, 7), mode="bilinear", align_corners=True),
        IMAGE,
        tolerance=1e-5,
    )
    yield case("pixel shuffle", lambda x: (F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 2)), real(B, 4, 4, 4))
    yield case("unfold", lambda x: F.unfold(x, 2), real(B, 2, 4, 4))
    whole = real(B, 3, low=-99, high=99), ints(4, 3, low=-9, high=9, dtype=torch.float32)
    yield case(
        "integer linear",
        lambda x, w, b, s: integer.integer_linear(x.round(), w, b, s),
        *whole,
        ints(4, dtype=torch.float32),
        real(low=0.01, high=0.02),
    )
    for stride, padding in ((1, 1), (2, 0), (2, 1)):
        yield case(
            f"integer convolution {stride} {padding}",
            lambda x, w, b, s, stride=stride, padding=padding: integer.integer_convolution(
                x.round(), w, b, s, stride, padding
            ),
            real(B, 2, 5, 4, low=-99, high=99),
            ints(3, 2, 3, 3, low=-9, high=9, dtype=torch.float32),
            ints(3, dtype=torch.float32),
            real(low=0.01, high=0.02),
        )


def _pooled(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 1)


def indexing() -> Iterator[Case]:
    table, ids = real(7, 4), ints(B, 3, low=0, high=7)
    yield case("embedding", lambda w, i: (F.embedding(i, w), w[i]), table, ids)
    yield case(
        "embedding: derivative", gradients(lambda w, i: F.embedding(i, w).square().sum()), table, ids, tolerance=1e-5
    )
    yield case(
        "embedding with padding: derivative",
        gradients(lambda w, i: F.embedding(i, w, 2).square().sum()),
        table,
        ids,
        tolerance=1e-5,
    )
    yield case("one hot", lambda i: F.one_hot(i, 7), ids)
    c, two = real(B, 3, 4), ints(2, low=-3, high=3)
    yield case("index select", lambda x, i: (x.index_select(1, i), x.index_select(-1, i)), c, ints(2, low=0, high=3))
    yield case("index", lambda x, i: (x[:, i], x[:, :, i], x[..., i]), c, two)
    yield case("index by matrices", lambda x, i: (x[:, i], x[i % 2]), c, ints(2, 2, low=0, high=3))
    yield case(
        "index by the batch",
        lambda x, i: (x[torch.arange(x.shape[0]), i], x[torch.arange(x.shape[0]), i, i]),
        c,
        ints(B, low=-3, high=3),
    )
    yield case("index by several", lambda x, i, j: (x[:, i, j], x[i % 2, j], x[0, i]), c, two, ints(2, low=0, high=3))
    yield case(
        "index by several that broadcast",
        lambda x, i, j: (x[:, i[:, None], j[None]], x[:, i[:, None], 1]),
        c,
        two,
        ints(3, low=0, high=3),
    )
    yield case("index behind whole axes", lambda x, i, j: x[:, :, i, j], real(B, 2, 3, 4), two, ints(2, low=0, high=3))
    yield case("index by int32", lambda x, i: x[:, i], c, ints(2, low=0, high=3, dtype=torch.int32))
    yield case("gather", lambda x, i: (x.gather(1, i), x.gather(-1, i)), X, ints(B, 2, low=0, high=3))
    yield case(
        "scatter",
        lambda x, i, y: (x.scatter(1, i, y), x.scatter(-1, i, 2.0)),
        X,
        values(B, 2, among=[0, 2, 1, 0], dtype=torch.int64),
        real(B, 2),
    )
    yield case("scatter add", lambda x, i, y: x.scatter_add(1, i, y), X, ints(B, 4, low=0, high=3), real(B, 4))
    for how in ("sum", "prod", "amax", "amin"):
        yield case(
            f"scatter {how}",
            lambda x, i, y, how=how: (
                x.scatter_reduce(1, i, y, how),
                x.scatter_reduce(-1, i, y, how, include_self=False),
            ),
            X,
            ints(B, 4, low=0, high=2),
            real(B, 4),
        )
    yield case(
        "scatter amax of integers",
        lambda x, i, y: x.scatter_reduce(1, i, y, "amax", include_self=False),
        INT,
        ints(B, 4, low=0, high=2),
        ints(B, 4),
    )
    for accumulate in (False, True):
        index = ints(4, low=0, high=3) if accumulate else values(2, among=[2, 0], dtype=torch.int64)
        count = 4 if accumulate else 2
        yield case(
            f"index put {accumulate}",
            lambda x, i, y, a=accumulate: x.index_put((i,), y, a),
            real(3, 4),
            index,
            real(count, 4),
        )
        yield case(
            f"index put {accumulate} behind the batch",
            lambda x, i, y, a=accumulate: torch.ops.aten.index_put(x, [None, i], y, a),
            c,
            index,
            real(B, count, 4),
        )
        yield case(
            f"index put {accumulate} by two",
            lambda x, i, y, a=accumulate: (
                torch.ops.aten.index_put(x, [None, i, i], y, a),
                torch.ops.aten.index_put(x, [None, i, i], y[:, :1], a),
            ),
            c,
            index,
            real(B, count),
        )
        yield case(
            f"index put {accumulate} that broadcasts",
            lambda x, i, y, a=accumulate: torch.ops.aten.index_put(x, [None, i], y, a),
            c,
            index,
            real(4),
        )
    yield case(
        "index put of a number",
        lambda x, i: torch.ops.aten.index_put(x, [None, i], x.sum() * 0 + 1),
        c,
        values(2, among=[2, 0], dtype=torch.int64),
    )
    yield case("index add", lambda x, i, y: x.index_add(1, i, y), c, ints(2, low=0, high=3), real(B, 2, 4))
    yield case(
        "index: derivative", gradients(lambda x, i: x[:, i].square().sum()), c, ints(4, low=0, high=3), tolerance=1e-5
    )
    yield case(
        "gather: derivative", gradients(lambda x, i: x.gather(1, i).square().sum()), X, ints(B, 4, low=0, high=3)
    )


CASES = [*pointwise(), *reductions(), *shapes(), *products(), *convolutions(), *indexing()]
