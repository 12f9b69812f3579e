"""What a program decides by itself: the steps with a perturbed run (``probe_every``), σ (``sigma="auto"``), and all of
it (``estimator="auto"``); and that none of it lets a run collapse."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward.compiler.program import CompiledModel
from onward.passes import ops
from onward.passes.errors import NonFiniteLossError, OptionError
from onward.runtime import program as programs
from onward.runtime.feedback import FeedbackState, probe_interval
from onward.runtime.linearity import DRAWS, LINEAR, RELATIVE, measure

DOUBLE = torch.float64


def data(samples: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 4, generator=generator, dtype=DOUBLE), torch.arange(samples) % 3


def mlp(activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


COMPILED: dict[str, CompiledModel] = {}
"""`mlp` compiled, by estimator: graphs are data, which many programs can have."""


def made(estimator: onward.LikelihoodRatio, model: nn.Module | None, loss: Any) -> onward.Program:
    if model is not None:
        return onward.compile(model, data()[0], loss=loss, estimator=estimator)
    if repr(estimator) not in COMPILED:
        COMPILED[repr(estimator)] = onward.compile(mlp(), data()[0], loss=loss, estimator=estimator).compiled
    return onward.Program(mlp(), COMPILED[repr(estimator)], loss, 0)


def learned(model: nn.Module | None = None, loss: Any = F.cross_entropy, **settings: Any) -> onward.Program:
    return made(onward.LikelihoodRatio.feedback_learned(**settings), model, loss)


def plain(model: nn.Module | None = None, loss: Any = F.cross_entropy, **settings: Any) -> onward.Program:
    return made(onward.LikelihoodRatio(**{"copies": 4, "sigma": "auto", **settings}), model, loss)


def gradients(program: onward.Program, x: Any, y: Any) -> dict[str, Tensor]:
    program.model.zero_grad()
    program.step(x, y)
    return {name: p.grad.clone() for name, p in program.model.named_parameters()}  # type: ignore[union-attr]


def descend(program: onward.Program, steps: int, rate: float = 0.05) -> list[float]:
    """So many steps of gradient descent; the losses."""
    x, y = data()
    losses = []
    for _ in range(steps):
        program.model.zero_grad()
        losses.append(float(program.step(x, y)))
        with torch.no_grad():
            for parameter in program.model.parameters():
                parameter -= rate * parameter.grad  # type: ignore[operator]
    return losses


def same_state(one: onward.Program, other: onward.Program) -> None:
    mine, theirs = ({**p.state_dict(), **p.model.state_dict()} for p in (one, other))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name], name


# --- probe_every ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "warmup"), [(1, 2), (3, 0), (3, 4), (4, 1)])
def test_a_perturbed_run_every_so_many_steps(every: int, warmup: int) -> None:
    program = learned(probe_every=every, warmup=warmup, copies=4)
    run, calls = program.executor.runs[0], []
    program.executor.runs[0] = lambda *environments: calls.append(program.step_count) or run(*environments)  # type: ignore[assignment, func-returns-value]
    x, y = data()
    perturbed: list[int] = []
    for step in range(14):
        before, feedback = program.forwards, program.feedback
        gradients(program, x, y)
        spent = program.forwards - before
        assert spent == pytest.approx(
            0 if program.feedback is feedback else len(x) * 4 * program.compiled.runs[0].share
        )
        perturbed += [step] if spent else []
    last = max(warmup - 1, 0)  # the first of them from which an interval counts
    assert perturbed == calls == [*range(last), *range(last, 14, every)]
    assert program.clean_forwards == 14 * len(x)


@pytest.mark.parametrize("reach", [0, 1])
def test_between_perturbed_runs_gradients_are_the_prediction_by_what_was_last_learned(reach: int) -> None:
    sparse, dense = learned(probe_every=5, warmup=2, reach=reach), learned(warmup=2, reach=reach)
    x, y = data()
    known = sparse.feedback
    for step in range(9):
        if sparse.next_probe <= step or step < 2:
            known = sparse.feedback
        dense.feedback = sparse.feedback
        found, expected = gradients(sparse, x, y), gradients(dense, x, y)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert any(bool(gradient.any()) for gradient in found.values()) == (step >= 2)
    assert known is not None
    assert sparse.feedback is not known


@pytest.mark.parametrize(
    ("explained", "interval"),
    [(0.0, 1), (0.49, 1), (0.5, 2), (0.75, 4), (0.8, 5), (0.9375, 16), (0.99, 16), (1.0, 16), (-3.0, 1), (-math.inf, 1),
     (math.nan, 1)],
)  # fmt: skip
def test_the_interval_of_auto(explained: float, interval: int) -> None:
    state = FeedbackState({}, explained_mean=explained)
    assert abs(probe_interval("auto", state) - interval) <= (explained == 0.8)  # 1 / (1 - 0.8) = 4.9999…
    assert probe_interval(7, state) == 7


def test_auto_spends_perturbed_runs_while_they_teach_something() -> None:
    """The outputs of a linear network are explained in the end by all of 1, those of one whose weights are far out are
    not."""
    counts = []
    for model in (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double(), mlp()):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 if len(model) == 2 else 6)
        program = learned(model, probe_every="auto", warmup=60, copies=8, sigma=1.0)
        x, y = data(32)
        for _ in range(60):
            gradients(program, x, y)
        before = program.forwards
        for _ in range(32):
            gradients(program, x, y)
        counts.append(round((program.forwards - before) / (32 * 8 * program.compiled.runs[0].share)))
    assert counts[0] == 2
    assert counts[1] > 6


@pytest.mark.parametrize("every", [4, "auto"])
def test_resume_inside_an_interval(every: Any) -> None:
    whole, first = (learned(probe_every=every, warmup=3) for _ in range(2))
    losses = descend(whole, 13)
    assert descend(first, 5) == losses[:5]
    assert every == "auto" or first.next_probe > first.step_count
    second = learned(probe_every=every, warmup=3)
    second.load_state_dict(first.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    assert second.next_probe == first.next_probe
    assert descend(second, 8) == losses[5:]
    same_state(second, whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probe_every": 0}, "probe_every=0: the steps"),
        ({"probe_every": -1}, "probe_every=-1"),
        ({"probe_every": True}, "probe_every=True"),
        ({"probe_every": 2.0}, "probe_every=2.0"),
        ({"probe_every": None}, "probe_every=None"),
        ({"probe_every": "atuo"}, "unknown probe_every 'atuo'. Did you mean 'auto'"),
        ({"probe_every": 2, "correction": "full"}, 'correction="full" needs copies every step: probe_every=1, not 2'),
        ({"probe_every": "auto", "correction": "full"}, 'correction="full" needs copies every step'),
        ({"feedback": "none", "groups": "layerwise", "probe_every": 2}, 'an option of feedback="learned"'),
        ({"sigma": "atuo"}, "unknown sigma 'atuo'. Did you mean 'auto'"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        onward.LikelihoodRatio.feedback_learned(**settings)


# --- σ ----------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Two layers, with the values between them `scale` times as large and the same output."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.scale = nn.Linear(4, 6), nn.Linear(6, 3), scale
        with torch.no_grad():
            for parameter in self.first.parameters():
                parameter.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x) / self.scale))


def sigmas(program: onward.Program, x: Tensor | None = None, y: Any = None) -> list[float]:
    given, target = data()
    program.step(given if x is None else x, target if y is None else y)
    return program.sigmas


def test_sigma_grows_with_the_values_that_it_is_added_to() -> None:
    one, hundred = (sigmas(plain(Scaled(scale).double())) for scale in (1.0, 100.0))
    assert hundred == pytest.approx([100 * one[0], one[1]], rel=1e-6)
    assert onward.LikelihoodRatio().sigma not in one


def rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt())


def test_sigma_of_a_linear_response_is_the_largest_and_before_a_sign_the_size_of_the_tensor() -> None:
    x, _ = data(16)
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    hidden = linear[0](x).detach()
    y = torch.randn(16, 3, dtype=DOUBLE)  # a square: antithetic pairs cancel its curvature, so its response is linear
    expected = [RELATIVE[-1] * rms(hidden), RELATIVE[-1] * rms(linear(x).detach())]
    assert sigmas(plain(linear, F.mse_loss), x, y) == pytest.approx(expected, rel=1e-9)
    together = [sigma / math.sqrt(2) for sigma in expected]  # of two sites in one run the noise adds up
    assert sigmas(plain(linear, F.mse_loss, groups="joint"), x, y) == pytest.approx(together, rel=1e-9)

    class Sign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sign(x)

    model = mlp(Sign)
    found = sigmas(plain(model, F.mse_loss), x, y)
    assert found[1] == pytest.approx(rms(model[2](torch.sign(model[0](x))).detach()), rel=1e-9)


def test_the_measure_is_what_its_docstring_says() -> None:
    """By hand, for the first layer."""
    model, (x, _) = mlp(), data()
    program = plain(loss=F.mse_loss)
    target = torch.randn(8, 3, dtype=DOUBLE)
    given = program.bind(x, target)[0]
    with torch.no_grad():
        found, spent = measure(program.executor, given)
        z = model[0](x)

        def loss(added: Tensor) -> Tensor:
            return (model[1:](z + added) - target).square().mean(-1)

        signs = torch.stack([noise(program, draw, z) for draw in range(DRAWS)])
        changes = []
        for relative in RELATIVE:
            half, whole = (
                (loss(sigma * signs) - loss(-sigma * signs)) / (2 * sigma)
                for sigma in (relative / 2 * rms(z), relative * rms(z))
            )
            changes.append(float((whole - half).norm() / whole.norm()))
    chosen = max(number for number, change in enumerate(changes) if change <= 0.15)
    assert found[0].sigma == pytest.approx(RELATIVE[chosen] * rms(z), rel=1e-9)
    assert found[0].nonlinearity == pytest.approx(changes[chosen], rel=1e-6)
    assert found[0].scale == pytest.approx(rms(z))
    assert 0 < chosen < len(RELATIVE) - 1, "the case is at an end of the candidates"
    at = {index: RELATIVE.index(pytest.approx(one.sigma / one.scale)) for index, one in found.items()}
    assert at[0] == chosen  # and no smaller one was tried but its half
    tried = (2 * DRAWS * run.share * (len(RELATIVE) - at[run.index] + 1) for run in program.compiled.runs)
    assert spent == pytest.approx(sum(tried))


def test_where_nothing_is_linear_all_candidates_are_tried() -> None:
    class Sign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sign(x)

    program = plain(mlp(Sign), F.mse_loss)
    x, _ = data()
    given = program.bind(x, torch.randn(8, 3, dtype=DOUBLE))[0]
    with torch.no_grad():
        found, spent = measure(program.executor, given)
    steps = [run for run in program.compiled.runs if found[run.sites[0]].nonlinearity > LINEAR]
    assert len(steps) == 2  # those before a sign
    assert all(run.share == 0 for run in program.compiled.runs if run not in steps)  # the head: nothing after it
    assert spent == pytest.approx(sum(2 * DRAWS * run.share * (len(RELATIVE) + 1) for run in steps))


def noise(program: onward.Program, draw: int, like: Tensor) -> Tensor:
    """That of a draw at the first site, straight from the operator."""
    key, one = torch.tensor([program.seed, program.step_count]), torch.ones(1, dtype=DOUBLE)
    where = ([1, *like.shape[1:]], 0, 1, False)
    return ops.perturb(torch.zeros_like(like), torch.tensor([draw]), key, one, 0, "rademacher", *where)


class Mixing(nn.Module):
    """Reads the batch's mean, so that its copies run one at a time and share one loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.head(h - h.mean(0))


@pytest.mark.parametrize(
    ("settings", "mixes"),
    [
        ({"groups": "layerwise"}, False),
        ({"groups": "joint"}, False),  # the last site is the model's output, which no stage hands over
        ({"groups": "joint", "placement": "alive"}, False),
        ({"groups": "joint", "capture": "sign"}, False),
        ({"groups": [["0", "2"], ["4"]], "antithetic": False}, False),
        ({"groups": "joint", "credit": "batch"}, False),
        ({"groups": "layerwise", "credit": "batch"}, True),
        ({"groups": "joint", "credit": "batch"}, True),
    ],
)
def test_sigma_is_measured_for_every_kind_of_run(settings: dict[str, Any], mixes: bool) -> None:
    torch.manual_seed(0)
    program = plain(Mixing().double() if mixes else None, **settings)
    assert program.compiled.sequential == mixes
    x, y = data()
    gradients(program, x, y)
    assert len(set(program.sigmas)) == len(program.sigmas)
    assert all(math.isfinite(sigma) and sigma > 0 for sigma in program.sigmas)
    first, measured = program.forwards, list(program.sigmas)
    gradients(program, x, y)
    usual = program.forwards - first
    runs = program.compiled.runs
    assert usual == pytest.approx(len(x) * sum(run.copies * run.share for run in runs))
    one = len(x) * 2 * DRAWS * sum(len(run.sites) * run.share for run in runs)  # a candidate of every site
    assert usual + 2 * one - 1e-6 <= first <= usual + (len(RELATIVE) + 1) * one + 1e-6
    assert program.sigmas == measured  # not measured again


@pytest.mark.parametrize("settings", [{"groups": "layerwise"}, {"feedback": "learned", "placement": "alive",
                                                               "groups": "joint", "warmup": 1}])  # fmt: skip
def test_sigma_is_measured_again_and_a_resumed_run_goes_on_bit_for_bit(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "CALIBRATE_EVERY", 3)
    whole, first = (plain(**settings) for _ in range(2))
    seen = []
    losses = []
    for _ in range(10):
        losses += descend(whole, 1, rate=1.0)
        seen.append(tuple(whole.sigmas))
    assert [step for step in range(1, 10) if seen[step] != seen[step - 1]] == [3, 6, 9]
    assert descend(first, 5, rate=1.0) == losses[:5]
    second = plain(**settings)
    second.load_state_dict(first.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    assert second.sigmas == first.sigmas != plain(**settings).sigmas
    assert descend(second, 5, rate=1.0) == losses[5:]
    same_state(second, whole)


def test_a_step_that_fails_leaves_sigma_as_it_was() -> None:
    x, y = data()
    broken = [0]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        values = F.cross_entropy(output, target, reduction="none")
        if broken[0] == 1 or (broken[0] == 2 and len(output) == 5 * len(x)):  # everywhere, or in the step's own copies
            values = values * math.nan
        return values

    program = plain(loss=loss, copies=5, antithetic=False)
    before = list(program.sigmas)
    for broken[0] in (1, 2):
        with pytest.raises(NonFiniteLossError):
            program.step(x, y)
        assert program.sigmas == before
        assert program.step_count == program.next_calibration == program.forwards == 0
    with pytest.raises(NonFiniteLossError):
        program.step(x * math.nan, y)
    assert program.sigmas == before
    broken[0] = 0
    program.step(x, y)
    assert program.sigmas != before
    found = list(program.sigmas)
    with pytest.raises(NonFiniteLossError):
        program.step(x * math.inf, y)
    assert program.sigmas == found


# --- auto, and no collapse --------------------------------------------------------------------------------------------


def test_auto_by_name() -> None:
    x, y = data()
    named = onward.compile(mlp(), x, loss=F.cross_entropy, estimator="auto")
    made = onward.compile(mlp(), x, loss=F.cross_entropy, estimator=onward.LikelihoodRatio.auto())
    assert named.compiled.estimator == made.compiled.estimator
    assert torch.equal(named.step(x, y), made.step(x, y))
    same_state(named, made)
    with pytest.raises(OptionError, match=r"unknown estimator 'atuo'\. Did you mean 'auto'"):
        onward.compile(mlp(), x, loss=F.cross_entropy, estimator="atuo")
    with pytest.raises(OptionError, match="estimator is int"):
        onward.compile(mlp(), x, loss=F.cross_entropy, estimator=3)  # type: ignore[arg-type]


def digits(steps: int, seed: int, *, shuffled: bool = False) -> list[tuple[Tensor, Tensor]]:
    x, y = onward.models.load("digits").train.tensors
    generator = torch.Generator().manual_seed(seed)
    y = y[torch.randperm(len(y), generator=generator)] if shuffled else y
    chosen = [torch.randint(0, len(x), (32,), generator=generator) for _ in range(steps)]
    return [(x[rows], y[rows]) for rows in chosen]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=3e-3)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def digits_program(optimizer: Callable[..., Any] = adam, **settings: Any) -> tuple[onward.Program, onward.Trainer]:
    torch.manual_seed(0)
    estimator = onward.LikelihoodRatio.auto(**settings)
    example = torch.zeros(32, 1, 8, 8)
    program = onward.compile(onward.models.mlp(), example, loss=F.cross_entropy, estimator=estimator)
    return program, onward.Trainer(program, optimizer(program.model.parameters()), progress=False)


def test_labels_without_meaning_do_no_harm() -> None:
    program, trainer = digits_program()
    batches = digits(60, 0, shuffled=True)
    first = trainer.evaluate(batches)["loss"]
    trainer.fit(batches, 1)
    assert trainer.evaluate(batches)["loss"] <= 1.5 * first
    assert all(bool(parameter.isfinite().all()) for parameter in program.model.parameters())


@pytest.mark.parametrize(("reach", "every", "optimizer"), [("auto", "auto", adam), (0, "auto", adam), (0, 1, sgd)])
def test_broken_feedback_does_no_harm_while_it_goes_on_learning(
    reach: Any, every: Any, optimizer: Callable[..., Any]
) -> None:
    """Random Jacobians a thousand times too large, in the midst of training: trust is what holds them back."""
    program, trainer = digits_program(optimizer, reach=reach, probe_every=every)
    trainer.fit(digits(25, 0), 1)
    generator = torch.Generator().manual_seed(3)
    assert program.feedback is not None
    known = program.feedback.jacobians.items()
    huge = {index: 1e3 * torch.randn(jacobian.shape, generator=generator) for index, jacobian in known}
    program.feedback = replace(program.feedback, jacobians=huge)
    batches = digits(60, 1)
    before = trainer.evaluate(batches)["loss"]
    trainer.fit(batches, 1)
    assert trainer.evaluate(batches)["loss"] < 1.2 * before
    assert all(bool(parameter.isfinite().all()) for parameter in program.model.parameters())
