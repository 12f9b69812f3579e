"""Data sets by name: each a file that knows where its samples are from, and the table of all.

All but those of the Hugging Face hub need no network and no cache: they come with packages, or are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...passes.errors import unknown_name
from .bundled import load_digits, load_linear, load_mnist5k
from .dataset import Batches, Dataset, loaders
from .graphs import load_cora, load_karate, load_sbm
from .hub import HUB_SOURCES, hub_loader

DATASETS: dict[str, Callable[[int, Path | None], Dataset]] = {
    "digits": load_digits,
    "mnist5k": load_mnist5k,
    "linear": load_linear,
    "karate": load_karate,
    "sbm": load_sbm,
    "cora": load_cora,
    **{name: hub_loader(name) for name in HUB_SOURCES},
}
"""Each data set's loader, given the seed of the split and the folder of the cache."""


def load(name: str, *, seed: int = 0, root: str | Path | None = None) -> Dataset:
    """Load a data set by name.

    Args:
        name: "digits"; "linear", synthetic; the graphs "karate" and "sbm", and with ``pip install onward[graphs]``
            "cora"; with ``pip install onward[mnist]`` "mnist5k"; or with ``pip install
            onward[data]`` "fashion-mnist", "cifar10" or "cifar100".
        seed: Chooses the split of a data set that comes without one (digits, mnist5k, karate), and all of
            linear and sbm. It is *not* the seed of a training run: leave it alone, and all runs are tested on the same
            samples.
        root: Folder of the downloads; by default that of Hugging Face, which HF_HOME moves.

    Raises:
        UnknownNameError: No data set has this name.
        DataError: It cannot be loaded; the message says what to do.
    """
    if name not in DATASETS:
        raise unknown_name("data set", name, DATASETS)
    return DATASETS[name](seed, None if root is None else Path(root))


__all__ = ["DATASETS", "HUB_SOURCES", "Batches", "Dataset", "load", "loaders"]
