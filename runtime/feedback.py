"""Learned feedback: the mean Jacobian of the outputs at every noise point, learned from perturbed runs (`learning`).

method.md 12; it extends FDFA (Bacho & Chu, arXiv 2212.07282, after Lansdell, Prakash & Kording, ICLR 2020), learning
from the joint residual of all noise points and on their alive coordinates only. Where noise is tied over blocks
(`passes.tie_blocks`), a Jacobian has one row a block; with a rank, one column for each direction of a basis of the
outputs (`basis`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..compiler.program import CompiledModel
from ..passes.errors import CheckpointError
from ..passes.find_sites import Site
from ..passes.separate_outputs import error_like
from .basis import Basis, empty_basis

MAX_INTERVAL = 16
"""Most steps between perturbed runs, with ``probe_every="auto"``."""

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


def _check_shape(what: str, saved: Tensor, mine: Tensor, axes: str) -> None:
    if saved.shape != mine.shape:
        raise CheckpointError(
            f"{what} was learned for {tuple(saved.shape)} {axes}; this model has {tuple(mine.shape)} there. Feedback "
            "cannot move to a changed model, to other blocks or to another rank."
        )
