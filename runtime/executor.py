"""The serial executor: one action after the other. Simple and exact, the reference for every other executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.program import CompiledModel, GradientSubgraph, input_keys, output_keys
from ..passes.errors import NonFiniteLossError
from .plan import Forward, Gradient, Perturb, chunks, make_plan

Environment = dict[str, Any]


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


class _Callable:
    """A graph with the names of what it reads and returns."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.forward = module.forward
        self.inputs = input_keys(module)
        self.outputs = output_keys(module)

    def __call__(self, *environments: Environment) -> Environment:
        """Run on the first environment that has each input."""
        if len(environments) == 1:
            (environment,) = environments
            arguments = [environment[key] for key in self.inputs]
        else:
            arguments = [next(e[key] for e in environments if key in e) for key in self.inputs]
        return dict(zip(self.outputs, self.forward(*arguments), strict=True))


class SerialExecutor:
    """Runs the plan of a compiled model action by action, on whatever device its tensors are."""

    def __init__(self, compiled: CompiledModel, sigmas: list[float]) -> None:
        self.compiled = compiled
        self.sigmas = sigmas
        self.plan = make_plan(compiled)
        self.chunks = chunks(compiled)
        self._stages = [_Callable(stage) for stage in compiled.stages]
        self._runs = [_Callable(run.module) for run in compiled.runs]
        self._gradients = {g.site.index: (_Callable(g.module), g) for g in compiled.gradients}

    def run(self, environment: Environment, loss: Callable[[list[Any], int], Tensor], samples: int) -> StepResult:
        """One step.

        Args:
            environment: parameters, buffers, constants, inputs and ``runtime:key``, ``runtime:sigmas``. Grows by the
                clean run's values.
            loss: ``(output leaves, copies) -> losses``: ``(copies, samples)``, or ``(copies, 1)`` with batch credit.
            samples: batch size N.
        """
        device = environment["runtime:key"].device
        ids = [torch.tensor(chunk, dtype=torch.int64, device=device) for chunk in self.chunks]
        environment["runtime:copies"] = torch.zeros(1, dtype=torch.int64, device=device)
        environment["runtime:draws"] = torch.arange(self.compiled.estimator.draws, device=device)
        clean = None
        losses: dict[int, list[Tensor]] = {run.index: [] for run in self.compiled.runs}
        perturbed: Environment = {}
        result = StepResult([], torch.empty(0))
        for action in self.plan:
            match action:
                case Forward():
                    environment.update(self._stages[action.stage](environment))
                case Perturb():
                    if clean is None:
                        clean = self._clean(environment, loss, result)
                    runtime = {"runtime:copies": ids[action.chunk]}
                    perturbed = self._runs[action.run](runtime, environment)
                    perturbed.update(runtime)
                    chunk = loss(_leaves(perturbed), len(action.copies))
                    self._check(chunk, action)
                    losses[action.run].append(chunk)
                case Gradient():
                    subgraph, description = self._gradients[action.site]
                    assert clean is not None
                    weights = self._weights(description, losses[description.run], clean, samples)
                    given = {"runtime:weights": weights}
                    sources = (given, perturbed, environment) if description.per_copy else (given, environment)
                    _accumulate(result.gradients, subgraph(*sources))
        if clean is None:
            self._clean(environment, loss, result)
        return result

    def _clean(self, environment: Environment, loss: Callable[[list[Any], int], Tensor], result: StepResult) -> Tensor:
        result.output = _leaves(environment)
        clean = loss(result.output, 1)[0]
        if not bool(torch.isfinite(clean).all()):
            where = "" if clean.numel() == 1 else f" of sample {int((~torch.isfinite(clean)).nonzero()[0])}"
            raise NonFiniteLossError(
                f"the loss{where} is {float(clean[~torch.isfinite(clean)][0])} before any noise was added. Gradients, "
                "buffers and weights are as before the step. Check the inputs and the weights (a lower learning rate?)."
            )
        result.losses = clean if clean.numel() > 1 or self.compiled.estimator.credit == "sample" else clean.reshape(())
        result.buffers = {
            key.removeprefix("mutation:"): value for key, value in environment.items() if key.startswith("mutation:")
        }
        return clean

    def _check(self, losses: Tensor, action: Perturb) -> None:
        finite = torch.isfinite(losses)
        if bool(finite.all()):
            return
        row, column = (int(index) for index in (~finite).nonzero()[0])
        run = self.compiled.runs[action.run]
        names = ", ".join(self.compiled.sites[site].name for site in run.sites[:3])
        more = ", …" if len(run.sites) > 3 else ""
        sample = "" if self.compiled.estimator.credit == "batch" else f", sample {column}"
        raise NonFiniteLossError(
            f"the loss of copy {action.copies[row]}{sample} is {float(losses[row, column])} with noise at {names}{more}. "
            "Gradients, buffers and weights are as before the step. A smaller sigma may help."
        )

    def _weights(self, gradient: GradientSubgraph, losses: list[Tensor], clean: Tensor, samples: int) -> Tensor:
        """The losses' weights in the estimate (1), (4), with σ, the mean over copies and over samples divided out."""
        estimator = self.compiled.estimator
        scale = self.sigmas[gradient.site.index] * estimator.draws * samples
        if estimator.credit == "batch":
            scale /= samples  # the loss is the batch's, not a sample's
        if gradient.per_copy:
            copies = 2 if estimator.antithetic else 1
            weights = (losses[-1] - clean) / (scale * copies)
        elif estimator.antithetic:
            weights = self._differences(losses) / (2 * scale)
        else:
            weights = (torch.cat(losses) - clean) / scale
        return weights if weights.shape[1] == samples else weights.expand(-1, samples).contiguous()

    def _differences(self, losses: list[Tensor]) -> Tensor:
        """ℓ⁺ − ℓ⁻ of every pair, in the order of the draws."""
        if self.compiled.sequential:
            return torch.cat([plus - minus for plus, minus in zip(losses[::2], losses[1::2], strict=True)])
        return torch.cat([plus - minus for plus, minus in (chunk.chunk(2) for chunk in losses)])


def _leaves(environment: Environment) -> list[Any]:
    found = {int(key.removeprefix("output:")): value for key, value in environment.items() if key.startswith("output:")}
    return [found[index] for index in sorted(found)]


def _accumulate(gradients: dict[str, Tensor], outputs: Environment) -> None:
    for key, value in outputs.items():
        name = key.removeprefix("gradient:")
        gradients[name] = gradients[name] + value if name in gradients else value
