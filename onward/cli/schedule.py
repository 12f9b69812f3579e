"""``onward inspect --schedule``: a step's tasks, what they take, and how short more workers could make it."""

from __future__ import annotations

from ..compiler.columns import table, wrapped
from ..compiler.program import CompiledModel
from ..passes.errors import OptionError
from ..runtime.schedule.picture import show_seconds, to_picture
from ..runtime.schedule.pipeline import RULES
from ..runtime.schedule.report import RECORDED, ScheduleReport, StepReport, WorkersReport, examine_schedule, median_step
from ..runtime.schedule.timeline import to_chrome
from .common import Setup, to_json

FORMATS = ("text", "svg", "json", "chrome")
"""Of `render_schedule`."""

WORKERS = 2
"""How many share a step, unless ``--workers`` says so."""


def check_schedule(schedule: bool, workers: int | None, format_: str, pass_: str | None, calibrates: bool) -> None:
    """Raise OptionError for what cannot be had together."""
    if not schedule:
        if workers is not None:
            raise OptionError(f"--workers {workers} is of --schedule; inspect alone runs nothing.")
        if format_ == "chrome":
            raise OptionError("--format chrome is a trace of a step; it needs --schedule.")
        return
    if pass_ is not None or calibrates:
        other = "--calibrate" if calibrates else f"--pass {pass_}"
        raise OptionError(f"--schedule shows the tasks of a step; {other} is another question. Ask one at a time.")
    if format_ not in FORMATS:
        raise OptionError(f"--format {format_} is of graphs; with --schedule it is one of {', '.join(FORMATS)}.")
    if workers is not None and workers < 1:
        raise OptionError(f"--workers {workers}: at least one worker is needed.")


def record_schedule(setup: Setup, compiled: CompiledModel, workers: int | None, seed: int) -> ScheduleReport:
    """Record and schedule steps on a batch of the training data, of the size that the model is trained with."""
    inputs, target = setup.dataset.batch(setup.recipe.training.batch_size)
    chosen = WORKERS if workers is None else workers
    return examine_schedule(setup.model, compiled, setup.dataset.loss, inputs, target, workers=chosen, seed=seed)


def render_schedule(report: ScheduleReport, name: str, format_: str) -> str:
    """The schedule of the model called `name`, in a format of `FORMATS`."""
    if format_ == "json":
        return to_json({"model": name, **report.to_json()})
    if format_ == "text":
        return schedule_text(report, name)
    several = len(report.steps) > 1
    series = {
        (f"{_kind(step)}, {how}" if several else how): timelines
        for step in report.steps
        for how, timelines in step.timelines.items()
    }
    if format_ == "chrome":
        return to_chrome(series)
    return to_picture(
        {how: median_step(timelines) for how, timelines in series.items()},
        f"{name}: a step of {report.samples} samples",
    )


def schedule_text(report: ScheduleReport, name: str) -> str:
    """The schedule at `columns.WIDTH` columns."""
    threads = f"{report.threads} thread{'s' if report.threads > 1 else ''} an operation"
    parts = [f"{name}\n  a step of {report.samples} samples, median of {RECORDED}, {threads}"]
    for step in report.steps:
        heading = f"Step {_kind(step)}" if len(report.steps) > 1 else "Step"
        parts += [f"{heading}\n{_task_table(step)}", f"{_summary(step)}\n\n{_workers_table(step.workers)}"]
        parts.append(f"  with Adam's updates, a step of many\n{_pipeline_table(step.workers)}")
    parts.append(wrapped(_LEGEND, "  "))
    return "\n\n".join(parts) + "\n"


_LEGEND = (
    "waits for = what has to be done before (and what that waits for); modelled = guessed from FLOPs, bytes and "
    "operations; critical = on the longest chain of tasks that wait for each other; lower bound = that chain, or an "
    "equal share of all tasks, whichever is longer; simulated = list scheduling of the measured times, as if workers "
    "never got in each other's way (Python's lock, memory); recorded = run, the whole step; efficiency = all tasks on "
    "one worker over the time of all workers. There are as many perturbed runs in memory as workers. On cuda times are "
    "those of starting operations. barrier = the next step begins when all weights are updated, as in the trainer "
    "with one worker; chase = its forward follows the updates, which begin when all gradients are there and finite, as "
    "in the trainer with several; at once = an update begins with its own gradients, and a step that fails leaves some "
    "weights changed. All three are simulated"
)


def _kind(step: StepReport) -> str:
    return "with a perturbed run" if step.perturbed else "without a perturbed run"


def _task_table(step: StepReport) -> str:
    rows = [
        (
            task.name,
            task.does,
            " ".join(task.waits_for) or "–",
            show_seconds(task.measured),
            show_seconds(task.modelled),
            "●" if task.critical else "",
        )
        for task in step.tasks
    ]
    columns = ["task", "does", "waits for", "measured", "modelled", "critical"]
    return table(columns, rows, "lllrrl", wrap=columns[1:3])


def _summary(step: StepReport) -> str:
    share = f"{100 * step.critical_seconds / step.total:.0f} %"
    path = f"critical path {show_seconds(step.critical_seconds)} ({share}): {' → '.join(step.critical_path)}"
    return f"  {len(step.tasks)} tasks, {show_seconds(step.total)} in all\n{wrapped(path, '  ')}"


def _workers_table(workers: tuple[WorkersReport, ...]) -> str:
    rows = [
        (
            str(one.workers),
            show_seconds(one.lower_bound),
            show_seconds(one.simulated),
            f"{100 * one.simulated_efficiency:.0f} %",
            "–" if one.recorded is None else show_seconds(one.recorded),
            "–" if one.recorded_efficiency is None else f"{100 * one.recorded_efficiency:.0f} %",
        )
        for one in workers
    ]
    columns = ["workers", "lower bound", "simulated", "efficiency", "recorded", "efficiency"]
    return table(columns, rows, "rrrrrr")


def _pipeline_table(workers: tuple[WorkersReport, ...]) -> str:
    rows = [
        (
            str(one.workers),
            *(show_seconds(seconds) for seconds in one.pipelined.values()),
            *(f"{one.pipelined['barrier'] / one.pipelined[rule]:.2f} ×" for rule in RULES[1:]),
        )
        for one in workers
    ]
    return table(["workers", *RULES, *(f"barrier ÷ {rule}" for rule in RULES[1:])], rows, "rrrrrr")
