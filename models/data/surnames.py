"""Last names by language, from the package `faker`: a small real text to classify, character by character."""

from __future__ import annotations

import hashlib
import importlib
import unicodedata
from collections import Counter
from pathlib import Path

import torch

from ...passes.errors import DataError
from .dataset import Dataset, stratified_rows
from .text import classification

LOCALES: dict[str, tuple[str, str]] = {
    "Croatian": ("hr_HR", "last_names"),
    "Dutch": ("nl_NL", "last_names"),
    "English": ("en_GB", "last_names"),
    "Finnish": ("fi_FI", "last_names"),
    "French": ("fr_FR", "last_names"),
    "German": ("de_DE", "last_names"),
    "Italian": ("it_IT", "last_names"),
    "Polish": ("pl_PL", "unisex_last_names"),
    "Spanish": ("es_ES", "last_names"),
    "Swedish": ("sv_SE", "last_names"),
}
"""The classes, in the order of their numbers: a locale of `faker` in Latin script, and its list of names."""

OF_A_LANGUAGE = 400
"""Names of a language, at most."""

LENGTH = 12
"""Letters of a name, at most; longer ones are left out."""


def load_surnames(seed: int, root: Path | None) -> Dataset:
    """The names of `surnames`, split by `seed`; `root` is not needed.

    Raises:
        DataError: The library `faker` is not there.
    """
    names = surnames()
    texts = [name for of_one in names for name in of_one]
    classes = torch.tensor([number for number, of_one in enumerate(names) for _ in of_one])
    train, test = stratified_rows(classes, seed)
    return classification(
        "surnames",
        ([texts[row] for row in train], classes[train]),
        ([texts[row] for row in test], classes[test]),
        length=LENGTH,
        num_classes=len(LOCALES),
        source=f"{len(texts):,} last names of {len(LOCALES)} languages that the package faker invents people with "
        f"(its locales {', '.join(locale for locale, _ in LOCALES.values())}), names of several of these languages "
        f"left out, split 80/20 within each language with seed {seed}.",
    )


def surnames() -> list[list[str]]:
    """Each language's names, in lower case, all of letters only.

    `faker` lists what is frequent, famous or typical in a country, which is not always of its language. A name that
    several of the lists have is in none. Where a list has more than `OF_A_LANGUAGE`, those stay whose SHA-256 is
    smallest: a choice by chance that a name added in another version of `faker` hardly moves.
    """
    listed = [_listed(*place) for place in LOCALES.values()]
    languages = Counter(name for names in listed for name in names)
    kept = {name for name, lists in languages.items() if lists == 1 and name.isalpha() and len(name) <= LENGTH}
    return [sorted(names & kept, key=_digest)[:OF_A_LANGUAGE] for names in listed]


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _listed(locale: str, attribute: str) -> set[str]:
    try:
        module = importlib.import_module(f"faker.providers.person.{locale}")
    except ImportError as error:
        raise DataError(
            f"data set 'surnames' needs the library 'faker', which cannot be imported ({error}). Install it with: "
            "pip install 'onward[text]'. The data set 'python-docs' is a text that does not need it."
        ) from error
    return {unicodedata.normalize("NFC", name).lower() for name in getattr(module.Provider, attribute)}
