"""The main job: forward-only training ends close to backpropagation on real digits."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import onward
from onward.cli.recipes import recipe_for
from onward.cli.train import run
from onward.cli.training import Training
from onward.evidence.baselines.backpropagation import Backpropagation

SEEDS = (0,)
"""Three of them and all epochs of a recipe are for ``benchmarks/accuracy.py``, whose numbers docs/results.md has."""

EPOCHS = {"mlp": 15, "sign_mlp": 20, "resnet5": 15, "quantised_cnn": 12}


def training_of(model: str) -> Training:
    """The recipe's, with fewer epochs where an epoch takes long."""
    return replace(recipe_for(model).training, epochs=EPOCHS[model])


@functools.cache
def reference_accuracy(model: str, seed: int) -> float:
    """Test accuracy by backpropagation, of the twin where there is one: the same for every estimator of a model."""
    dataset = onward.models.load("digits")
    torch.manual_seed(seed)
    twin = onward.models.build_for(model, dataset, **onward.models.TWINS.get(model, {}))
    reference = Backpropagation(twin, F.cross_entropy, seed)
    return run(reference, dataset, training_of(model), progress=False).test_accuracy


def accuracies(model: str, seed: int, estimator: onward.LikelihoodRatio) -> tuple[float, float, float]:
    """Test accuracy forward-only and by backpropagation: same weights, batches, optimizer and epochs; and the perturbed
    forwards a sample and step."""
    dataset, training = onward.models.load("digits"), training_of(model)
    torch.manual_seed(seed)
    net = onward.models.build_for(model, dataset)
    example = dataset.train.tensors[0][: training.batch_size]
    program = onward.compile(net, example, loss=F.cross_entropy, estimator=estimator, seed=seed)
    forward_only = run(program, dataset, training, progress=False)
    perturbed = forward_only.forwards_per_sample_and_step - 1
    return forward_only.test_accuracy, reference_accuracy(model, seed), perturbed


CASES = {
    "mlp": ("mlp", onward.LikelihoodRatio.auto(), 0.02),
    "resnet5": ("resnet5", onward.LikelihoodRatio.auto(), 0.02),
    # with no local backpropagation either
    "resnet5, reach 0": ("resnet5", onward.LikelihoodRatio.auto(reach=0), 0.02),
    "sign_mlp": ("sign_mlp", onward.LikelihoodRatio.auto(), 0.03),
    "quantised_cnn": ("quantised_cnn", onward.LikelihoodRatio.auto(), 0.03),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_ends_close_to_backpropagation(case: str) -> None:
    model, estimator, margin = CASES[case]
    runs = [accuracies(model, seed, estimator) for seed in SEEDS]
    forward_only, reference, perturbed = (sum(column) / len(SEEDS) for column in zip(*runs, strict=True))
    assert reference > 0.92
    assert forward_only > reference - margin, runs
    assert perturbed <= 4
