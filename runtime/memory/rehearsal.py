"""What a step will take: it is run on fake tensors, by the executor's own code, and what is alive is counted.

So there is no second model of a step that could drift from the first. What fake tensors cannot tell is put in their
place: the loss, which is the user's (`_loss`), and what operators hold while they run (`kernels`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ...compiler.cost import with_samples
from ...compiler.program import CompiledModel, binding_key
from ...passes.graph import Role, placeholders
from ..execution.bindings import Environment
from ..execution.executor import SerialExecutor
from ..execution.fusion import Fused
from ..execution.step import HANDLERS, Step, StepInput
from ..feedback import untaught
from ..linearity import response
from ..plan import Action, Error, Forward, Gradient, Learn, Perturb
from .live import LiveBytes

CLEAN = "clean activations"
CAPTURES = "captures"
COPIES = "copies"
LOSSES = "losses and outputs"
GRADIENTS = "gradients"
FEEDBACK = "feedback"

_PARTS: dict[type, str] = {Forward: CLEAN, Error: LOSSES, Perturb: COPIES, Gradient: GRADIENTS, Learn: FEEDBACK}

MEASURE, COMMIT = "measuring σ", "commit"
"""What a step does beside its plan's actions; the second writes ``.grad``."""


@dataclass(frozen=True)
class ActionMemory:
    """What is alive in the course of an action, in bytes beyond parameters, buffers, inputs and the optimizer's."""

    name: str
    before: int
    peak: int
    after: int

    @property
    def own(self) -> int:
        """What the action adds to what it finds."""
        return self.peak - self.before


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a step, predicted, in bytes beyond parameters, buffers, inputs, what feedback has learned and the
    optimizer's state."""

    samples: int
    chunk: int
    """Copies side by side in the largest chunk; 0 without a perturbed run."""
    workers: int
    peak: int
    at: str
    """The action with the peak."""
    parts: dict[str, int]
    """The peak by what it consists of."""
    tensors: int
    """The peak of tensors alone, without NumPy's buffers: what torch's allocator is asked for."""
    captures: int
    """Bytes of captures that wait for their gradients, at most."""
    actions: tuple[ActionMemory, ...]


def rehearse(compiled: CompiledModel, samples: int | None = None, *, workers: int = 1) -> MemoryPlan:
    """The memory of a step with a perturbed run, on a batch of so many samples (the example's, if not given).

    With ``sigma="auto"`` the step measures σ first. With several workers the prediction is an upper bound: whatever
    order they take tasks in, no value is let go before the step's end, and each further worker has the largest of the
    tasks that may run beside another, or the captures of a perturbed run with the largest of their gradients.
    """
    count = compiled.captured.signature.batch if samples is None else samples
    executor = SerialExecutor(compiled, [1.0] * len(compiled.sites))
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        return _Rehearsal(executor, count, workers).plan()


class _Rehearsal:
    """A step on fake tensors."""

    def __init__(self, executor: SerialExecutor, samples: int, workers: int) -> None:
        self.executor, self.compiled = executor, executor.compiled
        self.samples, self.workers = samples, workers
        self.live = LiveBytes()
        self.found: list[ActionMemory] = []
        self.peak = self.tensors = self.captures = 0
        self.at = ""
        self.parts: dict[str, int] = {}
        self.given = self._given()

    def plan(self) -> MemoryPlan:
        with self.live:
            if self.compiled.estimator.sigma == "auto" and self.compiled.runs:
                with self._observed(MEASURE, COPIES):
                    self._measure()
            self._step()
        beside = self._beside()
        chunks = [copies for run in self.executor.copies for copies in run]
        return MemoryPlan(
            self.samples,
            max((len(copies) for copies in chunks), default=0),
            self.workers,
            self.peak + (self.workers - 1) * beside,
            self.at,
            dict(self.parts),
            self.tensors + (self.workers - 1) * beside,
            self.captures,
            tuple(self.found),
        )

    def _beside(self) -> int:
        """Bytes of the largest task beside another, with the captures of the run that it reads, which no other does."""
        tasks = {str(action) for action in self.executor.plan if isinstance(action, (Perturb, Gradient, Learn))}
        own = {one.name: one.own for one in self.found if one.name in tasks}
        left = max((one.after - one.before for one in self.found if one.name.startswith("P")), default=0)
        reading = max((size for name, size in own.items() if name.startswith("G") and "." in name), default=0)
        return max([left + reading, *own.values()])

    def _measure(self) -> None:
        environment = self.executor.run_clean(self.given).environment
        self.live.relabel([value for key, value in environment.items() if key not in self.given.environment], CLEAN)
        for run in self.compiled.runs:
            response(self.executor, self.given, environment, run.index, run.sites[0], 1.0)

    def _step(self) -> None:
        step = Step(self.executor, self.given)
        plan = self.executor.plan
        for action in self.executor.fused(plan) if self.workers == 1 else plan:
            first = action.actions[0] if isinstance(action, Fused) else action
            if self._known(first):
                self._repeat(step, first)
            else:
                with self._observed(str(action), _PARTS[type(first)]):
                    HANDLERS[type(action)](step, action)
                    if self.workers == 1:
                        step.release(action)
                self._relabel(step, first)
        result = step.result
        del step
        with self._observed(COMMIT, GRADIENTS):
            _written = [torch.empty_like(gradient) for gradient in result.gradients.values()]

    @contextmanager
    def _observed(self, name: str, part: str) -> Iterator[None]:
        """Look at what is alive while the block runs."""
        live = self.live
        live.part = part
        live.restart()
        before = live.now
        yield
        self.found.append(ActionMemory(name, before, live.peak, live.now))
        self.tensors = max(self.tensors, live.tensors)
        if live.peak > self.peak:
            self.peak, self.at, self.parts = live.peak, name, dict(live.parts)

    def _relabel(self, step: Step, action: Action) -> None:
        """Name what an action leaves."""
        if isinstance(action, Forward):
            kept = [value for key, value in step.environment.items() if key.startswith("capture:")]
            self.live.relabel(kept, CAPTURES)
            self.live.relabel([v for k, v in step.environment.items() if k.startswith("output:")], LOSSES)
        elif isinstance(action, Perturb):
            self.live.relabel([*step.losses.values(), *step.responses.values()], LOSSES)
            self.live.relabel(list(step.perturbed.values()), CAPTURES)
        self.captures = max(self.captures, self.live.of(CAPTURES))

    def _known(self, action: Action) -> bool:
        """Whether it is of a chunk that takes what the second of its run took, but for what losses add up to."""
        if isinstance(action, Perturb):
            run, chunk = action.run, action.chunk
        elif isinstance(action, Gradient) and action.chunk is not None:
            run = next(g.run for g in self.compiled.gradients if g.site.index == action.site)
            chunk = action.chunk
        else:
            return False
        return 1 < chunk < len(self.executor.copies[run]) - 1

    def _repeat(self, step: Step, action: Action) -> None:
        """What stays of such a chunk, without running it."""
        if isinstance(action, Perturb):
            self.live.part = LOSSES
            for by_chunk in (step.losses, step.responses):
                if (action.run, 1) in by_chunk:
                    by_chunk[action.run, action.chunk] = torch.empty_like(by_chunk[action.run, 1])
        if self.workers == 1:
            step.release(action)

    # --- what a step is given ----------------------------------------------------------------------------------------

    def _given(self) -> StepInput:
        compiled, estimator = self.compiled, self.compiled.estimator
        environment: Environment = {}
        for node in placeholders(compiled.captured.module):
            if node.meta["role"] != Role.RUNTIME:
                environment[binding_key(node)] = pytree.tree_map(self._like, node.meta["val"])
        leaves = [leaf for leaf in pytree.tree_leaves(environment) if isinstance(leaf, Tensor)]
        device = leaves[0].device
        environment["runtime:key"] = torch.zeros(2, dtype=torch.int64, device=device)
        environment["runtime:sigmas"] = torch.ones(len(compiled.sites), dtype=torch.float64, device=device)
        learned = estimator.feedback == "learned"
        feedback = None
        if learned:
            feedback = untaught(compiled)
            leaves += feedback.tensors()
        self.live.ignore(*leaves, environment["runtime:key"], environment["runtime:sigmas"])
        error = self._output_gradient if learned else None
        return StepInput(environment, self._loss, self.samples, device, None, None, feedback, error)  # type: ignore[arg-type]

    def _like(self, val: Any) -> Any:
        return with_samples(val, self.samples) if isinstance(val, (Tensor, torch.SymInt)) else val

    def _loss(self, leaves: list[Any], copies: int, samples: int) -> Tensor:
        """In place of the user's loss: it is taken to need as much as the outputs once more (a logarithm of softmax),
        and gives a number a sample."""
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        _made = [torch.empty_like(leaf) for leaf in outputs]
        if self.compiled.credits_nodes:
            return outputs[0].new_empty(copies, outputs[0].shape[1] if outputs[0].dim() > 1 else 1)
        return outputs[0].new_empty(copies, samples if self.compiled.estimator.credit == "sample" else 1)

    def _output_gradient(self, output: Any, target: Any, key: Tensor) -> tuple[Tensor, Tensor]:
        """In place of the loss's derivative, which is taken to need as much as the outputs twice more."""
        leaves = pytree.tree_leaves(output)
        losses = self._loss(leaves, 1, self.samples)[0]
        read = [leaves[index] for index in self.executor.returned]
        _made = [torch.empty_like(leaf) for leaf in read for _ in range(2)]
        return losses, torch.cat([leaf.reshape(self.samples, -1) for leaf in read], 1)
