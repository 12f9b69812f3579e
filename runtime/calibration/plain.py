"""What a calibration chooses without feedback: placement, place of the noise, σ, groups and copies (method.md 5-7, 10).

Placement and place of the noise are compared one site a run, where sites are independent: a site takes the place with
the smaller ``V c``, the program the placement that leaves less variance for the budget. Then the budget is divided
(`allocation`): which neighbours share a run, and copies in proportion to ``sqrt(V / c)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ...compiler.estimator import LikelihoodRatio
from ...compiler.program import CompiledModel, PerturbedRun
from ...compiler.site_options import resolve_groups, resolve_sigmas
from ...passes.errors import NonFiniteLossError, OptionError, UnsupportedModelError
from ..linearity import LINEAR, Linearity
from .allocation import LEAST_COST, Load, allocate, bought, cost_of, partition
from .gradient_noise import repeated_gradients, variance
from .record import Calibration
from .task import CalibrationTask, check_budget, row_of

REPETITIONS = 8
"""Steps behind a variance: 7 degrees of freedom for each of a site's numbers."""


@dataclass(frozen=True)
class _Trial:
    """A program without feedback, and what was measured of it."""

    compiled: CompiledModel
    linear: dict[int, Linearity]
    sigmas: list[float]
    variances: dict[int, float]
    """Of one pair, by site."""

    def run(self, index: int) -> PerturbedRun:
        """The run that perturbs a site."""
        return next(run for run in self.compiled.runs if index in run.sites)

    def load(self, index: int, output: _Trial) -> Load:
        """What a site brings into a run; `output` is the same with noise on outputs."""
        share = self.run(index).share
        extra = max(0.0, share - output.run(index).share)
        return Load(self.variances[index], self.sigmas[index] ** 2 * self.linear[index].variance, share, extra)

    def price(self, index: int) -> float:
        """``V c`` of a site with a run of its own."""
        return self.variances[index] * max(self.run(index).share, LEAST_COST)


def choose_plain(task: CalibrationTask, sigmas: list[float]) -> Calibration:
    """Settings for a program without feedback, whose σ are `sigmas`; CalibrationError if the budget is too small."""
    estimator, choose = task.base.estimator, task.choose
    least = estimator.step if "copies" in choose else estimator.copies
    regroups = {"groups", "copies"} <= choose
    places = "placement" in choose and (estimator.placement, estimator.capture) == ("operation", "exact")
    tries_weights = "noise_on" in choose and estimator.noise_on == "output"
    if not (regroups or places or tries_weights):
        compiled = task.compiled(replace(estimator, copies=least))
        check_budget(task, compiled)
        return _finished(task, *_measured(task, compiled, sigmas))
    alone = replace(estimator, groups="layerwise", copies=estimator.step)
    output, spent = _measured(task, task.compiled(alone), sigmas)
    for placement in ("alive", "narrow") if places else ():
        if (found := _tried(task, replace(alone, placement=placement))) is not None:
            spent += found[1]
            output = min(output, found[0], key=lambda trial: _left(task, trial, regroups))
    weights, on_weights = output, frozenset[int]()
    if tries_weights and (found := _tried(task, replace(output.compiled.estimator, noise_on="sample"))) is not None:
        weights, more = found
        spent += more
        possible = [site.index for site in weights.compiled.sites if site.weight_noise is not None]
        plain = [index for index in possible if not output.compiled.sites[index].blocks]
        on_weights = frozenset(index for index in plain if weights.price(index) < output.price(index))
    arranged, more = _arranged(task, output, weights, on_weights, regroups)
    return _finished(task, arranged, spent + more)


def _measured(task: CalibrationTask, compiled: CompiledModel, sigmas: list[float]) -> tuple[_Trial, float]:
    """What a program's gradients are like, and the perturbed forwards a sample that it took; σ as given, or measured.

    A pair for every run tells: variance is that of one pair whatever the copies.
    """
    linear, chosen, spent = task.linearity(compiled, sigmas)
    one = replace(compiled.estimator, copies=compiled.estimator.step)
    variances, more = _variances(task, compiled if one == compiled.estimator else task.compiled(one), chosen)
    return _Trial(compiled, linear, chosen, variances), spent + more


def _variances(task: CalibrationTask, compiled: CompiledModel, sigmas: list[float]) -> tuple[dict[int, float], float]:
    repeated = repeated_gradients(compiled, sigmas, task.bound(sigmas), REPETITIONS)
    return {index: variance(each) for index, each in repeated.items()}, REPETITIONS * compiled.forwards


def _tried(task: CalibrationTask, estimator: LikelihoodRatio) -> tuple[_Trial, float] | None:
    """`_measured` of another program; None if the model, or what the estimator says of its sites, does not allow it."""
    try:
        compiled = task.compiled(estimator)
        resolve_groups(task.base.estimator.groups, compiled.sites)
        return _measured(task, compiled, resolve_sigmas(estimator.sigma, compiled.sites))
    except (OptionError, UnsupportedModelError, NonFiniteLossError):
        return None


def _left(task: CalibrationTask, trial: _Trial, regroups: bool) -> float:
    """Variance of all gradients that the budget leaves in the groups that it would have."""
    loads = [trial.load(site.index, trial) for site in trial.compiled.sites]
    groups = _groups(task, loads, trial.compiled, regroups, task.budget)
    return bought([[loads[index] for index in group] for group in groups], task.budget, task.base.estimator.step)


def _groups(
    task: CalibrationTask, loads: list[Load], compiled: CompiledModel, regroups: bool, budget: float
) -> list[tuple[int, ...]]:
    estimator = task.base.estimator
    return partition(loads, budget, estimator.step) if regroups else resolve_groups(estimator.groups, compiled.sites)


def _arranged(
    task: CalibrationTask, output: _Trial, weights: _Trial, on_weights: frozenset[int], regroups: bool
) -> tuple[_Trial, float]:
    """The program with noise on some weights, in the groups that the budget pays for, one pair each; and what
    measuring it took."""
    base, sites = task.base.estimator, output.compiled.sites
    of = {site.index: weights if site.index in on_weights else output for site in sites}
    loads = [of[site.index].load(site.index, output) for site in sites]
    limit = task.budget
    while True:
        groups = _groups(task, loads, output.compiled, regroups, limit)
        estimator = replace(
            output.compiled.estimator,
            groups=_grouping(groups, output.compiled) if regroups else base.groups,
            noise_on={sites[index].name: "sample" for index in sorted(on_weights)} or base.noise_on,
            copies=base.step if "copies" in task.choose else base.copies,
        )
        compiled = output.compiled if estimator == output.compiled.estimator else task.compiled(estimator)
        if not regroups or len(groups) == 1 or compiled.forwards <= task.budget * (1 + 1e-9):
            break
        limit = base.step * sum(cost_of([loads[index] for index in group]) for group in groups) * (1 - 1e-6)
    linear = {index: of[index].linear[index] for index in of}
    sets = "sigma" in task.choose or base.sigma == "auto"
    sigmas = [of[site.index].sigmas[site.index] for site in sites]
    for group in groups:
        for index in group if sets else ():
            sigmas[index] /= math.sqrt(len(group)) if linear[index].nonlinearity <= LINEAR else 1.0
    if all(len(group) == 1 for group in groups):
        return _Trial(compiled, linear, sigmas, {index: of[index].variances[index] for index in of}), 0.0
    one = task.compiled(replace(compiled.estimator, copies=base.step))
    variances, spent = _variances(task, one, sigmas)
    return _Trial(compiled, linear, sigmas, variances), spent


def _grouping(groups: list[tuple[int, ...]], compiled: CompiledModel) -> str | list[list[str]]:
    """Groups as the estimator has them."""
    if all(len(group) == 1 for group in groups):
        return "layerwise"
    return "joint" if len(groups) == 1 else [[compiled.sites[index].name for index in group] for group in groups]


def _finished(task: CalibrationTask, trial: _Trial, spent: float) -> Calibration:
    """Copies for the budget, and everything written down."""
    compiled, runs = trial.compiled, trial.compiled.runs
    check_budget(task, compiled)
    estimator, names = compiled.estimator, [site.name for site in compiled.sites]
    if "sigma" in task.choose:
        estimator = replace(estimator, sigma=dict(zip(names, trial.sigmas, strict=True)))
    if "copies" in task.choose:
        variances = [sum(trial.variances[index] for index in run.sites) for run in runs]
        counts = allocate(variances, [run.share for run in runs], task.budget, estimator.step)
        by_name = {names[i]: count for run, count in zip(runs, counts, strict=True) for i in run.sites}
        estimator = replace(estimator, copies=counts[0] if len(runs) == 1 else by_name)
    rows = []
    for run in runs:
        for index in run.sites:
            noise = compiled.sites[index].weight_noise
            row = row_of(compiled, index, trial.linear.get(index), trial.sigmas[index])
            rows.append(replace(row, variance=trial.variances[index], noise_on="output" if noise is None else noise.on))
    return Calibration(estimator, tuple(rows), None, spent)


__all__ = ["choose_plain"]
