"""Noise on the weight of a linear layer or a convolution (method.md 6, 11): it is made, applied, and made again.

The operation is a matrix product for every sample and group of channels, ``weight (channels, fan-in) @ patches (fan-in,
positions)``, over the patches of the clean activation, which all copies share, or of one copy at a time. Measured on a
CPU with a draw a sample, it takes half the time of a convolution with a group for each sample where input channels are
few, as where this noise belongs, and up to twice where they are many.

Every product is of one draw and one sample, so that the copies side by side change no bit of it. Beside results, memory
holds the patches of one copy and, of noise, a few megabytes or the numbers of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...passes import ops as _declarations  # noqa: F401  (declares what is implemented here)
from . import source as noise_source
from .distributions import noise_named
from .operators import key_of, of_draws, scale_of
from .philox import Purpose
from .source import CPU_LIMITS, DEVICE_LIMITS, NUMPY_DTYPES, Layout, Source, copy_runs


class _Noise(NamedTuple):
    """The numbers of noise on one weight (`passes.perturb_weights`)."""

    on: str
    operation: str
    weight: Sequence[int]
    bias: bool
    groups: int

    @property
    def channels(self) -> int:
        return self.weight[1] if self.operation == "product" else self.weight[0]

    @property
    def fan_in(self) -> int:
        return math.prod(self.weight) // self.channels

    @property
    def numbers(self) -> int:
        """Numbers of a draw (and sample)."""
        if self.on == "rank-one":
            return self.channels + self.groups * (self.fan_in + self.bias)
        return math.prod(self.weight) + self.channels * self.bias

    def source(
        self, noise: str, draws: Sequence[int], key: Tensor, site: int, dtype: torch.dtype, device: torch.device
    ) -> Source:
        """The numbers of these draws, of whole samples at a time."""
        usual = CPU_LIMITS if noise_source.on_host(device) else DEVICE_LIMITS
        limits = usual._replace(elements=max(usual.elements, self.numbers))
        return Source(noise_named(noise), draws, key_of(key, site, Purpose.NOISE, device), dtype, device, limits=limits)

    def pieces(self, source: Source, samples: int) -> Iterator[tuple[int, slice, Tensor]]:
        """Number of the draw, samples, and their numbers (samples, count); one row where all samples share them."""
        shared = self.on == "weight"
        for i, j, (_, part, _), made in source.pieces(Layout(1, 1 if shared else samples, self.numbers)):
            numbers = torch.from_numpy(made) if isinstance(made, np.ndarray) else made
            for draw in range(i, j):
                yield draw, slice(0, samples) if shared else part, numbers[draw - i, 0]

    def factors(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Of rank one: ``u`` (rows, groups, channels of a group) and ``v`` (rows, groups, fan-in and bias)."""
        u, v = numbers[:, : self.channels], numbers[:, self.channels :]
        return u.reshape(len(numbers), self.groups, -1), v.reshape(len(numbers), self.groups, -1)

    def matrices(self, numbers: Tensor) -> Tensor:
        """Of full rank: the weight, (rows, groups, channels of a group, fan-in)."""
        entries = numbers[:, : math.prod(self.weight)]
        if self.operation == "product":
            return entries.reshape(len(numbers), 1, self.fan_in, self.channels).transpose(2, 3)
        return entries.reshape(len(numbers), self.groups, -1, self.fan_in)

    def change(self, numbers: Tensor, patches: Tensor, scale: float | Tensor) -> Tensor:
        """What noise of this `scale` adds to the output, (N, channels, positions), from patches (N, groups, fan-in,
        positions)."""
        samples, _, _, positions = patches.shape
        if self.on == "rank-one":
            u, v = self.factors(numbers)
            along = _products(v[:, :, None, : self.fan_in], patches)
            if self.bias:
                along = along + v[:, :, self.fan_in :, None]
            return ((u * scale)[..., None] * along).reshape(samples, self.channels, positions)
        scaled = numbers * scale
        matrices = self.matrices(scaled)
        change = _products(matrices.expand(samples, *matrices.shape[1:]), patches)
        change = change.reshape(samples, self.channels, positions)
        return change + scaled[:, math.prod(self.weight) :, None] if self.bias else change


def _products(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` over two leading dimensions; nothing is copied where the second is 1."""
    products = torch.bmm(left.flatten(0, 1), right.flatten(0, 1))
    return products.reshape(*left.shape[:2], *products.shape[1:])


def perturb_weight(
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
    x: Tensor,
    x_tiled: bool,
    on: str,
    operation: str,
    weight: Sequence[int],
    bias: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``z + sigmas[site] * (op(x; E) + e)`` for every copy (method.md, equations 6 and 11).

    `z`, the output, is floating, clean or (`tiled`) tiled; `x`, the activation, of its dtype, is clean or (`x_tiled`)
    tiled, with its samples in the same rows; `copies` is int64 (K,), `key` int64 (2,), `sigmas` floating (sites,). The
    arguments from `on` on are those of `passes.perturb_weights.WeightNoise`. The result is tiled, contiguous, of z's
    dtype. Where a scale is 0 it is z, bit for bit. Raises UnknownNameError for a noise.
    """
    num_copies, shape = copies.shape[0], list(z.shape)
    samples = shape[dim] // (sizes[dim] * (num_copies if tiled else 1))
    shape[dim] = sizes[dim] * samples * num_copies
    scale = scale_of(sigmas, site, z)
    described = _Noise(on, operation, weight, bias, groups)
    result = torch.empty(shape, dtype=z.dtype, device=z.device)
    target, clean, values = (
        _channels_first(tensor, dim, outer, held, samples, operation)
        for tensor, held in ((result, num_copies), (z, num_copies if tiled else 1), (x, num_copies if x_tiled else 1))
    )
    if isinstance(scale, float) and scale == 0.0:
        target.copy_(clean.expand_as(target))
        return result
    draws, _ = copy_runs(tuple(copies.tolist()))
    carriers: dict[int, list[tuple[int, int]]] = {draw: [] for draw in draws}
    for copy, identity in enumerate(copies.tolist()):
        carriers[identity if identity >= 0 else ~identity].append((copy, 1 if identity >= 0 else -1))
    source = described.source(noise, draws, key, site, z.dtype, z.device)
    # where copies have their own activation, one draw at a time bounds the patches; else all copies share them
    for some in [(draw,) for draw in draws] if x_tiled else [draws]:
        held = [copy for copy, _ in carriers[some[0]]] if x_tiled else [0]
        patches = {copy: _patches(values[copy], groups, weight[2:], stride, padding, dilation) for copy in held}
        for number, part, numbers in described.pieces(source.of(some), samples):
            changes: dict[int, Tensor] = {}
            for copy, sign in carriers[some[number]]:
                origin, own = clean[copy if tiled else 0, part], copy if x_tiled else 0
                if own not in changes:
                    changes[own] = described.change(numbers, patches[own][part], scale).reshape(origin.shape)
                (torch.add if sign > 0 else torch.sub)(origin, changes[own], out=target[copy, part])
    if isinstance(scale, Tensor):  # without waiting for its value
        target.copy_(torch.where(scale == 0.0, clean, target))
    return result


def _channels_first(x: Tensor, dim: int, outer: int, copies: int, samples: int, operation: str) -> Tensor:
    """(copies, N, channels, …): a tensor with copies in its rows; a view if it is contiguous."""
    rows = math.prod(x.shape[:dim]) * outer
    opened = x.reshape(rows, copies, samples, -1, *x.shape[dim + 1 :])
    return opened.movedim((1, 2, 4 if operation == "convolution" else -1), (0, 1, 2))


def _patches(
    x: Tensor,
    groups: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """What every output position reads, (N, groups, fan-in, positions); x is (N, channels, rows, inner, …)."""
    x = F.pad(x, [count for count in reversed(padding) for _ in range(2)]) if any(padding) else x
    for axis, size in enumerate(kernel):
        x = x.unfold(4 + axis, dilation[axis] * (size - 1) + 1, stride[axis])[..., :: dilation[axis]]
    spatial = len(kernel)
    x = x.movedim(tuple(range(x.dim() - spatial, x.dim())), tuple(range(2, 2 + spatial)))
    return x.reshape(len(x), groups, x.shape[1] // groups * math.prod(kernel), -1)


def weight_noise_sum(
    weights: Tensor,
    draws: Tensor,
    key: Tensor,
    site: int,
    noise: str,
    score: str,
    on: str,
    operation: str,
    weight: Sequence[int],
    bias: bool,
    groups: int,
) -> Tensor:
    """The sum over d and n of ``weights[d, n] * score(E of draws[d] and sample n)`` (method.md, equations 6 and 11).

    `weights` is floating (D, N), and summed over the samples where these share the noise (``on="weight"``; N may be 1
    then); `draws` int64 (D,) of copy ids, `key` int64 (2,). The result is a vector of the weights' dtype: the entries
    of the weight, then the bias's; narrower types than float32 are summed in float32. Raises UnknownNameError for a
    noise or a score.
    """
    dtype = weights.dtype if weights.dtype in NUMPY_DTYPES else torch.float32
    described = _Noise(on, operation, weight, bias, groups)
    distinct, runs = copy_runs(tuple(draws.tolist()))
    wide = of_draws(weights.detach().to(dtype), len(distinct), runs)
    if on == "weight":
        wide = wide.sum(1, keepdim=True)
    source = described.source(noise, distinct, key, site, dtype, weights.device)
    scored = source.distribution.score(score)
    if on == "rank-one":  # signs, which are their own score
        total = wide.new_zeros(groups, described.channels // groups, described.fan_in + bias)
        for draw, part, numbers in described.pieces(source, wide.shape[1]):
            u, v = described.factors(numbers)
            total += torch.einsum("ngc,ngf->gcf", u * wide[draw, part, None, None], v)
        entries = total[..., : described.fan_in].reshape(described.channels, -1)
        entries = entries.T if operation == "product" else entries
        return torch.cat([entries.reshape(-1), total[..., described.fan_in :].reshape(-1)]).to(weights.dtype)
    flat = wide.new_zeros(described.numbers)
    for draw, part, numbers in described.pieces(source, wide.shape[1]):
        values = numbers if scored is None else scored(numbers)
        flat += (wide[draw] if on == "weight" else wide[draw, part]) @ values
    return flat.to(weights.dtype)


for _function in (perturb_weight, weight_noise_sum):
    torch.library.impl(f"onward::{_function.__name__}", "CompositeExplicitAutograd", _function)
