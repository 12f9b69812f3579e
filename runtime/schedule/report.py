"""What ``onward inspect --schedule`` knows of a program: its tasks, what they take, and how short a step could be.

A step is recorded task by task, on one worker for the costs and, if more are asked for, on those. Bounds and
simulations use the costs on one worker, and let as many perturbed runs be in memory as there are workers, as executors
do.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import networkx
import torch
from torch import nn

from ...compiler.program import CompiledModel
from ..execution.threads import ThreadedExecutor, intra_op_threads
from ..loss import Loss
from ..plan import Action, Error, Forward, Gradient, Learn, Perturb, Update
from ..program import Program
from .bounds import critical_path, lower_bound, simulate
from .costs import estimated_costs, measured_costs
from .pipeline import measured_updates, seconds_a_step
from .tasks import dependencies, make_tasks
from .timeline import Timeline, record

WARM_UP = 3
"""Steps before those that are recorded."""
RECORDED = 20
"""Steps recorded of each kind, on each number of workers."""
HAND_OVER = 1e-5
"""Seconds from the end of a task to the beginning of the next on the same worker, as simulated: locks and wake-ups."""
WORKERS = (1, 2, 4, 8)
"""Numbers of workers that bounds are shown for, beside the one that is asked for."""


@dataclass(frozen=True)
class TaskReport:
    """A task: what it does, what it waits for, what it takes."""

    name: str
    does: str
    after: tuple[str, ...]
    """All tasks that have to be done before."""
    waits_for: tuple[str, ...]
    """Of those, the ones that no other of them waits for: the rest follows."""
    measured: float
    """Seconds, the median of `RECORDED` steps on one worker."""
    modelled: float
    """Seconds, as `costs.estimated_costs` has it."""
    critical: bool
    """Whether it is on the critical path."""


@dataclass(frozen=True)
class WorkersReport:
    """A step on a number of workers; times in seconds, efficiencies in [0, 1]: the tasks' cost on one worker over the
    time of all workers."""

    workers: int
    lower_bound: float
    simulated: float
    simulated_efficiency: float
    recorded: float | None
    """Of the whole step, the median; None where it was not run."""
    recorded_efficiency: float | None
    pipelined: dict[str, float]
    """A step with Adam's updates among further ones, simulated, by when updates may begin (`pipeline.RULES`)."""


@dataclass(frozen=True)
class StepReport:
    """One kind of step."""

    perturbed: bool
    """Whether it has a perturbed run."""
    tasks: tuple[TaskReport, ...]
    total: float
    """Seconds of all tasks."""
    critical_path: tuple[str, ...]
    critical_seconds: float
    workers: tuple[WorkersReport, ...]
    timelines: dict[str, list[Timeline]]
    """``"recorded on 1 worker"``, …: every recorded step, or the one that was simulated."""


@dataclass(frozen=True)
class ScheduleReport:
    """A program's steps."""

    samples: int
    threads: int
    """Of torch's operations, in each worker."""
    asked: int
    """Workers that were asked for; the critical path is theirs."""
    steps: tuple[StepReport, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-serialisable values, of recorded steps the median one."""
        steps = [
            replace(step, timelines={k: [median_step(v)] for k, v in step.timelines.items()}) for step in self.steps
        ]
        return asdict(replace(self, steps=tuple(steps)))


def median_step(steps: Sequence[Timeline]) -> Timeline:
    """The one of median duration."""
    return sorted(steps, key=lambda timeline: timeline.seconds)[len(steps) // 2]


def examine_schedule(
    model: nn.Module, compiled: CompiledModel, loss: Loss, inputs: Any, target: Any, *, workers: int, seed: int = 0
) -> ScheduleReport:
    """Record steps of a compiled model on a batch, and schedule its tasks; the model stays as it is.

    Args:
        model, compiled, loss, seed: as for `Program`.
        inputs, target: a batch, as for `Program.step`.
        workers: on how many the step is recorded beside one, and simulated.
    """
    learned = compiled.estimator.feedback == "learned"
    if learned:  # steps without a perturbed run from the beginning
        compiled = replace(compiled, estimator=replace(compiled.estimator, warmup=0))
    model = copy.deepcopy(model)  # steps write gradients and buffers
    programs = [Program(model, compiled, loss, seed, workers=count) for count in sorted({1, workers})]
    samples = programs[0].bind(inputs, target)[0].samples
    for program in programs:
        if isinstance(program.executor, ThreadedExecutor):
            program.executor.concurrent = True
    serial = programs[0].executor
    kinds = (True, False) if learned and compiled.runs else (bool(compiled.runs),)
    threads = max(1, torch.get_num_threads() // workers)
    with intra_op_threads(threads):
        updates = measured_updates(compiled, model)
    steps = []
    for perturbed in kinds:
        plan = serial.plan if perturbed else serial.clean_plan
        recorded: dict[int, list[Timeline]] = {}
        for program, count in zip(programs, sorted({1, workers}), strict=True):
            if isinstance(program.executor, ThreadedExecutor):
                tasks = make_tasks(compiled, plan, in_flight=count)
                program.executor.prioritise(measured_costs(tasks, recorded[1]), perturbed=perturbed)
            with intra_op_threads(threads):
                recorded[count] = _record(program, inputs, target, perturbed, count)
        steps.append(_schedule(compiled, plan, recorded, updates, samples, workers, perturbed))
    return ScheduleReport(samples, threads, workers, tuple(steps))


def _record(program: Program, inputs: Any, target: Any, perturbed: bool, workers: int) -> list[Timeline]:
    steps = []
    for _ in range(WARM_UP + RECORDED):
        program.next_probe = program.step_count + (not perturbed)
        steps.append(record(program.executor, lambda: program.step(inputs, target), workers))
    return steps[WARM_UP:]


def _schedule(
    compiled: CompiledModel,
    plan: Sequence[Action],
    recorded: dict[int, list[Timeline]],
    updates: Sequence[float],
    samples: int,
    asked: int,
    perturbed: bool,
) -> StepReport:
    tasks = make_tasks(compiled, plan, in_flight=asked)
    costs = measured_costs(tasks, recorded[1])
    modelled = estimated_costs(compiled, tasks, samples)
    seconds, path = critical_path(tasks, costs)
    needed = networkx.transitive_reduction(dependencies(tasks))
    total = sum(costs)
    names = [task.name for task in tasks]
    bounds, timelines = [], {_named("recorded", count): steps for count, steps in recorded.items()}
    for count in sorted({*WORKERS, asked}):
        allowed = make_tasks(compiled, plan, in_flight=count)
        simulated = simulate(allowed, costs, count, overhead=HAND_OVER)
        taken = statistics.median(one.seconds for one in recorded[count]) if count in recorded else None
        bounds.append(
            WorkersReport(
                count,
                lower_bound(allowed, costs, count),
                simulated.seconds,
                total / (count * simulated.seconds),
                taken,
                None if taken is None else total / (count * taken),
                seconds_a_step(compiled, allowed, costs, updates, count, HAND_OVER),
            )
        )
        if count == asked:
            timelines[_named("simulated", count)] = [simulated]
    return StepReport(
        perturbed=perturbed,
        tasks=tuple(
            TaskReport(
                name=task.name,
                does=_describe(compiled, task.action),
                after=tuple(names[before] for before in task.after),
                waits_for=tuple(names[before] for before in sorted(needed.predecessors(position))),
                measured=costs[position],
                modelled=modelled[position],
                critical=position in path,
            )
            for position, task in enumerate(tasks)
        ),
        total=total,
        critical_path=tuple(names[position] for position in path),
        critical_seconds=seconds,
        workers=tuple(bounds),
        timelines=timelines,
    )


def _named(how: str, workers: int) -> str:
    return f"{how} on {workers} worker{'s' if workers > 1 else ''}"


def _describe(compiled: CompiledModel, action: Action) -> str:
    match action:
        case Forward(stage):
            return f"clean forward, stage {stage}"
        case Error():
            return "clean losses"
        case Perturb(run, _, copies):
            return f"{compiled.runs[run].name}, {len(copies)} cop{'ies' if len(copies) > 1 else 'y'}"
        case Learn(run):
            return f"learns from {compiled.runs[run].name}"
        case Gradient(site, _):
            return f"gradient of {compiled.sites[site].name}"
        case Update(parameter):
            return f"update of {parameter}"
