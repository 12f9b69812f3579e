"""Recipes: what ``onward train`` trains and how, a TOML file each, read and checked here (docs/recipes.md).

Those of Onward lie in ``onward/recipes/``. A model of the zoo has one that bears its name, on data that need no
network: ``onward train --model NAME`` is that recipe. The experiments of the papers, on data from elsewhere, name one
like it as their twin.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..compiler.estimator import LikelihoodRatio
from ..models import DATASETS
from ..models.registry import check_options
from ..passes.errors import OptionError, unknown_name
from .onnx_models import is_file
from .training import Training

FOLDER = Path(__file__).parents[1] / "recipes"
"""Where the recipes of Onward lie."""

BASES: dict[str, Callable[..., LikelihoodRatio]] = {
    "auto": LikelihoodRatio.auto,
    "alr": LikelihoodRatio.alr,
    "plain": LikelihoodRatio,
}
"""What the table ``[estimator]`` starts from, by its key `base`."""


@dataclass(frozen=True)
class Recipe:
    """One experiment. The keys of a recipe's file are these fields, but for the name, which is the file's.

    Attributes:
        name: What it is called.
        model: A model of the zoo, ``package.module:factory``, or ``path/to/model.onnx``.
        data: Name of a data set.
        about: What it is, from which paper.
        model_options: Arguments of the model's factory.
        training: How both train.
        estimator: The settings of the estimator.
        twin: The recipe that stands in for it where its data cannot be had; None where its data need no network.
    """

    name: str
    model: str
    data: str = "digits"
    about: str = ""
    model_options: Mapping[str, Any] = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    estimator: LikelihoodRatio = field(default_factory=LikelihoodRatio.auto)
    twin: str | None = None


def recipe_names() -> list[str]:
    """The names of Onward's recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find_recipe(name: str) -> Recipe:
    """A recipe by its name, or by the path of its file, which ends in ``.toml``.

    Raises:
        UnknownNameError: No recipe has this name; or the file has a key, or names something, that is not known.
        OptionError: The file cannot be read, or has a value that cannot work.
    """
    if name.endswith(".toml"):
        return read_recipe(Path(name))
    if name not in recipe_names():
        raise unknown_name("recipe", name, [*recipe_names(), "path/to/recipe.toml"])
    return read_recipe(FOLDER / f"{name}.toml")


def recipe_for(model: str) -> Recipe:
    """The recipe that bears a model's name; defaults for a model that has none, such as ``package.module:factory``."""
    return find_recipe(model) if model in recipe_names() else Recipe(model, model)


def read_recipe(path: Path) -> Recipe:
    """Read and check a file: its keys, their types, and the names of model, options, data, twin and settings.

    Raises:
        UnknownNameError, OptionError: As `find_recipe`; the message names the file and the key.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"recipe {path}: it cannot be read: {error}") from error
    try:
        return _recipe(path.stem, content)
    except OptionError as error:
        raise type(error)(f"recipe {path}: {error}") from error


def see_working_directory(model: str) -> None:
    """Let Python find the modules of the working directory, if the model is a ``package.module:factory``."""
    if ":" in model and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _recipe(name: str, content: dict[str, Any]) -> Recipe:
    hints = get_type_hints(Recipe) | {"training": Mapping[str, Any], "estimator": Mapping[str, Any]}
    del hints["name"]
    _check("", content, hints)
    for key in ("about", "model", "data"):
        if key not in content:
            raise OptionError(f"the key {key!r} is missing.")
    estimator = dict(content.get("estimator", {}))
    _check("estimator", estimator, get_type_hints(LikelihoodRatio) | {"base": str})
    base = estimator.pop("base", "auto")
    if base not in BASES:
        raise unknown_name("base of [estimator]", base, BASES)
    training = content.get("training", {})
    _check("training", training, get_type_hints(Training))
    see_working_directory(content["model"])
    if not is_file(content["model"]):
        check_options(content["model"], content.get("model_options", {}))
    if content["data"] not in DATASETS:
        raise unknown_name("data set", content["data"], DATASETS)
    if content.get("twin") not in (None, *recipe_names()):
        raise unknown_name("twin", content["twin"], recipe_names())
    return Recipe(**{"name": name, **content, "training": Training(**training), "estimator": BASES[base](**estimator)})


def _check(table: str, content: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Whether every key of a table ("": of the file itself) is known, and its value of the annotated type."""
    place = f"[{table}] " if table else ""
    for key, value in content.items():
        if key not in hints:
            raise unknown_name(f"{place}key", key, hints)
        if not _fits(value, hints[key]):
            raise OptionError(f"{place}{key} = {value!r}: expected {_expected(hints[key])}.")


def _fits(value: object, hint: Any) -> bool:
    """Whether a value of TOML is of an annotated type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Mapping:
        return isinstance(value, dict) and all(_fits(one, arguments[1]) for one in value.values())
    if origin is Sequence:
        return isinstance(value, list) and all(_fits(one, arguments[0]) for one in value)
    return type(value) is hint or (hint is float and type(value) is int)


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def _expected(hint: Any) -> str:
    """An annotated type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_expected(one) for one in arguments if one is not type(None))
    if origin in (Mapping, Sequence):
        inner = "" if arguments[-1] is Any else f" of which each is {_expected(arguments[-1])}"
        return f"a {'table' if origin is Mapping else 'list'}{inner}"
    return _WORDS[hint]
