"""The main job: forward-only training ends within a point of backpropagation on real digits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import onward
from onward.cli.backpropagation import Backpropagation
from onward.cli.recipes import recipe_for
from onward.cli.train import Training, run

SEEDS = (0, 1, 2)


def accuracies(model: str, seed: int) -> tuple[float, float]:
    """Test accuracy of `onward train`'s recipe and of backpropagation: same weights, batches, optimizer and epochs."""
    dataset, recipe = onward.models.load("digits"), recipe_for(model)
    training = Training(recipe.epochs, recipe.batch_size, recipe.lr, recipe.optimizer)
    torch.manual_seed(seed)
    net = onward.models.build_for(model, dataset)
    torch.manual_seed(seed)
    twin = onward.models.build_for(model, dataset)
    estimator = onward.LikelihoodRatio(**recipe.estimator)
    assert estimator.reach == 0  # no local backpropagation either
    example = dataset.train.tensors[0][: recipe.batch_size]
    program = onward.compile(net, example, loss=F.cross_entropy, estimator=estimator, seed=seed)
    forward_only = run(program, dataset, training, progress=False)
    reference = run(Backpropagation(twin, F.cross_entropy, seed), dataset, training, progress=False)
    return forward_only.test_accuracy, reference.test_accuracy


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "resnet5"])
def test_the_main_job_ends_within_a_point_of_backpropagation(model: str) -> None:
    pairs = [accuracies(model, seed) for seed in SEEDS]
    forward_only, reference = (sum(column) / len(SEEDS) for column in zip(*pairs, strict=True))
    assert reference > 0.96
    assert forward_only > reference - 0.01, pairs
