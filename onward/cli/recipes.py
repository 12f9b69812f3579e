"""Defaults of ``onward train`` for each model of the zoo: the one table to tune.

``estimator`` and ``plain`` hold arguments of `onward.LikelihoodRatio`; an option on the command line goes before them,
and ``--alr`` takes the settings of `onward.LikelihoodRatio.alr` in their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def _feedback(**changes: Any) -> dict[str, Any]:
    return {"placement": "alive", "groups": "joint", "feedback": "learned", "sigma": 0.1, **changes}


@dataclass(frozen=True)
class Recipe:
    """What works for a model on small images."""

    epochs: int
    batch_size: int
    lr: float
    optimizer: str
    estimator: Mapping[str, Any]
    plain: Mapping[str, Any] = field(default_factory=lambda: {"groups": "layerwise", "copies": 64, "sigma": 0.1})
    """In place of `estimator` where options ask for what learned feedback does not have."""


RECIPES: dict[str, Recipe] = {
    #                 epochs  batch  lr    optimizer  estimator
    "mlp": Recipe(15, 32, 3e-3, "adam", _feedback(copies=2)),
    "resnet5": Recipe(30, 32, 2e-3, "adam", _feedback(copies=8)),
    "resnet9": Recipe(15, 32, 1e-3, "adam", _feedback(copies=4, reach=1)),
    "vgg8": Recipe(15, 32, 1e-3, "adam", _feedback(copies=4, reach=1)),
}

OWN_MODEL = Recipe(15, 32, 2e-3, "adam", _feedback(copies=4, reach=1))
"""For ``package.module:factory``."""


def recipe_for(model: str) -> Recipe:
    """The recipe of a model by name."""
    return RECIPES.get(model, OWN_MODEL)
