"""Keyed random numbers in blocks: where the elements of a tensor are, which draws its copies use, and their numbers.

An element is a function of ``(seed, step, site, draw, element)`` alone (see `philox`), so numbers are never stored:
they are made where they are used, in blocks that fit in a cache. On a CPU the blocks are NumPy arrays, which cost less
a call than tensors; elsewhere they are tensors. Both come from the same formulas with identical bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .distributions import Array, Distribution
from .philox import Key, Lanes, philox_lanes, philox_lanes_numpy
from .words import words_on

NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


Tile = tuple[slice, slice, slice]
"""Ranges of rows, samples and inner elements that are consecutive elements of a clean tensor."""


class Limits(NamedTuple):
    """How much is made at once: elements of one draw in a tile, Philox blocks, and one-bit numbers in one piece."""

    elements: int
    blocks: int
    numbers: int


CPU_LIMITS = Limits(elements=1 << 15, blocks=1 << 13, numbers=1 << 17)
"""Measured: half of a 1 MB second-level cache."""
DEVICE_LIMITS = Limits(elements=1 << 22, blocks=1 << 20, numbers=1 << 22)


class Layout(NamedTuple):
    """A clean tensor seen as ``(rows, samples, inner)``; its tiled form is ``(rows, copies, samples, inner)``."""

    rows: int
    samples: int
    inner: int

    def elements(self, tile: Tile) -> tuple[int, int]:
        """First element of a tile and the one after its last."""
        rows, samples, inner = tile
        start = (rows.start * self.samples + samples.start) * self.inner + inner.start
        return start, start + math.prod(part.stop - part.start for part in tile)

    def tiles(self, capacity: int) -> Iterator[Tile]:
        """Index triples that cut it into ranges of at most `capacity` consecutive elements, in order."""
        if self.samples * self.inner <= capacity:
            steps = (max(1, capacity // max(1, self.samples * self.inner)), max(1, self.samples), max(1, self.inner))
        elif self.inner <= capacity:
            steps = (1, capacity // max(1, self.inner), self.inner)
        else:
            steps = (1, 1, capacity)
        for row in range(0, self.rows, steps[0]):
            for sample in range(0, self.samples, steps[1]):
                for inner in range(0, self.inner, steps[2]):
                    yield (
                        slice(row, min(row + steps[0], self.rows)),
                        slice(sample, min(sample + steps[1], self.samples)),
                        slice(inner, min(inner + steps[2], self.inner)),
                    )


class Batch(NamedTuple):
    """Random words that are made at once, and what they are for."""

    i: int
    j: int
    """Draws ``i … j - 1``."""
    first: int
    num_blocks: int
    tiles: tuple[tuple[Tile, tuple[int, ...], int, int], ...]
    """Each tile with its shape, and the range of its elements counted from the first block's first."""


def _schedule(layout: Layout, num_draws: int, per_block: int, limits: Limits) -> tuple[Batch, ...]:
    """Words for several tiles at once, as `Limits` allows; tile after tile, for each the draws in order."""
    tiles = list(layout.tiles(limits.elements))
    together = max(1, limits.blocks * per_block // (limits.elements * max(1, num_draws)))
    schedule = []
    for at in range(0, len(tiles), together):
        spans = [(tile, *layout.elements(tile)) for tile in tiles[at : at + together]]
        first = spans[0][1] // per_block
        num_blocks = -(-spans[-1][2] // per_block) - first
        origin = first * per_block
        parts = tuple(
            (tile, tuple(part.stop - part.start for part in tile), begin - origin, end - origin)
            for tile, begin, end in spans
        )
        group = max(1, limits.blocks // num_blocks)
        for i in range(0, num_draws, group):
            schedule.append(Batch(i, min(i + group, num_draws), first, num_blocks, parts))
    return tuple(schedule)


_known_schedule = lru_cache(maxsize=256)(_schedule)
_LONG = 64
"""Schedules of more tiles are not kept: they cost little beside the numbers, and memory."""


class Run(NamedTuple):
    """Draws ``start … stop - 1`` of a list belong to the copies from number `copy` on, all with this `sign`."""

    start: int
    stop: int
    copy: int
    sign: int


@lru_cache(maxsize=256)
def copy_runs(copies: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[Run, ...]]:
    """The distinct draws of copy ids, in order of appearance, and which copies they belong to.

    ``(d0, …, ~d0, …)`` and all-nonnegative ids give two runs and one run; any other order gives more.
    """
    positions: dict[int, int] = {}
    runs: list[Run] = []
    for copy, identity in enumerate(copies):
        sign, draw = (1, identity) if identity >= 0 else (-1, ~identity)
        position = positions.setdefault(draw, len(positions))
        if runs and runs[-1].stop == position and runs[-1].sign == sign:
            runs[-1] = runs[-1]._replace(stop=position + 1)
        else:
            runs.append(Run(position, position + 1, copy, sign))
    return tuple(positions), tuple(runs)


@lru_cache(maxsize=256)
def carriers(copies: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
    """Tables for loops over draws: the distinct draws of copy ids (D), where each one's carriers start (D + 1), and the
    carriers (K): twice the number of a copy, plus one for a twin."""
    carried: dict[int, list[int]] = {}
    for copy, identity in enumerate(copies):
        carried.setdefault(identity if identity >= 0 else ~identity, []).append(2 * copy + (identity < 0))
    starts = accumulate((len(each) for each in carried.values()), initial=0)
    return list(carried), list(starts), [carrier for each in carried.values() for carrier in each]


def capture_draws(copies: Sequence[int]) -> list[int]:
    """The draws of stochastic captures: a copy and its twin use separate random numbers."""
    return [2 * copy if copy >= 0 else 2 * ~copy + 1 for copy in copies]


def runs_within(runs: Sequence[Run], i: int, j: int) -> Iterator[tuple[slice, slice, int]]:
    """For the draws ``i … j - 1`` of a piece: which of its draws, for which copies, with which sign."""
    for run in runs:
        first, last = max(run.start, i), min(run.stop, j)
        if first < last:
            offset = run.copy - run.start
            yield slice(first - i, last - i), slice(first + offset, last + offset), run.sign


def layout_of(sizes: Sequence[int], dim: int, outer: int, samples: int) -> Layout:
    """The layout of a clean tensor (see `onward.passes.ops`); without a batch dimension there is one sample."""
    if dim < 0:
        return Layout(1, 1, math.prod(sizes))
    return Layout(math.prod(sizes[:dim]) * outer, samples, sizes[dim] // outer * math.prod(sizes[dim + 1 :]))


@lru_cache(maxsize=8)
def _signs_of_bytes(dtype: type[np.generic], scale: float) -> Array:
    """A table (256, 8): the bits of a byte, lowest first, as ``±scale``."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits == 1, scale, -scale).astype(dtype)


def on_host(device: torch.device) -> bool:
    """Whether numbers for `device` are made with NumPy and their scale is known to Python."""
    return device.type == "cpu"


class Source:
    """The numbers of several draws of one stream, multiplied by `scale`, in pieces (draws, elements) of `dtype`.

    The pieces are NumPy arrays if `use_numpy` (float32 or float64, on a CPU only), else tensors on `device`. They may
    share memory with later ones: use each before asking for the next. `limits` changes the pieces and never a number.
    """

    def __init__(
        self,
        distribution: Distribution,
        draws: Sequence[int],
        key: Key,
        dtype: torch.dtype,
        device: torch.device,
        scale: float | Tensor = 1.0,
        limits: Limits | None = None,
    ) -> None:
        self.distribution = distribution
        self.draws = draws
        self.key = key
        self.dtype = dtype
        self.scale = scale
        self.device = device
        self.on_cpu = on_host(device)
        self.use_numpy = self.on_cpu and dtype in NUMPY_DTYPES
        self.limits = limits or (CPU_LIMITS if self.on_cpu else DEVICE_LIMITS)

    def of(self, draws: Sequence[int]) -> Source:
        """The same numbers of other draws."""
        return Source(self.distribution, draws, self.key, self.dtype, self.device, self.scale, self.limits)

    def pieces(self, layout: Layout) -> Iterator[tuple[int, int, Tile, Array]]:
        """``(i, j, tile, numbers)``, numbers (draws i … j - 1, rows, samples, inner) of one tile of the layout after
        another.

        Random words are made for several tiles at once, numbers for several draws of one tile.
        """
        per_block = self.distribution.elements_per_block
        make = _schedule if math.prod(layout) > _LONG * self.limits.elements else _known_schedule
        for i, j, first, num_blocks, tiles in make(layout, len(self.draws), per_block, self.limits):
            numbers_of = self._numbers(self.draws[i:j], first, num_blocks)
            for tile, shape, begin, end in tiles:
                for a, b, numbers in numbers_of(begin, end):
                    yield i + a, i + b, tile, numbers.reshape(b - a, *shape)

    def _numbers(self, draws: Sequence[int], first: int, num_blocks: int) -> _Numbers:
        """The numbers of some blocks, as a function of a range of their elements."""
        if not self.on_cpu:
            ids = words_on(draws, self.device).to(torch.int64)
            return self._sampled(numbers_from_lanes(self.distribution, philox_lanes(ids, first, num_blocks, self.key)))
        lanes = philox_lanes_numpy(draws, first, num_blocks, self.key)
        if self.distribution.sample is None:
            return self._one_bit(lanes)
        low, mid, high, top = (lane.astype(np.uint32).view(np.int32) for lane in lanes)
        return self._sampled(self.distribution.sample((low, mid, high, top)))

    def _sampled(self, numbers: Array) -> _Numbers:
        numbers = self._finished(numbers)

        def numbers_of(begin: int, end: int) -> Iterator[tuple[int, int, Array]]:
            yield 0, len(numbers), numbers[:, begin:end]

        return numbers_of

    def _one_bit(self, lanes: Lanes) -> _Numbers:
        """Signs by table: eight numbers of a byte are one copy of 32 (or 64) bytes."""
        words = np.empty((*lanes[0].shape, 4), "<u4")
        for lane, values in enumerate(lanes):
            words[..., lane] = values
        octets = words.view(np.uint8).reshape(len(words), -1)
        table = _signs_of_bytes(NUMPY_DTYPES[self.dtype], float(self.scale)) if self.use_numpy else _UNIT_SIGNS

        def numbers_of(begin: int, end: int) -> Iterator[tuple[int, int, Array]]:
            part = octets[:, begin // 8 : -(-end // 8)]
            num_draws, num_bytes = part.shape
            group = min(num_draws, max(1, self.limits.numbers // (8 * num_bytes)))
            scratch = np.empty((group, num_bytes, 8), table.dtype)
            for i in range(0, num_draws, group):
                j = min(i + group, num_draws)
                signs = scratch[: j - i]
                np.take(table, part[i:j].astype(np.intp), axis=0, out=signs, mode="clip")
                numbers = signs.reshape(j - i, num_bytes * 8)[:, begin % 8 : begin % 8 + end - begin]
                yield i, j, numbers if self.use_numpy else self._finished(numbers)

        return numbers_of

    def _finished(self, numbers: Array) -> Array:
        """float32 `numbers` in the dtype asked for, scaled."""
        if self.use_numpy:
            numbers = numbers.astype(NUMPY_DTYPES[self.dtype], copy=False)
        else:
            numbers = (torch.from_numpy(numbers) if isinstance(numbers, np.ndarray) else numbers).to(self.dtype)
        return numbers if isinstance(self.scale, float) and self.scale == 1.0 else numbers * self.scale


_Numbers = Callable[[int, int], Iterator[tuple[int, int, Array]]]
_UNIT_SIGNS = _signs_of_bytes(np.float32, 1.0)


def numbers_from_lanes(distribution: Distribution, lanes: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The float32 numbers (D, elements) of int64 lanes (D, B): the definition, for tensors on any device."""
    if distribution.sample is not None:
        numbers: Tensor = distribution.sample(tuple(lane.to(torch.int32) for lane in lanes))  # type: ignore[arg-type]
        return numbers
    bits = torch.stack(lanes, -1)[..., None] >> torch.arange(32, device=lanes[0].device) & 1
    return (bits * 2 - 1).to(torch.float32).reshape(lanes[0].shape[0], -1)
