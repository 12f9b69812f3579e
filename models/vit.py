"""A small Vision Transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..passes.errors import OptionError
from .layers import linear
from .transformer import Block, check_heads, residual_gain


class VisionTransformer(nn.Module):
    """What `vit` builds, from images of ``side * patch`` pixels a side.

    The gain of what blocks add is that of `residual_gain`.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        side: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, width, patch, stride=patch, bias=False)  # the position is a bias
        nn.init.normal_(self.embed.weight, std=1 / math.sqrt(in_channels * patch**2))
        # The usual 0.02 hides where a patch was for many steps: digits ended at 0.93 with it, and at 0.98 with this.
        self.position = nn.Parameter(torch.empty(1, side**2, width).normal_(std=0.3))
        gain = residual_gain(depth)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, gain=gain) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = linear(width, num_classes, gain=1.0)

    def forward(self, images: Tensor) -> Tensor:
        """From ``(batch, in_channels, image_size, image_size)`` to logits ``(batch, num_classes)``."""
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens).mean(1)))
        return logits


def vit(
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: int = 8,
    patch: int | None = None,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    expansion: int = 2,
) -> VisionTransformer:
    """A Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) for small images.

    Patches become tokens by one convolution, each gets a learned position added, and pre-norm blocks follow. The mean
    of the tokens, normalised, goes through a linear layer. There is no class token, as in Beyer et al. 2022 (arXiv
    2205.01580), and no dropout. On digits, plain backpropagation with Adam (learning rate 1e-3, batches of 32) reaches
    a test accuracy of 0.98 in 20 epochs.

    Args:
        num_classes: Outputs.
        in_channels: Channels of the images.
        image_size: Height and width of the images.
        patch: Height and width of a patch; by default the smallest that makes 16 to 49 of them: 2 for images of 8×8, 4
            for 28×28, 8 for 32×32.
        width: Features of a token.
        depth: Blocks, named ``blocks.0``, ``blocks.1`` and so on.
        heads: Attention heads.
        expansion: Hidden features of a block's perceptron, as a multiple of `width`.

    Returns:
        A module from float ``(batch, in_channels, image_size, image_size)`` to logits ``(batch, num_classes)``.

    Raises:
        OptionError: `patch` does not divide `image_size`, or no patch by default does; `heads` does not divide `width`.
    """
    if patch is None:
        patch = next((image_size // side for side in (7, 6, 5, 4) if image_size % side == 0), None)
        if patch is None:
            raise OptionError(
                f"vit: images of {image_size}×{image_size} do not make 16 to 49 square patches; give patch."
            )
    if patch < 1 or image_size % patch:
        raise OptionError(f"vit: patch must divide image_size, but patch={patch} and image_size={image_size}.")
    check_heads("vit", width, heads)
    return VisionTransformer(
        num_classes=num_classes,
        in_channels=in_channels,
        side=image_size // patch,
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        hidden=expansion * width,
    )
