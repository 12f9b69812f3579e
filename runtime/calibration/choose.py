"""Calibration: measure a compiled program on a batch, and choose its settings from what came out (method.md 7, 12).

σ of every noise point is the largest at which the loss responds linearly (`linearity`). Everything else is judged by
the gradients themselves: V is the variance of a site's gradient from one pair (`gradient_noise`), c what a copy costs.
The rest is chosen in `plain` and `with_feedback`.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from ...compiler.estimator import LikelihoodRatio
from ...passes.errors import OptionError, unknown_name
from ..execution.executor import SerialExecutor
from ..execution.step import StepInput
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
        OptionError: `choose` names what this program leaves no choice of; `batch_size` is no number of samples.
    """
    compiled = executor.compiled
    if batch_size is not None and not (type(batch_size) is int and batch_size >= 1):
        raise OptionError(f"batch_size={batch_size!r}: the samples of a training step are a number from 1 on.")
    named = [choose] if isinstance(choose, str) else choose
    chosen = frozenset(_not_held(compiled.estimator) if named is None else named)
    for name in sorted(chosen - set(CHOICES)):
        raise unknown_name("choice of a calibration", name, CHOICES)
    if choose is not None:
        _check_possible(compiled.estimator, chosen)
    task = CalibrationTask(compiled, given, budget, chosen)
    if not (math.isfinite(budget) and budget > 0):
        check_budget(task, compiled)
    if not compiled.runs:
        return Calibration(compiled.estimator, (), None, 0.0)
    if compiled.estimator.feedback == "none":
        return choose_plain(task, list(executor.sigmas))
    return choose_with_feedback(task, list(executor.sigmas), given.samples if batch_size is None else batch_size)


def _not_held(estimator: LikelihoodRatio) -> list[str]:
    """The choices that the estimator does not already make site by site; no correction where steps may do without
    copies (``probe_every``, ``probe``): it would need them every step."""
    settings = {name: getattr(estimator, name) for name in CHOICES}
    held = {name for name, value in settings.items() if not isinstance(value, (str, int, float))}
    if (estimator.probe, estimator.probe_every) != (1.0, 1):
        held.add("correction")
    return [name for name in CHOICES if name not in held]


def _check_possible(estimator: LikelihoodRatio, chosen: frozenset[str]) -> None:
    """Raise OptionError if there is no choice of any of the `chosen` settings."""
    plain = estimator.feedback == "none"
    exact = (estimator.placement, estimator.capture) == ("operation", "exact")
    needs = {
        "placement": ('feedback="none", and placement="operation" and capture="exact" to begin with', plain and exact),
        "noise_on": ('feedback="none", and noise_on="output" to begin with', plain and estimator.noise_on == "output"),
        "groups": ('feedback="none", and "copies" beside it', plain and "copies" in chosen),
        "correction": ('feedback="learned"', not plain),
    }
    missing = {name: needed for name, (needed, holds) in needs.items() if name in chosen and not holds}
    if missing and missing.keys() == chosen:
        listed = "; ".join(f"{name!r} needs {needed}" for name, needed in missing.items())
        raise OptionError(f"this program leaves a calibration nothing to choose: {listed}.")


__all__ = ["CHOICES", "calibrate"]
