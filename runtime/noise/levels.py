"""Whole numbers of 2, 4 or 8 bits as packed bytes: the levels of a stochastic capture (method.md 3).

A level of a nonnegative value is 0 … 2^bits - 1, of a signed one -(2^(bits-1) - 1) … 2^(bits-1) - 1, kept with that
much added. Samples come first, one row of bytes each; the lowest bits of a byte are its first level's, and what is left
of the last byte is zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...passes.ops import num_levels, row_bytes


def pack_levels(x: Tensor, domain: str, bits: int, dim: int) -> Tensor:
    """Levels as bytes: uint8 (B, ceil(elements a sample x bits / 8)), B the extent of the batch dimension `dim` (-1:
    1).

    `x` is real, of any dtype, and holds levels of `domain`, ``"nonnegative"`` or ``"signed"``.
    """
    num_rows = x.shape[dim] if dim >= 0 else 1
    rows = (x.detach().movedim(dim, 0) if dim > 0 else x.detach()).reshape(num_rows, -1)
    codes = rows.to(torch.uint8) if domain == "nonnegative" else _shifted(rows, num_levels(domain, bits))
    together = 8 // bits
    if together == 1:
        return codes.contiguous()
    padded = codes
    if codes.shape[1] % together:
        padded = codes.new_zeros(num_rows, row_bytes(codes.shape[1], bits) * together)
        padded[:, : codes.shape[1]] = codes
    parts = padded.view(num_rows, -1, together)
    packed = parts[..., 0].clone()
    for place in range(1, together):
        packed |= parts[..., place] << (place * bits)
    return packed


def _shifted(rows: Tensor, offset: int) -> Tensor:
    return rows.to(torch.int16).add_(offset).to(torch.uint8)


def unpack_levels(packed: Tensor, domain: str, bits: int, sizes: Sequence[int], dim: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack_levels`: levels of `dtype`, contiguous, shaped `sizes` but B = ``packed.shape[0]`` at
    `dim`."""
    num_rows, together = packed.shape[0], 8 // bits
    others = [*sizes[:dim], *sizes[dim + 1 :]] if dim >= 0 else list(sizes)
    elements = math.prod(others)
    codes = packed
    if together > 1:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        codes = (packed[..., None] >> shifts).bitwise_and_(2**bits - 1).flatten(1)[:, :elements]
    values = codes.to(dtype, copy=True)
    if domain == "signed":
        values -= num_levels(domain, bits)
    if dim < 0:
        return values.reshape(list(sizes)).contiguous()
    return values.reshape(num_rows, *others).movedim(0, dim).contiguous()


for _function in (pack_levels, unpack_levels):
    torch.library.impl(f"onward::{_function.__name__}", "CompositeExplicitAutograd", _function)
