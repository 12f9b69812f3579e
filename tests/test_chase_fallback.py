"""Where a chase ends: steps that fail on the way, and what has to be, or measures as, a barrier."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chase_cases import OPTIMIZERS, Make, after, batches, delay, note_updates, trainer_of
from executor_cases import batch, compiled_for
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from training_run import StandIn, digest

import onward
from onward.passes.errors import BatchError, NonFiniteGradientError, NonFiniteLossError, OutOfMemoryError
from onward.runtime.execution import threads as threading_module
from onward.runtime.execution.executor import SerialExecutor
from onward.runtime.execution.step import Step
from onward.runtime.execution.streams import StreamedExecutor
from onward.runtime.execution.threads import ThreadedExecutor
from onward.runtime.execution.trial import TRIALS, WARM_UP, Trial, Way
from onward.runtime.plan import Action, Forward, Update, make_plan, with_updates
from onward.runtime.training.per_parameter import ALONE, PendingUpdates, coupling
from onward.runtime.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tasks of threads held up at random."""
    delay(monkeypatch)


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the updates that were tasks."""
    return note_updates(monkeypatch)


# --- what fails -------------------------------------------------------------------------------------------------------


class _OwnError(Exception):
    pass


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
    assert trainer.pipeline == "chase, while that is measured"
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
    assert trainer.pipeline == "chase, while that is measured"
    program.next_probe = 1 << 30  # steps without a perturbed run
    trainer.fit(batches("auto", 3 * TRIALS), 1)
    late = f"{fastest.value} measured faster"
    assert program.waits() == ("" if fastest is Way.CHASE else late)
    clean = "chase" if fastest is Way.CHASE else f"barrier: {late}"
    assert trainer.pipeline == f"chase, while that is measured; in steps without a perturbed run {clean}"
    executor.chases = False
    assert trainer.pipeline == f"barrier: {Way.SIDE_BY_SIDE.value} measured faster"


def test_a_program_that_waits_does_the_updates_it_is_given_first() -> None:
    """Whatever gives them to it, and however its executor runs the step."""
    serial, waiting = (trainer_of("auto", OPTIMIZERS["Adam"], "serial") for _ in range(2))
    serial.fit(batches("auto", 2), 1)
    program = waiting.program
    names = {id(parameter): name for name, parameter in program.model.named_parameters()}
    pending = None
    for inputs, target in batches("auto", 2):
        program.step(inputs, target, updates=pending)  # type: ignore[call-arg]
        pending = PendingUpdates(waiting.optimizer, names, program.trust())
        waiting.scheduler.step()  # type: ignore[union-attr]
    assert pending is not None
    pending.finish()
    assert all(map(torch.equal, program.model.parameters(), serial.program.model.parameters()))


def test_a_barrier_may_have_two_reasons() -> None:
    trainer = trainer_of("auto", OPTIMIZERS["Adam"], "threads")
    executor: Any = trainer.program.executor  # type: ignore[attr-defined]
    executor.concurrent = None
    executor._trials[True, True].choice, executor._trials[False, True].choice = Way.IN_A_ROW, Way.SIDE_BY_SIDE
    assert trainer.pipeline == (
        "barrier: one after the other measured faster; in steps without a perturbed run barrier: side by side, "
        "behind all updates measured faster"
    )
    trainer.optimizer.register_step_pre_hook(lambda *_: None)
    assert trainer.pipeline.startswith("barrier: one after the other")  # without the hook, too
    executor._trials[True, True].choice = executor._trials[False, True].choice = None
    assert trainer.pipeline == "barrier: Adam has step hooks, which see all parameters"
