"""Defaults of ``onward train`` for each model of the zoo: the one table to tune.

``estimator`` holds arguments of `onward.LikelihoodRatio`; an option on the command line goes before it, and ``--alr``
takes the settings of `onward.LikelihoodRatio.alr` in its place. With layerwise groups every site gets its own copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """What works for a model on small images."""

    epochs: int
    batch_size: int
    lr: float
    optimizer: str
    estimator: Mapping[str, Any]


RECIPES: dict[str, Recipe] = {
    #                  epochs  batch  lr    optimizer  estimator
    "mlp": Recipe(15, 32, 3e-3, "adam", {"groups": "layerwise", "copies": 32, "sigma": 0.1}),
    "resnet5": Recipe(15, 32, 5e-3, "adam", {"groups": "layerwise", "copies": 16, "sigma": 0.1}),
    "resnet9": Recipe(15, 32, 2e-3, "adam", {"groups": "layerwise", "copies": 32, "sigma": 0.1}),
    "vgg8": Recipe(15, 32, 2e-3, "adam", {"groups": "layerwise", "copies": 32, "sigma": 0.1}),
}

OWN_MODEL = Recipe(15, 32, 2e-3, "adam", {"groups": "layerwise", "copies": 32, "sigma": 0.1})
"""For ``package.module:factory``."""


def recipe_for(model: str) -> Recipe:
    """The recipe of a model by name."""
    return RECIPES.get(model, OWN_MODEL)
