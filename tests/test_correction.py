"""Corrections a site, the shrunk one, blocks chosen by the compiler; what a review found."""

from __future__ import annotations

import json
import math
from dataclasses import replace

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
    chosen = {"sigma": 1e-3, "warmup": 0, "correction": correction, **settings}
    estimator = LikelihoodRatio.feedback_learned(copies, **chosen)
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
        nothing.feedback = replace(nothing.feedback, jacobians=zeros)
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


def automatic(**settings: object) -> onward.Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))
    nn.init.zeros_(net[4].weight)
    estimator = LikelihoodRatio.auto(reach=0, **settings)
    return onward.compile(net, (batch()[0],), loss=F.cross_entropy, estimator=estimator, seed=0)


def test_a_head_of_zeros_tells_no_sigma_and_is_measured_again() -> None:
    trained = automatic(warmup=0)
    before = list(trained.sigmas)
    calibration = trained.calibrate(*batch())
    assert [site.nonlinearity for site in calibration.sites] == [None, None]
    json.dumps(calibration.to_json(), allow_nan=False)
    optimizer = torch.optim.SGD(trained.model.parameters(), lr=0.5)
    trained.step(*batch())
    assert trained.sigmas == before
    for number in range(40):
        optimizer.step()
        optimizer.zero_grad()
        trained.step(*batch(number))
    assert all(math.isfinite(sigma) for sigma in trained.sigmas)
    assert trained.sigmas[0] != before[0]
    assert trained.sigmas[1] != before[1]


def test_measuring_sigma_keeps_to_the_chunk() -> None:
    whole, chunked = program("none", sigma="auto"), program("none", sigma="auto", chunk=2)
    seen = []
    forward = chunked.executor.runs[0].forward
    chunked.executor.runs[0].forward = lambda *given: (
        seen.append(max(t.shape[0] for t in given if t.dim())) or forward(*given)
    )
    whole.step(*batch())
    chunked.step(*batch())
    assert max(seen) <= 2 * SAMPLES
    assert chunked.sigmas == pytest.approx(whole.sigmas)


def test_what_is_exact_keeps_its_whole_step_when_feedback_is_broken() -> None:
    trained = program("none")
    trained.step(*batch())
    assert trained.feedback is not None
    trained.feedback = replace(trained.feedback, overshoot=0.1)
    trust = trained.trust()
    assert trust["4.weight"] == trust["4.bias"] == 1.0
    assert trust["0.weight"] <= 0.1


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    trained, other = program("none"), program("none")
    gradients(other, 3)
    state = other.state_dict()
    state["feedback.0.jacobian"] = torch.zeros(2, 2)
    before = trained.state_dict()
    with pytest.raises(onward.errors.CheckpointError):
        trained.load_state_dict(state)
    after = trained.state_dict()
    assert all(
        torch.equal(torch.as_tensor(after[k]), torch.as_tensor(v)) for k, v in before.items() if k != "estimator"
    )


@pytest.mark.parametrize("settings", [{"warmup": 3}, {"trust": False}])
def test_options_of_feedback_are_refused_without_it(settings: dict[str, object]) -> None:
    with pytest.raises(onward.errors.OptionError, match='feedback="learned"'):
        LikelihoodRatio(**settings)
