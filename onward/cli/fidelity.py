"""``onward fidelity``: how gradients agree with the exact ones, over any settings."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from typer import Argument, Option

from ..api import compile as compile_program
from ..compiler.files import check_writable, write_whole
from ..compiler.report_text import describe_estimator
from ..evidence import fidelity_report
from ..evidence.baselines.backpropagation import Backpropagation
from ..evidence.fidelity import Fidelity, check_replicates, learn, measure
from ..evidence.fitting import check_classifies
from ..evidence.plots import check_plot, to_svg
from ..evidence.provenance import describe, machine
from ..evidence.sweep import Axis, Measured, Settings, Trained, parse_axis, scaling, sweep
from ..models import loaders
from ..passes.errors import OnwardError, OptionError
from ..runtime.training.metrics import jsonable
from ..runtime.training.trainer import Trainer
from .common import Setup, build_model, find_device, parse_options, set_up, settings_of, to_json
from .fidelity_cases import Case, make_cases, sweepable
from .fidelity_tables import print_tables
from .options import MODEL_HELP, Common, with_common
from .recipes import recipe_for
from .train import run as train_with
from .training import make_optimizer

_MEASURING = "Measuring"
_OUTPUT = "Output"


@dataclass(frozen=True)
class Measuring:
    """How each combination is measured."""

    batch_size: int
    replicates: int
    learn: int
    after: int
    train: int
    runs: int


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
    train: Annotated[
        int,
        Option(
            metavar="EPOCHS",
            help="Also train with every combination for so many epochs, from new weights, with the model's optimizer "
            "and learning rate, and print the test accuracy: what an error costs in the end. 0: do not.",
            rich_help_panel=_MEASURING,
        ),
    ] = 0,
    runs: Annotated[
        int,
        Option(min=1, help="Runs of --train, with seeds from --seed on.", rich_help_panel=_MEASURING),
    ] = 3,
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

    What an error costs in the end, training says: with --train by every combination at one learning rate; `onward
    compare` tunes each method and gives all of them one budget of forwards.

    [bold]Examples[/bold]

      onward fidelity mlp

      onward fidelity mlp --model-option depth=1 --data linear --sweep capture=exact,sign --sweep copies=8,32,128,512

      onward fidelity mlp --groups layerwise --copies 32 --sweep depth=3,6,9,12 --plot depth.svg

      onward fidelity mlp --alr --sweep capture=exact,sign --sweep copies=8,32,128 --train 5

      onward fidelity resnet5 --after 5 --reach 0 --segments op --per-site
    """
    for option, number in (("after", after), ("learn", learn_steps), ("train", train)):
        if number < 0:
            raise OptionError(f"--{option} {number}: it counts from 0 on.")
    check_replicates(replicates)
    for file in (json_file, plot):
        if file is not None:
            check_writable(file)
    if plot is not None:
        check_plot(plot)
    setup = set_up(recipe_for(model), common, batch_size)
    axes = [parse_axis(text, sweepable(model)) for text in sweeps or []]
    cases = make_cases(common, axes, setup.recipe.estimator)
    measuring = Measuring(len(setup.example), replicates, learn_steps, after, train, runs)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if not quiet:
        _announce(console, model, common, setup, measuring, axes)
    found, interrupted = run(common, setup, cases, measuring, progress=not quiet)
    slopes = scaling(found)
    provenance = machine(find_device(common.device))
    if json_file is not None:
        result = _result(setup, common, sweeps or [], cases, measuring, interrupted) | {"machine": provenance}
        result |= fidelity_report.to_json(found, slopes)
        for measured, case in zip(result["measured"], cases, strict=False):
            measured["estimator"] = None if case.estimator is None else settings_of(case.estimator).to_json()
        write_whole(json_file, to_json(jsonable(result)))
    if plot is not None and any(one.fidelity is not None for one in found):
        caption = f"{model} on {setup.dataset.name}, {_about(measuring)}, seed {common.seed}. {describe(provenance)}"
        write_whole(plot, to_svg(fidelity_report.panels(found, axes), caption))
    print_tables(console, found, axes, slopes, per_site)
    if interrupted:
        Console(stderr=True).print("interrupted before all combinations were measured.", style="yellow")
        raise typer.Exit(130)


def run(
    common: Common, setup: Setup, cases: Sequence[Case], measuring: Measuring, *, progress: bool
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
            models[options] = _prepared(common, setup, options, measuring)
        return _measure(models[options], case, setup, measuring, bar)

    def measured_alone() -> Iterator[Measured]:
        yield Measured(cases[0].settings, one(cases[0].settings))

    found: list[Measured] = []
    with bar:
        try:
            for measured in sweep([case.settings for case in cases], one) if len(cases) > 1 else measured_alone():
                found.append(measured)  # before the training, which may be interrupted
                if measuring.train and measured.fidelity is not None:
                    case = by_settings[tuple(measured.settings.items())]
                    found[-1] = _train(measured, case, setup, measuring, bar)
        except KeyboardInterrupt:
            return found, True
    if all(one.fidelity is None for one in found):
        raise OptionError(f"no combination could be measured. {fidelity_report.label(cases[0].settings)}: "
                          f"{found[0].refusal}")  # fmt: skip
    return found, False


def _prepared(common: Common, setup: Setup, options: tuple[str, ...], measuring: Measuring) -> nn.Module:
    """The model with these options, from the seed, trained by backpropagation if that is asked for."""
    built = build_model(setup.recipe, setup.dataset, common.seed, common.freeze, **parse_options(list(options)))
    built = built.to(find_device(common.device))
    check_classifies(built, setup.dataset)
    if measuring.after:
        training = setup.recipe.training
        judge = Backpropagation(built, setup.dataset.loss, common.seed)
        trainer = Trainer(judge, make_optimizer(built, training), progress=False)
        trainer.fit(loaders(setup.dataset, training.batch_size, common.seed)[0], measuring.after)
    return built


def _measure(model: nn.Module, case: Case, setup: Setup, measuring: Measuring, bar: Progress) -> Fidelity:
    title = fidelity_report.label(case.settings) or "measuring"
    program = compile_program(
        model, setup.example, loss=setup.dataset.loss, estimator=case.estimator, seed=case.common.seed
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


def _train(measured: Measured, case: Case, setup: Setup, measuring: Measuring, bar: Progress) -> Measured:
    """`measured` with what training from new weights with this estimator gave, once a seed."""
    training = replace(setup.recipe.training, epochs=measuring.train)
    title = fidelity_report.label(case.settings) or "estimator"
    task = bar.add_task(f"{title}: training", total=measuring.runs)
    accuracies, forwards = [], []
    try:
        for seed in range(case.common.seed, case.common.seed + measuring.runs):
            built = build_model(
                setup.recipe,
                setup.dataset,
                seed,
                case.common.freeze,
                **parse_options(case.common.model_option or []),
            )
            program = compile_program(
                built.to(setup.example.device),
                setup.dataset.train.tensors[0][: training.batch_size],
                loss=setup.dataset.loss,
                estimator=case.estimator,
                seed=seed,
            )
            outcome = train_with(program, setup.dataset, training, progress=False)
            if outcome.history.interrupted:
                raise KeyboardInterrupt
            accuracies.append(tuple(record.validation["accuracy"] for record in outcome.history))
            forwards.append(outcome.forwards / len(setup.dataset.train))
            bar.advance(task)
    except OnwardError as error:  # it diverges, say
        return replace(measured, untrained=str(error))
    finally:
        bar.remove_task(task)
    return replace(measured, trained=Trained(tuple(accuracies), sum(forwards) / len(forwards)))


# --- what is shown ----------------------------------------------------------------------------------------------------


def _about(measuring: Measuring) -> str:
    where = f"after {measuring.after} epochs of backpropagation" if measuring.after else "at the first weights"
    return f"a batch of {measuring.batch_size}, {measuring.replicates} replicates, {where}"


def _announce(
    console: Console, model: str, common: Common, setup: Setup, measuring: Measuring, axes: Sequence[Axis]
) -> None:
    console.print(f"[bold]{model}[/bold] on [bold]{setup.dataset.name}[/bold]: {_about(measuring)}, seed {common.seed}")
    if not axes:
        console.print(describe_estimator(settings_of(setup.estimator).to_json()))


def _result(
    setup: Setup, common: Common, sweeps: Sequence[str], cases: Sequence[Case], measuring: Measuring, interrupted: bool
) -> dict[str, Any]:
    return {
        "model": setup.recipe.model,
        "data": setup.dataset.name,
        "seed": common.seed,
        "settings": {
            **dataclasses.asdict(measuring),
            "model_options": common.model_option or [],
            "freeze": common.freeze or [],
            "sweep": list(sweeps),
            "combinations": len(cases),
            "device": common.device,
        },
        "interrupted": interrupted,
    }
