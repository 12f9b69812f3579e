"""`Program.calibrate` and `onward.Calibration`: what is measured, how the budget is spent, and what a file may hold;
and the copies by site that they choose."""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from command_line import call
from hypothesis import strategies as st
from torch import Tensor, nn

import onward
from onward.passes.errors import CalibrationError, NonFiniteLossError, OnwardError, OptionError
from onward.runtime.calibration import allocation, with_feedback
from onward.runtime.calibration.plain import REPETITIONS
from onward.runtime.linearity import DRAWS, RELATIVE

DOUBLE = torch.float64
FEEDBACK: dict[str, Any] = {"feedback": "learned", "placement": "alive", "groups": "joint", "warmup": 2}
COPIES = ("sigma", "copies")
"""What is chosen where groups and noise are to stay."""


def data(samples: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 4, generator=generator, dtype=DOUBLE), torch.arange(samples) % 3


def mlp(*widths: int, drop: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    widths = widths or (4, 12, 5, 3)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh(), nn.BatchNorm1d(after), nn.Dropout(drop)]
    return nn.Sequential(*layers[:-3]).double()


def program_for(model: nn.Module | None = None, loss: Any = F.cross_entropy, **settings: Any) -> onward.Program:
    estimator = onward.LikelihoodRatio(**{"copies": 4, **settings})
    return onward.compile(model or mlp(), data()[0], loss=loss, estimator=estimator)


def gradients(program: onward.Program, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    program.step(x, y)
    return {name: p.grad for name, p in program.model.named_parameters() if p.grad is not None}


def spent(compiled: Any) -> float:
    """Perturbed forwards a sample and step."""
    return sum(run.copies * run.share for run in compiled.runs)


@functools.cache
def shared(kind: str) -> onward.Program:
    """A program that a test must not train: calibrating changes nothing."""
    settings: dict[str, Any] = {"layerwise": {}, "joint": {"groups": "joint"}, "feedback": {**FEEDBACK, "probe": 0.5}}
    return program_for(**settings[kind])


@pytest.fixture(scope="module")
def layerwise() -> onward.Calibration:
    return shared("layerwise").calibrate(*data(), budget=40.0, choose=COPIES)


# --- what is measured, and what it changes ----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"noise": "gaussian"}, {**FEEDBACK, "sigma": "auto"}])
def test_it_changes_nothing_and_repeats(settings: dict[str, Any]) -> None:
    x, y = data()
    one = program_for(mlp(drop=0.2), **settings)
    other = onward.Program(mlp(drop=0.2), one.compiled, F.cross_entropy, 0)
    for program in (one, other):
        program.step(x, y)
    first = one.calibrate(x, y, budget=40.0)
    assert first == one.calibrate(x, y, budget=40.0)
    assert first.to_json() == other.calibrate(x, y, budget=40.0).to_json()
    before, generator = one.feedback, torch.get_rng_state()
    one.calibrate(x[:7], y[:7], budget=30.0)
    assert one.feedback is before
    assert torch.equal(generator, torch.get_rng_state())
    for _ in range(2):
        assert torch.equal(one.step(x, y), other.step(x, y))
    mine, theirs = ({**p.state_dict(), **p.model.state_dict()} for p in (one, other))
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(theirs[k])) for k, v in mine.items() if k != "estimator")
    gradients = zip(one.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(p.grad, q.grad) for p, q in gradients)  # type: ignore[arg-type]


def candidates(sigma: float, scale: float) -> int:
    """How many σ are tried until this one, the largest that is linear, and its half."""
    return len(RELATIVE) - RELATIVE.index(pytest.approx(sigma / scale)) + 1


def test_what_was_measured(layerwise: onward.Calibration) -> None:
    program = shared("layerwise")
    assert [site.site for site in layerwise.sites] == [site.name for site in program.compiled.sites]
    assert [site.elements for site in layerwise.sites] == [site.layout.elements for site in program.compiled.sites]
    automatic = program_for(sigma="auto")
    automatic.step(*data())
    assert [site.sigma for site in layerwise.sites] == automatic.sigmas
    assert layerwise.estimator.sigma == {site.site: site.sigma for site in layerwise.sites}
    assert layerwise.explained is None
    assert {site.trust for site in layerwise.sites} == {None}
    tried = [DRAWS * candidates(site.sigma, site.scale) + REPETITIONS for site in layerwise.sites]
    shares = [run.share for run in program.compiled.runs]
    measured = 2 * sum(number * share for number, share in zip(tried, shares, strict=True))
    assert layerwise.forwards == pytest.approx(measured)
    for site in layerwise.sites:
        assert site.variance is not None
        assert site.variance > 0
        assert site.response is not None
        assert site.response > 0
        assert site.nonlinearity is not None
        assert 0 <= site.nonlinearity < 0.15
    assert [site.group for site in layerwise.sites] == list(range(5))
    shown = str(layerwise)
    for word in ("noise point", "sigma", "trust", *(site.site for site in layerwise.sites)):
        assert word in shown


def test_with_feedback_what_it_explains_is_measured_too() -> None:
    x, y = data()
    program = shared("feedback")
    found = program.calibrate(x, y, budget=9.0)
    (run,) = program.compiled.runs
    assert [site.site for site in found.sites] == [program.compiled.sites[index].name for index in run.sites]
    assert found.explained is not None
    assert 0.1 < found.explained <= 1
    assert all(site.trust is not None and 0 <= site.trust <= 1 for site in found.sites)
    assert found.estimator.copies == 2 * int(9.0 / run.share / 2)
    named = {site.site: site.sigma for site in found.sites}
    assert found.estimator.sigma == named | {"*": 0.1}  # the last layer receives no noise
    tried = sum(candidates(site.sigma * len(run.sites) ** 0.5, site.scale) for site in found.sites)
    measured = tried * 2 * DRAWS * run.share
    learning = with_feedback.LEARNING_STEPS * 0.5 * 4 * run.share
    assert found.forwards == pytest.approx(measured + learning)  # half of the batch is probed: no correction is weighed
    compiled = onward.compile(mlp(), x, loss=F.cross_entropy, estimator=found).compiled
    assert compiled.estimator == found.estimator
    assert spent(compiled) <= 9.0
    assert found != shared("feedback").calibrate(x[:12], y[:12], budget=9.0)


def test_without_noise_points_there_is_nothing_to_choose() -> None:
    program = program_for(reach=9, **FEEDBACK)
    found = program.calibrate(*data(), budget=1.0)
    assert found.sites == ()
    assert found.estimator == program.compiled.estimator
    assert onward.compile(mlp(), data()[0], loss=F.cross_entropy, estimator=found).compiled.runs == ()


@pytest.mark.parametrize("kind", ["layerwise", "feedback"])
def test_a_loss_that_is_not_finite(kind: str) -> None:
    x, y = data()
    program = shared(kind)
    sigmas = list(program.sigmas)
    with pytest.raises(NonFiniteLossError, match="before any noise was added"):
        program.calibrate(x * math.nan, y, budget=40.0)
    assert program.sigmas == sigmas
    broken = onward.Program(program.model, program.compiled, lambda output, _: output.sum(1) * math.nan, 0)
    with pytest.raises(NonFiniteLossError):
        broken.calibrate(x, y, budget=40.0)


# --- copies by site ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk", "placement"), [(None, "operation"), (2, "operation"), (2, "alive")])
def test_each_site_has_its_own_copies(chunk: int | None, placement: str) -> None:
    x, y = data()
    settings: dict[str, Any] = {"sigma": 0.1, "chunk": chunk, "placement": placement}
    mixed = program_for(copies={"4": 4, "*": 2}, **settings)
    assert [run.copies for run in mixed.compiled.runs] == [2, 2, 4, 2, 2]
    found = gradients(mixed, x, y)
    two, four = (gradients(program_for(copies=count, **settings), x, y) for count in (2, 4))
    for name, gradient in found.items():
        assert torch.equal(gradient, (four if name.startswith("4") else two)[name]), name
    assert not torch.equal(two["4.weight"], four["4.weight"])
    assert mixed.forwards == pytest.approx(len(x) * spent(mixed.compiled))


def test_copies_of_groups() -> None:
    program = program_for(copies={"[02]": 6, "*": 3}, antithetic=False, groups=[["0", "2"], ["[468]"]])
    assert [run.copies for run in program.compiled.runs] == [6, 3]
    program.step(*data())
    assert program_for(copies={"*": 4}, **FEEDBACK).compiled.runs[0].copies == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"copies": {"0": 2, "*": 4}, "groups": "joint"}, "copies: '0' has 2 and '8' 4, but they are perturbed in one"),
        ({"copies": {"0": 2}}, r"copies: no pattern covers the site\(s\) 2, 4, 6, 8. Add '\*' as the last pattern"),
        ({"copies": {"0": 2, "fc": 2, "*": 4}}, "unknown site 'fc'"),
        ({"copies": {"0": 3, "*": 4}}, "copies=3 is odd"),
        ({"copies": {"0": 0, "*": 4}}, "copies=0: at least one"),
        ({"copies": {"0": 2.0, "*": 4}}, "copies=2.0: it has to be an integer"),
        ({"copies": {}}, "copies: no pattern covers"),
    ],
)
def test_copies_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OnwardError, match=message):
        program_for(**settings)


# --- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [6.5, 11.0, 40.0, 300.0])
def test_the_budget_is_kept_and_well_spent(budget: float) -> None:
    found = shared("layerwise").calibrate(*data(), budget=budget, choose=COPIES)
    copies = found.estimator.copies
    assert isinstance(copies, dict)
    # a head has no FLOPs behind it
    costs = {site.site: max(site.share or 0, allocation.LEAST_COST) for site in found.sites}
    charged = sum(copies[name] * cost for name, cost in costs.items())
    assert budget - 2 * max(costs.values()) < charged <= budget
    assert sum(copies[site.site] * (site.share or 0) for site in found.sites) <= charged
    assert min(copies.values()) >= 2
    wanted = {site.site: math.sqrt((site.variance or 0) / costs[site.site]) for site in found.sites}
    free = [name for name, count in copies.items() if count > 2]
    assert budget < 10 or copies["8"] > 2
    for one in free:
        for other in copies:  # in proportion, to a pair; who has one pair only would have had less
            assert copies[other] <= 2 or copies[other] - 2 < wanted[other] / wanted[one] * (copies[one] + 2)


@hypothesis.settings(max_examples=100)
@hypothesis.given(
    groups=st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 1)), min_size=2, max_size=6),
    more=st.floats(0, 100),
    step=st.sampled_from([1, 2]),
)
def test_no_exchange_of_copies_would_leave_less_variance(
    groups: list[tuple[float, float]], more: float, step: int
) -> None:
    """Variance V / n at a cost of c n: before rounding, V / c n² is the same in all groups with more than the least."""
    weights, costs = [weight for weight, _ in groups], [cost for _, cost in groups]
    budget = step * sum(costs) + more
    counts = allocation.in_proportion(weights, costs, budget, step)
    assert all(count >= step and count % step == 0 for count in counts)
    assert sum(count * cost for count, cost in zip(counts, costs, strict=True)) <= budget * (1 + 1e-9)
    free = [number for number, count in enumerate(counts) if count > step]
    for one in free:
        for other, weight in enumerate(weights):
            # a count is less than a step from its share, above or below
            assert weight * (counts[one] - step) < weights[one] * (counts[other] + step) * (1 + 1e-6)
            assert weights[one] * (counts[other] - step) <= weight * (counts[one] + step) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("kind", "budget"),
    [("layerwise", 1.0), ("joint", 1.1), ("feedback", 0.5), ("layerwise", 0.0), ("layerwise", -4.0),
     ("layerwise", math.nan), ("layerwise", math.inf)],
)  # fmt: skip
def test_a_budget_that_buys_no_pair_everywhere(kind: str, budget: float) -> None:
    with pytest.raises(CalibrationError, match=r"a budget of .* perturbed forwards .* too small: one pair"):
        shared(kind).calibrate(*data(), budget=budget)


def test_a_copy_without_flops_is_not_free() -> None:
    """Behind a model's only layer there is nothing to compute but the loss."""
    model = nn.Sequential(nn.Linear(4, 3)).double()
    for groups in ("layerwise", "joint"):
        program = program_for(model, groups=groups)
        assert program.compiled.runs[0].share == 0
        assert program.calibrate(*data(), budget=4.0, choose=COPIES).estimator.copies == 4.0 / allocation.LEAST_COST


def test_the_least_budget() -> None:
    program = shared("layerwise")
    least = 2 * sum(run.share for run in program.compiled.runs)
    found = program.calibrate(*data(), budget=least, choose=COPIES)
    assert set(found.estimator.copies.values()) == {2}  # type: ignore[union-attr]
    single = program_for(antithetic=False).calibrate(*data(), budget=least / 2, choose=COPIES)
    assert set(single.estimator.copies.values()) == {1}  # type: ignore[union-attr]


# --- files ------------------------------------------------------------------------------------------------------------


def test_saved_loaded_and_edited(layerwise: onward.Calibration, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "mlp.json"
    layerwise.save(path)
    assert onward.Calibration.load(path) == layerwise
    learned = program_for(segments=["0"], blocks={"0": 1}, rank=2, **FEEDBACK).calibrate(*data(), budget=5.0)
    learned.save(path)
    assert onward.Calibration.load(path) == learned

    x, _ = data()
    content = json.loads(json.dumps(layerwise.to_json()))
    content["estimator"]["copies"] = {"0": 12, "*": 2}
    content["estimator"]["sigma"]["0"] = 0.25
    path.write_text(json.dumps(content))
    program = onward.compile(mlp(), x, loss=F.cross_entropy, estimator=onward.Calibration.load(path))
    assert program.compiled.runs[0].copies == 12
    assert {run.copies for run in program.compiled.runs[1:]} == {2}
    assert program.sigmas[0] == 0.25
    content["estimator"]["copies"] = 7
    path.write_text(json.dumps(content))
    with pytest.raises(OptionError, match="copies=7 is odd"):
        onward.Calibration.load(path)


BROKEN: dict[str, Any] = {
    "no JSON": ("{", "cannot read the calibration"),
    "a list": ([], "not a calibration"),
    "a number": (3, "not a calibration"),
    "null": (None, "not a calibration"),
    "foreign": ({"model": "mlp"}, "not a calibration .*'version'"),
    "older": ({"version": 1}, "has version 1; this Onward reads version 2. Calibrate again"),
    "newer": ({"version": 3, "estimator": {}}, "has version 3"),
    "nothing in it": ({"version": 2}, "not a calibration .*'sites'"),
    "unknown setting": ({"version": 2, "sites": [], "explained": None, "forwards": 0, "estimator": {"temperature": 1}},
                        "not a calibration .*temperature"),
    "unknown measure": ({"version": 2, "sites": [{"name": "0"}], "explained": None, "forwards": 0, "estimator": {}},
                        "not a calibration"),
    "sites are no list": ({"version": 2, "sites": 3, "explained": None, "forwards": 0, "estimator": {}},
                          "not a calibration"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_no_calibration(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    path = tmp_path / "file.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CalibrationError, match=message):
        onward.Calibration.load(path)
    with pytest.raises(CalibrationError, match="cannot read the calibration"):
        onward.Calibration.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((4, 13, 5, 3), r"'0' has 13 elements a sample, not 12"),
        ((4, 12, 5, 5, 3), r"no pattern covers the site\(s\) .*12"),
        ((4, 12, 3), r"unknown site '6'"),
    ],
)
def test_another_model_is_refused_by_name(layerwise: onward.Calibration, widths: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=f"{message}.* Calibrate again"):
        onward.compile(mlp(*widths), data()[0], loss=F.cross_entropy, estimator=layerwise)


def test_another_placement_of_the_noise_is_refused() -> None:
    """Where sigma covers everything the noise points tell."""
    found = program_for(**FEEDBACK).calibrate(*data(), budget=5.0)
    moved = replace(found, estimator=replace(found.estimator, sigma=0.1, reach=1))
    with pytest.raises(CalibrationError, match="'0' is gone"):
        onward.compile(mlp(), data()[0], loss=F.cross_entropy, estimator=moved)


# --- on the command line ----------------------------------------------------------------------------------------------


SMALL = ("--model-option", "hidden=(16, 8)")


def test_from_inspect_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    file, result = tmp_path / "mlp.json", tmp_path / "result.json"
    shown = call(
        "inspect",
        "mlp",
        *SMALL,
        "--groups",
        "layerwise",
        "--calibrate",
        "--choose",
        "sigma, copies",
        "--budget",
        20,
        "-o",
        file,
    ).output
    assert "noise point" in shown
    assert "fc1" in shown
    found = onward.Calibration.load(file)
    assert found.estimator.groups == "layerwise"
    assert sum(found.estimator.copies[site.site] * site.share for site in found.sites) <= 20  # type: ignore[index]
    options = ("--epochs", 1, "--batch-size", 256, "-q", "--json", result)
    call("train", "--model", "mlp", *SMALL, "--calibration", file, *options)
    trained = json.loads(result.read_text())
    assert trained["settings"]["estimator"] == json.loads(file.read_text())["estimator"]
    assert trained["forwards_per_sample_and_step"] < 21
    assert "fc1=" in call("inspect", "mlp", *SMALL, "--calibration", file).output
    call("compile", "mlp", *SMALL, "--calibration", file, "-o", tmp_path / "program")
    refused = call("train", "--model", "mlp", *SMALL, "--calibration", file, "--copies", 4, "--alr", code=2).stderr
    assert "--calibration holds the estimator's settings; edit the file in place of --alr, --copies" in refused
    other = call("train", "--model", "mlp", "--model-option", "hidden=(16, 9)", "--calibration", file, code=2).stderr
    assert "'fc2' has 9 elements a sample, not 8" in other
    missing = call("train", "--model", "mlp", "--calibration", tmp_path / "none.json", code=2).stderr
    assert "cannot read the calibration" in missing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--calibrate", "--budget", "0.1"), "a budget of 0.1 perturbed forwards"),
        (("--budget", "8"), "--budget 8 is what --calibrate may spend"),
        (("--choose", "sigma"), "--choose sigma is what --calibrate may choose"),
        (
            ("--calibrate", "--choose", "sigma,sopies"),
            "unknown choice of a calibration 'sopies'. Did you mean 'copies'?",
        ),
        (("--calibrate", "--format", "svg"), "--pass and --format are of inspect alone"),
        (("--calibrate", "--pass", "capture"), "--pass and --format are of inspect alone"),
        (("--calibrate", "-o", "/dev/null/x"), "cannot write /dev/null/x"),
    ],
)
def test_mistakes_on_the_command_line(arguments: tuple[str, ...], message: str) -> None:
    result = call("inspect", "mlp", *SMALL, "--reach", 0, *arguments, code=2)
    assert message in result.stderr
    assert result.stdout == ""
