"""Kernels of packed signs (method.md 2, 3): eight elements a byte, compared and packed, or unpacked, in one pass.

A tensor with the batch dimension anywhere is ``(before, B, after)``; element ``e`` of sample ``r`` lies at
``(e // after * B + r) * after + e % after``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....passes.ops import DOMAINS, row_bytes
from ..philox import Purpose
from ..source import Layout, capture_draws, layout_of
from ..words import words_on
from .noise import MAX_ELEMENTS, NAMES, bits, key_words, samples_of, scales_of, stochastic_fits
from .numbers import EXACT, numbers, read, uniform, word_at, write

BYTES, TILE = 128, 1024
"""Bytes and elements of a program."""


@triton.jit
def write_bits(packed, byte, exists, positive, negative, plane, signed: tl.constexpr):
    """Eight elements a byte, booleans (bytes, 8), into a plane, and for signed ones into the next."""
    bit = tl.arange(0, 8)[None, :]
    tl.store(packed + byte, tl.sum(positive.to(tl.int32) << bit, 1).to(tl.uint8), exists)
    if signed:
        tl.store(packed + plane + byte, tl.sum(negative.to(tl.int32) << bit, 1).to(tl.uint8), exists)


@triton.jit
def read_bits(packed, byte, bit, inside, plane, domain: tl.constexpr):
    """The elements at a bit of a byte, -1, 0 or 1, int32; 0 where they are not inside."""
    value = (tl.load(packed + byte, inside, other=0).to(tl.int32) >> bit) & 1
    if domain == "signed":
        value -= (tl.load(packed + plane + byte, inside, other=0).to(tl.int32) >> bit) & 1
    elif domain == "binary":
        value = tl.where(inside, 2 * value - 1, 0)
    return value


@triton.jit
def pack_kernel(
    x, packed, num_rows, elements, row_bytes, after, dtype: tl.constexpr, signed: tl.constexpr, tile: tl.constexpr
):
    byte = tl.program_id(0) * tile + tl.arange(0, tile)
    exists = byte < num_rows * row_bytes
    bit = tl.arange(0, 8)[None, :]
    row = (byte // row_bytes)[:, None]
    element = (byte % row_bytes)[:, None] * 8 + bit
    inside = exists[:, None] & (element < elements)
    value = read(x + (element // after * num_rows + row) * after + element % after, inside, dtype)
    write_bits(packed, byte, exists, value > 0, value < 0, num_rows * row_bytes, signed)


@triton.jit(do_not_specialize=["site_word"])
def pack_stochastic_kernel(
    x, scale, packed, draws, num_rows, elements, row_bytes, after, span, num_copies, scale_inner, scale_extent,
    site_word, key,
    dtype: tl.constexpr, scale_dtype: tl.constexpr, signed: tl.constexpr, dense: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Dense: what is packed lies as it is counted, and whole bytes are a sample's, so that a program takes consecutive
    elements of one copy. Else it takes bytes, and finds each element's number by itself."""
    seed, step = tl.load(key), tl.load(key + 1)
    if dense:
        copy, first = tl.program_id(1), tl.program_id(0) * tile
        byte = copy * (span // 8) + first // 8 + tl.arange(0, tile // 8)
        exists = first + tl.arange(0, tile // 8) * 8 < span
        inside = exists[:, None] & (tl.arange(0, 8)[None, :] >= 0)
        chance = numbers(tl.program_id(0), tl.load(draws + copy), site_word, step, seed, "uniform", tile)
        chance = tl.reshape(chance, [tile // 8, 8])
        place = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    else:
        byte = tl.program_id(0) * (tile // 8) + tl.arange(0, tile // 8)
        exists = byte < num_rows * row_bytes
        row = (byte // row_bytes)[:, None]
        element = (byte % row_bytes)[:, None] * 8 + tl.arange(0, 8)[None, :]
        inside = exists[:, None] & (element < elements)
        place = (element // after * num_rows + row) * after + element % after
        outer = place // span
        draw = tl.load(draws + outer % num_copies, inside, other=0)
        chance = uniform(word_at(outer // num_copies * span + place % span, draw, site_word, step, seed))
    value = read(x + place, inside, dtype)
    largest = read(scale + place // scale_inner % scale_extent, inside, scale_dtype)
    kept = chance * largest < tl.abs(value)
    write_bits(packed, byte, exists, kept & (value > 0), kept & (value < 0), num_rows * row_bytes, signed)


@triton.jit
def unpack_kernel(
    packed, result, num_rows, elements, row_bytes, after, dtype: tl.constexpr, domain: tl.constexpr, tile: tl.constexpr
):
    place = tl.program_id(0) * tile + tl.arange(0, tile)
    inside = place < num_rows * elements
    row = place // after % num_rows
    element = place // (after * num_rows) * after + place % after
    value = read_bits(packed, row * row_bytes + element // 8, element % 8, inside, num_rows * row_bytes, domain)
    write(result + place, value.to(tl.float32), inside, dtype)


def pack_fits(x: Tensor, domain: str, dim: int) -> bool:
    return domain in DOMAINS and x.dtype in NAMES and 0 < x.numel() < MAX_ELEMENTS


def pack_signs(x: Tensor, domain: str, dim: int) -> Tensor:
    """`runtime.noise.packing.pack_signs`, exactly."""
    num_rows, after = (x.shape[dim], math.prod(x.shape[dim + 1 :])) if dim >= 0 else (1, x.numel())
    elements = x.numel() // num_rows
    packed = torch.empty(DOMAINS[domain], num_rows, row_bytes(elements, 1), dtype=torch.uint8, device=x.device)
    pack_kernel[(triton.cdiv(packed[0].numel(), BYTES),)](
        bits(x), packed, num_rows, elements, packed.shape[2], after, NAMES[x.dtype], domain == "signed", BYTES, **EXACT
    )
    return packed


def pack_stochastic_fits(
    x: Tensor, scale: Tensor, copies: Tensor, key: Tensor, site: int, domain: str, sizes: Sequence[int], dim: int,
    outer: int,
) -> bool:  # fmt: skip
    return domain in DOMAINS and stochastic_fits(x, scale, copies, key, site, sizes, dim, outer)


def is_dense(
    x: Tensor, scale: Tensor, copies: Tensor, key: Tensor, site: int, domain: str, sizes: Sequence[int], dim: int,
    outer: int,
) -> bool:  # fmt: skip
    """Whether the packed elements lie in the order in which those of a copy are counted, whole bytes to a row."""
    layout = layout_of(sizes, dim, outer, samples_of(x, copies, sizes, dim, True))
    return layout.rows == 1 and x.numel() // (x.shape[dim] if dim >= 0 else 1) % 8 == 0


def pack_stochastic_signs(
    x: Tensor, scale: Tensor, copies: Tensor, key: Tensor, site: int, domain: str, sizes: Sequence[int], dim: int,
    outer: int,
) -> Tensor:  # fmt: skip
    """`runtime.noise.packing.pack_stochastic_signs`, exactly."""
    layout: Layout = layout_of(sizes, dim, outer, samples_of(x, copies, sizes, dim, True))
    num_rows, after = (x.shape[dim], math.prod(x.shape[dim + 1 :])) if dim >= 0 else (1, x.numel())
    elements, span, num_copies = x.numel() // num_rows, layout.samples * layout.inner, copies.shape[0]
    packed = torch.empty(DOMAINS[domain], num_rows, row_bytes(elements, 1), dtype=torch.uint8, device=x.device)
    dense = is_dense(x, scale, copies, key, site, domain, sizes, dim, outer)
    grid = (triton.cdiv(span, TILE), num_copies) if dense else (triton.cdiv(packed[0].numel(), TILE // 8), 1)
    values, inner = scales_of(x, scale, dim)
    pack_stochastic_kernel[grid](
        bits(x), bits(values), packed, words_on(capture_draws(copies.tolist()), x.device), num_rows, elements,
        packed.shape[2], after, span, num_copies, inner, values.numel(),
        *key_words(key, site, Purpose.STOCHASTIC_CAPTURE, x.device), NAMES[x.dtype], NAMES[scale.dtype],
        domain == "signed", dense, TILE, **EXACT,
    )  # fmt: skip
    return packed


def unpack_fits(packed: Tensor, domain: str, sizes: Sequence[int], dim: int, dtype: torch.dtype) -> bool:
    return domain in DOMAINS and dtype in NAMES and 0 < 8 * packed.numel() < MAX_ELEMENTS


def unpack_signs(packed: Tensor, domain: str, sizes: Sequence[int], dim: int, dtype: torch.dtype) -> Tensor:
    """`runtime.noise.packing.unpack_signs`, exactly."""
    packed = packed.contiguous()
    num_rows = packed.shape[1]
    shape = [num_rows if axis == dim else extent for axis, extent in enumerate(sizes)]
    after = math.prod(shape[dim + 1 :]) if dim >= 0 else math.prod(shape)
    result = torch.empty(shape, dtype=dtype, device=packed.device)
    unpack_kernel[(triton.cdiv(result.numel(), TILE),)](
        packed,
        bits(result),
        num_rows,
        result.numel() // num_rows,
        packed.shape[2],
        after,
        NAMES[dtype],
        domain,
        TILE,
        **EXACT,
    )
    return result
