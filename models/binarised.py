"""Networks of one bit: weights and activations are signs (Courbariaux et al. 2016, arXiv 1602.02830).

A layer's weight is ``α sign(W)``, with one positive α an output channel, the mean of ``|W|`` there (Rastegari et al.
2016, arXiv 1603.05279). W is the parameter, a *latent* weight that training moves in small steps until a sign flips.

``sign(W)`` has no derivative, so these layers declare one, that of ``clamp(W, -1, 1)``, for backpropagation and for
forward-only training alike: they differ in how the gradient reaches the binary weight, not in how it goes on to W. The
clamp is the mean of ``sign(W + u)``, u uniform in [-1, 1]: the declared derivative is that of the loss smoothed by such
noise on W, where the loss is linear in the weights. Where it is not, it is **biased**: it is taken at the signs
themselves and not on average over the noise. α passes no gradient on.

Activations are `Sign`, and those declare nothing unless ``straight_through=True`` asks for the twin.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Sign, normalisation, pass_through

MEAN_GAIN = math.sqrt(math.pi / 2)
"""How much smaller the mean of ``|W|`` is than the standard deviation of normal W."""


def binarise(weight: Tensor) -> Tensor:
    """``α sign(W)`` with α the mean of ``|W|`` over all dimensions but the first, and α times the derivative of a clamp
    to [-1, 1] (the straight-through estimator) by W.

    Args:
        weight: Floating-point, of at least two dimensions, output channels first.
    """
    scale = weight.detach().abs().mean(dim=tuple(range(1, weight.dim())), keepdim=True)
    return scale * pass_through(torch.sign(weight), weight.clamp(-1.0, 1.0))


class BinaryLinear(nn.Linear):
    """A linear layer with the weight ``α sign(W)``; the bias is a float."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, binarise(self.weight), self.bias)


class BinaryConv2d(nn.Conv2d):
    """A convolution with the weight ``α sign(W)``; the bias is a float."""

    def forward(self, input: Tensor) -> Tensor:
        outputs: Tensor = self._conv_forward(input, binarise(self.weight), self.bias)
        return outputs


def initialise(layer: nn.Linear | nn.Conv2d, *, gain: float) -> nn.Module:
    """`layer` with biases of zero and normal latent weights; those that it multiplies with have the size ``gain /
    sqrt(fan_in)``."""
    nn.init.normal_(layer.weight, std=gain * MEAN_GAIN / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def binarised_mlp(
    in_features: int = 64,
    hidden: Sequence[int] = (128, 64),
    num_classes: int = 10,
    straight_through: bool = False,
) -> nn.Sequential:
    """`sign_mlp` with binary weights in every layer.

    Args:
        in_features: Numbers in one sample.
        hidden: Width of each hidden layer.
        num_classes: Outputs.
        straight_through: Build the twin that backpropagation can train: same initial weights and forward, bit for bit,
            and a derivative of 1 at the signs of activations in [-1, 1]. It is there for comparison only.

    Returns:
        A module from float ``(batch, ...)``, flattened to ``(batch, in_features)``, to logits ``(batch, num_classes)``.
    """
    modules: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    width = in_features
    for number, out_features in enumerate(hidden, start=1):
        modules[f"fc{number}"] = initialise(BinaryLinear(width, out_features), gain=1.0)
        modules[f"act{number}"] = Sign(straight_through)
        width = out_features
    modules["head"] = initialise(BinaryLinear(width, num_classes), gain=1.0)
    return nn.Sequential(OrderedDict(modules))


def binarised_cnn(
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: int = 8,
    width: int = 16,
    norm: str = "batch",
    straight_through: bool = False,
) -> nn.Sequential:
    """Two convolutions and a linear layer, with binary weights everywhere and signs for activations.

    The convolutions have `width` and 2 times `width` channels, the second a stride of 2. The linear layer reads every
    position: a mean over positions, as in `quantised_cnn`, leaves of signs too little.

    Args:
        num_classes: Outputs.
        in_channels: Channels of the images.
        image_size: Height and width of the images.
        width: Channels of the first convolution.
        norm: "none", "batch" or "group": what follows each convolution.
        straight_through: Build the twin that backpropagation can train, as for `binarised_mlp`.

    Returns:
        A module from float ``(batch, in_channels, image_size, image_size)`` to logits ``(batch, num_classes)``.

    Raises:
        UnknownNameError: `norm` is none of these.
    """
    modules: dict[str, nn.Module] = {}
    channels = in_channels
    for number, (out_channels, stride) in enumerate(((width, 1), (2 * width, 2)), start=1):
        layer = BinaryConv2d(channels, out_channels, 3, stride, padding=1, bias=norm == "none")
        modules[f"conv{number}"] = initialise(layer, gain=1.0)
        if norm != "none":
            modules[f"norm{number}"] = normalisation(norm, out_channels)
        modules[f"act{number}"] = Sign(straight_through)
        channels = out_channels
    modules["flatten"] = nn.Flatten()
    modules["head"] = initialise(BinaryLinear(channels * ((image_size + 1) // 2) ** 2, num_classes), gain=1.0)
    return nn.Sequential(OrderedDict(modules))
