"""Defaults of ``onward train`` for each model of the zoo: the one table to tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..compiler.estimator import LikelihoodRatio

AUTO: Mapping[str, Any] = LikelihoodRatio.auto().to_json()
"""The estimator: ``"auto"``. An option on the command line goes before it, and ``--alr`` is in its place."""

PLAIN: Mapping[str, Any] = {"groups": "layerwise", "copies": 64, "sigma": 0.1}
"""In place of `AUTO` where options ask for what learned feedback does not have."""


@dataclass(frozen=True)
class Recipe:
    """What works for a model on small images."""

    epochs: int
    batch_size: int
    lr: float
    optimizer: str


RECIPES: dict[str, Recipe] = {
    #                       epochs  batch  lr    optimizer
    "mlp": Recipe(15, 32, 3e-3, "adam"),
    "sign_mlp": Recipe(20, 32, 3e-3, "adam"),
    "resnet5": Recipe(30, 32, 2e-3, "adam"),
    "resnet9": Recipe(15, 32, 1e-3, "adam"),
    "vgg8": Recipe(15, 32, 1e-3, "adam"),
    "quantised_cnn": Recipe(20, 32, 2e-3, "adam"),
    "vit": Recipe(20, 32, 1e-3, "adam"),
    "gcn": Recipe(200, 1, 1e-2, "adam"),
    "gat": Recipe(200, 1, 5e-3, "adam"),
}

OWN_MODEL = Recipe(15, 32, 2e-3, "adam")
"""For ``package.module:factory``."""


def recipe_for(model: str) -> Recipe:
    """The recipe of a model by name."""
    return RECIPES.get(model, OWN_MODEL)
