"""Learned feedback: the mean Jacobian of the outputs at every noise point, learned from the perturbed runs.

method.md 12; it extends FDFA (Bacho & Chu, arXiv 2212.07282, after Lansdell, Prakash & Kording, ICLR 2020), learning
from the joint residual of all noise points and on their alive coordinates only. Where noise is tied over blocks
(`passes.tie_blocks`), a Jacobian has one row a block; with a rank, one column for each direction of a basis of the
outputs (`basis`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..compiler.program import CompiledModel
from ..passes.errors import CheckpointError
from ..passes.find_sites import Site
from ..passes.separate_outputs import error_like
from .basis import Basis, empty_basis
from .noise import kernels
from .noise.rows import NoiseRows, Probe, amplitudes_of, product_of_rows

SLOW_STEP = 0.05
"""Lower bound of the schedule 1/step of the learning step, before the stable bound."""

EXPLAINED_MEMORY = 0.9
"""Decay a learning step of the average behind ``probe_every="auto"``."""

MAX_INTERVAL = 16
"""Most steps between perturbed runs, with ``probe_every="auto"``."""

BASIS_PACE = 0.1
"""Share of the learning step with which a step's errors count in the basis of the outputs: the directions have to stay
for longer than it takes to learn what is new along them."""

BROKEN = 4.0
"""Energy of what predictions leave of the response, in units of the response's, above which they are scaled down."""

TRUST_MEMORY = 0.95
"""Decay a step of the sums behind the trust."""


@dataclass(frozen=True)
class FeedbackState:
    """What has been learned. Immutable: a step that fails leaves it as it was.

    Attributes:
        jacobians: for every noise point ``(elements a sample, outputs)``: the mean of ∂output/∂coordinate over samples
            in which the coordinate is alive. With blocks the mean over a block's alive coordinates too, one row a
            block; with a basis of the outputs, one column for each of its directions.
        steps: learning steps taken.
        slopes: for every noise point the decayed sums ``(Σ own·predicted, Σ predicted²)`` of its own response and of
            the prediction, both along the loss's gradient.
        explained: share of the output's response that the last step's predictions explained, before learning from it;
            with a basis, of the response along it.
        explained_mean: `explained`, averaged over the last learning steps.
        overshoot: by how much the last learning step scaled all Jacobians down, 1 unless they were broken.
        agreements: for every site with a shrunk correction the decayed sums behind α (`alpha`).
        basis: the directions of the outputs that are kept; None keeps all outputs.
    """

    jacobians: dict[int, Tensor]
    steps: int = 0
    slopes: dict[int, tuple[float, float]] = field(default_factory=dict)
    explained: float = 0.0
    basis: Basis | None = None
    explained_mean: float = 0.0
    overshoot: float = 1.0
    agreements: dict[int, tuple[float, float]] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Tensor | int | float]:
        """Everything, by flat names."""
        state: dict[str, Tensor | int | float] = {
            "feedback.steps": self.steps,
            "feedback.explained": self.explained,
            "feedback.explained_mean": self.explained_mean,
            "feedback.overshoot": self.overshoot,
        }
        for site, jacobian in self.jacobians.items():
            state[f"feedback.{site}.jacobian"] = jacobian
            own, predicted = self.slopes.get(site, (0.0, 0.0))
            state[f"feedback.{site}.own"], state[f"feedback.{site}.predicted"] = own, predicted
        for site, (product, square) in self.agreements.items():
            state[f"feedback.{site}.agreement"], state[f"feedback.{site}.square"] = product, square
        if self.basis is not None:
            state["feedback.directions"], state["feedback.strengths"] = self.basis.directions, self.basis.strengths
        return state

    def loaded(self, state: dict[str, Any]) -> FeedbackState:
        """The state that `state_dict` described, for the same noise points.

        Raises:
            KeyError: a value is missing.
            CheckpointError: a Jacobian or the basis has another shape: it was learned for another model, or in another
                form.
        """
        jacobians, slopes = {}, {}
        for site, mine in self.jacobians.items():
            jacobian = state[f"feedback.{site}.jacobian"]
            _check_shape(f"the feedback of site {site}", jacobian, mine, "(elements or blocks, outputs or rank)")
            jacobians[site] = jacobian.to(mine.device, mine.dtype).clone()
            slopes[site] = (float(state[f"feedback.{site}.own"]), float(state[f"feedback.{site}.predicted"]))
        basis = self.basis
        if basis is not None:
            directions, strengths = state["feedback.directions"], state["feedback.strengths"]
            _check_shape("the feedback's basis", directions, basis.directions, "(outputs, directions)")
            like = basis.directions
            directions, strengths = (each.to(like.device, like.dtype).clone() for each in (directions, strengths))
            basis = replace(basis, directions=directions, strengths=strengths)
        return FeedbackState(
            jacobians,
            int(state["feedback.steps"]),
            slopes,
            float(state["feedback.explained"]),
            basis,
            float(state["feedback.explained_mean"]),
            float(state["feedback.overshoot"]),
            {
                int(key.split(".")[1]): (float(product), float(state[key.replace("agreement", "square")]))
                for key, product in state.items()
                if key.startswith("feedback.") and key.endswith(".agreement")
            },
        )

    def alpha(self, site: int) -> float:
        """How much of a site's correction is signal, in [0, 1]: the product of the means of two halves of the draws
        over its square, in expectation ``S / (S + V)``: S the square of its mean over the noise, V its variance."""
        product, square = self.agreements.get(site, (0.0, 0.0))
        return min(1.0, max(0.0, product / square)) if square > 0 else 0.0

    def agreeing(self, site: int, product: float, square: float) -> FeedbackState:
        """The same with one more step's sums for `alpha`."""
        before = self.agreements.get(site, (0.0, 0.0))
        after = (TRUST_MEMORY * before[0] + product, TRUST_MEMORY * before[1] + square)
        return replace(self, agreements={**self.agreements, site: after})

    def projected(self, values: Tensor) -> Tensor:
        """``(…, outputs)`` along the basis, ``(…, rank)``; as they are without one."""
        return values if self.basis is None else values @ self.basis.leading

    def turned(self, error: Tensor, weight: float) -> FeedbackState:
        """The same with the basis moved by errors ``(samples, outputs)`` of a weight (`Basis.moved`), and the Jacobians
        along with it."""
        if self.basis is None:
            return self
        basis = self.basis.moved(error, weight)
        rotation = self.basis.leading.T @ basis.leading
        jacobians = {site: jacobian @ rotation for site, jacobian in self.jacobians.items()}
        return replace(self, jacobians=jacobians, basis=basis)

    def tensors(self) -> list[Tensor]:
        """Its Jacobians, and with a basis that."""
        basis = [] if self.basis is None else [self.basis.directions, self.basis.strengths]
        return [*self.jacobians.values(), *basis]

    def trust(self, *sites: int) -> float:
        """How far the sites' predictions are borne out by fresh copies: the slope of the response on the prediction,
        cut to [0, 1]. 1 where nothing was measured yet.

        Of several, whose gradients are summed (a weight that is shared over time), it is one slope for all: each counts
        by the square of what it predicts, and one that predicts next to nothing cannot hold back the others.
        """
        known = [self.slopes.get(site, (0.0, 0.0)) for site in sites]
        own, predicted = sum(slope[0] for slope in known), sum(slope[1] for slope in known)
        return self.overshoot * min(1.0, max(0.0, own / predicted)) if predicted > 0 else self.overshoot


def probe_interval(every: int | str, state: FeedbackState) -> int:
    """Steps from this perturbed run to the next: `every`, or for ``"auto"`` ``1 / (1 - explained)``, at most 16.

    What feedback does not explain is what another perturbed run could still teach.
    """
    if isinstance(every, int):
        return every
    explained = max(0.0, state.explained_mean)  # below zero it is worse than nothing; the order makes NaN a zero too
    return min(MAX_INTERVAL, int(1 / max(1 - explained, 1 / MAX_INTERVAL)))


def untaught(compiled: CompiledModel) -> FeedbackState:
    """The state of a compiled model's feedback before the first step."""
    val = error_like(compiled.graph.graph)
    sites = [compiled.sites[index] for run in compiled.runs for index in run.sites]
    like = torch.empty(0, dtype=val.dtype, device=val.device)
    return initial_state(sites, int(val.shape[1]), like, compiled.rank)


def initial_state(sites: list[Site], outputs: int, like: Tensor, rank: int | None = None) -> FeedbackState:
    """Nothing known: all Jacobians zero, on the device and of the dtype of `like`, in `rank` directions if given."""
    columns = outputs if rank is None else rank
    jacobians = {site.index: like.new_zeros(site.grid.elements, columns) for site in sites}
    return FeedbackState(jacobians, basis=None if rank is None else empty_basis(outputs, rank, like))


def learn(
    state: FeedbackState,
    probe: Probe,
    sites: list[Site],
    sigmas: list[float],
    noise: str,
    reached: Mapping[int, Tensor] | None = None,
) -> tuple[FeedbackState, Tensor]:
    """One step of joint normalised least squares on what the current Jacobians leave unexplained.

    What moves the outputs at a noise point is ``x = n ε``: ε a block's number, n how many of the block's coordinates
    are alive in the sample (0 or 1 where nothing is tied). ``J_i += μ mean(x_i ⊗ (Δo − Σ_j J_jᵀ x_j)) / mean(n_i²)``
    with ``μ = min(max(0.05, 1/step), N / (N + d))``: N samples x draws, d the blocks that received noise. Beyond the
    second bound the iteration diverges. It also would where a sample is alive in many blocks that are dead in most
    others: with ``T = Σ n² / mean(n²)`` over a sample's blocks (d on average) its residual counts ``w = min(1, d/T)``.

    Then the expected square error ``Σ mean(n²) ‖J − J*‖²`` never grows for Rademacher noise. In units of
    ``sqrt(mean(n²))`` the update's matrix is ``A = mean(w y yᵀ)`` with ``y = x / sqrt(mean(n²))``, ``|y|² = T`` and
    ``E A = Λ = diag(mean(w y²)) ≤ 1``. Two samples' noise is independent, so ``E[A²] ≤ Λ² + mean(w² T y²) / N ≤
    (1 + d / N) Λ``, and ``E[(1 − μ A)²] ≤ 1 − μ (2 − μ (1 + d / N)) Λ ≤ 1 − μ Λ``.

    Predictions that are far worse than none (`BROKEN`: feedback of other weights, a Jacobian that was tampered with)
    are first scaled down, all alike, to the least-squares fit of the response; trust goes down with them.

    With `reached`, of one whole graph, a Jacobian stays zero where a row does not reach an output, whose step then is
    that of the coordinates which do.

    With a basis of the outputs, Δo and the error are taken along it; then it moves by this probe's error (`basis`).

    Returns:
        The new state, and the response of the loss that the old one predicted, ``(draws, samples)``.
    """
    if not state.steps:  # the first errors, along which nothing was learned yet
        state = state.turned(probe.error, 1.0)
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
    spread, left = torch.stack([observed.square().sum(), residual.square().sum()]).tolist()
    scale_of_all = 1.0
    if left > BROKEN * spread:  # not yet learned wrong, but broken: what was learned belongs to other weights
        scale_of_all = min(1.0, max(0.0, float((observed * total).sum()) / float(total.square().sum())))
        state = replace(state, jacobians={index: j * scale_of_all for index, j in state.jacobians.items()})
        predicted *= scale_of_all
        residual = observed - scale_of_all * total
    squares = torch.cat(amplitudes, 1).square_()
    means = squares.mean(0)
    coordinates = int((means > 0).sum())
    wanted = max(SLOW_STEP, 1.0 / (state.steps + 1))
    step = min(wanted, count / (count + coordinates))
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
            jacobians[site.index] = torch.addcmul(before, change, scale, value=size)
        else:
            change = within_reach(change * (scale * size), reached.get(site.index))
            jacobians[site.index] = torch.addcmul(before, change, faster)
    along = predicted.mul_(error).sum(2)
    sums = torch.stack([(along * (along_residual + along)).sum(1), along.square().sum(1)], 1).tolist()
    slopes = {
        site.index: (TRUST_MEMORY * own + new_own, TRUST_MEMORY * square + new_square)
        for site, (own, square), (new_own, new_square) in zip(
            sites, (state.slopes.get(site.index, (0.0, 0.0)) for site in sites), sums, strict=True
        )
    }
    explained = 1.0 - left / spread if spread > 0 else 0.0
    average = (
        (1 - EXPLAINED_MEMORY) * max(-1.0, explained) + EXPLAINED_MEMORY * state.explained_mean
        if state.steps
        else max(-1.0, explained)
    )
    learned = replace(
        state,
        jacobians=jacobians,
        steps=state.steps + 1,
        slopes=slopes,
        explained=explained,
        explained_mean=average,
        overshoot=scale_of_all,
    )
    response = (total * error).sum(1).reshape(draws, samples)
    every = 1 if state.basis is None else state.basis.interval
    moves = state.steps > 0 and state.steps % every == 0
    return (learned.turned(probe.error, 1 - (1 - BASIS_PACE * step) ** every) if moves else learned), response


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


def _check_shape(what: str, saved: Tensor, mine: Tensor, axes: str) -> None:
    if saved.shape != mine.shape:
        raise CheckpointError(
            f"{what} was learned for {tuple(saved.shape)} {axes}; this model has {tuple(mine.shape)} there. Feedback "
            "cannot move to a changed model, to other blocks or to another rank."
        )
