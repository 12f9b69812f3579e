"""The compiled loops: the numbers of `noise.philox` and `noise.distributions`, bit for bit, in one pass.

A loop goes through a clean tensor, `source.Layout`, in chunks of consecutive elements. It makes the numbers of
one draw for a chunk, in a buffer that stays in the first-level cache, and uses them for every copy that carries them.

The bits are equal because every operation is one that IEEE 754 rounds in one way, in the definitions' order, and
because nothing is fused or reassociated: there is no `fastmath`, without which LLVM contracts no product and sum. Types
are written out: Numba would take ``float32 * 2.0`` for float64 and ``uint32 + uint32`` for uint64. What looks
roundabout is written so that LLVM vectorises it; `benchmarks/noise.py` measures.

Arrays are flat and contiguous, `site`, `step` and the keys are the counter's and the key's words, in [0, 2^32).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from ..distributions import _COSINE, _LOGARITHM, _SINE, _SQRT_HALF_BITS
from ..philox import MULTIPLIER_0, MULTIPLIER_1, NUM_ROUNDS, WEYL_0, WEYL_1

GAUSSIAN, LAPLACE, RADEMACHER, UNIFORM = range(4)
CODES = {"gaussian": GAUSSIAN, "laplace": LAPLACE, "rademacher": RADEMACHER, "uniform": UNIFORM, "normal": GAUSSIAN}
"""How the loops are told what to draw."""

CHUNK = 2048
"""Elements that are made at once; a multiple of every distribution's elements a block."""

i4, u4, u8, f4 = np.int32, np.uint32, np.uint64, np.float32
_M0, _M1, _LOW, _HALF = u8(MULTIPLIER_0), u8(MULTIPLIER_1), u8(0xFFFFFFFF), u8(32)
_W0, _W1 = u4(WEYL_0), u4(WEYL_1)
_S0, _S1, _S2, _S3, _S4 = (f4(value) for value in _SINE)
_C0, _C1, _C2, _C3, _C4, _C5 = (f4(value) for value in _COSINE)
_L0, _L1, _L2, _L3 = (f4(value) for value in _LOGARITHM)
_ONE, _TWO, _STEP, _LOG_2 = f4(1), f4(2), f4(2.0**-24), f4(math.log(2))
_HALF_TURN, _SQRT_HALF = f4(math.pi * 2.0**-31), f4(math.sqrt(0.5))
_ROOT_BITS, _SIGN, _EXPONENT, _EIGHT, _LAST, _BIT, _OFFSET = (
    i4(value) for value in (_SQRT_HALF_BITS, -(1 << 31), 23, 8, 31, 1, 0x800001)
)
_SQRT_2, _SQRT_HALF_PI = math.sqrt(2.0), math.sqrt(math.pi / 2)


def _compiled(function: Callable[..., Any]) -> Any:
    """`function` compiled at its first call for the types of its arguments, kept on disk where a folder can be written:
    beside this file, else in the user's cache folder, or where ``NUMBA_CACHE_DIR`` says."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no such folder: compiled anew in every process
        return numba.njit(**options)(function)


@_compiled
def _make_words(words, first, num_blocks, draw, site, step, key0, key1):
    """The Philox words of blocks ``first … first + num_blocks - 1``, lanes side by side."""
    for block in range(num_blocks):
        c0, c1, c2, c3 = u8(u4(first + block)), u8(draw), u8(site), u8(step)
        k0, k1 = key0, key1
        for _ in range(NUM_ROUNDS):
            p0, p1 = c0 * _M0, c2 * _M1
            c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ u8(k0), p1 & _LOW, (p0 >> _HALF) ^ c3 ^ u8(k1), p0 & _LOW
            k0, k1 = u4(k0 + _W0), u4(k1 + _W1)
        words[4 * block] = u4(c0)
        words[4 * block + 1] = u4(c1)
        words[4 * block + 2] = u4(c2)
        words[4 * block + 3] = u4(c3)


@_compiled
def _minus_log(lane):
    """`distributions._minus_log` of an int32 lane."""
    number = f4(i4((lane >> _EIGHT) + _OFFSET)) * _STEP
    bits = f4(number).view(np.int32)
    exponent = i4(i4(bits - _ROOT_BITS) >> _EXPONENT)
    number = i4(bits - i4(exponent << _EXPONENT)).view(np.float32)
    quotient = (number - _ONE) / (number + _ONE)
    square = quotient * quotient
    value = ((square * _L3 + _L2) * square + _L1) * square + _L0
    return -(value * quotient + f4(exponent) * _LOG_2)


@_compiled
def _with_sign_of(magnitude, word):
    return i4(f4(magnitude).view(np.int32) ^ (word & _SIGN)).view(np.float32)


@_compiled
def _box_muller(lane_a, lane_b):
    """`distributions._box_muller` of int32 lanes."""
    radius = _with_sign_of(f4(np.sqrt(_minus_log(lane_a) * _TWO)), lane_b)
    angle = f4(i4(i4(lane_b << _BIT) >> _BIT)) * _HALF_TURN
    square = angle * angle
    cosine = ((((square * _C5 + _C4) * square + _C3) * square + _C2) * square + _C1) * square + _C0
    sine = (((square * _S4 + _S3) * square + _S2) * square + _S1) * square + _S0
    return cosine * radius, sine * angle * radius


@_compiled
def _make_numbers(noise, out, words, masks, scale, first, count, draw, site, step, key0, key1):
    """Elements ``first … first + count - 1`` of a draw times `scale`, of out's dtype, into `out` (CHUNK,).

    `first` is a multiple of CHUNK. `words` is uint32 (CHUNK,), `masks` uint32 (32,) ``1 << j``. Whole blocks are made.
    """
    to = out.dtype.type
    per_block = 128 if noise == RADEMACHER else 4
    blocks = (count + per_block - 1) // per_block
    _make_words(words, first // per_block, blocks, u4(draw), u4(site), u4(step), u4(key0), u4(key1))
    factor = to(scale)
    if noise == RADEMACHER:
        rows = out.reshape(-1, 32)
        for row in range(4 * blocks):
            word = words[row]
            for bit in range(masks.size):
                rows[row, bit] = factor if (word & masks[bit]) != 0 else -factor
        return
    lanes = words.view(np.int32)
    if noise == GAUSSIAN:
        for block in range(blocks):
            at = 4 * block
            first_number, second = _box_muller(lanes[at], lanes[at + 1])
            third, fourth = _box_muller(lanes[at + 2], lanes[at + 3])
            out[at] = to(first_number) * factor
            out[at + 1] = to(second) * factor
            out[at + 2] = to(third) * factor
            out[at + 3] = to(fourth) * factor
    elif noise == LAPLACE:
        for at in range(4 * blocks):
            lane = lanes[at]
            out[at] = to(_with_sign_of(_minus_log(lane) * _SQRT_HALF, i4(lane << _LAST))) * factor
    else:
        for at in range(4 * blocks):
            out[at] = to(f4(i4(words[at] >> u4(8))) * _STEP) * factor


@_compiled
def _score(values, count, noise, by_sign):
    """The score of noise, in place (`distributions.Distribution.scores`)."""
    if noise == LAPLACE or (noise == GAUSSIAN and by_sign):
        constant = values.dtype.type(_SQRT_2 if noise == LAPLACE else _SQRT_HALF_PI)
        zero = values.dtype.type(0)
        for at in range(count):
            value = values[at]
            values[at] = constant if value > zero else (-constant if value < zero else zero)


@_compiled
def _masks():
    masks = np.empty(32, np.uint32)
    for bit in range(32):
        masks[bit] = u4(1) << u4(bit)
    return masks


@_compiled
def perturb(
    z, result, alive, masked, tiled, rows, span, copies, noise, scale, draws, starts, carriers, site, step, key0, key1
):
    """``z + scale * noise``: z (rows, copies if tiled else 1, span), result (rows, copies, span), alive uint8
    (rows, span). With a scale of 0 the result is z.

    Draw d belongs to the `carriers` from ``starts[d]`` to ``starts[d + 1]``: twice a copy, plus one for a twin.
    """
    words, values, masks = np.empty(CHUNK, np.uint32), np.empty(CHUNK, result.dtype), _masks()
    to = result.dtype.type
    for first in range(0, rows * span, CHUNK):
        count = min(CHUNK, rows * span - first)
        for number in range(draws.size):
            if scale != 0.0:
                _make_numbers(noise, values, words, masks, scale, first, count, draws[number], site, step, key0, key1)
            if masked:
                for at in range(count):
                    values[at] *= to(alive[first + at])
            for index in range(starts[number], starts[number + 1]):
                copy = carriers[index] >> 1
                done = 0
                while done < count:
                    row = (first + done) // span
                    offset = first + done - row * span
                    length = min(count - done, span - offset)
                    target = (row * copies + copy) * span + offset
                    origin = target if tiled else row * span + offset
                    to_there, to_here = result[target : target + length], z[origin : origin + length]
                    some = values[done : done + length]
                    if scale == 0.0:
                        to_there[:] = to_here
                    elif carriers[index] & 1:
                        for at in range(length):
                            to_there[at] = to_here[at] - some[at]
                    else:
                        for at in range(length):
                            to_there[at] = to_here[at] + some[at]
                    done += length


@_compiled
def perturb_tied(
    z, result, alive, masked, tiled, row_blocks, inner_blocks, samples, coarse_rows, coarse_inner, copies, noise, scale,
    draws, starts, carriers, site, step, key0, key1
):  # fmt: skip
    """`perturb` with one number a block (`perturb` says the rest): element (row, sample, inner) has the number of block
    ``(row_blocks[row], sample, inner_blocks[inner])`` of (coarse_rows, samples, coarse_inner)."""
    words, values, masks = np.empty(CHUNK, np.uint32), np.empty(CHUNK, result.dtype), _masks()
    to = result.dtype.type
    rows, inner, blocks = row_blocks.size, inner_blocks.size, coarse_rows * samples * coarse_inner
    numbers, some = np.empty(blocks, result.dtype), np.empty(inner, result.dtype)
    for number in range(draws.size):
        if scale != 0.0:
            for first in range(0, blocks, CHUNK):
                count = min(CHUNK, blocks - first)
                _make_numbers(noise, values, words, masks, scale, first, count, draws[number], site, step, key0, key1)
                numbers[first : first + count] = values[:count]
        for row in range(rows):
            for sample in range(samples):
                block, here = (row_blocks[row] * samples + sample) * coarse_inner, (row * samples + sample) * inner
                for at in range(inner):
                    some[at] = numbers[block + inner_blocks[at]]
                if masked:
                    for at in range(inner):
                        some[at] *= to(alive[here + at])
                for index in range(starts[number], starts[number + 1]):
                    copy = carriers[index] >> 1
                    target = ((row * copies + copy) * samples + sample) * inner
                    origin = target if tiled else here
                    to_there, to_here = result[target : target + inner], z[origin : origin + inner]
                    if scale == 0.0:
                        to_there[:] = to_here
                    elif carriers[index] & 1:
                        for at in range(inner):
                            to_there[at] = to_here[at] - some[at]
                    else:
                        for at in range(inner):
                            to_there[at] = to_here[at] + some[at]


@_compiled
def count_blocks(alive, counts, row_blocks, inner_blocks, samples, coarse_inner):
    """Add to a block's count, which begins at 0, for each of its elements that is alive; blocks as `perturb_tied` has
    them. Whole numbers: the sums are exact."""
    one = counts.dtype.type(1)
    inner = inner_blocks.size
    for row in range(row_blocks.size):
        for sample in range(samples):
            block, here = (row_blocks[row] * samples + sample) * coarse_inner, (row * samples + sample) * inner
            for at in range(inner):
                if alive[here + at]:
                    counts[block + inner_blocks[at]] += one


@_compiled
def weighted_noise(
    weights, result, rows, samples, inner, copies, noise, by_sign, draws, starts, carriers, site, step, key0, key1
):
    """``weights * score(noise)``: weights (copies, samples), result (rows, copies, samples, inner)."""
    words, values, masks = np.empty(CHUNK, np.uint32), np.empty(CHUNK, result.dtype), _masks()
    to = result.dtype.type
    span = samples * inner
    for first in range(0, rows * span, CHUNK):
        count = min(CHUNK, rows * span - first)
        for number in range(draws.size):
            _make_numbers(noise, values, words, masks, 1.0, first, count, draws[number], site, step, key0, key1)
            _score(values, count, noise, by_sign)
            for index in range(starts[number], starts[number + 1]):
                copy = carriers[index] >> 1
                sign = to(-1.0) if carriers[index] & 1 else to(1.0)
                done = 0
                while done < count:
                    row = (first + done) // span
                    offset = first + done - row * span
                    target = (row * copies + copy) * span + offset
                    sample = offset // inner
                    if inner == 1:
                        length = min(count - done, span - offset)
                        factors = weights[copy * samples + sample : copy * samples + sample + length]
                        for at in range(length):
                            result[target + at] = values[done + at] * (sign * factors[at])
                    else:
                        length = min(count - done, (sample + 1) * inner - offset)
                        factor = sign * weights[copy * samples + sample]
                        to_there, some = result[target : target + length], values[done : done + length]
                        for at in range(length):
                            to_there[at] = some[at] * factor
                    done += length


@_compiled
def weighted_noise_sum(
    weights, result, rows, samples, inner, noise, by_sign, draws, starts, carriers, site, step, key0, key1
):
    """``sum_d weights * score(noise)``: weights (copies, samples), result (rows, samples, inner); draws in order."""
    words, values, masks = np.empty(CHUNK, np.uint32), np.empty(CHUNK, result.dtype), _masks()
    to = result.dtype.type
    folded = np.zeros((draws.size, samples), result.dtype)
    for number in range(draws.size):
        for index in range(starts[number], starts[number + 1]):
            copy = carriers[index] >> 1
            sign = to(-1.0) if carriers[index] & 1 else to(1.0)
            for sample in range(samples):
                folded[number, sample] += sign * weights[copy * samples + sample]
    span = samples * inner
    for first in range(0, rows * span, CHUNK):
        count = min(CHUNK, rows * span - first)
        total = result[first : first + count]
        total[:] = to(0.0)
        for number in range(draws.size):
            _make_numbers(noise, values, words, masks, 1.0, first, count, draws[number], site, step, key0, key1)
            _score(values, count, noise, by_sign)
            done = 0
            while done < count:
                offset = (first + done) % span
                sample = offset // inner
                if inner == 1:
                    length = min(count - done, span - offset)
                    factors = folded[number, sample : sample + length]
                    for at in range(length):
                        total[done + at] += factors[at] * values[done + at]
                else:
                    length = min(count - done, (sample + 1) * inner - offset)
                    factor = folded[number, sample]
                    there, some = total[done : done + length], values[done : done + length]
                    for at in range(length):
                        there[at] += factor * some[at]
                done += length


@_compiled
def stochastic_sign(x, scale, scale_inner, result, rows, span, draws, site, step, key0, key1):
    """``sign(x) * (uniform * scale < |x|)``: x and result (rows, copies, span), one draw a copy; the scale of the
    element at place p is number ``p // scale_inner``, counted around."""
    words, values, masks = np.empty(CHUNK, np.uint32), np.empty(CHUNK, result.dtype), _masks()
    to = result.dtype.type
    zero = to(0.0)
    for first in range(0, rows * span, CHUNK):
        count = min(CHUNK, rows * span - first)
        for copy in range(draws.size):
            _make_numbers(UNIFORM, values, words, masks, 1.0, first, count, draws[copy], site, step, key0, key1)
            done = 0
            while done < count:
                row = (first + done) // span
                offset = first + done - row * span
                place = (row * draws.size + copy) * span + offset
                group = place // scale_inner
                length = min(count - done, span - offset)
                if scale_inner > 1:
                    length = min(length, (group + 1) * scale_inner - place)
                here, there, some = x[place : place + length], result[place : place + length], values[done:]
                largest = scale[group % scale.size]
                for at in range(length):
                    bound = scale[place + at] if scale_inner == 1 else largest
                    value = here[at]
                    sign = to(value > zero) - to(value < zero) if value == value else value
                    there[at] = sign * to(some[at] * bound < abs(value))
                done += length


@_compiled
def keyed_random(result, noise, site, step, key0, key1):
    """The first numbers of draw 0."""
    words, values, masks = np.empty(CHUNK, np.uint32), np.empty(CHUNK, result.dtype), _masks()
    for first in range(0, result.size, CHUNK):
        count = min(CHUNK, result.size - first)
        _make_numbers(noise, values, words, masks, 1.0, first, count, 0, site, step, key0, key1)
        result[first : first + count] = values[:count]
