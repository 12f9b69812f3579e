"""Which samples of a batch are perturbed: few of those whose gradient is small (method.md 8; FLOPS, arXiv 2410.05966).

The clean run tells how large every sample's error is, the loss's gradient at its output, ``‖e_i‖``. A sample is then
perturbed with probability ``p_i = min(1, c s_i)``, ``s_i = ‖e_i‖ + 0.1 mean ‖e‖``, and counts ``1 / p_i`` times: the
estimate stays unbiased, since p does not depend on the copies' noise. Of n copies a sample's estimate has a variance of
about ``‖g_i‖² d / n``, with g_i proportional to e_i, so the best number of copies is proportional to ``‖e_i‖``; here it
is all copies or none.

How many samples that are follows from how unequal they are: ``Σ p_i = N mean(s)² / mean(s²)``, all of them where all
errors are alike. The draw is systematic in a random order: the number of samples is that sum up to rounding, and each
has its own probability.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..compiler.capture import Signature
from ..passes import ops
from .execution.step import StepInput
from .targets import take_rows

FLOOR = 0.1
"""Added to every error, in units of their mean, so that samples that are right are drawn now and then."""

_OPERATION = (1 << 24) - 1
"""Number of the draw among the random operations of a step; the model's are numbered from 0."""


def inclusion(error: Tensor) -> Tensor:
    """The probability to be perturbed of every sample, ``(N,)``, float64 in (0, 1].

    `error`: the loss's gradient at the outputs, ``(N, outputs)``. Samples whose error is infinite or NaN (a loss may be
    finite where its derivative is not) are all perturbed.
    """
    chosen = torch.ones(len(error), dtype=torch.float64, device=error.device)
    finite = error.isfinite().all(1)
    if bool(finite.any()):
        chosen[finite] = _shares(error[finite].double())
    return chosen


def _shares(error: Tensor) -> Tensor:
    """`inclusion` of finite errors."""
    largest = error.abs().max()
    if not largest > 0:
        return torch.ones_like(error[:, 0])
    norms = (error / largest).norm(dim=1)
    sizes = norms + FLOOR * norms.mean()
    wanted = len(sizes) * sizes.mean() ** 2 / sizes.square().mean()
    chosen = torch.zeros_like(sizes)
    while True:  # those above 1 are cut, and the others share what is left: at most N rounds
        free = chosen < 1
        scaled = sizes * (wanted - (~free).sum()) / sizes[free].sum()
        chosen = torch.where(free, scaled, chosen).clamp_max(1)
        if not bool((chosen[free] >= 1).any()) or bool((chosen >= 1).all()):
            return chosen


def draw(probabilities: Tensor, key: Tensor) -> Tensor:
    """The rows that are perturbed, int64, rising; at least one. `key` is the step's ``(seed, step)``.

    Systematic sampling: the probabilities side by side in a random order, and a row wherever a grid of unit steps with
    a random start meets one. Row i is in it with probability p_i.
    """
    count, device = len(probabilities), torch.device("cpu")
    numbers = ops.keyed_random(key, _OPERATION, "uniform", [count + 1], torch.float64, device)
    order = numbers[:count].argsort()
    ends = probabilities.cpu()[order].cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    met = (ends - numbers[count]).floor() > (starts - numbers[count]).floor()
    rows: Tensor = order[met].sort().values
    return rows


def sampled(given: StepInput, error: Tensor, signature: Signature) -> StepInput:
    """`given` for the drawn samples alone, weighted so that a step on it estimates the gradient over the whole batch.

    Args:
        given: a step's input of N samples.
        error: of its clean run, ``(N, outputs)``.
        signature: of the model's inputs.
    """
    assert given.loss_of is not None
    probabilities = inclusion(error)
    rows = draw(probabilities, given.environment["runtime:key"])
    if not len(rows):  # the sum of the probabilities is at least 1 up to rounding
        rows = probabilities.argmax()[None].cpu()
    environment = dict(given.environment)
    there = rows.to(given.device)
    for index, leaf in enumerate(signature.leaves):
        if isinstance(leaf, tuple) and leaf[3]:
            environment[f"input:{index}"] = environment[f"input:{index}"].index_select(0, there)
    target = take_rows(given.target, rows, given.samples)
    weights = len(rows) / given.samples / probabilities[there.to(probabilities.device)]
    return replace(
        given,
        environment=environment,
        loss=given.loss_of(target, given.device),
        samples=len(rows),
        target=target,
        output_gradient=None,
        weights=weights.to(given.device),
    )
