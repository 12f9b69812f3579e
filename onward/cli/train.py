"""``onward train``: train a model forward-only, and beside it by backpropagation if asked."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from typer import Option

from ..api import compile as compile_program
from ..compiler.columns import quantity
from ..compiler.files import check_writable, write_whole
from ..compiler.report_text import describe_estimator
from ..evidence.baselines.backpropagation import Backpropagation
from ..models import TWINS, Dataset, loaders
from ..passes.errors import OptionError
from ..runtime.training.history import History
from ..runtime.training.metrics import jsonable
from ..runtime.training.trainable import TrainableProgram
from ..runtime.training.trainer import Trainer
from ..runtime.versions import versions as software_versions
from .common import Setup, check_loss, fitting, set_up, settings_of, to_json
from .onnx_models import check_saves
from .options import MODEL_HELP, Common, with_common
from .recipes import Recipe, find_recipe, recipe_for
from .training import Training, make_optimizer, make_scheduler

_MODEL = "Model and data"
_TRAINING = "Training"
_OUTPUT = "Output"


UNPERTURBED = (
    "nothing was perturbed: the reach covers the whole model, so its gradients are backpropagation's; "
    "--segments op --reach 0 has none"
)
"""What the table says of such a model: its row is no evidence for training forward-only."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    test_accuracy: float
    test_loss: float
    seconds: float
    """Training and the tests after each epoch; not compiling."""
    forwards: float
    """Forwards of one sample: clean and perturbed, a perturbed suffix counting by its share of the FLOPs."""
    forwards_per_sample_and_step: float
    pipeline: str
    """How steps followed each other in the end (`Trainer.pipeline`)."""
    history: History

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "history": self.history.to_dict()["records"], "interrupted": self.history.interrupted}


@with_common
def train(
    common: Common,
    model: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help=f"{MODEL_HELP} Short for the recipe of that name. [dim]\\[default: resnet5][/dim]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="A recipe (`onward recipes`), or the path of its .toml file: model, data, training and estimator. The "
            "other options go before what it says.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        Option(help="Passes over the training data. [dim]\\[default: of the recipe][/dim]", rich_help_panel=_TRAINING),
    ] = None,
    batch_size: Annotated[
        int | None, Option(help="Samples a step. [dim]\\[default: of the recipe][/dim]", rich_help_panel=_TRAINING)
    ] = None,
    lr: Annotated[
        float | None, Option(help="Learning rate. [dim]\\[default: of the recipe][/dim]", rich_help_panel=_TRAINING)
    ] = None,
    optimizer: Annotated[
        str | None, Option(help="sgd, adam or adamw. [dim]\\[default: of the recipe][/dim]", rich_help_panel=_TRAINING)
    ] = None,
    compare_bp: Annotated[
        bool,
        Option(
            "--compare-bp",
            help="Also train the same model by backpropagation: same first weights, batches, optimizer and epochs. A "
            "model without derivative has a twin for that, with the same forward.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    directory: Annotated[
        Path | None, Option(help="Where checkpoints and metrics.jsonl go.", rich_help_panel=_OUTPUT)
    ] = None,
    resume: Annotated[
        bool,
        Option(
            "--resume", help="Go on from the newest checkpoint in --directory, bit for bit.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    checkpoint_every: Annotated[
        int | None,
        Option(
            metavar="STEPS", help="Checkpoint also every so many steps, not only each epoch.", rich_help_panel=_OUTPUT
        ),
    ] = None,
    tensorboard: Annotated[
        bool, Option("--tensorboard", help="Also write event files under --directory.", rich_help_panel=_OUTPUT)
    ] = False,
    workers: Annotated[
        int,
        Option(
            min=1,
            help="CPU threads that share a step's subgraphs, where that measures faster than one after the other; "
            "torch's own threads are divided among them.",
            rich_help_panel=_TRAINING,
        ),
    ] = 1,
    streams: Annotated[
        int,
        Option(
            min=1,
            help="With --device cuda, streams of the GPU that a step's subgraphs are issued on.",
            rich_help_panel=_TRAINING,
        ),
    ] = 1,
    cuda_graphs: Annotated[
        bool,
        Option(
            "--cuda-graphs",
            help="With --device cuda, replay steps from CUDA graphs, with a branch for each of --streams.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    inductor: Annotated[
        bool,
        Option(
            "--inductor",
            help="Have torch's inductor compile the graphs of a step, in the first steps: seconds to minutes. Needs a "
            "C++ compiler, with --device cuda Triton; not with --memory.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    memory: Annotated[
        str | None,
        Option(
            metavar="SIZE",
            help="What a step may take beyond weights, batch and optimizer: 2GiB, or a fraction of the device's memory "
            "(0.5). Chooses --chunk; `onward inspect MODEL --memory` shows what takes how much.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        Option("--json", metavar="FILE", help="Write settings, results and history.", rich_help_panel=_OUTPUT),
    ] = None,
    save_onnx: Annotated[
        Path | None,
        Option(
            "--save-onnx",
            metavar="FILE",
            help="Write the trained model as ONNX: the file that --model names, with the trained weights.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    quiet: Annotated[
        bool, Option("--quiet", "-q", help="Print the final table only.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Train a model without a backward pass, and say how well it does.

    The model is compiled into a program that estimates gradients from perturbed forward runs alone (likelihood ratio),
    trained on a data set, and tested. At the end: test accuracy, seconds, and the forwards spent. Ctrl-C ends the run
    after the step in progress; with --directory it goes on later with --resume.

    [bold]Examples[/bold]

      onward train --model resnet5 --data digits --compare-bp

      onward train --recipe resnet9-cifar100 --compare-bp --device cuda

      onward train --recipe my_recipe.toml --epochs 2 --model-option width=8

      onward train --model mlp --alr --copies 200

      onward train --model net.onnx --data digits --save-onnx trained.onnx

      onward train --model my_package.nets:build --directory runs/a --json runs/a.json
    """
    chosen = _choose(model, recipe)
    given: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "optimizer": optimizer}
    training = replace(chosen.training, **{name: value for name, value in given.items() if value is not None})
    setup = set_up(replace(chosen, training=training), common)
    if json_file is not None:
        check_writable(json_file)
    written = None
    if save_onnx is not None:
        written = check_saves(setup.model, setup.recipe.model)
        check_writable(save_onnx)
    if resume and directory is None:
        raise OptionError("--resume needs the --directory of the run.")
    console = Console()
    start = setup.twin() if compare_bp else None
    with fitting(setup):
        program = compile_program(
            setup.model,
            setup.example,
            loss=setup.dataset.loss,
            estimator=setup.estimator,
            unbatched=setup.dataset.unbatched,
            seed=common.seed,
            workers=workers,
            streams=streams,
            cuda_graphs=cuda_graphs,
            inductor=inductor,
            memory=memory,
        )
    check_loss(setup)
    if not quiet:
        _announce(console, common.seed, setup)
    trainer_options = {"directory": directory, "checkpoint_every": checkpoint_every, "tensorboard": tensorboard}
    outcome = run(program, setup.dataset, training, progress=not quiet, resume=resume, **trainer_options)
    reference: Outcome | None = None
    if start is not None and not outcome.history.interrupted:
        backpropagation = Backpropagation(start, setup.dataset.loss, common.seed, unbatched=setup.dataset.unbatched)
        reference = run(backpropagation, setup.dataset, training, progress=not quiet)
    interrupted = outcome.history.interrupted or (reference is not None and reference.history.interrupted)
    if json_file is not None:
        result = _result(common, setup, outcome, reference)
        write_whole(json_file, to_json(jsonable(result)))
    if written is not None and save_onnx is not None:
        written.save(save_onnx)
    notes = [] if program.compiled.runs else [UNPERTURBED]
    if max(workers, streams) > 1:
        notes.append(f"the weights' updates and the next step: {outcome.pipeline}")
    console.print(_table(outcome, reference, setup.recipe, notes))
    if interrupted:
        goes_on = directory is not None and outcome.history.interrupted
        hint = " Go on with the same command and --resume." if goes_on else ""
        Console(stderr=True).print(f"interrupted before the last epoch ended.{hint}", style="yellow")
        raise typer.Exit(130)


def _choose(model: str | None, recipe: str | None) -> Recipe:
    """The recipe that ``--recipe`` or ``--model`` names."""
    if recipe is None:
        return recipe_for("resnet5" if model is None else model)
    found = find_recipe(recipe)
    if model not in (None, found.model):
        raise OptionError(f"--recipe {recipe} trains {found.model!r}, not {model!r}: leave out --model or --recipe.")
    return found


def run(
    program: TrainableProgram,
    dataset: Dataset,
    training: Training,
    *,
    progress: bool,
    resume: bool = False,
    **options: Any,
) -> Outcome:
    """Train `program` and test it after each epoch."""
    train_batches, test_batches = loaders(dataset, training.batch_size, program.seed, training.augment)
    optimizer = make_optimizer(program.model, training)
    scheduler = make_scheduler(optimizer, training, len(train_batches))
    trainer = Trainer(program, optimizer, scheduler=scheduler, scheduler_step="batch", progress=progress, **options)
    history = trainer.fit(train_batches, training.epochs, validation=test_batches, resume=resume)
    tested = trainer.evaluate(test_batches)
    forwards = program.forwards + program.clean_forwards
    return Outcome(
        test_accuracy=tested["accuracy"],
        test_loss=tested["loss"],
        seconds=sum(record.seconds for record in history),
        forwards=forwards,
        forwards_per_sample_and_step=forwards / program.clean_forwards if program.clean_forwards else 0.0,
        pipeline=trainer.pipeline,
        history=history,
    )


def _announce(console: Console, seed: int, setup: Setup) -> None:
    count = sum(parameter.numel() for parameter in setup.model.parameters() if parameter.requires_grad)
    recipe = setup.recipe
    samples = f"{len(setup.dataset.train):,} {'nodes of one graph' if setup.dataset.unbatched else 'samples'}"
    named = "" if recipe.name == recipe.model else f"{recipe.name}: "
    console.print(f"{named}[bold]{recipe.model}[/bold] on [bold]{recipe.data}[/bold]: {count:,} parameters, {samples}")
    console.print(describe_estimator(settings_of(setup.estimator).to_json()), highlight=False)
    console.print(f"{recipe.training}, seed {seed}", highlight=False)


def _result(common: Common, setup: Setup, outcome: Outcome, reference: Outcome | None) -> dict[str, Any]:
    recipe = setup.recipe
    result = {
        "recipe": recipe.name,
        "model": recipe.model,
        "data": recipe.data,
        "seed": common.seed,
        **outcome.to_json(),
        "settings": {
            **asdict(recipe.training),
            "model_options": recipe.model_options,
            "freeze": common.freeze or [],
            "estimator": settings_of(setup.estimator).to_json(),
            "device": common.device,
            "threads": torch.get_num_threads(),
        },
        "versions": software_versions() | {"platform": platform.platform(), "cpu": platform.processor()},
    }
    return result if reference is None else result | {"bp": reference.to_json()}


def _table(outcome: Outcome, reference: Outcome | None, recipe: Recipe, notes: list[str]) -> Table:
    table = Table()
    table.add_column("method")
    for heading in ("test accuracy", "test loss", "seconds", "forwards", "a sample and step"):
        table.add_column(heading, justify="right")
    rows = [("forward-only", outcome, f"{outcome.forwards_per_sample_and_step:.1f}")]
    if reference is not None:
        rows.append(("backpropagation", reference, "1.0 + a backward"))
        if recipe.model in TWINS:
            options = ", ".join(f"{name}={value}" for name, value in TWINS[recipe.model].items())
            notes = [*notes, f"backpropagation trains the model with {options}"]
    table.caption = "\n".join(notes) or None
    for name, one, each in rows:
        table.add_row(
            name, f"{one.test_accuracy:.4f}", f"{one.test_loss:.4f}", f"{one.seconds:.1f}", quantity(one.forwards), each
        )
    return table
