"""What ran when on which worker: recorded from an executor or simulated, and as a trace to look into.

A trace is in Chrome's trace-event format, which Perfetto (https://ui.perfetto.dev) and ``chrome://tracing`` open.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..execution.executor import SerialExecutor

KINDS = {
    "F": "clean forward",
    "E": "losses",
    "P": "perturbed run",
    "L": "feedback learns",
    "G": "gradient",
    "U": "update",
}
"""What an action does, by the first letter of its name."""


@dataclass(frozen=True)
class Span:
    """One task of a step."""

    name: str
    """The action, as in the plan: ``"F0"``, ``"P0.1"``, ``"G2"``, ``"U:fc.weight"``."""
    worker: int
    start: float
    """Seconds from the step's start."""
    end: float
    """Seconds from the step's start."""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start

    @property
    def kind(self) -> str:
        """What it does, one of `KINDS`; ``"other"`` for a name that is no action's."""
        return KINDS.get(self.name[:1], "other")


@dataclass(frozen=True)
class Timeline:
    """One step."""

    spans: tuple[Span, ...]
    seconds: float
    """Of the whole step, what is between and around the tasks included."""
    workers: int

    @property
    def busy(self) -> float:
        """Seconds of all workers in tasks."""
        return sum(span.seconds for span in self.spans)

    @property
    def efficiency(self) -> float:
        """The share of the workers' time that is spent in tasks, in [0, 1]."""
        return self.busy / (self.workers * self.seconds) if self.seconds else 1.0

    @property
    def overlap(self) -> float:
        """Seconds in which two or more workers are in a task."""
        events = sorted([(span.start, 1) for span in self.spans] + [(span.end, -1) for span in self.spans])
        total, running, since = 0.0, 0, 0.0
        for moment, change in events:  # at the same moment, what ends comes first
            total += (moment - since) * (running > 1)
            running, since = running + change, moment
        return total


def record(executor: SerialExecutor, step: Callable[[], object], workers: int = 1) -> Timeline:
    """Call `step`, which runs the executor once, and record the tasks.

    On CUDA, where operations are only started, the times are those of starting them.
    """
    spans: list[Span] = []

    def keep(name: str, worker: int, start: float, end: float) -> None:
        spans.append(Span(name, worker, start - started, end - started))

    executor.record = keep
    started = time.perf_counter()
    try:
        step()
        seconds = time.perf_counter() - started
    finally:
        executor.record = None
    return Timeline(tuple(sorted(spans, key=lambda span: span.start)), seconds, workers)


def to_chrome(steps: Mapping[str, Sequence[Timeline]]) -> str:
    """Named series of steps as a trace: a process for each name, with a thread for each worker; within a process one
    step behind the other. Times are in microseconds, as the format has them."""
    events: list[dict[str, Any]] = []
    for process, (title, timelines) in enumerate(steps.items(), start=1):
        events.append(_name("process_name", title, process))
        for worker in range(max((timeline.workers for timeline in timelines), default=0)):
            events.append(_name("thread_name", f"worker {worker}", process, worker))
        begin = 0.0
        for number, timeline in enumerate(timelines):
            events += [
                {
                    "name": span.name,
                    "cat": span.kind,
                    "ph": "X",
                    "ts": 1e6 * (begin + span.start),
                    "dur": 1e6 * span.seconds,
                    "pid": process,
                    "tid": span.worker,
                    "args": {"step": number},
                }
                for span in timeline.spans
            ]
            begin += timeline.seconds
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, indent=1, ensure_ascii=False) + "\n"


def _name(what: str, name: str, process: int, thread: int = 0) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
