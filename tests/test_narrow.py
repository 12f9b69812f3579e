"""Noise behind a cheap local chain, on its narrowest tensor (`passes.narrow_noise`).

Gradients of random graphs with it are in test_segments, where those are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward.models import resnet9
from onward.passes.errors import OptionError
from onward.runtime.calibration.gradient_noise import repeated_gradients, variance

DOUBLE = torch.float64


class Image(nn.Module):
    """Chains of every kind: pooled behind a ReLU, pooled to nothing, read twice, and a narrowing that has no
    derivative."""

    def __init__(self, pooling: str = "max") -> None:
        super().__init__()
        self.pooling = pooling
        self.first, self.second, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = F.max_pool2d(h, 2) if self.pooling == "max" else F.avg_pool2d(h, 2)
        h = F.relu(self.second(h) + 1)
        result: Tensor = self.head(h.mean((2, 3)))
        return result


def batch(samples: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 1, 8, 8, generator=generator, dtype=DOUBLE)
    return x, torch.randn(samples, 2, generator=generator, dtype=DOUBLE)


def compiled(model: nn.Module, x: Tensor, **settings: Any) -> onward.Program:
    estimator = onward.LikelihoodRatio(**{"placement": "narrow", "copies": 4, **settings})
    return onward.compile(model, x, loss=F.mse_loss, estimator=estimator)


def elements(model: nn.Module, x: Tensor, **settings: Any) -> dict[str, int]:
    return {site.name: site.noise_layout.elements for site in compiled(model, x, **settings).compiled.sites}


def test_noise_goes_behind_what_alone_reads_a_site_and_makes_it_narrower() -> None:
    x, _ = batch()
    assert elements(Image().double(), x, placement="alive") == {"first": 192, "second": 8, "head": 2}
    for pooling in ("max", "avg"):
        program = compiled(Image(pooling).double(), x)
        sites = {site.name: site for site in program.compiled.sites}
        assert {name: site.noise_layout.elements for name, site in sites.items()} == {
            "first": 48,
            "second": 2,
            "head": 2,
        }
        assert sites["first"].operation == f"aten.conv2d+aten.{pooling}_pool2d"
        assert sites["head"].operation == "aten.linear"  # the output stays where it is


def chain(function: Any) -> nn.Module:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(function(self.first(x)).flatten(1))
            return result

    return Chain().double()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda z: F.max_pool2d(F.relu(z), 2), 32),
        (lambda z: F.avg_pool2d(F.gelu(z), 2), 32),
        (lambda z: F.max_pool2d(z, 2, return_indices=True)[0], 32),
        (lambda z: F.adaptive_avg_pool2d(z * 2 + 1, 4), 32),
        (lambda z: z.unflatten(3, (4, 2)).sum(4).unflatten(2, (4, 2)).mean(3), 32),
        (lambda z: F.max_pool2d(z, 2) + 0 * z.mean(), 128),  # another reader
        (lambda z: F.max_pool2d(torch.sign(z), 2), 128),  # no derivative
        (lambda z: F.max_pool2d(z, 2) - z[:, :, ::2, ::2], 128),
        (lambda z: F.interpolate(z[:, :, ::2, ::2], scale_factor=1.0), 128),  # not in the table
        (lambda z: z.softmax(1)[:, :, ::2, ::2], 128),  # couples channels
        (lambda z: z.mean(0, keepdim=True).expand_as(z)[:, :, ::2, ::2] + 0 * z[:, :, ::2, ::2], 128),
    ],
)
def test_what_a_chain_may_pass(function: Any, expected: int) -> None:
    x, _ = batch()
    found = elements(chain(function), x, credit="batch")
    assert next(iter(found.values())) == expected, found


@pytest.mark.parametrize("groups", ["layerwise", "joint"])
@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_gradients_are_unbiased(groups: str, pooling: str) -> None:
    """The loss is a square of what the last noise point feeds, so that antithetic pairs are exact there; before it σ is
    small. 400 repetitions: the mean of each number is within 5 standard errors, or 1e-5 of the largest (order σ²)."""
    torch.manual_seed(0)
    model, (x, y) = Image(pooling).double(), batch()
    program = compiled(model, x, groups=groups, sigma=1e-3, copies=2)
    given = program.bind(x, y)[0]
    with torch.no_grad():
        repeated = repeated_gradients(program.compiled, program.sigmas, given, 400)
    exact = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))
    named = dict(zip((name for name, _ in model.named_parameters()), exact, strict=True))
    for site in program.compiled.sites:
        wanted = torch.cat([named[name].flatten() for name in site.parameters])
        mean, error = repeated[site.index].mean(0), repeated[site.index].std(0) / 400**0.5
        assert bool(((mean - wanted).abs() <= 5 * error + 1e-5 * wanted.abs().max()).all()), site.name


def test_it_has_less_variance_for_the_same_pairs() -> None:
    torch.manual_seed(0)
    model, (x, y) = Image("avg").double(), batch(8)
    found = {}
    for placement in ("alive", "narrow"):
        program = compiled(model, x, placement=placement, copies=2)
        given = program.bind(x, y)[0]
        with torch.no_grad():
            repeated = repeated_gradients(program.compiled, program.sigmas, given, 60)
        found[placement] = {s.name: variance(repeated[s.index]) for s in program.compiled.sites}
    for name in ("first", "second"):  # a quarter and a twelfth of the numbers, whose gradients are as many times larger
        assert found["narrow"][name] < 0.7 * found["alive"][name], found


def test_with_feedback_its_jacobian_is_as_small() -> None:
    torch.manual_seed(0)
    model, x = resnet9(num_classes=10, in_channels=1, width=4), torch.randn(2, 1, 8, 8)
    shapes = {}
    for placement in ("alive", "narrow"):
        estimator = onward.LikelihoodRatio.feedback_learned(placement=placement)
        program = onward.compile(model, x, loss=F.cross_entropy, estimator=estimator)
        program.step(x, torch.tensor([0, 1]))
        assert program.feedback is not None
        shapes[placement] = sum(len(jacobian) for jacobian in program.feedback.jacobians.values())
    assert shapes["narrow"] < 0.7 * shapes["alive"]


def test_calibration_compares_it() -> None:
    """Of the placements it takes the one with the least variance that the budget leaves."""
    torch.manual_seed(0)
    model, (x, y) = Image("avg").double(), batch(32)
    program = compiled(model, x, placement="operation")
    assert program.calibrate(x, y, budget=40).estimator.placement == "narrow"


def test_it_needs_clean_captures() -> None:
    with pytest.raises(OptionError, match='placement="narrow" keeps exact captures'):
        onward.LikelihoodRatio(placement="narrow", capture="sign")
    with pytest.raises(OptionError, match='placement="alive" or "narrow"'):
        onward.LikelihoodRatio.feedback_learned(placement="operation")
