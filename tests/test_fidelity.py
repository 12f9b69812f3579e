"""Fidelity: bias and variance against closed forms, the intervals' coverage, sweeps, and ``onward fidelity``.

**Tolerances.** An estimate is compared with its closed form by its own interval, widened to `WIDER` times: 3.9 standard
errors, which one comparison in 10,000 exceeds by chance; seeds are fixed. Beside it stands how narrow the interval is
(the test's power). That the intervals are what they claim is tested by simulation (`test_intervals_hold_the_truth`).
"""

from __future__ import annotations

import functools
import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from estimator_cases import Point
from torch import Tensor, nn
from typer.testing import CliRunner

import onward
from onward import LikelihoodRatio
from onward.cli import app
from onward.cli.fidelity_cases import make_cases
from onward.cli.options import Common
from onward.evidence import fidelity_report, fidelity_statistics
from onward.evidence.fidelity import Fidelity, exact_gradient, learn, measure, site_parameters
from onward.evidence.fidelity_statistics import (
    Estimate,
    agreement,
    bias,
    chi_squared,
    deviation,
    error,
    moments,
    student,
)
from onward.evidence.plots import to_svg
from onward.evidence.sweep import Axis, Measured, combinations, parse_axis, scaling, slope, sweep
from onward.passes.errors import DataError, ModeError, OptionError, UnknownNameError
from onward.runtime.program import Program

WIDER = 2.0


def check(found: Estimate, expected: float, *, power: float) -> None:
    """`found` agrees with `expected`, and would not have with one off by `power` times it (of 0: by `power`)."""
    assert found.low <= found.value <= found.high
    below, above = found.value - found.low, found.high - found.value
    assert found.value - WIDER * below <= expected <= found.value + WIDER * above, (found, expected)
    assert WIDER * (found.high - found.low) < power * (abs(expected) or 1.0), (found, expected)


def linear_data() -> tuple[Tensor, Tensor]:
    data = onward.models.load("linear")
    inputs, target = data.train.tensors
    return inputs[:32], target[:32]


def compiled(model: nn.Module, inputs: Any, estimator: LikelihoodRatio, loss: Any = F.cross_entropy) -> Program:
    return onward.compile(model, inputs, loss=loss, estimator=estimator, seed=1)


def small_mlp() -> nn.Module:
    torch.manual_seed(0)
    return onward.models.mlp(in_features=64, hidden=(12, 8))


# --- statistics -------------------------------------------------------------------------------------------------------


def test_moments_are_the_inner_products(monkeypatch):
    random = np.random.default_rng(0)
    rows, exact = random.standard_normal((9, 31)) + 0.5, random.standard_normal(31)
    monkeypatch.setattr(fidelity_statistics, "COLUMNS", 9 * 7)  # several parts
    of = moments(rows, exact)
    centred, off = rows - rows.mean(0), rows.mean(0) - exact
    for found, expected in (
        (of.spread, centred @ centred.T),
        (of.along_bias, centred @ off),
        (of.along_gradient, centred @ exact),
        (of.bias, off @ off),
        (of.bias_along_gradient, off @ exact),
        (of.gradient, exact @ exact),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-12)
    assert of.numbers == 31
    judged = agreement(of)
    cosines = rows @ exact / np.linalg.norm(rows, axis=1) / np.linalg.norm(exact)
    assert judged.cosine.value == pytest.approx(cosines.mean())
    norm = np.linalg.norm(exact)
    assert judged.error.value == pytest.approx(math.sqrt(((rows - exact) ** 2).sum(1).mean()) / norm)
    assert judged.deviation.value == pytest.approx(math.sqrt(rows.var(0, ddof=1).sum()) / norm)
    pairs = (rows - exact) @ (rows - exact).T
    assert judged.bias.value == pytest.approx(math.sqrt((pairs.sum() - np.trace(pairs)) / 72) / norm)


def test_equal_estimates_have_no_deviation_at_all():
    exact = np.full(5, 0.3, dtype=np.float32)
    rows = np.repeat(np.full((1, 5), 0.1, dtype=np.float32), 11, 0)
    judged = agreement(moments(rows, exact))
    assert judged.deviation == Estimate(0.0, 0.0, 0.0)
    assert judged.bias.low == pytest.approx(judged.bias.high)
    assert judged.bias.value == judged.error.value == pytest.approx(2 / 3, rel=1e-6)
    assert judged.cosine.value == pytest.approx(1)
    assert agreement(moments(rows, rows[0])).bias == Estimate(0.0, 0.0, 0.0)
    assert agreement(moments(0 * rows, exact)).cosine.value == 0


def test_a_gradient_of_zero_leaves_nothing_to_be_relative_to():
    judged = agreement(moments(np.ones((8, 3)), np.zeros(3)))
    assert all(math.isnan(read(judged).value) for _, read in fidelity_report.QUANTITIES.values())
    assert fidelity_report.cells(judged) == ["–"] * 4


def test_quantiles_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (7, 15, 63, 500):
        assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-3)
        for z in (-fidelity_statistics.Z, fidelity_statistics.Z):
            expected = stats.chi2.ppf(stats.norm.cdf(z), freedom)
            assert chi_squared(freedom, z) == pytest.approx(expected, rel=2e-2)


SPECTRA = {"one": [1.0], "steep": [4.0, 1.0, 0.1], "flat": [1.0] * 40}
"""Variances of the coordinates."""


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("size", [0.0, 1.0, 4.0])
def test_intervals_hold_the_truth(spectrum, size):
    """Coverage over `trials` samples of 64 Gaussian replicates, of bias² and deviation at a bias of `size` sampling
    errors of the mean: 95 % less 3.5 standard errors of a share of so many trials. And a large bias is found."""
    trials, replicates = 1500, 64
    variances = np.array(SPECTRA[spectrum])
    true_deviation = math.sqrt(variances.sum())
    true_bias = size * true_deviation / math.sqrt(replicates)
    shift = np.zeros(len(variances))
    shift[-1] = true_bias
    random = np.random.default_rng(3)
    held, found = {"bias": 0, "deviation": 0, "error": 0}, 0
    for _ in range(trials):
        rows = random.standard_normal((replicates, len(variances))) * np.sqrt(variances) + shift
        of = moments(rows, np.zeros(len(variances)))
        for name, estimate, truth in (
            ("bias", bias(of), true_bias),
            ("deviation", deviation(of), true_deviation),
            ("error", error(of), math.hypot(true_bias, true_deviation)),
        ):
            held[name] += estimate.low <= truth <= estimate.high
        found += bias(of).low > 0
    least = 0.95 - 3.5 * math.sqrt(0.95 * 0.05 / trials)
    assert all(count / trials > least for count in held.values()), held
    if size == 0:  # the truth is the interval's end, so that chance finds a bias in 2.5 % alone
        assert found / trials < 0.025 + 3.5 * math.sqrt(0.025 * 0.975 / trials) + 0.025
    if size == 4:
        assert found / trials > 0.95


# --- closed forms -----------------------------------------------------------------------------------------------------


def of_rows(loss: Callable[[Tensor, Any], Tensor], z: list[float], **settings: Any) -> Fidelity:
    index = torch.arange(400)
    program = compiled(Point(400, z), (index,), LikelihoodRatio(**settings), loss)
    return measure(program, index, index, replicates=32)


def test_cubic_has_the_bias_and_the_variance_of_its_moments():
    """ℓ = z³. A pair gives ``3 z² ε² + s² ε⁴``: for Gaussian noise the mean ``3 z² + 3 s²`` and the variance
    ``18 z⁴ + 72 z² s² + 96 s⁴`` (E ε⁸ = 105), for Rademacher noise ``3 z² + s²`` and none."""
    z, s, pairs = 0.7, 0.5, 4
    gaussian = of_rows(lambda out, _: out[:, 0] ** 3, [z], noise="gaussian", copies=2 * pairs, sigma=s).whole
    clean, variance = 3 * z * z, (18 * z**4 + 72 * z * z * s * s + 96 * s**4) / pairs
    check(gaussian.bias, 3 * s * s / clean, power=0.3)
    check(gaussian.deviation, math.sqrt(variance) / clean, power=0.2)
    check(gaussian.error, math.sqrt(variance + 9 * s**4) / clean, power=0.2)
    signs = of_rows(lambda out, _: out[:, 0] ** 3, [z], copies=2, sigma=s).whole
    assert signs.bias.value == signs.error.value == pytest.approx(s * s / clean)
    assert signs.deviation.value < 1e-9
    assert signs.cosine.value == pytest.approx(1)


def test_exact_likelihood_ratio_falls_with_slope_one_half():
    """ℓ = a·z in d coordinates, Rademacher noise: a pair gives ``ε (ε·a)``, unbiased, of variance ``(d - 1) |a|²``."""
    a = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5], dtype=torch.float64)
    found = []
    for copies in (2, 8, 32):
        of = of_rows(lambda out, _: out @ a, [0.0] * 5, copies=copies, sigma=0.1)
        check(of.whole.deviation, math.sqrt((len(a) - 1) / (copies / 2)), power=0.1)
        assert of.whole.bias.high < 0.15 * of.whole.deviation.value
        found.append(Measured({"copies": str(copies), "capture": "exact"}, of))
    (line,) = scaling(found)
    assert line.settings == {"capture": "exact"}
    for one in (line.deviation, line.error):
        check(one, -0.5, power=0.1)


class OfAnActivation(nn.Module):
    """``head(x)``, where x is no input of the model, which would be kept whole by a stochastic capture."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x * 1)


@pytest.fixture(scope="module")
def of_captures() -> dict[tuple[str, int], Fidelity]:
    """A linear model of an activation, one site, small σ: what is measured is the noise's and the capture's doing."""
    inputs, target = linear_data()
    model = OfAnActivation()
    found = {}
    for capture in ("exact", "sign", "stochastic"):
        for copies in (8, 64):
            program = compiled(model, inputs, LikelihoodRatio(copies=copies, sigma=0.01, capture=capture))
            found[capture, copies] = measure(program, inputs, target, replicates=32)
    return found


@pytest.mark.parametrize("copies", [8, 64])
@pytest.mark.parametrize("capture", ["exact", "sign", "stochastic"])
def test_captures_on_a_linear_model(of_captures, capture, copies):
    """The gradient is ``Σ_n w_n x̃_nᵀ``, of the weights; the layer's bias adds a column of ones to x̃.

    The weighted noise w has the mean ``δ = ∂ℓ/∂z`` and ``E|w|² = |δ|² (1 + (C - 1) / pairs)`` for C outputs. The
    capture x̃ is ``x``, ``sign(x)``, or ``m sign(x) Bernoulli(|x| / m)``, of the clean run and so one draw for all
    copies. The bias of sign is ``Σ δ (sign(x) - x)ᵀ``.
    """
    inputs, target = linear_data()
    head = OfAnActivation().head
    x = inputs.double()
    with torch.no_grad():
        logits = x @ head.weight.double().T + head.bias.double()
    delta = (logits.softmax(1) - F.one_hot(target, 10)) / len(x)
    largest = x.abs().amax(1)
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    mean = torch.cat([x.sign() if capture == "sign" else x, ones], 1)
    squares = {
        "exact": (x * x).sum(1),
        "sign": torch.full((len(x),), 64.0, dtype=torch.float64),
        "stochastic": largest * x.abs().sum(1),
    }[capture] + 1
    exact = delta.T @ torch.cat([x, ones], 1)
    lengths = (delta * delta).sum(1)
    variance = (lengths * ((1 + 9 / (copies / 2)) * squares - (mean * mean).sum(1))).sum()
    found = of_captures[capture, copies].whole
    norm = exact.norm()
    check(found.deviation, float(variance.sqrt() / norm), power=0.1)
    floor = float((delta.T @ mean - exact).norm() / norm)
    check(found.bias, floor, power=0.4)
    if capture == "sign":
        assert found.bias.low > 0.5
    else:
        assert found.bias.low == 0


def test_slopes_of_captures(of_captures):
    """Copies average their noise with slope -1/2; neither the floor of sign nor one stochastic capture for all."""
    found = [Measured({"copies": str(n), "capture": name}, of) for (name, n), of in of_captures.items()]
    lines = {line.settings["capture"]: line for line in scaling(found)}
    check(lines["exact"].error, -0.5, power=0.1)
    check(lines["sign"].deviation, -0.5, power=0.1)
    assert lines["sign"].error.low > -0.45
    assert lines["sign"].floor == of_captures["sign", 64].whole.bias
    assert lines["stochastic"].deviation.low > -0.45


def test_a_reach_beyond_the_last_site_is_the_exact_gradient():
    inputs, target = linear_data()
    of = measure(compiled(small_mlp(), inputs, LikelihoodRatio.feedback_learned(reach=9)), inputs, target, replicates=8)
    assert list(of.sites) == ["fc1", "fc2", "head"]
    for one in (of.whole, *of.sites.values()):
        assert one.error.value < 2e-6
        assert one.cosine.value == pytest.approx(1, abs=1e-6)
    assert (of.varies, of.learned, of.dtype, of.samples, of.replicates) == (False, 0, "float32", 32, 8)
    assert of.whole.numbers == sum(one.numbers for one in of.sites.values())


def test_feedback_is_biased_without_correction_and_unbiased_with_it():
    inputs, target = linear_data()
    batches = [(inputs, target)]
    found = {}
    for correction in ("none", "full"):
        estimator = LikelihoodRatio.feedback_learned(copies=8, sigma=0.01, correction=correction)
        program = compiled(small_mlp(), inputs, estimator)
        learn(program, batches, 30)
        found[correction] = measure(program, inputs, target, replicates=32)
        assert found[correction].learned == 30
    assert not found["none"].varies
    assert found["none"].whole.deviation == Estimate(0, 0, 0)
    assert found["none"].whole.bias.low > 0.1
    assert found["full"].varies
    assert found["full"].whole.deviation.low > 0.1
    assert found["full"].whole.bias.high < found["none"].whole.bias.low / 2


# --- what it leaves behind, and what it refuses -----------------------------------------------------------------------


class Normalised(nn.Module):
    """Batch statistics, which a step moves."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(self.norm(self.fc(x))))


def state(program: Program) -> list[Any]:
    model = program.model
    return [
        *(value.clone() for value in model.state_dict().values()),
        *(None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()),
        program.state_dict(),
        (program.next_calibration, program.next_probe),
    ]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("stopped", [False, True])
def test_program_and_model_are_as_before(stopped):
    inputs, target = linear_data()
    torch.manual_seed(0)
    program = compiled(Normalised(), inputs, LikelihoodRatio.auto(reach=0))
    learn(program, [(inputs, target)], 22)
    assert program.step_count == 22
    assert torch.equal(program.model.norm.running_mean, torch.zeros(8))
    assert all(parameter.grad is None for parameter in program.model.parameters())
    program.model.head.weight.grad = torch.ones_like(program.model.head.weight)
    before = state(program)

    def each() -> None:
        if stopped:
            raise KeyboardInterrupt

    if stopped:
        with pytest.raises(KeyboardInterrupt):
            measure(program, inputs, target, replicates=8, each=each)
    else:
        first, second = (measure(program, inputs, target, replicates=8, each=each) for _ in range(2))
        assert first == second
    assert same(state(program), before)


def test_sigma_is_measured_once(monkeypatch):
    inputs, target = linear_data()
    program = compiled(small_mlp(), inputs, LikelihoodRatio(copies=2, sigma="auto"))
    calls = []
    monkeypatch.setattr(Program, "_measure_sigmas", lambda self, given: (calls.append(1), (0.0, 500))[1])
    measure(program, inputs, target, replicates=8)
    assert len(calls) == 1
    assert program.next_calibration == program.step_count == 0


def test_a_dead_site_has_no_numbers():
    inputs, target = linear_data()
    model = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))
    nn.init.zeros_(model[2].weight)
    of = measure(compiled(model, inputs, LikelihoodRatio(copies=2)), inputs, target, replicates=8)
    assert math.isnan(of.sites["0"].error.value)
    assert of.sites["2"].cosine.value > 0
    assert of.whole.norm == pytest.approx(of.sites["2"].norm)


def test_sites_that_share_a_parameter_are_one():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Any:
            return self.head(torch.tanh(self.fc(torch.tanh(self.fc(x)))))

    inputs, target = linear_data()
    program = compiled(Shared(), inputs, LikelihoodRatio(copies=2))
    assert site_parameters(program.compiled) == {
        "fc + fc@2": ("fc.weight", "fc.bias"),
        "head": ("head.weight", "head.bias"),
    }
    exact = exact_gradient(program, inputs, target)
    F.cross_entropy(program.model(inputs), target).backward()
    for name, parameter in program.model.named_parameters():
        torch.testing.assert_close(exact[name], parameter.grad)


def test_what_cannot_be_measured_says_why():
    inputs, target = linear_data()
    plain = compiled(small_mlp(), inputs, LikelihoodRatio(copies=2))
    with pytest.raises(OptionError, match="replicates=7: an interval needs at least 8"):
        measure(plain, inputs, target, replicates=7)
    taught = compiled(small_mlp(), inputs, LikelihoodRatio.feedback_learned())
    with pytest.raises(OptionError, match=r"has had 0 of the 20 steps of its warm-up.*--learn"):
        measure(taught, inputs, target)
    with pytest.raises(OptionError, match="learn=19: learned feedback gives zero gradients for its first 20"):
        learn(taught, [(inputs, target)], 19)
    with pytest.raises(DataError, match="no batch in round 1"):
        learn(taught, [], 20)
    random = nn.Sequential(nn.Linear(64, 10), nn.Dropout(0.5))
    with pytest.raises(OptionError, match=r"draws random numbers.*model\.eval\(\)"):
        measure(compiled(random, inputs, LikelihoodRatio(copies=2)), inputs, target)
    black = compiled(small_mlp(), inputs, LikelihoodRatio(copies=2), lambda out, y: (out.argmax(1) != y).float())
    with pytest.raises(OptionError, match="cannot differentiate the loss <lambda>"):
        measure(black, inputs, target)
    plain.model.eval()
    with pytest.raises(ModeError):
        measure(plain, inputs, target)
    assert plain.step_count == 0


# --- sweeps -----------------------------------------------------------------------------------------------------------


def test_axes_are_read_and_multiplied():
    known = {"copies", "capture", "hidden"}
    copies = parse_axis("copies=4, 16", known)
    assert copies == Axis("copies", ("4", "16"))
    assert copies.numbers == (4.0, 16.0)
    assert parse_axis("hidden=(128,64),(64,)", known).values == ("(128,64)", "(64,)")
    assert parse_axis("noise-on=weight", {"noise_on"}) == Axis("noise_on", ("weight",))
    assert Axis("sigma", ("auto", "0.1")).numbers == ()
    product = combinations([copies, Axis("capture", ("exact", "sign"))])
    assert product[1] == {"copies": "4", "capture": "sign"}
    assert len(product) == 4
    assert combinations([]) == [{}]
    for wrong in ("copies", "=4", "copies=", "copies=4,,8", "copies=4,"):
        with pytest.raises(OptionError, match=r"expected NAME=VALUE,VALUE"):
            parse_axis(wrong, known)
    with pytest.raises(OptionError, match="a value is there twice"):
        parse_axis("copies=4,4", known)
    with pytest.raises(OptionError, match="a value is there twice"):
        parse_axis("copies=8,08", known)
    with pytest.raises(UnknownNameError, match=r"unknown setting to sweep 'copys'\. Did you mean 'copies'"):
        parse_axis("copys=4", known)
    with pytest.raises(OptionError, match="sweep copies: it is there twice"):
        combinations([copies, copies])


def test_a_refusal_does_not_end_a_sweep():
    def measured(settings):
        if settings["a"] == "1":
            raise OptionError("not with one")
        raise KeyError("a bug is no refusal")

    steps = sweep([{"a": "1"}, {"a": "2"}], measured)
    assert next(steps).refusal == "not with one"
    with pytest.raises(KeyError):
        next(steps)


def test_slope_and_its_interval():
    points = [(float(x), Estimate(3 * x**-0.5, 3 * x**-0.5 / 1.1, 3 * x**-0.5 * 1.1)) for x in (4, 16, 64)]
    found = slope(points)
    # Logarithms at -log 4, 0 and log 4 from their centre: weights -1/(2 log 4) and 1/(2 log 4).
    half = math.log(1.1) * math.sqrt(2) / (2 * math.log(4))
    assert found.value == pytest.approx(-0.5)
    assert (found.low, found.high) == pytest.approx((-0.5 - half, -0.5 + half))
    assert math.isnan(slope(points[:1]).value)
    assert math.isnan(slope([(4.0, Estimate(0.0, 0.0, 0.0)), points[0]]).value)


def test_zeros_have_no_logarithmic_axis():
    rows = np.ones((8, 3))
    of = agreement(moments(rows, rows[0]))
    exact = Fidelity(of, {"fc": of}, 8, 1, "float64", False, 0, 1.0)
    found = [Measured({"copies": copies}, exact) for copies in ("2", "4")]
    drawn = fidelity_report.panels(found, [Axis("copies", ("2", "4"))])
    assert not any(panel.log_y for panel in drawn)
    pytest.importorskip("matplotlib")
    assert ElementTree.fromstring(to_svg(drawn, "zeros")).tag.endswith("svg")


def test_cases_differ_in_what_is_swept_alone():
    axes = [Axis("capture", ("exact", "sign")), Axis("depth", ("1", "2"))]
    cases = make_cases(Common(model_option=["hidden=(8,)"]), axes)
    assert [case.common.model_option for case in cases[:2]] == [["hidden=(8,)", "depth=1"], ["hidden=(8,)", "depth=2"]]
    assert {case.estimator.feedback for case in cases} == {"none"}
    assert cases[0].estimator == LikelihoodRatio()
    assert make_cases(Common(), [Axis("copies", ("2", "4"))])[1].estimator == LikelihoodRatio.auto()
    both = make_cases(Common(), [Axis("feedback", ("none", "learned"))])
    assert [case.estimator.feedback for case in both] == ["none", "learned"]
    values = {"antithetic": "False", "probe": "0.5", "sigma": "auto", "reach": "1", "blocks": "2", "groups": "joint"}
    (one,) = make_cases(Common(), [Axis(name, (text,)) for name, text in values.items() if name != "antithetic"])
    assert one.estimator == LikelihoodRatio.auto(probe=0.5, reach=1, blocks=2)
    assert make_cases(Common(), [Axis("antithetic", ("false",))])[0].estimator.antithetic is False
    refused, fine = make_cases(Common(), [Axis("copies", ("3", "4"))])
    assert "copies=3 is odd" in refused.refusal
    assert fine.refusal == ""


# --- the data set -----------------------------------------------------------------------------------------------------


def test_linear_is_synthetic_repeatable_and_linear():
    data, again, other = (onward.models.load("linear", seed=seed) for seed in (0, 0, 1))
    inputs, targets = data.train.tensors
    assert data.input_shape == (64,)
    assert (len(data.train), len(data.test), data.num_classes) == (1600, 400, 10)
    assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert torch.equal(inputs, again.train.tensors[0])
    assert torch.equal(data.test.tensors[1], again.test.tensors[1])
    assert not torch.equal(inputs, other.train.tensors[0])
    everything = torch.cat([inputs, data.test.tensors[0]])
    assert len(everything.unique(dim=0)) == 2000
    assert torch.bincount(targets).min() > 50
    # A linear fit by least squares tells the classes apart, the noise in the labels not: chance is 0.1.
    fit = torch.linalg.lstsq(inputs, F.one_hot(targets, 10).float()).solution
    accuracy = ((data.test.tensors[0] @ fit).argmax(1) == data.test.tensors[1]).float().mean()
    assert 0.5 < accuracy < 0.95


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "dumb")


call = functools.partial(command_line.call, "fidelity")


TINY = ("mlp", "--model-option", "hidden=(8,)", "--batch-size", 16, "--replicates", 8)


def test_command_sweeps_and_writes(tmp_path: Path):
    pytest.importorskip("matplotlib")
    file, plot = tmp_path / "result.json", tmp_path / "result.svg"
    axes = ("--sweep", "copies=4,8", "--sweep", "placement=operation,alive")
    output = call(*TINY, *axes, "--capture", "sign", "--json", file, "--plot", plot).output
    for word in ("cosine", "deviation", "slope of error", "bias at the most copies", "exact captures of the clean run"):
        assert word in output
    result = json.loads(file.read_text())
    assert {"model", "data", "seed", "settings", "machine", "interrupted", "measured", "scaling"} == result.keys()
    assert result["settings"]["replicates"] == 8
    assert "torch" in result["machine"]["versions"]
    assert len(result["measured"]) == 4
    refused = [one for one in result["measured"] if "refusal" in one]
    assert [one["settings"]["copies"] for one in refused] == ["4", "8"]
    assert all(one["estimator"] is None for one in refused)
    first = result["measured"][0]
    assert first["settings"] == {"copies": "4", "placement": "operation"}
    assert first["estimator"]["copies"] == 4
    assert first["whole"]["cosine"].keys() == {"value", "low", "high"}
    assert first["sites"].keys() == {"fc1", "head"}
    assert len(result["scaling"]) == 1
    text = plot.read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert "placement=operation" in text
    assert "slope -1/2" in text


def test_command_trains_what_it_measures(tmp_path: Path):
    file = tmp_path / "result.json"
    arguments = ("--data", "linear", "--model-option", "depth=1", "--groups", "joint", "--placement", "operation")
    sweep_ = ("--sweep", "capture=exact,sign", "--copies", 8, "--train", 2, "--runs", 2, "--seed", 3, "--json", file)
    output = call("mlp", "--replicates", 8, "--batch-size", 16, *arguments, *sweep_).output
    assert "mean and standard deviation of the runs" in output
    exact, sign = (one["trained"] for one in json.loads(file.read_text())["measured"])
    assert [len(run) for run in exact["accuracies"]] == [2, 2]
    assert exact["accuracies"][0] != exact["accuracies"][1]
    assert exact["forwards"] == 2.0  # a copy behind the last layer has no FLOPs
    # The run of one seed is what `onward train` does with that seed.
    trained = tmp_path / "train.json"
    command = ["train", "--model", "mlp", *map(str, arguments), "--copies", "8", "--capture", "sign"]
    done = CliRunner().invoke(app, [*command, "--seed", "4", "--epochs", "2", "-q", "--json", str(trained)])
    assert done.exit_code == 0, done.output
    assert json.loads(trained.read_text())["test_accuracy"] == sign["accuracies"][1][-1]


def test_forwards_are_those_that_were_spent():
    """With ``sampling="error"`` a part of the batch, and one more clean forward of that part."""
    inputs, target = linear_data()
    model = small_mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), target).backward()
        optimizer.step()
    found = {}
    for sampling in ("all", "error"):
        settings = LikelihoodRatio(groups="joint", copies=16, sampling=sampling)
        program = compiled(model, inputs, settings)
        found[sampling] = measure(program, inputs, target, replicates=8).forwards
        assert found[sampling] <= program.compiled.forwards + 1
    assert found["all"] == pytest.approx(program.compiled.forwards)
    assert 0 < found["error"] < 0.8 * found["all"]
    probing = compiled(model, inputs, LikelihoodRatio.feedback_learned(probe=0.5, warmup=0))
    assert measure(probing, inputs, target, replicates=8).forwards == pytest.approx(probing.compiled.forwards / 2)


def test_an_interrupted_training_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    def diverges(*arguments: Any, **options: Any) -> None:
        raise OptionError("it diverged")

    file = tmp_path / "result.json"
    monkeypatch.setattr(sys.modules["onward.cli.fidelity"], "train_with", interrupted)
    call(*TINY, "--groups", "joint", "--copies", 4, "--train", 1, "--json", file, code=130)
    result = json.loads(file.read_text())
    assert result["interrupted"] is True
    assert "cosine" in result["measured"][0]["whole"]
    monkeypatch.setattr(sys.modules["onward.cli.fidelity"], "train_with", diverges)
    output = call(*TINY, "--groups", "joint", "--sweep", "copies=4,8", "--train", 1, "--json", file).output
    assert "copies=4: not trained. it diverged" in output
    assert [one["untrained"] for one in json.loads(file.read_text())["measured"]] == ["it diverged"] * 2


def test_a_model_that_does_not_fit_the_data_is_refused_and_the_others_go_on(tmp_path: Path):
    output = call(*TINY, "--groups", "joint", "--copies", 4, "--sweep", "num_classes=10,5").output
    assert "num_classes=5: not measured. Sequential returns (2, 5)" in output.replace("\n", " ")
    assert "'digits' has 10 classes" in output.replace("\n", " ")


def test_command_on_feedback_by_site(tmp_path: Path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "sites.svg"
    output = call(*TINY, "--reach", 0, "--learn", 25, "--after", 1, "--per-site", "--plot", plot).output
    for word in ("after 1 epochs of backpropagation", "fc1", "head", "Deviation 0"):
        assert word in output
    assert "site, in order of the forward" in plot.read_text()


def test_command_sweeps_the_model_and_stops_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "result.json"
    depth = ("--groups", "layerwise", "--copies", 4, "--sweep", "depth=0,1,2", "--json", file)
    output = call(*TINY, *depth).output
    assert "depth=0: not measured. depth=0 with hidden" in output
    sites = [list(one.get("sites", ())) for one in json.loads(file.read_text())["measured"]]
    assert sites == [[], ["head"], ["fc1", "head"]]

    calls = []

    def interrupted(*arguments: Any, **options: Any) -> Fidelity:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(sys.modules["onward.cli.fidelity"], "measure", interrupted)  # its command hides the module
    result = call(*TINY, "--data", "linear", "--sweep", "copies=2,4,8", "--reach", 9, "--json", file, code=130)
    assert "interrupted before all combinations" in result.stderr
    assert "copies" in result.stdout
    data = json.loads(file.read_text())
    assert data["interrupted"] is True
    assert len(data["measured"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mpl",), "unknown model 'mpl'. Did you mean 'mlp'?"),
        (("mlp", "--replicates", 4), "replicates=4"),
        (("mlp", "--learn", -1), "--learn -1"),
        (("mlp", "--learn", 3), "learn=3: learned feedback gives zero gradients"),
        (("mlp", "--after", -1), "--after -1"),
        (("mlp", "--train", -1), "--train -1"),
        (("mlp", "--batch-size", 0), "--batch-size 0"),
        (("mlp", "--sweep", "copies"), "expected NAME=VALUE"),
        (("mlp", "--sweep", "copys=4"), "Did you mean 'copies'?"),
        (("mlp", "--sweep", "copies=many"), "sweep copies=many: expected a whole number."),
        (("mlp", "--sweep", "antithetic=maybe"), "expected true or false"),
        (("mlp", "--sweep", "probe=x"), "expected a number"),
        (("mlp", "--sweep", "capture=exact,sing"), "unknown capture 'sing'. Did you mean 'sign'?"),
        (("mlp", "--sweep", "copies=3,5"), "copies=3 is odd"),
        (("mlp", "--sweep", "copies=4", "--sweep", "copies=8"), "copies: it is there twice"),
        (("mlp", "--sweep", "depth=0,-1"), "no combination could be measured. depth=0"),
        (("mlp", "--json", "/dev/null/result.json"), "cannot write /dev/null/result.json"),
        (("mlp", "--plot", "/dev/null/plot.svg"), "cannot write /dev/null/plot.svg"),
        (("mlp", "--plot", "a.png"), "--plot a.png: the plot is SVG; name it a.svg"),
    ],
)
def test_mistakes_are_one_clean_message(arguments, message):
    result = call(*arguments, "--quiet", code=2)
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""
