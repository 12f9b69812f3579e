"""Learned feedback (DESIGN.md 12): what is learned, what is predicted from it, and how little it may depend on.

Statistics: `BOUND` = 6 standard errors are exceeded by chance in 2e-9 of all comparisons. Where a bound on a random
maximum is needed it is Doob's: a non-negative process whose expectation never grows exceeds ``c`` times its start with
probability at most ``1 / c``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import onward
from onward.compiler.driver import compile_model
from onward.compiler.program import CompiledModel
from onward.passes import ops
from onward.passes.errors import CheckpointError, LossShapeError, NonFiniteLossError, OptionError, UnsupportedModelError
from onward.passes.find_sites import Site
from onward.passes.graph import Layout
from onward.runtime.execution import bound
from onward.runtime.feedback import FeedbackState, initial_state
from onward.runtime.learning import learn
from onward.runtime.loss import SampleLoss
from onward.runtime.noise.rows import Probe
from onward.runtime.output_gradient import BLACK_BOX_SIGMA, OutputGradient
from onward.runtime.traced_loss import LossInputs

BOUND = 6.0
DOUBLE = torch.float64
PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate)
"""No shrinking, which would take minutes."""


def site(index: int, elements: int) -> Site:
    name = f"site{index}"
    return Site(index, name, "linear", name, name, (), (), (), Layout((1, elements), 0), "")


class Problem:
    """Noise points of given widths behind which the outputs are linear, sample by sample, and fixed alive masks."""

    def __init__(
        self,
        widths: list[int],
        samples: int,
        draws: int = 1,
        *,
        outputs: int = 2,
        sigma: float = 0.1,
        scale: float = 1.0,
        spread: float = 0.0,
        alive: Callable[[int], Tensor] | None = None,
        seed: int = 0,
        noise: str = "rademacher",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.sites = [site(index, width) for index, width in enumerate(widths)]
        self.samples, self.draws, self.seed, self.noise = samples, torch.arange(draws), seed, noise
        self.sigmas = [sigma * (1 + index) for index in range(len(widths))]
        self.alive = {index: None if alive is None else alive(width) for index, width in enumerate(widths)}
        mean = [scale * torch.randn(width, outputs, generator=generator, dtype=DOUBLE) for width in widths]
        own = [torch.randn(samples, *each.shape, generator=generator, dtype=DOUBLE) for each in mean]
        self.jacobians = [each + spread * scale * (more - more.mean(0)) for each, more in zip(mean, own, strict=True)]
        self.mean = dict(enumerate(mean))
        self.error = torch.randn(samples, outputs, generator=generator, dtype=DOUBLE)
        self.start = initial_state(self.sites, outputs, self.error)

    def rows(self, index: int, step: int) -> Tensor:
        """σ times the noise, ``(draws, samples, elements)``, straight from the operator."""
        key, width = torch.tensor([self.seed, step]), self.sites[index].layout.elements
        sigmas, where = torch.tensor(self.sigmas), ([1, width], 0, 1, False)
        zeros = torch.zeros(self.samples, width, dtype=DOUBLE)
        noise = ops.perturb(zeros, self.draws, key, sigmas, index, self.noise, *where, self.alive[index])
        return noise.reshape(len(self.draws), self.samples, width)

    def probe(self, step: int) -> Probe:
        response = sum(
            torch.einsum("dne,neo->dno", self.rows(index, step), jacobian)
            for index, jacobian in enumerate(self.jacobians)
        )
        assert isinstance(response, Tensor)
        return Probe(response, self.error, self.alive, self.draws, torch.tensor([self.seed, step]))

    def learn(self, state: FeedbackState, step: int) -> FeedbackState:
        return learn(state, self.probe(step), self.sites, self.sigmas, self.noise)[0]

    def prediction_error(self, state: FeedbackState) -> float:
        """The expected square of the residual: ``Σ_i σ_i² mean over samples of Σ_k alive ‖J_sample - J‖²``."""
        total = 0.0
        for index, jacobian in enumerate(self.jacobians):
            each = (jacobian - state.jacobians[index]).square().sum(2)
            mask = self.alive[index]
            each = each if mask is None else each * mask
            total += self.sigmas[index] ** 2 * float(each.sum(1).mean())
        return total


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("widths", "samples", "draws"), [([6], 4, 2), ([20], 3, 1), ([3, 5, 2], 16, 1)])
def test_the_error_shrinks_as_derived(widths: list[int], samples: int, draws: int) -> None:
    """With noise of signs and no masks ``E[(1 - μ A)²] = 1 - 2 μ + μ² (N + d - 1) / N`` times the identity,
    A being ``mean(ε εᵀ)`` over N samples x draws in d coordinates: the expected square error is that product of its
    start."""
    steps, count, width = 8, samples * draws, sum(widths)
    expected = 1.0
    for step in range(1, steps + 1):
        rate = min(max(0.05, 1 / step), count / (count + width))
        expected *= 1 - 2 * rate + rate**2 * (count + width - 1) / count
    shrunk = []
    for seed in range(70):
        problem = Problem(widths, samples, draws, outputs=3, sigma=1.0, seed=seed)
        problem.sigmas = [0.3] * len(widths)  # one for all, so that the errors of the sites weigh alike
        state = problem.start
        for step in range(steps):
            state = problem.learn(state, step)
        shrunk.append(problem.prediction_error(state) / problem.prediction_error(problem.start))
    error = np.std(shrunk, ddof=1) / len(shrunk) ** 0.5
    assert abs(np.mean(shrunk) - expected) < BOUND * error
    assert BOUND * error < expected, "an error of a factor of two would be found"


def test_the_jacobians_are_found() -> None:
    problem = Problem([7, 4], 32, 4, alive=lambda width: torch.rand(32, width, generator=torch.Generator()) < 0.6)
    state = problem.start
    for step in range(400):
        state = problem.learn(state, step)
    for index, mean in problem.mean.items():  # at μ ≥ 0.05 each step leaves less than 1 - 0.05 of the square error
        reached = problem.alive[index].any(0)  # type: ignore[union-attr]
        assert float((state.jacobians[index] - mean)[reached].norm()) < 10 * 0.95**200 * float(mean.norm())
    assert state.explained > 0.999
    assert state.steps == 400


def clustered(samples: int, share: float, outliers: int, seed: int) -> Callable[[int], Tensor]:
    """Coordinates that are alive in a share of the samples, all of them at once in a few samples."""
    generator = torch.Generator().manual_seed(seed)

    def masks(width: int) -> Tensor:
        found = torch.rand(samples, width, generator=generator) < share
        found[:outliers] = True
        return found

    return masks


@hypothesis.settings(max_examples=15, phases=PHASES)
@hypothesis.given(
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    samples=st.integers(1, 40),
    draws=st.integers(1, 4),
    sigma=st.sampled_from([1e-3, 0.1, 10.0]),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    spread=st.sampled_from([0.0, 0.5, 3.0]),
    share=st.sampled_from([0.0, 0.03, 0.3, 1.0]),
    outliers=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_learning_never_diverges(
    widths: list[int], samples: int, draws: int, share: float, outliers: int, seed: int, **settings: Any
) -> None:
    """The expected prediction error never grows (`learn`), so by Doob it stays below a million times its start but with
    probability 1e-6; diverging, it would pass any bound."""
    alive = clustered(samples, share, outliers, seed)
    problem = Problem(widths, samples, draws, alive=alive, seed=seed, **settings)
    state, start = problem.start, problem.prediction_error(problem.start)
    for step in range(200):
        state = problem.learn(state, step)
        assert problem.prediction_error(state) <= 1e6 * start


@pytest.mark.parametrize("outliers", [1, 2])
def test_samples_that_are_alive_where_no_other_is_do_not_make_it_diverge(outliers: int) -> None:
    """The bound ``N / (N + d)`` alone would multiply their coordinates' error by ``d N / (N + d)`` = 21 a step."""
    problem = Problem([64], 32, alive=clustered(32, 0.0, outliers, 0))
    state = problem.start
    for step in range(200):
        state = problem.learn(state, step)
    assert problem.prediction_error(state) < problem.prediction_error(problem.start)


# --- trust ------------------------------------------------------------------------------------------------------------


def test_exact_jacobians_are_trusted() -> None:
    problem = Problem([5, 4], 16, 2)
    state = replace(problem.start, jacobians=dict(problem.mean))
    assert state.trust(0) == 1.0  # nothing was measured
    state = problem.learn(state, 0)
    assert state.trust(0) == pytest.approx(1.0, abs=1e-9)
    assert state.trust(1) == pytest.approx(1.0, abs=1e-9)
    assert state.explained == pytest.approx(1.0)


def test_independent_jacobians_are_not_trusted_nor_negated_ones() -> None:
    """For independent Gaussian Jacobians the slope is a cosine of vectors of 60 x 20 elements, seen through the errors
    of 16 samples: its standard deviation is below ``1 / sqrt(60)`` = 0.13 (one sample's); the mean of 20 problems is
    tested to `BOUND` times that over ``sqrt(20)``, 0.17."""
    measured = []
    for seed in range(20):
        problem = Problem([60], 16, 4, outputs=20, seed=seed)
        other = torch.randn(60, 20, generator=torch.Generator().manual_seed(1000 + seed), dtype=DOUBLE)
        state = problem.learn(replace(problem.start, jacobians={0: other}), 0)
        measured.append(state.slopes[0][0] / state.slopes[0][1])
        assert 0 <= state.trust(0) <= 1
        wrong = problem.learn(replace(problem.start, jacobians={0: -problem.mean[0]}), 0)
        assert wrong.trust(0) == 0.0
    assert abs(np.mean(measured)) < BOUND * 0.13 / 20**0.5


def test_half_of_the_jacobian_is_trusted_in_full_and_twice_it_by_half() -> None:
    problem = Problem([5], 16)
    for factor, trust in ((0.5, 1.0), (2.0, 0.5)):  # the slope is 1 / factor
        state = problem.learn(replace(problem.start, jacobians={0: factor * problem.mean[0]}), 0)
        assert state.trust(0) == pytest.approx(trust)


# --- programs ---------------------------------------------------------------------------------------------------------


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1]).double()


def data(samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 4, generator=generator, dtype=DOUBLE), torch.arange(samples) % 3


def default_model() -> nn.Module:
    torch.manual_seed(0)
    return mlp(4, 6, 5, 3)


@functools.cache
def compiled_for(estimator: onward.LikelihoodRatio) -> CompiledModel:
    """The default model's graphs, which are data and hold no loss: programs share them."""
    return compile_model(default_model(), data()[0], estimator)


def program_for(
    model: nn.Module | None = None, x: Any = None, loss: Any = F.cross_entropy, seed: int = 0, **settings: Any
) -> onward.Program:
    estimator = onward.LikelihoodRatio.feedback_learned(**{"warmup": 0, **settings})
    if model is None and x is None:
        return onward.Program(default_model(), compiled_for(estimator), loss, seed)
    model = default_model() if model is None else model
    return onward.compile(model, data()[0] if x is None else x, loss=loss, estimator=estimator, seed=seed)


def random_jacobians(program: onward.Program, scale: float = 1.0) -> FeedbackState:
    assert program.feedback is not None
    generator = torch.Generator().manual_seed(5)
    jacobians = {
        index: scale * torch.randn(jacobian.shape, generator=generator, dtype=jacobian.dtype)
        for index, jacobian in program.feedback.jacobians.items()
    }
    return replace(program.feedback, jacobians=jacobians)


def gradients(program: onward.Program, x: Any, y: Any) -> Tensor:
    """One step's, flat."""
    program.model.zero_grad()
    program.step(x, y)
    return torch.cat([parameter.grad.flatten() for parameter in program.model.parameters()])


def exact(model: nn.Module, x: Any, y: Any, loss: Any = F.cross_entropy) -> Tensor:
    found = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in found])


def same(one: FeedbackState | None, other: FeedbackState | None) -> bool:
    assert one is not None
    assert other is not None
    return (one.steps, one.slopes, one.explained) == (other.steps, other.slopes, other.explained) and all(
        torch.equal(one.jacobians[index], other.jacobians[index]) for index in one.jacobians | other.jacobians
    )


def test_a_linear_networks_gradients_become_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)).double()
    x, y = data(32)
    program = program_for(model, x)
    for _ in range(250):  # d = 9 coordinates, N = 32: each step leaves less than 0.95 of the square error
        found = gradients(program, x, y)
    assert torch.allclose(found, exact(model, x, y), rtol=0, atol=10 * 0.95**125)
    assert min(program.trust().values()) > 1 - 1e-6


@pytest.mark.parametrize("reach", [0, 1])
def test_the_full_correction_is_unbiased_for_any_jacobian(reach: int) -> None:
    """Random Jacobians, the same ones each step. What is left of σ² is below the rounding allowed."""
    x, y = data()
    program = program_for(correction="full", copies=64, sigma=1e-3, reach=reach)
    wrong = random_jacobians(program, 0.5)
    rows = []
    for _ in range(80):
        program.feedback = wrong
        rows.append(gradients(program, x, y))
    found, expected = torch.stack(rows), exact(program.model, x, y)
    error = found.std(0) / len(rows) ** 0.5
    assert bool(((found.mean(0) - expected).abs() <= BOUND * error + 1e-5).all())

    biased = program_for(program.model, x, reach=reach)
    biased.feedback = wrong
    prediction = gradients(biased, x, y)
    noticed = (prediction - expected).abs() > 2 * BOUND * error + 1e-5  # an estimate so far off would have failed
    assert noticed[: 4 * 6 + 6].double().mean() > 0.3  # the layers behind are exact with reach 1


def test_a_prediction_depends_on_nothing_that_the_perturbed_runs_show() -> None:
    x, y = data()
    found = []
    for settings in ({"sigma": 0.1}, {"sigma": 3.0}, {"sigma": 0.1, "seed": 9}, {"copies": 8, "noise": "gaussian"}):
        program = program_for(**settings)  # type: ignore[arg-type]
        program.feedback = random_jacobians(program)
        before = program.feedback
        found.append(gradients(program, x, y))
        assert not same(program.feedback, before), "it learned nothing"
    assert all(torch.equal(other, found[0]) for other in found[1:])
    assert float(found[0].abs().max()) > 0


@pytest.mark.parametrize("correction", ["none", "full"])
def test_a_step_is_predicted_by_what_was_known_before_it(correction: str) -> None:
    x, y = data()
    program = program_for(correction=correction)
    first = gradients(program, x, y)[: 4 * 6 + 6]
    assert bool(first.any()) == (correction == "full")
    assert program.feedback is not None
    assert all(bool(jacobian.any()) for jacobian in program.feedback.jacobians.values())


def test_only_the_first_samples_are_perturbed_with_a_probe() -> None:
    x, y = data(10)
    others = torch.cat([x[:3], torch.randn(7, 4, dtype=DOUBLE)])
    programs = [program_for(x=x, probe=0.3, copies=4) for _ in range(3)]
    for program, inputs, target in zip(programs, (x, others, x[:3]), (y, y, y[:3]), strict=True):
        program.feedback = random_jacobians(program)
        program.step(inputs, target)
    one, other, alone = (program.feedback for program in programs)
    assert one is not None
    assert same(one, other)
    share = programs[0].compiled.runs[0].share
    assert 0.5 < share < 1  # of a whole forward
    assert programs[0].forwards == 3 * 4 * share
    assert programs[0].clean_forwards == 10
    assert programs[2].forwards == 1 * 4 * share  # at least one sample
    assert not same(one, alone)
    whole = program_for(x=x, copies=4)
    whole.feedback = random_jacobians(whole)
    whole.step(x[:3], y[:3])
    assert whole.feedback is not None
    for index, jacobian in one.jacobians.items():
        torch.testing.assert_close(jacobian, whole.feedback.jacobians[index], rtol=1e-12, atol=1e-12)
    programs[1].step(x, y)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_no_weight_moves_during_the_warm_up(optimizer: type[torch.optim.Optimizer]) -> None:
    x, y = data()
    program = program_for(warmup=3)
    before = [parameter.clone() for parameter in program.model.parameters()]
    update = optimizer(program.model.parameters(), lr=0.1)  # type: ignore[call-arg]
    for step in range(4):
        program.model.zero_grad()
        program.step(x, y)
        assert all(bool(p.grad.any()) == (step == 3) for p in program.model.parameters())  # type: ignore[union-attr]
        update.step()
        moved = [not torch.equal(p, b) for p, b in zip(program.model.parameters(), before, strict=True)]
        assert moved == [step == 3] * len(before)


def test_a_step_is_repeatable_and_a_program_resumes_bit_for_bit() -> None:
    x, y = data()
    one, other = program_for(), program_for()
    for _ in range(3):
        assert torch.equal(gradients(one, x, y), gradients(other, x, y))
    assert same(one.feedback, other.feedback)
    resumed = program_for(seed=4)
    resumed.load_state_dict(one.state_dict())
    assert same(resumed.feedback, one.feedback)
    assert torch.equal(gradients(resumed, x, y), gradients(one, x, y))
    assert same(resumed.feedback, one.feedback)
    assert resumed.state_dict().keys() == one.state_dict().keys()

    torch.manual_seed(0)
    wider = program_for(mlp(4, 7, 5, 3))
    before = wider.feedback
    with pytest.raises(CheckpointError, match=r"learned for \(6, 3\)"):
        wider.load_state_dict(one.state_dict())
    assert wider.feedback is before
    state = one.state_dict()
    del state["feedback.0.jacobian"]
    with pytest.raises(CheckpointError, match="lacks"):
        resumed.load_state_dict(state)


@pytest.mark.parametrize("correction", ["none", "full"])
def test_chunks_change_nothing_but_the_rounding(correction: str) -> None:
    x, y = data()
    results = []
    for chunk in (None, 6):
        program = program_for(copies=8, chunk=chunk, correction=correction)
        program.feedback = random_jacobians(program)
        results.append((gradients(program, x, y), program.feedback))
    for found, state in results[1:]:
        torch.testing.assert_close(found, results[0][0], rtol=1e-10, atol=1e-10)
        for index, jacobian in state.jacobians.items():
            torch.testing.assert_close(jacobian, results[0][1].jacobians[index], rtol=1e-10, atol=1e-10)


def test_a_step_that_fails_leaves_what_was_learned() -> None:
    calls = [0]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls[0] += 1
        if len(output) > 6 and calls[0] > 100:  # a perturbed run of the second step
            raise RuntimeError("broken")
        return F.cross_entropy(output, target, reduction="none")

    x, y = data()
    program = program_for(loss=loss, correction="full", copies=4)
    program.step(x, y)
    before, weights = program.feedback, [p.grad.clone() for p in program.model.parameters()]  # type: ignore[union-attr]
    calls[0] = 1000
    with pytest.raises(RuntimeError, match="broken"):
        program.step(x, y)
    with pytest.raises(NonFiniteLossError):
        program.step(x * torch.nan, y)
    assert program.feedback is before
    assert program.step_count == 1
    assert all(torch.equal(p.grad, w) for p, w in zip(program.model.parameters(), weights, strict=True))  # type: ignore[arg-type]


class Rows(nn.Module):
    """Uses row numbers as values, so that copies have to run one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.head(h[torch.arange(h.shape[0])])


@pytest.mark.parametrize("correction", ["none", "full"])
def test_copies_that_run_one_at_a_time(correction: str) -> None:
    x, y = data()
    torch.manual_seed(0)
    program = program_for(Rows().double(), x, copies=4, correction=correction)
    assert program.compiled.sequential
    torch.manual_seed(0)
    same_model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    beside = program_for(same_model, x, copies=4, correction=correction)
    for _ in range(2):
        torch.testing.assert_close(gradients(program, x, y), gradients(beside, x, y), rtol=1e-10, atol=1e-10)


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.transpose(0, 1))[0][-1])


@pytest.mark.filterwarnings("ignore:.*LSTM.*batch:UserWarning")
def test_a_recurrent_model_learns_its_jacobians() -> None:
    torch.manual_seed(0)
    model = Sequence().double()
    x, y = torch.randn(12, 3, 2, dtype=DOUBLE), torch.arange(12) % 3
    program = program_for(model, x, sigma=1e-3)
    assert {program.compiled.sites[index].layout.dim for run in program.compiled.runs for index in run.sites} == {1}
    for _ in range(150):
        found = gradients(program, x, y)
    assert program.feedback is not None
    assert program.feedback.explained > 0.5
    assert float(F.cosine_similarity(found, exact(model, x, y), dim=0)) > 0.7
    assert {program.trust()[name] > 0.5 for name in program.trust()} == {True}


def test_trust_is_that_of_the_points_where_the_gradient_is_read() -> None:
    program = program_for(reach=1)
    first, second = program.compiled.sites[:2]
    assert first.ends == (second.output,)
    assert program.feedback is not None
    program.feedback = replace(program.feedback, slopes={second.index: (0.25, 1.0)})
    assert program.trust() == {
        f"{name}.{part}": 0.25 if name == "0" else 1.0 for name in "024" for part in ("weight", "bias")
    }
    untrusting = program_for(trust=False)
    untrusting.feedback = replace(untrusting.feedback, slopes={0: (0.25, 1.0)})  # type: ignore[type-var]
    assert set(untrusting.trust().values()) == {1.0}


# --- the error at the output ------------------------------------------------------------------------------------------


def by_number(output: Tensor, target: Tensor) -> Tensor:
    """Code that depends on the batch size: a constant in a trace."""
    return torch.stack([(output[row] - target[row]).square().sum() for row in range(len(output))]) * len(output)


LOSSES: dict[str, tuple[Any, str]] = {
    "cross_entropy": (F.cross_entropy, "classes"),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), "classes"),
    "mse": (F.mse_loss, "floats"),
    "bce": (F.binary_cross_entropy_with_logits, "bits"),
    "huber": (nn.SmoothL1Loss(), "floats"),
    "custom": (lambda o, t: o.logsumexp(1) - o[torch.arange(o.shape[0]), t] + o.abs().mean(1), "classes"),
    "margin": (lambda o, t: (1 + o - o.gather(1, t[:, None])).clamp_min(0).mean(1), "classes"),
    "by_number": (by_number, "floats"),
    "by_size": (lambda o, t: (o - t).square().sum(1) * (2.0 if o.shape[0] > 6 else 1.0), "floats"),
}


def targets(kind: str, samples: int, generator: torch.Generator) -> Tensor:
    if kind == "classes":
        return torch.randint(0, 10, (samples,), generator=generator)
    values = torch.randn(samples, 10, generator=generator, dtype=DOUBLE)
    return (values > 0).double() if kind == "bits" else values


@pytest.mark.parametrize("name", LOSSES)
def test_the_error_at_the_output_is_the_losss_gradient(name: str) -> None:
    loss, kind = LOSSES[name]
    function = OutputGradient(SampleLoss(loss))
    generator = torch.Generator().manual_seed(0)
    for samples in (4, 1, 10, 7, 4, 2):
        output = torch.randn(samples, 10, generator=generator, dtype=DOUBLE)
        target = targets(kind, samples, generator)
        with torch.no_grad():
            losses, error = function(output, target, torch.tensor([0, 0]))
        output.requires_grad_()
        expected_losses = SampleLoss(loss).loss(output, target)
        expected_losses = expected_losses if expected_losses.dim() == 1 else expected_losses.mean(1)
        (expected,) = torch.autograd.grad(expected_losses.mean(), output)
        assert not error.requires_grad
        torch.testing.assert_close(losses, expected_losses.detach())
        torch.testing.assert_close(error, expected, rtol=1e-12, atol=1e-14)


def test_positions_are_reduced_as_the_loss_does() -> None:
    output = torch.randn(3, 5, 4, dtype=DOUBLE)
    target = torch.randint(0, 5, (3, 4))
    _, error = OutputGradient(SampleLoss(F.cross_entropy))(output, target, torch.tensor([0, 0]))
    output.requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(output, target), output)
    torch.testing.assert_close(error, expected.reshape(3, -1))


def zero_one(output: Tensor, target: Tensor) -> np.ndarray:
    return (output.numpy().argmax(1) != target.numpy()).astype(np.float64)


def numpy_square(output: Tensor, target: Tensor) -> np.ndarray:
    return np.asarray((output.numpy() ** 3).sum(1))


@pytest.mark.parametrize("loss", [numpy_square, lambda o, t: (o.detach() ** 3).sum(1)])
def test_a_black_box_is_differentiated_in_the_mean(loss: Any) -> None:
    """The gradient of ``E Σ (o + σ ε)³`` for Gaussian noise is ``3 o² + 3 σ²``."""
    function = OutputGradient(SampleLoss(loss))
    output, target = torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, -0.3]], dtype=DOUBLE), torch.zeros(2)
    rows = torch.stack([function(output, target, torch.tensor([3, step]))[1] for step in range(300)])
    sigma = BLACK_BOX_SIGMA * float(output.std(correction=0))
    expected = (3 * output**2 + 3 * sigma**2) / 2
    error = rows.std(0) / 300**0.5
    assert bool(((rows.mean(0) - expected).abs() < BOUND * error).all())
    assert float(BOUND * error.max()) < 0.5 * float(expected.mean())
    assert float((expected - 3 * output**2 / 2).min()) > 2 * float(error.max())


def test_a_black_box_trains_the_last_layer_towards_fewer_errors() -> None:
    torch.manual_seed(0)
    x, y = data(48)
    y = (x[:, 0] > 0).long()
    program = program_for(mlp(4, 8, 3), x, zero_one)
    update = torch.optim.Adam(program.model.parameters(), lr=3e-2)
    before = float(zero_one(program.model(x).detach(), y).mean())
    for _ in range(60):
        update.zero_grad()
        program.step(x, y)
        update.step()
    assert float(zero_one(program.model(x).detach(), y).mean()) < before / 2


def test_a_bug_of_onwards_own_is_no_black_box(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: SampleLoss, losses: Tensor) -> Tensor:
        raise KeyError("a bug")

    x, y = data()
    function = OutputGradient(SampleLoss(F.cross_entropy))
    monkeypatch.setattr(SampleLoss, "reduce_positions", broken)
    with pytest.raises(KeyError, match="a bug"):
        function._traced(LossInputs([x], pytree.tree_structure(x), y % 3, len(x), [0]))


def test_a_users_mistake_in_the_loss_is_shown() -> None:
    x, y = data()
    with pytest.raises(LossShapeError):
        program_for(loss=lambda o, t: o.sum()).step(x, y)
    with pytest.raises(AttributeError, match="no_such_method"):
        program_for(loss=lambda o, t: o.no_such_method()).step(x, y)


# --- options that cannot work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placement": "operation"}, "placement=.alive"),
        ({"groups": "layerwise"}, "groups='joint'"),
        ({"antithetic": False}, "antithetic=True"),
        ({"credit": "batch"}, "credit='sample'"),
        ({"score": "sign"}, "score='exact'"),
        ({"capture": "sign"}, "clean run"),
        ({"capture": "stochastic"}, "clean run"),
        ({"reach": -1}, "reach=-1"),
        ({"warmup": -1}, "warmup=-1"),
        ({"probe": 0}, "probe=0"),
        ({"probe": 1.5}, "probe=1.5"),
        ({"probe": -0.5}, "probe=-0.5"),
        ({"probe": float("nan")}, "probe=nan"),
        ({"probe": 0.5, "correction": "full"}, "probe=1"),
        ({"correction": "half"}, "correction"),
        ({"placement": "weights"}, "placement"),
        ({"feedback": "fixed"}, "feedback"),
    ],
)
def test_options_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(onward.errors.OnwardError, match=message):
        onward.LikelihoodRatio.feedback_learned(**settings)


def test_masked_noise_needs_exact_captures_without_feedback_too() -> None:
    with pytest.raises(OptionError, match="exact captures"):
        onward.LikelihoodRatio(placement="alive", capture="sign")


class Returns(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.head, self.form = nn.Linear(4, 3), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.head(x))


def test_feedback_needs_outputs_with_the_samples_first() -> None:
    with pytest.raises(UnsupportedModelError, match=r'feedback="learned" needs a model.*first; output has the shape'):
        program_for(Returns(lambda z: z.t()).double(), loss=lambda o, t: t * 0.0)


def test_one_number_a_sample_is_an_output() -> None:
    x, _ = data()
    torch.manual_seed(0)
    program = program_for(nn.Sequential(mlp(4, 5, 1), nn.Flatten(0)), x, F.mse_loss)
    program.step(x, x[:, 0])
    assert program.feedback is not None
    assert [tuple(jacobian.shape) for jacobian in program.feedback.jacobians.values()] == [(5, 1), (1, 1)]


# --- nothing to be learned, or broken feedback, does no harm ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["random labels", "negated", "random", "zero"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_the_loss_does_not_rise(
    kind: str, optimizer: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer's gradient is exact and its loss convex; what broken feedback adds in front is not trusted.
    Without trust the same feedback moves the layers in front (below)."""
    program, x, y = prepared(kind, trust=True)
    if kind != "random labels":
        freeze_feedback(monkeypatch)
    before = whole_loss(program, x, y)
    fit(program, x, y, optimizer, epochs=12)
    assert whole_loss(program, x, y) <= before * 1.01


def test_trust_is_what_holds_back_negated_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    for trust in (True, False):
        program, x, y = prepared("negated", trust)
        with monkeypatch.context() as patch:
            freeze_feedback(patch)
            before = program.model[0].weight.detach().clone()  # type: ignore[index, union-attr]
            fit(program, x, y, torch.optim.Adam, epochs=5)
        moved.append(float((program.model[0].weight.detach() - before).norm()))  # type: ignore[index, union-attr]
    assert moved[0] < 0.1 * moved[1]


def freeze_feedback(patch: pytest.MonkeyPatch) -> None:
    """It never learns any more; its trust is measured all the same."""
    real = bound.learn

    def measure(state: FeedbackState, *rest: Any) -> tuple[FeedbackState, Tensor]:
        learned, predicted = real(state, *rest)
        return replace(learned, jacobians=state.jacobians), predicted

    patch.setattr(bound, "learn", measure)


def whole_loss(program: onward.Program, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(program.model(x), y))


def prepared(kind: str, trust: bool) -> tuple[onward.Program, Tensor, Tensor]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 4, generator=generator, dtype=DOUBLE)
    y = torch.randint(0, 3, (64,), generator=generator) if kind == "random labels" else (x @ torch.ones(4, 3).double()
        + torch.arange(3) * x[:, :1]).argmax(1)  # fmt: skip
    program = program_for(mlp(4, 16, 16, 3), x[:16], warmup=5, trust=trust, copies=4)
    if kind == "negated":  # learned first, then turned round
        for _ in range(100):
            program.step(x, y)
        program.model.zero_grad()
        assert program.feedback is not None
        jacobians = {index: -jacobian for index, jacobian in program.feedback.jacobians.items()}
        program.feedback = replace(program.feedback, jacobians=jacobians, slopes={})
    elif kind == "random":
        program.feedback = random_jacobians(program)
    return program, x, y


def fit(program: onward.Program, x: Tensor, y: Tensor, optimizer: Any, epochs: int) -> None:
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), 16, shuffle=True, generator=torch.Generator()
    )
    update = optimizer(program.model.parameters(), lr=0.05 if optimizer is torch.optim.SGD else 5e-3)
    onward.Trainer(program, update, progress=False).fit(loader, epochs=epochs)
