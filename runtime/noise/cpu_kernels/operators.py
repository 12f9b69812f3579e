"""The operators of noise on a CPU (method.md 1, 2, 3, 9): from tensors to the flat arrays of `compiled`.

Each has the definition's arguments and gives its bits, for calls that its row of `table` takes. A call for a small
tensor takes a few microseconds in all, so that every line here counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ....passes import graph, ops
from ..operators import scale_of
from ..philox import MASK, MAX_SITES, Purpose
from ..source import NUMPY_DTYPES, Layout, capture_draws, carriers, layout_of, on_host
from . import compiled

Array = np.ndarray[Any, Any]


def words_of(key: Tensor, site: int, purpose: Purpose) -> tuple[int, int, int, int]:
    """``site_word, step`` and the seed's two halves, as `philox.Key` has them."""
    assert 0 <= site < MAX_SITES, site
    seed, step = key.tolist()
    return site | purpose << 24, step & MASK, seed & MASK, seed >> 32 & MASK


@lru_cache(maxsize=256)
def carriers_of(copies: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """`carriers` as int64 tables, the draws as words."""
    draws, starts, carried = carriers(copies)
    return _table(draw & MASK for draw in draws), _table(starts), _table(carried)


def _table(values: Any) -> Array:
    return np.array(list(values), np.int64)


def flat(x: Tensor) -> Array:
    """The elements of a tensor in order; shares memory with a contiguous one."""
    x = x.detach() if x.requires_grad else x
    return (x if x.is_contiguous() else x.contiguous()).numpy().reshape(-1)


def _flat(result: Tensor) -> Array:
    """`flat` for a new tensor, which has no gradient and no gaps."""
    numbers: Array = result.numpy().reshape(-1)
    return numbers


def perturb(
    z: Tensor, copies: Tensor, key: Tensor, sigmas: Tensor, site: int, noise: str, sizes: Sequence[int], dim: int,
    outer: int, tiled: bool, alive: Tensor | None = None, blocks: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """`runtime.noise.operators.perturb`."""
    ids = tuple(copies.tolist())
    rows, shape = 1, list(z.shape)
    if dim >= 0:
        rows = math.prod(shape[:dim]) * outer
        shape[dim] *= 1 if tiled else len(ids)
    result = z.new_empty(shape)
    mask = _NONE if alive is None else flat(alive).view(np.uint8)
    how = (
        len(ids), compiled.CODES[noise], scale_at(sigmas, site, z), *carriers_of(ids),
        *words_of(key, site, Purpose.NOISE),
    )  # fmt: skip
    if blocks:
        of = tied(tuple(sizes), dim, outer, tuple(blocks))
        samples = result.numel() // max(1, len(ids) * of.elements)
        compiled.perturb_tied(
            flat(z), _flat(result), mask, alive is not None, tiled,
            of.rows, of.inner, samples, of.coarse_rows, of.coarse_inner, *how,
        )  # fmt: skip
    else:
        span = result.numel() // max(1, rows * len(ids))
        compiled.perturb(flat(z), _flat(result), mask, alive is not None, tiled, rows, span, *how)
    return result


_NONE = np.empty(0, np.uint8)


class Blocks(NamedTuple):
    """The blocks of a layout's elements (`passes.tie_blocks`): by row and by inner element its block's, and how many
    rows and inner elements the blocks have."""

    rows: Array
    inner: Array
    coarse_rows: int
    coarse_inner: int

    @property
    def elements(self) -> int:
        """Elements a sample."""
        return self.rows.size * self.inner.size


@lru_cache(maxsize=256)
def tied(sizes: tuple[int, ...], dim: int, outer: int, blocks: tuple[int, ...]) -> Blocks:
    """The blocks of a layout with a batch dimension."""
    extents = graph.Layout(sizes, dim, outer).extents
    counts = [-(-extent // block) for extent, block in zip(extents, blocks, strict=True)]
    split = dim + 1
    rows, inner = (_table_of(extents[part], blocks[part]) for part in (slice(split), slice(split, None)))
    return Blocks(rows, inner, math.prod(counts[:split]), math.prod(counts[split:]))


def _table_of(extents: Sequence[int], blocks: Sequence[int]) -> Array:
    """By element of these axes, in order, the number of its block."""
    found = np.zeros(1, np.int64)
    for extent, block in zip(extents, blocks, strict=True):
        found = (found[:, None] * -(-extent // block) + np.arange(extent) // block).reshape(-1)
    return found


def count_blocks(
    like: Tensor, alive: Tensor | None, sizes: Sequence[int], dim: int, outer: int, blocks: Sequence[int]
) -> Tensor:
    """`runtime.noise.blocks.count_blocks`, of a mask."""
    assert alive is not None
    of = tied(tuple(sizes), dim, outer, tuple(blocks))
    counts = torch.zeros(like.shape, dtype=like.dtype)
    compiled.count_blocks(
        flat(alive).view(np.uint8),
        _flat(counts),
        of.rows,
        of.inner,
        alive.numel() // max(1, of.elements),
        of.coarse_inner,
    )
    return counts


def scale_at(sigmas: Tensor, site: int, z: Tensor) -> float:
    """`noise.scale_of`, which takes longer than a small kernel."""
    host = sigmas.dtype in NUMPY_DTYPES and on_host(sigmas.device)
    scale: Any = NUMPY_DTYPES[z.dtype](sigmas.numpy()[site]) if host else scale_of(sigmas, site, z)
    return float(scale)


def _weights_and_layout(weights: Tensor, sizes: Sequence[int], dim: int, outer: int) -> tuple[Array, Layout]:
    """Weights (copies, samples), summed over the samples where there is no batch dimension; and the clean layout."""
    layout = layout_of(sizes, dim, outer, weights.shape[1])
    return flat(weights if dim >= 0 else weights.sum(1, keepdim=True)), layout


def weighted_noise_sum(
    weights: Tensor, draws: Tensor, key: Tensor, site: int, noise: str, score: str, sizes: Sequence[int], dim: int,
    outer: int,
) -> Tensor:  # fmt: skip
    """`runtime.noise.operators.weighted_noise_sum`."""
    factors, layout = _weights_and_layout(weights, sizes, dim, outer)
    result = torch.empty(ops.clean_shape(sizes, dim, layout.samples), dtype=weights.dtype)
    compiled.weighted_noise_sum(
        factors, _flat(result), *layout, compiled.CODES[noise], score == "sign",
        *carriers_of(tuple(draws.tolist())), *words_of(key, site, Purpose.NOISE),
    )  # fmt: skip
    return result


def weighted_noise(
    weights: Tensor, copies: Tensor, key: Tensor, site: int, noise: str, score: str, sizes: Sequence[int], dim: int,
    outer: int,
) -> Tensor:  # fmt: skip
    """`runtime.noise.operators.weighted_noise`."""
    factors, layout = _weights_and_layout(weights, sizes, dim, outer)
    num_copies = len(copies)
    result = torch.empty(ops.clean_shape(sizes, dim, layout.samples * num_copies), dtype=weights.dtype)
    compiled.weighted_noise(
        factors, _flat(result), *layout, num_copies, compiled.CODES[noise], score == "sign",
        *carriers_of(tuple(copies.tolist())), *words_of(key, site, Purpose.NOISE),
    )  # fmt: skip
    return result


def stochastic_sign(
    x: Tensor, scale: Tensor, copies: Tensor, key: Tensor, site: int, sizes: Sequence[int], dim: int, outer: int
) -> Tensor:
    """`runtime.noise.operators.stochastic_sign`."""
    num_copies = len(copies)
    layout = layout_of(sizes, dim, outer, x.shape[dim] // (sizes[dim] * num_copies) if dim >= 0 else 1)
    result = torch.empty(x.shape, dtype=x.dtype)
    behind = math.prod(x.shape[dim + 1 :]) if dim >= 0 else 1
    if scale.numel() == 1:
        values, inner = scale, max(2, x.numel())
    elif behind > 1 and scale.dim() == x.dim() and scale.numel() == scale.shape[dim] == x.shape[dim]:
        values, inner = scale, behind  # one a sample, say
    else:
        values, inner = scale.expand_as(x), 1
    draws = _table(draw & MASK for draw in capture_draws(copies.tolist()))
    compiled.stochastic_sign(
        flat(x), flat(values.to(x.dtype)), inner, _flat(result), layout.rows, layout.samples * layout.inner,
        draws, *words_of(key, site, Purpose.STOCHASTIC_CAPTURE),
    )  # fmt: skip
    return result


def keyed_random(
    key: Tensor, op: int, distribution: str, size: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`runtime.noise.operators.keyed_random`."""
    result = torch.empty(list(size), dtype=dtype)
    compiled.keyed_random(_flat(result), compiled.CODES[distribution], *words_of(key, op, Purpose.MODEL))
    return result
