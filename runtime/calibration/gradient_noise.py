"""A judge of gradients: a program's step is repeated with fresh noise, at the same weights and on the same batch.

What repetitions of a site's gradient scatter is its variance, what their mean differs from another estimate is the
bias of that one (method.md 7, 12). This asks nothing of how a gradient is made (noise on outputs or on weights, exact
captures or signs, with a correction or without), and needs no derivative.

All repetitions have one key, beyond those of training, and draws of their own. Dropout and other random operations of
the model are keyed too, so that every repetition has the same masks and estimates the same gradient.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...compiler.program import CompiledModel, GradientSubgraph
from ...passes.graph import Output, clone, finish, outputs, set_outputs
from ..execution.executor import SerialExecutor
from ..execution.step import StepInput

KEY = 1 << 31
"""Step numbers of the noise of a calibration: beyond those of training."""


def repeated_gradients(
    compiled: CompiledModel, sigmas: list[float], given: StepInput, repetitions: int
) -> dict[int, Tensor]:
    """Each site's gradients from steps that differ in their noise alone, ``(repetitions, numbers)``, by site index.

    With learned feedback every repetition starts from what `given` has learned. Writes nothing. Sites whose gradient
    the step does not compute (``given.perturbed`` is False, and they need copies) are left out.

    Raises:
        NonFiniteLossError: as a step would.
    """
    executor = SerialExecutor(_by_site(compiled), sigmas)
    like = given.environment["runtime:sigmas"]
    key = given.environment["runtime:key"].clone()
    key[1] = KEY
    environment = {
        **given.environment,
        "runtime:key": key,
        "runtime:sigmas": torch.tensor(sigmas, dtype=like.dtype, device=like.device),
    }
    draws, copies = executor.draws, executor.copies
    names = {gradient.site.index: gradient.site.parameters for gradient in compiled.gradients}
    found: dict[int, list[Tensor]] = {}
    for number in range(repetitions):
        executor.draws = [own + number * len(own) for own in draws]
        executor.copies = [
            [torch.where(chunk < 0, chunk - number * len(own), chunk + number * len(own)) for chunk in chunks]
            for chunks, own in zip(copies, draws, strict=True)
        ]
        gradients = executor.run(replace(given, environment=dict(environment))).gradients
        for index, parameters in names.items():
            parts = [gradients[_label(index, name)] for name in parameters if _label(index, name) in gradients]
            if parts:
                found.setdefault(index, []).append(torch.cat([part.double().flatten() for part in parts]))
    return {index: torch.stack(rows) for index, rows in found.items()}


def variance(repeated: Tensor) -> float:
    """Variance of one repetition, summed over its numbers."""
    return float(repeated.var(0).sum())


def squared_bias(repeated: Tensor, predicted: Tensor) -> tuple[float, float]:
    """``|predicted - E[repeated]|²`` and its standard error; `repeated` is unbiased, `predicted` has no noise.

    With ``d_k = repeated_k - predicted`` it is the mean of ``d_k · d_l`` over all pairs of different repetitions, which
    is ``|mean(d)|²`` less its own variance: unbiased, negative by chance where there is no bias, and then cut to zero.
    The error is the jackknife's; where there is no bias it is too large rather than too small.
    """
    count = len(repeated)
    products = (repeated - predicted) @ (repeated - predicted).T
    products.fill_diagonal_(0)
    whole, own = products.sum(), products.sum(1)
    without = (whole - 2 * own) / ((count - 1) * (count - 2))
    error = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt()
    return max(0.0, float(whole / (count * (count - 1)))), float(error)


def _by_site(compiled: CompiledModel) -> CompiledModel:
    """The same program with every gradient named by its site too: a step sums those of a parameter that sites share."""
    return replace(compiled, gradients=tuple(_labelled(gradient) for gradient in compiled.gradients))


def _labelled(gradient: GradientSubgraph) -> GradientSubgraph:
    module = clone(gradient.module)
    results = [(Output(one.kind, _label(gradient.site.index, one.name)), node) for one, node in outputs(module)]
    set_outputs(module, results)
    return replace(gradient, module=finish(module))


def _label(site: int, parameter: str) -> str:
    return f"{site} {parameter}"
