"""The threaded executor: the serial one's bits in any order, and what is left after an error."""

from __future__ import annotations

import contextvars
import copy
import gc
import os
import random
import threading
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executor_cases import (
    CASES,
    Ratio,
    batch,
    check_that_failed_steps_leave_nothing,
    compiled_for,
    mlp,
    model_for,
    same,
    train,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import onward
from onward.passes.errors import NonFiniteLossError, OptionError
from onward.runtime.execution import threads as threading_module
from onward.runtime.execution.executor import SerialExecutor
from onward.runtime.execution.step import Step
from onward.runtime.execution.threads import ThreadedExecutor
from onward.runtime.execution.trial import TRIALS, Trial, Way
from onward.runtime.plan import Action, Gradient, Perturb

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(case: str, workers: int = 2, loss: Any = F.cross_entropy) -> tuple[onward.Program, onward.Program]:
    """The same program for the serial and the threaded executor."""
    serial = onward.Program(model_for(case), compiled_for(case), loss, 3)
    threaded = onward.Program(model_for(case), serial.compiled, loss, 3, workers=workers)
    assert isinstance(threaded.executor, ThreadedExecutor)
    threaded.executor.concurrent = True
    return serial, threaded


@pytest.mark.parametrize("case", CASES)
def test_concurrent_steps_have_the_serial_bits(case: str) -> None:
    serial, threaded = pair(case, workers=3)
    assert same(train(serial, case, 4), train(threaded, case, 4))


def test_no_order_of_the_tasks_changes_a_bit_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 steps, each of its tasks held up at random before and after (up to 2 ms; a task takes 0.1)."""
    delays = random.Random(5)

    def delayed(self: SerialExecutor, step: Step, action: Action, worker: int) -> None:
        time.sleep(delays.random() ** 4 * 0.002)
        do(self, step, action, worker)
        time.sleep(delays.random() ** 4 * 0.002)

    cases = ("auto", "layerwise in chunks", "joint, a copy's own captures, in chunks", "shrunk", "shared weights")
    expected, programs = {}, {}
    for case in cases:
        serial, programs[case] = pair(case, workers=4)
        expected[case] = train(serial, case, 40)
    do = SerialExecutor.do
    monkeypatch.setattr(ThreadedExecutor, "do", delayed)
    found: dict[str, list[Tensor]] = {}
    worker = threading.Thread(target=lambda: found.update({c: train(programs[c], c, 40) for c in cases}), daemon=True)
    worker.start()
    worker.join(240)
    assert not worker.is_alive(), "a step hangs"
    for case in cases:
        assert same(expected[case], found[case]), case


def test_tasks_do_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two gradients meet at a barrier that one alone would never pass."""
    _, program = pair("auto")
    barrier, do = threading.Barrier(2), SerialExecutor.do

    def meeting(self: SerialExecutor, step: Step, action: Action, worker: int) -> None:
        if isinstance(action, Gradient) and action.site in (0, 1):
            barrier.wait(60)
        do(self, step, action, worker)

    monkeypatch.setattr(ThreadedExecutor, "do", meeting)
    program.step(*batch())


class _OwnError(Exception):
    pass


@pytest.mark.parametrize("failing", [Gradient, Perturb])
def test_an_error_in_a_task_leaves_all_as_it_was(failing: type, monkeypatch: pytest.MonkeyPatch) -> None:
    case = "batch statistics"
    serial, program = pair(case)
    assert same(train(serial, case, 2), train(program, case, 2))
    before = copy.deepcopy([program.state_dict(), program.model.state_dict(), program.forwards])
    gradients = [p.grad.clone() for p in program.model.parameters() if p.grad is not None]
    do = SerialExecutor.do

    def broken(self: SerialExecutor, step: Step, action: Action, worker: int) -> None:
        if isinstance(action, failing):
            raise _OwnError(str(action))
        do(self, step, action, worker)

    with monkeypatch.context() as patched:
        patched.setattr(ThreadedExecutor, "do", broken)
        with pytest.raises(_OwnError):
            program.step(*batch())
    after = [program.state_dict(), program.model.state_dict(), program.forwards]
    for mine, theirs in zip(before, after, strict=True):
        assert str(mine) == str(theirs)
    assert same(gradients, [p.grad for p in program.model.parameters() if p.grad is not None])
    assert same(train(serial, case, 2), train(program, case, 2))  # and it goes on as if nothing had been


def test_of_several_errors_the_plans_first_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    _, program = pair("auto")
    barrier, do = threading.Barrier(2), SerialExecutor.do

    def broken(self: SerialExecutor, step: Step, action: Action, worker: int) -> None:
        if isinstance(action, Gradient) and action.site in (0, 1):
            barrier.wait(60)
            time.sleep(0.05 * (1 - action.site))  # the plan's first is the later one
            raise _OwnError(str(action))
        do(self, step, action, worker)

    monkeypatch.setattr(ThreadedExecutor, "do", broken)
    with pytest.raises(_OwnError, match="G0"):
        program.step(*batch())


def test_a_loss_that_is_not_finite_is_named_as_by_the_serial_executor() -> None:
    serial, threaded = pair("layerwise", loss=lambda output, target: output.sum(1) * float("nan"))
    messages = []
    for program in (serial, threaded):
        with pytest.raises(NonFiniteLossError) as caught:
            program.step(*batch())
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_ctrl_c_waits_for_the_running_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = "auto"
    serial, program = pair(case)
    calls, real, do = [0], threading_module.wait, SerialExecutor.do
    running: list[Action] = []

    def interrupted(workers: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            time.sleep(0.01)  # some tasks have started
            raise KeyboardInterrupt
        return real(workers)

    def slow(self: SerialExecutor, step: Step, action: Action, worker: int) -> None:
        running.append(action)
        time.sleep(0.03)
        do(self, step, action, worker)
        running.remove(action)

    with monkeypatch.context() as patched:
        patched.setattr(threading_module, "wait", interrupted)
        patched.setattr(ThreadedExecutor, "do", slow)
        with pytest.raises(KeyboardInterrupt):
            program.step(*batch())
        assert not running
    assert program.step_count == 0
    assert same(train(serial, case, 2), train(program, case, 2))


def test_the_loss_is_called_by_one_worker_at_a_time() -> None:
    inside = [0]

    def loss(output: Tensor, target: Tensor) -> Any:
        inside[0] += 1
        assert inside[0] == 1
        time.sleep(0.002)
        inside[0] -= 1
        return F.cross_entropy(output, target, reduction="none").numpy()

    _, program = pair("layerwise in chunks", workers=4, loss=loss)
    program.step(*batch())


@pytest.mark.parametrize("among", [tuple(Way), tuple(Way)[:2]])
def test_the_fastest_way_is_kept(among: tuple[Way, ...]) -> None:
    for fastest in among:
        trial = Trial(among)
        ways = []
        while trial.choice is None:
            ways.append(trial.next())
            trial.tell(ways[-1], 1.0 if ways[-1] is fastest else 2.0)
        assert trial.choice is fastest
        assert ways == list(among) * TRIALS
        assert trial.next() is fastest


@pytest.mark.parametrize(
    ("seconds", "kept"),
    [
        ((1.0, 0.96, 0.96), 0),
        ((1.0, 0.94, 0.91), 1),
        ((1.0, 0.94, 0.88), 2),
        ((1.0, 0.97, 0.94), 2),
        ((1.0, 2.0, 3.0), 0),
    ],
)
def test_a_way_that_is_hardly_faster_than_a_simpler_one_is_not_kept(seconds: tuple[float, ...], kept: int) -> None:
    trial = Trial(tuple(Way))
    while trial.choice is None:
        way = trial.next()
        trial.tell(way, seconds[trial.ways.index(way)])
    assert trial.choice is tuple(Way)[kept]


def test_a_program_decides_after_its_first_steps_without_changing_a_bit() -> None:
    case = "layerwise"  # all its steps are of one kind
    serial, program = pair(case)
    assert isinstance(program.executor, ThreadedExecutor)
    program.executor.concurrent = None
    mine = train(program, case, 2 * TRIALS - 1)
    assert program.executor.chosen(perturbed=True) is None
    assert same(train(serial, case, 2 * TRIALS - 1), mine)
    assert same(train(serial, case, 4), train(program, case, 4))
    assert program.executor.chosen(perturbed=True) is not None


def test_intra_op_threads_are_divided_and_given_back() -> None:
    torch.set_num_threads(4)
    _, program = pair("auto")
    assert isinstance(program.executor, ThreadedExecutor)
    assert program.executor.intra_op == 2
    seen = []

    def loss(output: Tensor, target: Tensor) -> Any:
        seen.append(torch.get_num_threads())
        return F.cross_entropy(output, target, reduction="none").numpy()

    program = onward.Program(program.model, program.compiled, loss, 0, workers=2)
    assert isinstance(program.executor, ThreadedExecutor)
    for concurrent in (True, False):
        program.executor.concurrent = concurrent
        program.step(*batch())
        assert torch.get_num_threads() == 4
    assert set(seen) == {2}


def test_inside_autocast_tasks_run_on_the_callers_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    _, program = pair("layerwise")
    names, do = set(), SerialExecutor.do

    def named(self: SerialExecutor, step: Step, action: Action, worker: int) -> None:
        names.add(threading.current_thread().name)
        do(self, step, action, worker)

    monkeypatch.setattr(ThreadedExecutor, "do", named)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        program.step(*batch())
    assert names == {threading.current_thread().name}
    program.step(*batch())
    assert any(name.startswith("onward") for name in names)


def test_forks_start_threads_of_their_own() -> None:
    _, program = pair("auto")
    program.step(*batch())
    child = os.fork()
    if child == 0:
        finished = threading.Thread(target=program.step, args=batch(), daemon=True)
        finished.start()
        finished.join(60)
        os._exit(int(finished.is_alive()))
    assert os.waitpid(child, 0)[1] == 0


class Averaging(nn.Module):
    """Moves a buffer behind its last layer: a stage that no output needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("average", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(self.first(x)))
        self.average.copy_(0.9 * self.average + 1)
        return result


def test_buffers_that_no_output_needs_move_too() -> None:
    for estimator in (Ratio(copies=4), Ratio.feedback_learned(copies=2, warmup=0)):
        torch.manual_seed(0)
        models = [Averaging()]
        models.append(copy.deepcopy(models[0]))
        serial = onward.compile(models[0], batch()[0], loss=F.cross_entropy, estimator=estimator)
        threaded = onward.Program(models[1], serial.compiled, F.cross_entropy, 0, workers=3)
        threaded.executor.concurrent = True  # type: ignore[attr-defined]
        for _ in range(20):
            for program in (serial, threaded):
                program.step(*batch())
            assert float(models[0].average) == float(models[1].average) != 0


def test_a_failed_step_leaves_nothing_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    _, program = pair("layerwise", loss=lambda output, target: output.sum(1) * float("nan"))
    check_that_failed_steps_leave_nothing(program, monkeypatch)


def test_the_loss_sees_the_callers_context() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen = set()

    def loss(output: Tensor, target: Tensor) -> Any:
        seen.add((variable.get(), threading.current_thread() is threading.main_thread()))
        return F.cross_entropy(output, target, reduction="none").numpy()

    _, program = pair("layerwise", loss=loss)
    variable.set("mine")
    program.step(*batch())
    assert seen == {("mine", False)}
    seen.clear()
    with FlopCounterMode(display=False) as counter:  # a mode of this thread
        program.step(*batch())
    assert seen == {("mine", True)}
    assert counter.get_total_flops() > 0


def test_threads_end_with_their_program() -> None:
    gc.collect()
    before = threading.active_count()
    for _ in range(3):
        _, program = pair("auto")
        for _ in range(50):
            program.step(*batch())
        assert threading.active_count() <= before + 2  # those of programs before may end meanwhile
        del program
        gc.collect()
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before


@pytest.mark.parametrize("workers", [0, -1, 1.5, True])
def test_workers_are_a_number(workers: Any) -> None:
    with pytest.raises(OptionError, match="workers="):
        onward.compile(mlp(), batch()[0], loss=F.cross_entropy, workers=workers)


def test_actions_are_recorded_with_their_worker_and_times() -> None:
    serial, threaded = pair("auto", workers=2)
    for program in (serial, threaded):
        seen: list[tuple[str, int, float, float]] = []
        program.executor.record = lambda *span: seen.append(span)  # noqa: B023
        program.step(*batch())
        assert sorted(span[0] for span in seen) == sorted(str(action) for action in program.executor.plan)
        assert all(worker in (0, 1) and start <= end for _, worker, start, end in seen)
