"""Weight gradients from packed signs and noise that is made again (method.md, equations 1 to 3, capture a copy).

The definitions of two operators that `passes.fuse_packed_gradients` puts in the place of what they are composed of.
Both return the weight's gradient and, with `bias`, behind it that of the bias, as one vector of `dtype`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...passes import ops


def operands(
    packed: Tensor,
    scale: Tensor | None,
    domain: str,
    x_sizes: Sequence[int],
    x_dim: int,
    weights: Tensor,
    copies: Tensor,
    key: Tensor,
    site: int,
    noise: str,
    score: str,
    sizes: Sequence[int],
    dim: int,
    outer: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The activation that the signs stand for, and the gradient at the output: both tiled, of `dtype`."""
    x = ops.unpack_signs(packed, domain, x_sizes, x_dim, dtype)
    cotangent = ops.weighted_noise(weights, copies, key, site, noise, score, sizes, dim, outer).to(dtype)
    return x if scale is None else x * scale, cotangent


def packed_linear_gradient(
    packed: Tensor,
    scale: Tensor | None,
    domain: str,
    x_sizes: Sequence[int],
    x_dim: int,
    weights: Tensor,
    copies: Tensor,
    key: Tensor,
    site: int,
    noise: str,
    score: str,
    sizes: Sequence[int],
    dim: int,
    outer: int,
    dtype: torch.dtype,
    bias: bool,
) -> Tensor:
    """Of a linear layer: the sum of ``cotangent[row, out] * x[row, in]`` over copies, samples and positions.

    `packed` and `scale` (one a sample, or None) are a capture of the layer's input, `domain`, `x_sizes`, `x_dim` and
    `dtype` as `packing.unpack_signs` takes them; the rest is `operators.weighted_noise`'s. Raises as both.
    """
    noisy = (weights, copies, key, site, noise, score, sizes, dim, outer)
    x, cotangent = operands(packed, scale, domain, x_sizes, x_dim, *noisy, dtype)
    x, cotangent = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    product = (cotangent.t() @ x).flatten()
    return torch.cat([product, cotangent.sum(0)]) if bias else product


def packed_convolution_gradient(
    packed: Tensor,
    scale: Tensor | None,
    domain: str,
    x_sizes: Sequence[int],
    x_dim: int,
    weights: Tensor,
    copies: Tensor,
    key: Tensor,
    site: int,
    noise: str,
    score: str,
    sizes: Sequence[int],
    dim: int,
    outer: int,
    dtype: torch.dtype,
    bias: bool,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Of a convolution of one group with zeros around: the correlation of the cotangent with x. As the linear one."""
    noisy = (weights, copies, key, site, noise, score, sizes, dim, outer)
    x, cotangent = operands(packed, scale, domain, x_sizes, x_dim, *noisy, dtype)
    return convolution_gradient(cotangent, x, bias, weight, stride, padding, dilation)


def convolution_gradient(
    cotangent: Tensor,
    x: Tensor,
    bias: bool,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The gradients of a convolution's weight and, with `bias`, of its bias, as one vector."""
    described = ([weight.shape[0]], stride, padding, dilation, False, [0] * len(stride), 1, [False, True, bias])
    _, found, own = torch.ops.aten.convolution_backward.default(cotangent, x, weight, *described)
    return torch.cat([found.flatten(), own]) if bias else found.flatten()


for _function in (packed_linear_gradient, packed_convolution_gradient):
    torch.library.impl(f"onward::{_function.__name__}", "CompositeExplicitAutograd", _function)
