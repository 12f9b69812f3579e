"""Tables of 32-bit words on a device: which draws a call makes, and for which copies.

They follow from the copies, which are numbers on the host, and hardly ever change: the same words are the same tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from .philox import MASK

Asked = tuple[tuple[int, ...], torch.device, int]

_held = threading.local()


def words_on(values: Sequence[int], device: torch.device) -> Tensor:
    """32-bit words as an int32 tensor; the same tensor for the same words, which most steps repeat."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    asked = (tuple(values), device, stream)
    holders: list[dict[Asked, Tensor]] = getattr(_held, "stack", [])
    words = next((holder[asked] for holder in holders if asked in holder), None)
    words = _known_words(*asked) if words is None else words
    for holder in holders:
        holder[asked] = words
    return words


@contextmanager
def holding() -> Iterator[dict[Asked, Tensor]]:
    """All the words that this thread asks for meanwhile, each made once: a captured graph reads them for as long as it
    lives, and none can be brought to the GPU while it is captured."""
    holder: dict[Asked, Tensor] = {}
    before = getattr(_held, "stack", [])
    _held.stack = [*before, holder]
    try:
        yield holder
    finally:
        _held.stack = before


@lru_cache(maxsize=256)
def _known_words(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Of one stream alone: its memory may be given to others only behind what that stream still has to do."""
    return torch.tensor([signed(value) for value in values], dtype=torch.int32).to(device, non_blocking=True)


def signed(word: int) -> int:
    """The low 32 bits as a signed number."""
    word &= MASK
    return word - (1 << 32) if word >> 31 else word
