"""``onward fidelity``: how gradients agree with the exact ones, over any settings."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn
from typer import Argument, Option

from ..api import compile as compile_program
from ..compiler.estimator import LikelihoodRatio
from ..compiler.files import check_writable, write_whole
from ..compiler.report_text import describe_estimator
from ..evidence import fidelity_report
from ..evidence.baselines.backpropagation import Backpropagation
from ..evidence.fidelity import Fidelity, check_replicates, learn, measure
from ..evidence.plots import require_matplotlib, to_svg
from ..evidence.provenance import describe, machine
from ..evidence.sweep import Axis, Measured, Scaling, Settings, combinations, parse_axis, scaling, sweep
from ..models import build_for, loaders
from ..models.registry import find_factory
from ..passes.errors import OptionError, UnknownNameError
from ..runtime.calibration.record import Calibration
from ..runtime.training.metrics import jsonable
from ..runtime.training.trainer import Trainer
from .common import Setup, find_device, make_estimator, parse_options, set_up, settings_of, to_json
from .options import MODEL_HELP, Common, with_common
from .train import Training, make_optimizer

_MEASURING = "Measuring"
_OUTPUT = "Output"

ESTIMATOR_OPTIONS = {field.name for field in dataclasses.fields(LikelihoodRatio)} & {
    field.name for field in dataclasses.fields(Common)
}
"""What can be swept of the estimator; a value is written as for the option of that name."""


@dataclass(frozen=True)
class Case:
    """A combination of swept settings, as the options that say the same."""

    settings: Settings
    common: Common
    estimator: LikelihoodRatio | Calibration | None
    """None if the options cannot be had together."""
    refusal: str = ""


@dataclass(frozen=True)
class Measuring:
    """How each combination is measured."""

    batch_size: int
    replicates: int
    learn: int
    after: int


@with_common
def fidelity(
    common: Common,
    model: Annotated[str, Argument(metavar="MODEL", help=MODEL_HELP)],
    sweeps: Annotated[
        list[str] | None,
        Option(
            "--sweep",
            metavar="NAME=V1,V2",
            help="Values that a setting takes in turn: an option of the estimator (copies=4,16,64) or an argument of "
            "the model's factory (depth=3,6,9,12); repeated: every combination.",
            rich_help_panel=_MEASURING,
        ),
    ] = None,
    replicates: Annotated[
        int,
        Option(help="Repetitions of the step, with fresh noise.", rich_help_panel=_MEASURING),
    ] = 64,
    learn_steps: Annotated[
        int,
        Option(
            "--learn",
            metavar="STEPS",
            help="Steps in which learned feedback learns before it is measured, the weights at rest; without feedback "
            "there are none.",
            rich_help_panel=_MEASURING,
        ),
    ] = 200,
    after: Annotated[
        int,
        Option(
            metavar="EPOCHS",
            help="Measure after so many epochs of training by backpropagation; 0: at the first weights.",
            rich_help_panel=_MEASURING,
        ),
    ] = 0,
    batch_size: Annotated[
        int | None,
        Option(help="Samples of the batch. [dim]\\[default: of the model][/dim]", rich_help_panel=_MEASURING),
    ] = None,
    per_site: Annotated[
        bool, Option("--per-site", help="Also print the numbers of every site.", rich_help_panel=_OUTPUT)
    ] = False,
    json_file: Annotated[
        Path | None,
        Option("--json", metavar="FILE", help="Write settings, machine and all numbers.", rich_help_panel=_OUTPUT),
    ] = None,
    plot: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Draw the numbers over what is swept, or over the sites, as SVG; needs pip install 'onward\\[plots]'.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    quiet: Annotated[
        bool, Option("--quiet", "-q", help="Print the final tables only.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Measure how gradients agree with the exact ones, which autograd computes here and nowhere else.

    A step on one batch is repeated with fresh noise at fixed weights. Printed are the cosine of one step's gradient to
    the exact one, and relative to that one's length: the error of one step, the bias (what no repetition averages away)
    and the standard deviation, each with a 95 % interval. Of learned feedback all is measured after it has learned.

    A combination that cannot be had is listed with the reason. With copies swept, the slopes of deviation and error
    are printed too: -1/2 is that of independent draws, and a bias shows as a floor. Ctrl-C ends the sweep and prints
    what there is.

    What an estimator's error costs in the end, in accuracy and time, is a question for training runs: see
    `onward compare`.

    [bold]Examples[/bold]

      onward fidelity mlp

      onward fidelity mlp --model-option depth=1 --data linear --sweep capture=exact,sign --sweep copies=8,32,128,512

      onward fidelity mlp --groups layerwise --copies 32 --sweep depth=3,6,9,12 --plot depth.svg

      onward fidelity resnet5 --after 5 --reach 0 --segments op --per-site
    """
    if after < 0 or learn_steps < 0:
        raise OptionError(f"--after {after} and --learn {learn_steps} count epochs and steps: from 0 on.")
    check_replicates(replicates)
    for file in (json_file, plot):
        if file is not None:
            check_writable(file)
    if plot is not None:
        require_matplotlib()
    setup = set_up(model, common, batch_size)
    axes = [parse_axis(text, ESTIMATOR_OPTIONS | _factory_options(model)) for text in sweeps or []]
    cases = make_cases(common, axes)
    measuring = Measuring(len(setup.example), replicates, learn_steps, after)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if not quiet:
        _announce(console, model, common, setup, measuring, axes)
    found, interrupted = run(model, common, setup, cases, measuring, progress=not quiet)
    slopes = scaling(found)
    provenance = machine(find_device(common.device))
    if json_file is not None:
        result = _result(model, common, sweeps or [], cases, measuring, interrupted) | {"machine": provenance}
        result |= fidelity_report.to_json(found, slopes)
        for measured, case in zip(result["measured"], cases, strict=False):
            measured["estimator"] = None if case.estimator is None else settings_of(case.estimator).to_json()
        write_whole(json_file, to_json(jsonable(result)))
    if plot is not None and any(one.fidelity is not None for one in found):
        caption = f"{model} on {common.data}, {_about(measuring)}, seed {common.seed}. {describe(provenance)}"
        write_whole(plot, to_svg(fidelity_report.panels(found, axes), caption))
    _print(console, found, axes, slopes, per_site)
    if interrupted:
        Console(stderr=True).print("interrupted before all combinations were measured.", style="yellow")
        raise typer.Exit(130)


def make_cases(common: Common, axes: Sequence[Axis]) -> list[Case]:
    """Every combination of the swept settings, in place of those options on the command line.

    Where one combination asks for what learned feedback does not have, all that leave `feedback` open are without it:
    else they would differ in more than what is swept.

    Raises:
        OptionError: a value cannot be read, or no combination can be had.
        UnknownNameError: a value is a name that is not known.
    """
    cases = [(settings, _with(common, settings)) for settings in combinations(axes)]
    estimators = [_try_estimator(each) for _, each in cases]
    plain = [settings_of(made).feedback == "none" for made, _ in estimators if made is not None]
    if common.feedback is None and common.calibration is None and any(plain) and not all(plain):
        cases = [
            (settings, each if "feedback" in settings else replace(each, feedback="none")) for settings, each in cases
        ]
        estimators = [_try_estimator(each) for _, each in cases]
    made = [
        Case(settings, each, estimator, refusal)
        for (settings, each), (estimator, refusal) in zip(cases, estimators, strict=True)
    ]
    if all(case.estimator is None for case in made):
        raise OptionError(made[0].refusal)
    return made


def run(
    model: str, common: Common, setup: Setup, cases: Sequence[Case], measuring: Measuring, *, progress: bool
) -> tuple[list[Measured], bool]:
    """Measure the cases; whether it was interrupted. A mistake in the only case is an error, not a result."""
    by_settings = {tuple(case.settings.items()): case for case in cases}
    models: dict[tuple[str, ...], nn.Module] = {}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not (progress and sys.stderr.isatty()),
    )

    def one(settings: Settings) -> Fidelity:
        case = by_settings[tuple(settings.items())]
        if case.estimator is None:
            raise OptionError(case.refusal)
        options = tuple(case.common.model_option or [])
        if options not in models:
            models[options] = _prepared(model, common, setup, options, measuring)
        return _measure(models[options], case, setup, measuring, bar)

    found: list[Measured] = []
    with bar:
        try:
            if len(cases) == 1:
                found.append(Measured(cases[0].settings, one(cases[0].settings)))
                return found, False
            for measured in sweep([case.settings for case in cases], one):
                found.append(measured)
        except KeyboardInterrupt:
            return found, True
    if all(one.fidelity is None for one in found):
        raise OptionError(f"no combination could be measured. {fidelity_report.label(cases[0].settings)}: "
                          f"{found[0].refusal}")  # fmt: skip
    return found, False


def _prepared(name: str, common: Common, setup: Setup, options: tuple[str, ...], measuring: Measuring) -> nn.Module:
    """The model with these options, from the seed, trained by backpropagation if that is asked for."""
    torch.manual_seed(common.seed)
    built = build_for(name, setup.dataset, **parse_options(list(options))).to(setup.example.device)
    if measuring.after:
        recipe = setup.recipe
        training = Training(measuring.after, recipe.batch_size, recipe.lr, recipe.optimizer)
        judge = Backpropagation(built, F.cross_entropy, common.seed)
        trainer = Trainer(judge, make_optimizer(built, training), progress=False)
        trainer.fit(loaders(setup.dataset, recipe.batch_size, common.seed)[0], measuring.after)
    return built


def _measure(model: nn.Module, case: Case, setup: Setup, measuring: Measuring, bar: Progress) -> Fidelity:
    title = fidelity_report.label(case.settings) or "measuring"
    program = compile_program(
        model, setup.example, loss=F.cross_entropy, estimator=case.estimator, seed=case.common.seed
    )
    task = bar.add_task(title, total=None)

    def advance() -> None:
        bar.advance(task)

    bar.update(task, description=f"{title}: learning", total=measuring.learn)
    learn(program, loaders(setup.dataset, measuring.batch_size, case.common.seed)[0], measuring.learn, each=advance)
    bar.reset(task, description=title, total=measuring.replicates)
    inputs, target = (tensor[: measuring.batch_size] for tensor in setup.dataset.train.tensors)
    try:
        return measure(program, inputs, target, replicates=measuring.replicates, each=advance)
    finally:
        bar.remove_task(task)


def _factory_options(model: str) -> set[str]:
    try:
        return set(inspect.signature(find_factory(model)).parameters)
    except ValueError:  # a callable written in C need not have a signature
        return set()


def _with(common: Common, settings: Settings) -> Common:
    """`common` with what is swept: the options of the estimator by name, all else for the model's factory."""
    options = {name: _read(name, text) for name, text in settings.items() if name in ESTIMATOR_OPTIONS}
    pairs = [f"{name}={text}" for name, text in settings.items() if name not in ESTIMATOR_OPTIONS]
    return replace(common, model_option=[*(common.model_option or []), *pairs], **options)


def _read(name: str, text: str) -> Any:
    """A value of the option `name`, as the command line would read it."""
    kinds = get_args(_TYPES[name]) or (_TYPES[name],)
    if list[str] in kinds:
        return [text]
    for kind, (expected, convert) in _READERS.items():
        if kind in kinds:
            try:
                return convert(text)
            except (KeyError, ValueError):
                raise OptionError(f"sweep {name}={text}: expected {expected}.") from None
    return text


_TYPES: Mapping[str, Any] = get_type_hints(Common)

_READERS: Mapping[type, tuple[str, Callable[[str], Any]]] = {
    bool: ("true or false", lambda text: {"true": True, "false": False}[text.lower()]),
    int: ("a whole number", int),
    float: ("a number", float),
}


def _try_estimator(common: Common) -> tuple[LikelihoodRatio | Calibration | None, str]:
    """The estimator, or why there is none. A name that is not known is a mistake, whatever it is combined with."""
    try:
        return make_estimator(common), ""
    except UnknownNameError:
        raise
    except OptionError as error:
        return None, str(error)


# --- what is shown ----------------------------------------------------------------------------------------------------


def _about(measuring: Measuring) -> str:
    where = f"after {measuring.after} epochs of backpropagation" if measuring.after else "at the first weights"
    return f"a batch of {measuring.batch_size}, {measuring.replicates} replicates, {where}"


def _announce(
    console: Console, model: str, common: Common, setup: Setup, measuring: Measuring, axes: Sequence[Axis]
) -> None:
    console.print(f"[bold]{model}[/bold] on [bold]{common.data}[/bold]: {_about(measuring)}, seed {common.seed}")
    if not axes:
        console.print(describe_estimator(settings_of(setup.estimator).to_json()))


def _result(
    model: str, common: Common, sweeps: Sequence[str], cases: Sequence[Case], measuring: Measuring, interrupted: bool
) -> dict[str, Any]:
    return {
        "model": model,
        "data": common.data,
        "seed": common.seed,
        "settings": {
            **dataclasses.asdict(measuring),
            "model_options": common.model_option or [],
            "sweep": list(sweeps),
            "combinations": len(cases),
            "device": common.device,
        },
        "interrupted": interrupted,
    }


def _print(
    console: Console, found: Sequence[Measured], axes: Sequence[Axis], slopes: Sequence[Scaling], per_site: bool
) -> None:
    measured = [one for one in found if one.fidelity is not None]
    tables = [
        *([_table(measured, axes)] if measured else []),
        *([_site_table(measured, axes)] if measured and per_site else []),
        *([_scaling_table(slopes, [axis for axis in axes if axis.name != "copies"])] if slopes else []),
    ]
    for table in tables:
        console.print(table)
        console.print()
    for one in found:
        if one.fidelity is None:
            console.print(f"{fidelity_report.label(one.settings)}: not measured. {one.refusal}", markup=False)
    fidelities = [one.fidelity for one in measured if one.fidelity is not None]
    if fidelities:
        console.print(_LEGEND.format(fidelities[0].dtype), style="dim", markup=False)
    if any(not one.varies for one in fidelities):
        console.print(_NO_VARIANCE, style="dim", markup=False)


_LEGEND = (
    "In brackets 95 % intervals; a bias from 0 on: none was found. Error, bias and deviation relative to the exact "
    "gradient's length, by autograd in {}; – where that is zero. forwards: perturbed, a sample and step that has any."
)
_NO_VARIANCE = (
    "Deviation 0: these gradients hold no noise of their own step (correction none), so all error is bias, of what was "
    "learned here from this seed."
)


def _new_table(axes: Sequence[Axis], columns: Sequence[str], title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for axis in axes:
        table.add_column(axis.name, overflow="fold")
    for heading in columns:
        table.add_column(heading, justify="right")
    return table


def _table(measured: Sequence[Measured], axes: Sequence[Axis]) -> Table:
    table = _new_table(axes, [*fidelity_report.QUANTITIES, "forwards"])
    for one in measured:
        assert one.fidelity is not None
        cells = fidelity_report.cells(one.fidelity.whole)
        table.add_row(*one.settings.values(), *cells, f"{one.fidelity.forwards:.3g}")
    return table


def _site_table(measured: Sequence[Measured], axes: Sequence[Axis]) -> Table:
    table = _new_table(axes, ["site", *fidelity_report.QUANTITIES], title="Sites")
    for one in measured:
        assert one.fidelity is not None
        for site, of in one.fidelity.sites.items():
            table.add_row(*one.settings.values(), site, *fidelity_report.cells(of))
        table.add_section()
    return table


def _scaling_table(slopes: Sequence[Scaling], axes: Sequence[Axis]) -> Table:
    columns = ["slope of deviation", "slope of error", "bias at the most copies"]
    table = _new_table(axes, columns, title="What copies buy: slopes of logarithms")
    for one in slopes:
        estimates = (one.deviation, one.error, one.floor)
        table.add_row(*one.settings.values(), *(fidelity_report.cell(each) for each in estimates))
    return table
