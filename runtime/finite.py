"""Whether tensors are free of NaN and infinities: asked of every loss, gradient and weight, so it must cost little."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WIDE = (torch.float32, torch.float64)


def all_finite(*tensors: Tensor) -> bool:
    """Whether no element of any of them is a NaN or an infinity; for a GPU's tensors with one wait in all.

    A sum takes one pass, and keeps every NaN and infinity (infinities of both signs add to a NaN). That of finite
    numbers can overflow too; so if it is not finite, the elements are looked at one by one.
    """
    dense = [_dense(tensor.detach()) for tensor in tensors]
    sums = [tensor.sum(dtype=None if tensor.dtype in _WIDE else torch.float32) for tensor in dense]
    if all(total.device.type == "cpu" for total in sums):
        finite = all(math.isfinite(total) for total in map(float, sums))
    else:
        finite = bool(torch.stack([total.to(sums[0].device, torch.float32) for total in sums]).isfinite().all())
    return finite or all(bool(tensor.isfinite().all()) for tensor in dense)


def alike(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two floating-point tensors are the same to `tolerance`, relative to each element and to the largest
    finite one: a sum in another order. NaN and infinities have to be the same."""
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * largest(expected), equal_nan=True)


NARROW_ROUNDING = 3e-2
"""`rounding_of` of bfloat16 and float16."""


def rounding_of(dtype: torch.dtype) -> float:
    """A tolerance for `alike` of sums in another order, with few more roundings than one would have."""
    return NARROW_ROUNDING if torch.finfo(dtype).bits < 32 else 1e-3


def largest(values: Tensor) -> float:
    """The largest finite element without its sign; 0 if there is none."""
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _dense(tensor: Tensor) -> Tensor:
    """The elements as real numbers."""
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    return torch.view_as_real(values) if values.is_complex() else values
