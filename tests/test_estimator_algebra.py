"""Exact algebra under fixed noise: a step's gradients are DESIGN equation (1), whatever the setting.

The noise of a step is made again by the public operator, the model is run by hand in eager torch for one copy after the
other, and the estimate is put together in NumPy from the records of `estimator_cases`. No statistics: in float64 the two
agree to rounding.

**Tolerances.** Errors are measured against the largest element of a gradient. In float64 1e-10 is 10^5 roundings. In
float32 a loss, about 1, is rounded by 6e-8 and its difference is divided by 2σ = 1; the estimate of a few copies is of the
order of 0.1 to 1, so that some ten roundings along the forward make about 1e-5 of it.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import onward
from onward import LikelihoodRatio
from onward.passes import ops
from onward.passes.graph import Role, outputs, placeholders
from onward.runtime.program import Program

from estimator_cases import (
    CASES,
    Array,
    Gradients,
    OperationCase,
    Parameters,
    SiteGradient,
    batch,
    build_model,
    forward,
    score,
    site_gradients,
)

SEED, STEP, SAMPLES, COPIES = 11, 3, 3, 6
SIGMAS = {"op*": 0.4, "*": 0.5}
BY_NAME = {case.name: case for case in CASES}

COMPILED: dict[str, tuple[str, str, str, str]] = {
    "joint-exact": ("joint", "exact", "gaussian", "exact"),
    "joint-sign": ("joint", "sign", "gaussian", "sign"),  # the paper's
    "joint-stochastic": ("joint", "stochastic", "laplace", "exact"),
    "layerwise-exact": ("layerwise", "exact", "laplace", "sign"),
    "layerwise-sign": ("layerwise", "sign", "rademacher", "exact"),
    "layerwise-stochastic": ("layerwise", "stochastic", "rademacher", "sign"),
}
"""What a program is compiled for: groups, capture, noise, score."""
RUN = list(itertools.product((True, False), (None, 2, 4), ("sample", "batch")))
"""What the same graphs are then run with: antithetic, chunk, credit."""


def sample_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(1) + output.sum(1).sin()


def batch_loss(output: Tensor, target: Tensor) -> Tensor:
    """Couples the samples."""
    return sample_loss(output, target).logsumexp(0)


LOSSES: dict[str, Any] = {"sample": sample_loss, "batch": batch_loss}


def with_settings(program: Program, **changes: Any) -> Program:
    """The same graphs run with another number of copies, chunk, credit or pairing, which no graph depends on."""
    estimator = dataclasses.replace(program.compiled.estimator, **changes)
    compiled = dataclasses.replace(program.compiled, estimator=estimator)
    return Program(program.model, compiled, LOSSES[estimator.credit], program.seed)


def gradients_of(program: Program, x: Tensor, target: Tensor) -> Gradients:
    """The gradients that step number `STEP` leaves."""
    program.model.zero_grad()
    program.step_count = STEP
    program.step(x, target)
    named = dict(program.model.named_parameters())
    assert all(parameter.grad is not None for parameter in named.values())
    return {name: parameter.grad.double().numpy() for name, parameter in named.items() if parameter.grad is not None}


# --- the reference ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Record:
    """What a site of one run by hand captured, and the noise it got."""

    noise: Tensor
    captured: Array


class Hand:
    """A run by hand: adds noise at the sites of `group` (none: the clean run) and writes down captures."""

    def __init__(self, names: list[str], group: tuple[str, ...], copy: int, estimator: LikelihoodRatio) -> None:
        self.names, self.group, self.copy, self.estimator = names, group, copy, estimator
        self.records: dict[str, Record] = {}
        self.statistics: dict[str, Tensor] = {}
        self.key = torch.tensor([SEED, STEP])

    def clean(self, name: str, value: Tensor) -> Tensor:
        return self.statistics.setdefault(name, value)

    def __call__(
        self, site: str, z: Tensor, captured: Tensor | None = None, *, encoded: bool = True, dim: int = 0
    ) -> Tensor:
        index = self.names.index(site)
        assert captured is not None
        identity = torch.tensor([self.copy])
        sizes = [1 if d == dim else extent for d, extent in enumerate(z.shape)]
        one = torch.ones(len(self.names), dtype=torch.float64)
        noise = ops.perturb(
            torch.zeros_like(z), identity, self.key, one, index, self.estimator.noise, sizes, dim, 1, False
        )
        read = self._encoded(captured, index, dim) if encoded else captured
        self.records[site] = Record(noise, read.double().numpy())
        sigma = SIGMAS["op*"] if site.startswith("op") else SIGMAS["*"]
        return z + sigma * noise if site in self.group else z

    def _encoded(self, x: Tensor, index: int, dim: int) -> Tensor:
        """DESIGN (2) and (3): the sign, or the sign with probability |x| / m times m."""
        if self.estimator.capture == "exact":
            return x
        if self.estimator.capture == "sign":
            return x.sign()
        others = [d for d in range(x.dim()) if d != dim]
        scale = x.abs().amax(others, keepdim=True)
        sizes = [1 if d == dim else extent for d, extent in enumerate(x.shape)]
        # captured in the clean run unless the group's own noise changes it: `estimate` sees to that
        return scale * ops.stochastic_sign(x, scale, torch.tensor([self.copy]), self.key, index, sizes, dim, 1)


def estimate(case: OperationCase, model: nn.Module, x: Tensor, target: Tensor, estimator: LikelihoodRatio) -> Gradients:
    """Equation (1), copy by copy: the mean of ``vjp[(ℓ - b) s(ε) / σ]``, b the clean loss.

    Of an antithetic pair b cancels where both halves have the same captures, which leaves (4).
    """
    formulas = site_gradients(case)
    names = list(formulas)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    arrays = {name: value.double().numpy() for name, value in parameters.items()}
    loss = LOSSES[estimator.credit]
    clean = Hand(names, (), 0, estimator)
    baseline = loss(forward(case, parameters, x, clean), target)
    groups = [tuple(names)] if estimator.groups == "joint" else [(name,) for name in names]
    draws = range(estimator.draws)
    copies = [d for draw in draws for d in ((draw, ~draw) if estimator.antithetic else (draw,))]
    total = {name: np.zeros(tuple(value.shape)) for name, value in parameters.items()}
    for group in groups:
        runs, losses = [], []
        for copy in copies:
            hand = Hand(names, group, copy, estimator)
            hand.statistics = dict(clean.statistics)
            losses.append(loss(forward(case, parameters, x, hand), target))
            runs.append(hand)
        for site in group:
            sigma = SIGMAS["op*"] if site.startswith("op") else SIGMAS["*"]
            first = site == group[0]  # nothing before it is perturbed: one capture, of the clean run
            terms = []
            for hand, value in zip(runs, losses, strict=True):
                credit = (value - baseline).double().numpy() / sigma / (1 if value.dim() == 0 else SAMPLES)
                scored = score(estimator.noise, estimator.score, hand.records[site].noise.double().numpy())
                terms.append((clean if first else hand, credit, scored))
            _add(total, formulas[site], site, terms, arrays, case, estimator)
    return total


def _add(
    total: Gradients,
    formula: SiteGradient,
    site: str,
    terms: list[tuple[Hand, Array, Array]],
    arrays: dict[str, Array],
    case: OperationCase,
    estimator: LikelihoodRatio,
) -> None:
    """Add the mean over the copies of one site's gradients."""
    cotangents = [_credited(credit, scored, _batch_dim(case, site)) / len(terms) for _, credit, scored in terms]
    captured = [hand.records[site].captured for hand, _, _ in terms]
    if site == case.statistics_of:  # batch statistics in a local vjp are those of the chunk's copies together
        size = estimator.chunk or estimator.copies
        captured = [np.concatenate(captured[i : i + size]) for i in range(0, len(terms), size)]
        cotangents = [np.concatenate(cotangents[i : i + size]) for i in range(0, len(terms), size)]
    for read, cotangent in zip(captured, cotangents, strict=True):
        for name, value in formula(read, cotangent, arrays).items():
            total[name] = total[name] + value


def _batch_dim(case: OperationCase, site: str) -> int:
    return 1 if site.startswith("op.layer") else 0


def _credited(credit: Array, scored: Array, dim: int) -> Array:
    shape = [1] * scored.ndim
    shape[dim] = -1
    return scored * credit.reshape(shape)


def assert_close(found: Gradients, expected: Gradients, tolerance: float, what: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = np.abs(found[name] - value).max() / max(np.abs(value).max(), 1e-3)
        assert error <= tolerance, f"{what}: {name} is off by {error:.2e} of its largest element"


# --- equation (1) -----------------------------------------------------------------------------------------------------


def compile_case(case: OperationCase, setting: str, dtype: torch.dtype) -> Program:
    groups, capture, noise, scoring = COMPILED[setting]
    estimator = LikelihoodRatio(
        groups=groups, capture=capture, noise=noise, score=scoring, copies=COPIES, sigma=dict(SIGMAS)
    )
    model = build_model(case, dtype)
    return onward.compile(model, (batch(case, SAMPLES, dtype)[0],), loss=sample_loss, estimator=estimator, seed=SEED)


def settings_of(position: int, case: OperationCase) -> list[str]:
    """All settings for the two commonest operations; for the others both groupings exact, and one encoded in turn."""
    if case.statistics_of:
        return ["joint-exact", "layerwise-exact"]
    if case.name in ("linear", "conv2d_stride"):
        return list(COMPILED)
    encoded = [name for name in COMPILED if "exact" not in name]
    exact = "joint-exact" if position % 3 else "layerwise-exact"
    return [exact, encoded[position % len(encoded)]]


GRID = [(case.name, setting) for position, case in enumerate(CASES) for setting in settings_of(position, case)]


@pytest.mark.parametrize(("name", "setting"), GRID)
def test_step_is_equation_1(name: str, setting: str) -> None:
    case = BY_NAME[name]
    program = compile_case(case, setting, torch.float64)
    assert [site.name for site in program.compiled.sites] == list(site_gradients(case))
    x, target = batch(case, SAMPLES)
    for antithetic, chunk, credit in RUN:
        run = with_settings(program, antithetic=antithetic, chunk=chunk, credit=credit)
        expected = estimate(case, program.model, x, target, run.compiled.estimator)
        what = f"antithetic={antithetic}, chunk={chunk}, credit={credit}"
        assert_close(gradients_of(run, x, target), expected, case.float64_tolerance, what)
