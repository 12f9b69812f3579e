"""Exact algebra under fixed noise: a step's gradients are DESIGN equation (1), whatever the setting.

The noise of a step is made again by the public operator, the model is run by hand in eager torch for one copy after
the other, and the estimate is put together in NumPy from the records of `estimator_cases`. No statistics: in float64
the two agree to rounding.

**Tolerances.** Errors are measured against the largest element of a gradient. In float64 1e-10 is 10^6 roundings. In
float32 a loss of about 1 is rounded by 6e-8 at each of some ten operations and its differences are divided by 2σ = 1;
gradients are of the order 0.1 to 1 after averaging over the copies: 2e-5 of the largest element.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from estimator_cases import (
    CASES,
    Array,
    Gradients,
    OperationCase,
    SiteGradient,
    batch,
    build_model,
    forward,
    score,
    site_gradients,
)
from torch import Tensor, fx, nn

import onward
from onward import LikelihoodRatio
from onward.compiler import driver
from onward.compiler.capture import CapturedModel, capture
from onward.passes import ops
from onward.passes.find_sites import Site, sites
from onward.passes.graph import Role, placeholders
from onward.passes.trace_gradients import trace_gradients
from onward.runtime.program import Program

SEED, STEP, SAMPLES, COPIES = 11, 3, 3, 6
SIGMAS = {"op*": 0.4, "*": 0.5}
BY_NAME = {case.name: case for case in CASES}

COMPILED: dict[str, tuple[str, str, str, str]] = {
    "joint-exact": ("joint", "exact", "gaussian", "exact"),
    "joint-sign": ("joint", "sign", "gaussian", "sign"),  # the paper's
    "joint-stochastic": ("joint", "stochastic", "laplace", "exact"),
    "joint-stochastic-4": ("joint", "stochastic-4", "gaussian", "exact"),
    "layerwise-exact": ("layerwise", "exact", "laplace", "sign"),
    "layerwise-sign": ("layerwise", "sign", "rademacher", "exact"),
    "layerwise-stochastic": ("layerwise", "stochastic", "rademacher", "sign"),
}
"""What a program is compiled for: groups, capture, noise, score."""
ALL_RUNS = list(itertools.product((True, False), (None, 2, 4), ("sample", "batch")))
"""What the same graphs are then run with: antithetic, chunk, credit."""
RUNS = [ALL_RUNS[number] for number in (0, 3, 4, 7, 8, 11)]
"""Every pair of values, for the many cases."""


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

    def __init__(
        self, names: list[str], group: tuple[str, ...], copy: int, estimator: LikelihoodRatio, given: Tensor
    ) -> None:
        self.names, self.group, self.copy, self.estimator = names, group, copy, estimator
        self.given = given.untyped_storage().data_ptr()
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
        """DESIGN (2) and (3): the sign, or the sign with probability |x| / m times m; or |x| / m rounded to levels."""
        if self.estimator.capture == "exact":
            return x
        if self.estimator.capture == "sign":
            return x.sign()
        if x.untyped_storage().data_ptr() == self.given:  # the model's input is there in any case
            return x
        others = [d for d in range(x.dim()) if d != dim]
        scale = x.abs().amax(others, keepdim=True)
        sizes = [1 if d == dim else extent for d, extent in enumerate(x.shape)]
        # captured in the clean run unless the group's own noise changes it: `estimate` sees to that
        drawn = (torch.tensor([self.copy]), self.key, index, sizes, dim, 1)
        if self.estimator.capture == "stochastic":
            return scale * ops.stochastic_sign(x, scale, *drawn)
        levels = 7  # four bits, one of them the sign's
        scaled = x / scale * levels
        rounded = scaled.trunc() + ops.stochastic_sign(scaled.frac(), torch.ones_like(scale), *drawn)
        return rounded / levels * scale


def estimate(case: OperationCase, model: nn.Module, x: Tensor, target: Tensor, estimator: LikelihoodRatio) -> Gradients:
    """Equation (1), copy by copy: the mean of ``vjp[(ℓ - b) s(ε) / σ]``, b the clean loss.

    Of an antithetic pair b cancels where both halves have the same captures, which leaves (4).
    """
    formulas = site_gradients(case)
    names = list(formulas)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    arrays = {name: value.double().numpy() for name, value in parameters.items()}
    loss = LOSSES[estimator.credit]
    clean = Hand(names, (), 0, estimator, x)
    baseline = loss(forward(case, parameters, x, clean), target)
    groups = [tuple(names)] if estimator.groups == "joint" else [(name,) for name in names]
    draws = range(estimator.draws(estimator.copies))
    identities = [d for draw in draws for d in ((draw, ~draw) if estimator.antithetic else (draw,))]
    total = {name: np.zeros(tuple(value.shape)) for name, value in parameters.items()}
    for group in groups:
        runs, losses = [], []
        for identity in identities:
            hand = Hand(names, group, identity, estimator, x)
            hand.statistics = dict(clean.statistics)
            losses.append(loss(forward(case, parameters, x, hand), target))
            runs.append(hand)
        for site in group:
            sigma = SIGMAS["op*"] if site.startswith("op") else SIGMAS["*"]
            # nothing before the first is perturbed: one capture, of the clean run, also of its stochastic encoding
            shared = site in (group[0], case.statistics_of)
            terms = []
            for hand, value in zip(runs, losses, strict=True):
                credit = (value - baseline).double().numpy() / sigma / (1 if value.dim() == 0 else SAMPLES)
                scored = score(estimator.noise, estimator.score, hand.records[site].noise.double().numpy())
                terms.append((clean if shared else hand, credit, scored))
            _add(total, formulas[site], site, terms, arrays, case)
    return total


def _add(
    total: Gradients,
    formula: SiteGradient,
    site: str,
    terms: list[tuple[Hand, Array, Array]],
    arrays: dict[str, Array],
    case: OperationCase,
) -> None:
    """Add the mean over the copies of one site's gradients."""
    cotangents = [_credited(credit, scored, case.batch_dims.get(site, 0)) / len(terms) for _, credit, scored in terms]
    for (hand, _, _), cotangent in zip(terms, cotangents, strict=True):
        for name, value in formula(hand.records[site].captured, cotangent, arrays).items():
            total[name] = total[name] + value


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


@functools.cache
def captured_case(name: str, dtype: torch.dtype) -> tuple[nn.Module, CapturedModel]:
    """The export takes most of a compilation's time, and no setting changes it."""
    model = build_model(BY_NAME[name], dtype)
    return model, capture(model, (batch(BY_NAME[name], SAMPLES, dtype)[0],))


@functools.cache
def compile_case(name: str, setting: str, dtype: torch.dtype = torch.float64) -> Program:
    case = BY_NAME[name]
    groups, capture, noise, scoring = COMPILED[setting]
    estimator = LikelihoodRatio(
        groups=groups, capture=capture, noise=noise, score=scoring, copies=COPIES, sigma=dict(SIGMAS)
    )
    model, captured = captured_case(name, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "capture", lambda *_: captured)
        x = batch(case, SAMPLES, dtype)[0]
        return onward.compile(model, (x,), loss=sample_loss, estimator=estimator, seed=SEED)


FULL = ("linear", "conv2d_stride")
"""Cases that are tested with every setting; the others with one exact and one encoded."""
EXACT_ONLY = (
    *("embedding", "batch_norm_evaluated", "bias_add", "positional", "bilinear"),  # nothing of theirs is ever encoded
    *("rnn", "gru", "rnn_cell", "gru_cell", "lstm_cell"),  # made of sites that the LSTM layer has too
)


def exact_setting(name: str) -> str:
    return "layerwise-exact" if [case.name for case in CASES].index(name) % 3 == 0 else "joint-exact"


def settings_of(case: OperationCase) -> list[str]:
    if case.name in FULL:
        return list(COMPILED)
    if case.statistics_of:  # with encoded captures the two are separate sites
        return ["joint-exact", "layerwise-exact"]
    encoded = [setting for setting in COMPILED if "exact" not in setting]
    turn = encoded[CASES.index(case) % len(encoded)]
    return [exact_setting(case.name)] + ([] if case.name in EXACT_ONLY else [turn])


def check_equation_1(program: Program, case: OperationCase, runs: list[tuple[bool, int | None, str]]) -> None:
    dtype = next(program.model.parameters()).dtype
    tolerance = case.float64_tolerance if dtype == torch.float64 else case.float32_tolerance
    x, target = batch(case, SAMPLES, dtype)
    for antithetic, chunk, credit in runs:
        run = with_settings(program, antithetic=antithetic, chunk=chunk, credit=credit)
        expected = estimate(case, program.model, x, target, run.compiled.estimator)
        what = f"antithetic={antithetic}, chunk={chunk}, credit={credit}"
        assert_close(gradients_of(run, x, target), expected, tolerance, what)


def test_the_runs_hold_every_pair_of_values() -> None:
    for first, second in itertools.combinations(range(3), 2):
        assert {(run[first], run[second]) for run in RUNS} == {(run[first], run[second]) for run in ALL_RUNS}


@pytest.mark.parametrize(("name", "setting"), [(case.name, setting) for case in CASES for setting in settings_of(case)])
def test_step_is_equation_1(name: str, setting: str) -> None:
    program = compile_case(name, setting)
    assert [site.name for site in program.compiled.sites] == list(site_gradients(BY_NAME[name]))
    check_equation_1(program, BY_NAME[name], ALL_RUNS if name in FULL else RUNS)


@pytest.mark.parametrize("name", ["linear", "conv2d_groups", "conv_transpose2d", "embedding", "batch_norm", "lstm"])
def test_step_is_equation_1_in_single_precision(name: str) -> None:
    check_equation_1(compile_case(name, "joint-exact", torch.float32), BY_NAME[name], RUNS)


def test_another_batch_size_than_the_examples() -> None:
    """The compiled graphs hold no trace of the example's batch size."""
    case = BY_NAME["convolution_and_batch_norm"]
    program = compile_case(case.name, exact_setting(case.name))
    x, target = batch(case, 5)
    expected = gradients_of(with_settings(program, chunk=None), x, target)
    assert_close(gradients_of(with_settings(program, chunk=2), x, target), expected, 1e-12, "chunk=2")


# --- the local vjp ----------------------------------------------------------------------------------------------------


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every node's value."""

    def __init__(self, module: fx.GraphModule, program: Program, x: Tensor) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.run(*[self._bound(node, program, x) for node in placeholders(module)])

    @staticmethod
    def _bound(node: fx.Node, program: Program, x: Tensor) -> Any:
        role, target = node.meta["role"], node.meta["target"]
        if role == Role.PARAMETER:
            return program.model.get_parameter(target).detach()
        if role == Role.BUFFER:
            return program.model.get_buffer(target).clone()
        return x if role == Role.INPUT else program.compiled.captured.constants[target]


def autograd_vjp(module: fx.GraphModule, site: Site, values: dict[fx.Node, Any], cotangent: Tensor) -> list[Tensor]:
    """Autograd's gradient of the site's region, run again on recorded operands."""
    nodes = {node.name: node for node in module.graph.nodes}
    leaves: dict[str, Tensor] = {}
    found = dict(values)
    for name in site.region:
        node = nodes[name]
        if node.op == "placeholder":
            leaves[node.meta["target"]] = found[node] = values[node].detach().clone().requires_grad_()
        else:
            arguments = fx.map_arg((node.args, node.kwargs), found.__getitem__)
            found[node] = node.target(*arguments[0], **arguments[1])
    gradients = torch.autograd.grad(
        found[nodes[site.output]], [leaves[target] for target in site.parameters], cotangent, allow_unused=True
    )
    return [
        torch.zeros_like(leaves[target]) if gradient is None else gradient
        for target, gradient in zip(site.parameters, gradients, strict=True)
    ]


@pytest.mark.parametrize("name", BY_NAME)
def test_the_gradient_subgraph_is_autograds_local_vjp(name: str) -> None:
    """For every site of every case, with a random cotangent, at another batch size than the example's."""
    program = compile_case(name, exact_setting(name))
    module = next(record.module for record in program.compiled.history if record.name == "find_sites")
    x, _ = batch(BY_NAME[name], SAMPLES + 2)
    with torch.no_grad():
        values = Recorder(module, program, x).env
    nodes = {node.name: node for node in module.graph.nodes}
    generator = torch.Generator().manual_seed(2)
    vjps = trace_gradients(module, capture="exact")
    for site in sites(module):
        vjp = vjps[site.index]
        output = values[nodes[site.output]]
        cotangent = torch.randn(output.shape, generator=generator, dtype=output.dtype)
        given = {"cotangent": cotangent} | {node.name: value for node, value in values.items()}
        # x̂, which a normalisation by batch statistics reads in place of its input
        arguments = [given[node.name] for node in placeholders(vjp)]
        if any(node.meta["target"] == site.output for node in placeholders(vjp, Role.VALUE)):
            gamma, beta = (program.model.get_parameter(f"op.{part}").detach() for part in ("weight", "bias"))
            shape = (1, -1, *(1,) * (output.dim() - 2))
            normalized = (output - beta.reshape(shape)) / gamma.reshape(shape)
            arguments = [
                normalized if node.meta["target"] == site.output else given[node.name] for node in placeholders(vjp)
            ]
        found = vjp(*arguments)
        for target, one, expected in zip(
            site.parameters, found, autograd_vjp(module, site, values, cotangent), strict=True
        ):
            torch.testing.assert_close({target: one}, {target: expected}, rtol=1e-11, atol=1e-12)


class SeveralResults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Any:
        z, mean, _ = torch.ops.aten.native_layer_norm(x, [4], self.gain, self.shift, 1e-5)
        return z + mean


def test_a_site_with_several_results_is_refused() -> None:
    """Noise on the first result would miss what a parameter does through the others: a bias that nobody sees."""
    with pytest.raises(onward.errors.UnsupportedModelError, match="several results"):
        onward.compile(SeveralResults(), (torch.randn(3, 4),), loss=sample_loss)


# --- batch normalisation and dropout ----------------------------------------------------------------------------------


NO_SIGMA = 1e-300
"""Valid, and added to anything it changes nothing."""


class Recording:
    """A loss that keeps the outputs it is given: of the clean run ``(N, …)``, and of all copies ``(K, N, …)``."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.outputs.append(output.detach().clone())
        return output.flatten(1).sum(1)

    def step(self, program: Program, x: Tensor) -> tuple[Tensor, Tensor]:
        self.outputs.clear()
        program.step(x, torch.zeros(x.shape[0]))
        clean, *chunks = self.outputs
        return clean, torch.cat([chunk.unflatten(0, (-1, x.shape[0])) for chunk in chunks])


class ConvNorm(nn.Module):
    """The gain in front makes the convolution's input another one in every copy of a joint group."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 16).reshape(4, 4))
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.norm(self.conv(torch.tanh(x * self.gain)))).flatten(1))


def compiled_norm(loss: Any = None, **settings: Any) -> tuple[Program, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = ConvNorm().double()
        with torch.no_grad():
            model.norm.weight.add_(0.3 * torch.randn(3))
    x = torch.randn(6, 1, 4, 4, generator=generator, dtype=torch.float64)
    target = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    estimator = LikelihoodRatio(**settings)
    return onward.compile(model, (x,), loss=loss or quadratic, estimator=estimator, seed=5), x, target


def quadratic(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(1)


def test_running_statistics_move_once_a_step_as_in_one_forward() -> None:
    program, x, target = compiled_norm(copies=8, chunk=2, groups="layerwise")
    eager = copy.deepcopy(program.model)
    for steps in (1, 2):
        program.step(x, target)
        with torch.no_grad():
            eager(x)
        for name, buffer in program.model.named_buffers():
            torch.testing.assert_close(buffer, eager.get_buffer(name), rtol=1e-12, atol=1e-14)
        assert int(program.model.get_buffer("norm.num_batches_tracked")) == steps


def test_copies_see_the_clean_runs_batch_statistics() -> None:
    """Without noise a copy is the clean run, to rounding; with noise a copy is the same whatever stands beside it."""
    recording = Recording()
    program, x, _ = compiled_norm(recording, copies=6, groups="joint", sigma=NO_SIGMA)
    clean, copies = recording.step(program, x)
    torch.testing.assert_close(copies, clean.expand_as(copies), rtol=1e-12, atol=1e-13)
    together, apart = (
        recording.step(compiled_norm(recording, copies=6, groups="joint", sigma=0.7, chunk=chunk)[0], x)[1]
        for chunk in (None, 2)
    )
    order = [position for draw in range(3) for position in (draw, draw + 3)]  # pairs instead of halves
    torch.testing.assert_close(apart, together[order], rtol=1e-12, atol=1e-13)


def test_the_chunk_changes_no_gradient_of_a_joint_group_with_batch_statistics() -> None:
    """A gradient through batch statistics reads the clean run: copies side by side never meet in them."""
    found = []
    for chunk in (None, 2):
        program, x, target = compiled_norm(copies=6, groups="joint", sigma=0.5, chunk=chunk)
        found.append(gradients_of(program, x, target))
    assert_close(found[0], found[1], 1e-11, "chunk=2")


def test_the_joined_site_converges_to_autograd() -> None:
    """A convolution under batch normalisation in training mode: its gradient goes through the statistics.

    The relative error of a direction from K pairs at a site of d coordinates a sample is about sqrt(d / K), here at
    most sqrt(16 / 2048) = 0.09, so that cosines are about 1 - 0.09² / 2 = 0.996.
    """
    program, x, target = compiled_norm(copies=4096, groups="layerwise", sigma=0.01)
    found = gradients_of(program, x, target)
    exact = autograd(program.model, x, target)
    for name in ("conv.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"):
        assert cosine(found[name], exact[name]) > 0.99, name
    for one in (found, exact):  # normalisation takes the mean out again: no gradient at all
        assert np.abs(one["conv.bias"]).max() < 1e-12


def test_sites_further_up_see_the_statistics_fixed() -> None:
    """A limit of the definition: what a site moves in the statistics of a later normalisation is not in its copies.

    The gain's estimate converges to its gradient with the batch statistics held fixed, another direction than
    autograd's.
    """
    program, x, target = compiled_norm(copies=16384, chunk=2048, groups="layerwise", sigma=0.01)
    found = gradients_of(program, x, target)
    exact = autograd(program.model, x, target)
    model = program.model
    with torch.no_grad():
        z = model.conv(torch.tanh(x * model.gain))  # type: ignore[operator]
        model.norm.running_mean = z.mean((0, 2, 3))
        model.norm.running_var = z.var((0, 2, 3), unbiased=False)
    fixed = autograd(model.eval(), x, target)
    assert cosine(found["gain"], fixed["gain"]) > 0.99
    assert cosine(found["gain"], exact["gain"]) < 0.95


def autograd(model: nn.Module, x: Tensor, target: Tensor) -> Gradients:
    model.zero_grad()
    quadratic(model(x), target).mean().backward()
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


def cosine(a: Array, b: Array) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


class Dropped(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(4, 50), nn.Dropout(p), nn.Linear(50, 50)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.drop(self.first(x)))


@pytest.mark.parametrize("groups", ["joint", "layerwise"])
def test_copies_share_the_dropout_mask(groups: str) -> None:
    """Without noise every copy is the clean run, bit for bit; and the next step has another mask."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(6))
    estimator = LikelihoodRatio(copies=4, groups=groups, chunk=2, sigma=NO_SIGMA)
    recording = Recording()
    program = onward.compile(Dropped(0.4), (x,), loss=recording, estimator=estimator, seed=7)
    clean, copies = recording.step(program, x)
    assert torch.equal(copies, clean.expand_as(copies))
    another, _ = recording.step(program, x)
    assert not torch.equal(clean, another)


def test_dropout_keeps_its_probability() -> None:
    """50,000 masks of p = 0.4: z-score below 5 (one false alarm in 1.7 million, and the seed is fixed). A probability
    off by 0.02 would give a z-score of 9."""
    x = torch.ones(1000, 4)
    model = Dropped(0.4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.first.bias.fill_(1.0)
        model.second.weight.copy_(torch.eye(50))
    recording = Recording()
    program = onward.compile(model, (x[:3],), loss=recording, estimator=LikelihoodRatio(copies=2), seed=8)
    clean, _ = recording.step(program, x)
    kept = clean != 0
    torch.testing.assert_close(clean[kept], torch.full_like(clean[kept], 1 / 0.6))
    deviation = math.sqrt(0.4 * 0.6 / kept.numel())
    assert abs(float(kept.double().mean()) - 0.6) < 5 * deviation
