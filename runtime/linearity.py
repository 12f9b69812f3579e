"""How far the loss is linear in the noise at each site: what σ is chosen from (``sigma="auto"``, method.md 7).

One site at a time is perturbed, by pairs whose numbers are the same for every σ. ``r(σ) = (ℓ⁺ - ℓ⁻) / 2σ``, one number
a pair and sample, tends to the directional derivative; as long as it stays the same, a larger σ costs nothing and
drowns rounding. σ is the largest candidate at which halving it changes r by at most `LINEAR` of its size, divided by
the square root of the number of sites that are perturbed together: their noise adds up.

Before a quantiser there may be none: then it is the candidate at which halving changes least, where the noise is about
as large as a step. Before a sign even that tells nothing (jumps that are met by chance change r by all of its size, at
any σ): if no change is below `DISTINCT`, σ is the root mean square of the tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..compiler.program import CompiledModel
from ..passes.graph import Output, outputs
from .execution.bindings import Environment
from .execution.executor import SerialExecutor
from .execution.step import StepInput, output_leaves

RELATIVE = tuple(2.0**power for power in range(-7, 2))
"""Candidates for σ, as multiples of the root mean square of the tensor that receives the noise."""

LINEAR = 0.15
"""How much of the response may change when σ is halved."""

DISTINCT = 0.6
"""Changes above this do not tell a better σ from a worse."""

DRAWS = 4
"""Antithetic pairs a candidate."""


@dataclass(frozen=True)
class Linearity:
    """What was measured at one noise point."""

    scale: float
    """Root mean square of the tensor that receives the noise."""
    sigma: float
    """The σ chosen; NaN where the loss does not respond at all (a head of zeros), so that there is nothing to tell."""
    nonlinearity: float
    """Change of the response when that σ is halved, relative to it; about 1 where there is no derivative."""
    variance: float
    """Mean square of ``r(σ)``: the variance of a coordinate's gradient estimate from one pair and sample."""


def measure(executor: SerialExecutor, given: StepInput) -> tuple[dict[int, Linearity], float]:
    """Every perturbed site's linearity on one batch, and the perturbed forwards a sample that it took.

    Reads `given` as a step would and writes nothing. Raises NonFiniteLossError if the unperturbed loss is not finite.
    """
    with executor.uncompiled():
        return _measure(executor, given)


def _measure(executor: SerialExecutor, given: StepInput) -> tuple[dict[int, Linearity], float]:
    compiled = executor.compiled
    environment = executor.run_clean(given).environment
    returned = {node.meta.get("noise_of"): output.name for output, node in _returned(compiled)}
    found: dict[int, Linearity] = {}
    spent = 0.0
    for run in compiled.runs:
        for index in run.sites:
            at_weight = compiled.sites[index].weight_noise
            key = f"parameter:{at_weight.weight}" if at_weight else f"value:{compiled.sites[index].output}"
            value = environment[key if key in environment else f"output:{returned[index]}"]
            scale = float(value.square().mean().sqrt()) or 1.0
            responses: list[Tensor] = []  # from the largest σ down: the first that is linear is chosen
            for relative in (*reversed(RELATIVE), RELATIVE[0] / 2):
                responses.append(response(executor, given, environment, run.index, index, relative * scale))
                spent += 2 * DRAWS * run.share
                if len(responses) > 1 and _change(*responses[-2:]) <= LINEAR:
                    break
            found[index] = _chosen(responses, scale, len(run.sites))
    return found, spent


def _returned(compiled: CompiledModel) -> list[tuple[Output, fx.Node]]:
    """The nodes that the model returns: no stage hands over the value of one that nothing else reads."""
    return [(o, node) for o, node in outputs(compiled.graph) if o.kind == "output" and isinstance(node, fx.Node)]


def response(
    executor: SerialExecutor, given: StepInput, environment: Environment, run: int, site: int, sigma: float
) -> Tensor:
    """``(ℓ⁺ - ℓ⁻) / 2σ`` of every pair and sample, with noise at one site only."""
    sigmas = torch.zeros_like(given.environment["runtime:sigmas"])
    sigmas[site] = sigma
    compiled, differences = executor.compiled, []
    for draws in torch.arange(DRAWS).split(_pairs_together(compiled)):
        losses = []
        for copies in (draws, ~draws) if compiled.sequential else (torch.cat([draws, ~draws]),):
            own = {"runtime:sigmas": sigmas, "runtime:copies": copies}
            result = executor.runs[run](own, environment)
            losses.append(given.loss(output_leaves(result), len(copies), given.samples))
        plus, minus = torch.cat(losses).chunk(2)
        moved = plus - minus
        differences.append(moved.sum(1, keepdim=True) if compiled.credits_nodes else moved)
    return torch.cat(differences) / (2 * sigma)


def _pairs_together(compiled: CompiledModel) -> int:
    """Pairs that run side by side: as a step's chunks allow."""
    chunk = compiled.estimator.chunk
    return 1 if compiled.sequential else DRAWS if chunk is None else max(1, chunk // 2)


def _change(whole: Tensor, half: Tensor) -> float:
    """By how much of its size a response changes when σ is halved; infinite where nothing responds."""
    size = float(whole.norm())
    change = float((whole - half).norm()) / size if size > 0 else math.inf
    return change if change == change else math.inf  # a perturbed loss may be NaN


def _chosen(responses: Sequence[Tensor], scale: float, together: int) -> Linearity:
    """The candidate that the module's docstring describes, for a site that is perturbed `together` with others.

    `responses` begin with the largest candidate's and go down to the first that is linear, and to half of it; or to
    half of the smallest.
    """
    if not any(bool(response.any()) for response in responses):
        return Linearity(scale, math.nan, math.nan, 0.0)
    changes = [_change(whole, half) for whole, half in itertools.pairwise(responses)]
    best = min(range(len(changes)), key=changes.__getitem__)
    shared = 1.0
    if changes[-1] <= LINEAR:
        best, shared = len(changes) - 1, math.sqrt(together)
    elif changes[best] > DISTINCT:
        best = RELATIVE[::-1].index(1.0)
    variance = float(responses[best].square().mean())
    return Linearity(scale, RELATIVE[::-1][best] * scale / shared, changes[best], variance)
