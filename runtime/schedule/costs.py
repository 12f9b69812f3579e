"""What the tasks of a step cost, in seconds: estimated from their graphs, or measured over recorded steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import astuple, replace

from torch import Tensor, fx

from ...compiler.cost import Work, count_work
from ...compiler.feedback_size import jacobian_shapes
from ...compiler.program import CompiledModel
from ...passes.graph import Role, placeholders
from ..plan import Action, Error, Forward, Gradient, Learn, Perturb, Update
from .tasks import Task
from .timeline import Timeline

FLOPS_PER_SECOND = 1e11
"""Of matrix products and convolutions, in float32 on one core of a server's CPU."""
BYTES_PER_SECOND = 1e10
"""Moved by one such core, in operations whose operands come from its caches or from memory."""
SECONDS_PER_OPERATION = 4e-6
"""Before and after the arithmetic: Python, dispatch, allocation."""
SECONDS_PER_NOISE = 2e-4
"""The same for an operation that draws noise, which is Python and many small operations."""

LOSS_OPERATIONS = 40
"""Operations of a loss, and of its gradient at the output."""
LEARN_OPERATIONS = 20
"""Operations of a learning step at one noise point."""
LEARN_PASSES = 8
"""How often a learning step reads or writes the noise of a point."""
UPDATE_OPERATIONS = 15
"""Operations of Adam's update of a parameter."""
UPDATE_PASSES = 20
"""How often it reads or writes something of the parameter's size."""


def estimated_costs(compiled: CompiledModel, tasks: Sequence[Task], samples: int) -> list[float]:
    """Seconds of each task on a batch of so many samples, by its FLOPs, bytes and operations: a guess for as long as
    nothing is measured, good for the order of magnitude and to tell large tasks from small ones."""
    counter = _Counter(compiled, samples)
    return [_seconds(counter.work(task.action)) for task in tasks]


def measured_costs(tasks: Sequence[Task], steps: Sequence[Timeline]) -> list[float]:
    """Seconds of each task, the median over recorded steps of these tasks."""
    taken: dict[str, list[float]] = {task.name: [] for task in tasks}
    for timeline in steps:
        for span in timeline.spans:
            taken[span.name].append(span.seconds)
    return [statistics.median(taken[task.name]) for task in tasks]


def _seconds(work: Work) -> float:
    begun = work.operations * SECONDS_PER_OPERATION + work.noises * SECONDS_PER_NOISE
    return begun + work.flops / FLOPS_PER_SECOND + work.bytes / BYTES_PER_SECOND


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Counter:
    """The work of actions; that of a graph is counted once."""

    def __init__(self, compiled: CompiledModel, samples: int) -> None:
        self.compiled, self.samples = compiled, samples
        self.probed = compiled.estimator.num_probed(samples)
        self.gradients = {gradient.site.index: gradient for gradient in compiled.gradients}
        self.sizes = {
            node.meta["target"]: _bytes(node.meta["val"])
            for node in placeholders(compiled.captured.module, Role.PARAMETER)
        }
        self.counted: dict[tuple[fx.GraphModule, int, int], Work] = {}

    def work(self, action: Action) -> Work:
        compiled = self.compiled
        match action:
            case Forward(stage):
                return self._graph(compiled.stages[stage], self.samples, 1)
            case Error():
                return Work(0, 0, LOSS_OPERATIONS)
            case Perturb(run, _, copies):
                found = self._graph(compiled.runs[run].module, self.probed, len(copies))
                return replace(found, operations=found.operations + LOSS_OPERATIONS)
            case Learn(run):
                return self._learn(compiled.estimator.draws(compiled.runs[run].copies))
            case Gradient(site, chunk):
                return self._gradient(site, chunk)
            case Update(parameter):
                return Work(0, UPDATE_PASSES * self.sizes[parameter], UPDATE_OPERATIONS)

    def _gradient(self, site: int, chunk: int | None) -> Work:
        gradient, estimator = self.gradients[site], self.compiled.estimator
        if gradient.from_clean:
            return self._graph(gradient.module, self.samples, 1)
        copies = self.compiled.runs[gradient.run].copies
        if chunk is not None:  # its copies lie side by side in the batch
            beside = 1 if self.compiled.sequential else min(estimator.chunk or copies, copies)
            return self._graph(gradient.module, self.samples * beside, 1)
        once = self._graph(gradient.module, self.samples, estimator.draws(copies))
        times = 3 if gradient.shrunk else 1  # the prediction, and each half of the draws
        return Work(*(times * amount for amount in astuple(once)))

    def _learn(self, draws: int) -> Work:
        shapes = list(jacobian_shapes(self.compiled).values())
        noise = draws * self.probed * sum(rows for rows, _ in shapes)
        products = 2 * 2 * draws * self.probed * sum(rows * columns for rows, columns in shapes)
        return Work(products, 4 * LEARN_PASSES * noise, LEARN_OPERATIONS * (1 + len(shapes)), len(shapes))

    def _graph(self, module: fx.GraphModule, samples: int, copies: int) -> Work:
        key = (module, samples, copies)
        if key not in self.counted:
            self.counted[key] = count_work(module, samples, copies)
        return self.counted[key]
