"""Kernels of the noise operators (method.md 1, 2, 3, 9): the numbers are made in registers, where they are used.

A program makes one tile of consecutive elements of the clean tensor, the order in which `philox` counts. Element ``e``
of a clean tensor ``(rows, samples, inner)`` lies, for copy ``k`` of ``K`` and with ``span = samples * inner``, at
``e + (e // span) * span * (K - 1) + k * span`` of the tiled one. A draw is made once for all copies that carry it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....passes.ops import clean_shape
from ..distributions import NOISES
from ..operators import of_draws
from ..philox import Purpose, site_word
from ..source import Layout, Run, capture_draws, carriers, copy_runs, layout_of
from ..words import signed, words_on
from .numbers import EXACT, by_sign, numbers, read, rounded, scored, sign, write

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""The dtypes that kernels read and write, by the names they know."""

MAX_ELEMENTS, MAX_COPIES = (1 << 31) - (1 << 12), (1 << 16) - 1
"""Positions are 32-bit numbers, also those of a last tile that reaches beyond the end, and CUDA counts 65,535 programs
along the second axis: larger calls are left to the definitions."""

TILE, SUM_TILE = 1024, 256
"""Elements of a program; sums, which loop over the draws, take fewer, to have more programs."""


@triton.jit(do_not_specialize=["site_word"])
def perturb_kernel(
    z, alive, scale, result, draws, starts, carriers, total, span, num_copies, site_word, key,
    noise: tl.constexpr, dtype: tl.constexpr, tiled: tl.constexpr, masked: tl.constexpr, many_rows: tl.constexpr,
    tile: tl.constexpr,
):  # fmt: skip
    seed, step = tl.load(key), tl.load(key + 1)
    at, number = tl.program_id(0), tl.program_id(1)
    element = at * tile + tl.arange(0, tile)
    inside = element < total
    sigma = tl.load(scale)
    values = numbers(at, tl.load(draws + number), site_word, step, seed, noise, tile)
    values = rounded(rounded(values, dtype) * sigma, dtype)
    if masked:
        values = values * tl.load(alive + element, inside, other=0).to(tl.float32)
    place = element
    if many_rows:
        place += element // span * span * (num_copies - 1)
    origin = read(z + element, inside, dtype)
    for index in range(tl.load(starts + number), tl.load(starts + number + 1)):
        carrier = tl.load(carriers + index)
        there = place + (carrier >> 1) * span
        if tiled:
            origin = read(z + there, inside, dtype)
        changed = origin + values * (1 - 2 * (carrier & 1)).to(tl.float32)
        write(result + there, tl.where(sigma == 0, origin, changed), inside, dtype)


@triton.jit(do_not_specialize=["site_word"])
def weighted_noise_kernel(
    weights, result, draws, starts, carriers, total, span, inner, samples, num_copies, site_word, key,
    noise: tl.constexpr, score: tl.constexpr, dtype: tl.constexpr, many_rows: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    seed, step = tl.load(key), tl.load(key + 1)
    at, number = tl.program_id(0), tl.program_id(1)
    element = at * tile + tl.arange(0, tile)
    inside = element < total
    signs: tl.constexpr = by_sign(noise, score, dtype)
    values = rounded(numbers(at, tl.load(draws + number), site_word, step, seed, noise, tile, signs), dtype)
    values = scored(values, noise, score, dtype)
    sample = element // inner % samples
    place = element
    if many_rows:
        place += element // span * span * (num_copies - 1)
    for index in range(tl.load(starts + number), tl.load(starts + number + 1)):
        carrier = tl.load(carriers + index)
        copy = carrier >> 1
        factor = read(weights + copy * samples + sample, inside, dtype) * (1 - 2 * (carrier & 1)).to(tl.float32)
        write(result + place + copy * span, values * factor, inside, dtype)


@triton.jit(do_not_specialize=["site_word"])
def weighted_noise_sum_kernel(
    weights, result, draws, num_draws, total, inner, samples, site_word, key,
    noise: tl.constexpr, score: tl.constexpr, dtype: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    seed, step = tl.load(key), tl.load(key + 1)
    at = tl.program_id(0)
    element = at * tile + tl.arange(0, tile)
    inside = element < total
    sample = element // inner % samples
    sums = tl.zeros([tile], tl.float32)
    for number in range(num_draws):
        signs: tl.constexpr = by_sign(noise, score, "float32")
        values = numbers(at, tl.load(draws + number), site_word, step, seed, noise, tile, signs)
        factor = tl.load(weights + number * samples + sample, inside, other=0)
        sums += factor * scored(values, noise, score, "float32")
    write(result + element, sums, inside, dtype)


@triton.jit(do_not_specialize=["site_word"])
def stochastic_sign_kernel(
    x, scale, result, draws, total, span, num_copies, scale_inner, scale_extent, site_word, key,
    dtype: tl.constexpr, scale_dtype: tl.constexpr, many_rows: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    seed, step = tl.load(key), tl.load(key + 1)
    at, copy = tl.program_id(0), tl.program_id(1)
    element = at * tile + tl.arange(0, tile)
    inside = element < total
    uniform = numbers(at, tl.load(draws + copy), site_word, step, seed, "uniform", tile)
    place = element + copy * span
    if many_rows:
        place += element // span * span * (num_copies - 1)
    value = read(x + place, inside, dtype)
    largest = read(scale + place // scale_inner % scale_extent, inside, scale_dtype)
    kept = uniform * largest < tl.abs(value)
    write(result + place, sign(value) * kept.to(tl.float32), inside, dtype)


def covered(
    noise: str, score: str, dtype: torch.dtype, sizes: Sequence[int], dim: int, samples: int, copies: int
) -> bool:
    """Whether the kernels cover noise on a tensor of this layout; what is wrong in one is the definition's to say."""
    elements = copies * samples * math.prod(sizes)
    known = noise in NOISES and score in NOISES[noise].scores
    fitting = 0 < elements < MAX_ELEMENTS and copies <= MAX_COPIES
    return known and dtype in NAMES and fitting and (dim >= 0 or copies == 1)


def samples_of(z: Tensor, copies: Tensor, sizes: Sequence[int], dim: int, tiled: bool) -> int:
    return z.shape[dim] // (sizes[dim] * (copies.shape[0] if tiled else 1)) if dim >= 0 else 1


def perturb_fits(
    z: Tensor, copies: Tensor, key: Tensor, sigmas: Tensor, site: int, noise: str, sizes: Sequence[int], dim: int,
    outer: int, tiled: bool, alive: Tensor | None = None, blocks: Sequence[int] | None = None,
) -> bool:  # fmt: skip
    """All but noise that is tied over blocks."""
    samples = samples_of(z, copies, sizes, dim, tiled)
    return not blocks and covered(noise, "exact", z.dtype, sizes, dim, samples, copies.shape[0])


def perturb(
    z: Tensor, copies: Tensor, key: Tensor, sigmas: Tensor, site: int, noise: str, sizes: Sequence[int], dim: int,
    outer: int, tiled: bool, alive: Tensor | None = None, blocks: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """`runtime.noise.operators.perturb`, bit for bit."""
    layout = layout_of(sizes, dim, outer, samples_of(z, copies, sizes, dim, tiled))
    num_copies, shape = copies.shape[0], list(z.shape)
    if dim >= 0 and not tiled:
        shape[dim] *= num_copies
    result = torch.empty(shape, dtype=z.dtype, device=z.device)
    scale = sigmas[site].to(z.dtype).to(torch.float32).to(z.device)
    mask = alive.contiguous().view(torch.uint8) if alive is not None else result
    num_draws, tables = _carriers(copies, z.device)
    total = math.prod(layout)
    perturb_kernel[triton.cdiv(total, TILE), num_draws](
        bits(z), mask, scale, bits(result), *tables, total, layout.samples * layout.inner, num_copies,
        *key_words(key, site, Purpose.NOISE, z.device), noise, NAMES[z.dtype], tiled, alive is not None,
        layout.rows > 1, TILE, **EXACT,
    )  # fmt: skip
    return result


def weighted_fits(
    weights: Tensor, copies: Tensor, key: Tensor, site: int, noise: str, score: str, sizes: Sequence[int], dim: int,
    outer: int,
) -> bool:  # fmt: skip
    return covered(noise, score, weights.dtype, sizes, dim, weights.shape[1], copies.shape[0])


def weighted_noise(
    weights: Tensor, copies: Tensor, key: Tensor, site: int, noise: str, score: str, sizes: Sequence[int], dim: int,
    outer: int,
) -> Tensor:  # fmt: skip
    """`runtime.noise.operators.weighted_noise`, bit for bit."""
    factors = weights if dim >= 0 else weights.sum(1, keepdim=True)
    layout, num_copies = layout_of(sizes, dim, outer, factors.shape[1]), copies.shape[0]
    result = torch.empty(
        clean_shape(sizes, dim, layout.samples * num_copies), dtype=weights.dtype, device=weights.device
    )
    num_draws, tables = _carriers(copies, weights.device)
    total = math.prod(layout)
    weighted_noise_kernel[triton.cdiv(total, TILE), num_draws](
        bits(factors), bits(result), *tables, total, layout.samples * layout.inner, layout.inner, layout.samples,
        num_copies, *key_words(key, site, Purpose.NOISE, weights.device), noise, score, NAMES[weights.dtype],
        layout.rows > 1, TILE, **EXACT,
    )  # fmt: skip
    return result


def sum_fits(
    weights: Tensor, draws: Tensor, key: Tensor, site: int, noise: str, score: str, sizes: Sequence[int], dim: int,
    outer: int,
) -> bool:  # fmt: skip
    return draws.shape[0] > 0 and covered(noise, score, weights.dtype, sizes, dim, weights.shape[1], 1)


def weighted_noise_sum(
    weights: Tensor, draws: Tensor, key: Tensor, site: int, noise: str, score: str, sizes: Sequence[int], dim: int,
    outer: int,
) -> Tensor:  # fmt: skip
    """`runtime.noise.operators.weighted_noise_sum`: a sum over the draws in their order, in float32."""
    distinct, runs = copy_runs(tuple(draws.tolist()))
    factors = _factors(weights.to(torch.float32), dim, len(distinct), runs)
    layout = layout_of(sizes, dim, outer, factors.shape[1])
    result = torch.empty(clean_shape(sizes, dim, layout.samples), dtype=weights.dtype, device=weights.device)
    total = math.prod(layout)
    weighted_noise_sum_kernel[(triton.cdiv(total, SUM_TILE),)](
        factors, bits(result), words_on(distinct, weights.device), len(distinct), total, layout.inner, layout.samples,
        *key_words(key, site, Purpose.NOISE, weights.device), noise, score, NAMES[weights.dtype], SUM_TILE, **EXACT,
    )  # fmt: skip
    return result


def stochastic_fits(
    x: Tensor, scale: Tensor, copies: Tensor, key: Tensor, site: int, sizes: Sequence[int], dim: int, outer: int
) -> bool:
    samples = samples_of(x, copies, sizes, dim, True)
    return scale.dtype in NAMES and covered("gaussian", "exact", x.dtype, sizes, dim, samples, copies.shape[0])


def stochastic_sign(
    x: Tensor, scale: Tensor, copies: Tensor, key: Tensor, site: int, sizes: Sequence[int], dim: int, outer: int
) -> Tensor:
    """`runtime.noise.operators.stochastic_sign`, exactly."""
    layout = layout_of(sizes, dim, outer, samples_of(x, copies, sizes, dim, True))
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    values, inner = scales_of(x, scale, dim)
    draws = capture_draws(copies.tolist())
    total = math.prod(layout)
    stochastic_sign_kernel[triton.cdiv(total, TILE), len(draws)](
        bits(x), bits(values), bits(result), words_on(draws, x.device), total, layout.samples * layout.inner,
        len(draws), inner, values.numel(), *key_words(key, site, Purpose.STOCHASTIC_CAPTURE, x.device), NAMES[x.dtype],
        NAMES[scale.dtype], layout.rows > 1, TILE, **EXACT,
    )  # fmt: skip
    return result


def scales_of(x: Tensor, scale: Tensor, dim: int) -> tuple[Tensor, int]:
    """Scales such that the one of the element at place p of x is number ``p // inner``, counted around; and `inner`."""
    extents = [1] * (x.dim() - scale.dim()) + list(scale.shape)
    if scale.numel() == 1 or (dim >= 0 and scale.numel() == extents[dim] == x.shape[dim]):
        return scale.contiguous(), math.prod(x.shape[dim + 1 :])  # one for all, or one a sample
    return scale.expand_as(x).contiguous(), 1


def bits(x: Tensor) -> Tensor:
    """A contiguous tensor as the kernels take it: bfloat16 as int16."""
    x = x.detach().contiguous()
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def key_words(key: Tensor, site: int, purpose: Purpose, device: torch.device) -> tuple[int, Tensor]:
    """The site's word of `philox.Key`, signed, which is how Triton takes all values alike, and where its seed and step
    lie: kernels read them themselves, so that one that was captured in a graph makes another step's numbers."""
    return signed(site_word(site, purpose)), key.to(device, torch.int64, non_blocking=True).contiguous()


def _factors(weights: Tensor, dim: int, num_draws: int, runs: Sequence[Run]) -> Tensor:
    """A weight for every distinct draw and sample; one sample where there is no batch dimension."""
    weights = weights if dim >= 0 else weights.sum(1, keepdim=True)
    return of_draws(weights.detach(), num_draws, runs).contiguous()


def _carriers(copies: Tensor, device: torch.device) -> tuple[int, tuple[Tensor, Tensor, Tensor]]:
    """The number of distinct draws, and `carriers` as int32 tables."""
    draws, starts, carried = carriers(tuple(copies.tolist()))
    table = words_on([*draws, *starts, *carried], device)
    count = len(draws)
    return count, (table[:count], table[count : 2 * count + 1], table[2 * count + 1 :])


def reference_sum(
    weights: Tensor, draws: Tensor, key: Tensor, site: int, noise: str, score: str, sizes: Sequence[int], dim: int,
    outer: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum in float64, and how far float32 may be from it: for D draws (D + 3) ulp of the sum of magnitudes.

    Each score is rounded once at most, each product once, each addition once, and so were the weights' sums over twins
    (and samples, where they are summed); then the result is rounded to its dtype, half an ulp of that.
    """
    from ..operators import weighted_noise_sum as definition

    wide, largest = weights.double(), 6.0  # sqrt(2 * 24 * log 2) = 5.8 bounds every Gaussian, sqrt(2) a score of signs
    expected = definition(wide, draws, key, site, noise, score, sizes, dim, outer)
    layout: Layout = layout_of(sizes, dim, outer, weights.shape[1])
    magnitudes = wide.abs().sum(0)
    magnitudes = magnitudes[:, None] if dim >= 0 else magnitudes.sum().reshape(1, 1)
    terms = len(draws) + 3 + (weights.shape[1] if dim < 0 else 0)
    bound = (largest * terms * 2.0**-24 * magnitudes).expand(layout.rows, layout.samples, layout.inner)
    precision = torch.finfo(weights.dtype)
    result = (expected.abs() + precision.smallest_normal) * precision.eps
    return expected, bound.reshape(expected.shape) + result
