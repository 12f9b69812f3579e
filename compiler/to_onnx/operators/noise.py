"""Rules of Onward's own operators that make random numbers (`passes.ops`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ....passes.errors import ExportError
from ....passes.graph import Layout
from ....passes.tie_blocks import grid
from .. import random
from ..emit import NUMPY, Emission, Value, rule
from ..random import CAPTURE, MODEL, Stream
from .pointwise import out_type


def _ids(e: Emission, copies: Value) -> tuple[int, ...]:
    """The ids of copies or draws, which are constants of an exported graph."""
    return e.copies[str(copies)]


def _samples(e: Emission) -> Any:
    """The batch size of the graph: a value, or 1 where nothing depends on it."""
    names = [name for name in e.sizes if name.isidentifier()]
    return e.sizes[names[0]] if names else 1


def _times(e: Emission, count: int, samples: Any) -> str:
    """``count * samples`` as an int64 scalar."""
    if isinstance(samples, int):
        return e.b.constant(count * samples, np.int64)
    return samples if count == 1 else e.op("Mul", samples, e.b.constant(count, np.int64))


def elements(e: Emission, sizes: Sequence[int], dim: int) -> tuple[str, int]:
    """Numbers of one draw of a clean tensor, and how many of them a sample has."""
    count = math.prod(sizes)
    return _times(e, count, _samples(e) if dim >= 0 else 1), count


def _numbers(
    e: Emission, key: str, site: int, noise: str, draws: Sequence[int], sizes: Sequence[int], dim: int,
    dtype: torch.dtype, scale: str | None = None,
) -> str:  # fmt: skip
    """Noise of the `draws` times `scale`, ``(D, elements)``."""
    total, count = elements(e, sizes, dim)
    one_bit = noise == "rademacher"
    made = None if e.noise is None else e.noise.get((site, noise))
    if made is None:
        (found,) = random.words(e.b, key, draws, [Stream(site, total, one_bit)])
    else:
        found, held = made
        if tuple(draws) != tuple(held):
            start = held.index(draws[0])
            assert tuple(held[start : start + len(draws)]) == tuple(draws), "draws of a chunk follow each other"
            found = e.slice(found, 0, start, start + len(draws))
    if one_bit:
        return random.signs(e.b, found, scale, total, count % 8 == 0, NUMPY[dtype])
    numbers = e.cast(random.numbers(e.b, found, noise, total), torch.float32, dtype)
    return numbers if scale is None else e.op("Mul", numbers, scale)


def _draws_and_signs(ids: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """The distinct draws, and for each copy its draw's place and sign."""
    draws: list[int] = []
    carried = []
    for identity in ids:
        draw, sign = (identity, 1) if identity >= 0 else (~identity, -1)
        if draw not in draws:
            draws.append(draw)
        carried.append((draws.index(draw), sign))
    return draws, carried


def _runs(carried: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """Copies that follow each other in number and in draw: (first copy, copies, first draw, sign)."""
    found: list[tuple[int, int, int, int]] = []
    for copy, (draw, sign) in enumerate(carried):
        if found and found[-1][3] == sign and found[-1][2] + found[-1][1] == draw:
            first, count, start, _ = found[-1]
            found[-1] = (first, count + 1, start, sign)
        else:
            found.append((copy, 1, draw, sign))
    return found


class _Form:
    """A tensor with copies as ``(rows, copies, samples, inner)``, and without rows where there is one."""

    def __init__(self, e: Emission, sizes: Sequence[int], dim: int, outer: int) -> None:
        self.e, self.sizes, self.dim = e, list(sizes), dim
        self.samples = _samples(e) if dim >= 0 else 1
        self.rows = math.prod(sizes[:dim]) * outer if dim >= 0 else 1
        self.inner = (sizes[dim] // outer * math.prod(sizes[dim + 1 :])) if dim >= 0 else math.prod(sizes)
        self.axis = 0 if self.rows == 1 else 1
        """Of the copies."""

    def opened(self, x: str, copies: int) -> str:
        """A clean or tiled tensor, in the shape of this form."""
        lead = [] if self.rows == 1 else [self.rows]
        return self.e.op("Reshape", x, self._shape([*lead, copies], self.inner))

    def of_draws(self, numbers: str, draws: int) -> str:
        """Numbers ``(D, elements)``, in this form."""
        if self.rows == 1:
            return self.e.op("Reshape", numbers, self._shape([draws], self.inner))
        split = self.e.op("Reshape", numbers, self._shape([draws, self.rows], self.inner))
        return self.e.op("Transpose", split, perm=[1, 0, 2, 3])

    def _shape(self, before: list[int], inner: int) -> str:
        known = self.samples if isinstance(self.samples, int) else -1
        return self.e.b.ints([*before, known, inner])

    def closed(self, x: str, copies: int) -> str:
        """Back in the shape of the tensor, with so many copies."""
        if self.dim < 0:
            return self.e.op("Reshape", x, self.e.b.ints(self.sizes))
        shape = list(self.sizes)
        known = isinstance(self.samples, int)
        shape[self.dim] = shape[self.dim] * copies * self.samples if known else -1
        return self.e.op("Reshape", x, self.e.b.ints(shape))

    def per_sample(self, weights: str, count: int) -> str:
        """Numbers ``(copies, samples)`` that broadcast against the form."""
        lead = [] if self.rows == 1 else [1]
        return self.e.op("Reshape", weights, self._shape([*lead, count], 1))


@rule("onward.perturb.default")
def _perturb(
    e: Emission, node: fx.Node, z: Value, copies: Value, key: Value, sigmas: Value, site: int, noise: str,
    sizes: Sequence[int], dim: int, outer: int, tiled: bool, alive: Value | None = None,
    blocks: Sequence[int] | None = None,
) -> str:  # fmt: skip
    draws, carried = _draws_and_signs(_ids(e, copies))
    dtype = out_type(node)
    chosen = e.op("Gather", sigmas, e.b.constant(site, np.int64), axis=0)
    scale = e.cast(chosen, sigmas.dtype, dtype)
    form = _Form(e, sizes, dim, outer)
    if blocks:
        fine = Layout(tuple(sizes), dim, outer)
        coarse = grid(fine, tuple(blocks))
        values = _numbers(e, key, site, noise, draws, coarse.sizes, dim, dtype, scale)
        values = _spread(e, values, len(draws), fine, coarse, blocks)
    else:
        values = _numbers(e, key, site, noise, draws, sizes, dim, dtype, scale)
    values = form.of_draws(values, len(draws))
    if alive is not None:
        values = e.op("Mul", values, form.opened(e.as_type(alive, dtype), 1))
    origin = form.opened(z, len(carried) if tiled else 1)
    parts = []
    for first, count, start, sign in _runs(carried):
        own = values if count == len(draws) else e.slice(values, form.axis, start, start + count)
        base = e.slice(origin, form.axis, first, first + count) if tiled and count < len(carried) else origin
        parts.append(e.op("Add" if sign > 0 else "Sub", base, own))
    together = parts[0] if len(parts) == 1 else e.op("Concat", *parts, axis=form.axis)
    return form.closed(together, len(carried))


def _spread(e: Emission, values: str, draws: int, fine: Layout, coarse: Layout, blocks: Sequence[int]) -> str:
    """Numbers of blocks ``(D, blocks)`` as numbers of coordinates ``(D, elements)``."""
    samples = _samples(e)
    known = samples if isinstance(samples, int) else -1
    extents = list(coarse.extents)
    opened = e.op("Reshape", values, e.b.ints([draws, *_opened(extents, fine.dim, known)]))
    if all(extent % block == 0 for extent, block in zip(fine.extents, blocks, strict=True)):  # five times faster
        within = [draws, *_opened(extents, fine.dim, known)]
        tied = [1, *_opened(blocks, fine.dim, 1)]
        pairs = [size for pair in zip(within, [1] * len(tied), strict=True) for size in pair]
        wide = [size for pair in zip([1] * len(tied), tied, strict=True) for size in pair]
        opened = e.op("Expand", e.op("Reshape", opened, e.b.ints(pairs)), e.b.ints(wide))
    else:
        places = [axis if axis <= fine.dim else axis + 1 for axis in range(len(blocks))]
        for place, extent, block in zip(places, fine.extents, blocks, strict=True):
            if block > 1:
                opened = e.op("Gather", opened, e.b.ints(np.arange(extent) // block), axis=place + 1)
    return e.op("Reshape", opened, e.b.ints([draws, -1]))


def _opened(axes: Sequence[int], dim: int, samples: int) -> list[int]:
    """The axes of a sample with the samples between the two of the batch dimension."""
    return [*axes[: dim + 1], samples, *axes[dim + 1 :]]


@rule("onward.weighted_noise_sum.default")
def _weighted_noise_sum(
    e: Emission, node: fx.Node, weights: Value, draws: Value, key: Value, site: int, noise: str, score: str,
    sizes: Sequence[int], dim: int, outer: int,
) -> str:  # fmt: skip
    ids = _ids(e, draws)
    assert all(draw >= 0 for draw in ids)
    form = _Form(e, sizes, dim, outer)
    numbers = _numbers(e, key, site, noise, ids, sizes, dim, weights.dtype)
    values = form.of_draws(random.score(e.b, noise, score, numbers, NUMPY[weights.dtype]), len(ids))
    factors = weights if dim >= 0 else e.op("ReduceSum", weights, e.b.ints([1]), keepdims=1)
    weighted = e.op("Mul", values, form.per_sample(factors, len(ids)))
    return form.closed(e.op("ReduceSum", weighted, e.b.ints([form.axis]), keepdims=1), 1)


@rule("onward.weighted_noise.default")
def _weighted_noise(
    e: Emission, node: fx.Node, weights: Value, copies: Value, key: Value, site: int, noise: str, score: str,
    sizes: Sequence[int], dim: int, outer: int,
) -> str:  # fmt: skip
    draws, carried = _draws_and_signs(_ids(e, copies))
    form = _Form(e, sizes, dim, outer)
    numbers = _numbers(e, key, site, noise, draws, sizes, dim, weights.dtype)
    values = form.of_draws(random.score(e.b, noise, score, numbers, NUMPY[weights.dtype]), len(draws))
    factors = weights if dim >= 0 else e.op("ReduceSum", weights, e.b.ints([1]), keepdims=1)
    signed = e.op("Mul", factors, e.b.constant([[sign] for _, sign in carried], NUMPY[weights.dtype]))
    opened = form.per_sample(signed, len(carried))
    parts = []
    for first, count, start, _ in _runs(carried):
        own = values if count == len(draws) else e.slice(values, form.axis, start, start + count)
        by = opened if count == len(carried) else e.slice(opened, form.axis, first, first + count)
        parts.append(e.op("Mul", own, by))
    together = parts[0] if len(parts) == 1 else e.op("Concat", *parts, axis=form.axis)
    return form.closed(together, len(carried))


@rule("onward.keyed_random.default")
def _keyed_random(
    e: Emission, node: fx.Node, key: Value, op: int, distribution: str, size: Sequence[Any], dtype: torch.dtype,
    device: Any,
) -> str:  # fmt: skip
    if dtype not in (torch.float32, torch.float64):
        raise ExportError(f"random numbers of {dtype} in the model: float32 and float64 are exported.")
    shape = e.shape(node.meta["val"].shape)
    total = e.op("ReduceProd", shape, e.b.ints([0]), keepdims=0)
    (found,) = random.words(e.b, key, [0], [Stream(op, total, False, MODEL)])
    numbers = e.cast(random.numbers(e.b, found, distribution, total), torch.float32, dtype)
    return e.op("Reshape", numbers, shape)


@rule("onward.stochastic_sign.default")
def _stochastic_sign(
    e: Emission, node: fx.Node, x: Value, scale: Value, copies: Value, key: Value, site: int, sizes: Sequence[int],
    dim: int, outer: int,
) -> str:  # fmt: skip
    ids = _ids(e, copies)
    draws = [2 * copy if copy >= 0 else 2 * ~copy + 1 for copy in ids]  # a copy and its twin have words of their own
    total, _ = elements(e, sizes, dim)
    (found,) = random.words(e.b, key, draws, [Stream(site, total, False, CAPTURE)])
    form = _Form(e, sizes, dim, outer)
    numbers = e.cast(random.numbers(e.b, found, "uniform", total), torch.float32, x.dtype)
    uniform = form.closed(form.of_draws(numbers, len(draws)), len(draws))
    kept = e.op("Less", e.op("Mul", uniform, scale), e.op("Abs", x))
    return e.op("Mul", e.op("Sign", x), e.cast(kept, torch.bool, x.dtype))
