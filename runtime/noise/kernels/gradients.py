"""Kernels of weight gradients from packed signs (method.md 1 to 3): bits are read, noise is made again, and the product
is all that is written.

The gradient is a product of two matrices whose rows are (copy, sample, position): the weighted noise ``(rows,
outputs)`` and the activation ``(rows, columns)``, a column being an input, or of a convolution a channel and a place in
its window. A program has a block of outputs × columns and a stretch of the rows, and makes both factors in registers.

Matrix units take tf32, 11 of float32's 24 bits. Signs are exact in it; the other factor is cut into its upper 11 bits
and the rest, which makes two products, exact but for 2^-20, and sums in float32. After `CHAIN` rows a sum starts anew
and is added to that of others: rounding errors stay small however many rows there are. Stretches depend on the sizes
alone and are added in their order: two runs agree to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....passes.ops import DOMAINS
from ..packed_gradients import Factors, convolution_gradient, linear_gradient
from ..philox import Purpose
from ..words import words_on
from .noise import MAX_ELEMENTS, NAMES, bits, covered, key_words
from .numbers import EXACT, block_of, by_sign, in_order, lane_of, lanes_at, read, rounded, scored, word_at
from .signs import read_bits

ROWS, OUTPUTS, COLUMNS = 32, 64, 128
"""Rows of a product; outputs and columns of a block at most. The noise is made anew for every block of columns."""

CHAIN = 1024
"""Rows that are summed before their sum is added to that of others."""

PROGRAMS, STEPS = 512, 4
"""Programs that are wanted at least, and products that each does at least."""


@triton.jit
def noise_at(
    first, draw, site_word, step, seed,
    noise: tl.constexpr, signs: tl.constexpr, group: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Groups of consecutive elements of draws, or their signs, as float32 (height, width): `first` and `draw`, (height,
    width / group), are the first element of each group, a multiple of its size, and what it is of."""
    if noise == "rademacher":
        word = word_at(first >> 5, draw, site_word, step, seed)
        place = (first & 31)[:, :, None] + tl.arange(0, group)[None, None, :]
        bit = (word[:, :, None] >> place.to(tl.uint32)) & 1
        values = tl.reshape(bit.to(tl.int32) * 2 - 1, [height, width]).to(tl.float32)
    else:
        lane0, lane1, lane2, lane3 = lanes_at(first, draw, site_word, step, seed)
        value0, value1, value2, value3 = block_of(lane0, lane1, lane2, lane3, noise, signs)
        if group == 4:
            values = in_order(value0, value1, value2, value3)
        else:
            values = lane_of(first, value0, value1, value2, value3)
    return values


@triton.jit
def weighted(values, factor, noise: tl.constexpr, score: tl.constexpr, narrow: tl.constexpr, dtype: tl.constexpr):
    """Noise as `weighted_noise` gives it for weights of the dtype `narrow`, then rounded to `dtype`."""
    values = scored(rounded(values, narrow), noise, score, narrow) * factor
    return rounded(rounded(values, narrow), dtype)


@triton.jit
def product(left, right, total, exact: tl.constexpr):
    """``total + left @ right``; one factor is of signs, and the other float32 or, if `exact`, of 11 bits at most."""
    upper = left
    if not exact:
        upper = (left.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        total = tl.dot(left - upper, right, total, input_precision="tf32")
    return tl.dot(upper, right, total, input_precision="tf32")


@triton.jit(do_not_specialize=["site_word"])
def linear_kernel(
    packed, scale, weights, result, draws, twins, count, stretch, samples, positions, outputs, columns, inner,
    row_bytes, plane, site_word, key,
    domain: tl.constexpr, scaled: tl.constexpr, bias: tl.constexpr, noise: tl.constexpr, score: tl.constexpr,
    narrow: tl.constexpr, dtype: tl.constexpr, group: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
    rows: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    """A row's signs are the `columns` from bit ``row % inner * columns`` of the packed row ``row // inner`` on."""
    seed, step = tl.load(key), tl.load(key + 1)
    column = (tl.program_id(0) * width + tl.arange(0, width))[None, :]
    first_output = tl.program_id(1) * height
    output = first_output + tl.arange(0, height)
    heads = (first_output + tl.arange(0, height // group) * group)[None, :]
    signs: tl.constexpr = by_sign(noise, score, narrow)
    begin = tl.program_id(2) * stretch
    end = tl.minimum(begin + stretch, count)
    total, total_bias = tl.zeros([height, width], tl.float32), tl.zeros([height], tl.float32)
    for first in range(begin, end, chain):
        part, part_bias = tl.zeros([height, width], tl.float32), tl.zeros([height], tl.float32)
        for start in range(first, tl.minimum(first + chain, end), rows):
            row = start + tl.arange(0, rows)
            exists = row < end
            copy = row // (samples * positions)
            draw = tl.load(draws + copy, exists, other=0)
            factor = read(weights + row // positions, exists, narrow) * tl.load(twins + copy, exists, other=0)
            element = (row - copy * (samples * positions))[:, None] * outputs + heads
            draw = tl.zeros_like(element) + draw[:, None]
            values = noise_at(element, draw, site_word, step, seed, noise, signs, group, rows, height)
            values = weighted(values, factor[:, None], noise, score, narrow, dtype)
            if bias:
                part_bias += tl.sum(values, 0)
            if scaled:
                values *= read(scale + row // inner, exists, dtype)[:, None]
            at = (row % inner)[:, None] * columns + column
            byte = (row // inner)[:, None] * row_bytes + (at >> 3)
            plus = read_bits(packed, byte, at & 7, exists[:, None] & (column < columns), plane, domain)
            part = product(tl.trans(values), plus.to(tl.float32), part, dtype != "float32" and not scaled)
        total += part
        total_bias += part_bias
    to = result + tl.program_id(2) * (outputs * (columns + (1 if bias else 0)))
    tl.store(to + output[:, None] * columns + column, total, (output[:, None] < outputs) & (column < columns))
    if bias:
        tl.store(to + outputs * columns + output, total_bias, (output < outputs) & (tl.program_id(0) == 0))


@triton.jit(do_not_specialize=["site_word"])
def convolution_kernel(
    packed, scale, weights, result, draws, twins, count, stretch, samples, area, outputs, columns, row_bytes, plane,
    x_height, x_width, z_width, window_height, window_width, stride_y, stride_x, padding_y, padding_x, dilation_y,
    dilation_x, site_word, key,
    domain: tl.constexpr, scaled: tl.constexpr, bias: tl.constexpr, noise: tl.constexpr, score: tl.constexpr,
    narrow: tl.constexpr, dtype: tl.constexpr, group: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
    rows: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    """A row is one of the `area` positions of a sample, which is a packed row: image and window of two axes."""
    seed, step = tl.load(key), tl.load(key + 1)
    column = tl.program_id(0) * width + tl.arange(0, width)
    channel = column // (window_height * window_width)
    shift_y = column // window_width % window_height * dilation_y - padding_y
    shift_x = column % window_width * dilation_x - padding_x
    output = tl.program_id(1) * height + tl.arange(0, height)
    signs: tl.constexpr = by_sign(noise, score, narrow)
    begin = tl.program_id(2) * stretch
    end = tl.minimum(begin + stretch, count)
    total, total_bias = tl.zeros([height, width], tl.float32), tl.zeros([height], tl.float32)
    for first in range(begin, end, chain):
        part, part_bias = tl.zeros([height, width], tl.float32), tl.zeros([height], tl.float32)
        for start in range(first, tl.minimum(first + chain, end), rows):
            row = start + tl.arange(0, rows)
            exists = row < end
            sample, position = row // area, row % area
            sign = tl.load(twins + sample // samples, exists, other=0)
            factor = read(weights + sample, exists, narrow) * sign
            head = start + tl.arange(0, rows // group) * group
            copy = head // area // samples
            draw = tl.load(draws + copy, head < end, other=0)
            element = ((head // area - copy * samples) * (outputs * area) + head % area)[None, :]
            element = element + output[:, None] * area
            draw = tl.zeros_like(element) + draw[None, :]
            values = noise_at(element, draw, site_word, step, seed, noise, signs, group, height, rows)
            values = weighted(values, factor[None, :], noise, score, narrow, dtype)
            if bias:
                part_bias += tl.sum(values, 1)
            if scaled:
                values *= read(scale + sample, exists, dtype)[None, :]
            y = (position // z_width * stride_y)[:, None] + shift_y[None, :]
            x = (position % z_width * stride_x)[:, None] + shift_x[None, :]
            inside = (exists[:, None] & (column < columns)[None, :]) & ((y >= 0) & (y < x_height))
            inside = inside & ((x >= 0) & (x < x_width))
            at = (channel[None, :] * x_height + y) * x_width + x
            plus = read_bits(packed, sample[:, None] * row_bytes + (at >> 3), at & 7, inside, plane, domain)
            part = product(values, plus.to(tl.float32), part, dtype != "float32" and not scaled)
        total += part
        total_bias += part_bias
    to = result + tl.program_id(2) * (outputs * (columns + (1 if bias else 0)))
    there = (output < outputs)[:, None] & (column < columns)[None, :]
    tl.store(to + output[:, None] * columns + column[None, :], total, there)
    if bias:
        tl.store(to + outputs * columns + output, total_bias, (output < outputs) & (tl.program_id(0) == 0))


class Form(NamedTuple):
    """How a product of so many rows, outputs and columns is cut."""

    height: int
    width: int
    group: int
    """Consecutive elements of noise that are made of one word of signs, or one block of other numbers."""
    stretch: int
    """Rows of a program."""
    stretches: int


def linear_form(*given: Any) -> Form:
    """Of a call: what the kernel is compiled for is in it."""
    factors = Factors(*given)
    rows = factors.samples * math.prod(factors.sizes[:-1])
    return form_of(rows, factors.sizes[-1], factors.x_sizes[-1], factors.sizes[-1], factors.noise)


def convolution_form(*given: Any) -> Form:
    factors, (weight, *_) = _split(given)
    area = math.prod(factors.sizes[2:])
    return form_of(factors.samples * area, weight.shape[0], weight[0].numel(), area, factors.noise)


def form_of(rows: int, outputs: int, columns: int, consecutive: int, noise: str) -> Form:
    """Blocks as large as they are filled; of the rows as many stretches as it takes to have `PROGRAMS` programs; groups
    of what lies consecutively in the noise, so many elements."""
    height, width = _block(outputs, OUTPUTS), _block(columns, COLUMNS)
    tiles = triton.cdiv(outputs, height) * triton.cdiv(columns, width)
    steps = triton.cdiv(rows, ROWS)
    wanted = max(1, min(triton.cdiv(PROGRAMS, tiles), steps // STEPS))
    stretch = triton.cdiv(steps, wanted) * ROWS
    group = math.gcd(consecutive, 32 if noise == "rademacher" else 4)
    return Form(height, width, group if noise == "rademacher" or group == 4 else 1, stretch, triton.cdiv(rows, stretch))


def _block(extent: int, most: int) -> int:
    """The next power of two, from 16, a matrix unit's least, on."""
    return min(most, max(16, 1 << (extent - 1).bit_length()))


def _split(given: Sequence[Any]) -> tuple[Factors, Sequence[Any]]:
    return Factors(*given[: len(Factors._fields)]), given[len(Factors._fields) :]


def linear_fits(*given: Any) -> bool:
    """A row of signs for each of the noise."""
    factors = Factors(*given)
    return _fits(factors) and math.prod(factors.x_sizes[:-1]) == math.prod(factors.sizes[:-1])


def convolution_fits(*given: Any) -> bool:
    """Images and windows of one or two axes."""
    factors, (weight, *_) = _split(given)
    sizes, x_sizes = factors.sizes, factors.x_sizes
    shaped = sizes[0] == 1 and len(sizes) == len(x_sizes) == weight.dim() in (3, 4) and weight.shape[1] == x_sizes[1]
    return _fits(factors) and shaped and math.prod(weight.shape) < MAX_ELEMENTS


def _fits(given: Factors) -> bool:
    """Samples that come first, with one scale each."""
    scaled = given.scale is None or (given.scale.dtype == given.dtype and given.scale.numel() == given.packed.shape[1])
    first = given.dim == given.x_dim == 0 and given.outer == 1 and given.sizes[0] == given.x_sizes[0]
    known = given.domain in DOMAINS and given.dtype in NAMES and 0 < 8 * given.packed.numel() < MAX_ELEMENTS
    layout = given.sizes, given.dim, given.weights.shape[1], given.copies.shape[0]
    return scaled and first and known and covered(given.noise, given.score, given.weights.dtype, *layout)


def packed_linear_gradient(*given: Any) -> Tensor:
    """`runtime.noise.packed_gradients.packed_linear_gradient`, in float32 and a fixed order."""
    factors = Factors(*given)
    positions, inner = math.prod(factors.sizes[:-1]), math.prod(factors.x_sizes[1:-1])
    outputs, columns = factors.sizes[-1], factors.x_sizes[-1]
    numbers = (factors.weights.shape[1], positions, outputs, columns, inner, *_strides(factors.packed))
    form = linear_form(*given)
    return _launched(linear_kernel, factors, form, factors.samples * positions, outputs, columns, numbers)


def packed_convolution_gradient(*given: Any) -> Tensor:
    """`runtime.noise.packed_gradients.packed_convolution_gradient`, in float32 and a fixed order."""
    factors, (weight, *described) = _split(given)
    area, outputs, columns = math.prod(factors.sizes[2:]), weight.shape[0], weight[0].numel()
    stride, padding, dilation = (_two(each, fill) for each, fill in zip(described, (1, 0, 1), strict=True))
    image, window = _two(factors.x_sizes[2:], 1), _two(weight.shape[2:], 1)
    numbers = (
        factors.weights.shape[1], area, outputs, columns, *_strides(factors.packed), *image, factors.sizes[-1],
        *window, *stride, *padding, *dilation,
    )  # fmt: skip
    form = convolution_form(*given)
    return _launched(convolution_kernel, factors, form, factors.samples * area, outputs, columns, numbers)


def _two(extents: Sequence[int], fill: int) -> tuple[int, ...]:
    """Of one axis as of two."""
    return (fill, *extents) if len(extents) == 1 else tuple(extents)


def _strides(packed: Tensor) -> tuple[int, int]:
    """Bytes of a row and of a plane."""
    return packed.shape[2], packed[0].numel()


def _launched(
    kernel: Any, factors: Factors, form: Form, rows: int, outputs: int, columns: int, numbers: Sequence[int]
) -> Tensor:
    """The sums of all stretches added in their order, and rounded to the dtype asked for."""
    copies, device = factors.copies.tolist(), factors.packed.device
    draws = words_on([copy if copy >= 0 else ~copy for copy in copies], device)
    twins = words_on([1 if copy >= 0 else -1 for copy in copies], device)
    size = outputs * (columns + factors.bias)
    sums = torch.empty(form.stretches, size, dtype=torch.float32, device=device)
    scale = sums if factors.scale is None else bits(factors.scale)
    kernel[triton.cdiv(columns, form.width), triton.cdiv(outputs, form.height), form.stretches](
        factors.packed.contiguous(), scale, bits(factors.weights), sums, draws, twins, rows, form.stretch, *numbers,
        *key_words(factors.key, factors.site, Purpose.NOISE, device), factors.domain, factors.scale is not None,
        factors.bias, factors.noise, factors.score, NAMES[factors.weights.dtype], NAMES[factors.dtype], form.group,
        form.height, form.width, ROWS, CHAIN, num_warps=max(4, form.width // 16), **EXACT,
    )  # fmt: skip
    total = sums[0] if form.stretches == 1 else sums.sum(0)
    return total.to(factors.dtype)


def excerpt(*given: Any) -> tuple[Any, ...] | None:
    """The first copy and the last, a twin where there are twins: in float64 all of them would take much memory."""
    factors, described = _split(given)
    last = factors.copies.shape[0] - 1
    if last < 2:
        return None

    def ends(x: Tensor, axis: int) -> Tensor:
        copies = x.unflatten(axis, (last + 1, -1))
        return torch.cat([copies.select(axis, 0), copies.select(axis, last)], axis)

    few = factors._replace(
        packed=ends(factors.packed, 1),
        scale=None if factors.scale is None else ends(factors.scale, 0),
        weights=factors.weights[[0, last]],
        copies=factors.copies[[0, last]],
    )
    return *few, *described


def reference_linear(*given: Any) -> tuple[Tensor, Tensor]:
    return _reference(Factors(*given), linear_form(*given), linear_gradient)


def reference_convolution(*given: Any) -> tuple[Tensor, Tensor]:
    factors, described = _split(given)
    weight, *rest = described

    def gradient(x: Tensor, cotangent: Tensor, bias: bool) -> Tensor:
        return convolution_gradient(x, cotangent, bias, weight.double(), *rest)

    return _reference(factors, convolution_form(*given), gradient)


def _reference(factors: Factors, form: Form, gradient: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """The gradient in float64, and how far float32 may be from it, in ulp of the sum of the terms' magnitudes.

    Matrix units add a chain's rows by eights, the upper bits' and the rest's, and round or cut off each time: a quarter
    of the rows, and eight within. Then come the chains and the stretches. The rest's own bits that are cut off are 8
    ulp of a term, a scale is 1. The result is rounded to its dtype.
    """
    x, cotangent = factors.activation().double(), factors.cotangent().double()
    expected = gradient(x, cotangent, factors.bias)
    magnitudes = gradient(x.abs(), cotangent.abs(), factors.bias)
    chain = min(form.stretch, CHAIN)
    terms = chain // 4 + 8 + triton.cdiv(form.stretch, chain) + form.stretches + 9
    precision = torch.finfo(factors.dtype)
    return expected, terms * 2.0**-23 * magnitudes + (expected.abs() + precision.smallest_normal) * precision.eps
