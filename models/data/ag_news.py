"""AG-News from the Hugging Face hub: the first words of news articles, by subject."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dataset import Dataset
from .hub import check_columns, load_splits
from .text import classification

HUB_PATH = "fancyzhx/ag_news"
"""Name on the hub, or a local folder of Parquet files with its columns, "text" and "label"."""

LENGTH = 32
"""Words of an article, at most: those at its beginning, its headline among them."""

WORDS = 10_000
"""Words that are known, the most frequent of the training split; others are one unknown word."""

_WORD = re.compile(r"[a-z]+|[0-9]")


def load_ag_news(seed: int, root: Path | None) -> Dataset:
    """Load it with the library `datasets`, cached under `root` if that is given. It is split, so `seed` is not used.

    Raises:
        DataError: It cannot be loaded; the message says what to do.
    """
    splits = load_splits("ag-news", HUB_PATH, root, twin="surnames")
    return classification(
        "ag-news",
        _texts_and_classes(splits["train"]),
        _texts_and_classes(splits["test"]),
        length=LENGTH,
        num_classes=4,
        at_most=WORDS,
        source=f"AG-News (Zhang et al. 2015, arXiv 1509.01626), the first {LENGTH} words of each article, from the "
        f"Hugging Face hub ({HUB_PATH}), with its own training and test split.",
    )


def words(text: str) -> list[str]:
    """The words of an English text, in lower case: runs of the letters a to z, and every digit a word of its own.

    Anything else only separates them, so that "U.S." is "u", "s", and "don't" is "don", "t".
    """
    return _WORD.findall(text.lower())


def _texts_and_classes(split: Any) -> tuple[list[list[str]], Tensor]:
    check_columns(split, "text", "label")
    return [words(text) for text in split["text"]], torch.tensor(list(split["label"]), dtype=torch.int64)
