"""Spiking networks of leaky integrate-and-fire neurons: a hard threshold, and no surrogate gradient.

A network runs for a number of time steps. Every layer takes all of them at once, as a dimension behind the samples':
``(batch, steps, ...)``. So a layer is one operation however many steps share its weights, and only the neurons, which
have no parameters, go from step to step.

The neuron is that of Neftci et al. 2019 (arXiv 1901.09948) with reset by subtraction: ``v ← decay v + current``, a
spike where ``v > 1``, and then ``v ← v - spike``. A spike has no derivative anywhere. Forward-only training of such
networks is an experiment of Ren et al. 2025 (arXiv 2410.05966); what it is compared with, the surrogate gradient, is
the fast sigmoid's (Zenke & Ganguli 2018, arXiv 1705.11146).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..passes.errors import OptionError, unknown_name
from .layers import convolution, linear, pass_through

SPIKE_GAIN = 2.5
"""The gain behind `Spiking` neurons: layers of decay 0.5 and 4 steps then go on spiking, in a step out of five."""
RATE_GAIN = math.sqrt(2.0)
"""The gain behind random spikes with probability a half."""

SLOPE = 2.0
"""Steepness of the surrogate derivative ``1 / (1 + SLOPE |v - 1|)²``."""


class Spiking(nn.Module):
    """Leaky integrate-and-fire neurons with threshold 1 that start at rest.

    Args:
        decay: What is left of a membrane's potential after a step, in [0, 1]; 1 is a neuron without leak.
        surrogate: Whether a spike has the derivative ``1 / (1 + 2 |v - 1|)²`` by the potential v, so that
            backpropagation through time can train the same network.

    Raises:
        OptionError: `decay` is outside [0, 1].
    """

    def __init__(self, decay: float = 0.5, *, surrogate: bool = False) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise OptionError(f"decay={decay}: what is left of a potential after a step lies in [0, 1].")
        self.decay, self.surrogate = decay, surrogate

    def forward(self, currents: Tensor) -> Tensor:
        """From float currents ``(batch, steps, ...)`` to spikes, 0 or 1, of the same shape and dtype."""
        potential = torch.zeros_like(currents[:, 0])
        spikes = []
        for current in currents.unbind(1):
            potential = self.decay * potential + current
            over = potential - 1.0
            spike = (over > 0).to(currents.dtype)
            if self.surrogate:
                spike = pass_through(spike, over / (1.0 + SLOPE * over.abs()))
            potential = potential - spike
            spikes.append(spike)
        return torch.stack(spikes, 1)


class Repeat(nn.Module):
    """The same numbers at every one of `steps` time steps: from ``(batch, ...)`` to ``(batch, steps, ...)``."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.unsqueeze(1).expand(-1, self.steps, *inputs.shape[1:])


class RandomSpikes(nn.Module):
    """Every number as an independent random spike, 0 or 1, whose probability is the number's logistic function.

    So standardised inputs, such as those of the data sets here, have rates around a half.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        return (torch.rand_like(inputs) < torch.sigmoid(inputs)).to(inputs.dtype)


class EachStep(nn.Module):
    """A layer at every time step, of ``(batch, steps, ...)`` as of so many more samples."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs.flatten(0, 1))
        answer: Tensor = outputs.unflatten(0, (-1, inputs.shape[1]))
        return answer


class Membrane(nn.Module):
    """Spikes ``(batch, steps, features)`` as the mean over time of what leaky membranes make of them, not of currents.

    A membrane that does not spike is linear: the layer behind it may as well read the mean, once, and its outputs are
    the mean membranes of readout neurons with this decay, in units of what a constant current of 1 does to them.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    def forward(self, spikes: Tensor) -> Tensor:
        """To ``(batch, features)``."""
        steps = spikes.shape[1]
        # a current at step t is still there, decayed, at each later one
        kept = [sum(self.decay**age for age in range(steps - step)) for step in range(steps)]
        weights = spikes.new_tensor([each / sum(kept) for each in kept])
        return torch.einsum("bt...,t->b...", spikes, weights)


class Count(nn.Module):
    """Spikes ``(batch, steps, features)`` summed over time."""

    def forward(self, spikes: Tensor) -> Tensor:
        return spikes.sum(1)


def spiking_mlp(
    in_features: int = 64,
    hidden: Sequence[int] = (128, 64),
    num_classes: int = 10,
    steps: int = 4,
    decay: float = 0.5,
    encoding: str = "direct",
    readout: str = "membrane",
    surrogate: bool = False,
) -> nn.Sequential:
    """`mlp` with leaky integrate-and-fire neurons for activations.

    Args:
        in_features: Numbers in one sample.
        hidden: Width of each hidden layer, at least one.
        num_classes: Outputs.
        steps: Time steps.
        decay: What is left of a membrane's potential after a step; the readout's, too.
        encoding: "direct", where the first layer reads the input once and drives its neurons by constant currents; or
            "rate", where it reads random spikes, at every step with the probability that each number is.
        readout: "membrane", the mean potential over time of readout neurons that do not spike; or "count", where they
            do, and their spikes are counted.
        surrogate: Build the twin that backpropagation can train: same initial weights and forward, bit for bit, and the
            derivative of a fast sigmoid at every spike. It is there for comparison only.

    Returns:
        A module from float ``(batch, ...)``, flattened to ``(batch, in_features)``, to logits ``(batch, num_classes)``.

    Raises:
        UnknownNameError: `encoding` or `readout` is none of these.
        OptionError: `hidden` is empty, `steps` is below 1, or `decay` is outside [0, 1].
    """
    if not hidden:
        raise OptionError("spiking_mlp: hidden is empty, and a network without neurons does not spike.")
    widths = [in_features, *hidden]
    layers = [
        (f"fc{number}", functools.partial(linear, *pair))
        for number, pair in enumerate(itertools.pairwise(widths), start=1)
    ]
    network = _Time(steps, decay, encoding, readout, surrogate)
    return network.build([("flatten", nn.Flatten())], layers, [], linear(hidden[-1], num_classes, gain=SPIKE_GAIN))


def spiking_cnn(
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: int = 8,
    width: int = 16,
    norm: str = "batch",
    steps: int = 4,
    decay: float = 0.5,
    encoding: str = "direct",
    readout: str = "membrane",
    surrogate: bool = False,
) -> nn.Sequential:
    """Two convolutions and a linear layer, with leaky integrate-and-fire neurons for activations.

    The convolutions have `width` and 2 times `width` channels, the second a stride of 2. The linear layer reads the
    neurons of every position.

    Args:
        num_classes: Outputs.
        in_channels: Channels of the images.
        image_size: Height and width of the images.
        width: Channels of the first convolution.
        norm: "none", "batch" or "group": what follows each convolution.
        steps: Time steps.
        decay: As for `spiking_mlp`, and so are the others.
        encoding: "direct" or "rate".
        readout: "membrane" or "count".
        surrogate: Build the twin that backpropagation can train.

    Returns:
        A module from float ``(batch, in_channels, image_size, image_size)`` to logits ``(batch, num_classes)``.

    Raises:
        UnknownNameError: As `spiking_mlp`; or `norm` is none of these.
        OptionError: `steps` is below 1, or `decay` is outside [0, 1].
    """
    layers = [
        ("conv1", functools.partial(convolution, in_channels, width, norm=norm)),
        ("conv2", functools.partial(convolution, width, 2 * width, stride=2, norm=norm)),
    ]
    head = linear(2 * width * ((image_size + 1) // 2) ** 2, num_classes, gain=SPIKE_GAIN)
    network = _Time(steps, decay, encoding, readout, surrogate)
    return network.build([], layers, [("flatten", nn.Flatten(2))], head)


@dataclass(frozen=True)
class _Time:
    """What both networks do with time."""

    steps: int
    decay: float
    encoding: str
    readout: str
    surrogate: bool

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise OptionError(f"steps={self.steps}: a spiking network runs for at least one time step.")
        if self.encoding not in ("direct", "rate"):
            raise unknown_name("encoding", self.encoding, ("direct", "rate"))
        if self.readout not in ("membrane", "count"):
            raise unknown_name("readout", self.readout, ("membrane", "count"))

    def build(
        self,
        before: list[tuple[str, nn.Module]],
        layers: Sequence[tuple[str, Callable[..., nn.Module]]],
        behind: list[tuple[str, nn.Module]],
        head: nn.Linear,
    ) -> nn.Sequential:
        """`layers`, which are given their gains, with neurons behind each, and a readout by `head`."""
        modules, repeat = [*before], ("repeat", Repeat(self.steps))
        gain = 1.0
        if self.encoding == "rate":
            modules += [repeat, ("encode", RandomSpikes())]
            gain = RATE_GAIN
        for number, (name, make) in enumerate(layers, start=1):
            # what is the same at every step is computed once
            once = number == 1 and self.encoding == "direct"
            layer = make(gain=gain)
            modules += [(name, layer), repeat] if once else [(name, EachStep(layer))]
            modules.append((f"spike{number}", self._neurons()))
            gain = SPIKE_GAIN
        modules += behind
        if self.readout == "membrane":
            modules += [("membrane", Membrane(self.decay)), ("head", head)]
        else:
            modules += [("head", EachStep(head)), ("spike", self._neurons()), ("count", Count())]
        return nn.Sequential(OrderedDict(modules))

    def _neurons(self) -> Spiking:
        return Spiking(self.decay, surrogate=self.surrogate)
