"""Learned feedback: the mean Jacobian of the outputs at every noise point, learned from the perturbed runs.

method.md 12; it extends FDFA (Bacho & Chu, arXiv 2212.07282, after Lansdell, Prakash & Kording, ICLR 2020), learning
from the joint residual of all noise points and on their alive coordinates only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..passes import ops
from ..passes.errors import CheckpointError
from ..passes.find_sites import Site
from ..passes.graph import Layout

SLOW_STEP = 0.05
"""Lower bound of the schedule 1/step of the learning step, before the stable bound."""

TRUST_MEMORY = 0.95
"""Decay a step of the sums behind the trust."""


@dataclass(frozen=True)
class FeedbackState:
    """What has been learned. Immutable: a step that fails leaves it as it was.

    Attributes:
        jacobians: for every noise point ``(elements a sample, outputs)``: the mean of ∂output/∂coordinate over samples
            in which the coordinate is alive.
        steps: learning steps taken.
        slopes: for every noise point the decayed sums ``(Σ own·predicted, Σ predicted²)`` of its own response and of
            the prediction, both along the loss's gradient.
        explained: share of the output's response that the last step's predictions explained, before learning from it.
    """

    jacobians: dict[int, Tensor]
    steps: int = 0
    slopes: dict[int, tuple[float, float]] = field(default_factory=dict)
    explained: float = 0.0

    def state_dict(self) -> dict[str, Tensor | int | float]:
        """Everything, by flat names."""
        state: dict[str, Tensor | int | float] = {"feedback.steps": self.steps, "feedback.explained": self.explained}
        for site, jacobian in self.jacobians.items():
            state[f"feedback.{site}.jacobian"] = jacobian
            own, predicted = self.slopes.get(site, (0.0, 0.0))
            state[f"feedback.{site}.own"], state[f"feedback.{site}.predicted"] = own, predicted
        return state

    def loaded(self, state: dict[str, Any]) -> FeedbackState:
        """The state that `state_dict` described, for the same noise points.

        Raises:
            KeyError: a value is missing.
            CheckpointError: a Jacobian has another shape: it was learned for another model.
        """
        jacobians, slopes = {}, {}
        for site, mine in self.jacobians.items():
            jacobian = state[f"feedback.{site}.jacobian"]
            if jacobian.shape != mine.shape:
                raise CheckpointError(
                    f"the feedback of site {site} was learned for {tuple(jacobian.shape)} (elements, outputs); this "
                    f"model has {tuple(mine.shape)} there. Feedback cannot move to a changed model."
                )
            jacobians[site] = jacobian.to(mine.device, mine.dtype).clone()
            slopes[site] = (float(state[f"feedback.{site}.own"]), float(state[f"feedback.{site}.predicted"]))
        return FeedbackState(jacobians, int(state["feedback.steps"]), slopes, float(state["feedback.explained"]))

    def trust(self, site: int) -> float:
        """How far the site's predictions are borne out by fresh copies: the slope of the response on the prediction,
        cut to [0, 1]. 1 where nothing was measured yet."""
        own, predicted = self.slopes.get(site, (0.0, 0.0))
        return min(1.0, max(0.0, own / predicted)) if predicted > 0 else 1.0


@dataclass(frozen=True)
class Probe:
    """What a perturbed run showed: enough to learn from, noise excepted, which is regenerated.

    `response` is half the difference of the two twins' outputs, ``(draws, samples, outputs)``; `error` the loss's
    gradient at the clean output, ``(samples, outputs)``; `alive` the noise points' masks, of `samples` samples.
    """

    response: Tensor
    error: Tensor
    alive: dict[int, Tensor | None]
    draws: Tensor
    key: Tensor


def initial_state(sites: list[Site], outputs: int, like: Tensor) -> FeedbackState:
    """Nothing known: all Jacobians zero, on the device and of the dtype of `like`."""
    return FeedbackState({site.index: like.new_zeros(site.layout.elements, outputs) for site in sites})


def learn(
    state: FeedbackState, probe: Probe, sites: list[Site], sigmas: list[float], noise: str
) -> tuple[FeedbackState, Tensor]:
    """One step of joint normalised least squares on what the current Jacobians leave unexplained.

    ``J_i += μ mean(ε_i ⊗ (Δo − Σ_j J_jᵀ ε_j))``, each coordinate's mean over the samples in which it is alive, with
    ``μ = min(max(0.05, 1/step), N / (N + d))``: N samples x draws, d the coordinates that received noise. Beyond the
    second bound the iteration diverges. It also would where a sample is alive in many coordinates that are dead in most
    others: with ``T = Σ 1/share`` over a sample's alive coordinates (d on average) its residual counts ``min(1, d /
    T)``. Then ``E[A²] ≤ (1 + d / N) diag(A)`` for the update's matrix A (Rademacher noise), so the expected square
    error never grows.

    Returns:
        The new state, and the response that the old one predicted, ``(draws, samples, outputs)``.
    """
    draws, samples, outputs = probe.response.shape
    observed = probe.response.reshape(draws * samples, outputs)
    error = probe.error.repeat(draws, 1)
    rows: dict[int, Tensor] = {}
    predicted: dict[int, Tensor] = {}
    for site in sites:
        noise_rows = _noise_rows(site, probe, noise, samples)
        rows[site.index] = noise_rows
        predicted[site.index] = (noise_rows @ state.jacobians[site.index]).mul_(sigmas[site.index])
    total = sum(predicted.values(), torch.zeros_like(observed))
    residual = observed - total
    alive = {site.index: _alive_rows(site, probe) for site in sites}
    shares = {index: mask.mean(0) for index, mask in alive.items()}
    coordinates = sum(int((share > 0).sum()) for share in shares.values())
    count = draws * samples
    step = min(max(SLOW_STEP, 1.0 / (state.steps + 1)), count / (count + coordinates))
    jacobians, slopes = {}, {}
    along_residual = (residual * error).sum(1)
    weighted = residual * _sample_weights(alive, shares, coordinates).repeat(draws)[:, None]
    for site in sites:
        index = site.index
        mean = rows[index].T @ weighted / count
        scale = step / sigmas[index] / shares[index].clamp_min(1.0 / count)
        jacobians[index] = state.jacobians[index] + scale[:, None] * mean
        along = (predicted[index] * error).sum(1)
        own = float(((along_residual + along) * along).sum())
        before = state.slopes.get(index, (0.0, 0.0))
        slopes[index] = (TRUST_MEMORY * before[0] + own, TRUST_MEMORY * before[1] + float(along.square().sum()))
    spread = float(observed.square().sum())
    explained = 1.0 - float(residual.square().sum()) / spread if spread > 0 else 0.0
    return FeedbackState(jacobians, state.steps + 1, slopes, explained), total.reshape(draws, samples, outputs)


def _noise_rows(site: Site, probe: Probe, noise: str, samples: int) -> Tensor:
    """The noise of every draw and sample, ``(draws * samples, elements)``."""
    layout = site.layout
    shape = list(layout.sizes)
    shape[layout.dim] *= samples
    zeros = probe.response.new_zeros(shape)
    ones = zeros.new_ones(site.index + 1)
    where = (list(layout.sizes), layout.dim, layout.outer, False)
    values = ops.perturb(zeros, probe.draws, probe.key, ones, site.index, noise, *where, probe.alive.get(site.index))
    return to_rows(values, layout, samples * len(probe.draws))


def _alive_rows(site: Site, probe: Probe) -> Tensor:
    """Which coordinates of every sample received noise, as zeros and ones ``(samples, elements)``."""
    samples = probe.response.shape[1]
    mask = probe.alive.get(site.index)
    if mask is None:
        return probe.response.new_ones(()).expand(samples, site.layout.elements)
    return to_rows(mask, site.layout, samples).to(probe.response.dtype)


def _sample_weights(alive: dict[int, Tensor], shares: dict[int, Tensor], coordinates: int) -> Tensor:
    """``min(1, d / T)`` of every sample (see `learn`), ``(samples,)``."""
    terms = [mask @ shares[index].clamp_min(1 / len(mask)).reciprocal() for index, mask in alive.items()]
    return (coordinates / sum(terms[1:], terms[0]).clamp_min(1)).clamp_max(1)


def to_rows(value: Tensor, layout: Layout, rows: int) -> Tensor:
    """A tensor of this layout as ``(rows, elements a sample)``."""
    inner = layout.sizes[layout.dim] // layout.outer
    before, after = value.shape[: layout.dim], value.shape[layout.dim + 1 :]
    parts = value.reshape(*before, layout.outer, rows, inner, *after)
    return parts.movedim(layout.dim + 1, 0).reshape(rows, -1)
