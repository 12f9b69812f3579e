"""Which stream of a GPU a task is issued on, and which events it waits for: data, made before the step.

The host issues the tasks in the plan's order. What is on one stream runs in the order of issue; between streams a task
waits for an event of another only where the tasks' graph needs it and nothing that its stream has waited for before
implies it. With vector clocks that is exact: the clock of a task holds, by stream, the last task that is known to be
done when it begins (Fidge 1988, Mattern 1989).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..schedule.tasks import Task
from ..schedule.timeline import Span, Timeline

CROSSING = 5e-6
"""Seconds from the end of a task to the beginning of what waits for its event on another stream: a guess."""

Clock = tuple[int, ...]
"""By stream, the position of the last task that is done, -1 for none; all before it on that stream are done too."""


@dataclass(frozen=True)
class Issue:
    """How a task is issued."""

    stream: int
    waits: tuple[int, ...] = ()
    """Positions of tasks on other streams whose events its stream waits for first."""
    records: bool = False
    """Whether an event is recorded behind it, because some task waits for one."""


@dataclass(frozen=True)
class StreamPlan:
    """Tasks in the order of issue, which is that of the plan, and how each is issued."""

    tasks: tuple[Task, ...]
    issues: tuple[Issue, ...]
    streams: int
    """How many there may be; a plan need not use them all."""

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """For each task the other streams with a task that waits for it, and so may read what it made."""
        found: list[set[int]] = [set() for _ in self.tasks]
        for task, issue in zip(self.tasks, self.issues, strict=True):
            for before in task.after:
                found[before].add(issue.stream)
        return tuple(tuple(sorted(some - {issue.stream})) for some, issue in zip(found, self.issues, strict=True))


def make_stream_plan(tasks: Sequence[Task], costs: Sequence[float], streams: int) -> StreamPlan:
    """Give each task, in turn, the stream on which it begins first.

    If several, a stream whose last task it waits for, which saves an event, then the first. A function of its arguments
    alone; the costs (seconds) only place tasks and never change what they compute.
    """
    free, last = [0.0] * streams, [-1] * streams
    ends: list[float] = []
    places: list[int] = []
    for position, task in enumerate(tasks):
        begins = [_begin(task, stream, free, ends, places) for stream in range(streams)]
        place = min(range(streams), key=lambda stream: (begins[stream], last[stream] not in task.after, stream))
        places.append(place)
        ends.append(begins[place] + costs[position])
        free[place], last[place] = ends[-1], position
    return _with_events(tuple(tasks), places, streams)


def _begin(task: Task, stream: int, free: Sequence[float], ends: Sequence[float], places: Sequence[int]) -> float:
    """When a task can begin on a stream."""
    return max([free[stream], *(ends[one] + CROSSING * (places[one] != stream) for one in task.after)])


def _with_events(tasks: tuple[Task, ...], places: Sequence[int], streams: int) -> StreamPlan:
    """The fewest waits: of what a task needs and its stream does not know to be done, the rest follows from."""
    known: list[Clock] = [(-1,) * streams] * streams
    clocks: list[Clock] = []  # of each task, itself included: what its event implies
    waits: list[tuple[int, ...]] = []
    for position, (task, place) in enumerate(zip(tasks, places, strict=True)):
        needed = [one for one in task.after if known[place][places[one]] < one]
        chosen = [
            one for one in needed if not any(clocks[other][places[one]] >= one for other in needed if other != one)
        ]
        clock = _joined(known[place], *(clocks[one] for one in chosen))
        clocks.append(_at(clock, place, position))
        known[place] = clocks[-1]
        waits.append(tuple(chosen))
    awaited = {one for some in waits for one in some}
    issues = (Issue(place, waits[at], at in awaited) for at, place in enumerate(places))
    return StreamPlan(tasks, tuple(issues), streams)


def _joined(*clocks: Clock) -> Clock:
    return tuple(map(max, zip(*clocks, strict=True)))


def _at(clock: Clock, stream: int, position: int) -> Clock:
    return (*clock[:stream], position, *clock[stream + 1 :])


def check_stream_plan(plan: StreamPlan) -> None:
    """Prove that a plan orders all that the tasks' graph orders, with no wait and no event that could be left out.

    Raises:
        ValueError: names the task, and what is wrong.
    """
    known: list[Clock] = [(-1,) * plan.streams] * plan.streams
    clocks: list[Clock] = []
    names = [task.name for task in plan.tasks]
    for position, (task, issue) in enumerate(zip(plan.tasks, plan.issues, strict=True)):
        for one in issue.waits:
            if one >= position or not plan.issues[one].records:
                raise ValueError(f"{names[position]} waits for {names[one]}, which has recorded no event by then.")
        clock = _joined(known[issue.stream], *(clocks[one] for one in issue.waits))
        for one in task.after:
            if clock[plan.issues[one].stream] < one:
                raise ValueError(f"{names[position]} may begin before {names[one]} is done.")
        for one in issue.waits:
            others = (clocks[other] for other in issue.waits if other != one)
            if _joined(known[issue.stream], *others)[plan.issues[one].stream] >= one:
                raise ValueError(f"{names[position]} need not wait for {names[one]}: it is known to be done.")
        clocks.append(_at(clock, issue.stream, position))
        known[issue.stream] = clocks[-1]
    awaited = {one for issue in plan.issues for one in issue.waits}
    for position, issue in enumerate(plan.issues):
        if issue.records and position not in awaited:
            raise ValueError(f"nothing waits for the event of {names[position]}.")


def simulate_streams(plan: StreamPlan, costs: Sequence[float]) -> Timeline:
    """When the tasks run, each as soon as its stream and its events allow; the workers of the timeline are streams.

    Issuing takes no time here, and streams do not slow each other down: a bound for a GPU that has room for all.
    """
    free = [0.0] * plan.streams
    ends: list[float] = []
    spans: list[Span] = []
    for task, issue, cost in zip(plan.tasks, plan.issues, costs, strict=True):
        begin = max([free[issue.stream], *(ends[one] + CROSSING for one in issue.waits)])
        ends.append(begin + cost)
        free[issue.stream] = ends[-1]
        spans.append(Span(task.name, issue.stream, begin, ends[-1]))
    return Timeline(tuple(spans), max(ends, default=0.0), plan.streams)


def format_stream_plan(plan: StreamPlan) -> str:
    """A row a stream, a column a task, in the order of issue; ``G1<E`` waits for E's event, which ``E!`` records."""
    cells = [_cell(plan, position) for position in range(len(plan.tasks))]

    def row(stream: int) -> str:
        shown: Iterable[str] = (
            cell if issue.stream == stream else "." * len(cell) for cell, issue in zip(cells, plan.issues, strict=True)
        )
        return f"stream {stream}: {' '.join(shown)}"

    return "\n".join(row(stream) for stream in range(plan.streams))


def _cell(plan: StreamPlan, position: int) -> str:
    issue = plan.issues[position]
    waits = "<" + ",".join(plan.tasks[one].name for one in issue.waits) if issue.waits else ""
    return f"{plan.tasks[position].name}{waits}{'!' if issue.records else ''}"
