"""The trainer without torch: both executors' bits, torch's results, exact resume, and what stops and errors leave."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx_cases import (
    BATCH,
    CASES,
    CPU,
    arrays,
    data_file,
    exported,
    program_of,
    run,
    same,
    settings_of,
    split_of,
    steps_of,
    trainer_of,
)

import onward
from onward.cli.training import Training, make_scheduler
from onward.models import load
from onward.passes.errors import CheckpointError, FolderError, NonFiniteLossError, OutputError
from onward.runtime.export.save import task_files
from onward.runtime.onnx import Trainer
from onward.runtime.onnx import pipeline as pipeline_module
from onward.runtime.onnx.data import Judge, Split, _right
from onward.runtime.onnx.session import Device, Model
from onward.runtime.onnx.write import write_trained
from onward.runtime.training.evaluation import accuracy
from onward.runtime.training.update import update

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    assert not workers_alive()


def workers_alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("onward")]


def torch_call(case: str, batch: Any) -> tuple[Any, torch.Tensor]:
    """A batch as torch's program takes it."""
    x, y = (torch.from_numpy(batch[key]) for key in ("input:0", "target:0"))
    return ((x[0], load("karate").edge_index) if CASES[case].unbatched else x), y


# --- one model a step, one a task, and torch ----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_both_executors_have_the_same_bits(case: str) -> None:
    """20 steps; those of learned feedback with perturbed runs and without."""
    expected = run(trainer_of(case), case)
    if case in ("auto", "normalised"):
        taught = int(arrays(expected[-1].state)["feedback:steps"])
        assert 4 < taught < 20, taught
    for workers in (1, 2, 4):
        found = run(trainer_of(case, executor="tasks", workers=workers), case)
        for mine, theirs in zip(expected, found, strict=True):
            assert mine.loss == theirs.loss
            assert same(arrays(mine.state), arrays(theirs.state))


@pytest.mark.parametrize("case", ["auto", "layerwise"])
def test_no_order_of_the_tasks_changes_a_bit_or_hangs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(trainer_of(case), case)
    trainer = trainer_of(case, executor="tasks", workers=4)
    delays, call = random.Random(5), Model.__call__

    def delayed(self: Model, *given: Any) -> Any:
        time.sleep(delays.random() ** 4 * 0.004)
        found = call(self, *given)
        time.sleep(delays.random() ** 4 * 0.004)
        return found

    monkeypatch.setattr(Model, "__call__", delayed)
    found: list[Any] = []
    worker = threading.Thread(target=lambda: found.extend(run(trainer, case)), daemon=True)
    worker.start()
    worker.join(60)
    assert not worker.is_alive(), "a step hangs"
    assert all(same(arrays(a.state), arrays(b.state)) for a, b in zip(expected, found, strict=True))


def test_a_step_begins_while_the_one_before_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer's update waits for the next step's first stage, which would never come in the order of steps."""
    trainer, call = trainer_of("layerwise", executor="tasks", workers=2), Model.__call__
    begun, calls = threading.Event(), [0]

    def meeting(self: Model, *given: Any) -> Any:
        if self.path.name == "F0.onnx":
            calls[0] += 1
            if calls[0] == 2:
                begun.set()
        if self.path.name == "2.weight.onnx":
            assert begun.wait(20)
            time.sleep(0.05)  # so that it has also ended
        return call(self, *given)

    monkeypatch.setattr(Model, "__call__", meeting)
    run(trainer, "layerwise", 3)
    order = list(trainer.steps.order)
    assert len(order) == 3 * len(trainer.folder.tasks)
    assert order.index((1, "F0")) < order.index((0, "U:2.weight"))


@pytest.mark.parametrize("case", CASES)
def test_torch_takes_the_same_steps(case: str) -> None:
    """20 steps whose gradients agree to 1e-5 of a tensor's largest, so weights to what an optimizer makes of that.

    SGD's weights differ by the learning rates' sum, times 1e-5 of the largest momentum. Adam divides the mean gradient
    by the gradients' size, of each weight by itself: where that is small, the same error is a large part of both, and
    at most steps are in opposite directions.
    """
    steps, (program, optimizer) = steps_of(case, 20), program_of(case)
    results = run(trainer_of(case), case)
    allowed = {name: np.zeros(tuple(p.shape)) for name, p in program.model.named_parameters()}
    for number, (step, result) in enumerate(zip(steps, results, strict=True), 1):
        given = step.lr * 1e-5
        optimizer.param_groups[0]["lr"] = step.lr
        loss = float(program.step(*torch_call(case, step.batch)))
        assert math.isclose(loss, result.loss, rel_tol=1e-5)
        largest_of = {name: float(p.grad.abs().max()) for name, p in program.model.named_parameters()}
        update(program, optimizer)
        for name, parameter in program.model.named_parameters():
            kept, largest = optimizer.state[parameter], largest_of[name]
            if "momentum_buffer" in kept:
                allowed[name] += given * max(largest, float(kept["momentum_buffer"].abs().max()))
            else:
                size = (kept["exp_avg_sq"] / (1 - 0.999**number)).sqrt().clamp(min=1e-20).numpy()
                allowed[name] += np.minimum(2 * given * largest / size, 2 * step.lr)
    state = arrays(results[-1].state)
    for name, parameter in program.model.named_parameters():
        expected = parameter.detach().numpy()
        error = np.abs(expected - state[f"parameter:{name}"])
        assert (error <= allowed[name] + 20 * 1.2e-7 * np.abs(expected)).all(), name
    for name, buffer in program.model.named_buffers():
        np.testing.assert_allclose(state[f"buffer:{name}"], buffer.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_it_evaluates_as_torch_does(case: str) -> None:
    """The mean loss and the accuracy in evaluation mode, of the weights behind some steps, in batches with a rest."""
    trainer, (program, optimizer) = trainer_of(case), program_of(case)
    state, split = run(trainer, case, 5)[-1].state, split_of(case)
    model, held = program.model, arrays(state)
    names = {f"parameter:{n}": p for n, p in model.named_parameters()} | {
        f"buffer:{n}": b for n, b in model.named_buffers() if f"buffer:{n}" in held
    }
    with torch.no_grad():
        for key, tensor in names.items():
            tensor.copy_(torch.from_numpy(held[key]))
    batches = [torch_call(case, batch) for batch in split.batches(BATCH)]
    expected = onward.Trainer(program, optimizer, progress=False).evaluate(
        [(*x, y) if isinstance(x, tuple) else (x, y) for x, y in batches]
    )
    found = trainer.judge(state, split, BATCH)
    assert math.isclose(found.loss, expected["loss"], rel_tol=1e-5)
    assert math.isclose(found.accuracy, expected["accuracy"], rel_tol=1e-12)


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 4), (7, 4, 5), (4, 4, 4), (6, 3, 2, 2)])
def test_the_accuracy_is_that_of_torch(shape: tuple[int, ...]) -> None:
    """Also where targets are left out, of some samples all of them."""
    random_numbers = np.random.default_rng(0)
    output = random_numbers.normal(size=shape).astype(np.float32)
    for places in {1, len(shape) - 1}:
        left = tuple(size for place, size in enumerate(shape) if place != places)
        target = random_numbers.integers(0, shape[places], left)
        for share in (0.0, 0.5):
            target = np.where(random_numbers.random(left) < share, -100, target)
            if share:
                target[0] = -100
            expected = accuracy(torch.from_numpy(output), torch.from_numpy(target)).numpy()
            found = _right(output, target)
            assert found is not None
            np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_there_is_no_accuracy_of_targets_that_are_no_classes() -> None:
    output = np.zeros((4, 3), np.float32)
    assert _right(output, np.zeros((4, 3), np.float32)) is None
    assert _right(output, np.zeros((4, 7), np.int64)) is None
    assert _right(output[:, 0], np.zeros(4, np.int64)) is None
    assert _right(output, None) is None


# --- epochs -------------------------------------------------------------------------------------------------------


def test_it_learns() -> None:
    trainer = trainer_of("auto", epochs=15, lr=2e-2)
    split = split_of("auto")
    assert trainer.fit(split, split)
    assert [record.epoch for record in trainer.records] == list(range(1, 16))
    assert trainer.step == trainer.records[-1].step == 15 * 7
    first, last = trainer.records[0], trainer.records[-1]
    assert last.train_loss < 0.5 * first.train_loss
    assert last.accuracy > 0.9 > first.accuracy


def test_an_epochs_loss_is_the_mean_of_its_samples() -> None:
    """The last batch, of 4 of 100 samples, counts as 4."""
    trainer, split = trainer_of("layerwise", epochs=1), split_of("layerwise")
    losses = [r.loss for r in trainer.steps.run(trainer.state, trainer._inputs(split, 0, 7), trainer.folder.seed)]
    trainer.fit(split)
    expected = (sum(losses[:-1]) * BATCH + losses[-1] * 4) / 100
    assert math.isclose(trainer.records[0].train_loss, expected, rel_tol=1e-12)
    assert math.isnan(trainer.records[0].loss)
    assert math.isnan(trainer.records[0].accuracy)


def test_every_epoch_has_an_order_of_its_own_of_all_samples() -> None:
    trainer, split = trainer_of("layerwise", seed=5), split_of("layerwise")
    orders = []
    for epoch in (0, 1, 0):
        rows = np.concatenate([given.batch["input:0"] for given in trainer._inputs(split, epoch, 7)])
        assert sorted(map(bytes, rows)) == sorted(map(bytes, split.arrays["input:0"]))
        orders.append(rows.tobytes())
    assert orders[0] == orders[2] != orders[1]
    other = trainer_of("layerwise", seed=-1)
    assert np.concatenate([g.batch["input:0"] for g in other._inputs(split, 0, 7)]).tobytes() not in orders


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_learning_rates_follow_the_command_lines_schedule(schedule: str) -> None:
    trainer, split = trainer_of("layerwise", epochs=3, schedule=schedule), split_of("layerwise")
    found = [given.lr for epoch in range(3) for given in trainer._inputs(split, epoch, 7)]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    scheduler = make_scheduler(optimizer, Training(epochs=3, lr=0.05, schedule=schedule), 7)
    expected = []
    for _ in range(21):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# --- resume -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["fused", "tasks"])
@pytest.mark.parametrize("at", [4, 7, 10])
def test_a_resumed_run_has_the_same_bits(
    executor: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within an epoch of 7 steps, at its end, and within the next one."""
    given: dict[str, Any] = {"executor": executor, "workers": 2 if executor == "tasks" else 1, "schedule": "cosine"}
    whole, split = trainer_of("auto", **given), split_of("auto")
    assert whole.fit(split, split)
    first, path = trainer_of("auto", **given, checkpoint_every=1), tmp_path / "run.npz"
    save = first.save

    def saved(target: Path) -> None:
        save(target)
        if first.step == at:
            shutil.copy(target, tmp_path / "kept.npz")
            first.stop()

    monkeypatch.setattr(first, "save", saved)
    assert not first.fit(split, split, checkpoint=path)
    second = trainer_of("auto", **given)
    second.load(tmp_path / "kept.npz")
    assert second.step == at
    assert second.fit(split, split, checkpoint=path)
    assert same(arrays(whole.state), arrays(second.state))
    assert timeless(whole) == timeless(second)
    third = trainer_of("auto", **given)
    third.load(path)
    assert third.fit(split, split)  # it is finished: nothing is left to do
    assert third.step == 14
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kept.npz", "run.npz"]


def timeless(trainer: Trainer) -> list[tuple[float, ...]]:
    return [(r.epoch, r.step, r.train_loss, r.loss, r.accuracy) for r in trainer.records]


def test_the_same_trainer_goes_on_after_a_stop() -> None:
    whole, split = trainer_of("auto"), split_of("auto")
    whole.fit(split, split)
    for executor in ("fused", "tasks"):
        trainer = trainer_of("auto", executor=executor)
        stops, do = 0, trainer.steps.run

        def stopping(*given: Any, do: Any = do, trainer: Trainer = trainer) -> Iterator[Any]:
            for number, result in enumerate(do(*given)):
                if number == 2:
                    trainer.stop()
                yield result

        trainer.steps.run = stopping  # type: ignore[method-assign]
        while not trainer.fit(split, split):
            stops += 1
        assert stops > 2
        assert same(arrays(whole.state), arrays(trainer.state))
        assert timeless(whole) == timeless(trainer)


def test_going_on_within_an_epoch_takes_the_same_samples() -> None:
    trainer, split = trainer_of("layerwise"), split_of("layerwise")
    trainer.stop()
    inputs = trainer._inputs

    def stopping(*given: Any) -> Iterator[Any]:
        for place, found in enumerate(inputs(*given)):
            if place == 1:
                trainer.stop()
            yield found

    trainer._inputs = stopping  # type: ignore[method-assign]
    assert not trainer.fit(split)
    with pytest.raises(CheckpointError, match="100 samples, and now there are 90"):
        trainer.fit(split_of("layerwise", 90))


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_checkpoint_leaves_the_old_one(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, path = trainer_of("layerwise"), tmp_path / "run.npz"
    trainer.save(path)
    before = path.read_bytes()

    def broken(file: Any, **held: Any) -> None:
        file.write(before[: len(before) // 2])
        raise error

    monkeypatch.setattr(np, "savez", broken)
    raised = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(raised, match=r"cannot write .*run.npz: disk full" if raised is OutputError else None):
        trainer.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.npz"]


def test_a_run_that_is_killed_in_a_write_goes_on(tmp_path: Path) -> None:
    data, run_file = data_file("layerwise", tmp_path / "data.npz"), tmp_path / "run.npz"
    script = f"""
import os, signal, sys
import numpy as np
from onward.runtime.onnx.__main__ import main
real, calls = np.savez, [0]
def killed(file, **arrays):
    calls[0] += 1
    if calls[0] == 4:
        file.write(b"PK half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    real(file, **arrays)
np.savez = killed
main(["train", {str(exported("layerwise").path)!r}, "--data", {str(data)!r}, "--checkpoint", {str(run_file)!r},
      "--checkpoint-every", "1", "--threads", "1"])
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    whole, second, split = trainer_of("layerwise"), trainer_of("layerwise"), split_of("layerwise")
    second.load(run_file)
    assert second.step == 3
    second.fit(split)
    whole.fit(split)
    assert same(arrays(whole.state), arrays(second.state))


# --- stops and errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"executor": "tasks"}, {"executor": "tasks", "workers": 3}])
def test_a_number_that_is_not_finite_leaves_the_state_before_its_step(given: dict[str, Any], tmp_path: Path) -> None:
    split = split_of("normalised")
    bad = Split({**split.arrays, "input:0": split.arrays["input:0"].copy()}, False)
    trainer, path = trainer_of("normalised", **given, checkpoint_every=1), tmp_path / "run.npz"
    place = next(i for i, g in enumerate(trainer._inputs(Split({"input:0": np.arange(100)}, False), 0, 7))
                 if 70 in g.batch["input:0"])  # fmt: skip
    bad.arrays["input:0"][70] = np.nan
    with pytest.raises(NonFiniteLossError, match=rf"step {place}: .* NaN or infinite"):
        trainer.fit(bad, checkpoint=path)
    assert trainer.step == place
    expected = trainer_of("normalised", **given)
    inputs = list(expected._inputs(split, 0, 7))[:place]
    before = [expected.state, *(r.state for r in expected.steps.run(expected.state, inputs, expected.folder.seed))][-1]
    assert same(arrays(trainer.state), arrays(before))
    assert trainer.fit(split)  # with the sample mended it goes on
    whole = trainer_of("normalised", **given)
    whole.fit(split)
    assert same(arrays(trainer.state), arrays(whole.state))


@pytest.mark.parametrize("given", [{}, {"executor": "tasks"}, {"executor": "tasks", "workers": 3}])
def test_a_model_that_fails_leaves_a_usable_trainer(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, split, call, calls = trainer_of("auto", **given), split_of("auto"), Model.__call__, [0]

    def broken(self: Model, *values: Any) -> Any:
        if self.path.name in ("training_step.onnx", "G1.onnx"):
            calls[0] += 1
            if calls[0] == 3:
                raise FolderError("it failed")
        return call(self, *values)

    with monkeypatch.context() as patched:
        patched.setattr(Model, "__call__", broken)
        with pytest.raises(FolderError, match="it failed"):
            trainer.fit(split)
    assert not workers_alive()  # while the error is being looked at
    assert trainer.step == 2 if not given else trainer.step <= 2  # with tasks, a step before may be in progress too
    assert trainer.fit(split)
    whole = trainer_of("auto", **given)
    whole.fit(split)
    assert same(arrays(trainer.state), arrays(whole.state))


@pytest.mark.parametrize("workers", [1, 3])
def test_nobody_has_to_take_all_results(workers: int) -> None:
    trainer = trainer_of("auto", executor="tasks", workers=workers)
    before = arrays(trainer.state)
    results = trainer.steps.run(trainer.state, steps_of("auto", 20), trainer.folder.seed)
    next(results)
    results.close()
    assert not workers_alive()
    assert same(before, arrays(trainer.state))
    run(trainer, "auto")


def test_samples_that_cannot_be_had_are_raised_where_they_are_asked_for() -> None:
    def inputs() -> Iterator[Any]:
        yield from steps_of("auto", 3)
        raise OSError("the disk is gone")

    for executor in ("fused", "tasks"):
        trainer = trainer_of("auto", executor=executor)
        with pytest.raises(OSError, match="the disk is gone"):
            list(trainer.steps.run(trainer.state, inputs(), 0))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("executor", ["fused", "tasks"])
def test_a_signal_ends_behind_the_step_in_progress(
    executor: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, split, path = trainer_of("auto", executor=executor, epochs=3), split_of("auto"), tmp_path / "run.npz"
    handler, call, calls = signal.getsignal(number), Model.__call__, [0]

    def signalled(self: Model, *values: Any) -> Any:
        calls[0] += self.path.name in ("training_step.onnx", "E.onnx")
        if calls[0] == 10:
            monkeypatch.undo()
            os.kill(os.getpid(), number)
        return call(self, *values)

    monkeypatch.setattr(Model, "__call__", signalled)
    assert not trainer.fit(split, checkpoint=path)
    assert 9 <= trainer.step <= 12
    assert signal.getsignal(number) is handler
    second = trainer_of("auto", executor=executor, epochs=3)
    second.load(path)
    assert second.step == trainer.step
    assert trainer.fit(split) and second.fit(split)  # noqa: PT018
    assert same(arrays(trainer.state), arrays(second.state))


def test_a_second_ctrl_c_raises_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, split = trainer_of("auto", executor="tasks", workers=2), split_of("auto")
    call, calls = Model.__call__, [0]

    def slow(self: Model, *values: Any) -> Any:
        calls[0] += self.path.name == "E.onnx"
        if calls[0] == 2:
            monkeypatch.undo()
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
        return call(self, *values)

    monkeypatch.setattr(Model, "__call__", slow)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(split)
    assert trainer.fit(split)
    whole = trainer_of("auto")
    whole.fit(split)
    assert same(arrays(trainer.state), arrays(whole.state))


def test_ctrl_c_on_the_command_line(tmp_path: Path) -> None:
    """Exit status 130, a checkpoint, the model written; and the run goes on."""
    data, path, output = data_file("auto", tmp_path / "data.npz"), tmp_path / "run.npz", tmp_path / "out.onnx"
    command = [sys.executable, "-m", "onward.runtime.onnx", "train", exported("auto").path, "--data", data]
    command += ["--checkpoint", path, "-o", output, "--epochs", "100000", "--threads", "1"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 3 "):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.startswith("stopped behind step ")
    assert "--resume" in err
    assert f"the trained model: {output}" in out
    second = trainer_of("auto", epochs=100000)
    second.load(path)
    assert second.step == int(err.split(";")[0].split()[-1]) >= 21
    onnx.checker.check_model(str(output))


# --- memory -------------------------------------------------------------------------------------------------------


def test_steps_leave_nothing_in_memory() -> None:
    """Values and steps in progress, behind two steps without perturbed runs, each time as many."""
    for given in ({}, {"executor": "tasks"}, {"executor": "tasks", "workers": 2}):
        trainer, counts = trainer_of("auto", **given), []
        results = trainer.steps.run(trainer.state, steps_of("auto", 40), trainer.folder.seed)
        for number, _ in enumerate(results):
            if number in (9, 39):
                gc.collect()
                counts.append(sum(type(each) in (ort.OrtValue, pipeline_module._Step) for each in gc.get_objects()))
        assert counts[1] <= 1.3 * counts[0], counts  # how much of the next step is there is not the same each time
        del trainer, results, _


# --- the trained model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_trained_model_is_a_model_of_its_own(case: str, tmp_path: Path) -> None:
    trainer, (program, _) = trainer_of(case), program_of(case)
    state, split, path = run(trainer, case, 5)[-1].state, split_of(case), tmp_path / "new" / "trained.onnx"
    write_trained(trainer.folder, state, path)
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["input:0"]
    assert [tensor.name for tensor in model.graph.output] == ["output:0"]
    assert {"parameter:" + name for name, _ in program.model.named_parameters()} <= {
        tensor.name for tensor in model.graph.initializer
    }
    original = onnx.load(str(trainer.folder.file("inference.onnx")))
    assert [node.name for node in model.graph.node] == [node.name for node in original.graph.node]
    assert (model.producer_name, model.doc_string) == (original.producer_name, original.doc_string)
    x = split.arrays["input:0"]
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input:0": x})
    judge, values = Judge(trainer.folder, CPU, 1), {"input:0": CPU.value(x)}
    np.testing.assert_allclose(found, judge.model({**state, **values})["output:0"].numpy(), rtol=1e-5, atol=1e-6)
    held = arrays(state)
    model_of, call = program.model.eval(), torch_call(case, split.arrays)[0]
    with torch.no_grad():
        for name, parameter in model_of.named_parameters():
            parameter.copy_(torch.from_numpy(held[f"parameter:{name}"]))
        for name, buffer in model_of.named_buffers():
            if f"buffer:{name}" in held:
                buffer.copy_(torch.from_numpy(held[f"buffer:{name}"]))
        expected = model_of(*call) if isinstance(call, tuple) else model_of(call)
    np.testing.assert_allclose(found.reshape(expected.shape), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_a_trained_model_may_be_larger_than_protobuf_takes(tmp_path: Path) -> None:
    """Its tensors are then beside it; the limit is lowered here."""
    trainer, x = trainer_of("auto"), split_of("auto").arrays["input:0"]
    write_trained(trainer.folder, trainer.state, tmp_path / "small.onnx")
    for _ in range(2):
        write_trained(trainer.folder, trainer.state, tmp_path / "large.onnx", limit=3000)
    names = ["large.onnx", "large.onnx.data", "small.onnx"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    onnx.checker.check_model(str(tmp_path / "large.onnx"))
    found = [
        ort.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"]).run(None, {"input:0": x})[0]
        for name in ("small.onnx", "large.onnx")
    ]
    assert found[0].tobytes() == found[1].tobytes()


def test_every_file_system_tells_the_tasks_apart() -> None:
    """Names of parameters may be any, and differ only in case, or in what is no letter."""
    long = "U:" + "x" * 300
    names = [
        "F0",
        "U:w",
        "U:W",
        "U:é",
        "U:ü",
        "U:_",
        "U:a/../b",
        "U:aux.weight",
        "U:con",
        long,
        long + "y",
        "W:w:0",
        "C",
    ]
    paths = task_files(names)
    assert len({path.lower() for path in paths}) == len(names)
    assert all(re.fullmatch(r"[a-z]+/[A-Za-z0-9._-]{1,110}\.onnx", path) for path in paths)
    assert all(Path(path).stem.split(".")[0].lower() not in ("aux", "con") for path in paths)
    assert paths[:2] == ["stages/F0.onnx", "updates/w.onnx"]


def test_the_manifest_says_what_the_trainer_needs() -> None:
    """Every key of the tasks is an input or output of its model, and state and files are all there."""
    folder = exported("auto")
    manifest = json.loads((folder.path / "manifest.json").read_text())
    assert sorted(form.key for form in folder.state) == sorted(np.load(folder.file("state.npz")).files)
    written = {path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*") if path.is_file()}
    whole = {"manifest.json", "state.npz", "training_step.onnx", "inference.onnx", "loss.onnx"}
    assert written == whole | {task["file"] for task in manifest["tasks"]}
    assert len({name.lower() for name in written}) == len(written)  # also where case does not count
    for task in folder.tasks:
        model = onnx.load(str(task.file))
        assert {value.name for value in model.graph.input} == set(task.reads)
        assert {value.name for value in model.graph.output} == set(task.writes)
        assert {opset.domain for opset in model.opset_import} == {""}


# --- a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["auto", "layerwise"])
@pytest.mark.parametrize("executor", ["fused", "tasks"])
def test_a_gpu_trains_as_the_cpu_does(case: str, executor: str) -> None:
    device = Device.find("cuda")
    if device.name != "cuda":
        pytest.skip(device.note())
    there, here = (Trainer(exported(case), settings_of(case, executor=executor), each) for each in (device, CPU))
    found, expected = (arrays(run(trainer, case, 5)[-1].state) for trainer in (there, here))
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-4, err_msg=key)
