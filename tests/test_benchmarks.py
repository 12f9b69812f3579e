"""The benchmarks run end to end, and the naive implementation that Onward is compared with computes the same thing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import onward
from onward.passes import ops

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def naive_module() -> Any:
    spec = importlib.util.spec_from_file_location("naive", BENCHMARKS / "naive.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["mlp", "resnet5"])
@pytest.mark.parametrize(
    ("estimator", "encode"),
    [
        (onward.LikelihoodRatio(groups="joint", copies=6), "none"),
        (onward.LikelihoodRatio(groups="joint", copies=6, noise="gaussian", chunk=2), "none"),
        (onward.LikelihoodRatio.alr(copies=6), "sign"),
    ],
    ids=["exact", "gaussian in chunks", "alr"],
)
def test_naive_gradients_equal_onwards(name: str, estimator: onward.LikelihoodRatio, encode: str) -> None:
    torch.manual_seed(0)
    model = onward.models.mlp() if name == "mlp" else onward.models.resnet5(num_classes=10, in_channels=1, width=4)
    model.double()
    x, y = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 5, 2])
    program = onward.compile(model, (x,), loss=F.cross_entropy, estimator=estimator, seed=7)
    loss = program.step(x, y)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in ours.values())
    model.zero_grad()

    sites = {site.name: site for site in program.compiled.sites}

    def noise(site_name: str, draws: int, shape: torch.Size) -> torch.Tensor:
        site = sites[site_name]
        where = (list(site.layout.sizes), site.layout.dim, site.layout.outer, False)
        zeros, ones = torch.zeros(shape, dtype=torch.float64), torch.ones(len(sites), dtype=torch.float64)
        made: torch.Tensor = ops.perturb(
            zeros, torch.arange(draws), torch.tensor([7, 0]), ones, site.index, estimator.noise, *where
        )
        return made.reshape(draws, *shape)

    def losses(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target, reduction="none")

    naive = naive_module().NaiveLikelihoodRatio(model, losses, copies=6, encode=encode, noise=noise)
    torch.testing.assert_close(naive.step(x, y), loss)
    assert not naive.captures
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, ours[parameter_name], rtol=1e-9, atol=1e-12)


def test_naive_draws_its_own_noise() -> None:
    torch.manual_seed(0)
    model = onward.models.mlp()
    x, y = torch.randn(16, 64), torch.randint(0, 10, (16,))
    F.cross_entropy(model(x), y).backward()
    true = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    naive = naive_module().NaiveLikelihoodRatio(
        model, lambda output, target: F.cross_entropy(output, target, reduction="none"), copies=1024
    )
    naive.step(x, y)
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert torch.cosine_similarity(found, true, dim=0) > 0.7


@pytest.mark.parametrize(("option", "value"), [("copies", 3), ("encode", "bits")])
def test_naive_refuses_what_it_cannot(option: str, value: object) -> None:
    settings = {"copies": 2, "encode": "none", option: value}
    with pytest.raises(ValueError, match=option):
        naive_module().NaiveLikelihoodRatio(onward.models.mlp(), F.cross_entropy, **settings)


@pytest.mark.slow
def test_step_runs(tmp_path: Path) -> None:
    written = tmp_path / "step.json"
    printed = run(
        "step.py", "--models", "mlp", "--copies", "2", "--batch", "4", "--repeats", "2", "--threads", "1", "--profile",
        "--settings", "joint alr", "learned", "--json", str(written),
    )  # fmt: skip
    assert "÷ limit" in printed
    assert "noise" in printed
    result = json.loads(written.read_text())
    assert [row["setting"] for row in result["rows"]] == ["joint alr", "learned"]
    for row in result["rows"]:
        assert row["step_over_limit"]["low"] > 0
        assert row["peak_mib"] >= 0
    for profiled in result["profiles"]:
        assert profiled["ms"]["noise"] > 0
        assert profiled["ms"]["forward graphs"] > 0
        assert profiled["ms"]["loss"] > 0


@pytest.mark.slow
def test_accuracy_runs(tmp_path: Path) -> None:
    written = tmp_path / "accuracy.json"
    printed = run(
        "accuracy.py", "--cases", "mlp", "--rows", "bp", "auto", "--seeds", "0", "1", "--epochs", "1",
        "--threads", "1", "--json", str(written),
    )  # fmt: skip
    assert "a backward" in printed
    assert len(json.loads(written.read_text())["runs"]) == 4


@pytest.mark.slow
def test_variance_runs(tmp_path: Path) -> None:
    written = tmp_path / "variance.json"
    printed = run(
        "variance.py", "--epochs", "0", "--copies", "8", "--repeats", "3", "--sigmas", "0.1", "--sigma-epochs", "1",
        "--seeds", "0", "1", "--threads", "1", "--json", str(written),
    )  # fmt: skip
    result = json.loads(written.read_text())
    errors = result["errors"]["0 epochs, 8 copies"]
    assert {len(values) for values in errors.values()} == {3}
    assert all(value > 0 for values in errors.values() for value in values)
    assert [one["learned"] for one in result["sigmas"]] == [False, True]
    for word in ("one-sided, clean loss", "antithetic, Sobol", "learned"):
        assert word in printed


def test_time_to_accuracy_runs(tmp_path: Path) -> None:
    written = tmp_path / "time.json"
    printed = run(
        "time_to_accuracy.py", "--cases", "mlp", "--seeds", "0", "--epochs", "2", "--points", "20",
        "--threads", "1", "--json", str(written),
    )  # fmt: skip
    assert "1 of 1 runs reach the goal" in printed
    found = json.loads(written.read_text())
    (pair,) = found["runs"]
    for curve in (pair["bp"], pair["auto"]):
        assert 0 < curve["seconds"][0] < curve["seconds"][1]
        assert all(0 <= reached <= 1 for reached in curve["accuracy"])
    parts = found["milliseconds a step"]["mlp"]
    for label, names in {
        "bp": {"clean forward", "loss and backward", "optimizer and checks"},
        "auto": {"gradient subgraphs", "perturbed forwards", "learning feedback", "measuring sigma"},
    }.items():
        assert names <= parts[label].keys()
        assert all(milliseconds >= 0 for milliseconds in parts[label].values())


@pytest.mark.slow
def test_cuda_graphs_runs(tmp_path: Path) -> None:
    written = tmp_path / "graphs.json"
    printed = run(
        "cuda_graphs.py", "--models", "mlp", "--batch", "4", "--rounds", "1", "--device", "cpu", "--threads", "1",
        "--json", str(written),
    )  # fmt: skip
    assert "issued ÷ backpropagation" in printed
    rows = json.loads(written.read_text())["rows"]
    assert [row["step"] for row in rows] == ["clean", "perturbed", "copies"]
    for row in rows:
        assert row["ms"].keys() == {"issued", "backpropagation"}
        assert row["issued_over"]["backpropagation"]["median"] > 0
        assert row["compiled_graphs"] == 0


@pytest.mark.slow
def test_packed_gradients_runs(tmp_path: Path) -> None:
    written = tmp_path / "packed.json"
    run(
        "packed_gradients.py", "--width", "4", "--copies", "2", "--batch", "2", "--rounds", "1", "--device", "cpu",
        "--json", str(written),
    )  # fmt: skip
    rows = json.loads(written.read_text())["rows"]
    assert {row["model"] for row in rows} == {"mlp", "resnet9", "vgg8"}
    assert all(row["composition_over_kernel"]["median"] > 0 for row in rows)


@pytest.mark.slow
def test_streams_runs(tmp_path: Path) -> None:
    written = tmp_path / "streams.json"
    printed = run(
        "streams.py", "--models", "vgg8", "--copies", "4", "--chunk", "2", "--streams", "2", "--batch", "2",
        "--rounds", "1", "--device", "cpu", "--plan", "--json", str(written),
    )  # fmt: skip
    assert "P0.1<E!" in printed
    rows = json.loads(written.read_text())["rows"]
    assert [(row["setting"], row["streams"]) for row in rows] == [
        (setting, streams) for setting in ("auto", "joint 4") for streams in (1, 2)
    ]
    for row in rows:
        assert 1 < row["forwards"] <= 5
        assert (row["step_over_naive"] is None) == (row["setting"] == "auto")
        for ratio in ("one_over_step", "step_over_limit", "step_over_backpropagation"):
            assert row[ratio]["median"] > 0
