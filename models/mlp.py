"""Multilayer perceptrons, also with activations that have no derivative."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from .layers import activation as make_activation
from .layers import linear


def mlp(
    in_features: int = 64, hidden: Sequence[int] = (128, 64), num_classes: int = 10, activation: str = "relu"
) -> nn.Sequential:
    """A multilayer perceptron; the defaults are the 64-128-64-10 network of the digits experiments.

    On digits, plain backpropagation with Adam (learning rate 3e-3, batches of 32) reaches a test accuracy of 0.98 in 15
    epochs; with "sign" it reaches 0.76, because only the last layer learns.

    Args:
        in_features: Numbers in one sample.
        hidden: Width of each hidden layer; empty for logistic regression.
        num_classes: Outputs.
        activation: "relu", "tanh", "gelu", or one that backpropagation cannot train: "sign" or "step".

    Returns:
        A module from float ``(batch, ...)``, flattened to ``(batch, in_features)``, to logits ``(batch, num_classes)``.

    Raises:
        UnknownNameError: `activation` is none of these.
    """
    modules: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    width, gain = in_features, 1.0
    for number, out_features in enumerate(hidden, start=1):
        modules[f"fc{number}"] = linear(width, out_features, gain=gain)
        modules[f"act{number}"], gain = make_activation(activation)
        width = out_features
    modules["head"] = linear(width, num_classes, gain=1.0)
    return nn.Sequential(OrderedDict(modules))
