"""Calibration: measure a compiled program on a batch, and choose its settings from what came out (method.md 7, 12).

σ of every noise point is the largest at which the loss responds linearly (`linearity`). Everything else is judged by
the gradients themselves: V is the variance of a site's gradient from one pair (`gradient_noise`), c what a copy costs.
The rest is chosen in `plain` and `with_feedback`.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from ...compiler.estimator import LikelihoodRatio
from ...passes.errors import unknown_name
from ..executor import SerialExecutor, StepInput
from .plain import choose_plain
from .record import Calibration
from .task import CalibrationTask, check_budget
from .with_feedback import choose_with_feedback

CHOICES = ("sigma", "placement", "noise_on", "groups", "copies", "correction")
"""Settings that a calibration can choose."""


def calibrate(
    executor: SerialExecutor,
    given: StepInput,
    budget: float,
    choose: Collection[str] | None = None,
    batch_size: int | None = None,
) -> Calibration:
    """Settings for `executor`'s program from one batch; `budget` in perturbed forwards a sample and step.

    Args:
        choose: names of `CHOICES`; None: all but those that the estimator sets site by site, and no correction where
            not every step has copies of every sample. The rest is held.
        batch_size: samples of a training step, if not those of `given`: noise is less in larger batches, bias is not.

    Raises:
        CalibrationError: the budget is smaller than one pair (or copy) in every run.
        UnknownNameError: `choose` has a name that is no choice.
    """
    compiled = executor.compiled
    chosen = frozenset(_not_held(compiled.estimator) if choose is None else choose)
    for name in sorted(chosen - set(CHOICES)):
        raise unknown_name("choice of a calibration", name, CHOICES)
    task = CalibrationTask(compiled, given, budget, chosen)
    if not (math.isfinite(budget) and budget > 0):
        check_budget(task, compiled)
    if not compiled.runs:
        return Calibration(compiled.estimator, (), None, 0.0)
    if compiled.estimator.feedback == "none":
        return choose_plain(task, list(executor.sigmas))
    return choose_with_feedback(task, list(executor.sigmas), batch_size or given.samples)


def _not_held(estimator: LikelihoodRatio) -> list[str]:
    """The choices that the estimator does not already make site by site; no correction where steps may do without
    copies (``probe_every``, ``probe``): it would need them every step."""
    settings = {name: getattr(estimator, name) for name in CHOICES}
    held = {name for name, value in settings.items() if not isinstance(value, (str, int, float))}
    if (estimator.probe, estimator.probe_every) != (1.0, 1):
        held.add("correction")
    return [name for name in CHOICES if name not in held]


__all__ = ["CHOICES", "calibrate"]
