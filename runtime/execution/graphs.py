"""Steps without a perturbed run as one CUDA graph: captured once for a batch size, replayed by one call of the driver.

A clean step of learned feedback (forward, loss, all gradient subgraphs) is a few hundred kernels that take microseconds
each, and Python takes as long to issue one. A graph has them issued together. What a graph reads has to stand where it
stood when it was captured: parameters and buffers do (checked before every replay); the batch, the target and what
feedback has learned are copied to where they stood. What it writes is overwritten by the next replay, so that a step's
result is read before that (`Program` copies gradients to ``.grad``).

Noise is keyed by the step, and keys are read on the host: a step that makes noise, perturbed or with a model's own
dropout, is not captured, nor is one whose loss draws numbers, remembers something, or is called in every step.

**Proof before use**: the first replay of every graph is compared with the same step done operation by operation. If it
differs, or torch cannot capture it, a warning says so and steps go on as without graphs.
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
from ..plan import Action
from .bindings import Environment
from .executor import SerialExecutor
from .precision import autocasting
from .step import Step, StepInput, StepResult

MOST_GRAPHS = 4
"""Batch sizes with a graph; each keeps the memory of a clean step."""

MOST_CAPTURES = 16
"""Captures after which a model whose tensors keep moving goes without graphs."""

TOLERANCE = 1e-3
"""Largest difference of a replay from the step itself, of the largest element: libraries may sum in another order."""

Result = TypeVar("Result")


def capture(function: Callable[[], Result], device: torch.device) -> tuple[Result, Callable[[], None]]:
    """What `function` returns, tensors that a call of the second result computes anew where they stand.

    The function runs twice: once as it is, on a stream of its own, so that libraries have made what they keep.
    """
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        function()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return result, graph.replay


@dataclass
class StepGraph:
    """A captured step.

    Attributes:
        given: the step's input, tensors of its own in the place of the batch's, the target's and the feedback's.
        stands: by binding key, where parameters and buffers stood.
        replay: computes `result` anew.
    """

    given: StepInput
    stands: dict[str, tuple[Any, ...]]
    result: StepResult
    replay: Callable[[], None]
    learned: FeedbackState | None

    def run(self, given: StepInput) -> StepResult:
        """The result of another step of the same kind; its tensors are overwritten by the next."""
        copy_batch(given, self.given)
        if given.feedback is not self.learned:
            copy_feedback(given.feedback, self.given.feedback)
            self.learned = given.feedback
        self.replay()
        return replace(self.result, feedback=given.feedback)


class GraphedExecutor(SerialExecutor):
    """The serial executor, with steps without a perturbed run replayed from CUDA graphs.

    Attributes:
        reason: why no step is replayed; empty while nothing speaks against it.
        captured, replayed: how many graphs and steps were.
    """

    def __init__(self, compiled: CompiledModel, sigmas: list[float]) -> None:
        super().__init__(compiled, sigmas)
        self.reason = _reason(self)
        self.captured = self.replayed = 0
        self._graphs: dict[Any, StepGraph | None] = {}
        """By what a graph was captured for; None after the first step of a kind, which warms up."""
        self._capturing = False

    def execute(self, step: Step, plan: Sequence[Action]) -> None:
        """A clean step by its graph: the second of its kind captures it, the third is the first replayed."""
        given = step.given
        if self.reason or self.record is not None or plan is not self.clean_plan or not _settled(given):
            super().execute(step, plan)
            return
        kind = _kind(given)
        graph = self._graphs.get(kind)
        if graph is not None and graph.stands == _stands(given.environment):
            step.result = graph.run(given)
            step.clean = step.result.losses
            given.output_gradient.answered()  # type: ignore[union-attr]
            self.replayed += 1
            self.demand_finite(step.clean, step._fail_clean)
            return
        super().execute(step, plan)
        if kind in self._graphs and self.captured == MOST_CAPTURES:
            self._refuse("would have to be captured again and again: the model's parameters or buffers keep moving")
        elif kind in self._graphs:
            graph = self._captured(given, step.result, plan)
            if graph is not None:
                self._graphs[kind] = graph
        elif len(self._graphs) < MOST_GRAPHS:
            self._graphs[kind] = None

    def demand_finite(self, values: Tensor, fail: Callable[[], NoReturn]) -> None:
        """Not while a graph is captured, which cannot wait for a number: after each replay."""
        if not self._capturing:
            super().demand_finite(values, fail)

    def _captured(self, given: StepInput, expected: StepResult, plan: Sequence[Action]) -> StepGraph | None:
        """The graph of such steps, proved by this one's result."""
        own = own_input(given)

        def run() -> StepResult:
            assert own.output_gradient is not None
            step = Step(self, replace(own, environment=dict(own.environment)))
            with own.output_gradient.unchecked():
                super(GraphedExecutor, self).execute(step, plan)
            return step.result

        self.captured += 1
        self._capturing = True
        try:
            result, replay = capture(run, given.device)
            graph = StepGraph(own, _stands(given.environment), result, replay, given.feedback)
            wrong = _difference(graph.run(given), expected)
        except Exception as error:  # whatever torch or a library says of a capture: training goes on without
            wrong = f"could not be captured ({type(error).__name__}: {error})"
        finally:
            self._capturing = False
        if not wrong:
            return graph
        self._refuse(wrong)
        return None

    def _refuse(self, wrong: str) -> None:
        self.reason = f"the CUDA graph of a step {wrong}"
        self._graphs = {}
        warnings.warn(f"{self.reason}. Steps go on without graphs, with the same results.", stacklevel=2)


def _reason(executor: SerialExecutor) -> str:
    """What speaks against graphs of a compiled model, known before the first step."""
    compiled = executor.compiled
    if compiled.estimator.feedback != "learned":
        return 'every step is perturbed, without feedback="learned"'
    if executor.corrects:
        return "a correction needs perturbed runs in every step"
    graphs = [*executor.stages, *(graph for graph, _ in executor.gradients.values())]
    return "the model draws random numbers in every step" if any("runtime:key" in g.inputs for g in graphs) else ""


def _settled(given: StepInput) -> bool:
    """Whether the loss, too, is only its graph in this step."""
    gradient, leaves = given.output_gradient, pytree.tree_leaves(given.target)
    same = all(isinstance(leaf, Tensor) and leaf.device == given.device for leaf in leaves)
    return gradient is not None and same and given.weights is None and gradient.settled()


def _kind(given: StepInput) -> Any:
    """What steps have in common that one graph serves."""
    leaves, spec = pytree.tree_flatten(given.target)
    shapes = tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)
    return given.samples, spec, shapes, tuple(map(torch.get_autocast_dtype, autocasting()))


def _stands(environment: Environment) -> dict[str, tuple[Any, ...]]:
    """Where the model's own tensors stand."""
    held = {key: value for key, value in environment.items() if key.startswith(("parameter:", "buffer:"))}
    return {key: (value.data_ptr(), value.shape, value.stride()) for key, value in held.items()}


def own_input(given: StepInput) -> StepInput:
    """The input of a step with tensors of its own, but for the model's."""
    environment = {
        key: value if key.startswith(("parameter:", "buffer:")) else _own(value)
        for key, value in given.environment.items()
        if key.startswith(("parameter:", "buffer:", "constant:", "input:", "runtime:"))
    }
    feedback = given.feedback
    if feedback is not None:
        basis = feedback.basis
        if basis is not None:
            basis = replace(basis, directions=basis.directions.clone(), strengths=basis.strengths.clone())
        feedback = replace(feedback, jacobians={k: j.clone() for k, j in feedback.jacobians.items()}, basis=basis)
    return replace(given, environment=environment, target=pytree.tree_map(_own, given.target), feedback=feedback)


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def copy_batch(given: StepInput, own: StepInput) -> None:
    """Batch and target, to where a graph reads them."""
    for key, value in own.environment.items():
        if key.startswith("input:") and isinstance(value, Tensor):
            value.copy_(given.environment[key], non_blocking=True)
    for value, other in zip(pytree.tree_leaves(own.target), pytree.tree_leaves(given.target), strict=True):
        value.copy_(other, non_blocking=True)


def copy_feedback(given: FeedbackState | None, own: FeedbackState | None) -> None:
    """What was learned, to where a graph reads it."""
    assert given is not None
    assert own is not None
    for value, other in zip(own.tensors(), given.tensors(), strict=True):
        value.copy_(other)


def _difference(found: StepResult, expected: StepResult) -> str:
    """What is wrong with a replay, in words; nothing."""
    pairs = {"losses": (found.losses, expected.losses)}
    pairs |= {f"gradient of {name}": (found.gradients[name], value) for name, value in expected.gradients.items()}
    pairs |= {f"buffer {name}": (found.buffers[name], value) for name, value in expected.buffers.items()}
    for name, (one, other) in pairs.items():
        scale = float(other.abs().max()) if other.numel() else 0.0
        if not torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True):
            return f"gives other numbers for the {name}"
    return ""
