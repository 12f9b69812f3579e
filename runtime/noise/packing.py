"""Signs as packed bits: eight elements a byte and plane (method.md, equations 2 and 3).

A domain (`onward.passes.ops.DOMAINS`) says what an element may be and how many bit planes that takes. Binary and
nonnegative have the plane ``x > 0``, which reads back as ±1 and as 0 or 1; signed has ``x > 0`` and ``x < 0``, reading
back as -1, 0 or +1. Samples come first, one row of bytes each; bit j of byte i is element ``8 i + j`` of the sample,
the rest of the last byte is zero.

`pack_bits` and `unpack_bits` are the definition, for any device; on a CPU NumPy makes the same bytes faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ...passes import ops
from ...passes.errors import unknown_name
from ...passes.ops import DOMAINS


def pack_bits(bits: Tensor) -> Tensor:
    """Booleans (rows, elements) as bytes, uint8 (rows, ceil(elements / 8)), lowest bit first."""
    rows, elements = bits.shape
    padded = torch.zeros(rows, -(-elements // 8) * 8, dtype=torch.uint8, device=bits.device)
    padded[:, :elements] = bits
    shifted = padded.view(rows, -1, 8) << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return shifted.sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, elements: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 zeros and ones (rows, elements)."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(1)[:, :elements]


def _pack_bits_numpy(bits: Tensor) -> Tensor:
    values = bits.numpy()
    if values.shape[1] % 8 == 0:  # one long row is faster than many
        return torch.from_numpy(np.packbits(values.reshape(-1), bitorder="little").reshape(values.shape[0], -1))
    return torch.from_numpy(np.packbits(values, axis=1, bitorder="little"))


@lru_cache(maxsize=64)
def _table(dtype: torch.dtype, zero: int, one: int) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """For every byte its eight bits as values `zero` and `one` of `dtype`, one opaque NumPy item a byte."""
    bits = unpack_bits(torch.arange(256, dtype=torch.uint8)[:, None], 8)
    values = torch.where(bits == 1, one, zero).to(dtype)
    return values.view(torch.uint8).numpy().view(f"V{8 * values.element_size()}").reshape(256)


def _unpack_numpy(packed: Tensor, elements: int, dtype: torch.dtype, zero: int, one: int) -> Tensor:
    table = _table(dtype, zero, one)
    values = np.empty(packed.shape, table.dtype)
    np.take(table, packed.numpy().astype(np.intp), out=values, mode="clip")
    flat = torch.from_numpy(values.view(np.uint8)).view(dtype)
    return flat if flat.shape[1] == elements else flat[:, :elements]


def _unpack_torch(packed: Tensor, elements: int, dtype: torch.dtype, zero: int, one: int) -> Tensor:
    return (unpack_bits(packed, elements).to(torch.int8) * (one - zero) + zero).to(dtype)


def _check_domain(domain: str) -> None:
    if domain not in DOMAINS:
        raise unknown_name("sign domain", domain, DOMAINS)


def pack_signs(x: Tensor, domain: str, dim: int) -> Tensor:
    """The signs of `x`: uint8 (planes, B, ceil(elements a sample / 8)), B the extent of the batch dimension `dim` (-1:
    1).

    `x` is real, of any dtype. NaN counts as "not positive, not negative". Raises UnknownNameError for a domain.
    """
    _check_domain(domain)
    rows = x.detach().movedim(dim, 0) if dim > 0 else x.detach()
    num_rows = x.shape[dim] if dim >= 0 else 1
    planes = [rows > 0] if DOMAINS[domain] == 1 else [rows > 0, rows < 0]
    pack = _pack_bits_numpy if x.device.type == "cpu" else pack_bits
    packed = [pack(plane.reshape(num_rows, x.numel() // max(1, num_rows))) for plane in planes]
    return packed[0][None] if len(packed) == 1 else torch.stack(packed)


def pack_stochastic_signs(
    x: Tensor,
    scale: Tensor,
    copies: Tensor,
    key: Tensor,
    site: int,
    domain: str,
    sizes: Sequence[int],
    dim: int,
    outer: int,
) -> Tensor:
    """`pack_signs` of ``stochastic_sign(x, scale, …)`` (equation 3). Raises as both."""
    signs = ops.stochastic_sign(x, scale, copies, key, site, sizes, dim, outer)
    packed: Tensor = ops.pack_signs(signs, domain, dim)
    return packed


def unpack_signs(packed: Tensor, domain: str, sizes: Sequence[int], dim: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack_signs`: values -1, 0, +1 of `dtype`, contiguous, shaped `sizes` but B = ``packed.shape[1]``
    at `dim`.

    Raises UnknownNameError for a domain.
    """
    _check_domain(domain)
    shape = list(sizes)
    num_rows = packed.shape[1]
    others = shape[:dim] + shape[dim + 1 :] if dim >= 0 else shape
    elements = int(np.prod(others, dtype=np.int64))
    unpack = _unpack_numpy if packed.device.type == "cpu" else _unpack_torch
    if domain == "signed":
        values = unpack(packed[0], elements, dtype, 0, 1) - unpack(packed[1], elements, dtype, 0, 1)
    else:
        values = unpack(packed[0], elements, dtype, -1 if domain == "binary" else 0, 1)
    if dim < 0:
        return values.reshape(shape).contiguous()
    return values.reshape(num_rows, *others).movedim(0, dim).contiguous()


for _function in (pack_signs, pack_stochastic_signs, unpack_signs):
    torch.library.impl(f"onward::{_function.__name__}", "CompositeExplicitAutograd", _function)
