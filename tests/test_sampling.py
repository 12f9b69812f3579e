"""``sampling="error"``: probabilities, the draw, a step on a part of the batch that stays unbiased (method.md 8)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import onward
from onward import LikelihoodRatio
from onward.passes.errors import OptionError, UnknownNameError
from onward.runtime.sampling import FLOOR, draw, inclusion
from onward.runtime.targets import take_rows

SIZES = st.lists(st.floats(0, 1e6), min_size=1, max_size=40)


# --- probabilities and the draw ---------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(SIZES)
def test_probabilities_are_as_many_as_the_errors_are_unequal(sizes: list[float]) -> None:
    error = torch.tensor(sizes, dtype=torch.float64)[:, None]
    p = inclusion(error)
    assert ((p > 0) & (p <= 1)).all()
    if not any(sizes):
        assert (p == 1).all()
        return
    relative = error[:, 0] / max(sizes)
    s = relative + FLOOR * relative.mean()
    wanted = float(len(s) * s.mean() ** 2 / s.square().mean())
    assert float(p.sum()) == pytest.approx(wanted, rel=1e-6)
    below = p < 1  # those that are not cut are proportional to their sizes
    torch.testing.assert_close(p[below] / p[below].sum(), s[below] / s[below].sum(), rtol=1e-6, atol=0)
    assert bool((s[~below] >= s[below].max()).all()) if below.any() and not below.all() else True


def test_equal_errors_perturb_every_sample() -> None:
    assert (inclusion(torch.full((7, 3), 0.2)) > 1 - 1e-9).all()


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 99))
def test_the_draw_has_as_many_rows_as_the_probabilities_say(sizes: list[float], step: int) -> None:
    p = inclusion(torch.tensor(sizes)[:, None])
    key = torch.tensor([5, step])
    rows = draw(p, key)
    assert abs(len(rows) - float(p.sum())) < 1 + 1e-6
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert torch.equal(rows, draw(p, key))


def test_each_sample_has_its_own_probability() -> None:
    """2,000 draws of 8 samples: each count within 5 standard deviations of a binomial's, which the systematic draw's
    does not exceed."""
    p = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.35, 0.3, 0.2, 0.05], dtype=torch.float64)
    counts = torch.zeros(8, dtype=torch.float64)
    for step in range(2000):
        counts[draw(p, torch.tensor([1, step]))] += 1
    error = 5 * (2000 * p * (1 - p)).sqrt()
    assert ((counts - 2000 * p).abs() <= error).all(), counts / 2000


@pytest.mark.parametrize("columns", [list, np.array, torch.tensor], ids=["list", "array", "tensor"])
def test_targets_of_any_kind_lose_the_same_samples(columns: Any) -> None:
    target = {"label": columns([3, 4, 5]), "mode": "hard", "weights": torch.ones(10)}
    taken = take_rows(target, torch.tensor([0, 2]), 3)
    assert list(taken["label"]) == [3, 5]
    assert taken["mode"] == "hard"
    assert taken["weights"] is target["weights"]


# --- a step -----------------------------------------------------------------------------------------------------------


class Slopes(nn.Module):
    """One output, so that Rademacher noise and a loss that is linear in it give a sample's gradient without noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)[:, 0]


def linear(output: Tensor, slope: Tensor) -> Tensor:
    return output * slope


def sloped(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    return x, torch.randn(samples, generator=generator, dtype=torch.float64).exp()


@pytest.mark.parametrize("changes", [{}, {"antithetic": False}, {"placement": "alive"}, {"chunk": 2}], ids=str)
def test_a_step_is_the_weighted_sum_over_the_drawn_samples(changes: dict[str, Any]) -> None:
    """``Σ slope_i x_i / (N p_i)`` over the rows that were drawn, and nothing else that is random."""
    x, slope = sloped(9)
    model = Slopes()
    estimator = LikelihoodRatio(copies=4, sampling="error", **changes)
    program = onward.compile(model, (x,), loss=linear, estimator=estimator, seed=3)
    loss = program.step(x, slope)
    with torch.no_grad():
        torch.testing.assert_close(loss, (model(x) * slope).mean())
    p = inclusion(slope[:, None] / 9)
    rows = draw(p, torch.tensor([3, 0]))
    assert 1 < len(rows) < 9
    expected = (slope[rows] / p[rows] / 9) @ x[rows]
    assert model.layer.weight.grad is not None
    torch.testing.assert_close(model.layer.weight.grad[0], expected, rtol=1e-8, atol=1e-10)
    assert program.clean_forwards == 9 + len(rows)
    assert program.forwards == program.compiled.forwards * len(rows)


def test_the_mean_over_steps_is_the_whole_batch_s() -> None:
    """1,500 steps: the z-score of each of three coordinates is below 4.5 (once in 50,000 such tests), and an error of
    4 % of the gradient's size would be 3 standard errors beyond that."""
    x, slope = sloped(12)
    model = Slopes()
    program = onward.compile(model, (x,), loss=linear, estimator=LikelihoodRatio(copies=2, sampling="error"), seed=1)
    found = []
    for _ in range(1500):
        model.zero_grad()
        program.step(x, slope)
        assert model.layer.weight.grad is not None
        found.append(model.layer.weight.grad[0].clone())
    expected = slope @ x / 12
    stacked = torch.stack(found)
    error = stacked.std(0) / math.sqrt(len(found))
    assert ((stacked.mean(0) - expected).abs() < 4.5 * error).all()
    assert (7.5 * error < 0.04 * expected.norm()).all()


def test_samples_whose_error_is_not_finite_are_all_perturbed() -> None:
    """A finite loss may have an infinite derivative: square roots at 0."""
    p = inclusion(torch.tensor([[math.inf, 0.0], [math.nan, 1.0], [1.0, 0.0], [0.0, 0.01], [0.0, 0.0]]))
    assert p[:2].tolist() == [1, 1]
    torch.testing.assert_close(p[2:], inclusion(torch.tensor([[1.0, 0.0], [0.0, 0.01], [0.0, 0.0]])))
    assert inclusion(torch.full((3, 2), math.nan)).tolist() == [1, 1, 1]
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).abs()
    x[0] = 0
    model = nn.Linear(8, 2, bias=False)
    nn.init.constant_(model.weight, 0.1)
    program = onward.compile(
        model,
        (x,),
        loss=lambda output, _: output.clamp_min(0).sqrt().sum(1),
        estimator=LikelihoodRatio(copies=8, sampling="error"),
    )
    program.step(x, torch.zeros(16))
    assert model.weight.grad is not None
    assert model.weight.grad.isfinite().all()
    assert program.forwards >= 0
    assert 16 + 1 <= program.clean_forwards <= 2 * 16


def test_it_costs_fewer_forwards_for_the_same_variance() -> None:
    """A classifier that has most samples right: at most half of the forwards, at most 1.5 times the variance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 8, generator=generator)
    y = (x[:, 0] > 0).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    variances, forwards = {}, {}
    for sampling in ("all", "error"):
        estimator = LikelihoodRatio(copies=8, groups="joint", sigma=0.02, sampling=sampling)
        program = onward.compile(model, (x,), loss=F.cross_entropy, estimator=estimator)
        found = []
        for _ in range(150):
            model.zero_grad()
            program.step(x, y)
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        variances[sampling] = float(torch.stack(found).var(0).sum())
        forwards[sampling] = program.forwards
    assert forwards["error"] < forwards["all"] / 2
    assert variances["error"] < 1.5 * variances["all"]


def test_threads_do_not_change_it() -> None:
    x, slope = sloped(10)
    found = []
    for workers in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)).double()
        estimator = LikelihoodRatio(copies=8, chunk=4, sampling="error")
        program = onward.compile(model, (x,), loss=linear, estimator=estimator, workers=workers)
        if workers > 1:
            program.executor.concurrent = True
        for _ in range(3):
            program.step(x, slope)
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_loss_without_derivative_and_measured_sigmas() -> None:
    """The error of a black box is estimated at the output; σ is measured on the whole batch."""
    x, _ = sloped(10)
    model = nn.Sequential(nn.Linear(3, 2)).double()

    def wrong(output: Tensor, target: Any) -> Any:
        return (output.argmax(1) != target).numpy().astype(float)

    estimator = LikelihoodRatio(copies=4, noise="gaussian", sigma="auto", sampling="error")
    program = onward.compile(model, (x,), loss=wrong, estimator=estimator)
    program.step(x, torch.zeros(10, dtype=torch.long))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_failed_step_leaves_no_trace() -> None:
    x, slope = sloped(4)
    model = Slopes()
    program = onward.compile(model, (x,), loss=linear, estimator=LikelihoodRatio(copies=2, sampling="error"))
    with pytest.raises(onward.errors.NonFiniteLossError):
        program.step(x, slope * torch.nan)
    assert model.layer.weight.grad is None
    assert (program.step_count, program.clean_forwards) == (0, 0)


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_batch_statistics_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    estimator = LikelihoodRatio(copies=2, sampling="error")
    with pytest.raises(OptionError, match=r"module '1'.*statistics of whatever is in the batch"):
        onward.compile(model, (torch.randn(4, 4),), loss=F.cross_entropy, estimator=estimator)
    onward.compile(model.eval(), (torch.randn(4, 4),), loss=F.cross_entropy, estimator=estimator)


@pytest.mark.parametrize(
    "changes", [{"credit": "batch"}, {"feedback": "learned", "placement": "alive", "groups": "joint"}]
)
def test_it_needs_each_sample_s_own_losses(changes: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match='sampling="error" weighs'):
        LikelihoodRatio(copies=2, sampling="error", **changes)


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown sampling 'eror'\. Did you mean 'error'"):
        LikelihoodRatio(sampling="eror")
