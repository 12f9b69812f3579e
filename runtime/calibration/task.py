"""What every choice of a calibration starts from: the batch, the budget, and what may be chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ...compiler.driver import recompile
from ...compiler.estimator import LikelihoodRatio
from ...compiler.program import CompiledModel
from ...passes.errors import CalibrationError
from ..execution.executor import SerialExecutor
from ..execution.step import StepInput
from ..linearity import Linearity, measure
from .record import SiteCalibration


@dataclass(frozen=True)
class CalibrationTask:
    """What is calibrated, and what may be chosen."""

    base: CompiledModel
    given: StepInput
    budget: float
    choose: frozenset[str]

    def compiled(self, estimator: LikelihoodRatio) -> CompiledModel:
        """The model for another estimator."""
        same = estimator == self.base.estimator
        return self.base if same else recompile(self.base, estimator, self.given.environment)

    def bound(self, sigmas: list[float]) -> StepInput:
        """The batch for a run with these σ, which may write into its environment."""
        like = self.given.environment["runtime:sigmas"]
        given = torch.tensor(sigmas, dtype=like.dtype, device=like.device)
        return replace(self.given, environment={**self.given.environment, "runtime:sigmas": given}, perturbed=True)

    def linearity(
        self, compiled: CompiledModel, sigmas: list[float]
    ) -> tuple[dict[int, Linearity], list[float], float]:
        """`measure` of a program; its σ, that of `sigmas` where one is held or the loss does not respond; and the
        perturbed forwards a sample that it took."""
        linear, spent = measure(SerialExecutor(compiled, sigmas), self.bound(sigmas))
        sets = "sigma" in self.choose or compiled.estimator.sigma == "auto"
        told = {index: one.sigma for index, one in linear.items() if sets and math.isfinite(one.sigma)}
        return linear, [told.get(index, sigma) for index, sigma in enumerate(sigmas)], spent


def row_of(compiled: CompiledModel, index: int, linear: Linearity | None, sigma: float) -> SiteCalibration:
    """What is known of a site's noise; `linear` is None where it receives none."""
    site = compiled.sites[index]
    if linear is None:
        return SiteCalibration(site.name, None, None, None, None, None, None, None, None)
    run = next(run for run in compiled.runs if index in run.sites)
    nonlinearity = linear.nonlinearity if math.isfinite(linear.nonlinearity) else None
    elements = site.noise_layout.elements
    measured = (linear.scale, sigma, nonlinearity, linear.variance, run.share)
    return SiteCalibration(site.name, elements, *measured, None, None, group=run.index)


def check_budget(task: CalibrationTask, compiled: CompiledModel) -> None:
    """Of one pair (or copy) in every run, or of the copies that are held.

    Raises:
        CalibrationError: it does not pay for them.
    """
    estimator, budget = compiled.estimator, task.budget
    held = "copies" not in task.choose
    least = compiled.forwards if held else estimator.step * sum(run.share for run in compiled.runs)
    if not (math.isfinite(budget) and budget >= least * (1 - 1e-9)):
        joint = "" if len(compiled.runs) == 1 else ', or perturb jointly (groups="joint")'
        what = "the copies given" if held else f"one {'pair' if estimator.antithetic else 'copy'}"
        take = "take" if held else "takes"
        raise CalibrationError(
            f"a budget of {budget:g} perturbed forwards a sample and step is too small: {what} in each of "
            f"{len(compiled.runs)} run(s) {take} {least:.2f}. Raise it{joint}."
        )


__all__ = ["CalibrationTask", "check_budget", "row_of"]
