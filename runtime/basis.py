"""The directions of the outputs along which low-rank feedback is learned: where the recent errors are largest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiler.feedback_size import tracked_directions

FRESH = 32
"""Errors of a step that are looked at, or as many as the rank if that is more: its cost grows with their square."""


SPANNED = 1e-13
"""Square of a direction's strength relative to the first's, below which it is rounding."""

PRECISE = {torch.float32: 1e-6, torch.float64: 1e-10}
"""The same, above which directions are orthonormal to a thousandth, and to a millionth, without QR."""


@dataclass(frozen=True)
class Basis:
    """The leading directions of the errors' decayed second moment, and some more that may overtake them.

    Attributes:
        directions: ``(outputs, tracked)``, orthonormal columns, the strongest first; all zero before the first error.
        strengths: ``(tracked,)``, root of the second moment along each.
        rank: how many of them are the basis.
    """

    directions: Tensor
    strengths: Tensor
    rank: int

    @property
    def leading(self) -> Tensor:
        """The basis, ``(outputs, rank)``."""
        return self.directions[:, : self.rank]

    def moved(self, error: Tensor, weight: float) -> Basis:
        """The basis after one more batch of errors ``(samples, outputs)``, which counts `weight` in (0, 1] of the new
        second moment: the left singular vectors of the old directions and the new errors side by side (incremental
        principal components). Deterministic; errors that are not finite change nothing.

        They come from the eigenvectors of the columns' inner products, in double precision: a matrix of a few dozen
        rows however many the outputs. QR is needed only where directions are so much weaker than the first that
        rounding shows, and where the columns span fewer than are tracked: it completes them.
        """
        tracked = self.strengths.shape[0]
        fresh = error[: max(FRESH, self.rank)]
        if not bool(torch.isfinite(fresh).all()):
            return self
        wide = self.directions.dtype if self.directions.dtype == torch.float64 else torch.float32
        # e is that of the mean loss, and what counts the mean of each sample's own second moment
        new = (weight / len(fresh)) ** 0.5 * error.shape[0] * fresh.to(wide).T
        old = (1 - weight) ** 0.5 * self.directions.to(wide) * self.strengths.to(wide)
        columns = torch.cat([old, new], 1)
        size = float(columns.abs().max()) or 1.0
        columns = columns / size  # so that no square is too small or too large
        squares, vectors = torch.linalg.eigh(_products(columns))
        squares, vectors = squares.flip(0)[:tracked].clamp_min(0), vectors.flip(1)[:, :tracked]
        known = squares > SPANNED * squares[0]
        scale = torch.where(known, squares, 1).rsqrt() * known
        directions = columns @ (vectors * scale).to(wide)
        if float(squares[-1]) <= PRECISE[wide] * float(squares[0]):
            directions, _ = torch.linalg.qr(directions)
        strengths = (squares.sqrt() * size).to(self.strengths.dtype)
        return Basis(directions.to(self.directions.dtype), strengths, self.rank)

    @property
    def interval(self) -> int:
        """Learning steps from one move to the next: what a move costs grows with the square of the directions, and so
        is bounded by that of a few."""
        return max(1, self.strengths.shape[0] // FRESH)


def _products(columns: Tensor) -> Tensor:
    """Inner products of the columns in double precision; in parts, to convert within the cache."""
    total = columns.new_zeros(columns.shape[1], columns.shape[1], dtype=torch.float64)
    for part in columns.split(1024):
        wide = part.double()
        total.addmm_(wide.T, wide)
    return total


def empty_basis(outputs: int, rank: int, like: Tensor) -> Basis:
    """No direction yet: all zero."""
    tracked = tracked_directions(rank, outputs)
    return Basis(like.new_zeros(outputs, tracked), like.new_zeros(tracked), rank)
