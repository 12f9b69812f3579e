"""Tiny programs, exported once a test session, and what trains them with torch beside it."""

from __future__ import annotations

import atexit
import copy
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward.models import build_for, load
from onward.runtime.export.save import export
from onward.runtime.onnx import Folder, Settings, Trainer, read_folder
from onward.runtime.onnx.data import Split
from onward.runtime.onnx.fused import StepInput, StepResult
from onward.runtime.onnx.session import Device

Ratio = onward.LikelihoodRatio
CPU = Device("cpu", "cpu")
BATCH = 16


SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)


@dataclass(frozen=True)
class Case:
    """A program: its model, estimator, and samples of which the first `BATCH` are the example."""

    model: Callable[[], nn.Module]
    estimator: Any
    samples: Callable[[], tuple[Any, Tensor]]
    optimizer: functools.partial[Any] = SGD
    unbatched: bool = False

    @property
    def lr(self) -> float:
        """Its learning rate."""
        return float(self.optimizer.keywords["lr"])

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        """A new optimizer over a model's trainable parameters."""
        made: torch.optim.Optimizer = self.optimizer([p for p in model.parameters() if p.requires_grad])
        return made


def _digits() -> tuple[Tensor, Tensor]:
    x, y = load("digits").train.tensors
    return x[:100], y[:100]


def _points() -> tuple[Tensor, Tensor]:
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def _graph() -> tuple[Any, Tensor]:
    return load("karate").batch(1)


def _mlp() -> nn.Module:
    return build_for("mlp", load("digits"), hidden=(16, 12))


def _layers() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def _normalised() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    )


CASES = {
    "auto": Case(_mlp, Ratio.auto(warmup=4), _digits, functools.partial(torch.optim.Adam, lr=3e-3)),
    "layerwise": Case(_layers, Ratio(groups="layerwise", copies=4, sigma=0.1), _points),
    "normalised": Case(_normalised, Ratio.auto(warmup=4), _points),
    "graph": Case(lambda: build_for("gcn", load("karate")), Ratio.auto(), _graph, unbatched=True),
}


@functools.cache
def _made(case: str) -> tuple[onward.Program, torch.optim.Optimizer, Path]:
    torch.manual_seed(0)
    made = CASES[case]
    model = made.model()
    (x, y) = made.samples()
    batch, target = (x, y) if made.unbatched else (x[:BATCH], y[:BATCH])
    program = onward.compile(
        model, batch, loss=F.cross_entropy, estimator=made.estimator, seed=3, unbatched=made.unbatched
    )
    optimizer = made.optimizer_of(model)
    path = Path(tempfile.mkdtemp(prefix="onward-onnx-")) / case
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    settings = {"training": {"epochs": 2, "batch_size": BATCH, "schedule": "constant"}}
    export(program, optimizer, batch, target, path, name=case, settings=settings)
    return program, optimizer, path


def program_of(case: str) -> tuple[onward.Program, torch.optim.Optimizer]:
    """A program and an optimizer of its own, as they were exported."""
    program, _, _ = _made(case)
    model = copy.deepcopy(program.model)
    return onward.Program(model, program.compiled, F.cross_entropy, 3), CASES[case].optimizer_of(model)


def exported(case: str) -> Folder:
    """A case's folder, written once."""
    return read_folder(_made(case)[2])


def split_of(case: str, count: int | None = None) -> Split:
    """Its samples, or the first so many."""
    x, y = CASES[case].samples()
    if CASES[case].unbatched:
        return Split({"input:0": x[0].numpy()[None], "target:0": y.numpy()}, True)
    return Split({"input:0": x[:count].numpy(), "target:0": y[:count].numpy()}, False)


def settings_of(case: str = "", **given: Any) -> Settings:
    """Settings of a test."""
    lr = CASES[case].lr if case else 3e-3
    return Settings(**{"epochs": 2, "batch_size": BATCH, "lr": lr, "threads": 1, **given})


def trainer_of(case: str, **given: Any) -> Trainer:
    """A trainer of a case."""
    return Trainer(exported(case), settings_of(case, **given), CPU)


def steps_of(case: str, count: int) -> list[StepInput]:
    """A case's first steps: batches of several sizes, learning rates that fall."""
    split, found = split_of(case), []
    for number in range(count):
        size = BATCH - number % 3
        rows = (np.arange(size) + 7 * number) % 100
        batch = split.arrays if split.whole else {key: array[rows] for key, array in split.arrays.items()}
        found.append(StepInput(batch, number, CASES[case].lr * (1 - number / 40)))
    return found


def arrays(state: dict[str, Any]) -> dict[str, np.ndarray]:
    """A state in memory of its own."""
    return {key: np.array(value.numpy()) for key, value in state.items()}


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """Whether two states have the same bits."""
    assert first.keys() == second.keys()
    return all(first[key].tobytes() == second[key].tobytes() for key in first)


def run(trainer: Trainer, case: str, count: int = 20) -> list[StepResult]:
    """Steps from the state that the trainer has."""
    found = list(trainer.steps.run(trainer.state, steps_of(case, count), trainer.folder.seed))
    assert len(found) == count
    return found


def copied(case: str, to: Path) -> Path:
    """A copy of a case's folder, to be damaged."""
    shutil.copytree(exported(case).path, to)
    return to


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit a folder's manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def data_file(case: str, path: Path, **changed: Any) -> Path:
    """A case's samples as a data file, with arrays replaced, or left out where they are None."""
    split = split_of(case)
    found = {"x": split.arrays["input:0"], "y": split.arrays["target:0"], **changed}
    np.savez(path, **{name: value for name, value in found.items() if value is not None})
    return path
