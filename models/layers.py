"""What the zoo's networks are made of: activations with their gains, convolutions with a normalisation, initialisation.

`Sign`, `Step` and `Quantise` have no derivative that backpropagation could use. The first and the last have a
straight-through twin: the same forward, with the derivative of a clamp.

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

from ..passes.errors import BatchError, OptionError, unknown_name

RELU_GAIN = math.sqrt(2.0)


def pass_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of `hard`, bit for bit, with the derivative of `soft` (Bengio et al. 2013, arXiv 1308.3432)."""
    # What is subtracted is +0.0, which leaves every number as it is, also -0.0;
    # the usual x + (hard - x).detach() rounds.
    return hard.detach() - (soft.detach() - soft)


class Sign(nn.Module):
    """The sign of every element, -1, 0 or 1, by `torch.sign`. Its derivative is zero wherever it exists.

    Args:
        straight_through: Whether the derivative is 1 instead wherever the input is in [-1, 1] (Courbariaux et al.
            2016, arXiv 1602.02830), so that backpropagation can train the same network.
    """

    def __init__(self, straight_through: bool = False) -> None:
        super().__init__()
        self.straight_through = straight_through

    def forward(self, inputs: Tensor) -> Tensor:
        """The signs of `inputs`, of any shape."""
        signs = torch.sign(inputs)
        return pass_through(signs, inputs.clamp(-1.0, 1.0)) if self.straight_through else signs


class Step(nn.Module):
    """The Heaviside step: 1 where the input is positive, else 0. Its derivative is zero wherever it exists."""

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs > 0).to(inputs.dtype)


class Quantise(nn.Module):
    """The nearest of `levels` evenly spaced numbers from 0 to `scale`, by `torch.round`; halves go to even steps.

    Its derivative is zero wherever it exists. Like a ReLU it blocks what is below zero.

    Args:
        levels: How many numbers, at least 2; four of them are 2 bits.
        scale: The largest.
        straight_through: Whether the derivative is 1 instead wherever the input is in [0, `scale`] (Zhou et al. 2016,
            arXiv 1606.06160), so that backpropagation can train the same network.

    Raises:
        OptionError: `levels` is below 2, or `scale` is not positive.
    """

    def __init__(self, levels: int = 4, scale: float = 2.0, *, straight_through: bool = False) -> None:
        super().__init__()
        if levels < 2 or not 0 < scale < math.inf:
            raise OptionError(f"a quantiser needs levels of at least 2 and a positive scale, not {levels} and {scale}.")
        self.levels, self.scale, self.straight_through = levels, scale, straight_through

    @property
    def gain(self) -> float:
        """``1 / sqrt(E[q(z)²])`` for a standard normal z: the gain of the layer that follows."""
        step = self.scale / (self.levels - 1)
        # The sum over the levels of level² P(level) by parts: each level k >= 1 is reached where z > (k - 1/2) step.
        reached = (math.erfc((k - 0.5) * step / RELU_GAIN) / 2 for k in range(1, self.levels))
        return 1 / math.sqrt(sum((2 * k - 1) * step**2 * p for k, p in enumerate(reached, start=1)))

    def forward(self, inputs: Tensor) -> Tensor:
        """From float of any shape to the same shape."""
        clamped = inputs.clamp(0.0, self.scale)
        quantised = torch.round(clamped * ((self.levels - 1) / self.scale)) * (self.scale / (self.levels - 1))
        return pass_through(quantised, clamped) if self.straight_through else quantised


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


def normalisation(name: str, channels: int) -> nn.Module:
    """A fresh module for the normalisation `name` of so many feature maps.

    Raises:
        UnknownNameError: `name` is not in `NORMS`.
    """
    if name not in NORMS:
        raise unknown_name("norm", name, NORMS)
    return NORMS[name](channels)


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
    following = normalisation(norm, out_channels)
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=norm == "none")
    nn.init.normal_(layer.weight, std=gain / math.sqrt(in_channels * kernel * kernel))
    if layer.bias is None:
        return nn.Sequential(OrderedDict(conv=layer, norm=following))
    nn.init.zeros_(layer.bias)
    return layer


def check_tokens(model: str, tokens: Tensor) -> None:
    """Raises BatchError unless `tokens` are whole numbers ``(batch, length)``, `length` at least 1."""
    whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if not whole or tokens.dim() != 2 or tokens.shape[1] == 0:
        raise BatchError(
            f"{model} reads tokens, whole numbers of shape (batch, length) with a length of at least 1, not "
            f"{str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}."
        )
