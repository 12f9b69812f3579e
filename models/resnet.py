"""Small residual networks that also train without any normalisation.

A residual sum doubles the variance of its terms. Normalised networks forget that at the next normalisation; without
one, both terms of a sum start with gain 1 instead of ReLU's √2, so that the sum has the variance of its input.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .layers import RELU_GAIN, convolution, linear


class ResidualBlock(nn.Module):
    """``relu(conv2(relu(conv1(x))) + shortcut(x))``, both convolutions 3×3 (He et al. 2016, arXiv 1512.03385).

    The first convolution has the stride. The shortcut is a 1×1 convolution where the shape changes, else the identity.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, norm: str = "none") -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, out_channels, stride=stride, norm=norm, gain=RELU_GAIN)
        self.conv2 = convolution(out_channels, out_channels, norm=norm, gain=1.0)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = convolution(in_channels, out_channels, 1, stride=stride, norm=norm, gain=1.0)

    def forward(self, inputs: Tensor) -> Tensor:
        """From ``(batch, in_channels, h, w)`` to ``(batch, out_channels, ⌈h / stride⌉, ⌈w / stride⌉)``."""
        branch = self.conv2(torch.relu(self.conv1(inputs)))
        return torch.relu(branch + self.shortcut(inputs))


def resnet5(num_classes: int = 10, in_channels: int = 1, width: int = 16, norm: str = "none") -> nn.Sequential:
    """Five weight layers: a stem, one residual block of stride 2 with its projection, and a linear layer.

    The network of Jiang et al. 2024 (arXiv 2305.08960) and Zhang et al. 2024 (arXiv 2403.12320) by its count of
    layers; the widths are ours. The block has ``2 * width`` channels; global average pooling precedes the linear layer,
    so any image size will do. On digits, plain backpropagation with Adam (learning rate 5e-3, batches of 32) reaches a
    test accuracy of 0.98 in 15 epochs.

    Args:
        num_classes: Outputs.
        in_channels: Channels of the images.
        width: Channels of the stem.
        norm: "none", "batch" or "group": what follows each convolution.

    Returns:
        A module from float ``(batch, in_channels, height, width)`` to logits ``(batch, num_classes)``.

    Raises:
        UnknownNameError: `norm` is none of these.
    """
    modules: dict[str, nn.Module] = {
        "stem": convolution(in_channels, width, norm=norm, gain=1.0),
        "relu": nn.ReLU(),
        "block": ResidualBlock(width, 2 * width, stride=2, norm=norm),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "head": linear(2 * width, num_classes, gain=RELU_GAIN),
    }
    return nn.Sequential(OrderedDict(modules))


def resnet9(num_classes: int = 10, in_channels: int = 3, width: int = 32, norm: str = "none") -> nn.Sequential:
    """Nine weight layers in the order that David Page used for DAWNBench (2018): four stages, two residual blocks.

    Stem, convolution, pool, block, convolution, pool, convolution, pool, block, global average pool, linear layer, with
    `width`, 2, 4 and 8 times `width` channels; ``width=64`` is Page's size. The blocks are those of `ResidualBlock`,
    with the ReLU after the sum. Needs images of at least 8×8.

    Args:
        num_classes: Outputs.
        in_channels: Channels of the images.
        width: Channels of the stem.
        norm: "none", "batch" or "group": what follows each convolution.

    Returns:
        A module from float ``(batch, in_channels, height, width)`` to logits ``(batch, num_classes)``.

    Raises:
        UnknownNameError: `norm` is none of these.
    """
    modules: dict[str, nn.Module] = {
        "stem": convolution(in_channels, width, norm=norm, gain=1.0),
        "relu0": nn.ReLU(),
        "conv1": convolution(width, 2 * width, norm=norm, gain=RELU_GAIN),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "block1": ResidualBlock(2 * width, 2 * width, norm=norm),
        "conv2": convolution(2 * width, 4 * width, norm=norm, gain=RELU_GAIN),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "conv3": convolution(4 * width, 8 * width, norm=norm, gain=RELU_GAIN),
        "relu3": nn.ReLU(),
        "pool3": nn.MaxPool2d(2),
        "block3": ResidualBlock(8 * width, 8 * width, norm=norm),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "head": linear(8 * width, num_classes, gain=RELU_GAIN),
    }
    return nn.Sequential(OrderedDict(modules))


def resnet18(num_classes: int = 10, in_channels: int = 3, width: int = 64, norm: str = "none") -> nn.Sequential:
    """ResNet-18 (He et al. 2016, arXiv 1512.03385) as images of 32×32 have it: a 3×3 stem of stride 1 and no max-pool.

    Four stages of two residual blocks, with `width`, 2, 4 and 8 times `width` channels, the first block of every stage
    but the first with a stride of 2; global average pool, linear layer. Any image size will do.

    Args:
        num_classes: Outputs.
        in_channels: Channels of the images.
        width: Channels of the stem and the first stage; 64 are the paper's.
        norm: "none", "batch" or "group": what follows each convolution.

    Returns:
        A module from float ``(batch, in_channels, height, width)`` to logits ``(batch, num_classes)``.

    Raises:
        UnknownNameError: `norm` is none of these.
    """
    modules: dict[str, nn.Module] = {
        "stem": convolution(in_channels, width, norm=norm, gain=1.0),
        "relu": nn.ReLU(),
    }
    channels = width
    for stage in range(4):
        for block in range(2):
            stride = 2 if stage and not block else 1
            modules[f"stage{stage + 1}_{block + 1}"] = ResidualBlock(channels, width << stage, stride=stride, norm=norm)
            channels = width << stage
    modules["pool"] = nn.AdaptiveAvgPool2d(1)
    modules["flatten"] = nn.Flatten()
    modules["head"] = linear(channels, num_classes, gain=RELU_GAIN)
    return nn.Sequential(OrderedDict(modules))
