"""A step as one CUDA graph: what it reads is put where it stood when it was captured, and what it wrote is taken.

What is *given* to a step (the batch, the target, its key and σ, what feedback has learned) has a place of its own for
each graph, to which it is copied; parameters and buffers are read where the model has them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..feedback import FeedbackState
from ..finite import NARROW_ROUNDING, alike, all_finite, rounding_of
from ..learning import Lesson, broken, learned
from ..targets import target_tensors
from ..traced_loss import TracedLoss
from .bindings import Environment
from .precision import autocast_dtypes, outside_autocast
from .step import StepInput, StepResult

Result = TypeVar("Result")


def capture(function: Callable[[], Result], device: torch.device) -> tuple[Result, Callable[[], None]]:
    """What `function` returns, tensors that a call of the second result computes anew where they stand.

    The function runs twice: first as it is, so that libraries have made what they keep, with waits for the GPU
    forbidden (in all threads, which torch does not tell apart there). Both times on a stream that no other graph has:
    cuBLAS keeps a workspace a stream. While it is captured other threads, as a loader's that pins memory, may go on
    (``thread_local``).

    Raises:
        NotReadyError: the first run failed, so that nothing was captured.
    """
    before = torch.cuda.current_stream(device)
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(before)
        try:
            with _without_waits(), torch.cuda.stream(aside):
                function()
        except Exception as error:
            raise NotReadyError(f"{type(error).__name__}: {error}") from error
        finally:
            before.wait_stream(aside)  # what it still reads may be freed on the other
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                result = function()
        finally:
            torch.cuda.set_stream(before)  # which a capture that fails would leave on the other

    return result, graph.replay


class NotReadyError(Exception):
    """A step that is to be captured cannot do without a wait for the GPU, or fails."""


@contextmanager
def _without_waits() -> Iterator[None]:
    """With an error where the host would wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


@dataclass
class Watched:
    """What is put off while a step is captured, since it needs numbers.

    Attributes:
        demanded: has to be finite.
        lesson: what feedback learns from.
    """

    demanded: list[Tensor] = field(default_factory=list)
    lesson: Lesson | None = None


@dataclass(frozen=True)
class StepGraph:
    """A captured step.

    Attributes:
        given: the step's input, tensors of its own in the place of what steps are given.
        loss: the graph of the loss, if the step has that in place of its code; one with another needs another.
        stands: by binding key, where parameters and buffers stood.
        result: what a replay computes anew.
        watched: what its numbers have to say.
        held: memory that it reads beside, for as long as it lives.
    """

    given: StepInput
    loss: TracedLoss | None
    stands: dict[str, tuple[Any, ...]]
    result: StepResult
    watched: Watched
    held: list[Tensor]
    replay: Callable[[], None]

    def run(self, given: StepInput) -> StepResult | None:
        """The result of another step of the same kind; the next overwrites its tensors, but for what was learned. None
        if that step does more than was captured: something is not finite, or what feedback has learned is broken."""
        copy_given(given, self.given)
        self.replay()
        if not all_finite(*self.watched.demanded):
            return None
        feedback, lesson = given.feedback, self.watched.lesson
        if lesson is not None:
            assert feedback is not None
            numbers: list[float] = lesson.numbers.tolist()
            if broken(numbers):
                return None
            jacobians = {site: jacobian.clone() for site, jacobian in lesson.jacobians.items()}
            feedback = outside_autocast(learned)(feedback, replace(lesson, jacobians=jacobians), numbers)
        return replace(self.result, feedback=feedback)

    def spoil(self) -> None:
        """Overwrite the result, but for what may be the model's or the batch's own memory: a replay that does nothing
        shows."""
        held = {value.untyped_storage().data_ptr() for value in read_by(self.given.environment).values()}
        lesson = self.watched.lesson
        made = [*named(self.result).values(), *(() if lesson is None else lesson.jacobians.values())]
        for value in made:
            if value.is_contiguous() and value.untyped_storage().data_ptr() not in held:
                value.fill_(torch.nan if value.is_floating_point() else 1)


_MODELS = ("parameter:", "buffer:")
_BATCH = ("input:", "runtime:key", "runtime:sigmas")
_GIVEN = (*_MODELS, *_BATCH, "constant:")


def read_by(environment: Environment) -> Environment:
    """The tensors that a step is given."""
    return {key: v for key, v in environment.items() if key.startswith(_GIVEN) and isinstance(v, Tensor)}


def stands(environment: Environment) -> dict[str, tuple[Any, ...]]:
    """Where the model's own tensors stand."""
    held = ((key, value) for key, value in environment.items() if key.startswith(_MODELS))
    return {key: (value.data_ptr(), value.shape, value.stride()) for key, value in held}


def own_input(given: StepInput, feedback: FeedbackState | None) -> StepInput:
    """The input of a step with tensors of its own, but for the model's."""
    environment = {
        key: value if key.startswith(_MODELS) else _own(value)
        for key, value in given.environment.items()
        if key.startswith(_GIVEN)
    }
    target = pytree.tree_map(_own, given.target)
    assert given.loss_of is not None
    loss = given.loss_of(target, given.device)  # the given one holds on to its own target
    return replace(given, environment=environment, loss=loss, target=target, feedback=feedback)


def own_feedback(state: FeedbackState) -> FeedbackState:
    """What was learned, in tensors of its own."""
    basis = state.basis
    if basis is not None:
        basis = replace(basis, directions=basis.directions.clone(), strengths=basis.strengths.clone())
    return replace(state, jacobians={site: j.clone() for site, j in state.jacobians.items()}, basis=basis)


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def copy_given(given: StepInput, own: StepInput) -> None:
    """Batch, target, key and σ, to where a graph reads them."""
    for key, value in own.environment.items():
        if key.startswith(_BATCH) and isinstance(value, Tensor):
            value.copy_(given.environment[key], non_blocking=True)
    for value, other in zip(target_tensors(own.target), target_tensors(given.target), strict=True):
        value.copy_(other, non_blocking=True)


def named(result: StepResult) -> dict[str, Tensor]:
    """What a step gives, by what it is, but for what it has learned."""
    found = {"losses": result.losses}
    found |= {f"gradient of {name}": value for name, value in result.gradients.items()}
    return found | {f"buffer {name}": value for name, value in result.buffers.items()}


def _jacobians(state: FeedbackState | None) -> dict[str, Tensor]:
    """Of all outputs: a basis may lie in other ways along the same directions."""
    if state is None:
        return {}
    basis = None if state.basis is None else state.basis.leading.T
    return {f"feedback of noise point {k}": j if basis is None else j @ basis for k, j in state.jacobians.items()}


def difference(found: StepResult, expected: StepResult) -> str:
    """The first of a step's tensors that differs by more than rounding (libraries may sum in another order), in words;
    nothing."""
    mine = named(found) | _jacobians(found.feedback)
    for name, other in (named(expected) | _jacobians(expected.feedback)).items():
        floating = other.is_floating_point()
        if not (alike(mine[name], other, rounding(other)) if floating else torch.equal(mine[name], other)):
            return name
    return ""


def rounding(value: Tensor) -> float:
    """How far sums in another order may be apart (`finite.alike`); within autocast those of 16 bits are behind all."""
    return NARROW_ROUNDING if autocast_dtypes() else rounding_of(value.dtype)
