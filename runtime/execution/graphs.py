"""Steps as CUDA graphs: captured once for a batch size, replayed by one call of the driver.

A step of a small model (forward, loss, perturbed runs, all gradient subgraphs, what feedback learns) is some hundreds
of kernels that take microseconds each, and Python takes as long to issue one. A graph has them issued together. What it
reads has to stand where it stood when it was captured (`captured`); what it writes is overwritten by the next replay,
so that a step's result is read before that (`Program` copies gradients to ``.grad``).

Noise is keyed by the step, and a key is one of the things that are put where a graph reads them: every replay makes
other noise. What has to be looked at (losses that are finite, how well feedback predicted) is looked at after a replay;
where a step does something else then, it is done again, operation by operation.

Not captured is a step whose loss draws numbers, remembers something, looks at numbers or is called in every step, or
one that reads a number of the CPU's, which a graph would hold for ever; feedback's first steps, which are longer.

**Proof before use, and after**: the first replay of every graph is compared with the same step done operation by
operation, and again every `CHECK_EVERY` steps, when the loss's code is compared with its own graph, too. If it differs,
or torch cannot capture it, a warning says so and steps go on as without graphs. After a capture that fails torch
promises little: what would spoil one, a wait for the GPU, is looked for in a run before it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor
from torch.utils import _pytree as pytree

from ...compiler.program import CompiledModel
from ...passes.find_sites import Site
from ..feedback import FeedbackState
from ..learning import SLOW_STEP, pace, teach
from ..noise.rows import Probe
from ..noise.words import holding
from ..output_gradient import CHECK_EVERY
from ..plan import Action
from ..traced_loss import TracedLoss
from .captured import StepGraph, Watched, capture, difference, own_feedback, own_input, read_by, stands
from .executor import SerialExecutor
from .precision import autocast_dtypes
from .step import Step, StepInput, StepResult
from .streams import StreamedExecutor
from .watched_loss import WatchedLoss

MOST_GRAPHS = 4
"""Kinds of steps with a graph: batch sizes, with and without perturbed runs. Each keeps the memory of a step."""

MOST_CAPTURES = 16
"""Captures, with the same σ, after which a model whose tensors keep moving goes without graphs."""


class Graphed(SerialExecutor):
    """An executor's steps replayed from CUDA graphs, in front of the class that does them otherwise. The tensors of a
    replayed step's result are overwritten by the next, but for what was learned.

    Attributes:
        reason: what speaks against graphs of this program altogether; empty if nothing does.
        captured, replayed: how many graphs and steps were.
    """

    def __init__(self, compiled: CompiledModel, sigmas: list[float], *others: Any) -> None:
        super().__init__(compiled, sigmas, *others)
        self.reason = _reason(compiled)
        self.captured = self.replayed = 0
        self._graphs: dict[Any, StepGraph | None] = {}
        """By what a graph was captured for; None after the first step of a kind, which warms up."""
        self._left = MOST_CAPTURES
        self._unproved: dict[Any, int] = {}
        """By kind, replays since the last that was compared."""
        self._sigmas: list[float] = []
        """σ that the graphs have."""
        self._learned: FeedbackState | None = None
        self._own: FeedbackState | None = None
        """What `_learned` holds, where all graphs read it."""
        self._watched: Watched | None = None

    def waits(self, *, perturbed: bool) -> str:
        return "a replayed step is issued as a whole"

    def measures(self, *, perturbed: bool) -> bool:
        return False

    def execute(self, step: Step, plan: Sequence[Action]) -> None:
        """A step by its graph: the second of its kind captures it, the third is the first replayed."""
        given = step.given
        if self.reason or self.record is not None or not self._fits(given, plan):
            super().execute(step, plan)
            return
        if self._sigmas != self.sigmas:
            self._forget()
        kind = _kind(given)
        graph = self._graphs.get(kind)
        stays = graph is not None and graph.stands == stands(given.environment)
        if graph is not None and stays and self._answers(graph, kind, given):
            self._place(given.feedback)
            result = graph.run(given)
            if result is not None:
                step.result, step.clean = result, result.losses
                if given.output_gradient is not None:
                    given.output_gradient.answered()
                self._unproved[kind] += 1
                self.replayed += 1
                return
        watch = WatchedLoss(given.loss, given.device)
        if kind in self._graphs:
            step.given = replace(given, loss=watch)
        super().execute(step, plan)
        if step.result.feedback is not None and step.result.feedback.overshoot != 1:
            return  # more was done than graphs do
        loss = None if given.output_gradient is None else given.output_gradient.last
        if watch.objection or (given.output_gradient is not None and not _is_plain(loss, given)):
            self._graphs.pop(kind, None)
        elif graph is not None and stays and graph.loss is loss:
            self._try(lambda: self._prove(graph, kind, given, step.result))
        elif kind in self._graphs and not self._left:
            self._refuse("would have to be captured again and again: the model's parameters or buffers keep moving")
        elif kind in self._graphs:
            self._try(lambda: self._capture(kind, loss, watch.own, given, step.result, plan))
        elif len(self._graphs) < MOST_GRAPHS:
            self._graphs[kind] = None

    def captures(self) -> bool:
        return self._watched is not None

    def demand_finite(self, values: Tensor, fail: Callable[[], NoReturn]) -> None:
        """Not while a graph is captured, which cannot wait for a number: after each replay."""
        if self._watched is None:
            super().demand_finite(values, fail)
        else:
            self._watched.demanded.append(values)

    def learn(self, state: FeedbackState, probe: Probe, sites: list[Site]) -> tuple[FeedbackState, Tensor]:
        """While a graph is captured, what needs no number; the rest after each replay."""
        if self._watched is None:
            return super().learn(state, probe, sites)
        lesson = teach(state, probe, sites, self.sigmas, self.compiled.estimator.noise, self.reached)
        self._watched.lesson = lesson
        return replace(state, jacobians=lesson.jacobians), lesson.loss

    def _fits(self, given: StepInput, plan: Sequence[Action]) -> bool:
        """Whether a step is one of the plans', once feedback learns at its last pace, and all that it reads is on its
        device: a number on the CPU would be a constant of the graph."""
        leaves = [*pytree.tree_leaves(given.target), *read_by(given.environment).values()]
        same = all(isinstance(leaf, Tensor) and leaf.device == given.device for leaf in leaves)
        settled = given.feedback is None or plan is self.clean_plan or pace(given.feedback) == SLOW_STEP
        return same and settled and any(plan is each for each in (self.plan, self.clean_plan))

    def _answers(self, graph: StepGraph, kind: Any, given: StepInput) -> bool:
        """Whether a graph may be replayed for a step: its loss is still the same, and no comparison is due."""
        answers = given.output_gradient is None or given.output_gradient.answers(graph.loss)
        return answers and self._unproved[kind] + 1 < CHECK_EVERY

    def _capture(
        self,
        kind: Any,
        loss: TracedLoss | None,
        held: list[Tensor],
        given: StepInput,
        expected: StepResult,
        plan: Sequence[Action],
    ) -> None:
        """Capture the graph of such steps, proved by this one's result."""
        self.captured += 1
        self._left -= 1
        own = own_input(given, self._place(given.feedback))

        def run() -> StepResult:
            self._watched = Watched()
            step = Step(self, replace(own, environment=dict(own.environment)))
            if own.output_gradient is None:
                super(Graphed, self).execute(step, plan)
            else:
                with own.output_gradient.unchecked():
                    super(Graphed, self).execute(step, plan)
            return step.result

        try:
            with holding() as words:
                result, replay = capture(run, given.device)
            assert self._watched is not None
            graph = StepGraph(own, loss, stands(given.environment), result, self._watched, [*held, *words], replay)
        finally:
            self._watched = None
        self._prove(graph, kind, given, expected)
        self._graphs[kind] = graph

    def _prove(self, graph: StepGraph, kind: Any, given: StepInput, expected: StepResult) -> None:
        """Raise unless a replay gives the result that is expected. It is spoiled before, so that a replay which does
        nothing shows."""
        self._place(given.feedback)
        graph.spoil()
        found = graph.run(given)
        wrong = difference(graph.result if found is None else found, expected, learned=given.perturbed)
        if found is None or wrong:
            raise _WrongReplayError(wrong or "perturbed runs")
        self._unproved[kind] = 0

    def _place(self, feedback: FeedbackState | None) -> FeedbackState | None:
        """Have all graphs read what feedback has learned; it, with its tensors where they read them."""
        if feedback is None:
            return None
        if self._own is None:
            self._own = own_feedback(feedback)
        elif feedback is not self._learned:
            for value, other in zip(self._own.tensors(), feedback.tensors(), strict=True):
                value.copy_(other)
        self._learned = feedback
        return replace(feedback, jacobians=self._own.jacobians, basis=self._own.basis)

    def _try(self, attempt: Callable[[], None]) -> None:
        """Go without graphs from now on if it fails."""
        try:
            attempt()
        except _WrongReplayError as error:
            self._refuse(f"gives other numbers for the {error}")
        except Exception as error:  # whatever torch or a library says of a capture: training goes on without
            self._refuse(f"could not be captured ({type(error).__name__}: {error})")

    def _refuse(self, wrong: str) -> None:
        self.reason = f"the CUDA graph of a step {wrong}"
        self._forget()
        self._own = self._learned = None
        warnings.warn(f"{self.reason}. Steps go on without graphs, with the same results.", stacklevel=2)

    def _forget(self) -> None:
        """Drop all graphs, as when σ was measured anew."""
        self._graphs, self._unproved = {}, {}
        self._sigmas, self._left = list(self.sigmas), MOST_CAPTURES


class GraphedExecutor(Graphed, SerialExecutor):
    """A graph of one kernel after the other."""


class GraphedStreams(Graphed, StreamedExecutor):
    """A graph with a branch a stream: tasks side by side, and none issued by Python."""


class _WrongReplayError(Exception):
    """A replay gave another result."""


def _reason(compiled: CompiledModel) -> str:
    """What speaks against graphs of a compiled model, known before the first step."""
    if compiled.estimator.sampling != "all":
        return f'sampling="{compiled.estimator.sampling}" perturbs another number of samples in every step'
    if any(gradient.shrunk for gradient in compiled.gradients):
        return 'correction="shrunk" waits for numbers between a step\'s gradients'
    return ""


def _is_plain(loss: TracedLoss | None, given: StepInput) -> bool:
    """Whether the graph of a loss, if there is one, does nothing but compute on the step's device."""
    return loss is not None and not (loss.draws or loss.remembers or any(x.device != given.device for x in loss.own))


def _kind(given: StepInput) -> Any:
    """What steps have in common that one graph serves."""
    leaves, spec = pytree.tree_flatten(given.target)
    shapes = tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)
    return given.perturbed, given.samples, spec, shapes, autocast_dtypes()
