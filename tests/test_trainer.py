"""The training loop: history, evaluation, metrics, signals, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from training_run import StandIn, digest, make_loader, make_model, make_program, make_trainer, make_validation, timeless

from onward.passes.errors import (
    BatchError,
    CheckpointError,
    DataError,
    NonFiniteGradientError,
    OptionError,
    UnknownNameError,
)
from onward.runtime.training import checkpoint as checkpoints
from onward.runtime.training.evaluation import accuracy
from onward.runtime.training.history import History
from onward.runtime.training.metrics import JsonLines, ProgressBar, TensorBoard
from onward.runtime.training.random_state import capture_rng, restore_rng
from onward.runtime.training.trainer import Trainer


def test_fit_equals_a_loop_by_hand() -> None:
    trainer = make_trainer(None)
    batches = [make_validation() for _ in range(3)]
    history = trainer.fit(batches, 2)

    program = make_program()
    optimizer = torch.optim.Adam(program.model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    means = []
    for _ in range(2):
        losses = []
        for inputs, target in batches:
            losses.append(float(program.step(inputs, target)))
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
        means.append(sum(losses) / 3)
    assert digest(trainer) == digest(Trainer(program, optimizer, scheduler=scheduler))
    assert [record.train_loss for record in history] == pytest.approx(means, rel=1e-12)


def test_it_learns_and_says_so(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, checkpoint_every=None)
    before = trainer.evaluate([make_validation()])
    history = trainer.fit(make_loader(augment=False), 30, validation=[make_validation()])
    assert [record.epoch for record in history] == list(range(1, 31))
    assert [record.step for record in history] == list(range(6, 181, 6))
    last = history[-1]
    assert last.validation["accuracy"] > 0.8
    assert last.validation["loss"] < before["loss"]
    assert last.forwards == trainer.program.forwards > 0
    assert last.clean_forwards == 44 * 30
    assert last.lr == pytest.approx([0.02 * 0.5**14])
    assert last.seconds > 0
    assert History.from_dict(json.loads(json.dumps(history.to_dict()))) == history
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    epochs = [{k: v for k, v in record.items() if k != "kind"} for record in records if record["kind"] == "epoch"]
    assert epochs == [dataclasses.asdict(record) for record in history]
    steps = [record for record in records if record["kind"] == "step"]
    assert list(steps[0]) == ["kind", "step", "epoch", "loss", "lr", "forwards", "clean_forwards"]
    assert len(steps) == 180


def test_the_loss_is_weighted_by_samples() -> None:
    inputs, target = make_validation()
    trainer = make_trainer(None, metrics={"right": accuracy, "mean": lambda output, target: output.mean()})
    whole = trainer.evaluate([(inputs, target)])
    parts = trainer.evaluate([(inputs[:5], target[:5]), (inputs[5:], target[5:])])
    assert parts == pytest.approx(whole)
    trainer.program.model.eval()
    output = trainer.program.model(inputs).detach()
    assert whole["loss"] == pytest.approx(float(nn.functional.cross_entropy(output, target)))
    assert whole["right"] == pytest.approx(float((output.argmax(1) == target).float().mean()))
    assert whole["mean"] == pytest.approx(float(output.mean()))


def test_evaluate_restores_each_mode_and_changes_nothing() -> None:
    trainer = make_trainer(None)
    model = trainer.program.model
    model[1].eval()  # type: ignore[index]
    modes = [module.training for module in model.modules()]
    before = digest(trainer)
    seen: list[bool] = []
    model.register_forward_hook(lambda module, *_: seen.append(module.training or torch.is_grad_enabled()))
    trainer.evaluate([make_validation()])
    assert seen == [False]
    assert [module.training for module in model.modules()] == modes
    assert digest(trainer) == before
    with pytest.raises(RuntimeError):
        trainer.evaluate([(torch.zeros(2, 99), torch.zeros(2).long())])
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(DataError, match="no batch"):
        trainer.evaluate([])


def test_several_inputs_arrive_as_a_tuple() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.layer(a + b)

    seen = []

    class Program(StandIn):
        def step(self, inputs: Any, target: Any) -> torch.Tensor:
            seen.append(inputs)
            return torch.tensor(0.0)

    program = Program(Two())
    trainer = Trainer(program, torch.optim.SGD(program.model.parameters()), progress=False)
    x, target = make_validation()
    trainer.fit([(x, x, target)], 1, validation=[[x, x, target]])
    assert isinstance(seen[0], tuple)
    assert len(seen[0]) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_with_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    program = make_program()
    trainer = make_trainer(tmp_path, program)
    step = program.step

    def interrupted(*batch: Any) -> torch.Tensor:
        if program.step_count == 8:
            os.kill(os.getpid(), number)  # arrives inside the step
        return step(*batch)

    program.step = interrupted  # type: ignore[method-assign]
    history = trainer.fit(make_loader(), 3)
    assert history.interrupted
    assert len(history) == 1
    assert program.step_count == 9, "the step in progress is finished"
    assert checkpoints.candidates(tmp_path)[0].name == "step-000000009"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    again = make_trainer(tmp_path)
    done = again.fit(make_loader(), 3, resume=True)
    assert not done.interrupted
    assert len(done) == 3


def test_a_second_ctrl_c_aborts_at_once(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    program = make_program()

    def interrupted(*batch: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    program.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, program).fit(make_loader(), 1)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(make_trainer(tmp_path).fit(make_loader(), 1, resume=True)) == 1


def test_ctrl_c_during_validation(tmp_path: Path) -> None:
    class Validation:
        def __init__(self, stop: bool) -> None:
            self.stop = stop

        def __iter__(self) -> Any:
            torch.rand(3)  # the next epoch's augmentation follows in the same stream
            yield make_validation()
            if self.stop:
                os.kill(os.getpid(), signal.SIGINT)
            yield make_validation()

    torch.manual_seed(0)
    numbers = capture_rng()
    whole = make_trainer(tmp_path / "whole")
    whole.fit(make_loader(), 2, validation=Validation(False))
    restore_rng(numbers)
    history = make_trainer(tmp_path / "run").fit(make_loader(), 2, validation=Validation(True))
    assert history.interrupted
    assert len(history) == 0
    resumed = make_trainer(tmp_path / "run")
    resumed.fit(make_loader(), 2, validation=Validation(False), resume=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "epoch"] == [6, 12]
    assert digest(resumed) == digest(whole)


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        program = make_program()
        step = program.step
        program.step = lambda *batch: (os.kill(os.getpid(), signal.SIGINT), step(*batch))[1]  # type: ignore[method-assign]
        assert not make_trainer(None, program).fit(make_loader(), 1).interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def test_fit_in_another_thread_stops_when_asked(tmp_path: Path) -> None:
    program = make_program()
    trainer = make_trainer(tmp_path, program)
    step, reached = program.step, threading.Event()

    def watched(*batch: Any) -> torch.Tensor:
        if program.step_count == 3:
            reached.set()
        return step(*batch)

    program.step = watched  # type: ignore[method-assign]
    results: list[History] = []
    thread = threading.Thread(target=lambda: results.append(trainer.fit(make_loader(), 10_000)))
    thread.start()
    assert reached.wait(30)
    trainer.stop()
    thread.join(30)
    assert results[0].interrupted


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path: Path, value: float) -> None:
    program = make_program()
    trainer = make_trainer(tmp_path, program)
    step = program.step

    def poisoned(*batch: Any) -> torch.Tensor:
        loss = step(*batch)
        if program.step_count == 5:
            program.model[3].weight.grad[1, 2] = value  # type: ignore[index]
            poisoned.weights = {n: p.clone() for n, p in program.model.named_parameters()}  # type: ignore[attr-defined]
        return loss

    program.step = poisoned  # type: ignore[method-assign]
    with pytest.raises(NonFiniteGradientError, match=r"the gradient of 3.weight is NaN or infinite"):
        trainer.fit(make_loader(), 1)
    for name, parameter in program.model.named_parameters():
        assert torch.equal(parameter, poisoned.weights[name])  # type: ignore[attr-defined]
        assert parameter.grad is None
    assert make_trainer(tmp_path).restore() == 4


def test_huge_gradients_are_finite_and_empty_parameters_do_no_harm() -> None:
    program = StandIn(make_model())
    program.model.register_parameter("empty", nn.Parameter(torch.empty(0)))
    step = program.step

    def huge(*batch: Any) -> torch.Tensor:
        loss = step(*batch)
        for parameter in program.model.parameters():
            parameter.grad = torch.full_like(parameter, 3e38)
        return loss

    program.step = huge  # type: ignore[method-assign]
    trainer = Trainer(program, torch.optim.SGD(program.model.parameters(), lr=1e-40), progress=False)
    assert len(trainer.fit([make_validation()], 1)) == 1


def test_a_weight_that_is_not_finite_is_never_stored(tmp_path: Path) -> None:
    program = make_program()
    optimizer = torch.optim.SGD(program.model.parameters(), lr=1e-3)
    trainer = Trainer(program, optimizer, directory=tmp_path, checkpoint_every=1, progress=False)
    step = program.step

    def overshooting(*batch: Any) -> torch.Tensor:
        loss = step(*batch)
        if program.step_count == 4:
            program.model[3].bias.grad.fill_(3e38)  # type: ignore[index]
            optimizer.param_groups[0]["lr"] = 100.0
        return loss

    program.step = overshooting  # type: ignore[method-assign]
    with pytest.raises(NonFiniteGradientError, match=r"3.bias became NaN or infinite"):
        trainer.fit([make_validation() for _ in range(6)], 1)
    found = checkpoints.latest(tmp_path)
    assert found is not None
    assert found.step == 3
    assert all(tensor.isfinite().all() for tensor in found.state["model"].values())


def test_stale_gradients_are_dropped_before_the_first_step() -> None:
    clean, stale = make_trainer(None), make_trainer(None)
    for parameter in stale.program.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for trainer in (clean, stale):
        trainer.fit([make_validation()], 1)
    assert digest(clean) == digest(stale)


def test_the_plateau_scheduler_follows_the_validation_loss() -> None:
    program = make_program()
    optimizer = torch.optim.SGD(program.model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e-9)
    optimizer.param_groups[0]["lr"] = 1e-12
    trainer = Trainer(program, optimizer, scheduler=scheduler, progress=False)
    history = trainer.fit([make_validation()], 3, validation=[make_validation()])
    assert len(history) == 3
    assert scheduler.last_epoch == 3
    with pytest.raises(OptionError, match="scheduler_step='epoch'"):
        Trainer(program, optimizer, scheduler=scheduler, scheduler_step="batch")


def test_one_cycle_steps_once_a_batch() -> None:
    program = make_program()
    optimizer = torch.optim.SGD(program.model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12)
    trainer = Trainer(program, optimizer, scheduler=scheduler, scheduler_step="batch", progress=False)
    trainer.fit(make_loader(), 2)
    assert scheduler.last_epoch == 12


# --- what is refused --------------------------------------------------------------------------------------------------


def test_options_that_cannot_work(tmp_path: Path) -> None:
    program = make_program()
    optimizer = torch.optim.SGD(program.model.parameters(), lr=0.1)
    other = torch.optim.SGD(program.model.parameters(), lr=0.1)
    for message, options in {
        "checkpoint_every must be": {"checkpoint_every": 0, "directory": tmp_path},
        "keep must be": {"keep": -1},
        "need a directory": {"checkpoint_every": 1},
        "tensorboard need a directory": {"tensorboard": True},
        "another optimizer": {"scheduler": torch.optim.lr_scheduler.StepLR(other, 1)},
    }.items():
        with pytest.raises(OptionError, match=message):
            Trainer(program, optimizer, **options)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match=r"unknown metric 'acuracy'. Did you mean 'accuracy'"):
        Trainer(program, optimizer, metrics="acuracy")
    with pytest.raises(UnknownNameError, match="Did you mean 'batch'"):
        Trainer(program, optimizer, scheduler_step="batches")  # type: ignore[arg-type]
    trainer = Trainer(program, optimizer, progress=False)
    with pytest.raises(OptionError, match="epochs must be"):
        trainer.fit(make_loader(), 0)
    with pytest.raises(OptionError, match="needs the directory"):
        trainer.fit(make_loader(), 1, resume=True)
    with pytest.raises(OptionError, match="iterated only once"):
        trainer.fit(iter([make_validation()]), 1)
    with pytest.raises(OptionError, match="a directory"):
        trainer.restore()


def test_an_optimizer_of_other_parameters() -> None:
    program = make_program()
    model = program.model
    with pytest.raises(OptionError, match=r"trainable parameters 3.weight, 3.bias"):
        Trainer(program, torch.optim.SGD([p for n, p in model.named_parameters() if not n.startswith("3")]))
    foreign = nn.Parameter(torch.zeros(2, 7))
    with pytest.raises(OptionError, match=r"not the model's: number 6 \[2, 7\] of group 0"):
        Trainer(program, torch.optim.SGD([*model.parameters(), foreign]))
    model[0].requires_grad_(False)  # type: ignore[index]
    Trainer(program, torch.optim.SGD(model.parameters()))
    Trainer(program, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("batch", [torch.zeros(2, 6), {"x": torch.zeros(2, 6)}, (torch.zeros(2, 6),)])
def test_a_batch_of_another_form(batch: Any) -> None:
    with pytest.raises(BatchError, match=r"a batch must be a tuple"):
        make_trainer(None).fit([batch], 1)


def test_an_empty_loader() -> None:
    with pytest.raises(DataError, match="no batch in epoch 1"):
        make_trainer(None).fit([], 1)


def test_accuracy_of_a_regression_is_refused_before_the_first_step() -> None:
    inputs, target = make_validation()
    trainer = make_trainer(None)
    before = digest(trainer)
    with pytest.raises(OptionError, match="metrics=None"):
        trainer.fit([(inputs, target.float())], 1, validation=[(inputs, target.float())])
    assert digest(trainer) == before
    with pytest.raises(OptionError, match="class scores"):
        accuracy(torch.zeros(4), torch.zeros(4).long())


def test_accuracy_of_pixels() -> None:
    output = torch.tensor([[[1.0, 0], [0, 1]], [[1, 1], [0, 0]]])  # (N=2, C=2, pixels=2)
    assert accuracy(output, torch.tensor([[0, 1], [0, 1]])).tolist() == [1.0, 0.5]


@pytest.mark.parametrize("where", ["file/below", "/proc/onward"])
def test_an_unwritable_folder_is_refused_before_training(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    for resume in (False, True):
        trainer = make_trainer(tmp_path / where)
        before = digest(trainer)
        with pytest.raises(CheckpointError, match=f"cannot write.*{where}"):
            trainer.fit(make_loader(), 1, resume=resume)
        assert digest(trainer) == before


# --- sinks ------------------------------------------------------------------------------------------------------------


def test_metrics_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink.log({"kind": "step", "step": 1, "epoch": 1, "loss": float("nan"), "lr": [float("inf")]})
    sink.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"kind": "step", "step": 1, "epoch": 1, "loss": None, "lr": [None]}


def test_tensorboard_holds_the_run(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make_trainer(tmp_path, tensorboard=True)
    trainer.fit(make_loader(), 2, validation=[make_validation()])
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("validation/accuracy")] == [6, 12]
    assert {"train/lr_0", "train/forwards", "epoch/train_loss"} <= set(events.Tags()["scalars"])


def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(OptionError, match=r"pip install 'onward\[tensorboard\]'"):
        TensorBoard(tmp_path)
    with pytest.raises(OptionError, match="tensorboard"):
        make_trainer(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_the_progress_bar_shows_the_run_on_a_terminal_only(capfd: pytest.CaptureFixture[str]) -> None:
    for terminal in (True, False):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=terminal, width=160)
        with ProgressBar(True, 2, 10, 0, console) as bar:
            bar.step(7, 1, 0.123456, 2_345_678)
            bar.validated({"accuracy": 0.5})
        text = stream.getvalue()
        shown = ["epoch 1/2", "7/20", "loss 0.1235", "val accuracy 0.5000", "2.35M forwards"]
        assert all(part in text for part in shown) if terminal else text == ""
    trainer = make_trainer(None)
    trainer.progress = True
    trainer.fit([make_validation()], 1)
    assert capfd.readouterr() == ("", "")


def test_two_runs_of_the_same_seed_agree() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        trainer = make_trainer(None)
        history = trainer.fit(make_loader(augment=False), 2)
        results.append((digest(trainer), timeless(history)))
    assert results[0] == results[1]
