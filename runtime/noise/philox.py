"""Philox4x32-10: a counter-based generator of random 32-bit words.

Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A word is a function of a 128-bit
counter and a 64-bit key alone; no state, so nothing depends on device, chunking, order or threads.

Onward's counter is ``(block, draw, site | purpose << 24, step)`` and its key is the seed, all as 32-bit words (of seed
and step the low 64 and 32 bits). One block gives four words, its *lanes*.

`philox` is the definition, for tensors on any device. `philox_lanes_numpy` gives the same words on a CPU, faster: the
arithmetic is one unsigned 64-bit product a word and round, so what counts is the number of passes and of calls.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NUM_ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF

MAX_SITES = 1 << 24
"""Site numbers are below this: the upper eight bits of their word hold the purpose."""

Lanes = tuple[Any, Any, Any, Any]
Words = npt.NDArray[np.uint64]

# Up to this many blocks the number of NumPy calls decides, beyond it the number of bytes (measured: they meet near
# 3000).
_SMALL = 2048
_LOW = 0 if sys.byteorder == "little" else 1


class Purpose(IntEnum):
    """What random words are for: streams with different purposes never share a counter."""

    NOISE = 0
    STOCHASTIC_CAPTURE = 1
    MODEL = 2


class Key(NamedTuple):
    """What all the blocks of one stream have in common: the seed (64 bits), the step (32 bits), the site, the purpose.

    Seed and step are numbers, or 0-d int64 tensors on the device where the words are wanted: a step that was captured
    in a graph makes the words of the numbers that stand there when it is replayed.
    """

    seed: int | Tensor
    step: int | Tensor
    site: int
    purpose: Purpose

    @property
    def site_word(self) -> int:
        """The counter's third word."""
        return site_word(self.site, self.purpose)


def site_word(site: int, purpose: Purpose) -> int:
    assert 0 <= site < MAX_SITES, site
    return site | purpose << 24


@lru_cache(maxsize=64)
def round_keys(seed: int) -> tuple[tuple[int, int], ...]:
    """The ten pairs of round keys of a 64-bit `seed`."""
    low, high = seed & MASK, seed >> 32 & MASK
    return tuple(((low + r * WEYL_0) & MASK, (high + r * WEYL_1) & MASK) for r in range(NUM_ROUNDS))


def _round_keys_of(seed: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
    """`round_keys` of a 0-d int64 tensor."""
    rounds = torch.arange(NUM_ROUNDS, device=seed.device)
    low, high = (seed + rounds * WEYL_0) & MASK, ((seed >> 32) + rounds * WEYL_1) & MASK
    return list(zip(low.unbind(), high.unbind(), strict=True))


def philox(counter: Lanes, seed: int | Tensor) -> Lanes:
    """The four output words of a `counter` of four words in [0, 2^32), int64 tensors that broadcast or numbers, as
    int64 tensors; at least the first two are tensors.

    Signed products wrap in two's complement, so that masking gives both halves of the unsigned 64-bit product.
    """
    c0, c1, c2, c3 = counter
    for key0, key1 in _round_keys_of(seed) if isinstance(seed, Tensor) else round_keys(seed):
        product0, product1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product1 >> 32 & MASK) ^ c1 ^ key0,
            product1 & MASK,
            (product0 >> 32 & MASK) ^ c3 ^ key1,
            product0 & MASK,
        )
    return c0, c1, c2, c3


def philox_lanes(draws: Tensor, first: int, num_blocks: int, key: Key) -> Lanes:
    """The lanes of blocks ``first … first + num_blocks - 1`` of every draw: four int64 tensors (D, num_blocks).

    `draws` is int64 (D,), on the device where the lanes are wanted.
    """
    blocks = torch.arange(first, first + num_blocks, device=draws.device) & MASK
    constants = key.site_word, key.step & MASK
    return philox((blocks[None, :], (draws & MASK)[:, None], *constants), key.seed)


def philox_lanes_numpy(draws: Sequence[int], first: int, num_blocks: int, key: Key) -> Lanes:
    """`philox_lanes` on the CPU: four uint64 arrays (D, num_blocks)."""
    blocks = np.arange(first, first + num_blocks, dtype=np.uint64) & np.uint64(MASK)
    draw_words = np.array([draw & MASK for draw in draws], dtype=np.uint64)
    if len(draws) * num_blocks <= _SMALL:
        return _few_blocks(draw_words, blocks, key.site_word, int(key.step) & MASK, int(key.seed))
    return _many_blocks(draw_words, blocks, key.site_word, int(key.step) & MASK, int(key.seed))


@lru_cache(maxsize=16)
def _stretched_constants(seed: int, num: int) -> tuple[list[Words], list[npt.NDArray[np.uint32]]]:
    """Multipliers and round keys of `_few_blocks`, one entry a word: at most 0.2 MB an entry of the cache."""
    ordered = [(k1, k0) if r % 2 == 0 else (k0, k1) for r, (k0, k1) in enumerate(round_keys(seed))]
    multipliers = np.array([[MULTIPLIER_0, MULTIPLIER_1], [MULTIPLIER_1, MULTIPLIER_0]], np.uint64)
    return list(np.repeat(multipliers, num, axis=1)), list(np.repeat(np.array(ordered, np.uint32), num, axis=1))


def _few_blocks(draws: Words, blocks: Words, site: int, step: int, seed: int) -> Lanes:
    """Three NumPy calls a round, every one on 1-D arrays, which skips NumPy's general iterator.

    `words` holds the counter's words 0 and 2 one after the other, `products` the 64-bit products, whose low halves are
    the next words 1 and 3. A round exchanges the two streams; the second is stored backwards, so that reading the low
    halves backwards is that exchange.
    """
    shape = (len(draws), len(blocks))
    num = shape[0] * shape[1]
    words = np.empty(2 * num, np.uint64)
    words[:num].reshape(shape)[:] = blocks
    words[num:] = site
    previous = np.empty(2 * num, np.uint64)
    previous[:num].reshape(shape)[:] = draws[:, None]
    previous[num:] = step
    products = np.empty(2 * num, np.uint64)

    words_low = words.view(np.uint32)[_LOW::2]
    products_low = products.view(np.uint32)[_LOW::2][::-1]
    products_high = products.view(np.uint32)[1 - _LOW :: 2]
    previous_low = previous.view(np.uint32)[_LOW::2][::-1]
    previous_high = previous.view(np.uint32)[1 - _LOW :: 2]
    multipliers, keys = _stretched_constants(seed, num)
    for r in range(0, NUM_ROUNDS, 2):
        np.multiply(words, multipliers[0], products)
        np.bitwise_xor(products_high, previous_low, words_low)
        np.bitwise_xor(words_low, keys[r], words_low)
        np.multiply(words, multipliers[1], previous)
        np.bitwise_xor(previous_high, products_low, words_low)
        np.bitwise_xor(words_low, keys[r + 1], words_low)
    low = previous & np.uint64(MASK)
    return (
        words[:num].reshape(shape),
        low[:num].reshape(shape),
        words[num:][::-1].reshape(shape),
        low[num:][::-1].reshape(shape),
    )


def _many_blocks(draws: Words, blocks: Words, site: int, step: int, seed: int) -> Lanes:
    """Contiguous 64-bit passes in place. The first rounds see a draw or a block alone and run on broadcast vectors."""
    mask, half = np.array(MASK, np.uint64), np.array(32, np.uint64)
    multiplier0, multiplier1 = np.array(MULTIPLIER_0, np.uint64), np.array(MULTIPLIER_1, np.uint64)
    keys = np.array(round_keys(seed), np.uint64)[:, :, None, None]
    shape = (len(draws), len(blocks))
    c0, c1 = blocks[None, :], draws[:, None]
    c2, c3 = np.array([[site]], np.uint64), np.array([[step]], np.uint64)
    for key0, key1 in keys[:3]:
        product0, product1 = c0 * multiplier0, c2 * multiplier1
        c0, c1 = (product1 >> half) ^ c1 ^ key0, product1 & mask
        c2, c3 = (product0 >> half) ^ c3 ^ key1, product0 & mask
    words = np.empty((6, *shape), np.uint64)
    for word, narrow in zip(words, (c0, c1, c2, c3), strict=False):
        word[:] = narrow
    c0, c1, c2, c3, product0, product1 = words.reshape(6, -1)
    for key0, key1 in keys[3:, :, 0, 0]:
        np.multiply(c0, multiplier0, product0)
        np.multiply(c2, multiplier1, product1)
        np.right_shift(product1, half, c0)
        np.bitwise_xor(c0, c1, c0)
        np.bitwise_xor(c0, key0, c0)
        np.bitwise_and(product1, mask, c1)
        np.right_shift(product0, half, c2)
        np.bitwise_xor(c2, c3, c2)
        np.bitwise_xor(c2, key1, c2)
        np.bitwise_and(product0, mask, c3)
    return c0.reshape(shape), c1.reshape(shape), c2.reshape(shape), c3.reshape(shape)
