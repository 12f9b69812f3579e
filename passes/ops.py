"""The operators that Onward's passes insert into graphs: declared here, implemented in ``onward.runtime``.

A pass may name an operator, and a graph that holds it prints, verifies and exports, without the kernels being imported.

**Copies.** A run of the perturbed graph holds ``K`` copies of the batch side by side, tiled into the batch dimension.
``copies`` is an int64 tensor ``(K,)`` of copy ids. Id ``d >= 0`` carries the noise of draw ``d``; id ``~d = -d - 1``
is its antithetic twin and carries exactly the negated noise.

**Layout.** ``sizes``, ``dim``, ``outer`` say where the samples of a tensor are. ``sizes`` is its shape with the batch
dimension's entry divided by the batch size ``N`` (so it is static); ``dim`` is the batch dimension, whose rows are
ordered ``(outer, N, sizes[dim] // outer)``; usually ``sizes[dim] == outer == 1``. A tiled tensor has rows
``(outer, K, N, inner)``. ``dim = -1`` means that the tensor has no batch dimension; it cannot hold more than one copy.

**Keys.** ``key`` is an int64 tensor ``(2,)`` of ``(seed, step)``. An element of noise is a function of
``(seed, step, site, draw, element)`` alone, ``element`` being the flat index in the clean (untiled, contiguous) tensor:
device, chunking and threads do not change it.

**Blocks.** ``blocks``, where given and not empty, ties the elements of a tensor over blocks: one extent for every axis
of a sample (`Layout.extents`). Noise is then that of the smaller tensor with one element a block (`tie_blocks.grid`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .graph import Layout
from .tie_blocks import grid

_library = torch.library.Library("onward", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

for _schema in (
    # z + sigmas[site] * noise, for every copy: (K*N, ...). `tiled` says whether z already holds the K copies; `alive`,
    # boolean and clean, where given, says which coordinates receive noise (method.md 10).
    "perturb(Tensor z, Tensor copies, Tensor key, Tensor sigmas, int site, str noise, "
    "int[] sizes, int dim, int outer, bool tiled, Tensor? alive=None, int[]? blocks=None) -> Tensor",
    # z + sigmas[site] * op(x; E) for every copy: noise on the weight of a linear layer or a convolution, and with
    # `bias` on that (`perturb_weights`). `x_tiled` says whether x already holds the K copies.
    "perturb_weight(Tensor z, Tensor copies, Tensor key, Tensor sigmas, int site, str noise, int[] sizes, int dim, "
    "int outer, bool tiled, Tensor x, bool x_tiled, str on, str operation, int[] weight, bool bias, int[] stride, "
    "int[] padding, int[] dilation, int groups) -> Tensor",
    # sum over d and samples of weights[d, sample] * score(E of draws[d]): the weight's entries, then the bias's.
    "weight_noise_sum(Tensor weights, Tensor draws, Tensor key, int site, str noise, str score, str on, "
    "str operation, int[] weight, bool bias, int groups) -> Tensor",
    # A clean tensor with one element a block as one of shape `sizes`: every coordinate has its block's element.
    "spread_blocks(Tensor x, int[] sizes, int dim, int outer, int[] blocks) -> Tensor",
    # How many coordinates of every block are alive (all without a mask), shaped and typed like `like`, one a block.
    "count_blocks(Tensor like, Tensor? alive, int[] sizes, int dim, int outer, int[] blocks) -> Tensor",
    # A clean tensor repeated for every copy.
    "tile(Tensor x, Tensor copies, int dim, int outer) -> Tensor",
    # sum over d of weights[d, sample] * score(noise of draws[d]); weights (D, N), result shaped like the clean tensor.
    "weighted_noise_sum(Tensor weights, Tensor draws, Tensor key, int site, str noise, str score, "
    "int[] sizes, int dim, int outer) -> Tensor",
    # weights[k, sample] * score(noise of copies[k]) for every copy; weights (K, N), result tiled.
    "weighted_noise(Tensor weights, Tensor copies, Tensor key, int site, str noise, str score, "
    "int[] sizes, int dim, int outer) -> Tensor",
    # The model's own random numbers ("uniform" on [0, 1) or "normal"), the same for every copy of a step.
    "keyed_random(Tensor key, int op, str distribution, SymInt[] size, ScalarType dtype, Device device) -> Tensor",
    # sign(x) with probability |x| / scale, else 0; `scale` broadcasts against x.
    "stochastic_sign(Tensor x, Tensor scale, Tensor copies, Tensor key, int site, int[] sizes, int dim, int outer) "
    "-> Tensor",
    # sign(x) as bits, samples first: uint8 (planes, B, ceil(elements a sample / 8)). See `planes`.
    "pack_signs(Tensor x, str domain, int dim) -> Tensor",
    # pack_signs(stochastic_sign(x, ...)), with nothing in between.
    "pack_stochastic_signs(Tensor x, Tensor scale, Tensor copies, Tensor key, int site, str domain, int[] sizes, "
    "int dim, int outer) -> Tensor",
    # The inverse: values -1, 0, +1 of `dtype`; B is the extent of `dim`, whatever sizes[dim] says.
    "unpack_signs(Tensor packed, str domain, int[] sizes, int dim, ScalarType dtype) -> Tensor",
    # The gradient of a linear layer's weight, then of its bias, as one vector of `dtype`. Packed signs (and scales) of
    # its input and the weighted noise at its output are both tiled. See `fuse_packed_gradients`.
    "packed_linear_gradient(Tensor packed, Tensor? scale, str domain, int[] x_sizes, int x_dim, Tensor weights, "
    "Tensor copies, Tensor key, int site, str noise, str score, int[] sizes, int dim, int outer, ScalarType dtype, "
    "bool bias) -> Tensor",
    # The same of a convolution of one group; of `weight` only the shape counts.
    "packed_convolution_gradient(Tensor packed, Tensor? scale, str domain, int[] x_sizes, int x_dim, Tensor weights, "
    "Tensor copies, Tensor key, int site, str noise, str score, int[] sizes, int dim, int outer, ScalarType dtype, "
    "bool bias, Tensor weight, int[] stride, int[] padding, int[] dilation) -> Tensor",
    # Levels of 2, 4 or 8 bits, samples first: uint8 (B, ceil(elements a sample * bits / 8)). See `num_levels`.
    "pack_levels(Tensor x, str domain, int bits, int dim) -> Tensor",
    # The inverse: whole numbers of `dtype`; B is the extent of `dim`, whatever sizes[dim] says.
    "unpack_levels(Tensor packed, str domain, int bits, int[] sizes, int dim, ScalarType dtype) -> Tensor",
):
    _library.define(_schema, tags=_TAGS)

DOMAINS = {"binary": 1, "nonnegative": 1, "signed": 2}
"""Sign domains and the bits an element takes: binary is ±1, nonnegative is 0 or +, signed is -, 0 or +."""

LEVEL_BITS = {"stochastic-2": 2, "stochastic-4": 4, "stochastic-8": 8}
"""Captures by levels, and the bits an element takes."""


def num_levels(domain: str, bits: int) -> int:
    """The largest level of so many bits: of a signed value one bit is the sign's."""
    return (1 << bits) - 1 if domain == "nonnegative" else (1 << (bits - 1)) - 1


def row_bytes(elements: int, bits: int) -> int:
    """Bytes of a sample's packed elements."""
    return (elements * bits + 7) // 8


def _tiled_shape(shape: list[int] | torch.Size, copies: Tensor, dim: int) -> list[int]:
    tiled = list(shape)
    if dim >= 0:
        tiled[dim] = tiled[dim] * copies.shape[0]
    return tiled


def clean_shape(sizes: Sequence[int], dim: int, samples: int) -> list[int]:
    """The shape of a clean tensor of so many samples."""
    shape = list(sizes)
    if dim >= 0:
        shape[dim] = shape[dim] * samples
    return shape


@torch.library.register_fake("onward::perturb")
def _(z, copies, key, sigmas, site, noise, sizes, dim, outer, tiled, alive=None, blocks=None):  # type: ignore[no-untyped-def]
    return z.new_empty(z.shape if tiled else _tiled_shape(z.shape, copies, dim))


@torch.library.register_fake("onward::perturb_weight")
def _(z, copies, key, sigmas, site, noise, sizes, dim, outer, tiled, *described, **named):  # type: ignore[no-untyped-def]
    return z.new_empty(z.shape if tiled else _tiled_shape(z.shape, copies, dim))


@torch.library.register_fake("onward::weight_noise_sum")
def _(weights, draws, key, site, noise, score, on, operation, weight, bias, groups):  # type: ignore[no-untyped-def]
    channels = weight[1] if operation == "product" else weight[0]
    return weights.new_empty(math.prod(weight) + (channels if bias else 0))


@torch.library.register_fake("onward::spread_blocks")
def _(x, sizes, dim, outer, blocks):  # type: ignore[no-untyped-def]
    rows = grid(Layout(tuple(sizes), dim, outer), tuple(blocks)).sizes[dim]
    return x.new_empty(clean_shape(sizes, dim, x.shape[dim] // rows))


@torch.library.register_fake("onward::count_blocks")
def _(like, alive, sizes, dim, outer, blocks):  # type: ignore[no-untyped-def]
    return like.new_empty(like.shape)


@torch.library.register_fake("onward::tile")
def _(x, copies, dim, outer):  # type: ignore[no-untyped-def]
    return x.new_empty(_tiled_shape(x.shape, copies, dim))


@torch.library.register_fake("onward::weighted_noise_sum")
def _(weights, draws, key, site, noise, score, sizes, dim, outer):  # type: ignore[no-untyped-def]
    return weights.new_empty(clean_shape(sizes, dim, weights.shape[1]))


@torch.library.register_fake("onward::weighted_noise")
def _(weights, copies, key, site, noise, score, sizes, dim, outer):  # type: ignore[no-untyped-def]
    return weights.new_empty(_tiled_shape(clean_shape(sizes, dim, weights.shape[1]), copies, dim))


@torch.library.register_fake("onward::keyed_random")
def _(key, op, distribution, size, dtype, device):  # type: ignore[no-untyped-def]
    return torch.empty(size, dtype=dtype, device=device)


@torch.library.register_fake("onward::stochastic_sign")
def _(x, scale, copies, key, site, sizes, dim, outer):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _packed(x: Tensor, domain: str, dim: int) -> Tensor:
    samples = x.shape[dim] if dim >= 0 else 1
    elements = x.numel() // samples
    return x.new_empty((DOMAINS[domain], samples, row_bytes(elements, 1)), dtype=torch.uint8)


@torch.library.register_fake("onward::pack_signs")
def _(x, domain, dim):  # type: ignore[no-untyped-def]
    return _packed(x, domain, dim)


@torch.library.register_fake("onward::pack_stochastic_signs")
def _(x, scale, copies, key, site, domain, sizes, dim, outer):  # type: ignore[no-untyped-def]
    return _packed(x, domain, dim)


@torch.library.register_fake("onward::unpack_signs")
def _(packed, domain, sizes, dim, dtype):  # type: ignore[no-untyped-def]
    shape = list(sizes)
    if dim >= 0:
        shape[dim] = packed.shape[1]
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("onward::packed_linear_gradient")
def _(packed, scale, domain, x_sizes, x_dim, weights, copies, key, site, noise, score, sizes, *rest):  # type: ignore[no-untyped-def]
    (_, _, dtype, bias) = rest
    return packed.new_empty(sizes[-1] * (x_sizes[-1] + bias), dtype=dtype)


@torch.library.register_fake("onward::packed_convolution_gradient")
def _(packed, *given):  # type: ignore[no-untyped-def]
    (dtype, bias, weight) = given[-6:-3]
    return packed.new_empty(weight.numel() + bias * weight.shape[0], dtype=dtype)


@torch.library.register_fake("onward::pack_levels")
def _(x, domain, bits, dim):  # type: ignore[no-untyped-def]
    samples = x.shape[dim] if dim >= 0 else 1
    return x.new_empty((samples, row_bytes(x.numel() // samples, bits)), dtype=torch.uint8)


@torch.library.register_fake("onward::unpack_levels")
def _(packed, domain, bits, sizes, dim, dtype):  # type: ignore[no-untyped-def]
    shape = list(sizes)
    if dim >= 0:
        shape[dim] = packed.shape[0]
    return packed.new_empty(shape, dtype=dtype)


perturb = torch.ops.onward.perturb.default
perturb_weight = torch.ops.onward.perturb_weight.default
weight_noise_sum = torch.ops.onward.weight_noise_sum.default
spread_blocks = torch.ops.onward.spread_blocks.default
count_blocks = torch.ops.onward.count_blocks.default
tile = torch.ops.onward.tile.default
weighted_noise_sum = torch.ops.onward.weighted_noise_sum.default
weighted_noise = torch.ops.onward.weighted_noise.default
keyed_random = torch.ops.onward.keyed_random.default
stochastic_sign = torch.ops.onward.stochastic_sign.default
pack_signs = torch.ops.onward.pack_signs.default
unpack_signs = torch.ops.onward.unpack_signs.default
pack_stochastic_signs = torch.ops.onward.pack_stochastic_signs.default
packed_linear_gradient = torch.ops.onward.packed_linear_gradient.default
packed_convolution_gradient = torch.ops.onward.packed_convolution_gradient.default
pack_levels = torch.ops.onward.pack_levels.default
unpack_levels = torch.ops.onward.unpack_levels.default

PERTURBING = (perturb, perturb_weight)
"""The operators that add noise to a value."""
REGENERATING = (weighted_noise, weighted_noise_sum, weight_noise_sum)
"""The operators that make it again for a gradient."""
WEIGHT_NOISE = ("on", "operation", "weight", "bias", "stride", "padding", "dilation", "groups")
"""What `perturb_weight` is told of the noise and of the operation."""
