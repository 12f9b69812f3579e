"""What the zoo's networks are made of: activations with their gains, convolutions with a normalisation, initialisation.

Initialisation is Kaiming's (He et al. 2015, arXiv 1502.01852): weights are normal with standard deviation
``gain / sqrt(fan_in)``, biases zero, where `gain` belongs to the activation that *produced* the layer's input. Signals
then keep their variance with depth, which matters more here than usual: a forward-only trainer perturbs every layer
with noise of comparable size, and reads its gradient from how far that noise carries.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..passes.errors import unknown_name

RELU_GAIN = math.sqrt(2.0)


class Sign(nn.Module):
    """The sign of every element, -1, 0 or 1, by `torch.sign`. Its derivative is zero wherever it exists."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.sign(inputs)


class Step(nn.Module):
    """The Heaviside step: 1 where the input is positive, else 0. Its derivative is zero wherever it exists."""

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs > 0).to(inputs.dtype)


# Each activation with its gain 1 / sqrt(E[f(z)²]) for a standard normal z: the next layer multiplies by it.
ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "relu": (nn.ReLU, RELU_GAIN),
    "tanh": (nn.Tanh, 1.593),
    "gelu": (nn.GELU, 1.534),
    "sign": (Sign, 1.0),
    "step": (Step, math.sqrt(2.0)),
}

# Each normalisation of `channels` feature maps; group normalisation takes up to eight groups, always of equal size.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "batch": lambda channels: nn.BatchNorm2d(channels),
    "group": lambda channels: nn.GroupNorm(math.gcd(8, channels), channels),
}


def activation(name: str) -> tuple[nn.Module, float]:
    """A fresh module for the activation `name`, and its gain.

    Raises:
        UnknownNameError: `name` is not in `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise unknown_name("activation", name, ACTIVATIONS)
    factory, gain = ACTIVATIONS[name]
    return factory(), gain


def linear(in_features: int, out_features: int, *, gain: float) -> nn.Linear:
    """A linear layer, its weights normal with standard deviation ``gain / sqrt(in_features)``, its biases zero."""
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(in_features))
    nn.init.zeros_(layer.bias)
    return layer


def convolution(
    in_channels: int, out_channels: int, kernel: int = 3, *, stride: int = 1, norm: str = "none", gain: float
) -> nn.Module:
    """A padded square convolution, followed by the normalisation `norm` unless that is ``"none"``.

    The weights are normal with standard deviation ``gain / sqrt(fan_in)``. The convolution has a bias, initially zero,
    only without a normalisation, which has its own.

    Raises:
        UnknownNameError: `norm` is not in `NORMS`.
    """
    if norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=norm == "none")
    nn.init.normal_(layer.weight, std=gain / math.sqrt(in_channels * kernel * kernel))
    if layer.bias is None:
        return nn.Sequential(OrderedDict(conv=layer, norm=NORMS[norm](out_channels)))
    nn.init.zeros_(layer.bias)
    return layer
