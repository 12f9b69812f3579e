"""Calibration: measure a compiled program on a batch, and choose its settings from what came out (method.md 7, 12).

σ of every noise point is the largest at which the loss responds linearly (`linearity`). With learned feedback, feedback
is then learned on the batch, with the weights at rest, and the budget goes to the copies of the one joint run. Without,
each group's copies are in proportion to ``sqrt(V / c)``: V the variance of its gradient from one copy, elements times
variance of a coordinate, and c what a copy costs; the least variance that the budget buys. Groups for which that would
be less than one pair (or copy) have one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from ..compiler.driver import compile_model
from ..compiler.estimator import LikelihoodRatio
from ..compiler.files import write_whole
from ..compiler.program import CompiledModel, PerturbedRun
from ..compiler.report_text import describe_estimator
from ..compiler.site_options import UNMEASURED, resolve_sigmas
from ..passes.errors import CalibrationError, OptionError, UnknownNameError
from ..passes.find_sites import Site
from .executor import SerialExecutor, StepInput
from .feedback import FeedbackState
from .linearity import Linearity, measure
from .metrics import jsonable

LEARNING_STEPS = 40
"""Steps in which feedback is learned on the batch, before what it explains is read."""

LEAST_COST = 0.01
"""What a perturbed copy costs at least, in forwards: losses, and operations without FLOPs, are not free of charge."""

_KEY = 1 << 31
"""Step numbers of the noise of a calibration: beyond those of training."""


@dataclass(frozen=True)
class SiteCalibration:
    """What was measured at one noise point, and the σ chosen."""

    site: str
    elements: int
    """Perturbed elements a sample."""
    scale: float
    """Root mean square of the tensor that receives the noise."""
    sigma: float
    nonlinearity: float | None
    """Change of the response when σ is halved, relative to it; near 1 or above where there is no derivative."""
    variance: float
    """Mean square of the response of a sample's loss per unit of noise: the variance of a coordinate's estimate by one
    pair."""
    share: float
    """FLOPs of the perturbed suffix as a share of a forward's."""
    trust: float | None
    """With feedback, `FeedbackState.trust` after the warm-up; None without."""


@dataclass(frozen=True)
class Calibration:
    """Settings for one model, with the measurements behind them. `onward.compile` takes it for its estimator.

    Edit it by hand as JSON (`save`, `load`): what counts is ``estimator``; ``sites`` documents it and ties it to the
    model.
    """

    estimator: LikelihoodRatio
    sites: tuple[SiteCalibration, ...]
    explained: float | None
    """With feedback, the share of the outputs' response that it explained after the warm-up."""
    forwards: float
    """Perturbed forwards a sample that the calibration took."""

    def compile(self, model: nn.Module, example_inputs: Any) -> CompiledModel:
        """Compile `model` with these settings; CalibrationError if they were measured for another model."""
        try:
            compiled = compile_model(model, example_inputs, self.estimator)
            resolve_sigmas(self.estimator.sigma, compiled.sites)
        except (OptionError, UnknownNameError) as error:
            raise CalibrationError(f"the calibration does not fit this model: {error} Calibrate again.") from error
        mine = {site.site: site.elements for site in self.sites}
        theirs = {site.name: site.noise_layout.elements for run in compiled.runs for site in _members(compiled, run)}
        changes = [f"{name!r} is gone" for name in mine if name not in theirs]
        changes += [f"{name!r} is new" for name in theirs if name not in mine]
        changes += [
            f"{name!r} has {theirs[name]} elements a sample, not {mine[name]}"
            for name in mine
            if name in theirs and theirs[name] != mine[name]
        ]
        if changes:
            raise CalibrationError(
                f"the calibration is of another model or another placement of the noise: {'; '.join(changes)}. "
                "Calibrate again."
            )
        return compiled

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON-serialisable values."""
        return {
            "version": 1,
            "estimator": self.estimator.to_json(),
            "explained": self.explained,
            "forwards": self.forwards,
            "sites": jsonable([asdict(site) for site in self.sites]),
        }

    @classmethod
    def from_json(cls, data: Any) -> Calibration:
        """What `to_json` gave, edited or not.

        Raises:
            CalibrationError: it is no calibration, or of another version.
            OptionError, UnknownNameError: an edited setting cannot work.
        """
        try:
            if data["version"] != 1:
                raise CalibrationError(f"the calibration has version {data['version']}; this Onward reads version 1.")
            sites = tuple(SiteCalibration(**site) for site in data["sites"])
            return cls(LikelihoodRatio(**data["estimator"]), sites, data["explained"], data["forwards"])
        except (KeyError, TypeError) as error:
            raise CalibrationError(f"this is not a calibration as `onward` writes it: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all; OutputError if that cannot be."""
        write_whole(Path(path), json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote; CalibrationError if it cannot be read."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CalibrationError(f"cannot read the calibration {path}: {error}") from error
        return cls.from_json(data)

    def __str__(self) -> str:
        console = Console(width=120, force_terminal=False, color_system=None)
        with console.capture() as captured:
            console.print(self.table(), highlight=False)
        return captured.get()

    def table(self) -> Table:
        """The measurements as a table."""
        learned = "" if self.explained is None else f", feedback explains {self.explained:.2f}"
        shown = Table(title=f"{describe_estimator(self.estimator.to_json())}{learned}", title_justify="left")
        shown.add_column("noise point")
        for heading in ("elements", "scale", "sigma", "nonlinearity", "variance", "of a forward", "trust"):
            shown.add_column(heading, justify="right")
        for site in self.sites:
            shown.add_row(
                site.site,
                f"{site.elements:,}",
                f"{site.scale:.3g}",
                f"{site.sigma:.3g}",
                "–" if site.nonlinearity is None else f"{site.nonlinearity:.2f}",
                f"{site.variance:.2g}",
                f"{100 * site.share:.0f} %",
                "–" if site.trust is None else f"{site.trust:.2f}",
            )
        return shown


def calibrate(executor: SerialExecutor, given: StepInput, budget: float) -> Calibration:
    """Settings for `executor`'s program from one batch; `budget` in perturbed forwards a sample and step.

    Raises:
        CalibrationError: the budget is smaller than one pair (or copy) in every run.
    """
    compiled = executor.compiled
    _check_budget(compiled, budget)
    measured, spent = measure(executor, given)
    trust: dict[int, float] = {}
    explained: float | None = None
    sigmas = {i: one.sigma if math.isfinite(one.sigma) else executor.sigmas[i] for i, one in measured.items()}
    if given.feedback is not None and measured:
        learned = _learned(executor, given, sigmas)
        explained, trust = learned.explained_mean, {index: learned.trust(index) for index in sigmas}
        probed = executor.num_probed(given.samples) / given.samples
        spent += LEARNING_STEPS * probed * sum(run.copies * run.share for run in compiled.runs)
    names = {site.index: site.name for site in compiled.sites}
    rows = tuple(
        SiteCalibration(
            names[index],
            compiled.sites[index].noise_layout.elements,
            measured[index].scale,
            sigmas[index],
            _or_none(measured[index].nonlinearity),
            measured[index].variance,
            run.share,
            trust.get(index),
        )
        for run in compiled.runs
        for index in run.sites
    )
    estimator = compiled.estimator
    if rows:
        by_name = {names[index]: sigma for index, sigma in sigmas.items()}
        rest = {"*": UNMEASURED} if len(by_name) < len(names) else {}
        estimator = replace(estimator, sigma={**by_name, **rest}, copies=_copies(compiled, measured, budget))
    return Calibration(estimator, rows, explained, spent)


def _or_none(number: float) -> float | None:
    """NaN, of a site that the loss does not respond to, as None."""
    return number if math.isfinite(number) else None


def _check_budget(compiled: CompiledModel, budget: float) -> None:
    least = compiled.estimator.step * sum(run.share for run in compiled.runs)
    if not (math.isfinite(budget) and budget >= least * (1 - 1e-9)):
        raise CalibrationError(
            f"a budget of {budget:g} perturbed forwards a sample and step is too small: one "
            f"{'pair' if compiled.estimator.antithetic else 'copy'} in each of {len(compiled.runs)} run(s) takes "
            f'{least:.2f}. Raise it, or perturb jointly (groups="joint").'
        )


def _learned(executor: SerialExecutor, given: StepInput, sigmas: dict[int, float]) -> FeedbackState:
    """What feedback has learned after `LEARNING_STEPS` on this batch with these σ."""
    before = list(executor.sigmas)
    environment = dict(given.environment)
    environment["runtime:sigmas"] = environment["runtime:sigmas"].clone()
    state = given.feedback
    try:
        for index, sigma in sigmas.items():
            executor.sigmas[index] = sigma
            environment["runtime:sigmas"][index] = sigma
        for number in range(LEARNING_STEPS):
            key = environment["runtime:key"].clone()
            key[1] = _KEY + number
            step = replace(given, environment={**environment, "runtime:key": key}, feedback=state, perturbed=True)
            state = executor.run(step).feedback
    finally:
        executor.sigmas[:] = before
    assert state is not None
    return state


def _copies(compiled: CompiledModel, measured: dict[int, Linearity], budget: float) -> int | dict[str, int]:
    """Copies a group under the budget: as many as it buys, or in proportion to ``sqrt(V / c)``."""
    step = compiled.estimator.step
    if len(compiled.runs) == 1:
        return max(step, int(budget / max(compiled.runs[0].share, LEAST_COST)) // step * step)
    costs = [max(run.share, LEAST_COST) for run in compiled.runs]
    weights = []
    for run, cost in zip(compiled.runs, costs, strict=True):
        variance = sum(site.noise_layout.elements * measured[site.index].variance for site in _members(compiled, run))
        weights.append(math.sqrt(variance / cost) if math.isfinite(variance) else 0.0)
    counts = _in_proportion(weights, costs, budget, step)
    pairs = zip(compiled.runs, counts, strict=True)
    return {site.name: count for run, count in pairs for site in _members(compiled, run)}


def _in_proportion(weights: Sequence[float], costs: Sequence[float], budget: float, step: int) -> list[int]:
    """Counts in proportion to `weights`, each a multiple of `step` and at least one, that cost at most `budget`."""
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
    return [int(factor * weight) // step * step if n in free else step for n, weight in enumerate(weights)]


def _members(compiled: CompiledModel, run: PerturbedRun) -> list[Site]:
    return [compiled.sites[index] for index in run.sites]
