"""Images from 8-bit arrays to tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...passes.errors import DataError


def images_to_tensor(images: Iterable[Any]) -> Tensor:
    """Stack images of equal size into float32 ``(n, channels, height, width)`` from 0 to 1.

    Args:
        images: PIL images, or arrays, of uint8 ``(height, width)`` or ``(height, width, channels)``.

    Raises:
        DataError: The images differ in shape, are not 8-bit, or there are none.
    """
    arrays = [np.asarray(image) for image in images]
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1:
        raise DataError(f"images must all have one shape; found {sorted(shapes) or 'no images'}.")
    stacked = np.stack(arrays)
    if stacked.dtype != np.uint8:
        raise DataError(f"images must be 8-bit (uint8), not {stacked.dtype}.")
    if stacked.ndim == 3:
        stacked = stacked[..., None]
    return (
        torch.from_numpy(stacked).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    )
