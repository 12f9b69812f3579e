"""Blocks of positions that share a number (method.md 12): the operators that go from blocks to coordinates and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...passes import ops as _declarations  # noqa: F401  (declares what is implemented here)
from ...passes.graph import Layout
from ...passes.tie_blocks import grid


def spread(x: Tensor, layout: Layout, blocks: Sequence[int], samples: int) -> Tensor:
    """``(leading, one element a block)`` of any dtype as ``(leading, one element a coordinate)``: every coordinate has
    its block's element. Both are of `samples` samples, clean but for the leading dimension, and contiguous."""
    leading = x.shape[0]
    values = x.reshape(leading, *_opened(grid(layout, tuple(blocks)), samples))
    for axis, extent, block in reversed(list(_tied(layout, blocks))):
        index = torch.arange(extent, device=x.device) // block
        values = values.index_select(axis + 1, index)
    return values.reshape(leading, *_closed(layout, samples))


def spread_blocks(x: Tensor, sizes: Sequence[int], dim: int, outer: int, blocks: Sequence[int]) -> Tensor:
    """`spread` of one tensor, ``x`` being clean with one element a block; the result has the clean shape `sizes`."""
    layout = Layout(tuple(sizes), dim, outer)
    samples = x.shape[dim] // grid(layout, tuple(blocks)).sizes[dim]
    return spread(x[None], layout, blocks, samples)[0]


def count_blocks(
    like: Tensor, alive: Tensor | None, sizes: Sequence[int], dim: int, outer: int, blocks: Sequence[int]
) -> Tensor:
    """How many coordinates of every block are alive; all of them where `alive`, boolean of the clean shape, is None.

    `like` is floating, clean with one element a block; the result has its shape and dtype.
    """
    layout = Layout(tuple(sizes), dim, outer)
    coarse = grid(layout, tuple(blocks))
    samples = like.shape[dim] // coarse.sizes[dim]
    wide = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32  # to count beyond 256
    if alive is None:
        counts = torch.ones(_opened(layout, 1), dtype=wide, device=like.device)
    else:
        counts = alive.reshape(_opened(layout, samples)).to(wide)
    for axis, extent, block in _tied(layout, blocks):
        missing = -extent % block
        padded = F.pad(counts, [0, 0] * (counts.dim() - 1 - axis) + [0, missing]) if missing else counts
        counts = padded.unflatten(axis, (-1, block)).sum(axis + 1)
    return counts.expand(_opened(coarse, samples)).reshape(like.shape).to(like.dtype).contiguous()


def _tied(layout: Layout, blocks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Axis (of the opened tensor), extent and block of every axis that is tied."""
    places = [axis if axis <= layout.dim else axis + 1 for axis in range(len(blocks))]
    return [entry for entry in zip(places, layout.extents, blocks, strict=True) if entry[2] > 1]


def _opened(layout: Layout, samples: int) -> list[int]:
    """The shape of a clean tensor with its batch dimension as three: (outer, samples, inner)."""
    extents = list(layout.extents)
    return [*extents[: layout.dim + 1], samples, *extents[layout.dim + 1 :]]


def _closed(layout: Layout, samples: int) -> list[int]:
    shape = list(layout.sizes)
    shape[layout.dim] *= samples
    return shape


for _function in (spread_blocks, count_blocks):
    torch.library.impl(f"onward::{_function.__name__}", "CompositeExplicitAutograd", _function)
