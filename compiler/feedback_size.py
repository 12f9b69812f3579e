"""How large the learned Jacobians of a program are, and the rank at which they fit their memory (method.md 12)."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from torch import fx

from ..passes.errors import OptionError
from ..passes.find_sites import Site
from ..passes.separate_outputs import error_like
from .columns import size
from .estimator import LikelihoodRatio
from .program import CompiledModel

AUTO_RANK = 64
"""Directions kept at most where not all outputs fit: what the basis costs a step grows faster than what it explains."""


def resolve_rank(module: fx.GraphModule, points: Sequence[Site], estimator: LikelihoodRatio) -> int | None:
    """Columns of every Jacobian at the noise `points`, less than the model's outputs; None for all outputs.

    Raises:
        OptionError: the Jacobians of this rank, or of rank 1, are larger than ``feedback_memory``.
    """
    outputs, item = _output(module)
    rows = sum(point.grid.elements for point in points)
    budget = estimator.feedback_memory << 20

    def taken(rank: int) -> int:
        """Bytes of the Jacobians of a rank, and of the directions that come with it."""
        columns = min(rank, outputs)
        return item * (rows * columns + (outputs * tracked_directions(rank, outputs) if rank < outputs else 0))

    rank = outputs if estimator.rank is None else estimator.rank
    if estimator.rank is None and taken(rank) > budget:
        rank = min(AUTO_RANK, bisect.bisect_right(range(1, outputs), budget, key=taken) or 1)
    if taken(rank) <= budget:
        return rank if rank < outputs else None
    at_rank = f", {size(taken(rank))} at rank {rank}" if rank < outputs else ""
    raise OptionError(
        f"the learned Jacobians of {rows:,} coordinates at {len(points)} noise point(s) and {outputs:,} outputs take "
        f"{size(taken(outputs))}{at_rank}; feedback_memory={estimator.feedback_memory} MiB. Tie the noise over blocks "
        "of positions (blocks=2 leaves a quarter of an image's coordinates), lower the rank, or allow "
        f"feedback_memory={-(-taken(rank) // 2**20)}."
    )


def tracked_directions(rank: int, outputs: int) -> int:
    """Directions of the outputs that are followed to know the `rank` leading ones: a new one gains its strength step by
    step, and where there is no room to, only one that is many times stronger would ever take an old one's place."""
    return min(outputs, rank + max(rank, 8))


def jacobian_shapes(compiled: CompiledModel) -> dict[int, tuple[int, int]]:
    """Rows (coordinates or blocks) and columns (outputs or rank) of the Jacobian at every noise point, by site."""
    if compiled.estimator.feedback == "none":
        return {}
    columns = _output(compiled.graph)[0] if compiled.rank is None else compiled.rank
    return {index: (compiled.sites[index].grid.elements, columns) for run in compiled.runs for index in run.sites}


def jacobian_bytes(compiled: CompiledModel) -> dict[int, int]:
    """Bytes of the Jacobian at every noise point, by site. A learning step holds the new ones beside the old."""
    if compiled.estimator.feedback == "none":
        return {}
    item = _output(compiled.graph)[1]
    return {index: rows * columns * item for index, (rows, columns) in jacobian_shapes(compiled).items()}


def _output(module: fx.GraphModule) -> tuple[int, int]:
    """Numbers a sample that the model returns and feedback responds to, and bytes of each."""
    like = error_like(module.graph)
    return int(like.shape[1]), like.element_size()


__all__ = ["jacobian_bytes", "jacobian_shapes", "resolve_rank"]
