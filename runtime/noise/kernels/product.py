"""Matrix products with Rademacher noise made again (method.md 12): what feedback predicts and learns, no noise stored.

The left factor A has a row for every draw and sample, ``(draws * samples, elements)``: the draw's signs, negated for an
antithetic twin, on the coordinates that are alive. Where samples come first, element ``c`` of sample ``n`` is number
``n * elements + c`` of the draw, so that 32 consecutive coordinates take two words of Philox, shifted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..philox import Purpose
from ..rows import NoiseRows
from ..source import layout_of
from ..words import words_on
from .noise import MAX_ELEMENTS, key_words
from .numbers import EXACT, word_at

ROWS, MAX_COLUMNS = 64, 64
"""Rows of A (draws and samples) and columns of the other factor in one block; coordinates come in 32s."""


@triton.jit
def signs(draws, twins, alive, row, first, count, elements, samples, site_word, step, seed, masked: tl.constexpr):
    """The block of A of some rows and coordinates ``first … first + 31``, float32 (rows, 32); 0 beyond its ends."""
    exists = row < count
    draw = tl.load(draws + row // samples, exists, other=0)
    start = row % samples * elements + first
    low = word_at(start >> 5, draw, site_word, step, seed)
    high = word_at((start >> 5) + 1, draw, site_word, step, seed)
    offset = tl.arange(0, 32)[None, :]
    at = (start & 31)[:, None] + offset
    bit = (tl.where(at < 32, low[:, None], high[:, None]) >> (at & 31).to(tl.uint32)) & 1
    values = (bit.to(tl.int32) * 2 - 1) * tl.load(twins + row // samples, exists, other=1)[:, None]
    inside = exists[:, None] & (first + offset < elements)
    if masked:
        values = values * tl.load(alive + start[:, None] + offset, inside, other=0).to(tl.int32)
    return tl.where(inside, values, 0).to(tl.float32)


@triton.jit(do_not_specialize=["site_word"])
def rows_kernel(
    right, result, draws, twins, alive, count, elements, samples, outputs, site_word, key,
    masked: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """A @ right, right (elements, outputs)."""
    seed, step = tl.load(key), tl.load(key + 1)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = (tl.program_id(1) * columns + tl.arange(0, columns))[None, :]
    total = tl.zeros([rows, columns], tl.float32)
    for first in range(0, elements, 32):
        left = signs(draws, twins, alive, row, first, count, elements, samples, site_word, step, seed, masked)
        place = (first + tl.arange(0, 32))[:, None]
        values = tl.load(right + place * outputs + column, (place < elements) & (column < outputs), other=0)
        total = tl.dot(left, values, total, input_precision="ieee")
    tl.store(result + row[:, None] * outputs + column, total, (row[:, None] < count) & (column < outputs))


@triton.jit(do_not_specialize=["site_word"])
def columns_kernel(
    right, result, draws, twins, alive, count, elements, samples, outputs, site_word, key,
    masked: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """A.T @ right, right (draws * samples, outputs)."""
    seed, step = tl.load(key), tl.load(key + 1)
    first = tl.program_id(0) * 32
    column = (tl.program_id(1) * columns + tl.arange(0, columns))[None, :]
    total = tl.zeros([32, columns], tl.float32)
    for start in range(0, count, rows):
        row = start + tl.arange(0, rows)
        left = signs(draws, twins, alive, row, first, count, elements, samples, site_word, step, seed, masked)
        inside = (row[:, None] < count) & (column < outputs)
        values = tl.load(right + row[:, None] * outputs + column, inside, other=0)
        total = tl.dot(tl.trans(left), values, total, input_precision="ieee")
    place = (first + tl.arange(0, 32))[:, None]
    tl.store(result + place * outputs + column, total, (place < elements) & (column < outputs))


def product_fits(right: Tensor, rows: NoiseRows, transposed: bool, alive: Tensor | None) -> bool:
    """Signs without blocks, the samples before all other axes, float32."""
    layout = rows.site.layout
    samples = rows.probe.response.shape[1]
    count = samples * len(rows.probe.draws)
    one_row = layout.dim >= 0 and layout_of(layout.sizes, layout.dim, layout.outer, samples).rows == 1
    largest = max(count, layout.elements) * right.shape[1], samples * layout.elements
    plain = rows.noise == "rademacher" and not rows.site.blocks and right.dtype == torch.float32
    return plain and one_row and right.numel() > 0 and max(largest) < MAX_ELEMENTS


def columns_of(right: Tensor, *_: object) -> int:
    """Columns in one block: the outputs rounded up to a power of two, 16 (a matrix unit's least) to `MAX_COLUMNS`."""
    return min(MAX_COLUMNS, max(16, 1 << (right.shape[1] - 1).bit_length()))


def noise_product(right: Tensor, rows: NoiseRows, transposed: bool, alive: Tensor | None) -> Tensor:
    """`runtime.noise.rows.product_of_rows`, in float32 and a fixed order."""
    probe, site = rows.probe, rows.site
    samples, elements = probe.response.shape[1], site.layout.elements
    draws = probe.draws.tolist()
    count, outputs = samples * len(draws), right.shape[1]
    result = right.new_empty(elements if transposed else count, outputs)
    ids = words_on([draw if draw >= 0 else ~draw for draw in draws], right.device)
    twins = words_on([1 if draw >= 0 else -1 for draw in draws], right.device)
    mask = result if alive is None else alive.contiguous().view(torch.uint8)
    kernel = columns_kernel if transposed else rows_kernel
    strips = triton.cdiv(elements, 32) if transposed else triton.cdiv(count, ROWS)
    columns = columns_of(right)
    kernel[strips, triton.cdiv(outputs, columns)](
        right.contiguous(), result, ids, twins, mask, count, elements, samples, outputs,
        *key_words(probe.key, site.index, Purpose.NOISE, right.device), alive is not None, ROWS, columns, **EXACT,
    )  # fmt: skip
    return result


def reference_product(right: Tensor, rows: NoiseRows, transposed: bool, alive: Tensor | None) -> tuple[Tensor, Tensor]:
    """The product in float64, and the bound of float32 sums of n terms: n ulp of the sum of the terms' magnitudes."""
    left = (rows.values.T if transposed else rows.values).double()
    wide = right.double()
    return left @ wide, left.shape[1] * 2.0**-23 * (left.abs() @ wide.abs())
