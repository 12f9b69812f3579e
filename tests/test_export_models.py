"""Models, losses and optimizers of kinds that an exported step could quietly get wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx_cases import CPU
from torch import Tensor, nn

import onward
from onward.passes.errors import (
    BatchError,
    CheckpointError,
    DataError,
    ExportError,
    FolderError,
    NonFiniteLossError,
    OptionError,
)
from onward.runtime.onnx import Settings, Trainer, read_folder
from onward.runtime.onnx.data import read_splits
from onward.runtime.onnx.fused import StepInput
from onward.runtime.training.update import update

PLAIN = onward.LikelihoodRatio(copies=4, sigma=0.1)


def export(
    model: nn.Module,
    x: Any,
    y: Any,
    folder: Path,
    *,
    loss: Any = F.cross_entropy,
    estimator: Any = PLAIN,
) -> tuple[onward.Program, torch.optim.Optimizer]:
    program = onward.compile(model, x, loss=loss, estimator=estimator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    onward.export(program, optimizer, x, y, str(folder))
    return program, optimizer


def fit(folder: Path, arrays: dict[str, Any], executor: str = "fused", batch_size: int = 8, **more: Any) -> Trainer:
    file = folder.parent / "data.npz"
    np.savez(file, **{name: value.numpy() for name, value in arrays.items()})
    read = read_folder(folder)
    settings = Settings(more.pop("epochs", 1), batch_size, more.pop("lr", 0.1), executor=executor, **more)
    trainer = Trainer(read, settings, CPU)
    trainer.fit(*read_splits(file, read))
    return trainer


class Tied(nn.Module):
    """A weight that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).relu())
        return out


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(x).mean(1))
        return out


def vectors(rows: int = 16, width: int = 4, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator), torch.randint(0, classes, (rows,), generator=generator)


def autoencoder(transposed: Callable[..., nn.Module], encoder: Callable[..., nn.Module], **options: Any) -> nn.Module:
    return nn.Sequential(encoder(2, 4, 3, stride=2, padding=1), nn.ReLU(), transposed(4, 2, 3, **options))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (autoencoder(nn.ConvTranspose2d, nn.Conv2d, stride=2, padding=1, output_padding=1), (2, 6, 6)),
        (autoencoder(nn.ConvTranspose2d, nn.Conv2d, stride=1, dilation=2, groups=2), (2, 6, 6)),
        (autoencoder(nn.ConvTranspose1d, nn.Conv1d, stride=3, bias=False), (2, 7)),
    ],
)
def test_transposed_convolutions(model: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = torch.zeros_like(model(x))
    program, optimizer = export(model, x, y, tmp_path / "step", loss=F.mse_loss)
    trainer = fit(tmp_path / "step", {"x": x, "y": y})
    order = np.random.Generator(np.random.Philox(key=np.array([0, 0], np.uint64))).permutation(8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    program.step(x[order], y[order])
    update(program, optimizer)
    for name, parameter in model.named_parameters():
        moved = (parameter - before[name]).abs().max()
        apart = np.abs(trainer.state[f"parameter:{name}"].numpy() - parameter.detach().numpy()).max()
        assert moved > 0
        assert apart <= 1e-4 * moved, name


def test_a_tied_weight_is_one_state(tmp_path: Path) -> None:
    x, y = vectors()
    export(Tied(), x, y, tmp_path / "step")
    keys = {form.key for form in read_folder(tmp_path / "step").state if form.key.startswith("parameter:")}
    assert keys == {"parameter:a.weight", "parameter:a.bias"}


def test_numbers_that_an_embedding_does_not_have(tmp_path: Path) -> None:
    _, y = vectors(classes=3)
    x = torch.randint(0, 5, (16, 6), generator=torch.Generator().manual_seed(0))
    export(Tokens(), x, y, tmp_path / "step")
    for wrong in (-1, 5):
        with pytest.raises(DataError, match=f"x holds number {wrong}, and numbers are 0 to 4"):
            fit(tmp_path / "step", {"x": torch.where(x == 3, wrong, x), "y": y})


@pytest.mark.parametrize("workers", [1, 3])
def test_a_step_that_fails_takes_none_before_it_along(workers: int, tmp_path: Path) -> None:
    """Though both are in progress at once."""
    x, y = torch.zeros(8, 6, dtype=torch.int64), vectors(8, classes=3)[1]
    export(Tokens(), x, y, tmp_path / "step")
    folder = read_folder(tmp_path / "step")
    trainer = Trainer(folder, Settings(1, 8, 0.1, executor="tasks", workers=workers), CPU)
    good, bad = ({"input:0": each.numpy(), "target:0": y.numpy()} for each in (x, x + 9))
    results = trainer.steps.run(trainer.state, [StepInput(good, 0, 0.1), StepInput(bad, 1, 0.1)], folder.seed)
    assert next(results).finite
    with pytest.raises(FolderError, match="failed"):
        next(results)


def test_classes_within_a_dictionary_and_ignored_ones(tmp_path: Path) -> None:
    x, y = vectors()
    y[3] = 255

    def loss(output: Tensor, target: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(output, target["kind"], ignore_index=255, reduction="none")

    export(nn.Linear(4, 4), x, {"kind": y}, tmp_path / "step", loss=loss)
    fit(tmp_path / "step", {"x": x, "y": y})
    with pytest.raises(DataError, match="y holds class -1, and classes are 0 to 3"):
        fit(tmp_path / "step", {"x": x, "y": torch.where(y == 2, -1, y)})


@pytest.mark.parametrize("executor", ["fused", "tasks"])
def test_batch_statistics_of_one_sample(executor: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
    x, y = vectors(17)
    export(model, x[:8], y[:8], tmp_path / "step", estimator=onward.LikelihoodRatio(copies=2, credit="batch"))
    with pytest.raises(BatchError, match="17 samples in batches of 8 leave a batch of 1"):
        fit(tmp_path / "step", {"x": x, "y": y}, executor)
    trainer = fit(tmp_path / "step", {"x": x[:16], "y": y[:16]}, executor)
    state = dict(trainer.state)
    assert np.isfinite(state["buffer:1.running_var"].numpy()).all()


@pytest.mark.parametrize("executor", ["fused", "tasks"])
def test_weights_that_become_infinite(executor: str, tmp_path: Path) -> None:
    x, y = vectors()
    export(nn.Linear(4, 4), x, y, tmp_path / "step")
    with pytest.raises(NonFiniteLossError, match="what comes of it is NaN or infinite"):
        fit(tmp_path / "step", {"x": 1e3 * x, "y": y}, executor, lr=3e38)


def test_the_optimizer_has_to_be_the_models(tmp_path: Path) -> None:
    x, y = vectors()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    program = onward.compile(model, x, loss=F.cross_entropy, estimator=PLAIN)
    for parameters, message in (
        (model[0].parameters(), "does not hold"),
        (nn.Linear(2, 2).parameters(), "does not hold"),
    ):
        with pytest.raises(OptionError, match=message):
            onward.export(program, torch.optim.SGD(parameters, lr=0.1), x, y, tmp_path / "step")
    optimizer = torch.optim.Adam(model.parameters())
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    with pytest.raises(ExportError, match="different numbers of steps"):
        onward.export(program, optimizer, x, y, tmp_path / "step")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_other_settings(tmp_path: Path) -> None:
    x, y = vectors()
    for name, copies in (("few", 4), ("many", 8)):
        export(nn.Linear(4, 4), x, y, tmp_path / name, estimator=onward.LikelihoodRatio(copies=copies))
    few = fit(tmp_path / "few", {"x": x, "y": y}, schedule="cosine")
    few.save(tmp_path / "run.npz")
    with pytest.raises(CheckpointError, match="compiled with other settings"):
        Trainer(read_folder(tmp_path / "many"), few.settings, CPU).load(tmp_path / "run.npz")
    longer = Settings(2, 8, 0.1, schedule="cosine")
    with pytest.raises(CheckpointError, match="epochs=1, now 2"):
        Trainer(read_folder(tmp_path / "few"), longer, CPU).load(tmp_path / "run.npz")
