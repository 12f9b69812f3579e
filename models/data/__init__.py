"""Data sets by name: each a file that knows where its samples are from, and the table of all.

All but those of the Hugging Face hub need no network and no cache: they come with packages, or are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...passes.errors import unknown_name
from .ag_news import load_ag_news
from .bundled import load_digits, load_linear, load_mnist5k
from .dataset import Batches, Dataset, loaders
from .graphs import load_cora, load_karate, load_sbm
from .hub import HUB_SOURCES, hub_loader
from .python_docs import load_python_docs
from .surnames import load_surnames

DATASETS: dict[str, Callable[[int, Path | None], Dataset]] = {
    "digits": load_digits,
    "mnist5k": load_mnist5k,
    "linear": load_linear,
    "surnames": load_surnames,
    "python-docs": load_python_docs,
    "ag-news": load_ag_news,
    "karate": load_karate,
    "sbm": load_sbm,
    "cora": load_cora,
    **{name: hub_loader(name) for name in HUB_SOURCES},
}
"""Each data set's loader, given the seed of the split and the folder of the cache."""


def load(name: str, *, seed: int = 0, root: str | Path | None = None) -> Dataset:
    """Load a data set by name.

    Args:
        name: "digits"; "linear", synthetic; the graphs "karate" and "sbm"; "python-docs", characters of Python's own
            documentation; with ``pip install onward[mnist]`` "mnist5k"; with ``pip install onward[text]`` "surnames";
            with ``pip install onward[graphs]`` "cora"; or with ``pip install onward[data]`` "fashion-mnist",
            "cifar10", "cifar100", "ag-news" or "tiny-imagenet", which takes 5 GB of memory, and 12 while it is loaded.
        seed: Chooses the split of a data set that comes without one (digits, mnist5k, surnames, python-docs, karate),
            and all of linear and sbm. It is *not* the seed of a training run: leave it alone, and all runs are tested
            on the same samples.
        root: Folder of the downloads; by default that of Hugging Face, which HF_HOME moves.

    Raises:
        UnknownNameError: No data set has this name.
        DataError: It cannot be loaded; the message says what to do.
    """
    if name not in DATASETS:
        raise unknown_name("data set", name, DATASETS)
    return DATASETS[name](seed, None if root is None else Path(root))


__all__ = ["DATASETS", "HUB_SOURCES", "Batches", "Dataset", "load", "loaders"]
