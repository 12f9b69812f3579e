"""Kernels of packed signs (method.md 2): eight elements a byte, compared and packed, or unpacked, in one pass.

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

from ....passes.ops import DOMAINS
from .noise import MAX_ELEMENTS, NAMES, bits
from .numbers import EXACT, read, write

BYTES, TILE = 128, 1024
"""Bytes and elements of a program."""


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
    tl.store(packed + byte, tl.sum((value > 0).to(tl.int32) << bit, 1).to(tl.uint8), exists)
    if signed:
        negative = tl.sum((value < 0).to(tl.int32) << bit, 1).to(tl.uint8)
        tl.store(packed + num_rows * row_bytes + byte, negative, exists)


@triton.jit
def unpack_kernel(
    packed, result, num_rows, elements, row_bytes, after, dtype: tl.constexpr, domain: tl.constexpr, tile: tl.constexpr
):
    place = tl.program_id(0) * tile + tl.arange(0, tile)
    inside = place < num_rows * elements
    row = place // after % num_rows
    element = place // (after * num_rows) * after + place % after
    byte = row * row_bytes + element // 8
    value = (tl.load(packed + byte, inside, other=0).to(tl.int32) >> element % 8) & 1
    if domain == "signed":
        value -= (tl.load(packed + num_rows * row_bytes + byte, inside, other=0).to(tl.int32) >> element % 8) & 1
    elif domain == "binary":
        value = 2 * value - 1
    write(result + place, value.to(tl.float32), inside, dtype)


def pack_fits(x: Tensor, domain: str, dim: int) -> bool:
    return domain in DOMAINS and x.dtype in NAMES and 0 < x.numel() < MAX_ELEMENTS


def pack_signs(x: Tensor, domain: str, dim: int) -> Tensor:
    """`runtime.noise.packing.pack_signs`, exactly."""
    num_rows, after = (x.shape[dim], math.prod(x.shape[dim + 1 :])) if dim >= 0 else (1, x.numel())
    elements = x.numel() // num_rows
    row_bytes = -(-elements // 8)
    packed = torch.empty(DOMAINS[domain], num_rows, row_bytes, dtype=torch.uint8, device=x.device)
    pack_kernel[(triton.cdiv(num_rows * row_bytes, BYTES),)](
        bits(x), packed, num_rows, elements, row_bytes, after, NAMES[x.dtype], domain == "signed", BYTES, **EXACT
    )
    return packed


def unpack_fits(packed: Tensor, domain: str, sizes: Sequence[int], dim: int, dtype: torch.dtype) -> bool:
    return domain in DOMAINS and dtype in NAMES and 0 < 8 * packed.numel() < MAX_ELEMENTS


def unpack_signs(packed: Tensor, domain: str, sizes: Sequence[int], dim: int, dtype: torch.dtype) -> Tensor:
    """`runtime.noise.packing.unpack_signs`, exactly."""
    packed = packed.contiguous()
    _, num_rows, row_bytes = packed.shape
    shape = [num_rows if axis == dim else extent for axis, extent in enumerate(sizes)]
    after = math.prod(shape[dim + 1 :]) if dim >= 0 else math.prod(shape)
    result = torch.empty(shape, dtype=dtype, device=packed.device)
    unpack_kernel[(triton.cdiv(result.numel(), TILE),)](
        packed,
        bits(result),
        num_rows,
        result.numel() // num_rows,
        row_bytes,
        after,
        NAMES[dtype],
        domain,
        TILE,
        **EXACT,
    )
    return result
