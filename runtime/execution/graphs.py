"""Steps without a perturbed run as one CUDA graph: captured once for a batch size, replayed by one call of the driver.

A clean step of learned feedback (forward, loss, all gradient subgraphs) is a few hundred kernels that take microseconds
each, and Python takes as long to issue one. A graph has them issued together. What a graph reads has to stand where it
stood when it was captured: parameters and buffers do (checked before every replay); the batch, the target and what
feedback has learned are copied to where they stood. What it writes is overwritten by the next replay, so that a step's
result is read before that (`Program` copies gradients to ``.grad``).

Noise is keyed by the step, and keys are read on the host: a step that makes noise, perturbed or with a model's own
dropout, is not captured. Nor is one whose loss draws numbers, remembers something, is called in every step, or reads a
number of the CPU's, which a graph would hold for ever.

**Proof before use, and after**: the first replay of every graph is compared with the same step done operation by
operation, and again whenever the loss's code is compared with its own graph (`CHECK_EVERY`). If it differs, or torch
cannot capture it, a warning says so and steps go on as without graphs. After a capture that fails torch promises
little: what would spoil one, a wait for the GPU, is looked for in a run before it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...compiler.program import CompiledModel
from ..feedback import FeedbackState
from ..finite import alike
from ..plan import Action
from ..traced_loss import TracedLoss
from .bindings import Environment
from .executor import SerialExecutor
from .precision import autocast_dtypes
from .step import Step, StepInput, StepResult

MOST_GRAPHS = 4
"""Batch sizes with a graph; each keeps the memory of a clean step."""

MOST_CAPTURES = 16
"""Captures after which a model whose tensors keep moving goes without graphs."""

TOLERANCE = 1e-3
"""Largest difference of a replay from the step itself, of the largest finite element: libraries may sum in another
order."""

Result = TypeVar("Result")


def capture(function: Callable[[], Result], device: torch.device) -> tuple[Result, Callable[[], None]]:
    """What `function` returns, tensors that a call of the second result computes anew where they stand.

    The function runs twice: first as it is, so that libraries have made what they keep, with waits for the GPU
    forbidden. Both times on a stream that no other graph has: cuBLAS keeps a workspace a stream. Other threads, as a
    loader's that pins memory, may go on meanwhile (``thread_local``).
    """
    before, waits = torch.cuda.current_stream(device), torch.cuda.get_sync_debug_mode()
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(before)
        try:
            torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.stream(aside):
                function()
        finally:
            torch.cuda.set_sync_debug_mode(waits)
        before.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                result = function()
        finally:
            torch.cuda.set_stream(before)  # which a capture that fails would leave on the other

    def replay(stream: torch.cuda.Stream = aside) -> None:  # the stream lives as long as the graph
        graph.replay()

    return result, replay


@dataclass(frozen=True)
class StepGraph:
    """A captured step.

    Attributes:
        given: the step's input, tensors of its own in the place of the batch's, the target's and the feedback's.
        loss: the graph that answers for the loss.
        stands: by binding key, where parameters and buffers stood.
        result: what a replay computes anew.
    """

    given: StepInput
    loss: TracedLoss
    stands: dict[str, tuple[Any, ...]]
    result: StepResult
    replay: Callable[[], None]

    def run(self, given: StepInput) -> StepResult:
        """The result of another step of the same kind; the next overwrites its tensors."""
        copy_batch(given, self.given)
        self.replay()
        return replace(self.result, feedback=given.feedback)


class GraphedExecutor(SerialExecutor):
    """The serial executor, with steps without a perturbed run replayed from CUDA graphs. The tensors of a replayed
    step's result are overwritten by the next.

    Attributes:
        reason: what speaks against graphs of this program altogether; empty if nothing does.
        captured, replayed: how many graphs and steps were.
    """

    def __init__(self, compiled: CompiledModel, sigmas: list[float]) -> None:
        super().__init__(compiled, sigmas)
        self.reason = _reason(self)
        self.captured = self.replayed = 0
        self._graphs: dict[Any, StepGraph | None] = {}
        """By what a graph was captured for; None after the first step of a kind, which warms up."""
        self._learned: FeedbackState | None = None
        self._own: FeedbackState | None = None
        """What `_learned` holds, where all graphs read it."""
        self._capturing = False

    def execute(self, step: Step, plan: Sequence[Action]) -> None:
        """A clean step by its graph: the second of its kind captures it, the third is the first replayed."""
        given = step.given
        if self.reason or self.record is not None or plan is not self.clean_plan or not _fits(given):
            super().execute(step, plan)
            return
        assert given.output_gradient is not None
        kind = _kind(given)
        graph = self._graphs.get(kind)
        stays = graph is not None and graph.stands == _stands(given.environment)
        if graph is not None and stays and given.output_gradient.answers(graph.loss):
            self._learn(given.feedback)
            step.result = graph.run(given)
            step.clean = step.result.losses
            given.output_gradient.answered()
            self.replayed += 1
            self.demand_finite(step.clean, step._fail_clean)
            return
        super().execute(step, plan)
        loss = given.output_gradient.last
        if loss is None or loss.draws or loss.remembers or any(own.device != given.device for own in loss.own):
            self._graphs.pop(kind, None)
        elif graph is not None and stays and graph.loss is loss:  # the loss's code was compared: so is the graph
            self._try(lambda: self._prove(graph, given, step.result))
        elif kind in self._graphs and self.captured == MOST_CAPTURES:
            self._refuse("would have to be captured again and again: the model's parameters or buffers keep moving")
        elif kind in self._graphs:
            self._try(lambda: self._capture(kind, loss, given, step.result, plan))
        elif len(self._graphs) < MOST_GRAPHS:
            self._graphs[kind] = None

    def demand_finite(self, values: Tensor, fail: Callable[[], NoReturn]) -> None:
        """Not while a graph is captured, which cannot wait for a number: after each replay."""
        if not self._capturing:
            super().demand_finite(values, fail)

    def _capture(
        self, kind: Any, loss: TracedLoss, given: StepInput, expected: StepResult, plan: Sequence[Action]
    ) -> None:
        """Capture the graph of such steps, proved by this one's result."""
        self.captured += 1
        self._learn(given.feedback)
        own = own_input(given, self._own)

        def run() -> StepResult:
            assert own.output_gradient is not None
            step = Step(self, replace(own, environment=dict(own.environment)))
            with own.output_gradient.unchecked():
                super(GraphedExecutor, self).execute(step, plan)
            return step.result

        self._capturing = True
        try:
            result, replay = capture(run, given.device)
        finally:
            self._capturing = False
        graph = StepGraph(own, loss, _stands(given.environment), result, replay)
        self._prove(graph, given, expected)
        self._graphs[kind] = graph

    def _prove(self, graph: StepGraph, given: StepInput, expected: StepResult) -> None:
        """Raise unless a replay gives the result that is expected. It is spoiled before, so that a replay which does
        nothing shows."""
        self._learn(given.feedback)
        spoil(graph.result, given.environment)
        wrong = difference(graph.run(given), expected)
        if wrong:
            raise _WrongReplayError(wrong)

    def _learn(self, feedback: FeedbackState | None) -> None:
        """Have all graphs read what feedback has learned."""
        if feedback is None or feedback is self._learned:
            return
        if self._own is None:
            self._own = own_feedback(feedback)
        else:
            for value, other in zip(self._own.tensors(), feedback.tensors(), strict=True):
                value.copy_(other)
        self._learned = feedback

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
        self._graphs, self._own, self._learned = {}, None, None
        warnings.warn(f"{self.reason}. Steps go on without graphs, with the same results.", stacklevel=2)


class _WrongReplayError(Exception):
    """A replay gave another result."""


def _reason(executor: SerialExecutor) -> str:
    """What speaks against graphs of a compiled model, known before the first step."""
    compiled = executor.compiled
    if compiled.estimator.feedback != "learned":
        return 'every step is perturbed, without feedback="learned"'
    if executor.corrects:
        return "a correction needs perturbed runs in every step"
    graphs = [*executor.stages, *(graph for graph, _ in executor.gradients.values())]
    return "the model draws random numbers in every step" if any("runtime:key" in g.inputs for g in graphs) else ""


def _fits(given: StepInput) -> bool:
    """Whether all that a step reads is on its device: a number on the CPU would be a constant of the graph."""
    leaves = [*pytree.tree_leaves(given.target), *_read(given.environment).values()]
    learned = given.output_gradient is not None and given.weights is None
    return learned and all(isinstance(leaf, Tensor) and leaf.device == given.device for leaf in leaves)


_MODELS = ("parameter:", "buffer:")
_GIVEN = (*_MODELS, "constant:", "input:")


def _read(environment: Environment) -> Environment:
    """The tensors that a clean step may read, but for what was learned."""
    return {key: v for key, v in environment.items() if key.startswith(_GIVEN) and isinstance(v, Tensor)}


def _kind(given: StepInput) -> Any:
    """What steps have in common that one graph serves."""
    leaves, spec = pytree.tree_flatten(given.target)
    shapes = tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)
    return given.samples, spec, shapes, autocast_dtypes()


def _stands(environment: Environment) -> dict[str, tuple[Any, ...]]:
    """Where the model's own tensors stand."""
    held = ((key, value) for key, value in environment.items() if key.startswith(_MODELS))
    return {key: (value.data_ptr(), value.shape, value.stride()) for key, value in held}


def own_input(given: StepInput, feedback: FeedbackState | None) -> StepInput:
    """The input of a step with tensors of its own, but for the model's."""
    environment = {
        key: value if key.startswith(_MODELS) else _own(value)
        for key, value in given.environment.items()
        if key.startswith((*_GIVEN, "runtime:"))
    }
    target = pytree.tree_map(_own, given.target)
    return replace(given, environment=environment, target=target, feedback=feedback, loss=_no_loss)


def own_feedback(state: FeedbackState) -> FeedbackState:
    """What was learned, in tensors of its own."""
    basis = state.basis
    if basis is not None:
        basis = replace(basis, directions=basis.directions.clone(), strengths=basis.strengths.clone())
    return replace(state, jacobians={site: j.clone() for site, j in state.jacobians.items()}, basis=basis)


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _no_loss(leaves: list[Any], copies: int, samples: int) -> Tensor:
    """A clean step of learned feedback has `StepInput.output_gradient`; the loss would hold on to its own target."""
    raise AssertionError


def copy_batch(given: StepInput, own: StepInput) -> None:
    """Batch and target, to where a graph reads them."""
    for key, value in own.environment.items():
        if key.startswith("input:") and isinstance(value, Tensor):
            value.copy_(given.environment[key], non_blocking=True)
    for value, other in zip(pytree.tree_leaves(own.target), pytree.tree_leaves(given.target), strict=True):
        value.copy_(other, non_blocking=True)


def _named(result: StepResult) -> dict[str, Tensor]:
    """What a step gives, by what it is."""
    found = {"losses": result.losses}
    found |= {f"gradient of {name}": value for name, value in result.gradients.items()}
    return found | {f"buffer {name}": value for name, value in result.buffers.items()}


def spoil(result: StepResult, environment: Environment) -> None:
    """Overwrite a result, but for what may be the model's or the batch's own memory."""
    held = {value.untyped_storage().data_ptr() for value in _read(environment).values()}
    for value in _named(result).values():
        if value.is_contiguous() and value.untyped_storage().data_ptr() not in held:
            value.fill_(torch.nan if value.is_floating_point() else 1)


def difference(found: StepResult, expected: StepResult) -> str:
    """The first of a step's tensors that differs, in words; nothing."""
    mine = _named(found)
    for name, other in _named(expected).items():
        floating = other.is_floating_point()
        if not (alike(mine[name], other, TOLERANCE) if floating else torch.equal(mine[name], other)):
            return name
    return ""
