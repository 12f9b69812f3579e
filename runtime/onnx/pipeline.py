"""Steps by one model a task, side by side where they do not wait for each other: in pipeline order.

The step after begins while one runs: its first stage starts as soon as the first layer's weights are updated, and
chases the updates down the network. Nothing is stale: a task reads exactly what the serial order would give it, so the
result does not depend on the number of workers.
"""

from __future__ import annotations

import heapq
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ...passes.errors import FolderError
from .folder import COUNTERS, Folder, TaskFile
from .fused import State, StepInput, StepResult
from .session import Device, Model, Value, number

WINDOW = 2
"""Steps in progress at once."""

ORDER = 10_000
"""Tasks whose order of ends is kept."""


@dataclass
class _Step:
    """A step in progress."""

    given: StepInput
    place: int
    before: dict[str, Value] = field(default_factory=dict)
    after: dict[str, Value] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    waiting: dict[int, int] = field(default_factory=dict)
    """By task, how many of its keys are still to come."""
    readers: dict[str, list[int]] = field(default_factory=dict)
    unfinished: int = 0
    perturbed: bool | None = None
    """Whether it has perturbed runs, once that is known."""


class TaskSteps:
    """Runs the tasks' models on worker threads."""

    def __init__(self, folder: Folder, device: Device, workers: int = 1, threads: int = 0) -> None:
        self.folder, self.device, self.workers = folder, device, workers
        own = threads or int(workers > 1)  # side by side, tasks share the cores
        self.models = [Model(task.file, device, own, alone=False) for task in folder.tasks]
        for model, task in zip(self.models, folder.tasks, strict=True):
            model.check(task.reads, task.writes)
        self.locks = [threading.Lock() for _ in self.models]
        self.renewing: dict[str, list[str]] = {}
        for key, new in folder.new.items():
            self.renewing.setdefault(new, []).append(key)
        perturbed = [task for task in folder.tasks if task.perturbed]
        self.learned = {key for task in perturbed for key in task.writes if key in self.renewing}
        """Keys of what perturbed runs renew."""
        self.order: deque[tuple[int, str]] = deque(maxlen=ORDER)
        """The last tasks of the last run in the order of their ends: step and name."""

    def run(self, state: State, inputs: Iterable[StepInput], seed: int) -> Generator[StepResult, None, None]:
        """The result of each step, the first from `state`; ends behind one that is not finite."""
        with ThreadPoolExecutor(self.workers, "onward") as pool:
            yield from _Run(self, pool, seed).steps(state, inputs)


class _Run:
    """The steps of one call."""

    def __init__(self, owner: TaskSteps, pool: ThreadPoolExecutor, seed: int) -> None:
        self.owner, self.pool, self.seed = owner, pool, seed
        self.folder = owner.folder
        self.changed = threading.Condition()
        self.steps_in_progress: list[_Step] = []
        self.ready: list[tuple[int, int]] = []
        self.running = 0
        self.error: BaseException | None = None
        self.failed = sys.maxsize
        """Place of the step that it is of; those before it are finished."""
        self.by_place: dict[int, _Step] = {}
        owner.order.clear()

    def steps(self, state: State, inputs: Iterable[StepInput]) -> Generator[StepResult, None, None]:
        source = iter(inputs)
        place, more = 0, True
        last = dict(state)
        try:
            while True:
                with self.changed:
                    while more and self.error is None and len(self.steps_in_progress) < WINDOW:
                        given = next(source, None)
                        if given is None:
                            more = False
                            break
                        self._begin(given, place, last if not self.steps_in_progress else None)
                        place += 1
                    if not self.steps_in_progress:
                        return
                    first = self.steps_in_progress[0]
                    while (first.unfinished or first.perturbed is None) and first.place < self.failed:
                        self._start_ready()
                        if not self.running:
                            raise FolderError(f"{self.folder.path}: the step's tasks wait for each other.")
                        self.changed.wait()
                    if self.error is not None and first.place >= self.failed:
                        raise self.error
                    finite = bool(number(first.values["finite"]))
                    loss = float(number(first.values["loss"]))
                    last = dict(first.after) if finite else dict(first.before)
                    del self.by_place[self.steps_in_progress.pop(0).place]
                    self._start_ready()
                yield StepResult(last, loss, finite)
                if not finite:
                    return
        finally:
            with self.changed:
                self.error, self.failed = self.error or _StoppedError(), -1
                self.ready.clear()
                while self.running:
                    self.changed.wait()

    def _begin(self, given: StepInput, place: int, state: State | None) -> None:
        """A step whose tasks wait for what they read."""
        device = self.owner.device
        step = _Step(given, place)
        for index, task in enumerate(self.folder.tasks):
            if not task.perturbed:
                self._expect(step, index, task)
        self.by_place[place] = step
        self.steps_in_progress.append(step)
        own = {key: device.value(array) for key, array in given.batch.items()}
        own["runtime:key"] = device.value(np.array([self.seed, given.number], np.int64))
        own["runtime:step"] = device.value(np.array(given.number, np.int64))
        own["runtime:lr"] = device.value(np.array(given.lr, np.float32))
        for key, value in own.items():
            self._deliver(step, key, value)
        if state is not None:
            known: Mapping[str, Value] = state
        else:
            known = dict(self.by_place[place - 1].after)  # what the step before has renewed already
        for key, value in known.items():
            self._give(step, key, value)
        if self.folder.always:
            self._decide(step, True)

    def _expect(self, step: _Step, index: int, task: TaskFile) -> None:
        missing = [key for key in task.reads if key not in step.values]
        step.waiting[index] = len(missing)
        step.unfinished += 1
        for key in missing:
            step.readers.setdefault(key, []).append(index)
        if not missing:
            heapq.heappush(self.ready, (step.place, index))

    def _give(self, step: _Step, key: str, value: Value) -> None:
        """A key of the state that a step starts from."""
        step.before[key] = value
        if self.folder.new[key] == key:
            self._renew(step, key, value)
        self._deliver(step, key, value)
        if step.perturbed is False and self.folder.new[key] in self.owner.learned:
            self._deliver(step, self.folder.new[key], value)
        if not self.folder.always and step.perturbed is None and all(each in step.before for each in COUNTERS):
            taught, due = (int(number(step.before[each])) for each in COUNTERS)
            self._decide(step, taught < self.folder.warmup or step.given.number >= due)

    def _decide(self, step: _Step, perturbed: bool) -> None:
        """Whether the step has perturbed runs; if not, what they would have taught stays as it is."""
        step.perturbed = perturbed
        if perturbed:
            for index, task in enumerate(self.folder.tasks):
                if task.perturbed:
                    self._expect(step, index, task)
            return
        for key, value in list(step.before.items()):
            if self.folder.new[key] in self.owner.learned:
                self._deliver(step, self.folder.new[key], value)

    def _deliver(self, step: _Step, key: str, value: Value) -> None:
        """A value that has come: who waits for it, in this step and the next."""
        step.values[key] = value
        for index in step.readers.pop(key, ()):
            step.waiting[index] -= 1
            if not step.waiting[index]:
                heapq.heappush(self.ready, (step.place, index))
        for renewed in self.owner.renewing.get(key, ()):
            if renewed != key:
                self._renew(step, renewed, value)

    def _renew(self, step: _Step, key: str, value: Value) -> None:
        step.after[key] = value
        later = self.by_place.get(step.place + 1)
        if later is not None and key not in later.before:
            self._give(later, key, value)

    def _start_ready(self) -> None:
        while self.ready and self.running < self.owner.workers and self.ready[0][0] < self.failed:
            place, index = heapq.heappop(self.ready)
            self.running += 1
            self.pool.submit(self._do, self.by_place[place], index)

    def _do(self, step: _Step, index: int) -> None:
        try:
            with self.owner.locks[index]:
                found = self.owner.models[index](step.values)
            with self.changed:
                step.unfinished -= 1
                self.owner.order.append((step.place, self.folder.tasks[index].name))
                for key in self.folder.tasks[index].writes:
                    self._deliver(step, key, found[key])
        except BaseException as error:
            with self.changed:
                if step.place < self.failed:
                    self.error, self.failed = error, step.place
        with self.changed:
            self.running -= 1
            self._start_ready()
            self.changed.notify_all()


class _StoppedError(Exception):
    """Nobody asks for further steps."""
