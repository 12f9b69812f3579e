"""``onward inspect``: what the compiler makes of a model, or why it makes nothing of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text
from typer import Argument, Option

from ..compiler import listing, report_text
from ..compiler.dot import to_dot
from ..compiler.files import check_writable, write_whole
from ..compiler.program import CompiledModel
from ..compiler.report import examine, refusal
from ..compiler.svg import to_svg
from ..passes.errors import (
    BatchError,
    CaptureError,
    OptionError,
    UnreachedParameterError,
    UnsupportedModelError,
    unknown_name,
)
from ..passes.locate_samples import batch_symbol
from ..runtime.plan import format_plan, make_plan
from ..runtime.program import Program
from .common import compile_setup, set_up, to_json
from .memory import check_memory, render_memory
from .options import MODEL_HELP, Common, with_common
from .recipes import recipe_for
from .schedule import check_schedule, record_schedule, render_schedule

CALIBRATION_SAMPLES = 128
"""Samples of the training data that ``--calibrate`` measures on."""

FORMATS = ("text", "python", "dot", "svg", "json", "chrome")


@with_common
def inspect(
    common: Common,
    model: Annotated[str | None, Argument(metavar="[MODEL]", help=MODEL_HELP)] = None,
    pass_: Annotated[
        str | None,
        Option(
            "--pass",
            metavar="NAME",
            help="Show what this pass did: the graph, with the lines it changed marked. Passes: capture, find_sites, "
            "insert_noise, …, share_prefixes, split_stages, complete_gradients; the overview lists them.",
        ),
    ] = None,
    format_: Annotated[
        str,
        Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="text; python: runnable source; dot: for Graphviz; svg: a drawing; json: everything as data; chrome: "
            "with --schedule, a trace for Perfetto or chrome://tracing.",
        ),
    ] = "text",
    output: Annotated[Path | None, Option("--output", "-o", metavar="FILE", help="Write to a file.")] = None,
    calibrates: Annotated[
        bool,
        Option(
            "--calibrate",
            help="Measure the model on a batch and choose settings from it; -o FILE keeps them, for --calibration.",
        ),
    ] = False,
    budget: Annotated[
        float | None,
        Option(
            help="With --calibrate, perturbed forwards a sample and step that training may spend. "
            "[dim]\\[default: 4][/dim]"
        ),
    ] = None,
    choose: Annotated[
        str | None,
        Option(
            metavar="NAMES",
            help="With --calibrate, what to choose, the rest being held: sigma, placement, noise_on, groups, copies, "
            "correction, separated by commas. [dim]\\[default: all that no option sets site by site][/dim]",
        ),
    ] = None,
    schedule: Annotated[
        bool,
        Option(
            "--schedule",
            help="Run some steps and show their tasks: times, what waits for what, the critical path, how short a step "
            "could be on several workers.",
        ),
    ] = False,
    workers: Annotated[
        int | None,
        Option(help="With --schedule, workers that share a step. [dim]\\[default: 2][/dim]"),
    ] = None,
    memory: Annotated[
        bool,
        Option(
            "--memory",
            help="Show what memory a step takes, predicted: when, what for, and with how many copies side by side.",
        ),
    ] = False,
    rules: Annotated[
        bool, Option("--rules", help="Print the support matrix: what is special about which operation.")
    ] = False,
) -> None:
    """Show what the compiler makes of a model: passes, sites, gradient subgraphs, plan; or why it cannot.

    A model that would not compile gets a report of the reason, and exit code 1.

    [bold]Examples[/bold]

      onward inspect resnet5

      onward inspect resnet5 --pass insert_noise

      onward inspect resnet5 --calibrate -o resnet5.json

      onward inspect resnet5 --schedule --format svg -o step.svg

      onward inspect resnet5 --memory

      onward inspect my_package.nets:build --capture sign --format svg -o graph.svg
    """
    if format_ not in FORMATS:
        raise unknown_name("format", format_, FORMATS)
    if budget is not None and not calibrates:
        raise OptionError(f"--budget {budget:g} is what --calibrate may spend; inspect alone spends nothing.")
    if choose is not None and not calibrates:
        raise OptionError(f"--choose {choose} is what --calibrate may choose; inspect alone chooses nothing.")
    if calibrates and (pass_ is not None or format_ != "text"):
        raise OptionError("--calibrate shows a table and writes JSON (-o); --pass and --format are of inspect alone.")
    check_schedule(schedule, workers, format_, pass_, calibrates)
    others = {"--pass": pass_ is not None, "--calibrate": calibrates, "--schedule": schedule}
    check_memory(memory, format_, others)
    if output is not None:
        check_writable(output)
    if rules:
        _emit(report_text.rules_text(), "text", output)
        if model is None:
            return
    if model is None:
        raise OptionError("inspect needs a model: `onward models` lists those of the zoo; or --rules.")
    setup = set_up(recipe_for(model), common)
    try:
        compiled = compile_setup(setup)
    except (BatchError, CaptureError, UnreachedParameterError, UnsupportedModelError) as error:
        if common.debug:
            raise
        refused = refusal(setup.model, setup.example, error, name=model)
        as_data = format_ == "json"
        _emit(
            to_json(refused.to_json()) if as_data else report_text.refusal_text(refused),
            "json" if as_data else "text",
            output,
        )
        raise typer.Exit(1) from error
    if calibrates:
        inputs, target = setup.dataset.batch(CALIBRATION_SAMPLES)
        calibration = Program(setup.model, compiled, setup.dataset.loss, common.seed).calibrate(
            inputs,
            target,
            budget=4.0 if budget is None else budget,
            choose=None if choose is None else [name.strip() for name in choose.split(",")],
            batch_size=setup.recipe.training.batch_size,
        )
        Console(width=None if sys.stdout.isatty() else 120).print(calibration.table(), highlight=False)
        if output is not None:
            calibration.save(output)
        return
    if memory:
        _emit(render_memory(compiled, model, format_), format_, output)
        return
    if schedule:
        recorded = record_schedule(setup, compiled, workers, common.seed)
        _emit(render_schedule(recorded, model, format_), format_, output)
        return
    _emit(render(compiled, model, format_, pass_), format_, output)


def render(compiled: CompiledModel, name: str, format_: str, pass_: str | None) -> str:
    """The compiled model called `name`, or one pass of it, in a format of `FORMATS`."""
    if pass_ is not None and pass_ not in listing.pass_names(compiled):
        raise unknown_name("pass", pass_, listing.pass_names(compiled))
    if format_ == "python":
        return listing.python(compiled, pass_, model=name)
    if format_ in ("dot", "svg"):
        shown = pass_ or compiled.history[-1].name
        graphs = listing.graphs_after(compiled, shown)
        draw = to_dot if format_ == "dot" else to_svg
        return draw(
            graphs if shown in listing.PARTS else next(iter(graphs.values())),
            title=f"{name} after {shown}",
            batch=batch_symbol(compiled.captured.module),
        )
    if format_ == "text" and pass_ is not None:
        return listing.pass_text(compiled, pass_, model=name)
    examined = examine(compiled, name=name, plan=format_plan(make_plan(compiled)))
    if format_ == "text":
        return report_text.text(examined)
    graphs = listing.all_graphs(compiled) if pass_ is None else listing.graphs_after(compiled, pass_)
    sources = listing.sources(compiled, graphs)
    return to_json({"supported": True, **examined.to_json(), "graphs": sources})


def _emit(content: str, format_: str, output: Path | None) -> None:
    if output is not None:
        write_whole(output, content)
    elif sys.stdout.isatty():
        console = Console()
        if format_ in ("python", "json"):
            console.print(Syntax(content, format_, background_color="default", word_wrap=True))
        elif format_ == "text":
            console.print(_styled(content), soft_wrap=True)
        else:
            sys.stdout.write(content)
    else:
        sys.stdout.write(content)


def _styled(content: str) -> Text:
    """Headings bold, added lines green, removed lines red, comments dim."""
    styled = Text()
    for line in content.splitlines(keepends=True):
        style = ""
        if line[:1] not in (" ", "", "\n", "+", "-"):
            style = "bold"
        elif line.startswith("+ "):
            style = "green"
        elif line.startswith("- "):
            style = "red"
        elif line.lstrip().startswith("# "):
            style = "dim"
        styled.append(line, style)
    return styled
