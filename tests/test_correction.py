"""Corrections a site, the shrunk one, and blocks chosen by the compiler."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward import LikelihoodRatio

SAMPLES = 24


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, 6, generator=generator), torch.randint(3, (SAMPLES,), generator=generator)


def program(correction: object, copies: int = 8, **settings: object) -> onward.Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))
    estimator = LikelihoodRatio.feedback_learned(copies, sigma=1e-3, correction=correction, warmup=0, **settings)
    return onward.compile(net, (batch()[0],), loss=F.cross_entropy, estimator=estimator, seed=0)


def gradients(trained: onward.Program, steps: int = 1) -> dict[str, Tensor]:
    """Gradients of the last of several steps with the weights at rest."""
    for number in range(steps):
        trained.model.zero_grad()
        trained.step(*batch(number))
    return {name: parameter.grad for name, parameter in trained.model.named_parameters() if parameter.grad is not None}


def test_shrunk_is_the_prediction_plus_alpha_times_the_correction() -> None:
    none, full, shrunk = (program(correction) for correction in ("none", "full", "shrunk"))
    predicted, corrected, found = (gradients(each, 12) for each in (none, full, shrunk))
    assert shrunk.feedback is not None
    for site, names in ((0, ("0.weight", "0.bias")), (1, ("2.weight", "2.bias"))):
        alpha = shrunk.feedback.alpha(site)
        assert 0 <= alpha <= 1
        for name in names:
            expected = predicted[name] + alpha * (corrected[name] - predicted[name])
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["4.weight"], predicted["4.weight"])  # exact at the output


def test_alpha_tells_signal_from_noise() -> None:
    """With Jacobians of zero and many copies the correction is the gradient; with learned ones it is mostly noise."""
    nothing, learned = program("shrunk", copies=400), program("shrunk", copies=4)
    alphas = []
    for _ in range(20):
        assert nothing.feedback is not None
        zeros = {site: torch.zeros_like(jacobian) for site, jacobian in nothing.feedback.jacobians.items()}
        nothing.feedback = onward.runtime.feedback.replace(nothing.feedback, jacobians=zeros)
        gradients(nothing)
        alphas.append(nothing.feedback.alpha(1))
    gradients(learned, 60)
    assert learned.feedback is not None
    assert alphas[-1] > 0.8
    assert learned.feedback.alpha(1) < 0.3


def test_a_correction_for_some_sites() -> None:
    none, full, mixed = (program(correction) for correction in ("none", "full", {"0": "full", "*": "none"}))
    predicted, corrected, found = (gradients(each, 3) for each in (none, full, mixed))
    for name, gradient in found.items():
        assert torch.equal(gradient, (corrected if name.startswith("0.") else predicted)[name])
    sources = {gradient.site.name: gradient.source for gradient in mixed.compiled.gradients}
    assert sources == {"0": "corrected", "2": "feedback", "4": "feedback"}


def test_resuming_keeps_what_alpha_is_made_of() -> None:
    first, second = program("shrunk"), program("shrunk")
    gradients(first, 5)
    second.load_state_dict(first.state_dict())
    expected, found = gradients(first), gradients(second)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("correction", "message"),
    [
        ({"0": "full"}, "no pattern covers the site"),
        ({"*": "halved"}, "halved"),
        ({"5": "full", "*": "none"}, "unknown site '5'"),
    ],
)
def test_corrections_that_cannot_work(correction: object, message: str) -> None:
    with pytest.raises(onward.errors.OnwardError, match=message):
        program(correction)


@pytest.mark.parametrize("settings", [{"probe": 0.5}, {"probe_every": 2}, {"probe_every": "auto"}])
def test_any_correction_needs_every_sample_and_step(settings: dict[str, object]) -> None:
    with pytest.raises(onward.errors.OptionError, match="correction="):
        program({"0": "shrunk", "*": "none"}, **settings)


def test_shrunk_needs_two_halves() -> None:
    with pytest.raises(onward.errors.OptionError, match="4 copies"):
        program("shrunk", copies=2)


@pytest.mark.parametrize(("side", "size"), [(8, 4), (12, 4), (28, 7)])
def test_blocks_by_the_size_of_the_maps(side: int, size: int) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(5))
    net = nn.Sequential(net, nn.ReLU(), nn.Linear(5, 3))
    images = torch.randn(4, 1, side, side)
    net(images)
    estimator = LikelihoodRatio.auto(reach=0)
    compiled = onward.compile(net, (images,), loss=F.cross_entropy, estimator=estimator).compiled
    assert compiled.sites[0].blocks[-2:] == (size, size)
    assert compiled.sites[1].blocks == ()
