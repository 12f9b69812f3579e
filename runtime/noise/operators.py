"""Keyed noise: the operators of `onward.passes.ops` that make random numbers.

Noise is never stored; it is made again where it is used (see `source`), and no operator holds more than a few
megabytes beyond its result, or one draw where noise is tied over blocks. Antithetic twins (method.md, equation 4) share
one generated draw.

`copies` and `draws` are read on the host: keep them on the CPU, also for a model on a GPU (a GPU tensor works but makes
the host wait). `key` lies where the numbers are wanted, and is not read on the host there unless that is a CPU; one on
the CPU works for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...passes import graph
from ...passes.errors import OptionError, unknown_name
from ...passes.ops import clean_shape
from ...passes.tie_blocks import grid
from . import source as noise_source
from .blocks import spread
from .distributions import MODEL_DISTRIBUTIONS, UNIFORM, noise_named
from .philox import Key, Purpose
from .source import NUMPY_DTYPES, Layout, Run, Source, Tile, capture_draws, copy_runs, layout_of, runs_within


def _check_copies(num_copies: int, dim: int) -> None:
    if dim < 0 and num_copies != 1:
        raise OptionError(f"a tensor without a batch dimension cannot hold {num_copies} copies; run it with one copy.")


def key_of(key: Tensor, site: int, purpose: Purpose, device: torch.device) -> Key:
    """The key of numbers on `device`: as numbers where the host makes them or has it, else as it lies there."""
    host = noise_source.on_host(device) or noise_source.on_host(key.device)
    seed, step = key.tolist() if host else key.unbind()
    return Key(seed, step, site, purpose)


def scale_of(sigmas: Tensor, site: int, z: Tensor) -> Any:
    """A site's σ in z's dtype: a number on the host, else a tensor, so as not to wait for it."""
    scale = sigmas[site].to(z.dtype)
    return scale.item() if noise_source.on_host(z.device) else scale


def _arrays(use_numpy: bool, *tensors: Tensor) -> tuple[Any, ...]:
    """The module to compute with, and the tensors as its arrays (sharing memory)."""
    if use_numpy:
        return (np, *(tensor.detach().numpy() for tensor in tensors))
    return (torch, *tensors)


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
    alive: Tensor | None = None,
    blocks: Sequence[int] | None = None,
) -> Tensor:
    """``z + sigmas[site] * noise`` for every copy (method.md, equation 1), on the `alive` coordinates where given (10),
    with one number a block where `blocks` are given (12).

    `z` is floating, clean or (`tiled`) tiled; `alive` is boolean, of z's clean shape; `copies` int64 (K,), `key` int64
    (2,), `sigmas` floating (sites,). The result is tiled, contiguous, of z's dtype; noise and scale are rounded to
    that dtype first. Where a scale is 0 the result is z, bit for bit. Raises UnknownNameError for a noise, OptionError
    for several copies without a batch dimension.
    """
    num_copies = copies.shape[0]
    _check_copies(num_copies, dim)
    in_z = num_copies if tiled else 1
    shape = list(z.shape)
    layout = layout_of(sizes, dim, outer, shape[dim] // (sizes[dim] * in_z) if dim >= 0 else 1)
    draws, runs = copy_runs(tuple(copies.tolist()))
    scale = scale_of(sigmas, site, z)
    if dim >= 0 and not tiled:
        shape[dim] *= num_copies
    result = torch.empty(shape, dtype=z.dtype, device=z.device)
    distribution = noise_named(noise)
    target = result.view(layout.rows, num_copies, layout.samples, layout.inner)
    clean = z.reshape(layout.rows, in_z, layout.samples, layout.inner)
    if isinstance(scale, float) and scale == 0.0:
        target.copy_(clean)
        return result
    source = Source(distribution, draws, key_of(key, site, Purpose.NOISE, z.device), z.dtype, z.device, scale)
    pieces = _tied_pieces(source, layout, sizes, dim, outer, blocks) if blocks else source.pieces(layout)
    xp, destination, origin = _arrays(source.use_numpy, target, clean)
    mask: Any = None
    if alive is not None:
        mask = alive.reshape(layout.rows, 1, layout.samples, layout.inner)
        (_, mask) = _arrays(source.use_numpy, mask)
    for i, j, (rows, samples, inner), numbers in pieces:
        if mask is not None:
            numbers = numbers * mask[rows, :, samples, inner].swapaxes(0, 1)
        for piece, copy, sign in runs_within(runs, i, j):
            operation = xp.add if sign > 0 else xp.subtract
            operation(
                origin[rows, copy if tiled else slice(None), samples, inner],
                numbers[piece].swapaxes(0, 1),
                out=destination[rows, copy, samples, inner],
            )
    if isinstance(scale, Tensor):  # without waiting for its value; -0.0 + 0.0 would be 0.0
        return torch.where(scale == 0.0, clean, target).view(shape)
    return result


TIED_ELEMENTS = 1 << 20
"""Elements of noise tied over blocks that are made at once."""


def _tied_pieces(
    source: Source, layout: Layout, sizes: Sequence[int], dim: int, outer: int, blocks: Sequence[int]
) -> Iterator[tuple[int, int, Tile, Any]]:
    """As `Source.pieces`, whole draws at a time: the numbers of the blocks, spread over their coordinates."""
    fine = graph.Layout(tuple(sizes), dim, outer)
    coarse = grid(fine, tuple(blocks))
    of_blocks = layout_of(coarse.sizes, dim, coarse.outer, layout.samples)
    group = max(1, TIED_ELEMENTS // max(1, math.prod(layout)))
    everything = (slice(0, layout.rows), slice(0, layout.samples), slice(0, layout.inner))
    for first in range(0, len(source.draws), group):
        some = source.of(source.draws[first : first + group])
        numbers = torch.empty(len(some.draws), *of_blocks, dtype=source.dtype, device=source.device)
        (_, destination) = _arrays(source.use_numpy, numbers)
        for i, j, part, made in some.pieces(of_blocks):
            destination[(slice(i, j), *part)] = made
        whole = spread(numbers, fine, blocks, layout.samples).view(-1, *layout)
        (_, whole) = _arrays(source.use_numpy, whole)
        yield first, first + len(some.draws), everything, whole


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
    """The sum over d of ``weights[d, sample] * score(noise of draws[d])`` (method.md, equations 1, 2 and 9).

    `weights` is floating (D, N), `draws` int64 (D,) of copy ids, `key` int64 (2,). The result is clean, contiguous, of
    the weights' dtype; narrower types than float32 are summed in float32. Without a batch dimension the weights are
    summed over the samples. On a CPU the draws are added in their order, each product rounded first. Raises
    UnknownNameError for a noise or a score.
    """
    dtype = weights.dtype if weights.dtype in NUMPY_DTYPES else torch.float32
    layout = layout_of(sizes, dim, outer, weights.shape[1])
    distinct, runs = copy_runs(tuple(draws.tolist()))
    source = Source(
        noise_named(noise), distinct, key_of(key, site, Purpose.NOISE, weights.device), dtype, weights.device
    )
    scored = source.distribution.score(score)
    wide = weights.detach().to(dtype)
    if dim < 0:
        wide = wide.sum(1, keepdim=True)
    wide = of_draws(wide, len(distinct), runs)
    result = torch.zeros(clean_shape(sizes, dim, weights.shape[1]), dtype=dtype, device=weights.device)
    xp, total, factors = _arrays(source.use_numpy, result.view(layout), wide)
    for i, j, part, numbers in source.pieces(layout):
        values = numbers if scored is None else scored(numbers)
        if source.use_numpy:
            for factor, each in zip(factors[i:j, part[1], None], values, strict=True):
                total[part] += np.multiply(each, factor, out=each)
        else:
            total[part] += xp.einsum("dn,dpnq->pnq", factors[i:j, part[1]], values)
    return result.to(weights.dtype)


def of_draws(weights: Tensor, num_draws: int, runs: Sequence[Run]) -> Tensor:
    """The weights of copies, (copies, N), summed for every distinct draw with the copies' signs: (num_draws, N)."""
    if len(runs) == 1:
        return weights if runs[0].sign > 0 else -weights
    folded = weights.new_zeros(num_draws, weights.shape[1])
    for run in runs:
        folded[run.start : run.stop] += run.sign * weights[run.copy : run.copy + run.stop - run.start]
    return folded


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
    """``weights[k, sample] * score(noise of copies[k])`` for every copy (method.md, equations 1 and 2, capture a copy).

    As `weighted_noise_sum`, with weights (K, N) and a tiled result. Raises OptionError also as `perturb`.
    """
    num_copies = copies.shape[0]
    _check_copies(num_copies, dim)
    layout = layout_of(sizes, dim, outer, weights.shape[1])
    draws, runs = copy_runs(tuple(copies.tolist()))
    source = Source(
        noise_named(noise), draws, key_of(key, site, Purpose.NOISE, weights.device), weights.dtype, weights.device
    )
    scored = source.distribution.score(score)
    signed = weights.detach() if dim >= 0 else weights.detach().sum(1, keepdim=True)
    if any(run.sign < 0 for run in runs):
        signed = signed.clone()
        for run in runs:
            signed[run.copy : run.copy + run.stop - run.start] *= run.sign
    shape = clean_shape(sizes, dim, weights.shape[1])
    if dim >= 0:
        shape[dim] *= num_copies
    result = torch.empty(shape, dtype=weights.dtype, device=weights.device)
    target = result.view(layout.rows, num_copies, layout.samples, layout.inner)
    xp, destination, factors = _arrays(source.use_numpy, target, signed)
    for i, j, (rows, samples, inner), numbers in source.pieces(layout):
        values = numbers if scored is None else scored(numbers)
        for piece, copy, _sign in runs_within(runs, i, j):
            xp.multiply(
                values[piece].swapaxes(0, 1),
                factors[None, copy, samples, None],
                out=destination[rows, copy, samples, inner],
            )
    return result


def keyed_random(
    key: Tensor, op: int, distribution: str, size: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Random numbers of the model's own operation `op`: "uniform" on [0, 1) or "normal"; the same for every copy of a
    step.

    `dtype` is floating. Uniform numbers have 24 bits, or as many as a narrower dtype holds, so that 1 never appears.
    Raises UnknownNameError for a distribution, OptionError for another dtype.
    """
    if distribution not in MODEL_DISTRIBUTIONS:
        raise unknown_name("distribution", distribution, MODEL_DISTRIBUTIONS)
    if not dtype.is_floating_point:
        raise OptionError(
            f"random numbers of dtype {dtype} are not supported; draw floating-point ones and convert them."
        )
    row = MODEL_DISTRIBUTIONS[distribution]
    result = torch.empty(list(size), dtype=dtype, device=device)
    steps = 1.0 / torch.finfo(dtype).eps * 2.0
    truncated = row is UNIFORM and steps < 2.0**24
    wide = dtype if dtype in NUMPY_DTYPES else torch.float32
    source = Source(row, (0,), key_of(key, op, Purpose.MODEL, result.device), wide, result.device)
    _, destination = _arrays(source.use_numpy and wide == dtype, result.view(-1))
    for _, _, (_, _, inner), numbers in source.pieces(Layout(1, 1, result.numel())):
        values = numbers.reshape(-1)
        if wide != dtype:
            values = torch.from_numpy(values) if source.use_numpy else values
            values = torch.floor(values * steps) / steps if truncated else values
        destination[inner] = values
    return result


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
    """``sign(x)`` with probability ``|x| / scale`` (at most 1), else 0; unbiased times `scale` where ``|x| <= scale``
    (equation 3).

    `x` is floating and tiled, `scale` >= 0 broadcasts against it, the result is like x, contiguous. A copy and its twin
    use separate random numbers. The probability is a multiple of 2^-24. Raises OptionError as `perturb`.
    """
    num_copies = copies.shape[0]
    _check_copies(num_copies, dim)
    layout = layout_of(sizes, dim, outer, x.shape[dim] // (sizes[dim] * num_copies) if dim >= 0 else 1)
    wide = x.dtype if x.dtype in NUMPY_DTYPES else torch.float32
    draws = capture_draws(copies.tolist())
    source = Source(UNIFORM, draws, key_of(key, site, Purpose.STOCHASTIC_CAPTURE, x.device), wide, x.device)
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


for _function in (perturb, tile, weighted_noise_sum, weighted_noise, keyed_random, stochastic_sign):
    torch.library.impl(f"onward::{_function.__name__}", "CompositeExplicitAutograd", _function)
