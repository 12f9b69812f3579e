"""The evidence page: its claims are decided by numbers alone, its commands exist, and what is committed is of them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from onward.cli import app

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "evidence.md"


def load(name: str) -> ModuleType:
    folder = str(ROOT / "benchmarks" / "evidence")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


experiments, reading, judges, claims, page = (
    load(name) for name in ("experiments", "reading", "judges", "claims", "page")
)


# --- the tables -------------------------------------------------------------------------------------------------------


def test_claims_and_experiments_belong_together() -> None:
    keys = [one.key for one in experiments.EXPERIMENTS]
    assert len(set(keys)) == len(keys)
    used = {key for claim in claims.CLAIMS for key in claim.experiments}
    assert used == set(keys)
    texts = [claim.text for claim in claims.CLAIMS]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS, ids=lambda one: one.key)
def test_commands_exist(experiment: Any) -> None:
    program, *words = shlex.split(experiment.command)
    if program == "onward":
        known = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        assert all(word in known for word in words if word.startswith("--"))
    else:
        files = [word for word in words if word.endswith(".py")]
        assert files
        assert all((ROOT / file).is_file() for file in files)


def test_the_page_is_of_these_claims_and_commands() -> None:
    """A claim or a command that was changed since wants `make evidence`."""
    written = PAGE.read_text()
    for claim in claims.CLAIMS:
        assert f"| {claim.text} | {claim.source} | **" in written
    for experiment in experiments.EXPERIMENTS:
        assert f"\n    {experiment.command}\n" in written
        assert f'<a id="{experiment.key}"></a>' in written
    figures = re.findall(r"!\[.*?\]\((.*?)\)", written)
    assert len(figures) > 3
    assert all((PAGE.parent / figure).is_file() for figure in figures)


# --- running ----------------------------------------------------------------------------------------------------------

TINY = "onward fidelity mlp --model-option hidden=(8,) --alr --replicates 8 --batch-size 16"


def test_an_experiment_runs_and_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = f"{TINY} --sweep capture=exact,sign --sweep copies=4,8 --train 1 --runs 2"
    tiny = experiments.Experiment("tiny", "Tiny", "Almost nothing.", command, plots=True)
    result = experiments.run(tiny, tmp_path, tmp_path)
    assert (tmp_path / "tiny.svg").is_file()
    assert experiments.kept(tiny, tmp_path) == result
    other = experiments.Experiment("tiny", "Tiny", "Almost nothing.", TINY)
    assert experiments.kept(other, tmp_path) is None
    assert reading.whole(result, capture="sign", copies=8)["bias"].keys() == {"value", "low", "high"}
    written = page._section(tiny, result, tmp_path)
    for word in (
        "### Tiny",
        f"    {command}",
        "slope of deviation",
        "accuracy by copies",
        "![Tiny](evidence/tiny.svg)",
    ):
        assert word in written
    rows = [line for line in written.splitlines() if line.startswith("| ")]
    assert len(rows) == 4  # heading, line, exact, sign
    assert len({row.count("|") for row in rows}) == 1


def test_a_command_that_fails_says_so(tmp_path: Path) -> None:
    wrong = experiments.Experiment("wrong", "Wrong", "", "onward fidelity mpl")
    with pytest.raises(experiments.ExperimentError, match=r"ended with 2:\n.*Did you mean 'mlp'"):
        experiments.run(wrong, tmp_path, tmp_path)
    assert not (tmp_path / "wrong.json").exists()


# --- judges -----------------------------------------------------------------------------------------------------------


def estimate(value: float, half: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": max(0.0, value - half), "high": value + half}


def fidelity(bias: float = 0.0, deviation: float = 1.0, cosine: float = 0.5) -> dict[str, Any]:
    error = math.hypot(bias, deviation)
    numbers = {"bias": bias, "deviation": deviation, "cosine": cosine, "error": error}
    return {name: estimate(value) for name, value in numbers.items()}


def of_sweep(*cases: tuple[dict[str, Any], dict[str, Any]]) -> Any:
    found = [
        {"settings": {name: str(value) for name, value in settings.items()}, "whole": whole, "forwards": 1.0}
        for settings, whole in cases
    ]
    return experiments.Result("", "", 1.0, "", {"measured": found, "scaling": []})


def races(**accuracies: float) -> dict[str, Any]:
    methods = {key: {"mean": [{"accuracy": value}]} for key, value in accuracies.items()}
    result = experiments.Result("", "", 1.0, "", {"methods": methods})
    return {"digits": result, "mnist": result}


@pytest.mark.parametrize(("bias", "verdict"), [(0.5, "does not hold"), (0.015, "holds")])
def test_a_bias_is_one_beyond_that_of_exact_captures(bias: float, verdict: str) -> None:
    settings = {"score": "sign", "copies": 500}
    results = {
        "encoding": of_sweep(
            ({"capture": "sign", **settings}, fidelity(bias)),
            ({"capture": "exact", "score": "exact", "copies": 500}, fidelity(0.01)),
        ),
        "linear": of_sweep(
            ({"capture": "sign", "copies": 512}, fidelity(bias)), ({"capture": "exact", "copies": 512}, fidelity(0.01))
        ),
    }
    found = judges.sign_encoding_is_unbiased(results)
    assert found.verdict == verdict
    assert reading.show(estimate(bias)) in found.found


@pytest.mark.parametrize(("slope", "verdict"), [(-0.49, "holds"), (-0.2, "in part")])
def test_one_slope_that_is_off_is_named(slope: float, verdict: str) -> None:
    def of(value: float, **settings: str) -> Any:
        line = {"settings": settings, "deviation": estimate(value, 0.0)}
        return experiments.Result("", "", 1.0, "", {"measured": [], "scaling": [line]})

    results = dict.fromkeys(("noise", "places", "groups", "bits", "feedback"), of(-0.5, capture="stochastic"))
    found = judges.slopes_are_one_half(results | {"samples": of(slope, sampling="error")})
    assert found.verdict == verdict
    assert ("sampling error (-0.20)" in found.found) == (verdict == "in part")


@pytest.mark.parametrize(
    ("sign", "mnist", "verdict"), [(0.96, 0.96, "holds"), (0.9, 0.9, "does not hold"), (0.96, 0.9, "in part")]
)
def test_a_point_of_accuracy_decides(sign: float, mnist: float, verdict: str) -> None:
    results = races(exact=0.965, sign=sign) | {"mnist": races(exact=0.965, sign=mnist)["mnist"]}
    assert judges.one_bit_loses_nothing(results).verdict == verdict


@pytest.mark.parametrize(("times", "verdict"), [(12.0, "holds"), (9.0, "does not hold"), (None, "does not hold")])
def test_forwards_are_compared_where_both_get_there(times: float | None, verdict: str) -> None:
    subject = None if times is None else 100 / times
    ratios = [
        {"method": "sign", "subject": "auto", "goal": goal, "accuracy": 0.9, "forwards": 100.0,
         "subject_forwards": subject, "times": times, "rising": True}
        for goal in ("best", "near")
    ]  # fmt: skip
    result = experiments.Result("", "", 1.0, "", {"ratios": ratios})
    found = judges.forwards_to_sign({"digits": result, "mnist": result})
    assert found.verdict == verdict
    assert ("never" in found.found) == (times is None)
    assert "still rising when the budget ended" in found.found


def test_runs_are_averaged_by_case_and_row() -> None:
    means = {("mlp", "bp"): 0.95, ("mlp", "auto"): 0.946, ("vit", "bp"): 0.95, ("vit", "auto"): 0.9}
    runs = [
        {"case": case, "row": row, "seed": seed, "test_accuracy": accuracy + 0.01 * seed, "perturbed_forwards": 1.0,
         "seconds": 2.0 if row == "auto" else 1.0}
        for (case, row), accuracy in means.items()
        for seed in (0, 1)
    ]  # fmt: skip
    results = {"accuracy": experiments.Result("", "", 1.0, "", {"runs": runs})}
    assert judges.near_backpropagation(results).verdict == "in part"
    assert "`vit` 0.905 (-0.050)" in judges.near_backpropagation(results).found
    assert judges.few_forwards(results).verdict == "holds"
    assert "`mlp` 2.0" in judges.time_beside_backpropagation(results).found


def test_failed_tests_are_no_proof() -> None:
    for output, verdict in (("5 passed in 1s", "holds"), ("1 failed, 4 passed in 1s", "does not hold")):
        result = experiments.Result("", "", 1.0, output, None)
        assert judges.tests_pass({"tests": result}).verdict == verdict


def test_the_page_alone_needs_what_was_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    other = {"key": "digits", "command": "another", "seconds": 1.0, "output": "", "data": None}
    (tmp_path / "digits.json").write_text(json.dumps(other))
    spec = importlib.util.spec_from_file_location("evidence_main", ROOT / "benchmarks" / "evidence" / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit):
        module.main(["--only", "--keep", str(tmp_path), "--output", str(tmp_path / "docs")])
    assert f"--only leaves out digits, of which {tmp_path} has no result" in capsys.readouterr().err
    assert not (tmp_path / "docs" / "evidence.md").exists()
