"""The executor of CPU threads: the tasks of a step on several workers, wherever none waits for another (`tasks`).

Operations release Python's lock while they compute, so that two workers halve a step whose operations are large, and
slow down one whose operations are tiny. Which it is gets measured: the first steps are run each `Way` in turn, and the
fastest is kept. The result has the same bits any way, since no sum changes its order and every operation uses the
same number of intra-op threads: torch's own, divided among the workers. (Updates of the weights, which add nothing up,
use all of them where they go before the tasks.)
"""

from __future__ import annotations

import heapq
import operator
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from contextvars import copy_context
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...compiler.program import CompiledModel
from ..plan import Action, Update
from ..schedule.bounds import followers, priorities
from ..schedule.tasks import Task, make_tasks
from .executor import IN_A_ROW, SerialExecutor
from .precision import autocasting
from .step import Step, Updates
from .trial import WARM_UP, Trial, Way


class ThreadedExecutor(SerialExecutor):
    """Runs a plan's tasks on `workers` threads, or in their order on the caller's, whichever measures faster.

    Attributes:
        workers: how many threads.
        intra_op: threads of torch's operations in each.
        concurrent: True or False: run the tasks side by side or not; None: as measured.

    A step that fails (an error in a task, a loss that raises, Ctrl-C) waits for the tasks that run, starts no other,
    and raises what the first of the failed tasks in the plan's order raised. The user's loss is called by one worker at
    a time; a second Ctrl-C does not wait. Context variables are the caller's. Where something of the caller's thread
    counts, ``torch.autocast``, a mode like ``torch.device(…)`` or a FLOP counter, or the stream of a GPU, its tasks run
    one after the other on that thread.
    """

    def __init__(self, compiled: CompiledModel, sigmas: list[float], workers: int) -> None:
        super().__init__(compiled, sigmas)
        self.workers = workers
        self.intra_op = max(1, torch.get_num_threads() // workers)
        self.concurrent: bool | None = None
        self._graphs = {
            kind: _Graph(make_tasks(compiled, plan, in_flight=workers)) for kind, plan in self.plans.items()
        }
        ways = tuple(Way)
        self._trials = {(perturbed, updated): Trial(ways[: 2 + updated]) for perturbed, updated in self.plans}
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    def threads(self) -> AbstractContextManager[None]:
        return intra_op_threads(self.intra_op)

    def execute(self, step: Step, plan: Sequence[Action]) -> None:
        if self.device.type != "cpu" or _of_this_thread():
            super().execute(step, plan)
            return
        updated = step.given.updates is not None
        way = self._way(step.given.perturbed, updated)
        if way is None:
            self._measure(step, plan, updated)
        else:
            self._run(step, plan, way)

    def begin(self, updates: Updates) -> None:
        with intra_op_threads(self.intra_op * self.workers):
            updates.finish()

    def waits(self, *, perturbed: bool) -> str:
        if self.device.type != "cpu" or self.concurrent is False:
            return IN_A_ROW
        if _of_this_thread():
            return "autocast, or a mode of the calling thread, keeps the tasks on that thread"
        way = self._way(perturbed, updated=True)
        return "" if way in (None, Way.CHASE) else f"{way.value} measured faster"

    def measures(self, *, perturbed: bool) -> bool:
        return self._way(perturbed, updated=True) is None and not self.waits(perturbed=perturbed)

    def chosen(self, *, perturbed: bool, updated: bool = False) -> bool | None:
        """Whether steps with or without a perturbed run, and with or without updates, go side by side, updates among
        them; None while that is being measured."""
        way = self._way(perturbed, updated)
        return None if way is None else way is (Way.CHASE if updated else Way.SIDE_BY_SIDE)

    def _way(self, perturbed: bool, updated: bool) -> Way | None:
        """How such steps are run, None while that is being measured."""
        trial = self._trials[perturbed, updated]
        return trial.choice if self.concurrent is None else trial.ways[-1 if self.concurrent else 0]

    def _measure(self, step: Step, plan: Sequence[Action], updated: bool) -> None:
        """One of the steps that are run each way in turn; in a row at first task by task, to know what each costs."""
        perturbed = step.given.perturbed
        trial, graph = self._trials[perturbed, updated], self._graphs[perturbed, updated]
        way = trial.next()
        started = time.perf_counter()
        if way is Way.IN_A_ROW and len(trial.seconds[way]) < WARM_UP:
            for task, costs in zip(graph.tasks, graph.costs, strict=True):
                begun = time.perf_counter()
                self.do(step, task.action, 0)
                costs.append(time.perf_counter() - begun)
            medians = [statistics.median(costs) for costs in graph.costs]
            self.prioritise(medians, perturbed=perturbed, updated=updated)
        else:
            self._run(step, plan, way)
        trial.tell(way, time.perf_counter() - started)
        if updated and trial.choice not in (None, Way.CHASE):  # from now on updates come before the step
            self._trials[perturbed, False].choice = trial.choice

    def prioritise(self, costs: Sequence[float], *, perturbed: bool, updated: bool = False) -> None:
        """Of the tasks that are ready take first the one with the longest way to the end, given the seconds of each, in
        the plan's order."""
        graph = self._graphs[perturbed, updated]
        graph.order = priorities(graph.tasks, costs)
        if updated:
            plain = [c for task, c in zip(graph.tasks, costs, strict=True) if not isinstance(task.action, Update)]
            self.prioritise(plain, perturbed=perturbed)

    def _run(self, step: Step, plan: Sequence[Action], way: Way) -> None:
        if way is Way.IN_A_ROW:
            super().execute(step, plan)
            return
        if step.given.updates is not None and way is Way.SIDE_BY_SIDE:
            self.begin(step.given.updates)
        self._run_concurrently(step, self._graphs[step.given.perturbed, way is Way.CHASE])

    def _run_concurrently(self, step: Step, graph: _Graph) -> None:
        if self._pool is None or self._process != os.getpid():  # threads do not survive a fork
            self._pool = ThreadPoolExecutor(self.workers, "onward", torch.set_num_threads, (self.intra_op,))
            self._process = os.getpid()
        step.given = replace(step.given, loss=_one_at_a_time(step.given.loss))
        run = _Run(self, step, graph)
        workers = [self._pool.submit(copy_context().run, run.work, number) for number in range(self.workers)]
        try:
            wait(workers)
        finally:  # Ctrl-C while waiting
            run.stop()
            wait(workers)
        if run.errors:
            failed = min(run.errors, key=operator.itemgetter(0))[1]
            run.errors.clear()
            try:
                raise failed
            finally:
                del failed  # its traceback holds this frame, and with it all that the step computed


class _Graph:
    """The tasks of a kind of step."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks, self.followers = tasks, followers(tasks)
        self.costs: list[list[float]] = [[] for _ in tasks]
        """Seconds of every task in the first serial steps."""
        self.order: Sequence[float] = [0.0] * len(tasks)
        """Of the tasks that are ready, those with the larger number go first: the longest way left, as measured."""


class _Run:
    """One step's tasks, shared by the workers."""

    def __init__(self, executor: ThreadedExecutor, step: Step, graph: _Graph) -> None:
        self.executor, self.step = executor, step
        self.tasks, self.followers, self.order = graph.tasks, graph.followers, graph.order
        self.missing = [len(task.after) for task in self.tasks]
        self.ready = [(-self.order[at], at) for at, count in enumerate(self.missing) if not count]
        heapq.heapify(self.ready)
        self.left = len(self.tasks)
        self.errors: list[tuple[int, BaseException]] = []
        self.changed = threading.Condition()

    def work(self, worker: int) -> None:
        """Take tasks that are ready, until none is left or one has failed."""
        with torch.inference_mode(False), torch.no_grad():  # of this thread
            while (position := self._next()) is not None:
                try:
                    self.executor.do(self.step, self.tasks[position].action, worker)
                except BaseException as error:
                    with self.changed:
                        self.errors.append((position, error))
                        self.left = 0
                        self.changed.notify_all()
                    return
                self._finish(position)

    def stop(self) -> None:
        """Start no further task."""
        with self.changed:
            self.left = 0
            self.changed.notify_all()

    def _next(self) -> int | None:
        with self.changed:
            while self.left and not self.ready:
                self.changed.wait()
            return heapq.heappop(self.ready)[1] if self.left else None

    def _finish(self, position: int) -> None:
        with self.changed:
            self.left = max(0, self.left - 1)  # 0 if another has failed meanwhile
            found = 0
            for follower in self.followers[position]:
                self.missing[follower] -= 1
                if not self.missing[follower]:
                    heapq.heappush(self.ready, (-self.order[follower], follower))
                    found += 1
            if not self.left:
                self.changed.notify_all()
            elif found > 1:
                self.changed.notify(found - 1)  # this worker takes one of them itself


def _one_at_a_time(loss: Callable[[list[Any], int, int], Tensor]) -> Callable[[list[Any], int, int], Tensor]:
    """The loss behind a lock: the user's need not be made for threads."""
    lock = threading.Lock()

    def locked(leaves: list[Any], copies: int, samples: int) -> Tensor:
        with lock:
            return loss(leaves, copies, samples)

    return locked


def _of_this_thread() -> bool:
    """Whether something is switched on in this thread that others would not see."""
    modes = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    return modes > 0 or bool(autocasting())


@contextmanager
def intra_op_threads(threads: int) -> Iterator[None]:
    """With that many threads for torch's operations."""
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
