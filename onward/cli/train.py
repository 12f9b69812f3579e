"""``onward train``: train a model forward-only, and beside it by backpropagation if asked."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from typer import Option

from ..api import compile as compile_program
from ..compiler.columns import quantity
from ..compiler.files import check_writable, write_whole
from ..compiler.report_text import describe_estimator
from ..evidence.baselines.backpropagation import Backpropagation
from ..models import Dataset, loaders
from ..passes.errors import OptionError, unknown_name
from ..runtime.training.history import History
from ..runtime.training.metrics import jsonable
from ..runtime.training.trainable import TrainableProgram
from ..runtime.training.trainer import Trainer
from ..runtime.versions import versions as software_versions
from .common import Setup, set_up, settings_of, to_json
from .options import MODEL_HELP, Common, with_common

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}

_TRAINING = "Training"
_OUTPUT = "Output"


@dataclass(frozen=True)
class Training:
    """How both methods train."""

    epochs: int
    batch_size: int
    lr: float
    optimizer: str


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
    history: History

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "history": self.history.to_dict()["records"], "interrupted": self.history.interrupted}


@with_common
def train(
    common: Common,
    model: Annotated[str, Option(metavar="NAME", help=MODEL_HELP, rich_help_panel="Model and data")] = "resnet5",
    epochs: Annotated[
        int | None,
        Option(help="Passes over the training data. [dim]\\[default: of the model][/dim]", rich_help_panel=_TRAINING),
    ] = None,
    batch_size: Annotated[
        int | None, Option(help="Samples a step. [dim]\\[default: of the model][/dim]", rich_help_panel=_TRAINING)
    ] = None,
    lr: Annotated[
        float | None, Option(help="Learning rate. [dim]\\[default: of the model][/dim]", rich_help_panel=_TRAINING)
    ] = None,
    optimizer: Annotated[
        str | None, Option(help="sgd, adam or adamw. [dim]\\[default: of the model][/dim]", rich_help_panel=_TRAINING)
    ] = None,
    compare_bp: Annotated[
        bool,
        Option(
            "--compare-bp",
            help="Also train the same model by backpropagation: same first weights, batches, optimizer and epochs.",
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

      onward train --model mlp --alr --copies 200

      onward train --model my_package.nets:build --directory runs/a --json runs/a.json
    """
    setup = set_up(model, common, batch_size)
    training = Training(
        epochs=setup.recipe.epochs if epochs is None else epochs,
        batch_size=setup.recipe.batch_size if batch_size is None else batch_size,
        lr=setup.recipe.lr if lr is None else lr,
        optimizer=setup.recipe.optimizer if optimizer is None else optimizer,
    )
    if json_file is not None:
        check_writable(json_file)
    if resume and directory is None:
        raise OptionError("--resume needs the --directory of the run.")
    console = Console()
    start = copy.deepcopy(setup.model)
    make_optimizer(setup.model, training)  # a mistake in it shows before the work
    program = compile_program(
        setup.model,
        setup.example,
        loss=setup.dataset.loss,
        estimator=setup.estimator,
        unbatched=setup.dataset.unbatched,
        seed=common.seed,
        workers=workers,
        streams=streams,
        memory=memory,
    )
    if not quiet:
        _announce(console, model, common, setup, training)
    trainer_options = {"directory": directory, "checkpoint_every": checkpoint_every, "tensorboard": tensorboard}
    outcome = run(program, setup.dataset, training, progress=not quiet, resume=resume, **trainer_options)
    reference: Outcome | None = None
    if compare_bp and not outcome.history.interrupted:
        backpropagation = Backpropagation(start, setup.dataset.loss, common.seed, unbatched=setup.dataset.unbatched)
        reference = run(backpropagation, setup.dataset, training, progress=not quiet)
    interrupted = outcome.history.interrupted or (reference is not None and reference.history.interrupted)
    if json_file is not None:
        result = _result(model, common, setup, training, outcome, reference)
        write_whole(json_file, to_json(jsonable(result)))
    console.print(_table(outcome, reference))
    if interrupted:
        goes_on = directory is not None and outcome.history.interrupted
        hint = " Go on with the same command and --resume." if goes_on else ""
        Console(stderr=True).print(f"interrupted before the last epoch ended.{hint}", style="yellow")
        raise typer.Exit(130)


def make_optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters, by name."""
    if training.optimizer not in OPTIMIZERS:
        raise unknown_name("optimizer", training.optimizer, OPTIMIZERS)
    if not training.lr > 0:
        raise OptionError(f"--lr {training.lr}: the learning rate must be positive.")
    options: dict[str, Any] = {"momentum": 0.9} if training.optimizer == "sgd" else {}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return OPTIMIZERS[training.optimizer](parameters, lr=training.lr, **options)


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
    trainer = Trainer(program, make_optimizer(program.model, training), progress=progress, **options)
    train_batches, test_batches = loaders(dataset, training.batch_size, program.seed)
    history = trainer.fit(train_batches, training.epochs, validation=test_batches, resume=resume)
    tested = trainer.evaluate(test_batches)
    forwards = program.forwards + program.clean_forwards
    return Outcome(
        test_accuracy=tested["accuracy"],
        test_loss=tested["loss"],
        seconds=sum(record.seconds for record in history),
        forwards=forwards,
        forwards_per_sample_and_step=forwards / program.clean_forwards if program.clean_forwards else 0.0,
        history=history,
    )


def _announce(console: Console, model: str, common: Common, setup: Setup, training: Training) -> None:
    count = sum(parameter.numel() for parameter in setup.model.parameters() if parameter.requires_grad)
    samples = f"{len(setup.dataset.train):,} {'nodes of one graph' if setup.dataset.unbatched else 'samples'}"
    console.print(f"[bold]{model}[/bold] on [bold]{common.data}[/bold]: {count:,} parameters, {samples}")
    console.print(describe_estimator(settings_of(setup.estimator).to_json()), highlight=False)
    console.print(
        f"{training.optimizer}, learning rate {training.lr:g}, batches of {training.batch_size}, "
        f"{training.epochs} epochs, seed {common.seed}",
        highlight=False,
    )


def _result(
    model: str, common: Common, setup: Setup, training: Training, outcome: Outcome, reference: Outcome | None
) -> dict[str, Any]:
    result = {
        "model": model,
        "data": common.data,
        "seed": common.seed,
        **outcome.to_json(),
        "settings": {
            **asdict(training),
            "model_options": common.model_option or [],
            "estimator": settings_of(setup.estimator).to_json(),
            "device": common.device,
            "threads": torch.get_num_threads(),
        },
        "versions": software_versions() | {"platform": platform.platform(), "cpu": platform.processor()},
    }
    return result if reference is None else result | {"bp": reference.to_json()}


def _table(outcome: Outcome, reference: Outcome | None) -> Table:
    table = Table()
    table.add_column("method")
    for heading in ("test accuracy", "test loss", "seconds", "forwards", "a sample and step"):
        table.add_column(heading, justify="right")
    rows = [("forward-only", outcome, f"{outcome.forwards_per_sample_and_step:.1f}")]
    if reference is not None:
        rows.append(("backpropagation", reference, "1.0 + a backward"))
    for name, one, each in rows:
        table.add_row(
            name, f"{one.test_accuracy:.4f}", f"{one.test_loss:.4f}", f"{one.seconds:.1f}", quantity(one.forwards), each
        )
    return table
