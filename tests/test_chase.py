"""The forward that chases the optimizer's updates: the bits of a barrier, in any order of the tasks."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chase_cases import OPTIMIZERS, after, batches, delay, note_updates, trainer_of
from executor_cases import CASES, batch, compiled_for, data_of, model_for, same
from safetensors.torch import load_file
from stream_recorder import FakeDevice, Recording
from torch import Tensor, nn
from training_run import digest

import onward
from onward.runtime import program as program_module
from onward.runtime.execution import streams as stream_module
from onward.runtime.execution.executor import SerialExecutor
from onward.runtime.execution.step import Step
from onward.runtime.execution.stream_plan import check_stream_plan
from onward.runtime.execution.streams import StreamedExecutor
from onward.runtime.execution.threads import ThreadedExecutor
from onward.runtime.plan import Action, Error, Forward, Update, make_plan, parameters_in_order, with_updates
from onward.runtime.schedule.bounds import simulate
from onward.runtime.schedule.picture import to_picture
from onward.runtime.schedule.pipeline import make_pipeline
from onward.runtime.schedule.tasks import Task, make_tasks
from onward.runtime.schedule.timeline import record
from onward.runtime.training import checkpoint as checkpoints
from onward.runtime.training.per_parameter import PendingUpdates
from onward.runtime.training.trainer import Trainer
from onward.runtime.training.update import scaled

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tasks of threads held up at random."""
    delay(monkeypatch)


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the updates that were tasks."""
    return note_updates(monkeypatch)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("delayed")
def test_steps_have_the_bits_of_a_barrier(name: str, applied: list[str]) -> None:
    """Twenty of the best-known optimizers, six of the others; a learning rate that moves every step, and parameters
    that are not wholly trusted."""
    case, make = "batch statistics", OPTIMIZERS[name]
    steps = 20 if name in ("SGD", "momentum", "Adam", "AdamW") else 6
    serial = trainer_of(case, make, "serial")
    losses = serial.fit(batches(case, steps), 1)[0].train_loss
    assert not applied
    assert any(trust < 1 for trust in serial.program.trust().values())
    expected = digest(serial)
    for ways in ("threads", "streams") if name in ("momentum", "AdamW") else ("threads",):
        trainer = trainer_of(case, make, ways)
        assert trainer.pipeline == "chase"
        assert trainer.fit(batches(case, steps), 1)[0].train_loss == losses
        assert digest(trainer) == expected
        assert len(applied) == (steps - 1) * 6  # the last are done by one plain step
        applied.clear()
        assert all(parameter.grad is None for parameter in trainer.program.model.parameters())


@pytest.mark.parametrize("case", ["auto", "layerwise in chunks", "shared weights"])
@pytest.mark.usefixtures("delayed")
def test_every_kind_of_step_chases(case: str) -> None:
    digests = set()
    for ways in ("serial", "threads", "streams"):
        trainer = trainer_of(case, OPTIMIZERS["Adam"], ways)
        trainer.fit(batches(case, 3), 2)
        digests.add(digest(trainer))
    assert len(digests) == 1


def test_checkpoints_in_between_are_those_of_a_barrier(tmp_path: Path) -> None:
    case, found = "auto", []
    for ways in ("serial", "threads"):
        trainer = trainer_of(
            case, OPTIMIZERS["momentum"], ways, directory=tmp_path / ways, checkpoint_every=3, keep=None
        )
        trainer.fit(batches(case, 7), 1)
        written = []
        for path in reversed(checkpoints.candidates(tmp_path / ways)):
            tensors = {name: t.tolist() for name, t in load_file(path / "state.safetensors").items() if t.numel()}
            state = json.loads((path / "state.json").read_text())["state"]
            written.append((path.name, tensors, state["optimizer"], state["scheduler"], state["program"]))
        found.append(written)
    assert [name for name, *_ in found[0]] == [f"step-{step:09d}" for step in (0, 3, 6, 7)]
    assert str(found[0]) == str(found[1])
    resumed = trainer_of(case, OPTIMIZERS["momentum"], "threads")
    assert resumed.restore(tmp_path / "threads" / "step-000000003") == 3
    resumed.fit(batches(case, 7)[3:], 1)
    assert digest(resumed) == after(7)


@pytest.mark.usefixtures("delayed")
def test_sigma_is_measured_on_updated_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_module, "CALIBRATE_EVERY", 3)
    digests = set()
    for ways in ("serial", "threads"):
        trainer = trainer_of("auto", OPTIMIZERS["Adam"], ways)
        trainer.fit(batches("auto", 8), 1)
        assert trainer.program.next_calibration > 3  # type: ignore[attr-defined]
        digests.add(digest(trainer))
    assert len(digests) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_does_not_depend_on_the_number_of_threads(name: str) -> None:
    """Workers have fewer of torch's than what takes a whole step."""
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(count, generator=generator)) for count in (70001, 4099, 5)]
        optimizer = OPTIMIZERS[name](parameters)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            scaled(optimizer.step, [(parameter, 0.37) for parameter in parameters])
        found.append([parameter.detach() for parameter in parameters])
    assert same(*found)


# --- the graph of tasks -----------------------------------------------------------------------------------------------


def updates_before(tasks: Any) -> dict[str, set[str]]:
    """By the name of each task, the updates that have to be done before."""
    known: dict[str, set[str]] = {}
    for task in tasks:
        own = {tasks[one].name for one in task.after if tasks[one].name.startswith("U:")}
        known[task.name] = own.union(*(known[tasks[one].name] for one in task.after))
    return known


@pytest.mark.parametrize("case", ["auto", "layerwise in chunks", "shared weights"])
def test_a_step_waits_for_the_updates_that_the_simulated_one_waits_for(case: str) -> None:
    """`pipeline.make_pipeline` says which weights a task of the second of two steps needs."""
    compiled = compiled_for(case)
    for perturbed in (True, False):
        plain = make_plan(compiled, perturbed=perturbed)
        plan = with_updates(compiled, plain)
        assert [action for action in plan if not isinstance(action, Update)] == list(plain)
        assert [action.parameter for action in plan if isinstance(action, Update)] == [*parameters_in_order(compiled)]
        assert plan[:3] == (*plan[:2], Forward(0))  # weight and bias of the first layer come first, not all
        found = updates_before(make_tasks(compiled, plan, in_flight=2))
        simulated = updates_before(make_pipeline(compiled, make_tasks(compiled, plain, in_flight=2), "chase", 2))
        for action in plain:
            if isinstance(action, Forward):
                assert {f"{name}@0" for name in found[str(action)]} == simulated[f"{action}@1"]
        everything = {f"U:{name}" for name in parameters_in_order(compiled)}
        assert found["F0"] < everything == found["E"]
        assert all(found[str(action)] == everything for action in plain if not isinstance(action, (Forward, Error)))


def test_the_forward_begins_before_the_last_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """They meet at a barrier that one alone would never pass."""
    trainer = trainer_of("auto", OPTIMIZERS["Adam"], "threads")
    meeting, do = threading.Barrier(2), SerialExecutor.do
    met = []

    def together(self: SerialExecutor, step: Step, action: Action, worker: int) -> None:
        if step.given.updates is not None and action in (Forward(0), Update("4.bias")):
            meeting.wait(60)
            met.append(str(action))
        do(self, step, action, worker)

    monkeypatch.setattr(ThreadedExecutor, "do", together)
    trainer.fit(batches("auto", 3), 1)
    assert sorted(met) == ["F0", "F0", "U:4.bias", "U:4.bias"]


def test_updates_are_recorded_and_drawn() -> None:
    for ways in ("threads", "streams"):
        trainer = trainer_of("auto", OPTIMIZERS["Adam"], ways)
        program, optimizer = trainer.program, trainer.optimizer
        program.step(*batch())
        names = {id(parameter): name for name, parameter in program.model.named_parameters()}
        pending = PendingUpdates(optimizer, names, program.trust())
        timeline = record(program.executor, lambda: program.step(*batch(), updates=pending), 3)  # type: ignore[attr-defined, call-arg]  # noqa: B023
        updates = [span for span in timeline.spans if span.kind == "update"]
        assert sorted(span.name for span in updates) == sorted(f"U:{name}" for name in names.values())
        assert ">update<" in to_picture({"step": timeline}, "a step")
    compiled = compiled_for("auto")
    tasks = make_tasks(compiled, with_updates(compiled, make_plan(compiled)))
    assert simulate(tasks, [1.0] * len(tasks), 2).spans[0].name == "U:0.weight"


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lends", [True, False])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_streams_read_no_weight_too_early_and_lend_the_gradients(
    name: str, lends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a device that keeps books; without the lending it finds memory that is freed too early."""
    device = FakeDevice()
    monkeypatch.setattr(stream_module, "get_device_module", lambda _: device)
    monkeypatch.setattr(stream_module, "lend", device.lend)
    if not lends:
        monkeypatch.setattr(stream_module, "_lend_gradient", lambda *_: None)
    trainer = trainer_of("auto", OPTIMIZERS[name], "streams")
    program = trainer.program
    assert isinstance(program, onward.Program)
    with Recording(device):
        trainer.fit(batches("auto", 4), 1)
    assert bool(device.faults) is not lends, device.faults
    assert isinstance(program.executor, StreamedExecutor)
    for perturbed in (True, False):
        plan = program.executor.stream_plan(6, perturbed=perturbed, updated=True)
        check_stream_plan(plan)
        assert len({issue.stream for issue in plan.issues}) > 1
    if lends:
        assert digest(trainer) == after(4, "auto", OPTIMIZERS[name])


def test_the_books_find_a_stage_that_does_not_wait_for_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    monkeypatch.setattr(stream_module, "get_device_module", lambda _: device)
    monkeypatch.setattr(stream_module, "lend", device.lend)

    def without(*given: Any, **options: Any) -> tuple[Task, ...]:
        tasks = make_tasks(*given, **options)
        updates = {position for position, task in enumerate(tasks) if isinstance(task.action, Update)}
        return tuple(Task(task.action, tuple(sorted(set(task.after) - updates))) for task in tasks)

    monkeypatch.setattr(stream_module, "make_tasks", without)
    trainer = trainer_of("auto", OPTIMIZERS["Adam"], "streams")
    with Recording(device):
        trainer.fit(batches("auto", 3), 1)
    assert any("may not be written yet" in fault or "may still be read" in fault for fault in device.faults)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gpus_streams_chase_with_the_bits_of_a_barrier(name: str) -> None:
    """There torch updates all parameters in one kernel by default, and each by itself in one of its own."""
    x, y = (tensor.cuda() for tensor in data_of("auto"))
    found = []
    for streams in (1, 3):
        model = model_for("auto").cuda()
        program = onward.compile(model, x, loss=F.cross_entropy, estimator=CASES["auto"][1], seed=3, streams=streams)
        if isinstance(program.executor, StreamedExecutor):
            program.executor.chases = True
        trainer = Trainer(program, OPTIMIZERS[name](list(model.parameters())), metrics=None, progress=False)
        trainer.fit([(x + 0.1 * number, y) for number in range(20)], 1)
        assert (trainer.pipeline == "chase") is (streams > 1)
        states = [value for state in trainer.optimizer.state.values() for value in state.values()]
        found.append([*model.state_dict().values(), *(value for value in states if isinstance(value, Tensor))])
    assert same(*found)
