"""Consecutive steps with the optimizer's updates between them: what a pipeline over steps could gain.

A layer's update needs that layer's gradient alone, and the next forward of the layer that update alone, so that the
next step can follow the gradients through the network with no stale weight. How early an update may begin is a rule:

=============  ========================================================================================================
``barrier``    when the step is done; the next step begins when all updates are
``chase``      when the step is done and all its gradients were found finite; the next forward follows the updates
``at once``    when the gradients of its parameter are complete and nothing in the step reads the weight any more
=============  ========================================================================================================

`Trainer` does the first with one worker and the second with several (``Trainer.pipeline`` says which). Only these leave
all weights as they were when a step fails: a NaN in the last gradient of a step is found after the first weights have
moved, which ``at once`` could only undo with a copy of weights and optimizer state.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...compiler.program import CompiledModel
from ..plan import Forward, Gradient, Learn, keys_read, parameters_in_order
from .bounds import simulate
from .tasks import Task

RULES = ("barrier", "chase", "at once")
"""When updates may begin."""

STEPS = 3
"""Consecutive steps that are simulated: the first fills the pipeline, the others tell what a step takes in it."""

TIMED = 20
"""Updates of each parameter that are timed."""


@dataclass(frozen=True)
class PipelineTask:
    """A task of one of several consecutive steps (``G2@1``), or a parameter's update after it (``U:fc1.weight@1``)."""

    name: str
    after: tuple[int, ...]
    """The positions of the tasks that have to be done before; all are smaller than its own."""


def make_pipeline(compiled: CompiledModel, tasks: Sequence[Task], rule: str, steps: int) -> tuple[PipelineTask, ...]:
    """The tasks of so many steps, each followed by the updates of its parameters in the order of the first forward.

    Args:
        tasks: of one step, in the plan's order.
        rule: one of `RULES`.
    """
    assert rule in RULES, rule
    reads = [set(keys_read(compiled, task.action)) for task in tasks]
    parameters = parameters_in_order(compiled)
    gradients = {name: _summed(compiled, tasks, name) for name in parameters}
    learns = [position for position, task in enumerate(tasks) if isinstance(task.action, Learn)]
    size = len(tasks) + len(parameters)
    found: list[PipelineTask] = []
    for step in range(steps):
        here, before = step * size, (step - 1) * size
        updates = {name: before + len(tasks) + number for number, name in enumerate(parameters)}
        for position, task in enumerate(tasks):
            after = {here + each for each in task.after}
            if step:
                own = [updates[name] for name in parameters if f"parameter:{name}" in reads[position]]
                after.update(updates.values() if rule == "barrier" else own)
                if isinstance(task.action, (Gradient, Learn)):  # the Jacobians that the last step learned
                    after.update(before + each for each in learns)
                if isinstance(task.action, Forward):  # buffers, which the same stage may have moved
                    after.add(before + position)
            found.append(PipelineTask(f"{task.name}@{step}", tuple(sorted(after))))
        for name in parameters:
            needed = range(len(tasks)) if rule != "at once" else gradients[name] | _readers(reads, name)
            found.append(PipelineTask(f"U:{name}@{step}", tuple(sorted(here + each for each in needed))))
    return tuple(found)


def seconds_a_step(
    compiled: CompiledModel, tasks: Sequence[Task], costs: Sequence[float], updates: Sequence[float], workers: int,
    overhead: float,
) -> dict[str, float]:  # fmt: skip
    """By rule, what a step with its updates takes in the long run on so many workers, simulated (`bounds.simulate`).

    `costs` are seconds of the tasks of one step, `updates` of the parameters in the order of the forward.
    """
    found = {}
    for rule in RULES:
        taken = [
            simulate(
                make_pipeline(compiled, tasks, rule, steps), [*costs, *updates] * steps, workers, overhead=overhead
            ).seconds
            for steps in (1, STEPS)
        ]
        found[rule] = (taken[1] - taken[0]) / (STEPS - 1)
    return found


def measured_updates(compiled: CompiledModel, model: nn.Module) -> list[float]:
    """Seconds of Adam's step for each parameter alone, in the order of the forward; the model stays as it is."""
    taken = []
    for name in parameters_in_order(compiled):
        parameter = nn.Parameter(model.get_parameter(name).detach().clone())
        parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.Adam([parameter])
        seconds = []
        for _ in range(TIMED):
            started = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - started)
        taken.append(statistics.median(seconds))
    return taken


def _readers(reads: Sequence[set[str]], parameter: str) -> set[int]:
    return {position for position, keys in enumerate(reads) if f"parameter:{parameter}" in keys}


def _summed(compiled: CompiledModel, tasks: Sequence[Task], parameter: str) -> set[int]:
    """The tasks whose gradients are of the parameter."""
    sites = {g.site.index for g in compiled.gradients if parameter in g.site.parameters}
    return {p for p, task in enumerate(tasks) if isinstance(task.action, Gradient) and task.action.site in sites}
