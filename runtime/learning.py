"""A step of learned feedback: what a perturbed run teaches (method.md 12).

`teach` computes it from tensors alone, and waits for nothing; `learned` reads the few numbers that it leaves, once, and
decides on them; `learn` is both. So a GPU that replays a step from a graph can learn in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..passes.find_sites import Site
from .feedback import TRUST_MEMORY, FeedbackState
from .noise import kernels, source
from .noise.rows import NoiseRows, Probe, amplitudes_of, product_of_rows

SLOW_STEP = 0.05
"""Lower bound of the schedule 1/step of the learning step, before the stable bound."""

EXPLAINED_MEMORY = 0.9
"""Decay a learning step of the average behind ``probe_every="auto"``."""

BASIS_PACE = 0.1
"""Share of the learning step with which a step's errors count in the basis of the outputs: the directions have to stay
for longer than it takes to learn what is new along them."""

BROKEN = 4.0
"""Energy of what predictions leave of the response, in units of the response's, above which they are scaled down."""


@dataclass(frozen=True)
class Lesson:
    """What a probe teaches.

    Attributes:
        jacobians: the new ones, by noise point.
        numbers: the energy of the response, and of what predictions left of it; then for every noise point the sums
            of own·predicted and predicted² (`FeedbackState.slopes`): ``(2 + 2 * points,)``.
        coordinates: blocks that received noise; a number where the host has made them (`noise.source.on_host`).
        observed, total: the response and its prediction, ``(draws * samples, outputs or rank)``.
        loss: the response of the loss that was predicted, ``(draws, samples)``.
        error: the probe's, ``(samples, outputs)``.
    """

    jacobians: dict[int, Tensor]
    numbers: Tensor
    coordinates: int | Tensor
    observed: Tensor
    total: Tensor
    loss: Tensor
    error: Tensor


def learn(
    state: FeedbackState,
    probe: Probe,
    sites: list[Site],
    sigmas: list[float],
    noise: str,
    reached: Mapping[int, Tensor] | None = None,
) -> tuple[FeedbackState, Tensor]:
    """One step of joint normalised least squares on what the current Jacobians leave unexplained (`teach`).

    Predictions that are far worse than none (`BROKEN`: feedback of other weights, a Jacobian that was tampered with)
    are first scaled down, all alike, to the least-squares fit of the response; trust goes down with them.

    Returns:
        The new state, and the response of the loss that the old one predicted, ``(draws, samples)``.
    """
    if not state.steps:  # the first errors, along which nothing was learned yet
        state = state.turned(probe.error, 1.0)
    lesson = teach(state, probe, sites, sigmas, noise, reached)
    numbers: list[float] = lesson.numbers.tolist()
    if not broken(numbers):
        return learned(state, lesson, numbers), lesson.loss
    fit = float((lesson.observed * lesson.total).sum()) / float(lesson.total.square().sum())
    scale = min(1.0, max(0.0, fit))  # not yet learned wrong, but broken: what was learned belongs to other weights
    fitted = replace(state, jacobians={index: j * scale for index, j in state.jacobians.items()})
    again = teach(fitted, probe, sites, sigmas, noise, reached)
    numbers[2:] = again.numbers[2:].tolist()
    return learned(fitted, again, numbers, scale), lesson.loss


def broken(numbers: Sequence[float]) -> bool:
    """Whether a lesson's `numbers` tell of predictions far worse than none, so that another is due."""
    spread, left = numbers[:2]
    return left > BROKEN * spread


def teach(
    state: FeedbackState,
    probe: Probe,
    sites: list[Site],
    sigmas: list[float],
    noise: str,
    reached: Mapping[int, Tensor] | None = None,
) -> Lesson:
    """What moves the outputs at a noise point is ``x = n ε``: ε a block's number, n how many of the block's coordinates
    are alive in the sample (0 or 1 where nothing is tied). ``J_i += μ mean(x_i ⊗ (Δo − Σ_j J_jᵀ x_j)) / mean(n_i²)``
    with ``μ = min(max(0.05, 1/step), N / (N + d))``: N samples x draws, d the blocks that received noise. Beyond the
    second bound the iteration diverges. It also would where a sample is alive in many blocks that are dead in most
    others: with ``T = Σ n² / mean(n²)`` over a sample's blocks (d on average) its residual counts ``w = min(1, d/T)``.

    Then the expected square error ``Σ mean(n²) ‖J − J*‖²`` never grows for Rademacher noise. In units of
    ``sqrt(mean(n²))`` the update's matrix is ``A = mean(w y yᵀ)`` with ``y = x / sqrt(mean(n²))``, ``|y|² = T`` and
    ``E A = Λ = diag(mean(w y²)) ≤ 1``. Two samples' noise is independent, so ``E[A²] ≤ Λ² + mean(w² T y²) / N ≤
    (1 + d / N) Λ``, and ``E[(1 − μ A)²] ≤ 1 − μ (2 − μ (1 + d / N)) Λ ≤ 1 − μ Λ``.

    With `reached`, of one whole graph, a Jacobian stays zero where a row does not reach an output, whose step then is
    that of the coordinates which do.

    With a basis of the outputs, Δo and the error are taken along it; it moves by the probe's error in `learned`.
    """
    draws, samples, outputs = probe.response.shape
    count = draws * samples
    seen = probe.response.reshape(count, outputs)
    error, observed = state.projected(probe.error).repeat(draws, 1), state.projected(seen)
    amplitudes = [amplitudes_of(site, probe) for site in sites]
    rows = [NoiseRows(site, probe, noise, each) for site, each in zip(sites, amplitudes, strict=True)]
    predicted = observed.new_empty(len(sites), *observed.shape)
    for site, each, place in zip(sites, rows, predicted, strict=True):
        torch.mul(noise_product(state.jacobians[site.index], each), sigmas[site.index], out=place)
    total = predicted.sum(0)
    residual = observed - total
    squares = torch.cat(amplitudes, 1).square_()
    means = squares.mean(0)
    coordinates = _counted(means)
    wanted, step = pace(state), step_of(state, count, coordinates)
    along_residual = (residual * error).sum(1)
    if state.basis is not None:  # what the loss feels of the response beside the basis
        along_residual += (seen * probe.error.repeat(draws, 1)).sum(1) - (observed * error).sum(1)
    weighted = residual * sample_weights(squares, means, coordinates).repeat(draws)[:, None]
    scales = means.clamp_min(1.0 / count).reciprocal_()[:, None].split([site.grid.elements for site in sites])
    faster = steps_of_outputs(means, sites, reached, outputs, wanted, count) / step if reached else None
    jacobians = {}
    for site, each, scale in zip(sites, rows, scales, strict=True):
        before, change = state.jacobians[site.index], noise_product(weighted, each, transposed=True)
        size = step / sigmas[site.index] / count
        if faster is None or not reached:
            jacobians[site.index] = _moved(before, change, scale, size)
        else:
            change = within_reach(change * (scale * size), reached.get(site.index))
            jacobians[site.index] = torch.addcmul(before, change, faster)
    energies = torch.stack([observed.square().sum(), residual.square().sum()])
    along = predicted.mul_(error).sum(2)
    sums = torch.stack([(along * (along_residual + along)).sum(1), along.square().sum(1)], 1)
    numbers = torch.cat([energies, sums.flatten()])
    loss = (total * error).sum(1).reshape(draws, samples)
    return Lesson(jacobians, numbers, coordinates, observed, total, loss, probe.error)


def learned(state: FeedbackState, lesson: Lesson, numbers: Sequence[float], overshoot: float = 1.0) -> FeedbackState:
    """The state after a lesson whose `numbers` are read."""
    spread, left, *sums = numbers
    slopes = {}
    for place, site in enumerate(lesson.jacobians):
        own, square = state.slopes.get(site, (0.0, 0.0))
        slopes[site] = (TRUST_MEMORY * own + sums[2 * place], TRUST_MEMORY * square + sums[2 * place + 1])
    explained = 1.0 - left / spread if spread > 0 else 0.0
    average = max(-1.0, explained)
    if state.steps:
        average = (1 - EXPLAINED_MEMORY) * average + EXPLAINED_MEMORY * state.explained_mean
    after = replace(
        state,
        jacobians=lesson.jacobians,
        steps=state.steps + 1,
        slopes=slopes,
        explained=explained,
        explained_mean=average,
        overshoot=overshoot,
    )
    every = 1 if state.basis is None else state.basis.interval
    if state.basis is None or not state.steps or state.steps % every:
        return after
    step = step_of(state, lesson.loss.numel(), int(lesson.coordinates))
    return after.turned(lesson.error, 1 - (1 - BASIS_PACE * step) ** every)


def pace(state: FeedbackState) -> float:
    """The learning step before the stable bound."""
    return max(SLOW_STEP, 1.0 / (state.steps + 1))


def is_settled(state: FeedbackState) -> bool:
    """Whether the pace stays what it is."""
    return pace(state) == SLOW_STEP


def step_of(state: FeedbackState, count: int, coordinates: int | Tensor) -> Any:
    """μ of `teach`: a number, or a tensor as the coordinates are, in double precision."""
    if isinstance(coordinates, int):
        return min(pace(state), count / (count + coordinates))
    return (count / (count + coordinates.double())).clamp_max(pace(state))


def _counted(means: Tensor) -> int | Tensor:
    """How many are not zero: a number on the host, else a tensor, so as not to wait for it."""
    counted = (means > 0).sum()
    return int(counted) if source.on_host(means.device) else counted


def _moved(before: Tensor, change: Tensor, scale: Tensor, size: Any) -> Tensor:
    """``before + change * scale * size``; in float32 with the same bits for a size on the host and on a GPU."""
    if isinstance(size, float):
        return torch.addcmul(before, change, scale, value=size)
    return torch.addcmul(before, change * size, scale)


def within_reach(jacobian: Tensor, reach: Tensor | None) -> Tensor:
    """A Jacobian with zeros where a row of the graph does not reach a node's output (`compiler.node_reach`)."""
    if reach is None:
        return jacobian
    rows, nodes = reach.shape
    return (jacobian.reshape(rows, -1, nodes, jacobian.shape[1] // nodes) * reach[:, None, :, None]).view_as(jacobian)


def steps_of_outputs(
    means: Tensor,
    sites: Sequence[Site],
    reached: Mapping[int, Tensor],
    outputs: int,
    wanted: float | Tensor,
    count: int,
) -> Tensor:
    """The learning step of each output, ``(outputs,)``: its Jacobian has only the coordinates that reach it, so that
    d of the bound ``N / (N + d)`` is the number of those. `means` is of the sites' blocks, one site after the other."""
    coordinates = means.new_zeros(outputs)
    for site, mean in zip(sites, means.split([site.grid.elements for site in sites]), strict=True):
        alive, reach = mean > 0, reached.get(site.index)
        if reach is None:
            coordinates += alive.sum()
        else:
            rows = alive.reshape(len(reach), -1).sum(1).to(coordinates)
            coordinates += (rows @ reach.to(coordinates)).repeat_interleave(outputs // reach.shape[1])
    return (count / (count + coordinates)).clamp_max(wanted)


def noise_product(right: Tensor, rows: NoiseRows, transposed: bool = False) -> Tensor:
    """``rows @ right``, or `transposed` ``rows.T @ right``: on a GPU by a kernel where one fits."""
    if kernels.serves(right.device):
        product: Tensor = kernels.call("noise_product", right, rows, transposed, rows.alive)
        return product
    return product_of_rows(right, rows, transposed, rows.alive)


def sample_weights(squares: Tensor, means: Tensor, coordinates: int | Tensor) -> Tensor:
    """``min(1, d / T)`` of every sample (see `learn`), ``(samples,)``, from the squares ``(samples, blocks)`` of the
    amplitudes at all noise points, and their means over the samples."""
    total = squares @ means.clamp_min(1 / squares.shape[0]).reciprocal()
    return (coordinates / total.clamp_min(1)).clamp_max(1)
