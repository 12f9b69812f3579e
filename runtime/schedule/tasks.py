"""The actions of a plan as tasks: which may run side by side, and which wait for which.

A plan is one order in which a step can run; here are all of them. An action waits for whatever computes what it reads,
and besides, so that every order gives the same bits and bounded memory:

- where the step begins with the updates after the one before, whatever reads a parameter waits for its update, and the
  losses for all of them: the user's may read any weight;
- gradients of the same parameter are summed in the plan's order;
- corrections that are shrunk learn their α one after the other, in the plan's order;
- a perturbed run waits for the clean losses (which have to be finite), and for the run `in_flight` before it with the
  gradients that read that run's own captures, so that no more runs than that are in memory.

Gradient subgraphs wait for each other in no other way (`compiler.verify`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx

from ...compiler.program import CompiledModel, GradientSubgraph, input_keys, output_keys
from ..plan import Action, Error, Forward, Gradient, Learn, Perturb, Update


@dataclass(frozen=True)
class Task:
    """An action of a plan."""

    action: Action
    after: tuple[int, ...]
    """The positions in the plan of the actions that have to be done before; all are smaller than its own."""

    @property
    def name(self) -> str:
        return str(self.action)


def make_tasks(compiled: CompiledModel, plan: Sequence[Action], *, in_flight: int = 1) -> tuple[Task, ...]:
    """The tasks of a plan, in its order, with at most `in_flight` perturbed runs in memory at a time."""
    gradients = {gradient.site.index: gradient for gradient in compiled.gradients}
    at = {action: position for position, action in enumerate(plan)}
    written: dict[str, int] = {}
    for position, action in enumerate(plan):
        if isinstance(action, Forward):
            written |= dict.fromkeys(output_keys(compiled.stages[action.stage]), position)
        elif isinstance(action, Update):
            written[f"parameter:{action.parameter}"] = position
    runs = [action for action in plan if isinstance(action, Perturb)]
    tasks: list[Task] = []
    summed: dict[str, int] = {}  # by parameter, the last gradient that was added
    shrunk: int | None = None
    for position, action in enumerate(plan):
        after: set[int] = set()
        match action:
            case Forward(stage):
                after |= _writers(input_keys(compiled.stages[stage]), written)
            case Error():
                before = (Forward, Update)  # outputs, buffers, and weights that the loss may read
                after |= {where for where, other in enumerate(plan) if isinstance(other, before)}
            case Perturb(run, _, _):
                after |= _writers(input_keys(compiled.runs[run].module), written) | {at[Error()]}
                number = runs.index(action) - in_flight
                if number >= 0:
                    after |= {at[runs[number]], *_readers(plan, gradients, runs[number])}
            case Learn(run):
                masks = {f"value:{name}" for name in compiled.runs[run].alive.values()}
                after |= _writers(masks, written) | _copies(plan, run)
            case Gradient(site, chunk):
                gradient = gradients[site]
                after |= _writers(input_keys(gradient.module), written) | {at[Error()]}
                after |= _losses(plan, gradient, chunk, at)
                after |= {summed[name] for name in gradient.site.parameters if name in summed}
                summed |= dict.fromkeys(gradient.site.parameters, position)
                if gradient.shrunk:
                    after |= {shrunk} if shrunk is not None else set()
                    shrunk = position
        tasks.append(Task(action, tuple(sorted(after))))
    return tuple(tasks)


def dependencies(tasks: Sequence[Task]) -> networkx.DiGraph:
    """The tasks as a directed graph: nodes by position with their ``name``, edges to those that wait for them."""
    dag = networkx.DiGraph()
    for position, task in enumerate(tasks):
        dag.add_node(position, name=task.name)
        dag.add_edges_from((before, position) for before in task.after)
    return dag


def _writers(keys: Iterable[str], written: dict[str, int]) -> set[int]:
    """Who computes the values, captures and weights among `keys`; the rest is there before the step."""
    return {written[key] for key in keys if key in written}


def _losses(plan: Sequence[Action], gradient: GradientSubgraph, chunk: int | None, at: dict[Action, int]) -> set[int]:
    """What gives a gradient its loss weights."""
    if gradient.from_clean:
        return set()
    if gradient.source == "corrected":
        return {at[Learn(gradient.run)]}
    return _copies(plan, gradient.run, chunk)


def _copies(plan: Sequence[Action], run: int, chunk: int | None = None) -> set[int]:
    """The chunks of a run, or one of them."""
    return {
        position
        for position, action in enumerate(plan)
        if isinstance(action, Perturb) and action.run == run and chunk in (None, action.chunk)
    }


def _readers(plan: Sequence[Action], gradients: dict[int, GradientSubgraph], run: Perturb) -> set[int]:
    """The gradients that read the captures of a chunk's own."""
    return {
        position
        for position, action in enumerate(plan)
        if isinstance(action, Gradient) and action.chunk == run.chunk and gradients[action.site].run == run.run
    }
