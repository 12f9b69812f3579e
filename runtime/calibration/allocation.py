"""How a budget of perturbed forwards is divided: which neighbouring sites share a run, and copies a run (method.md 7).

A run of n pairs gives its sites' gradients with a variance of ``V / n`` and costs ``n c``. For a partition of the sites
the least variance that a budget B buys is that of pairs in proportion to ``sqrt(V / c)``: ``(Σ sqrt(V c))² / B``.

Sites that are perturbed together are in each other's way: the noise of all moves the loss that each is correlated with,
and V of a site becomes ``V Σ_j σ_j² v_j / (σ² v)``, v being the mean square of the loss's response per unit of its
noise. As long as runs may have as few pairs as they like, that never pays. For sites of one cost c, with ``d = V / v``,
joint takes ``c Σ d_i / σ_i² Σ σ_i² v_i`` and layerwise ``c (Σ sqrt(d_i v_i))²``, which is at most that by
Cauchy-Schwarz. Where suffixes get cheaper the terms of layerwise are smaller still, joint has the longest suffix. What
speaks for larger groups is that no run has less than one pair: a small budget cannot pay one for every site, and one
that just can has nothing left for the sites that need more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

LEAST_COST = 0.05
"""What a perturbed copy costs at least, in forwards: noise, losses and operations without FLOPs are not free."""


@dataclass(frozen=True)
class Load:
    """What a site brings into the run that perturbs it."""

    variance: float
    """Of its gradient, from one pair of a run of its own."""
    response: float
    """σ² v: mean square of what its noise does to the loss."""
    cost: float
    """A copy of a run of its own, in forwards."""
    extra: float = 0.0
    """What of `cost` its noise takes (noise on a weight is one more product), whatever else the run perturbs."""


def cost_of(loads: Sequence[Load]) -> float:
    """A copy of the run that perturbs these sites, in forwards: the longest suffix, and the noise on weights."""
    return max(load.cost - load.extra for load in loads) + sum(load.extra for load in loads)


def variance_of(loads: Sequence[Load]) -> float:
    """Variance of the gradients of sites that are perturbed together, from one pair."""
    together = sum(load.response for load in loads)
    shares = ((load.variance, together / load.response if load.response > 0 else 1.0) for load in loads)
    return sum(variance * share for variance, share in shares)


def allocate(variances: Sequence[float], costs: Sequence[float], budget: float, step: int) -> list[int]:
    """Copies of runs with these variances and costs (of a pair and a copy): proportional to ``sqrt(V / c)``."""
    floored = [max(cost, LEAST_COST) for cost in costs]
    pairs = zip(variances, floored, strict=True)
    weights = [math.sqrt(variance / cost) if math.isfinite(variance) else 0.0 for variance, cost in pairs]
    return in_proportion(weights, floored, budget, step)


def in_proportion(weights: Sequence[float], costs: Sequence[float], budget: float, step: int) -> list[int]:
    """Counts in proportion to `weights`, each a multiple of `step` and at least one, that cost at most `budget`.

    They are rounded down; what that leaves rounds some up again, those first whose variance falls most for its cost.
    """
    largest = max(weights) or 1.0  # in units of it nothing overflows
    weights = [weight / largest for weight in weights]
    free = set(range(len(weights)))
    while True:
        spare = budget - step * sum(cost for number, cost in enumerate(costs) if number not in free)
        whole = sum(weights[number] * costs[number] for number in free)
        factor = spare / whole if whole > 0 else 0.0
        below = {number for number in free if factor * weights[number] < step}
        if not below:
            break
        free -= below
    counts = [int(factor * weight) // step * step if n in free else step for n, weight in enumerate(weights)]
    left = budget * (1 - 1e-12) - sum(count * cost for count, cost in zip(counts, costs, strict=True))
    rounded = [n for n in sorted(free) if counts[n] < factor * weights[n]]
    for n in sorted(rounded, key=lambda n: weights[n] ** 2 / (counts[n] * (counts[n] + step)), reverse=True):
        if step * costs[n] <= left:
            counts[n] += step
            left -= step * costs[n]
    return counts


def bought(groups: Sequence[Sequence[Load]], budget: float, step: int) -> float:
    """Variance of all gradients that `budget` leaves; infinite if it does not pay one pair a group."""
    costs = [cost_of(group) for group in groups]
    if step * sum(costs) > budget * (1 + 1e-9):
        return math.inf
    variances = [variance_of(group) for group in groups]
    counts = allocate(variances, costs, budget, step)
    return sum(variance * step / count for variance, count in zip(variances, counts, strict=True))


def partition(loads: Sequence[Load], budget: float, step: int) -> list[tuple[int, ...]]:
    """The contiguous groups of sites that leave the least variance under `budget`; joint if it pays for nothing.

    A descent: from one group a site on, those two neighbours are merged whose merger adds the least variance for the
    cost that it saves, down to one group. The best partition on that way is then improved by single cuts, made, undone
    or exchanged for another, as long as one is better.
    """
    best = frozenset[int]()
    least = _left(loads, best, budget, step)
    cuts = frozenset(range(1, len(loads)))
    while cuts:
        if (left := _left(loads, cuts, budget, step)) < least:
            best, least = cuts, left
        cuts = cuts - {min(sorted(cuts), key=lambda cut: _growth(*_beside(loads, cuts, cut)))}
    while True:
        left, cuts = min(((_left(loads, near, budget, step), near) for near in _near(best, len(loads))), key=_first)
        if not left < least * (1 - 1e-9):
            return _groups(best, range(len(loads)))
        best, least = cuts, left


def _first(pair: tuple[float, frozenset[int]]) -> float:
    return pair[0]


def _near(cuts: frozenset[int], count: int) -> list[frozenset[int]]:
    """The partitions of `count` sites with one cut more, less, or elsewhere; and the same."""
    every = range(1, count)
    moved = [cuts - {one} | {other} for one in sorted(cuts) for other in every if other not in cuts]
    return [cuts, *(cuts ^ {cut} for cut in every), *moved]


def _left(loads: Sequence[Load], cuts: frozenset[int], budget: float, step: int) -> float:
    return bought(_groups(cuts, loads), budget, step)


def _groups(cuts: frozenset[int], members: Sequence[T]) -> list[tuple[T, ...]]:
    ends = [0, *sorted(cuts), len(members)]
    return [tuple(members[start:end]) for start, end in itertools.pairwise(ends)]


def _beside(loads: Sequence[Load], cuts: frozenset[int], cut: int) -> tuple[Sequence[Load], Sequence[Load]]:
    """The groups before and behind a cut."""
    before = max((each for each in cuts if each < cut), default=0)
    behind = min((each for each in cuts if each > cut), default=len(loads))
    return loads[before:cut], loads[cut:behind]


def _growth(a: Sequence[Load], b: Sequence[Load]) -> float:
    """Variance that a merger adds, for each forward that it saves."""
    both = [*a, *b]
    saved = cost_of(a) + cost_of(b) - cost_of(both)
    return (variance_of(both) - variance_of(a) - variance_of(b)) / max(saved, LEAST_COST)
