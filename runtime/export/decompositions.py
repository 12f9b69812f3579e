"""Onward's operators as torch's and the few that make random numbers: what `trace` replaces before there are rules to
find."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...passes import ops
from ..noise.blocks import count_blocks, spread_blocks


def _tile(x: Tensor, copies: Tensor, dim: int, outer: int) -> Tensor:
    """`noise.operators.tile`."""
    if dim < 0:
        return x
    shape, count = list(x.shape), copies.shape[0]
    rows = math.prod(shape[:dim]) * outer
    wide = x.reshape(rows, 1, -1).expand(rows, count, -1) if rows != 1 else x.reshape(1, -1).expand(count, -1)
    shape[dim] = shape[dim] * count
    return wide.reshape(shape)


def _pack_signs(x: Tensor, domain: str, dim: int) -> Tensor:
    """`noise.packing.pack_signs`, by sums of powers of two."""
    rows = (x.movedim(dim, 0) if dim > 0 else x).reshape(x.shape[dim] if dim >= 0 else 1, -1)
    planes = [rows > 0] if ops.DOMAINS[domain] == 1 else [rows > 0, rows < 0]
    return torch.stack([_bytes(plane.to(torch.int32), 1) for plane in planes])


def _pack_stochastic_signs(
    x: Tensor, scale: Tensor, copies: Tensor, key: Tensor, site: int, domain: str, sizes: Sequence[int], dim: int,
    outer: int,
) -> Tensor:  # fmt: skip
    """The numbers have a rule, as those of levels."""
    return _pack_signs(ops.stochastic_sign(x, scale, copies, key, site, sizes, dim, outer), domain, dim)


def _unpack_signs(packed: Tensor, domain: str, sizes: Sequence[int], dim: int, dtype: torch.dtype) -> Tensor:
    elements = _elements(sizes, dim)
    planes = [_codes(plane, 1, elements).to(dtype) for plane in packed.unbind(0)]
    values = planes[0] - planes[1] if domain == "signed" else planes[0] * 2 - 1 if domain == "binary" else planes[0]
    return _shaped(values, sizes, dim)


def _pack_levels(x: Tensor, domain: str, bits: int, dim: int) -> Tensor:
    rows = (x.movedim(dim, 0) if dim > 0 else x).reshape(x.shape[dim] if dim >= 0 else 1, -1)
    offset = 0 if domain == "nonnegative" else ops.num_levels(domain, bits)
    return _bytes(rows.to(torch.int32) + offset, bits)


def _unpack_levels(
    packed: Tensor, domain: str, bits: int, sizes: Sequence[int], dim: int, dtype: torch.dtype
) -> Tensor:
    values = _codes(packed, bits, _elements(sizes, dim)).to(dtype)
    return _shaped(values - ops.num_levels(domain, bits) if domain == "signed" else values, sizes, dim)


def _bytes(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers of so many bits, ``(rows, elements)`` int32, as bytes, the first lowest."""
    together = 8 // bits
    missing = -codes.shape[1] % together
    padded = torch.nn.functional.pad(codes, [0, missing]) if missing else codes
    places = torch.tensor([1 << (bits * place) for place in range(together)], dtype=torch.int32)
    return (padded.reshape(padded.shape[0], -1, together) * places).sum(2).to(torch.uint8)


def _codes(packed: Tensor, bits: int, elements: int) -> Tensor:
    """The inverse: uint8 ``(rows, elements)``."""
    shifts = torch.tensor(range(0, 8, bits), dtype=torch.uint8)
    codes = torch.bitwise_right_shift(packed[..., None], shifts).bitwise_and((1 << bits) - 1)
    return codes.reshape(packed.shape[0], -1)[:, :elements]


def _elements(sizes: Sequence[int], dim: int) -> int:
    return math.prod(size for axis, size in enumerate(sizes) if axis != dim)


def _shaped(values: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
    if dim < 0:
        return values.reshape(list(sizes))
    others = [size for axis, size in enumerate(sizes) if axis != dim]
    return values.reshape(values.shape[0], *others).movedim(0, dim).contiguous()


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    ops.tile: _tile,
    ops.spread_blocks: spread_blocks,
    ops.count_blocks: count_blocks,
    ops.pack_signs: _pack_signs,
    ops.pack_stochastic_signs: _pack_stochastic_signs,
    ops.unpack_signs: _unpack_signs,
    ops.pack_levels: _pack_levels,
    ops.unpack_levels: _unpack_levels,
}
