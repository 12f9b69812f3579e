"""Python's own reference, as ``help()`` prints it: a text to model, character by character, that Python itself has."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from .dataset import Dataset
from .text import Vocabulary

LENGTH = 16
"""Characters of a window, each with the one that follows it for its target."""

RARE = 200
"""Characters that are rarer than that in the training text are unknown."""


def next_token_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each text, the mean over its positions: ``(N,)``.

    Args:
        output: Logits ``(N, T, num_tokens)``.
        target: int64 ``(N, T)``.
    """
    return F.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(1)


def load_python_docs(seed: int, root: Path | None) -> Dataset:
    """Windows of the `topics`, a fifth of these for testing, drawn by `seed`; `root` is not needed.

    An input is `LENGTH` characters, its target the same moved on by one. Windows do not overlap, but that the last
    character of a window's target is the next one's first.
    """
    texts = topics()
    held = np.random.default_rng(seed).permutation(len(texts)) < len(texts) // 5
    train, test = ([text for text, out in zip(texts, held, strict=True) if out == tested] for tested in (False, True))
    vocabulary = Vocabulary.of(train, at_least=RARE)
    return Dataset(
        name="python-docs",
        train=_windows(vocabulary, train),
        test=_windows(vocabulary, test),
        input_shape=(LENGTH,),
        num_classes=len(vocabulary),
        num_tokens=len(vocabulary),
        loss=next_token_loss,
        source=f"the language reference of Python {platform.python_version()} as its module pydoc_data.topics has it, "
        f"{len(texts)} topics, each paragraph once, in lower case, white space as single spaces; a fifth of the topics "
        f"for testing, drawn with seed {seed}; windows of {LENGTH} characters.",
    )


def topics() -> list[str]:
    """The texts of ``help()``'s topics, in the order of their names, white space as single spaces.

    Many topics repeat parts of others: a paragraph stays where it comes first, so that none is in two. Python's
    versions differ in these texts, as in what they describe.
    """
    from pydoc_data.topics import topics as originals

    seen: set[str] = set()
    texts = []
    for name in sorted(originals):
        paragraphs = [_cleaned(paragraph) for paragraph in re.split(r"\n\s*\n", originals[name])]
        fresh = [paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph and paragraph not in seen]
        seen.update(fresh)
        texts.append(" ".join(fresh))
    return [text for text in texts if len(text) > LENGTH]


def _cleaned(paragraph: str) -> str:
    """On one line, in lower case; without lines that have no letter, which rule off headings and tables."""
    lines = [line for line in paragraph.splitlines() if any(character.isalpha() for character in line)]
    return " ".join(" ".join(lines).split()).lower()


def _windows(vocabulary: Vocabulary, texts: list[str]) -> TensorDataset:
    windows = [text[start : start + LENGTH + 1] for text in texts for start in range(0, len(text) - LENGTH, LENGTH)]
    tokens = vocabulary.encode(windows, LENGTH + 1)
    return TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
