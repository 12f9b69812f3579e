"""A step in progress: what each action of a plan does.

Each action reads what the actions wrote that its task waits for (`schedule.tasks`), and writes what no other does at
the same time, so that they may run in any such order. Nothing is written to the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...compiler.program import GradientSubgraph
from ...passes.errors import NonFiniteLossError
from ..feedback import FeedbackState
from ..noise.rows import Probe
from ..output_gradient import OutputGradient
from ..plan import Action, Error, Forward, Gradient, Learn, Perturb, Update
from ..step_loss import Losses, StepLoss
from .bindings import BoundGraph, Environment
from .bound import BoundModel
from .fusion import Fused
from .lifetimes import NARROWED
from .narrow import narrow
from .precision import outside_autocast


@dataclass
class StepResult:
    """What a step computed; nothing has been written anywhere yet."""

    output: list[Any]
    """Leaves of the model's output in the clean run."""
    losses: Tensor
    """Clean losses: ``(N,)``, or ``()`` with ``credit="batch"``."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Estimated gradient of the mean loss, by parameter name."""
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """New values of the buffers that the forward changes."""
    feedback: FeedbackState | None = None
    """What feedback has learned, this step included."""


class Updates(Protocol):
    """What the optimizer has still to do after the step before, each parameter's part by itself. As a context it is
    finished in the end, however that comes."""

    def gradient(self, parameter: str, /) -> Tensor | None:
        """What it is done by; None if the parameter is not to be updated, or no longer."""
        ...

    def apply(self, parameter: str, /) -> None:
        """Update a parameter, unless that is done or begun. Safe from any thread."""
        ...

    def finish(self) -> None:
        """Update all that are left, and wait for those that others are at."""
        ...

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...


@dataclass(frozen=True)
class StepInput:
    """What a step is a function of."""

    environment: Environment
    """Parameters, buffers, constants, inputs, and ``runtime:key`` and ``runtime:sigmas``, by binding key."""
    loss: Losses
    samples: int
    """Batch size N."""
    device: torch.device
    target: Any = None
    loss_of: StepLoss | None = None
    """`loss` for other targets."""
    feedback: FeedbackState | None = None
    output_gradient: OutputGradient | None = None
    """With learned feedback: the loss's gradient at the outputs."""
    perturbed: bool = True
    """Whether the copies run; with learned feedback a step can do without (`LikelihoodRatio.probe_every`)."""
    weights: Tensor | None = None
    """How much each sample counts in the gradient, ``(N,)``, where they do not count alike (`runtime.sampling`)."""
    updates: Updates | None = None
    """Of the weights, each to be done before anything reads it; of a step that fails some are left."""


class Step:
    """The state of a step in progress; one method an action."""

    def __init__(self, bound: BoundModel, given: StepInput) -> None:
        self.bound, self.given = bound, given
        self.compiled, self.estimator = bound.compiled, bound.compiled.estimator
        self.environment = given.environment
        self.environment["runtime:copies"] = bound.clean_copies
        self.perturbed: dict[tuple[int, int], Environment] = {}
        """By run and chunk, the captures of its own, until all gradients that read them are done."""
        self.unread: dict[tuple[int, int], set[int]] = {}
        """The sites of those gradients."""
        self.losses: dict[tuple[int, int], Tensor] = {}
        self.responses: dict[tuple[int, int], Tensor] = {}
        self.corrections: Environment = {}
        self.probed = self.estimator.num_probed(given.samples)
        self.narrowed: dict[int, Environment] = {}
        self.lifetimes = bound.lifetimes[given.perturbed]
        self.unfinished = dict(self.lifetimes.readers)
        """By key, how many actions have still to read its value."""
        self.releasing = threading.Lock()
        self.clean = torch.empty(0)
        self.error = torch.empty(0)
        self.result = StepResult([], self.clean, feedback=given.feedback)
        if given.feedback is not None:
            for site, jacobian in given.feedback.jacobians.items():
                self.environment[f"runtime:feedback.{site}"] = jacobian

    def release(self, action: Action | Fused) -> None:
        """After an action: let go of the values that nothing else in the step's plan reads (`lifetimes`)."""
        with self.releasing:
            ended = []
            for key in action.reads if isinstance(action, Fused) else self.lifetimes.reads[action]:
                self.unfinished[key] -= 1
                if not self.unfinished[key]:
                    ended.append(key)
        for key in ended:
            if key.startswith(NARROWED):
                self.narrowed.pop(int(key.removeprefix(NARROWED)), None)
            else:
                self.environment.pop(key, None)

    def update(self, action: Update) -> None:
        assert self.given.updates is not None
        self.given.updates.apply(action.parameter)

    def forward(self, action: Forward) -> None:
        self.environment.update(self.bound.stages[action.stage](self.environment))

    def fused(self, action: Fused) -> None:
        found = self.bound.together[self.given.perturbed, action](self.environment)
        if isinstance(action.actions[0], Forward):
            self.environment.update(found)
        else:
            self._add(found)

    def evaluate(self, action: Error) -> None:
        given, result = self.given, self.result
        result.output = output_leaves(self.environment)
        leaves = [
            leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in result.output
        ]  # a loss may write into it
        if given.output_gradient is None:
            self.clean = given.loss(leaves, 1, given.samples)[0]
        else:
            key = self.environment["runtime:key"]
            output = pytree.tree_unflatten(leaves, self.compiled.captured.out_spec)
            self.clean, self.error = given.output_gradient(output, given.target, key)
            self.environment["runtime:error"] = self.error
            if given.feedback is not None and given.feedback.basis is not None:
                self.environment["runtime:projected_error"] = given.feedback.projected(self.error)
        self.bound.demand_finite(self.clean, self._fail_clean)
        result.losses = self.clean.reshape(()) if self.estimator.credit == "batch" else self.clean
        if self.compiled.credits_nodes:
            result.losses = self.clean.sum(0, keepdim=True)
        result.buffers = {
            key.removeprefix("mutation:"): value
            for key, value in self.environment.items()
            if key.startswith("mutation:")
        }

    def perturb(self, action: Perturb) -> None:
        given, probed = self.given, self.probed
        at = (action.run, action.chunk)
        runtime: Environment = {"runtime:copies": self.bound.copies[action.run][action.chunk]}
        found = self.bound.runs[action.run](runtime, self._read_by(action.run))
        readers = self.bound.readers[action.run]
        if readers:
            captures = {key: value for key, value in found.items() if key.startswith("capture:")}
            self.perturbed[at], self.unread[at] = {**captures, **runtime}, set(readers)
        leaves = output_leaves(found)
        if self.estimator.feedback == "learned":
            shown = [leaves[index] for index in self.bound.returned]
            response = torch.cat([leaf.reshape(len(action.copies), probed, -1) for leaf in shown], 2)
            summed = response.sum(2)
            self.bound.demand_finite(summed, lambda: self._fail(summed, action, "output"))
            self.responses[at] = response
            if not self.bound.corrects:
                return
        losses = given.loss(leaves, len(action.copies), probed)
        self.bound.demand_finite(losses, lambda: self._fail(losses, action, "loss"))
        self.losses[at] = losses

    def learn(self, action: Learn) -> None:
        run = self.compiled.runs[action.run]
        state = self.given.feedback
        assert state is not None
        sites = [self.compiled.sites[index] for index in run.sites]
        clean = self._read_by(action.run)
        alive = {site.index: clean.get(f"value:{run.alive.get(site.index)}") for site in sites}
        response = self._differences(self._in_order(self.responses, action.run)) / 2
        draws, key = self.bound.draws[action.run], self.environment["runtime:key"]

        def learn_from(response: Tensor, error: Tensor) -> tuple[FeedbackState, Tensor]:
            probe = Probe(response, error, alive, draws, key)
            return self.bound.learn(state, probe, sites)

        self.result.feedback, predicted = outside_autocast(learn_from)(response, self.error[: self.probed])
        if self.bound.corrects:
            observed = self._differences(self._in_order(self.losses, action.run)) / (2 * self.given.samples)
            unexplained = observed - predicted
            for site in run.sites:
                scale = self.bound.sigmas[site] * len(self.bound.draws[action.run])
                self.corrections[f"runtime:weights.{site}"] = unexplained / scale

    def gradient(self, action: Gradient) -> None:
        subgraph, description = self.bound.gradients[action.site]
        given: Environment = {}
        if not description.from_clean:
            given["runtime:draws"] = self.bound.draws[description.run]
        if description.source == "corrected":
            given.update(self.corrections)
        elif not description.from_clean:
            given["runtime:weights"] = self._weights(description, action.chunk)
        if description.per_copy:
            assert action.chunk is not None
            at = (description.run, action.chunk)
            found = subgraph(given, self.perturbed[at], self.environment)
            self.unread[at].discard(action.site)
            if not self.unread[at]:
                self.perturbed.pop(at, None)
        elif description.shrunk:
            found = self._shrunk(subgraph, action.site, given)
        else:
            found = subgraph(given, self.environment) if given else subgraph(self.environment)
        self._add(found)

    def _add(self, found: Environment) -> None:
        """To the gradients of the step."""
        gradients = self.result.gradients
        for key, value in found.items():
            name = key.removeprefix("gradient:")
            gradients[name] = gradients[name] + value if name in gradients else value

    def _shrunk(self, subgraph: BoundGraph, site: int, given: Environment) -> Environment:
        """The prediction plus α times the correction (method.md 12). The subgraph is linear in the error and in the
        weights, so that each half of the draws gives its part of the correction."""
        state = self.result.feedback
        assert state is not None
        nothing = {key: torch.zeros_like(value) for key, value in self.corrections.items()}
        errors = {key: self.environment[key] for key in _ERRORS if key in self.environment}
        silent = {key: torch.zeros_like(value) for key, value in errors.items()}
        predicted = subgraph({**given, **nothing}, self.environment)
        halves = []
        for parity in (0, 1):
            weights = {key: value.clone() for key, value in self.corrections.items()}
            for value in weights.values():
                value[1 - parity :: 2] = 0
            halves.append(subgraph({**given, **weights, **silent}, self.environment))
        first, second = halves
        agreement = sum(float((first[key] * second[key]).sum()) for key in first)
        size = sum(float((first[key] + second[key]).square().sum()) for key in first)
        draws = len(self.bound.draws[0])  # with feedback there is one run
        self.result.feedback = state.agreeing(site, agreement * draws**2 / (draws // 2 * (draws - draws // 2)), size)
        alpha = self.result.feedback.alpha(site)
        return {key: predicted[key] + alpha * (first[key] + second[key]) for key in predicted}

    def _read_by(self, run: int) -> Environment:
        """The clean values that a perturbed run reads, of the samples it perturbs."""
        if run not in self.narrowed:
            module = self.compiled.runs[run].module
            self.narrowed[run] = narrow(module, self.environment, self.given.samples, self.probed)
        return self.narrowed[run]

    def _fail_clean(self) -> NoReturn:
        where = "" if self.clean.numel() == 1 else f" of sample {int((~torch.isfinite(self.clean)).nonzero()[0])}"
        raise NonFiniteLossError(
            f"the loss{where} is {float(self.clean[~torch.isfinite(self.clean)][0])} before any noise was added. "
            "Gradients, buffers and weights are as before the step. Check the inputs, the target (a mask that leaves a "
            "sample nothing is a division by zero) and the weights (a lower learning rate?)."
        )

    def _fail(self, values: Tensor, action: Perturb, what: str) -> NoReturn:
        row, column = (int(index) for index in (~torch.isfinite(values)).nonzero()[0])
        run = self.compiled.runs[action.run]
        names = ", ".join(self.compiled.sites[site].name for site in run.sites[:3])
        more = ", …" if len(run.sites) > 3 else ""
        sample = "" if self.estimator.credit == "batch" else f", sample {column}"
        raise NonFiniteLossError(
            f"the {what} of copy {action.copies[row]}{sample} is {float(values[row, column])} with noise at "
            f"{names}{more}. Gradients, buffers and weights are as before the step. A smaller sigma may help."
        )

    def _weights(self, gradient: GradientSubgraph, chunk: int | None) -> Tensor:
        """The losses' weights in the estimate (1), (4), with σ, the mean over copies and over samples divided out."""
        estimator, samples = self.estimator, self.given.samples
        scale = self.bound.sigmas[gradient.site.index] * len(self.bound.draws[gradient.run])
        losses = self._in_order(self.losses, gradient.run, chunk)
        if estimator.credit == "sample":
            scale *= samples
        if gradient.per_copy:
            weights = (losses[0] - self.clean) / (scale * (2 if estimator.antithetic else 1))
        elif estimator.antithetic:
            weights = self._differences(losses) / (2 * scale)
        else:
            weights = (torch.cat(losses) - self.clean) / scale
        if self.given.weights is not None:
            weights = weights * self.given.weights.to(weights.dtype)
        if self.compiled.credits_nodes:
            return self.bound.credited(weights, gradient.site.index)
        if weights.shape[1] == samples or not gradient.site.noise_layout.batched:
            return weights  # noise that all samples share is one number's worth of a batch loss
        return weights.expand(-1, samples).contiguous()

    def _in_order(self, by_chunk: dict[tuple[int, int], Tensor], run: int, chunk: int | None = None) -> list[Tensor]:
        """What the chunks of a run gave, or one of them."""
        chunks = range(len(self.bound.copies[run])) if chunk is None else (chunk,)
        return [by_chunk[run, number] for number in chunks]

    def _differences(self, losses: list[Tensor]) -> Tensor:
        """ℓ⁺ − ℓ⁻ of every pair (or the outputs' difference), in the order of the draws."""
        if self.compiled.sequential:
            return torch.cat([plus - minus for plus, minus in zip(losses[::2], losses[1::2], strict=True)])
        return torch.cat([plus - minus for plus, minus in (chunk.chunk(2) for chunk in losses)])


HANDLERS: dict[type, Callable[[Step, Any], None]] = {
    Update: Step.update,
    Forward: Step.forward,
    Error: Step.evaluate,
    Perturb: Step.perturb,
    Learn: Step.learn,
    Gradient: Step.gradient,
    Fused: Step.fused,
}


_ERRORS = ("runtime:error", "runtime:projected_error")


def output_leaves(environment: Environment) -> list[Any]:
    """The leaves of the model's output, in order."""
    found = {int(key.removeprefix("output:")): value for key, value in environment.items() if key.startswith("output:")}
    return [found[index] for index in sorted(found)]
