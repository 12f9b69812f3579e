"""Texts as numbers: a vocabulary, texts of one length, and a data set of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from .dataset import Dataset

PADDING = 0
"""What fills a text up in front of its beginning; models read over it."""

UNKNOWN = 1
"""What the vocabulary does not have."""

Pieces: TypeAlias = Sequence[str]
"""A text, cut to what has a number each: its words, or a string for its characters."""


@dataclass(frozen=True)
class Vocabulary:
    """Numbers for pieces of text: ``pieces[0]`` has number 2, behind `PADDING` and `UNKNOWN`."""

    pieces: tuple[str, ...]

    @classmethod
    def of(cls, texts: Iterable[Pieces], *, at_least: int = 1, at_most: int | None = None) -> Vocabulary:
        """The pieces of `texts` that occur `at_least` so often, the most frequent first, `at_most` so many of them."""
        counts = Counter(piece for text in texts for piece in text)
        kept = sorted((piece for piece in counts if counts[piece] >= at_least), key=lambda p: (-counts[p], p))
        return cls(tuple(kept[:at_most]))

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Each piece's number."""
        return {piece: number for number, piece in enumerate(self.pieces, start=UNKNOWN + 1)}

    def __len__(self) -> int:
        """How many numbers there are, the two that are no piece included."""
        return len(self.pieces) + UNKNOWN + 1

    def encode(self, texts: Sequence[Pieces], length: int) -> Tensor:
        """`texts` as int64 ``(len(texts), length)``: cut off behind `length` pieces, or `PADDING` in front."""
        numbers = self.numbers
        encoded = torch.full((len(texts), length), PADDING, dtype=torch.int64)
        for row, text in zip(encoded, texts, strict=True):
            cut = [numbers.get(piece, UNKNOWN) for piece in text[:length]]
            row[length - len(cut) :] = torch.tensor(cut, dtype=torch.int64)
        return encoded

    def decode(self, tokens: Tensor) -> list[str]:
        """The pieces of one text, int64 ``(length,)``, without its padding; ``"�"`` for what was not known."""
        return [
            "�" if number == UNKNOWN else self.pieces[number - UNKNOWN - 1]
            for number in tokens.tolist()
            if number != PADDING
        ]


def classification(
    name: str,
    train: tuple[Sequence[Pieces], Tensor],
    test: tuple[Sequence[Pieces], Tensor],
    *,
    length: int,
    num_classes: int,
    source: str,
    at_most: int | None = None,
) -> Dataset:
    """A `Dataset` of texts, each split as (texts, classes as int64 ``(n,)``).

    The vocabulary is that of `train` alone, `at_most` so many pieces of it, and every text `length` pieces long.
    """
    vocabulary = Vocabulary.of(train[0], at_most=at_most)
    return Dataset(
        name=name,
        train=TensorDataset(vocabulary.encode(train[0], length), train[1]),
        test=TensorDataset(vocabulary.encode(test[0], length), test[1]),
        input_shape=(length,),
        num_classes=num_classes,
        num_tokens=len(vocabulary),
        source=source,
    )
