"""What feedback learns from a perturbed run, as a function of tensors alone: `runtime.learning.learn` for a graph.

The eager form decides on Python numbers; a graph has none. So here its counters are 0-d tensors, and its one branch
(predictions that are worse than none are scaled down) is a factor that is 1 otherwise. The tests hold one to the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ...passes.find_sites import Site
from ..feedback import MAX_INTERVAL, TRUST_MEMORY, FeedbackState
from ..learning import BROKEN, EXPLAINED_MEMORY, SLOW_STEP, sample_weights, steps_of_outputs, within_reach
from ..noise.rows import NoiseRows, Probe, amplitudes_of, product_of_rows


@dataclass(frozen=True)
class Counters:
    """What feedback keeps beside its Jacobians (`FeedbackState`), as tensors.

    Attributes:
        steps: learning steps taken, int64 ``()``.
        slopes: by noise point, in the order of its sites, ``(points, 2)`` float64.
        explained_mean, overshoot: float64 ``()``.
        next_probe: the step from which on the next has a perturbed run, int64 ``()``.
    """

    steps: Tensor
    slopes: Tensor
    explained_mean: Tensor
    overshoot: Tensor
    next_probe: Tensor

    @classmethod
    def of(cls, state: FeedbackState, next_probe: int) -> Counters:
        """Those of a program."""
        slopes = [state.slopes.get(site, (0.0, 0.0)) for site in state.jacobians]
        return cls(
            torch.tensor(state.steps),
            torch.tensor(slopes, dtype=torch.float64).reshape(-1, 2),
            torch.tensor(state.explained_mean, dtype=torch.float64),
            torch.tensor(state.overshoot, dtype=torch.float64),
            torch.tensor(next_probe),
        )

    def tensors(self) -> list[Tensor]:
        """In the order of `NAMES`."""
        return [getattr(self, name) for name in NAMES]


NAMES = tuple(field.name for field in fields(Counters))


def learned(
    jacobians: Mapping[int, Tensor],
    counters: Counters,
    probe: Probe,
    sites: Sequence[Site],
    sigmas: Sequence[float],
    noise: str,
    every: int | str,
    step_count: Tensor,
    reached: Mapping[int, Tensor],
) -> tuple[dict[int, Tensor], Counters, Tensor]:
    """`learning.learn` without a basis: the new Jacobians and counters, and the response of the loss that the old ones
    predicted, ``(draws, samples)``.

    Args:
        every: `LikelihoodRatio.probe_every`.
        step_count: of this step, int64 ``()``.
    """
    draws, samples, outputs = probe.response.shape
    observed = probe.response.reshape(draws * samples, outputs)
    error = probe.error.repeat(draws, 1)
    amplitudes = {site.index: amplitudes_of(site, probe) for site in sites}
    rows = {site.index: NoiseRows(site, probe, noise, amplitudes[site.index]) for site in sites}
    predicted = {
        site.index: product_of_rows(jacobians[site.index], rows[site.index], False, None) * sigmas[site.index]
        for site in sites
    }
    total = sum(predicted.values(), torch.zeros_like(observed))
    spread, left = observed.square().sum().double(), (observed - total).square().sum().double()
    fit = (observed * total).sum().double() / total.square().sum().double()
    scale_of_all = torch.where(left > BROKEN * spread, fit.clamp(0, 1), 1.0)
    scale = scale_of_all.to(observed.dtype)
    residual = observed - scale * total

    squares = torch.cat([amplitudes[site.index] for site in sites], 1).square()
    means = squares.mean(0)
    coordinates = (means > 0).sum()
    count = draws * samples
    wanted = torch.clamp_min(1.0 / (counters.steps + 1).double(), SLOW_STEP)
    step = torch.minimum(wanted, count / (count + coordinates).double())
    faster = steps_of_outputs(means, sites, reached, outputs, wanted, count) / step if reached else None
    along_residual = (residual * error).sum(1)
    weighted = residual * sample_weights(squares, means, coordinates).repeat(draws)[:, None]
    new, slopes = {}, []
    scales = means.clamp_min(1.0 / count).split([site.grid.elements for site in sites])
    for place, site in enumerate(sites):
        index = site.index
        mean = product_of_rows(weighted, rows[index], True, None) / count
        change = (step / sigmas[index]).to(mean.dtype) / scales[place]
        change = change[:, None] * mean
        if faster is not None:
            change = within_reach(change, reached.get(index)) * faster.to(change.dtype)
        new[index] = scale * jacobians[index] + change
        along = (scale * predicted[index] * error).sum(1)
        own = ((along_residual + along) * along).sum().double()
        slopes.append(TRUST_MEMORY * counters.slopes[place] + torch.stack([own, along.square().sum().double()]))
    explained = torch.where(spread > 0, 1.0 - left / spread, 0.0).clamp_min(-1.0)
    followed = (1 - EXPLAINED_MEMORY) * explained + EXPLAINED_MEMORY * counters.explained_mean
    average = torch.where(counters.steps > 0, followed, explained)
    after = Counters(
        counters.steps + 1, torch.stack(slopes), average, scale_of_all, step_count + interval(every, average)
    )
    return new, after, (total * error).sum(1).reshape(draws, samples)


def interval(every: int | str, explained_mean: Tensor) -> Tensor:
    """`feedback.probe_interval`, int64 ``()``."""
    if isinstance(every, int):
        return torch.full((), every, dtype=torch.int64)
    explained = explained_mean.clamp_min(0.0)
    steps = 1.0 / torch.clamp_min(1 - explained, 1 / MAX_INTERVAL)
    return torch.clamp_max(torch.floor(steps).to(torch.int64), MAX_INTERVAL)


def trust_of(counters: Counters, order: Sequence[int], read: Sequence[Sequence[int]]) -> Tensor:
    """`Program.trust` of one parameter: float64 ``()``.

    Args:
        order: the noise points, in the order of `Counters.slopes`.
        read: for each of the parameter's sites the noise points that its gradient is read from.
    """
    if not any(read):  # exact, from the output
        return torch.ones((), dtype=torch.float64)
    single = [order.index(points[0]) for points in read if len(points) == 1]
    chosen = torch.tensor([single.count(place) for place in range(len(order))], dtype=torch.float64)
    sums = (counters.slopes * chosen[:, None]).sum(0) if single else torch.zeros(2, dtype=torch.float64)
    for points in read:
        if len(points) > 1:  # the least trusted of them
            rows = torch.stack([counters.slopes[order.index(point)] for point in points])
            least = torch.where(rows[:, 1] > 0, (rows[:, 0] / rows[:, 1]).clamp(0, 1), 1.0).argmin()
            sums = sums + rows.index_select(0, least[None])[0]
    share = torch.where(sums[1] > 0, (sums[0] / sums[1]).clamp(0, 1), 1.0)
    return counters.overshoot * share
