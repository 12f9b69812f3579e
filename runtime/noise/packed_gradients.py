"""Weight gradients from packed signs and noise that is made again (method.md, equations 1 to 3, capture a copy).

The definitions of two operators that `passes.fuse_packed_gradients` puts in the place of what they are composed of.
Both return the weight's gradient and, where there is one, behind it that of the bias, as one vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...passes import ops


class Factors(NamedTuple):
    """What both operators are given first: both factors, tiled, and what to make of them."""

    packed: Tensor
    """A capture of the operation's input, as `packing.unpack_signs` takes it with the four that follow `scale`."""
    scale: Tensor | None
    """What the signs are multiplied by, one a sample."""
    domain: str
    x_sizes: Sequence[int]
    x_dim: int
    weights: Tensor
    """From here to `outer`, the noise at the operation's output, as `operators.weighted_noise` takes it."""
    copies: Tensor
    key: Tensor
    site: int
    noise: str
    score: str
    sizes: Sequence[int]
    dim: int
    outer: int
    dtype: torch.dtype
    """Of both factors and of the result."""
    bias: bool

    @property
    def samples(self) -> int:
        """Samples of all copies."""
        return self.weights.shape[1] * self.copies.shape[0]

    def activation(self) -> Tensor:
        x: Tensor = ops.unpack_signs(self.packed, self.domain, self.x_sizes, self.x_dim, self.dtype)
        return x if self.scale is None else x * self.scale

    def cotangent(self) -> Tensor:
        made: Tensor = ops.weighted_noise(*self[self._fields.index("weights") : self._fields.index("dtype")])
        return made.to(self.dtype)


def linear_gradient(x: Tensor, cotangent: Tensor, bias: bool) -> Tensor:
    """The sum of ``cotangent[row, out] * x[row, in]`` over all axes but the last, and with `bias` of the cotangent."""
    x, cotangent = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    product = (cotangent.t() @ x).flatten()
    return torch.cat([product, cotangent.sum(0)]) if bias else product


def convolution_gradient(
    x: Tensor,
    cotangent: Tensor,
    bias: bool,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The correlation of the cotangent with x, shaped like `weight`, and with `bias` the cotangent's sum."""
    described = ([weight.shape[0]], stride, padding, dilation, False, [0] * len(stride), 1, [False, True, bias])
    _, found, own = torch.ops.aten.convolution_backward.default(cotangent, x, weight, *described)
    return torch.cat([found.flatten(), own]) if bias else found.flatten()


def packed_linear_gradient(*given: Any) -> Tensor:
    """Of a linear layer, from its `Factors`. Raises as `unpack_signs` and `weighted_noise`."""
    factors = Factors(*given)
    return linear_gradient(factors.activation(), factors.cotangent(), factors.bias)


def packed_convolution_gradient(*given: Any) -> Tensor:
    """Of a convolution of one group, from its `Factors`, its weight (of which the shape counts), stride, padding and
    dilation. Raises as the linear one."""
    factors = Factors(*given[: len(Factors._fields)])
    return convolution_gradient(factors.activation(), factors.cotangent(), factors.bias, *given[len(factors) :])


for _function in (packed_linear_gradient, packed_convolution_gradient):
    torch.library.impl(f"onward::{_function.__name__}", "CompositeExplicitAutograd", _function)
