"""Keyed noise: the operators of `onward.passes.ops` that make random numbers.

An element of noise is a function of ``(seed, step, site, draw, element)`` alone (see `philox`), so noise is never stored:
it is made again where it is used, in blocks that fit in a cache, and no operator holds more than a few megabytes beyond
its result. Antithetic twins (DESIGN equation 4) share one generated draw.

On a CPU the blocks are NumPy arrays, which cost less a call than tensors; elsewhere they are tensors. Both come from the same
formulas with identical bits. `copies`, `draws` and `key` are read on the host: keep them on the CPU, also for a model on
a GPU (a GPU tensor works but makes the host wait).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..passes import ops as ops
from ..passes.errors import OptionError, unknown_name
from .distributions import MODEL_DISTRIBUTIONS, UNIFORM, Array, Distribution, noise_named
from .philox import Key, Lanes, Purpose, philox_lanes, philox_lanes_numpy

_NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


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


def layout_of(sizes: Sequence[int], dim: int, outer: int, samples: int) -> Layout:
    """The layout of a clean tensor (see `onward.passes.ops`); without a batch dimension there is one sample."""
    if dim < 0:
        return Layout(1, 1, math.prod(sizes))
    return Layout(math.prod(sizes[:dim]) * outer, samples, sizes[dim] // outer * math.prod(sizes[dim + 1 :]))


def _check_copies(num_copies: int, dim: int) -> None:
    if dim < 0 and num_copies != 1:
        raise OptionError(f"a tensor without a batch dimension cannot hold {num_copies} copies; run it with one copy.")


def _key(key: Tensor, site: int, purpose: Purpose) -> Key:
    seed, step = key.tolist()
    return Key(seed, step, site, purpose)


@lru_cache(maxsize=8)
def _signs_of_bytes(dtype: type[np.generic], scale: float) -> Array:
    """A table (256, 8): the bits of a byte, lowest first, as ``±scale``."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits == 1, scale, -scale).astype(dtype)


class Source:
    """The numbers of several draws of one stream, multiplied by `scale`, in pieces (draws, elements) of `dtype`.

    The pieces are NumPy arrays if `use_numpy` (float32 or float64, on a CPU only), else tensors on `device`. They may share
    memory with later ones: use each before asking for the next. `limits` changes the pieces and never a number.
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
        self.on_cpu = device.type == "cpu"
        self.use_numpy = self.on_cpu and dtype in _NUMPY_DTYPES
        self.limits = limits or (CPU_LIMITS if self.on_cpu else DEVICE_LIMITS)

    def pieces(self, layout: Layout) -> Iterator[tuple[int, int, Tile, Array]]:
        """``(i, j, tile, numbers)``, numbers (draws i … j - 1, rows, samples, inner) of one tile of the layout after another.

        Random words are made for several tiles at once, numbers for several draws of one tile.
        """
        per_block = self.distribution.elements_per_block
        tiles = list(layout.tiles(self.limits.elements))
        together = max(1, self.limits.blocks * per_block // (self.limits.elements * max(1, len(self.draws))))
        for at in range(0, len(tiles), together):
            batch = tiles[at : at + together]
            start, stop = layout.elements(batch[0])[0], layout.elements(batch[-1])[1]
            first = start // per_block
            num_blocks = -(-stop // per_block) - first
            group = max(1, self.limits.blocks // num_blocks)
            for i in range(0, len(self.draws), group):
                numbers_of = self._numbers(self.draws[i : i + group], first, num_blocks)
                for tile in batch:
                    begin, end = layout.elements(tile)
                    shape = tuple(part.stop - part.start for part in tile)
                    for a, b, numbers in numbers_of(begin - first * per_block, end - first * per_block):
                        yield i + a, i + b, tile, numbers.reshape(b - a, *shape)

    def _numbers(self, draws: Sequence[int], first: int, num_blocks: int) -> _Numbers:
        """The numbers of some blocks, as a function of a range of their elements."""
        if not self.on_cpu:
            ids = torch.tensor(draws, dtype=torch.int64).to(self.device, non_blocking=True)
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
        table = _signs_of_bytes(_NUMPY_DTYPES[self.dtype], float(self.scale)) if self.use_numpy else _UNIT_SIGNS

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
            numbers = numbers.astype(_NUMPY_DTYPES[self.dtype], copy=False)
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


def _arrays(use_numpy: bool, *tensors: Tensor) -> tuple[Any, ...]:
    """The module to compute with, and the tensors as its arrays (sharing memory)."""
    if use_numpy:
        return (np, *(tensor.detach().numpy() for tensor in tensors))
    return (torch, *tensors)


def _runs_within(runs: Sequence[Run], i: int, j: int) -> Iterator[tuple[slice, slice, int]]:
    """For the draws ``i … j - 1`` of a piece: which of its draws, for which copies, with which sign."""
    for run in runs:
        first, last = max(run.start, i), min(run.stop, j)
        if first < last:
            offset = run.copy - run.start
            yield slice(first - i, last - i), slice(first + offset, last + offset), run.sign


@torch.library.impl("onward::perturb", "CompositeExplicitAutograd")
def perturb(
    z: Tensor,
    copies: Tensor,
    key: Tensor,
    sigmas: Tensor,
    site: int,
    noise: str,
    sizes: Sequence[int],
    dim: int,
    outer: int,
    tiled: bool,
) -> Tensor:
    """``z + sigmas[site] * noise`` for every copy (DESIGN equation 1).

    `z` is floating, clean or (`tiled`) tiled; `copies` int64 (K,), `key` int64 (2,), `sigmas` floating (sites,). The result is
    tiled, contiguous, of z's dtype; noise and scale are rounded to that dtype first. Where a scale is 0 the result is z,
    bit for bit. Raises UnknownNameError for a noise, OptionError for several copies without a batch dimension.
    """
    num_copies = copies.shape[0]
    _check_copies(num_copies, dim)
    in_z = num_copies if tiled else 1
    shape = list(z.shape)
    layout = layout_of(sizes, dim, outer, shape[dim] // (sizes[dim] * in_z) if dim >= 0 else 1)
    draws, runs = copy_runs(tuple(copies.tolist()))
    scale: Any = sigmas[site].to(z.dtype)
    if z.device.type == "cpu":
        scale = scale.item()
    if dim >= 0 and not tiled:
        shape[dim] *= num_copies
    result = torch.empty(shape, dtype=z.dtype, device=z.device)
    distribution = noise_named(noise)
    target = result.view(layout.rows, num_copies, layout.samples, layout.inner)
    clean = z.reshape(layout.rows, in_z, layout.samples, layout.inner)
    if isinstance(scale, float) and scale == 0.0:
        target.copy_(clean)
        return result
    source = Source(distribution, draws, _key(key, site, Purpose.NOISE), z.dtype, z.device, scale)
    xp, destination, origin = _arrays(source.use_numpy, target, clean)
    for i, j, (rows, samples, inner), numbers in source.pieces(layout):
        for piece, copy, sign in _runs_within(runs, i, j):
            operation = xp.add if sign > 0 else xp.subtract
            operation(
                origin[rows, copy if tiled else slice(None), samples, inner],
                numbers[piece].swapaxes(0, 1),
                out=destination[rows, copy, samples, inner],
            )
    if isinstance(scale, Tensor):  # without waiting for its value; -0.0 + 0.0 would be 0.0
        return torch.where(scale == 0.0, clean, target).view(shape)
    return result


@torch.library.impl("onward::tile", "CompositeExplicitAutograd")
def tile(x: Tensor, copies: Tensor, dim: int, outer: int) -> Tensor:
    """A clean tensor of any dtype repeated for every copy; contiguous. Raises OptionError as `perturb`."""
    num_copies = copies.shape[0]
    _check_copies(num_copies, dim)
    shape = list(x.shape)
    rows = 1
    if dim >= 0:
        rows = math.prod(shape[:dim]) * outer
        shape[dim] *= num_copies
    result = torch.empty(shape, dtype=x.dtype, device=x.device)
    inner = x.numel() // max(1, rows)
    result.view(rows, num_copies, inner).copy_(x.reshape(rows, 1, inner))
    return result


@torch.library.impl("onward::weighted_noise_sum", "CompositeExplicitAutograd")
def weighted_noise_sum(
    weights: Tensor,
    draws: Tensor,
    key: Tensor,
    site: int,
    noise: str,
    score: str,
    sizes: Sequence[int],
    dim: int,
    outer: int,
) -> Tensor:
    """The sum over d of ``weights[d, sample] * score(noise of draws[d])`` (DESIGN equations 1, 2 and 9).

    `weights` is floating (D, N), `draws` int64 (D,) of copy ids, `key` int64 (2,). The result is clean, contiguous, of the
    weights' dtype; narrower types than float32 are summed in float32. Without a batch dimension the weights are summed over the
    samples. Raises UnknownNameError for a noise or a score.
    """
    dtype = weights.dtype if weights.dtype in _NUMPY_DTYPES else torch.float32
    layout = layout_of(sizes, dim, outer, weights.shape[1])
    distinct, runs = copy_runs(tuple(draws.tolist()))
    source = Source(noise_named(noise), distinct, _key(key, site, Purpose.NOISE), dtype, weights.device)
    scored = source.distribution.score(score)
    wide = weights.detach().to(dtype)
    if dim < 0:
        wide = wide.sum(1, keepdim=True)
    if len(runs) != 1:
        folded = wide.new_zeros(len(distinct), wide.shape[1])
        for run in runs:
            folded[run.start : run.stop] += run.sign * wide[run.copy : run.copy + run.stop - run.start]
        wide = folded
    elif runs[0].sign < 0:
        wide = -wide
    result = torch.zeros(_clean_shape(sizes, dim, weights.shape[1]), dtype=dtype, device=weights.device)
    xp, total, factors = _arrays(source.use_numpy, result.view(layout), wide)
    for i, j, part, numbers in source.pieces(layout):
        values = numbers if scored is None else scored(numbers)
        total[part] += xp.einsum("dn,dpnq->pnq", factors[i:j, part[1]], values)
    return result.to(weights.dtype)


@torch.library.impl("onward::weighted_noise", "CompositeExplicitAutograd")
def weighted_noise(
    weights: Tensor,
    copies: Tensor,
    key: Tensor,
    site: int,
    noise: str,
    score: str,
    sizes: Sequence[int],
    dim: int,
    outer: int,
) -> Tensor:
    """``weights[k, sample] * score(noise of copies[k])`` for every copy (DESIGN equations 1 and 2, capture a copy).

    As `weighted_noise_sum`, with weights (K, N) and a tiled result. Raises OptionError also as `perturb`.
    """
    num_copies = copies.shape[0]
    _check_copies(num_copies, dim)
    layout = layout_of(sizes, dim, outer, weights.shape[1])
    draws, runs = copy_runs(tuple(copies.tolist()))
    source = Source(noise_named(noise), draws, _key(key, site, Purpose.NOISE), weights.dtype, weights.device)
    scored = source.distribution.score(score)
    signed = weights.detach() if dim >= 0 else weights.detach().sum(1, keepdim=True)
    if any(run.sign < 0 for run in runs):
        signed = signed.clone()
        for run in runs:
            signed[run.copy : run.copy + run.stop - run.start] *= run.sign
    shape = _clean_shape(sizes, dim, weights.shape[1])
    if dim >= 0:
        shape[dim] *= num_copies
    result = torch.empty(shape, dtype=weights.dtype, device=weights.device)
    target = result.view(layout.rows, num_copies, layout.samples, layout.inner)
    xp, destination, factors = _arrays(source.use_numpy, target, signed)
    for i, j, (rows, samples, inner), numbers in source.pieces(layout):
        values = numbers if scored is None else scored(numbers)
        for piece, copy, _sign in _runs_within(runs, i, j):
            xp.multiply(
                values[piece].swapaxes(0, 1),
                factors[None, copy, samples, None],
                out=destination[rows, copy, samples, inner],
            )
    return result


@torch.library.impl("onward::keyed_random", "CompositeExplicitAutograd")
def keyed_random(
    key: Tensor, op: int, distribution: str, size: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Random numbers of the model's own operation `op`: "uniform" on [0, 1) or "normal"; the same for every copy of a step.

    `dtype` is floating. Uniform numbers have 24 bits, or as many as a narrower dtype holds, so that 1 never appears.
    Raises UnknownNameError for a distribution, OptionError for another dtype.
    """
    if distribution not in MODEL_DISTRIBUTIONS:
        raise unknown_name("distribution", distribution, MODEL_DISTRIBUTIONS)
    if not dtype.is_floating_point:
        raise OptionError(f"random numbers of dtype {dtype} are not supported; draw floating-point ones and convert them.")
    row = MODEL_DISTRIBUTIONS[distribution]
    result = torch.empty(list(size), dtype=dtype, device=device)
    steps = 1.0 / torch.finfo(dtype).eps * 2.0
    truncated = row is UNIFORM and steps < 2.0**24
    wide = dtype if dtype in _NUMPY_DTYPES else torch.float32
    source = Source(row, (0,), _key(key, op, Purpose.MODEL), wide, result.device)
    xp, destination = _arrays(source.use_numpy and wide == dtype, result.view(-1))
    for _, _, (_, _, inner), numbers in source.pieces(Layout(1, 1, result.numel())):
        values = numbers.reshape(-1)
        if wide != dtype:
            values = torch.from_numpy(values) if source.use_numpy else values
            values = torch.floor(values * steps) / steps if truncated else values
        destination[inner] = values
    return result


@torch.library.impl("onward::stochastic_sign", "CompositeExplicitAutograd")
def stochastic_sign(
    x: Tensor,
    scale: Tensor,
    copies: Tensor,
    key: Tensor,
    site: int,
    sizes: Sequence[int],
    dim: int,
    outer: int,
) -> Tensor:
    """``sign(x)`` with probability ``|x| / scale`` (at most 1), else 0; unbiased times `scale` where ``|x| <= scale`` (equation 3).

    `x` is floating and tiled, `scale` >= 0 broadcasts against it, the result is like x, contiguous. A copy and its twin use
    separate random numbers. The probability is a multiple of 2^-24. Raises OptionError as `perturb`.
    """
    num_copies = copies.shape[0]
    _check_copies(num_copies, dim)
    layout = layout_of(sizes, dim, outer, x.shape[dim] // (sizes[dim] * num_copies) if dim >= 0 else 1)
    wide = x.dtype if x.dtype in _NUMPY_DTYPES else torch.float32
    draws = [2 * copy if copy >= 0 else 2 * ~copy + 1 for copy in copies.tolist()]
    source = Source(UNIFORM, draws, _key(key, site, Purpose.STOCHASTIC_CAPTURE), wide, x.device)
    full = (layout.rows, num_copies, layout.samples, layout.inner)
    result = torch.empty(x.shape, dtype=wide, device=x.device)
    xp, destination, values, scales = _arrays(
        source.use_numpy, result.view(full), x.to(wide).reshape(full), scale.to(wide).expand_as(x).reshape(full)
    )
    for i, j, (rows, samples, inner), numbers in source.pieces(layout):
        part = (rows, slice(i, j), samples, inner)
        kept = numbers.swapaxes(0, 1) * scales[part] < abs(values[part])
        xp.multiply(xp.sign(values[part]), kept, out=destination[part])
    return result.to(x.dtype)


def _clean_shape(sizes: Sequence[int], dim: int, samples: int) -> list[int]:
    shape = list(sizes)
    if dim >= 0:
        shape[dim] *= samples
    return shape
