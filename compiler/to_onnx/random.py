"""Onward's counter-based random numbers in ONNX's integer and floating-point operators.

The definition is `onward.runtime.noise` (Philox4x32-10: Salmon et al., SC 2011; its distributions). Here the same words
come from ``Mul``, ``BitShift``, ``BitwiseAnd`` and ``BitwiseXor`` of uint64, and the same numbers from operations that
IEEE 754 rounds in one way, so that signs are equal to the last bit and normal numbers too, wherever a runtime rounds
each operation as the standard says.

Words of one step are made once and for all sites of a run together; one-bit noise is kept as its bytes, a bit an
element. That is where a graph differs from the other executors, which make noise again wherever they read it: a
hundred small integer nodes cost more than the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from .builder import Builder

NUM_ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF

NOISE, CAPTURE, MODEL = 0, 1, 2
"""What words are for (`runtime.noise.philox.Purpose`)."""

SQRT_HALF = float(np.array(0x3F3504F3, np.uint32).view(np.float32))

_SINE = (1.0, -0.16666658222675323, 0.008333049714565277, -0.0001980901724891737, 2.6051077384181553e-06)
_COSINE = (1.0, -0.5, 0.04166663438081741, -0.0013888360699638724, 2.4760109226917848e-05, -2.6050656742881984e-07)
_LOGARITHM = (2.0, 0.666668176651001, 0.3997483551502228, 0.2992483377456665)


@dataclass(frozen=True)
class Stream:
    """Random numbers of one site: how many a draw, and what they are for."""

    site: int
    elements: str
    """Numbers of one draw, an int64 scalar."""
    one_bit: bool
    purpose: int = NOISE

    @property
    def word(self) -> int:
        """The counter's third word."""
        return self.site | self.purpose << 24

    @property
    def per_block(self) -> int:
        """Numbers that one block of four words gives."""
        return 128 if self.one_bit else 4


def words(b: Builder, key: str, draws: Sequence[int], streams: Sequence[Stream]) -> list[str]:
    """The words of every stream, for each the `draws`, from one run of Philox.

    Args:
        key: int64 (2,): seed and step.
        draws: numbers of the draws, D of them.
        streams: what to make.

    Returns:
        For each stream uint8 ``(D, bytes)``, the bits of one-bit numbers, or uint32 ``(D, blocks, 4)``.
    """
    blocks = [_blocks(b, stream) for stream in streams]
    counters = [b.op("Range", b.constant(0, np.int64), count, b.constant(1, np.int64)) for count in blocks]
    thirds = [
        b.op("Expand", b.constant([stream.word], np.uint64), b.op("Unsqueeze", count, b.ints([0])))
        for stream, count in zip(streams, blocks, strict=True)
    ]
    together = len(streams) > 1
    first = b.op("Concat", *counters, axis=0) if together else counters[0]
    third = b.op("Concat", *thirds, axis=0) if together else b.constant([streams[0].word], np.uint64)
    made = _philox(b, key, b.op("Cast", first, to=onnx.TensorProto.UINT64), draws, third)
    if not together:
        return [_finished(b, made, streams[0])]
    ends = b.op(
        "CumSum", b.op("Concat", *(b.op("Unsqueeze", n, b.ints([0])) for n in blocks), axis=0), b.constant(0, np.int64)
    )
    found = []
    for place, (stream, count) in enumerate(zip(streams, blocks, strict=True)):
        end = b.op("Slice", ends, b.ints([place]), b.ints([place + 1]), b.ints([0]))
        start = b.op("Sub", end, count)
        found.append(_finished(b, b.op("Slice", made, start, end, b.ints([1])), stream))
    return found


def _blocks(b: Builder, stream: Stream) -> str:
    more = b.op("Add", stream.elements, b.constant(stream.per_block - 1, np.int64))
    return b.op("Div", more, b.constant(stream.per_block, np.int64))


def _philox(b: Builder, key: str, first: str, draws: Sequence[int], third: str) -> str:
    """uint32 ``(D, blocks, 4)``: the four words of each counter ``(first, draw, third, step)``."""
    mask, half = b.constant(MASK, np.uint64), b.constant(32, np.uint64)
    seed, step = b.ops("Split", [b.op("Cast", key, to=onnx.TensorProto.UINT64), b.ints([1, 1])], 2, axis=0)
    halves = b.op("BitwiseAnd", seed, mask), b.op("BitShift", seed, half, direction="RIGHT")
    keys = []
    for part, weyl in zip(halves, WEYL, strict=True):
        steps = b.constant([(weyl * r) & MASK for r in range(NUM_ROUNDS)], np.uint64)
        every = b.op("BitwiseAnd", b.op("Add", part, steps), mask)
        keys.append(b.ops("Split", [every, b.ints([1] * NUM_ROUNDS)], NUM_ROUNDS, axis=0))
    c0, c2 = first, third
    c1 = b.constant([[draw & MASK] for draw in draws], np.uint64)
    c3 = b.op("BitwiseAnd", step, mask)
    by0, by1 = (b.constant(multiplier, np.uint64) for multiplier in MULTIPLIERS)
    for number in range(NUM_ROUNDS):
        product0, product1 = b.op("Mul", c0, by0), b.op("Mul", c2, by1)
        high0, high1 = (b.op("BitShift", each, half, direction="RIGHT") for each in (product0, product1))
        c0, c1 = b.op("BitwiseXor", b.op("BitwiseXor", high1, c1), keys[0][number]), b.op("BitwiseAnd", product1, mask)
        c2, c3 = b.op("BitwiseXor", b.op("BitwiseXor", high0, c3), keys[1][number]), b.op("BitwiseAnd", product0, mask)
    opened = [b.op("Unsqueeze", b.op("Cast", c, to=onnx.TensorProto.UINT32), b.ints([2])) for c in (c0, c1, c2, c3)]
    return b.op("Concat", *opened, axis=2)


def _finished(b: Builder, made: str, stream: Stream) -> str:
    """Words as they are kept: of one-bit numbers as bytes, lowest first, no more than there are elements for."""
    if not stream.one_bit:
        return made
    shifts = b.constant([0, 8, 16, 24], np.uint32)
    shifted = b.op("BitShift", b.op("Unsqueeze", made, b.ints([3])), shifts, direction="RIGHT")
    octets = b.op("Cast", b.op("BitwiseAnd", shifted, b.constant(255, np.uint32)), to=onnx.TensorProto.UINT8)
    flat = b.op("Reshape", octets, b.constant([0, -1], np.int64))
    count = b.op("Div", b.op("Add", stream.elements, b.constant(7, np.int64)), b.constant(8, np.int64))
    return b.op("Slice", flat, b.ints([0]), b.op("Unsqueeze", count, b.ints([0])), b.ints([1]))


_SIGNS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") == 1, 1, -1)


def signs(b: Builder, octets: str, scale: str, elements: str, whole: bool) -> str:
    """One-bit numbers ``(D, elements)``, each ± the 0-d float32 or float64 `scale`, from bytes; `whole` says that the
    elements are a multiple of eight."""
    table = b.op("Mul", b.op("CastLike", b.constant(_SIGNS, np.int8), scale), scale)
    made = b.op("Gather", table, b.op("Cast", octets, to=onnx.TensorProto.INT32), axis=0)
    flat = b.op("Reshape", made, b.constant([0, -1], np.int64))
    return flat if whole else b.op("Slice", flat, b.ints([0]), b.op("Unsqueeze", elements, b.ints([0])), b.ints([1]))


def numbers(b: Builder, made: str, distribution: str, elements: str) -> str:
    """float32 numbers ``(D, elements)`` of a distribution from words ``(D, blocks, 4)``."""
    values = _DISTRIBUTIONS[distribution](b, made)
    flat = b.op("Reshape", values, b.constant([0, -1], np.int64))
    return b.op("Slice", flat, b.ints([0]), b.op("Unsqueeze", elements, b.ints([0])), b.ints([1]))


def score(b: Builder, distribution: str, name: str, values: str) -> str:
    """The score of noise (method.md 1, 2), from the noise."""
    constant = {("gaussian", "sign"): math.sqrt(math.pi / 2)}.get((distribution, name))
    if distribution == "laplace":
        constant = math.sqrt(2.0)
    if constant is None:
        return values
    return b.op("Mul", b.op("Sign", values), b.op("CastLike", b.constant(constant, np.float64), values))


def _f32(b: Builder, value: float) -> str:
    return b.constant(value, np.float32)


def _float(b: Builder, value: str) -> str:
    return b.op("Cast", value, to=onnx.TensorProto.FLOAT)


def _shifted(b: Builder, value: str, bits: int) -> str:
    return b.op("BitShift", value, b.constant(bits, np.uint32), direction="RIGHT")


def _uniform(b: Builder, made: str) -> str:
    return b.op("Mul", _float(b, _shifted(b, made, 8)), _f32(b, 2.0**-24))


def _polynomial(b: Builder, square: str, coefficients: tuple[float, ...]) -> str:
    value = b.op("Mul", square, _f32(b, coefficients[-1]))
    for coefficient in coefficients[-2:0:-1]:
        value = b.op("Mul", b.op("Add", value, _f32(b, coefficient)), square)
    return b.op("Add", value, _f32(b, coefficients[0]))


def _minus_log(b: Builder, lane: str) -> str:
    """``-log u``, u uniform on ``{1, …, 2^24} / 2^24``. The exponent that the definition reads from the bits is found
    by a logarithm and put right where that rounded to a neighbour; a power of two multiplies exactly."""
    raised = b.op("BitwiseXor", _shifted(b, lane, 8), b.constant(0x800000, np.uint32))
    number = b.op("Mul", _float(b, b.op("Add", raised, b.constant(1, np.uint32))), _f32(b, 2.0**-24))
    guess = b.op("Floor", b.op("Add", b.op("Mul", b.op("Log", number), _f32(b, 1 / math.log(2))), _f32(b, 0.5)))
    place = b.op("Cast", b.op("Neg", guess), to=onnx.TensorProto.INT32)
    powers = b.constant([2.0**n for n in range(26)], np.float32)
    mantissa = b.op("Mul", number, b.op("Gather", powers, b.op("Max", place, b.constant(0, np.int32)), axis=0))
    mantissa = b.op("Where", b.op("Less", place, b.constant(0, np.int32)), b.op("Mul", number, _f32(b, 0.5)), mantissa)
    low = b.op("Less", mantissa, _f32(b, SQRT_HALF))
    high = b.op("GreaterOrEqual", mantissa, _f32(b, 2 * SQRT_HALF))
    off = b.op("Sub", _float(b, high), _float(b, low))
    exponent = b.op("Add", guess, off)
    one, two, half = _f32(b, 1), _f32(b, 2), _f32(b, 0.5)
    mantissa = b.op("Mul", mantissa, b.op("Where", low, two, b.op("Where", high, half, one)))
    quotient = b.op("Div", b.op("Sub", mantissa, one), b.op("Add", mantissa, one))
    value = b.op("Mul", _polynomial(b, b.op("Mul", quotient, quotient), _LOGARITHM), quotient)
    value = b.op("Add", value, b.op("Mul", exponent, _f32(b, math.log(2))))
    return b.op("Mul", value, _f32(b, -1.0))


def _with_sign(b: Builder, magnitude: str, bit: str) -> str:
    """Negative where the uint32 `bit` is 1."""
    negative = b.op("Cast", bit, to=onnx.TensorProto.BOOL)
    return b.op("Where", negative, b.op("Neg", magnitude), magnitude)


def _gaussian(b: Builder, made: str) -> str:
    """Box and Muller: the first and third word give radii, the second and fourth angles."""
    pairs = b.op("Reshape", made, b.constant([0, 0, 2, 2], np.int64))
    radius_word, angle_word = b.ops("Split", [pairs, b.ints([1, 1])], 2, axis=3)
    doubled = b.op("Mul", _minus_log(b, radius_word), _f32(b, 2.0))
    root = b.op("Sqrt", b.op("Cast", doubled, to=onnx.TensorProto.DOUBLE))  # rounded once, unlike some float32 roots
    radius = _with_sign(b, _float(b, root), _shifted(b, angle_word, 31))
    turned = b.op(
        "BitwiseXor", b.op("BitwiseAnd", angle_word, b.constant(0x7FFFFFFF, np.uint32)), b.constant(1 << 30, np.uint32)
    )
    signed = b.op("Sub", b.op("Cast", turned, to=onnx.TensorProto.INT64), b.constant(1 << 30, np.int64))
    angle = b.op("Mul", _float(b, signed), _f32(b, math.pi * 2.0**-31))
    square = b.op("Mul", angle, angle)
    cosine = b.op("Mul", _polynomial(b, square, _COSINE), radius)
    sine = b.op("Mul", b.op("Mul", _polynomial(b, square, _SINE), angle), radius)
    return b.op("Concat", cosine, sine, axis=3)


def _laplace(b: Builder, made: str) -> str:
    magnitude = b.op("Mul", _minus_log(b, made), _f32(b, math.sqrt(0.5)))
    return _with_sign(b, magnitude, b.op("BitwiseAnd", made, b.constant(1, np.uint32)))


_DISTRIBUTIONS = {"uniform": _uniform, "normal": _gaussian, "gaussian": _gaussian, "laplace": _laplace}
