"""A plain convolutional network without shortcuts."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from ..passes.errors import OptionError
from .layers import RELU_GAIN, convolution, linear


def vgg8(
    num_classes: int = 10, in_channels: int = 3, image_size: int = 32, width: int = 32, norm: str = "none"
) -> nn.Sequential:
    """Eight weight layers: three stages of two 3×3 convolutions and a max-pool, then two linear layers.

    After VGG (Simonyan & Zisserman 2015, arXiv 1409.1556) in the size usual for CIFAR-10. The stages have `width`, 2
    and 4 times `width` channels, the hidden linear layer ``8 * width`` features; the usual size is ``width=128``.

    Args:
        num_classes: Outputs.
        in_channels: Channels of the images.
        image_size: Height and width of the images, at least 8.
        width: Channels of the first stage.
        norm: "none", "batch" or "group": what follows each convolution.

    Returns:
        A module from float ``(batch, in_channels, image_size, image_size)`` to logits ``(batch, num_classes)``.

    Raises:
        UnknownNameError: `norm` is none of these.
        OptionError: `image_size` is below 8, so that three pools would leave nothing.
    """
    if image_size < 8:
        raise OptionError(f"vgg8 halves its images three times: image_size must be at least 8, not {image_size}.")
    modules: dict[str, nn.Module] = {}
    channels, gain = in_channels, 1.0
    for stage, out_channels in enumerate((width, 2 * width, 4 * width), start=1):
        for part in "ab":
            modules[f"conv{stage}{part}"] = convolution(channels, out_channels, norm=norm, gain=gain)
            modules[f"relu{stage}{part}"] = nn.ReLU()
            channels, gain = out_channels, RELU_GAIN
        modules[f"pool{stage}"] = nn.MaxPool2d(2)
    modules["flatten"] = nn.Flatten()
    modules["fc"] = linear(channels * (image_size // 8) ** 2, 8 * width, gain=RELU_GAIN)
    modules["relu"] = nn.ReLU()
    modules["head"] = linear(8 * width, num_classes, gain=1.0)
    return nn.Sequential(OrderedDict(modules))
