"""When the tasks of a step run, given what each costs: the longest chain, what no schedule beats, and a schedule.

The schedule is list scheduling: a worker that is free takes, of the tasks that wait for nothing any more, the one with
the longest way to the end (`priorities`). It is never longer than ``2 - 1 / workers`` times the shortest (Graham 1969).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Protocol

from .timeline import Span, Timeline


class Node(Protocol):
    """What is scheduled: a task of a step (`tasks.Task`), or of several (`pipeline.PipelineTask`)."""

    @property
    def name(self) -> str:
        """As a timeline shows it."""
        ...

    @property
    def after(self) -> tuple[int, ...]:
        """The positions of what has to be done before; all are smaller than its own."""
        ...


def priorities(tasks: Sequence[Node], costs: Sequence[float]) -> tuple[float, ...]:
    """Seconds of the longest path from the beginning of each task to the end of the step."""
    longest = [0.0] * len(tasks)  # over what waits for the task; then the task's own cost comes on top
    for position in reversed(range(len(tasks))):
        longest[position] += costs[position]
        for before in tasks[position].after:
            longest[before] = max(longest[before], longest[position])
    return tuple(longest)


def critical_path(tasks: Sequence[Node], costs: Sequence[float]) -> tuple[float, tuple[int, ...]]:
    """Seconds and positions of the longest chain of tasks that wait for each other; of several the first in the plan.

    No number of workers makes a step shorter.
    """
    if not tasks:
        return 0.0, ()
    ways, waiting = priorities(tasks, costs), followers(tasks)
    path = [max(range(len(tasks)), key=ways.__getitem__)]
    while waiting[path[-1]]:
        path.append(max(waiting[path[-1]], key=ways.__getitem__))
    return ways[path[0]], tuple(path)


def lower_bound(tasks: Sequence[Node], costs: Sequence[float], workers: int) -> float:
    """Seconds in which `workers` cannot do better: the critical path, or an equal share of all work each."""
    return max(critical_path(tasks, costs)[0], sum(costs) / workers)


def followers(tasks: Sequence[Node]) -> list[list[int]]:
    """For each task the positions of those that wait for it, in the plan's order."""
    found: list[list[int]] = [[] for _ in tasks]
    for position, task in enumerate(tasks):
        for before in task.after:
            found[before].append(position)
    return found


def simulate(tasks: Sequence[Node], costs: Sequence[float], workers: int, *, overhead: float = 0.0) -> Timeline:
    """The step on `workers`, by list scheduling; ties go to the plan's order and to the first worker that is free.

    Args:
        tasks: of a plan, in its order.
        costs: seconds of each task.
        workers: how many run side by side.
        overhead: seconds a worker spends on taking a task before it begins.
    """
    ways, waiting = priorities(tasks, costs), followers(tasks)
    missing = [len(task.after) for task in tasks]
    ready = [(-ways[position], position) for position, count in enumerate(missing) if not count]
    heapq.heapify(ready)
    idle = list(range(workers))
    running: list[tuple[float, int, int]] = []  # end, worker, position
    spans: list[Span] = []
    now = 0.0
    while ready or running:
        while ready and idle:
            _, position = heapq.heappop(ready)
            worker = heapq.heappop(idle)
            begin = now + overhead
            spans.append(Span(tasks[position].name, worker, begin, begin + costs[position]))
            heapq.heappush(running, (spans[-1].end, worker, position))
        now = running[0][0]
        while running and running[0][0] == now:  # all that end now, before anything starts
            _, worker, done = heapq.heappop(running)
            heapq.heappush(idle, worker)
            for follower in waiting[done]:
                missing[follower] -= 1
                if not missing[follower]:
                    heapq.heappush(ready, (-ways[follower], follower))
    return Timeline(tuple(spans), now, workers)
