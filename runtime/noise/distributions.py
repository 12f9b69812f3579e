"""From random words to numbers: the distributions of Onward's noise, with their scores.

Every noise has unit variance. Its score is minus the derivative of its log density (method.md, equation 1; arXiv
2305.08960), or a one-bit stand-in scaled so that, still, ``E[score · noise] = 1`` (equation 2; arXiv 2403.12320).

The formulas use only additions, multiplications, divisions, square roots and integer operations, one array operation
each, which IEEE 754 rounds in one way: NumPy and torch, CPU and CUDA, give identical bits, and how an array is cut into
blocks does not matter. (Library logarithms and sines differ between devices and, in vectorised loops, between the body
and the tail of an array.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...passes.errors import unknown_name
from .philox import Lanes

Array = Any
"""A NumPy array or a tensor: the formulas below are written in what both understand."""

_SIGN_BIT = -(1 << 31)
_SQRT_HALF_BITS = 0x3F3504F3  # float32 sqrt(1/2)

# Chebyshev interpolations, lowest power first. sin(t)/t and cos(t) in t² for |t| <= pi/2: errors below 5e-9 and 3e-10.
_SINE = (1.0, -0.16666658222675323, 0.008333049714565277, -0.0001980901724891737, 2.6051077384181553e-06)
_COSINE = (1.0, -0.5, 0.04166663438081741, -0.0013888360699638724, 2.4760109226917848e-05, -2.6050656742881984e-07)
# log((1 + s)/(1 - s))/s in s² for |s| <= 0.1716: error below 2e-9.
_LOGARITHM = (2.0, 0.666668176651001, 0.3997483551502228, 0.2992483377456665)


@dataclass(frozen=True)
class Distribution:
    """How random bits become numbers; a noise has zero mean and unit variance.

    `bits` is the number of random bits an element takes: 1 (numbers are ±1) or 32 (one lane). `sample` turns the four
    lanes of blocks, int32 arrays (D, B), into float32 (D, 4 B), element ``4 b + lane``; it is None for one-bit numbers.
    `scores` maps the name of a score to the function of the noise, which may work in place; None is the noise itself.
    """

    name: str
    bits: int
    sample: Callable[[Lanes], Array] | None
    scores: dict[str, Callable[[Array], Array] | None]

    @property
    def elements_per_block(self) -> int:
        """Numbers that one 128-bit block gives."""
        return 128 // self.bits

    def score(self, name: str) -> Callable[[Array], Array] | None:
        """The score called `name`; UnknownNameError otherwise."""
        if name not in self.scores:
            raise unknown_name("score", name, self.scores)
        return self.scores[name]


def _as_float(integers: Array) -> Array:
    return integers.astype(np.float32) if isinstance(integers, np.ndarray) else integers.to(torch.float32)


def _float_bits(numbers: Array) -> Array:
    return numbers.view(np.int32 if isinstance(numbers, np.ndarray) else torch.int32)


def _float_from_bits(integers: Array) -> Array:
    return integers.view(np.float32 if isinstance(integers, np.ndarray) else torch.float32)


def _square_root(numbers: Array) -> Array:
    """The correctly rounded root of float32 numbers. torch's own is not on a CPU; of float64's, rounded, it is."""
    return np.sqrt(numbers) if isinstance(numbers, np.ndarray) else numbers.double().sqrt().float()


def _interleaved(columns: list[Array]) -> Array:
    """Arrays (D, B) as one (D, len(columns) * B), element ``len(columns) * b + column``."""
    first = columns[0]
    stack = np.stack if isinstance(first, np.ndarray) else torch.stack
    return stack(columns, -1).reshape(first.shape[0], -1)


def _upper_24(lane: Array) -> Array:
    return (lane >> 8) & 0xFFFFFF


def _polynomial(square: Array, coefficients: tuple[float, ...]) -> Array:
    value = square * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        value += coefficient
        value *= square
    value += coefficients[0]
    return value


def _minus_log(lane: Array) -> Array:
    """``-log u`` for u uniform on ``{1, …, 2^24} / 2^24`` from a lane's upper 24 bits (as a signed number): finite, and
    never negative."""
    number = _as_float((lane >> 8) + 0x800001)
    number *= 2.0**-24
    bits = _float_bits(number)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    bits -= exponent << 23  # `number` is now in [sqrt(1/2), sqrt(2))
    quotient = number - 1.0
    number += 1.0
    quotient /= number
    value = _polynomial(quotient * quotient, _LOGARITHM)
    value *= quotient
    power = _as_float(exponent)
    power *= math.log(2)
    value += power
    value *= -1.0
    return value


def _with_sign_of(magnitude: Array, word: Array) -> Array:
    """`magnitude` (changed in place), its sign flipped where the top bit of the int32 `word` is set."""
    bits = _float_bits(magnitude)
    bits ^= word & _SIGN_BIT
    return magnitude


def _box_muller(lane_a: Array, lane_b: Array) -> list[Array]:
    """Two independent normal numbers: radius from one lane, angle from the other (half a turn and a sign)."""
    radius = _minus_log(lane_a)
    radius *= 2.0
    radius = _with_sign_of(_square_root(radius), lane_b)
    angle = _as_float((lane_b << 1) >> 1)
    angle *= math.pi * 2.0**-31
    square = angle * angle
    cosine = _polynomial(square, _COSINE)
    cosine *= radius
    sine = _polynomial(square, _SINE)
    sine *= angle
    sine *= radius
    return [cosine, sine]


def _gaussian(lanes: Lanes) -> Array:
    return _interleaved(_box_muller(lanes[0], lanes[1]) + _box_muller(lanes[2], lanes[3]))


def _laplace(lanes: Lanes) -> Array:
    def one(lane: Array) -> Array:
        magnitude = _minus_log(lane)
        magnitude *= math.sqrt(0.5)
        return _with_sign_of(magnitude, lane << 31)  # the lowest bit; the magnitude has the upper 24

    return _interleaved([one(lane) for lane in lanes])


def _uniform(lanes: Lanes) -> Array:
    numbers = _as_float(_interleaved([_upper_24(lane) for lane in lanes]))
    numbers *= 2.0**-24
    return numbers


def _scaled_sign(constant: float) -> Callable[[Array], Array]:
    def score(noise: Array) -> Array:
        signs = np.sign(noise) if isinstance(noise, np.ndarray) else noise.sign()
        signs *= constant
        return signs

    return score


_LAPLACE_SCORE = _scaled_sign(math.sqrt(2.0))
_ROWS = (
    Distribution("gaussian", 32, _gaussian, {"exact": None, "sign": _scaled_sign(math.sqrt(math.pi / 2))}),
    Distribution("laplace", 32, _laplace, {"exact": _LAPLACE_SCORE, "sign": _LAPLACE_SCORE}),
    Distribution("rademacher", 1, None, {"exact": None, "sign": None}),
)
NOISES: dict[str, Distribution] = {row.name: row for row in _ROWS}
"""The noises by name."""

UNIFORM = Distribution("uniform", 32, _uniform, {})
"""Uniform on ``{0, …, 2^24 - 1} / 2^24`` (no noise: neither zero mean nor unit variance)."""

MODEL_DISTRIBUTIONS: dict[str, Distribution] = {"uniform": UNIFORM, "normal": NOISES["gaussian"]}
"""What a model may draw for itself, by name."""


def noise_named(name: str) -> Distribution:
    """The noise called `name`; UnknownNameError otherwise."""
    if name not in NOISES:
        raise unknown_name("noise", name, NOISES)
    return NOISES[name]
