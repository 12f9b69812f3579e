"""Operations written out, where autograd knows no derivative or torch's own formula would fix the batch size.

Torch traces padding, what it makes of padding (im2col), and the derivatives of resizing by reading sizes as integers: a
derivative traced so would hold for one batch size only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

_aten = torch.ops.aten


def _pad(x: Tensor, pad: Sequence[int], value: float = 0) -> Tensor:
    """``constant_pad_nd`` by slices and concatenations."""
    for place in range(len(pad) // 2):
        dim = x.dim() - 1 - place
        before, after = pad[2 * place : 2 * place + 2]
        if before < 0 or after < 0:
            x = x.narrow(dim, max(-before, 0), x.shape[dim] + min(before, 0) + min(after, 0))
        margins = [x.new_full([*x.shape[:dim], max(count, 0), *x.shape[dim + 1 :]], value) for count in (before, after)]
        if before > 0 or after > 0:
            x = torch.cat([margins[0], x, margins[1]], dim)
    return x


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``copy``, what an assignment to a slice becomes, has no derivative of its own."""
    return source.to(target.dtype).expand_as(target).clone(memory_format=torch.contiguous_format)


def _places(extent: int, kernel: int, dilation: int, stride: int, device: torch.device) -> Tensor:
    """Where the taps of a sliding kernel lie along one axis: int64 ``(kernel, positions)``."""
    first = torch.arange(0, extent - dilation * (kernel - 1), stride, device=device)
    return torch.arange(0, kernel * dilation, dilation, device=device)[:, None] + first


def _im2col(
    x: Tensor, kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """``im2col`` (``F.unfold``) by one lookup: ``(…, C, H, W)`` to ``(…, C * kernel, positions)``."""
    x = _pad(x, (padding[1], padding[1], padding[0], padding[0]))
    rows, columns = (_places(x.shape[i - 2], kernel[i], dilation[i], stride[i], x.device) for i in range(2))
    patches = x[..., rows[:, None, :, None], columns[None, :, None, :]]  # (…, C, kh, kw, h, w)
    lead = x.shape[:-3]
    return patches.reshape(*lead, x.shape[-3] * kernel[0] * kernel[1], rows.shape[1] * columns.shape[1])


def _col2im(
    x: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    """``col2im`` (``F.fold``), the sum of overlapping patches: ``(…, C * kernel, positions)`` to ``(…, C, H, W)``."""
    padded = [size[i] + 2 * padding[i] for i in range(2)]
    rows, columns = (_places(padded[i], kernel[i], dilation[i], stride[i], x.device) for i in range(2))
    lead, channels = x.shape[:-2], x.shape[-2] // (kernel[0] * kernel[1])
    patches = x.reshape(*lead, channels, kernel[0], kernel[1], rows.shape[1], columns.shape[1])
    flat = rows[:, None, :, None] * padded[1] + columns[None, :, None, :]
    image = x.new_zeros(*lead, channels, padded[0] * padded[1]).index_add(-1, flat.flatten(), patches.flatten(-4))
    image = image.reshape(*lead, channels, *padded)
    return image.narrow(-2, padding[0], size[0]).narrow(-1, padding[1], size[1])


DECOMPOSED: dict[Any, Any] = {_aten.constant_pad_nd.default: _pad}
"""What a trace writes out, also where a derivative has it."""

RESIZING = {
    operation: formula
    for operation, formula in decomposition_table.items()
    if operation.name().startswith(("aten::upsample_", "aten::_upsample_nearest"))
    and "backward" not in operation.name()
}
"""Torch's own formulas of them are lookups and sums, whose derivatives leave the batch free."""

DIFFERENTIABLE: dict[Any, Any] = {
    _aten.copy.default: _copy,
    _aten.im2col.default: _im2col,
    _aten.col2im.default: _col2im,
    **RESIZING,
}
"""What takes the place of operations in a region before it is differentiated."""

__all__ = ["DECOMPOSED", "DIFFERENTIABLE"]
