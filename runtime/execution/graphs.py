"""Steps as CUDA graphs: captured once for a batch size, replayed by one call of the driver.

A step of a small model (forward, loss, perturbed runs, all gradient subgraphs, what feedback learns) is some hundreds
of kernels that take microseconds each, and Python takes as long to issue one. A graph has them issued together. What it
reads has to stand where it stood when it was captured (`captured`); what it writes is overwritten by the next replay,
so that a step's result is read before that (`Program` copies gradients to ``.grad``).

Noise is keyed by the step, and a key is one of the things that are put where a graph reads them: every replay makes
other noise. What has to be looked at (losses that are finite, how well feedback predicted) is looked at after a replay;
where a step does something else then, it is done again, operation by operation.

The first two steps of a kind warm up, and a loss whose code runs in the step is watched meanwhile (`watched_loss`); the
second is captured. Not captured are steps whose loss does more than compute on the GPU, and feedback's first learning
steps, which are longer. What a loss's code knows beside tensors (a number, which tensor) is as it was at the capture.

**Proof before use, and after**: a graph is compared with the step that it was captured for, with the next, which has
another batch and key, and again every `CHECK_EVERY` steps, when a traced loss is compared with its code, too. One that
differs at first, or cannot be captured, is not used: a warning says so, and steps go on as without graphs. One that
comes to differ is captured anew, once. After a capture that fails torch promises little, and may keep its memory.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...compiler.program import CompiledModel
from ...passes.find_sites import Site
from ..feedback import FeedbackState
from ..learning import is_settled, teach
from ..noise.rows import Probe
from ..noise.words import holding
from ..out_of_memory import is_out_of_memory
from ..output_gradient import CHECK_EVERY
from ..plan import Action
from ..targets import target_tensors
from ..traced_loss import TracedLoss
from .captured import (
    NotReadyError,
    StepGraph,
    Watched,
    capture,
    difference,
    own_feedback,
    own_input,
    read_by,
    stands,
)  # fmt: skip
from .executor import SerialExecutor
from .precision import autocast_dtypes, uncached_autocast
from .step import Step, StepInput, StepResult
from .streams import StreamedExecutor
from .watched_loss import WatchedLoss

MOST_GRAPHS = 4
"""Kinds of steps with a graph: batch sizes, with and without perturbed runs. Each keeps the memory of a step."""

MOST_CAPTURES = 16
"""Captures, with the same σ, after which a model whose tensors keep moving goes without graphs."""

MOST_ATTEMPTS = 3
"""Captures of a kind that may fail before anything is captured."""

MOST_LOOKS = 2
"""Steps of a kind that may do what speaks against a graph: a loss may prepare itself at first."""

MOST_KINDS = 64
"""Kinds of steps that are remembered without a graph."""


class Graphed(SerialExecutor):
    """An executor's steps replayed from CUDA graphs, in front of the class that does them otherwise. The tensors of a
    replayed step's result are overwritten by the next, but for what was learned.

    Attributes:
        reason: what speaks against graphs of this program altogether; empty if nothing does.
        refused: what speaks against graphs of a kind of steps, by kind.
        captured, replayed: how many graphs and steps were.
    """

    def __init__(self, compiled: CompiledModel, sigmas: list[float], *others: Any) -> None:
        super().__init__(compiled, sigmas, *others)
        self.reason = reason_against(compiled)
        self.refused: dict[Any, str] = {}
        self.captured = self.replayed = 0
        self._graphs: dict[Any, StepGraph] = {}
        self._since: dict[Any, int] = {}
        """By kind, replays since a graph was last compared with a step; `CHECK_EVERY` where it is due to be."""
        self._warm: dict[Any, list[list[Tensor]]] = {}
        """Of kinds of steps without a graph, what their loss read of its own in each step so far."""
        self._left = MOST_CAPTURES
        self._changed = 0
        self._failed: dict[Any, int] = {}
        """By kind, captures that failed before anything was captured."""
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

    def run(self, given: StepInput) -> StepResult:
        """A step. If it runs out of memory while graphs hold some, it is done again without them."""
        environment = dict(given.environment)
        try:
            return super().run(given)
        except BaseException as error:
            if not self._graphs or not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the step's tensors
        self._refuse("holds memory that a step needs")
        if given.device.type == "cuda":
            torch.cuda.empty_cache()
        return super().run(replace(given, environment=environment))

    def execute(self, step: Step, plan: Sequence[Action]) -> None:
        """A step by its graph: the second of its kind captures it, the third proves it once more, the fourth is the
        first replayed."""
        given = step.given
        if self._sigmas != self.sigmas:
            self.release()
        goes = not self.reason and self.record is None and self._ready(given, plan)
        kind = _kind(given) if goes else None
        if kind is None or kind in self.refused:
            super().execute(step, plan)
            return
        graph = self._graphs.get(kind)
        stays = graph is not None and graph.stands == stands(given.environment)
        if graph is not None and stays and self._answers(graph, kind, given):
            self._place(given.feedback)
            result = graph.run(given)
            if result is not None:
                step.result = result
                if given.output_gradient is not None:
                    given.output_gradient.answered()
                self._since[kind] += 1
                self.replayed += 1
                return
        if graph is not None and not stays:
            self._drop(kind)
        watched = kind not in self._graphs and len(self._graphs) < MOST_GRAPHS
        watch = WatchedLoss(given.loss, given.device, given.target)
        if watched:
            step.given = replace(given, loss=watch)
        super().execute(step, plan)
        if given.perturbed and step.result.feedback is not None and step.result.feedback.overshoot != 1:
            return  # more was done than graphs do
        loss = None if given.output_gradient is None else given.output_gradient.last
        if stays and graph is not None and graph.loss is loss:
            self._try(kind, lambda: self._prove(graph, kind, given, step.result))
        elif not watched:
            self._drop(kind)
        elif self._accepts(kind, loss, watch, given):
            self._try(kind, lambda: self._capture(kind, loss, watch.own, given, step.result, plan))

    def _accepts(self, kind: Any, loss: TracedLoss | None, watch: WatchedLoss, given: StepInput) -> bool:
        """Whether a graph of such steps is to be captured now: nothing speaks against it, and it is not the first."""
        objection = watch.objection or _objection(loss, given)
        seen = self._warm.get(kind, [])
        if seen and not objection and watch.has_other(seen[-1]):
            objection = "the loss reads another tensor of its own in every step"
        if len(seen) < (MOST_LOOKS if objection else 1):  # it may have prepared itself
            self._warm = _remembered(self._warm, kind, [*seen, watch.own])
            return False
        if objection:
            told = objection in self.refused.values()
            self.refused = _remembered(self.refused, kind, objection)
            if not told:
                warnings.warn(f"cuda_graphs: {objection}. Such steps go on without graphs.", stacklevel=2)
            return False
        if not self._left:
            self._refuse("would have to be captured again and again: the model's parameters or buffers keep moving")
            return False
        return True

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

    def _ready(self, given: StepInput, plan: Sequence[Action]) -> bool:
        """Whether a step is one of the plans', once feedback learns at its last pace."""
        settled = given.feedback is None or plan is self.clean_plan or is_settled(given.feedback)
        return settled and any(plan is each for each in (self.plan, self.clean_plan))

    def _answers(self, graph: StepGraph, kind: Any, given: StepInput) -> bool:
        """Whether a graph may be replayed for a step: its loss is still the same, and no comparison is due."""
        answers = given.output_gradient is None or given.output_gradient.answers(graph.loss)
        return answers and self._since[kind] + 1 < CHECK_EVERY

    def _capture(
        self,
        kind: Any,
        loss: TracedLoss | None,
        held: list[Tensor],
        given: StepInput,
        expected: StepResult,
        plan: Sequence[Action],
    ) -> None:
        """Capture the graph of such steps, compared with this one's result."""
        self._left -= 1
        own = own_input(given, self._place(given.feedback))

        def run() -> StepResult:
            self._watched = Watched()
            step = Step(self, replace(own, environment=dict(own.environment)))
            unchecked = nullcontext() if own.output_gradient is None else own.output_gradient.unchecked()
            with unchecked, uncached_autocast():
                super(Graphed, self).execute(step, plan)
            return step.result

        try:
            with holding() as words:
                result, replay = capture(run, given.device)
            assert self._watched is not None
            held = [*held, *words.values()]
            graph = StepGraph(own, loss, stands(given.environment), result, self._watched, held, replay)
        finally:
            self._watched = None
        self.captured += 1
        self._prove(graph, kind, given, expected)
        self._graphs[kind] = graph
        self._since[kind] = CHECK_EVERY  # what was a constant by mistake shows in another step

    def _prove(self, graph: StepGraph, kind: Any, given: StepInput, expected: StepResult) -> None:
        """Raise unless a replay gives the result that is expected. It is spoiled before, so that a replay which does
        nothing shows."""
        self._place(given.feedback)
        graph.spoil()
        found = graph.run(given)
        wrong = difference(graph.result if found is None else found, expected)
        if found is None or wrong:
            raise _WrongReplayError(wrong or "perturbed runs")
        self._since[kind] = 0

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

    def _try(self, kind: Any, attempt: Callable[[], None]) -> None:
        """Go without graphs from now on if it fails."""
        proved = self._since.get(kind, CHECK_EVERY) < CHECK_EVERY
        try:
            attempt()
        except _WrongReplayError as error:
            if not proved or self._changed:
                self._refuse(f"gives other numbers for the {error}")
                return
            self._changed += 1
            self._graphs, self._since, self._warm = {}, {}, {}  # the others may have been captured before, too
            warnings.warn(
                f"the CUDA graph of a step has come to give other numbers for the {error} than the step itself: the "
                f"loss, or the model, reads something that has changed, which is noticed every {CHECK_EVERY} steps "
                "only. It is captured anew. Give what changes as a tensor in the target, or as one that is written "
                "into.",
                stacklevel=2,
            )
        except NotReadyError as error:  # nothing was captured: a kernel may not be proved yet
            self._failed[kind] = self._failed.get(kind, 0) + 1
            if self._failed[kind] == MOST_ATTEMPTS:
                self._refuse(f"could not be captured ({error})")
        except Exception as error:  # whatever torch or a library says of a capture: training goes on without
            self._refuse(f"could not be captured ({type(error).__name__}: {error})")

    def _drop(self, kind: Any) -> None:
        """Have a kind of steps begin anew."""
        for known in (self._graphs, self._since, self._warm):
            known.pop(kind, None)

    def release(self) -> None:
        """Drop all graphs, as when σ is measured anew."""
        self._graphs, self._since, self._warm = {}, {}, {}
        self._sigmas, self._left = list(self.sigmas), MOST_CAPTURES

    def _refuse(self, wrong: str) -> None:
        self.reason = f"the CUDA graph of a step {wrong}"
        self.release()
        self._own = self._learned = None
        warnings.warn(f"{self.reason}. Steps go on without graphs.", stacklevel=2)


class GraphedExecutor(Graphed, SerialExecutor):
    """A graph of one kernel after the other."""


class GraphedStreams(Graphed, StreamedExecutor):
    """A graph with a branch a stream: tasks side by side, and none issued by Python."""


class _WrongReplayError(Exception):
    """A replay gave another result."""


def reason_against(compiled: CompiledModel) -> str:
    """What speaks against graphs of a compiled model, known before the first step."""
    if compiled.estimator.sampling != "all":
        return f'sampling="{compiled.estimator.sampling}" perturbs another number of samples in every step'
    if any(gradient.shrunk for gradient in compiled.gradients):
        return 'correction="shrunk" waits for numbers between a step\'s gradients'
    return ""


def _remembered(known: dict[Any, Any], kind: Any, value: Any) -> dict[Any, Any]:
    """What is known by kind with one more, the oldest left out where they are too many."""
    return dict(list(known.items())[1 - MOST_KINDS :]) | {kind: value}


_CONSTANT = (Tensor, bool, int, float, str, type(None))
"""Parts of a target: tensors, and what may be a constant of a graph."""


def _objection(loss: TracedLoss | None, given: StepInput) -> str:
    """What speaks against capturing a step, in words; nothing."""
    away = any(
        value.device != given.device for value in (*target_tensors(given.target), *read_by(given.environment).values())
    )
    if not all(isinstance(leaf, _CONSTANT) for leaf in pytree.tree_leaves(given.target)):
        return "the target has parts that are neither tensors nor numbers"
    if away:
        return f"the batch or the target is not on {given.device}: a number there would be a constant of the graph"
    if given.output_gradient is None:
        return ""
    if loss is None:
        return "the loss is called in every step"
    if loss.draws or loss.remembers:
        return "the loss draws random numbers" if loss.draws else "the loss writes into tensors that it has not made"
    other = any(value.device != given.device for value in loss.own)
    return f"the loss computes on another device than {given.device}" if other else ""


def _kind(given: StepInput) -> Any:
    """What steps have in common that one graph serves."""
    leaves, spec = pytree.tree_flatten(given.target)
    parts = [
        (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), repr(leaf))  # 1 is not True
        for leaf in leaves
    ]
    plain = all(isinstance(leaf, _CONSTANT) for leaf in leaves)
    flags = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    return given.perturbed, given.samples, spec, tuple(parts) if plain else None, autocast_dtypes(), flags
