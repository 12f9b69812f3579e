"""The executor of GPU streams: the tasks of a step side by side on one GPU, wherever none waits for another (`tasks`).

One host thread issues the tasks in the plan's order, each on the stream that `stream_plan` gave it; a GPU runs what is
on different streams at the same time as far as it has room. Sums keep the plan's order, so the bits are those of one
stream.

**Order.** All streams begin behind what the caller's stream has been given so far. A task waits for events of other
streams where the tasks' graph says so. In the end the caller's stream waits for all of them, and they for it.

**Memory.** torch's allocator gives freed memory back to the stream that asked for it, and knows of no other that may
still read it. So whatever a task made is lent (`lend`) to the streams of the tasks that read it, and the step's result
to the caller's stream; so is a gradient to the stream that updates a weight by it, which lets go of it. What else the
step was given is freed behind its end, when all streams are past it.

**Updates** of the weights are tasks of the next step where that is faster: one by one they give the host more to issue
than all of them at once. It gets measured; a step ends when the GPU has done it (below), so that times are whole.

**The host** issues a step without waiting for the GPU, but where it needs a number: see method.md, "What runs side by
side". Losses have to be finite; that is looked at once, when all tasks are issued and before anything is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, get_device_module

from ...compiler.program import CompiledModel
from ..feedback import FeedbackState
from ..finite import all_finite
from ..plan import Action, Error, Forward, Gradient, Learn, Perturb, Update
from ..schedule.costs import estimated_costs
from ..schedule.tasks import make_tasks
from .executor import SerialExecutor
from .step import Step, StepResult
from .stream_plan import StreamPlan, make_stream_plan
from .trial import Trial, Way


class StreamedExecutor(SerialExecutor):
    """Runs a plan's tasks on up to `streams` streams of the device that its tensors are on.

    All that it needs of a device is its module (``torch.get_device_module``): ``Stream``, ``current_stream`` and
    ``stream``. torch's module of the CPU has them too, and its streams run everything at once: there a step is the
    serial executor's.

    Attributes:
        streams: how many streams.
        chases: True or False: updates are tasks of the next step, or all done before it; None: as measured.

    A step that fails raises what the first of the failed tasks in the plan's order raised, or a loss before it that was
    not finite; the caller's stream then waits for all that has been issued.
    """

    def __init__(self, compiled: CompiledModel, sigmas: list[float], streams: int) -> None:
        super().__init__(compiled, sigmas)
        self.streams = streams
        self.chases: bool | None = None
        self._trials = {perturbed: Trial((Way.SIDE_BY_SIDE, Way.CHASE)) for perturbed in (True, False)}
        self._plans: dict[tuple[bool, bool], StreamPlan] = {}
        self._pools: dict[torch.device, list[Any]] = {}
        self._unchecked: list[tuple[Tensor, Callable[[], NoReturn]]] | None = None

    def stream_plan(self, samples: int, *, perturbed: bool, updated: bool = False) -> StreamPlan:
        """How a step with or without a perturbed run, and with or without updates, is issued; made for the first
        batch's number of samples, which changes costs and with them places, but no result."""
        kind = perturbed, updated
        if kind not in self._plans:
            tasks = make_tasks(self.compiled, self.plans[kind], in_flight=self.streams)
            costs = estimated_costs(self.compiled, tasks, samples)
            self._plans[kind] = make_stream_plan(tasks, costs, self.streams)
        return self._plans[kind]

    def waits(self, *, perturbed: bool) -> str:
        way = self._way(perturbed)
        return "" if way in (None, Way.CHASE) else f"{way.value} measured faster"

    def measures(self, *, perturbed: bool) -> bool:
        return self._way(perturbed) is None

    def _way(self, perturbed: bool) -> Way | None:
        """How steps with updates are run, None while that is being measured."""
        if self.chases is None:
            return self._trials[perturbed].choice
        return Way.CHASE if self.chases else Way.SIDE_BY_SIDE

    def execute(self, step: Step, plan: Sequence[Action]) -> None:
        updates, perturbed = step.given.updates, step.given.perturbed
        if updates is None:
            self._run(step, updated=False)
            return
        trial = self._trials[perturbed]
        way = self._way(perturbed) or trial.next()
        started = time.perf_counter()
        if way is Way.SIDE_BY_SIDE:
            self.begin(updates)
        self._run(step, updated=way is Way.CHASE)
        if self._way(perturbed) is None:
            trial.tell(way, time.perf_counter() - started)

    def _run(self, step: Step, *, updated: bool) -> None:
        device = step.given.device
        module = get_device_module(device)
        chosen = self.stream_plan(step.given.samples, perturbed=step.given.perturbed, updated=updated)
        if device not in self._pools:
            self._pools[device] = [module.Stream(device) for _ in range(self.streams)]
        streams = self._pools[device]
        caller = module.current_stream(device)
        self._unchecked = []
        try:
            try:
                used = [streams[number] for number in sorted({issue.stream for issue in chosen.issues})]
                with _joined(caller, used, both_ways=not self.captures()):
                    self._issue(step, chosen, streams, module)
            except Exception:
                self._check_now(caller)
                raise
            self._check_now(caller)
            for tensor in _of_result(step.result):
                lend(tensor, caller)
        finally:
            self._unchecked = None

    def demand_finite(self, values: Tensor, fail: Callable[[], NoReturn]) -> None:
        """In a step, look at them when it ends: to look now would be to wait for the GPU."""
        if self._unchecked is None:
            super().demand_finite(values, fail)
        else:
            self._unchecked.append((values, fail))

    def _check_now(self, caller: Any) -> None:
        """Raise for the first of the losses that are not finite, in the plan's order; one wait for all of them."""
        unchecked = self._unchecked or []
        for values, _ in unchecked:
            lend(values, caller)
        if not all_finite(*(values for values, _ in unchecked)):
            for values, fail in unchecked:
                super().demand_finite(values, fail)

    def _issue(self, step: Step, plan: StreamPlan, streams: Sequence[Any], module: Any) -> None:
        events: dict[int, Any] = {}
        for position, (task, issue) in enumerate(zip(plan.tasks, plan.issues, strict=True)):
            stream = streams[issue.stream]
            for before in issue.waits:
                stream.wait_event(events[before])
            if isinstance(task.action, Perturb):
                step.narrowed.pop(task.action.run, None)  # each chunk cuts its own: no other stream's may be unfinished
            elif isinstance(task.action, Update):
                _lend_gradient(step, task.action, stream)
            with module.stream(stream):
                self.do(step, task.action, issue.stream)
            for reader in plan.readers[position]:
                for tensor in _made(step, task.action):
                    lend(tensor, streams[reader])
            if issue.records:
                events[position] = stream.record_event()


def lend(tensor: Tensor, stream: Any) -> None:
    """Have the allocator keep a tensor's memory until a stream that did not ask for it is past what it is given now."""
    if tensor.device.type != "cpu":
        tensor.record_stream(stream)


@contextmanager
def _joined(caller: Any, streams: Sequence[Any], *, both_ways: bool) -> Iterator[None]:
    """Streams that begin behind what the caller's was given so far. In the end it waits for them, and they for it: then
    they are past everything that the step has read, whatever stream asked for its memory. A graph that is captured ends
    where all its branches have joined (not `both_ways`)."""
    begun = caller.record_event()
    for stream in streams:
        stream.wait_event(begun)
    try:
        yield
    finally:
        for stream in streams:
            caller.wait_event(stream.record_event())
        if both_ways:
            ended = caller.record_event()
            for stream in streams:
                stream.wait_event(ended)


def _made(step: Step, action: Action) -> Iterable[Tensor]:
    """The tensors that an action has left in the step for others to read."""
    found: list[Any]
    match action:
        case Forward(stage):
            found = [step.environment.get(key) for key in step.bound.stages[stage].outputs]
        case Error():
            found = [step.clean, step.error, step.environment.get("runtime:projected_error")]
        case Perturb(run, chunk, _):
            at = (run, chunk)
            found = [step.losses.get(at), step.responses.get(at), *step.perturbed.get(at, {}).values()]
            if step.narrowed.get(run) is not step.environment:
                found += step.narrowed.get(run, {}).values()
        case Learn():
            found = [*step.corrections.values(), *_of_feedback(step.result.feedback)]
        case Gradient(site, _):
            found = [step.result.gradients.get(name) for name in step.compiled.sites[site].parameters]
        case Update():  # a weight and its optimizer's state outlive the step
            found = []
    return [value for value in found if isinstance(value, Tensor)]


def _lend_gradient(step: Step, action: Update, stream: Any) -> None:
    """The gradient that an update reads and lets go of."""
    gradient = None if step.given.updates is None else step.given.updates.gradient(action.parameter)
    if gradient is not None:
        lend(gradient, stream)


def _of_result(result: StepResult) -> Iterator[Tensor]:
    yield from (leaf for leaf in result.output if isinstance(leaf, Tensor))
    yield result.losses
    yield from result.gradients.values()
    yield from result.buffers.values()
    yield from _of_feedback(result.feedback)


def _of_feedback(state: FeedbackState | None) -> list[Tensor]:
    return [] if state is None else state.tensors()
