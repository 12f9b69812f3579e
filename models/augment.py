"""Augmentation of whole batches of images, on the device where they lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 4
"""Pixels by which `crop_flip` moves an image at most."""


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to 4 pixels along each axis, and mirror it or not, at random.

    What networks on CIFAR have been trained with since He et al. 2016 (arXiv 1512.03385): a random crop of the image
    padded by 4, and a horizontal flip with probability 1/2. What comes in at the border is 0, the mean colour of
    standardised images.

    Args:
        images: ``(batch, channels, height, width)``, of any dtype and on any device; left as it is.
        generator: A CPU generator; three numbers a sample are drawn from it.

    Returns:
        A new tensor of the same shape, dtype and device.
    """
    batch, _, height, width = images.shape
    moved = torch.randint(2 * PADDING + 1, (2, batch, 1), generator=generator)
    mirrored = torch.randint(2, (batch, 1), generator=generator).bool()
    rows = moved[0] + torch.arange(height)
    columns = moved[1] + torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width))
    sample, rows, columns = (
        index.to(images.device) for index in (torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None])
    )
    padded = F.pad(images, (PADDING,) * 4)
    return padded.movedim(1, -1)[sample, rows, columns].movedim(-1, 1).contiguous()


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"crop-flip": crop_flip}
"""What changes a batch of images, drawing from the generator of the batches."""
