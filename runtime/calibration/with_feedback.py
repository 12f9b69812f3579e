"""What a calibration chooses with learned feedback: σ, copies, and where the prediction is corrected (method.md 7, 12).

Feedback is first learned on the batch, with the weights at rest; then it predicts a gradient h without noise. What h is
off the mean of unbiased estimates is its bias. A site's correction is worth its noise where that, averaged over the
steps that an optimizer averages, is smaller than the bias. The budget goes to the copies of the one joint run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...compiler.estimator import LikelihoodRatio
from ...compiler.program import CompiledModel
from ...compiler.site_options import UNMEASURED, resolve_corrections
from ..execution.executor import SerialExecutor
from ..execution.step import StepInput
from ..feedback import FeedbackState
from .allocation import allocate
from .gradient_noise import KEY, repeated_gradients, squared_bias, variance
from .record import Calibration
from .task import CalibrationTask, check_budget, row_of

LEARNING_STEPS = 40
"""Steps in which feedback is learned on the batch, before what it explains is read."""

BIAS_REPETITIONS = 24
"""Steps behind a bias, whose own noise is V over their number."""

AVERAGED_STEPS = 10
"""Steps over which an optimizer averages (Adam's β₁ = 0.9): noise averages out over them, bias does not."""

MARGIN = 2.0
"""Standard errors by which a bias has to exceed the noise of its correction."""


def choose_with_feedback(task: CalibrationTask, sigmas: list[float], batch_size: int) -> Calibration:
    """Settings for a program with learned feedback; CalibrationError if the budget is too small.

    Args:
        task: what is calibrated.
        sigmas: the program's σ.
        batch_size: samples of a training step, over which the noise of a correction is averaged.
    """
    compiled, estimator = task.base, task.base.estimator
    (run,) = compiled.runs
    check_budget(task, compiled)
    linear, chosen, spent = task.linearity(compiled, sigmas)
    learned = _learned(compiled, task.bound(chosen), chosen)
    probed = estimator.num_probed(task.given.samples) / task.given.samples
    spent += LEARNING_STEPS * probed * compiled.forwards
    copies = run.copies
    if "copies" in task.choose:
        (copies,) = allocate([1.0], [run.share], task.budget, estimator.step)
        estimator = replace(estimator, copies=copies)
    if "sigma" in task.choose:
        rest = {"*": UNMEASURED} if len(linear) < len(compiled.sites) else {}
        estimator = replace(estimator, sigma={compiled.sites[i].name: chosen[i] for i in run.sites} | rest)
    rows = {index: row_of(compiled, index, linear[index], chosen[index]) for index in run.sites}
    rows = {index: replace(row, trust=learned.trust(index)) for index, row in rows.items()}
    corrections = resolve_corrections(estimator.correction, compiled.sites)
    if "correction" in task.choose:
        judged, more = _judged(task, learned, chosen)
        spent += more
        kept = (task.given.samples / batch_size) / (estimator.draws(copies) * AVERAGED_STEPS)
        for index, (noise, bias, error) in judged.items():
            corrections[index] = "full" if noise * kept < bias - MARGIN * error else "none"
            row = rows.get(index) or row_of(compiled, index, None, 0.0)
            rows[index] = replace(row, variance=noise, bias=bias, bias_error=error, correction=corrections[index])
        estimator = _corrected(estimator, {compiled.sites[index].name: corrections[index] for index in judged})
    rows = {index: replace(row, correction=corrections[index]) for index, row in rows.items()}
    return Calibration(estimator, tuple(rows[index] for index in sorted(rows)), learned.explained_mean, spent)


def _learned(compiled: CompiledModel, given: StepInput, sigmas: list[float]) -> FeedbackState:
    """What feedback has learned after `LEARNING_STEPS` on this batch with these σ."""
    executor, state = SerialExecutor(compiled, sigmas), given.feedback
    for number in range(LEARNING_STEPS):
        key = given.environment["runtime:key"].clone()
        key[1] = KEY + number
        step = replace(given, environment={**given.environment, "runtime:key": key}, feedback=state)
        state = executor.run(step).feedback
    assert state is not None
    return state


def _judged(
    task: CalibrationTask, learned: FeedbackState, sigmas: list[float]
) -> tuple[dict[int, tuple[float, float, float]], float]:
    """Of every site whose gradient is predicted the variance of the corrected gradient from one pair, and the squared
    bias of the prediction with its standard error; and the perturbed forwards a sample that it took."""
    estimator = task.base.estimator
    given = replace(task.bound(sigmas), feedback=learned)
    predicts = task.compiled(replace(estimator, correction="none"))
    corrects = task.compiled(replace(estimator, correction="full", probe=1.0, probe_every=1, copies=estimator.step))
    predicted = repeated_gradients(predicts, sigmas, replace(given, perturbed=False), 1)
    repeated = repeated_gradients(corrects, sigmas, given, BIAS_REPETITIONS)
    sites = [gradient.site.index for gradient in corrects.gradients if gradient.source == "corrected"]
    judged = {index: (variance(repeated[index]), *squared_bias(repeated[index], predicted[index])) for index in sites}
    return judged, BIAS_REPETITIONS * corrects.forwards


def _corrected(estimator: LikelihoodRatio, corrections: Mapping[str, str]) -> LikelihoodRatio:
    """With these corrections of the sites that have any; copies of every sample, every step, if there is one."""
    full = [name for name, correction in corrections.items() if correction == "full"]
    if not full:
        return replace(estimator, correction="none")
    every = len(full) == len(corrections)
    setting = "full" if every else {**dict.fromkeys(full, "full"), "*": "none"}
    return replace(estimator, correction=setting, probe=1.0, probe_every=1)


__all__ = ["choose_with_feedback"]
