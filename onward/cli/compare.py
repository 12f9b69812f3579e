"""``onward compare``: the same model, data and budget of forwards trained by Onward and by the methods of others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from typer import Argument, Option

from ..compiler.files import check_writable, write_whole
from ..evidence.comparison import LR_GRID, Comparison, Task, check, compare
from ..evidence.comparison_report import SUBJECTS, plot, ratios_table, results_table, to_json
from ..evidence.fitting import check_classifies
from ..evidence.methods import METHODS
from ..evidence.plots import check_plot
from ..evidence.provenance import describe, machine
from ..runtime.training.metrics import jsonable
from .common import set_up
from .common import to_json as json_text
from .onnx_models import model_for
from .options import MODEL_HELP, Common, with_errors
from .recipes import recipe_for
from .training import make_optimizer

_TRAINING = "Training"
_OUTPUT = "Output"
_RUN = "Run"

WIDTH = 120
"""Columns of the tables where the output is no terminal."""


def compare_(
    model: Annotated[str, Argument(metavar="[MODEL]", help=MODEL_HELP)] = "mlp",
    data: Annotated[
        str | None, Option(metavar="NAME", help="Data set (`onward data`). [dim]\\[default: of the model][/dim]")
    ] = None,
    model_option: Annotated[
        list[str] | None, Option(metavar="KEY=VALUE", help="Argument of the model's factory; may be repeated.")
    ] = None,
    budget: Annotated[
        float,
        Option(
            metavar="FORWARDS",
            help="Forwards that every run has, for each training sample: so many epochs, if a step were one forward.",
            rich_help_panel=_TRAINING,
        ),
    ] = 100.0,
    methods: Annotated[
        list[str] | None,
        Option(
            metavar="NAME",
            help=f"A method; may be repeated: {', '.join(METHODS)}. [dim]\\[default: all][/dim]",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    seeds: Annotated[
        list[int] | None,
        Option(
            metavar="SEED",
            help="Seed of weights, batches and noise of a run; may be repeated. [dim]\\[default: 0, 1, 2][/dim]",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    lr_grid: Annotated[
        list[float] | None,
        Option(
            metavar="FACTOR",
            help="What the recipe's learning rate is multiplied with in tuning; may be repeated. "
            "[dim]\\[default: 0.3, 1, 3][/dim]",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        Option(
            help="sgd, adam or adamw, of all methods. [dim]\\[default: of the model][/dim]", rich_help_panel=_TRAINING
        ),
    ] = None,
    batch_size: Annotated[
        int | None, Option(help="Samples a step. [dim]\\[default: of the model][/dim]", rich_help_panel=_TRAINING)
    ] = None,
    json_file: Annotated[
        Path | None,
        Option("--json", metavar="FILE", help="Write settings, machine and every curve.", rich_help_panel=_OUTPUT),
    ] = None,
    plot_file: Annotated[
        Path | None,
        Option(
            "--plot",
            metavar="FILE.svg",
            help="Draw accuracy against forwards and against seconds (needs matplotlib: onward\\[plots]).",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    quiet: Annotated[
        bool, Option("--quiet", "-q", help="Print the final tables only.", rich_help_panel=_OUTPUT)
    ] = False,
    threads: Annotated[
        int | None,
        Option(help="Threads of torch's operations. [dim]\\[default: torch's own][/dim]", rich_help_panel=_RUN),
    ] = None,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.", rich_help_panel=_RUN)] = False,
) -> None:
    """Race Onward against other ways to train: same model, data, optimizer and budget of forwards.

    Backpropagation, likelihood ratio (exact, sign, stochastic), `auto`, feedback alignment (FDFA, DFA), MeZO and
    forward gradients, each from its paper. Every method is tuned first on a small grid, on samples held out of the
    training data, with another seed. Then it runs with each seed, tested at marks on the way. Ctrl-C ends with the
    methods that are finished.

    [bold]Examples[/bold]

      onward compare mlp --data digits --json digits.json --plot digits.svg

      onward compare mlp --methods auto --methods fdfa --methods mezo --budget 50 --seeds 0
    """
    with_errors(_compare, debug)(
        model=model,
        common=Common(model_option=model_option, data=data, threads=threads),
        budget=budget,
        methods=methods or list(METHODS),
        seeds=seeds or [0, 1, 2],
        lr_grid=lr_grid or list(LR_GRID),
        optimizer=optimizer,
        batch_size=batch_size,
        json_file=json_file,
        plot_file=plot_file,
        quiet=quiet,
    )


def _compare(
    *,
    model: str,
    common: Common,
    budget: float,
    methods: list[str],
    seeds: list[int],
    lr_grid: list[float],
    optimizer: str | None,
    batch_size: int | None,
    json_file: Path | None,
    plot_file: Path | None,
    quiet: bool,
) -> None:
    check(budget, methods, seeds, lr_grid)
    for path in (json_file, plot_file):
        if path is not None:
            check_writable(path)
    if plot_file is not None:
        check_plot(plot_file)
    recipe = recipe_for(model)
    given: dict[str, Any] = {"batch_size": batch_size, "optimizer": optimizer}
    training = replace(recipe.training, **{name: value for name, value in given.items() if value is not None})
    setup = set_up(recipe, common, batch_size)
    check_classifies(setup.model, setup.dataset)

    def make_with(net: nn.Module, lr: float) -> torch.optim.Optimizer:
        return make_optimizer(net, replace(training, lr=lr))

    task = Task(
        setup.dataset,
        lambda: model_for(model, setup.dataset, **setup.recipe.model_options),
        make_with,
        setup.dataset.loss,
        training.batch_size,
        training.lr,
    )
    where = machine(torch.device("cpu"))
    console = Console(width=None if Console().is_terminal else WIDTH)
    if not quiet:
        console.print(
            f"[bold]{model}[/bold] on [bold]{setup.dataset.name}[/bold]: {len(methods)} methods, {budget:g} forwards "
            f"for each of {len(setup.dataset.train):,} samples, seeds {', '.join(map(str, seeds))}; "
            f"{training.optimizer}, batches of {training.batch_size}",
            highlight=False,
        )
        console.print(describe(where), highlight=False, style="dim")
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet,
    )
    with bar:
        row = bar.add_task("starting", total=1.0)
        found = compare(
            task,
            budget,
            methods,
            seeds,
            lr_grid,
            lambda what, share: bar.update(row, description=what, completed=share),
        )
    told = {
        "model": model,
        "model_options": common.model_option or [],
        "data": setup.dataset.name,
        "samples": len(setup.dataset.train),
        "optimizer": training.optimizer,
        "batch_size": training.batch_size,
        "lr": training.lr,
    }
    _write(found, told, where, json_file, plot_file)
    _print(console, found)
    if found.interrupted:
        Console(stderr=True).print("interrupted before the last method was finished.", style="yellow")
        raise typer.Exit(130)
    if found.failed:
        raise typer.Exit(1)


def _write(
    found: Comparison, told: dict[str, Any], where: dict[str, Any], json_file: Path | None, plot_file: Path | None
) -> None:
    if json_file is not None:
        write_whole(json_file, json_text(jsonable(to_json(found, told, where))))
    if plot_file is not None and found.entries:
        seeds = ", ".join(map(str, found.seeds))
        caption = f"mean, lowest and highest of seeds {seeds}; {told['optimizer']}; {describe(where)}"
        write_whole(plot_file, plot(found, f"{told['model']}, {told['data']}", caption))


def _print(console: Console, found: Comparison) -> None:
    for reason in found.refused.values():
        console.print(f"left out: {reason}", style="yellow", highlight=False, markup=False)
    for key, reason in found.failed.items():
        console.print(f"{METHODS[key].name} ended with an error: {reason}", style="red", highlight=False, markup=False)
    if found.entries:
        console.print(results_table(found))
    for subject in SUBJECTS:
        if (shown := ratios_table(found, subject)) is not None:
            console.print(shown)
