"""The plan of a step as data: a list of actions, made before the step and printable.

==========  ============================================================================================
``F3``      stage 3 of the clean forward
``E``       the clean losses, and with learned feedback their gradient at the output
``P1.0``    the perturbed run of group 1, chunk 0 of its copies
``G2``      the gradient subgraph of site 2, from the losses of all copies
``G2.0``    the gradient subgraph of site 2 for chunk 0 (its captures are that chunk's own)
``L1``      the feedback learns from perturbed run 1
``U:fc.w``  the optimizer's update of a parameter after the step before (`with_updates`)
==========  ============================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.program import CompiledModel, PerturbedRun, input_keys


@dataclass(frozen=True)
class Forward:
    """A stage of the clean run."""

    stage: int

    def __str__(self) -> str:
        return f"F{self.stage}"


@dataclass(frozen=True)
class Error:
    """The losses of the clean run, and with learned feedback their gradient at the output."""

    def __str__(self) -> str:
        return "E"


@dataclass(frozen=True)
class Perturb:
    """A chunk of a group's copies."""

    run: int
    chunk: int
    copies: tuple[int, ...]
    """Copy ids (`passes.ops`): ``d`` carries the noise of draw d, ``~d`` the negated noise."""

    def __str__(self) -> str:
        return f"P{self.run}.{self.chunk}"


@dataclass(frozen=True)
class Gradient:
    """A site's gradient subgraph, for one chunk or (``chunk = None``) for all copies at once."""

    site: int
    chunk: int | None

    def __str__(self) -> str:
        return f"G{self.site}" if self.chunk is None else f"G{self.site}.{self.chunk}"


@dataclass(frozen=True)
class Learn:
    """The feedback's learning step, from all copies of a run."""

    run: int

    def __str__(self) -> str:
        return f"L{self.run}"


@dataclass(frozen=True)
class Update:
    """The optimizer's update of a parameter, by the gradient of the step before."""

    parameter: str

    def __str__(self) -> str:
        return f"U:{self.parameter}"


Action = Forward | Error | Perturb | Gradient | Learn | Update


def make_plan(compiled: CompiledModel, *, perturbed: bool = True) -> tuple[Action, ...]:
    """The serial order of a step: clean run and losses, the gradients that need nothing else, then group by group its
    chunks, what is learned from them, and its sites' gradients; or without a `perturbed` run (``probe_every``)."""
    actions: list[Action] = [Forward(stage) for stage in range(len(compiled.stages))]
    actions.append(Error())
    actions += [Gradient(g.site.index, None) for g in compiled.gradients if g.from_clean]
    for run in compiled.runs if perturbed else ():
        subgraphs = [g for g in compiled.gradients if g.run == run.index and not g.from_clean]
        for number, copies in enumerate(chunks(compiled, run)):
            actions.append(Perturb(run.index, number, copies))
            actions += [Gradient(g.site.index, number) for g in subgraphs if g.per_copy]
        if compiled.estimator.feedback == "learned":
            actions.append(Learn(run.index))
        actions += [Gradient(g.site.index, None) for g in subgraphs if not g.per_copy]
    return tuple(actions)


def parameters_in_order(compiled: CompiledModel) -> tuple[str, ...]:
    """The trained parameters, in the order in which the forward reads them."""
    trained = {name for gradient in compiled.gradients for name in gradient.site.parameters}
    keys = dict.fromkeys(key.removeprefix("parameter:") for stage in compiled.stages for key in input_keys(stage))
    return tuple(name for name in keys if name in trained)


def with_updates(compiled: CompiledModel, plan: tuple[Action, ...]) -> tuple[Action, ...]:
    """The plan of a step that begins with the updates after the step before: each in front of the first stage that
    reads its parameter, so that in this order, too, the forward chases the updates."""
    left = dict.fromkeys(parameters_in_order(compiled))
    found: list[Action] = []
    for action in plan:
        if isinstance(action, Forward):
            read = [key.removeprefix("parameter:") for key in input_keys(compiled.stages[action.stage])]
            due = [name for name in read if name in left]
            found += map(Update, due)
            left = {name: None for name in left if name not in due}
        found.append(action)
    return tuple(found)


def chunks(compiled: CompiledModel, run: PerturbedRun) -> list[tuple[int, ...]]:
    """Copy ids of every chunk of a run. Both halves of a pair stay in one chunk, unless copies run one at a time."""
    estimator = compiled.estimator
    size = run.copies if estimator.chunk is None else min(estimator.chunk, run.copies)
    draws = range(estimator.draws(run.copies))
    if compiled.sequential:
        return [(copy,) for d in draws for copy in ((d, ~d) if estimator.antithetic else (d,))]
    if not estimator.antithetic:
        return [tuple(draws[start : start + size]) for start in range(0, len(draws), size)]
    half = size // 2
    groups = [draws[start : start + half] for start in range(0, len(draws), half)]
    return [(*group, *(~d for d in group)) for group in groups]


def keys_read(compiled: CompiledModel, action: Action) -> list[str]:
    """What an action's graph reads; nothing for losses, learning and updates, which have none."""
    match action:
        case Forward(stage):
            return input_keys(compiled.stages[stage])
        case Perturb(run, _, _):
            return input_keys(compiled.runs[run].module)
        case Gradient(site, _):
            return next(input_keys(g.module) for g in compiled.gradients if g.site.index == site)
        case Error() | Learn() | Update():
            return []


def format_plan(plan: tuple[Action, ...]) -> str:
    """The plan in one line: ``F0 F1 P0.0 G0 P1.0 G1``."""
    return " ".join(str(action) for action in plan)
