"""The forward that chases the optimizer's updates: the bits of a barrier, in any order, whatever fails on the way."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executor_cases import CASES, batch, compiled_for, data_of, model_for, same
from safetensors.torch import load_file
from stream_recorder import FakeDevice, Recording
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from training_run import StandIn, digest

import onward
from onward.passes.errors import BatchError, NonFiniteGradientError, NonFiniteLossError, OutOfMemoryError
from onward.runtime import program as program_module
from onward.runtime.execution import streams as stream_module
from onward.runtime.execution import threads as threading_module
from onward.runtime.execution.executor import SerialExecutor
from onward.runtime.execution.step import Step
from onward.runtime.execution.stream_plan import check_stream_plan
from onward.runtime.execution.streams import StreamedExecutor
from onward.runtime.execution.threads import ThreadedExecutor
from onward.runtime.execution.trial import TRIALS, WARM_UP, Trial, Way
from onward.runtime.plan import Action, Error, Forward, Update, make_plan, parameters_in_order, with_updates
from onward.runtime.schedule.bounds import simulate
from onward.runtime.schedule.picture import to_picture
from onward.runtime.schedule.pipeline import make_pipeline
from onward.runtime.schedule.tasks import Task, make_tasks
from onward.runtime.schedule.timeline import record
from onward.runtime.training import checkpoint as checkpoints
from onward.runtime.training.per_parameter import ALONE, PendingUpdates, coupling
from onward.runtime.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
    "Adam, a rate in a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.02), foreach=False),
    "AdamW": lambda p: torch.optim.AdamW([{"params": p[:2], "lr": 0.01}, {"params": p[2:], "weight_decay": 0.1}]),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "Adam, foreach": lambda p: torch.optim.Adam(p, lr=0.02, foreach=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.02),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.02),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05, t0=5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


def trainer_of(case: str, make: Make, ways: str, loss: Any = F.cross_entropy, **options: Any) -> Trainer:
    """A trainer with a schedule by the batch, of a program that runs "serial", on "threads" or on "streams"."""
    compiled = compiled_for(case)
    program = onward.Program(model_for(case), compiled, loss, 3, workers=3 if ways == "threads" else 1)
    if isinstance(program.executor, ThreadedExecutor):
        program.executor.concurrent = True
    if ways == "streams":
        program.executor = executor = StreamedExecutor(compiled, program.sigmas, 3)
        executor.chases = True
    optimizer = make(list(program.model.parameters()))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 0.9**done)
    options = {"metrics": None, "progress": False, **options}
    return Trainer(program, optimizer, scheduler=scheduler, scheduler_step="batch", **options)


def batches(case: str, count: int) -> list[tuple[Tensor, Tensor]]:
    x, y = data_of(case)
    return [(x + 0.1 * number, y) for number in range(count)]


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task is held up at random before and after, some for as long as several others take."""
    delays, do = random.Random(5), SerialExecutor.do

    def late(self: SerialExecutor, step: Step, action: Action, worker: int) -> None:
        time.sleep(delays.random() ** 8 * 0.002)
        do(self, step, action, worker)
        time.sleep(delays.random() ** 8 * 0.002)

    monkeypatch.setattr(ThreadedExecutor, "do", late)


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the updates that were tasks, as they began."""
    seen: list[str] = []
    apply = PendingUpdates.apply

    def noted(self: PendingUpdates, parameter: str) -> None:
        seen.append(parameter)
        apply(self, parameter)

    monkeypatch.setattr(PendingUpdates, "apply", noted)
    return seen


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
        assert trainer._pending is None


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
    for ways in ("serial", "threads", "streams"):
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


# --- what fails -------------------------------------------------------------------------------------------------------


class _OwnError(Exception):
    pass


def after(steps: int, case: str = "auto", make: Make = OPTIMIZERS["momentum"]) -> str:
    """The digest of a barrier run of so many steps."""
    trainer = trainer_of(case, make, "serial")
    if steps:
        trainer.fit(batches(case, steps), 1)
    return digest(trainer)


@pytest.mark.parametrize("ways", ["threads", "streams"])
@pytest.mark.usefixtures("delayed")
def test_a_task_that_fails_leaves_what_the_step_before_left(ways: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some task or other, updates included; and the run goes on as if nothing had been."""
    compiled = compiled_for("auto")
    executor: Any = ThreadedExecutor if ways == "threads" else StreamedExecutor
    do, expected, in_the_end = executor.do, after(2), after(4)
    plan = with_updates(compiled, make_plan(compiled))
    updates, others = ([one for one in plan if isinstance(one, Update) is kind] for kind in (True, False))
    chosen, count = random.Random(len(ways)), 3 if ways == "threads" else 1
    for failing in chosen.sample(updates, count) + chosen.sample(others, count):
        trainer = trainer_of("auto", OPTIMIZERS["momentum"], ways)

        def fails(self: SerialExecutor, step: Step, action: Action, worker: int, failing: Action = failing) -> None:
            if action == failing and int(step.environment["runtime:key"][1]) == 2:
                raise _OwnError(str(action))
            do(self, step, action, worker)

        with monkeypatch.context() as patched:
            patched.setattr(executor, "do", fails)
            with pytest.raises(_OwnError, match=str(failing)):
                trainer.fit(batches("auto", 4), 1)
        assert digest(trainer) == expected, failing
        assert all(parameter.grad is None for parameter in trainer.program.model.parameters())
        trainer.fit(batches("auto", 4)[2:], 1)
        assert digest(trainer) == in_the_end, failing


def test_updates_are_finished_when_a_step_without_memory_has_let_go_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of("auto", OPTIMIZERS["momentum"], "threads")
    do, finish = SerialExecutor.do, PendingUpdates.finish
    environments: list[Any] = []
    held: list[int] = []

    def full(self: SerialExecutor, step: Step, action: Action, worker: int) -> None:
        if action == Forward(0) and int(step.environment["runtime:key"][1]) == 2:
            environments.append(step.environment)
            raise torch.OutOfMemoryError("CUDA out of memory")
        do(self, step, action, worker)

    def noted(self: PendingUpdates) -> None:
        held.extend(map(len, environments))
        finish(self)

    with monkeypatch.context() as patched:
        patched.setattr(ThreadedExecutor, "do", full)
        patched.setattr(PendingUpdates, "finish", noted)
        with pytest.raises(OutOfMemoryError):
            trainer.fit(batches("auto", 4), 1)
    assert held[0] == 0
    assert digest(trainer) == after(2)


def raising(error: BaseException, count: int) -> Iterator[Any]:
    yield from batches("auto", count)
    raise error


class _Raising(list[Any]):
    """A loader that raises after some batches."""

    def __iter__(self) -> Iterator[Any]:
        return raising(_OwnError(), len(self))


def bad_loss(output: Tensor, target: Any) -> Tensor:
    """Not finite, or raising, as the target says."""
    losses = F.cross_entropy(output, target["class"], reduction="none")
    if target["kind"] == "raises":
        raise _OwnError
    return losses / 0 if target["kind"] == "not finite" else losses


def told(kind: str) -> Any:
    x, y = batch()
    return x, {"class": y, "kind": kind}


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ([told("fine"), told("fine"), told("not finite")], NonFiniteLossError),
        ([told("fine"), told("fine"), told("raises")], _OwnError),
        ([told("fine"), told("fine"), (torch.zeros(2, 9), told("fine")[1])], BatchError),
        ([told("fine"), told("fine"), 3], BatchError),
        (_Raising([told("fine")] * 2), _OwnError),
    ],
)
def test_whatever_ends_a_run_no_update_is_lost(data: Any, error: type[Exception]) -> None:
    if isinstance(data, _Raising):
        trainers = [trainer_of("auto", OPTIMIZERS["Adam"], ways) for ways in ("serial", "threads")]
    else:
        trainers = [trainer_of("auto", OPTIMIZERS["Adam"], ways, loss=bad_loss) for ways in ("serial", "threads")]
    for trainer in trainers:
        with pytest.raises(error):
            trainer.fit(data, 1)
        assert trainer.program.step_count == 2  # type: ignore[attr-defined]
        assert all(parameter.grad is None for parameter in trainer.program.model.parameters())
    assert digest(trainers[0]) == digest(trainers[1])


def test_ctrl_c_amid_a_step_leaves_what_the_step_before_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, so that it is raised; and so it is while the program waits for its workers."""
    trainer = trainer_of("auto", OPTIMIZERS["momentum"], "threads")
    real, calls = threading_module.wait, [0]

    def interrupted(workers: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:  # each step calls it twice
            time.sleep(0.0005)  # some updates are done
            raise KeyboardInterrupt
        return real(workers)

    with monkeypatch.context() as patched:
        patched.setattr(threading_module, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(batches("auto", 4), 1)
    assert digest(trainer) == after(2)


def test_a_gradient_that_is_not_finite_ends_the_run_before_any_update(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of("auto", OPTIMIZERS["momentum"], "threads")
    program = trainer.program
    assert isinstance(program, onward.Program)
    step = program.step

    def broken(*given: Any, **options: Any) -> Tensor:
        loss = step(*given, **options)
        if program.step_count == 3:
            assert program.model[4].bias.grad is not None  # type: ignore[index]
            program.model[4].bias.grad[0] = float("nan")  # type: ignore[index]
        return loss

    other = trainer_of("auto", OPTIMIZERS["momentum"], "serial")
    other.fit(batches("auto", 2), 1)
    monkeypatch.setattr(program, "step", broken)
    with pytest.raises(NonFiniteGradientError, match=r"4\.bias"):
        trainer.fit(batches("auto", 4), 1)
    assert program.step_count == 3
    assert all(map(torch.equal, program.model.parameters(), other.program.model.parameters()))
    assert str(trainer.optimizer.state_dict()["state"]) == str(other.optimizer.state_dict()["state"])
    assert all(parameter.grad is None for parameter in program.model.parameters())


def test_an_update_is_done_once_and_finishing_waits_for_it() -> None:
    trainer = trainer_of("auto", OPTIMIZERS["Adam"], "serial")
    trainer.program.step(*batch())
    weight = trainer.program.model.get_parameter("0.weight")
    names = {id(parameter): name for name, parameter in trainer.program.model.named_parameters()}
    pending = PendingUpdates(trainer.optimizer, names, {})
    part, begun, go = pending._left["0.weight"], threading.Event(), threading.Event()
    take = part.take

    def slow(optimizer: torch.optim.Optimizer) -> None:
        begun.set()
        go.wait(60)
        take(optimizer)

    part.take = slow  # type: ignore[method-assign]
    assert pending.gradient("0.weight") is weight.grad is not None
    threads = [threading.Thread(target=pending.apply, args=("0.weight",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    threading.Timer(0.02, go.set).start()
    pending.finish()
    assert pending.gradient("0.weight") is weight.grad is None
    for thread in threads:
        thread.join(60)
    steps = [float(state["step"]) for state in trainer.optimizer.state.values()]
    assert steps == [1.0] * 6
    assert list(trainer.optimizer.state) == list(trainer.program.model.parameters())


# --- a barrier where it has to be one ---------------------------------------------------------------------------------


class _Own(torch.optim.SGD):
    pass


def test_what_couples_parameters_is_named() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    tested = {type(make([nn.Parameter(torch.zeros(2)) for _ in range(3)])) for make in OPTIMIZERS.values()}
    assert tested == ALONE.keys()
    assert coupling(_Own(parameters)) == "_Own may couple parameters"
    assert coupling(torch.optim.LBFGS(parameters)) == "LBFGS may couple parameters"
    optimizer = torch.optim.SGD(parameters)
    assert coupling(optimizer) == ""
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # replaces the step by one that counts
    assert coupling(optimizer) == ""
    for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
        handle = register(lambda *_: None)
        assert coupling(optimizer) == "SGD has step hooks, which see all parameters"
        handle.remove()
    handle = register_optimizer_step_post_hook(lambda *_: None)
    assert "step hooks" in coupling(optimizer)
    handle.remove()
    with torch.inference_mode():
        assert "inference mode" in coupling(optimizer)
    assert coupling(optimizer) == ""
    optimizer.step = lambda: None  # type: ignore[assignment, method-assign]
    assert coupling(optimizer) == "the step of this SGD was replaced"


def clipped(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Gradients clipped by their norm over all parameters."""
    optimizer = torch.optim.SGD(parameters, lr=0.05)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(parameters, 0.1)

    optimizer.register_step_pre_hook(clip)
    return optimizer


@pytest.mark.parametrize("make", [clipped, lambda p: _Own(p, lr=0.05, momentum=0.9)])
def test_optimizers_that_couple_parameters_are_a_barrier(make: Make, applied: list[str]) -> None:
    serial, threaded = (trainer_of("auto", make, ways) for ways in ("serial", "threads"))
    for trainer in (serial, threaded):
        trainer.fit(batches("auto", 4), 1)
    assert digest(serial) == digest(threaded)
    assert threaded.pipeline == f"barrier: {coupling(threaded.optimizer)}"
    assert serial.pipeline == "barrier: a step's tasks run one after the other"
    assert not applied


def test_programs_that_take_no_updates_are_a_barrier() -> None:
    program = StandIn(nn.Linear(2, 2))
    trainer = Trainer(program, torch.optim.SGD(program.model.parameters()), progress=False)
    assert trainer.pipeline == "barrier: the program takes no updates"
    x = torch.randn(4, 6)
    estimator = onward.LikelihoodRatio(sampling="error", copies=2)
    sampled = onward.compile(nn.Linear(6, 3), x, loss=F.cross_entropy, estimator=estimator, workers=2)
    trainer = Trainer(sampled, torch.optim.SGD(sampled.model.parameters()), progress=False)
    assert trainer.pipeline == "barrier: a clean run draws the samples before a step's tasks"


def judge(fastest: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one way measure faster than the others."""
    tell = Trial.tell
    monkeypatch.setattr(Trial, "tell", lambda self, way, _: tell(self, way, 1.0 if way is fastest else 2.0))


@pytest.mark.parametrize("fastest", Way)
def test_what_measures_fastest_is_kept(fastest: Way, applied: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And if that is not the chase, updates are done before the step again. No bit changes on the way."""
    case, steps = "layerwise", 3 * TRIALS + 6  # of one kind
    trainer = trainer_of(case, OPTIMIZERS["Adam"], "threads")
    program = trainer.program
    assert isinstance(program, onward.Program)
    executor = program.executor
    assert isinstance(executor, ThreadedExecutor)
    executor.concurrent = None
    judge(fastest, monkeypatch)
    trainer.fit(batches(case, steps), 1)
    assert digest(trainer) == after(steps, case, OPTIMIZERS["Adam"])
    chases = fastest is Way.CHASE
    assert executor.chosen(perturbed=True, updated=True) is chases
    assert program.waits() == ("" if chases else f"{fastest.value} measured faster")
    assert executor.chosen(perturbed=True) is (None if chases else fastest is Way.SIDE_BY_SIDE)
    assert trainer.pipeline == ("chase" if chases else f"barrier: {fastest.value} measured faster")
    # in a row while that is measured by task: in the others they go before, or are tasks
    assert len(applied) == (WARM_UP + TRIALS + (5 if chases else 0)) * 6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "thread" in program.waits()
    executor.concurrent = False
    assert trainer.pipeline == "barrier: a step's tasks run one after the other"


@pytest.mark.parametrize("fastest", [Way.SIDE_BY_SIDE, Way.CHASE])
def test_streams_keep_what_measures_fastest(fastest: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of either kind of step; until then both go on."""
    trainer = trainer_of("auto", OPTIMIZERS["Adam"], "streams")
    program = trainer.program
    assert isinstance(program, onward.Program)
    executor = program.executor
    assert isinstance(executor, StreamedExecutor)
    executor.chases = None
    judge(fastest, monkeypatch)
    trainer.fit(batches("auto", 2 * TRIALS), 1)
    assert trainer.pipeline == "chase"  # so far
    program.next_probe = 1 << 30  # steps without a perturbed run
    trainer.fit(batches("auto", 3 * TRIALS), 1)
    late = f"{fastest.value} measured faster"
    assert program.waits() == ("" if fastest is Way.CHASE else late)
    mixed = f"chase; in steps without a perturbed run barrier: {late}"
    assert trainer.pipeline == ("chase" if fastest is Way.CHASE else mixed)
    executor.chases = False
    assert trainer.pipeline == f"barrier: {Way.SIDE_BY_SIDE.value} measured faster"


def test_a_barrier_may_have_two_reasons() -> None:
    trainer = trainer_of("auto", OPTIMIZERS["Adam"], "threads")
    executor: Any = trainer.program.executor  # type: ignore[attr-defined]
    executor.concurrent = None
    executor._trials[True, True].choice, executor._trials[False, True].choice = Way.IN_A_ROW, Way.SIDE_BY_SIDE
    assert trainer.pipeline == (
        "barrier: one after the other measured faster; in steps without a perturbed run barrier: side by side, "
        "behind all updates measured faster"
    )
    trainer.optimizer.register_step_pre_hook(lambda *_: None)  # which are a barrier anyway
    assert trainer.pipeline.startswith("barrier: one after the other")


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
