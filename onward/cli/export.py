"""``onward export``: write a training step for a runtime that has no torch."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.console import Console
from typer import Argument, Option

from ..api import compile as compile_program
from ..compiler.columns import quantity
from ..compiler.files import check_writable, replacing
from ..compiler.save import check_folder
from ..models import Dataset
from ..passes.errors import OptionError, unknown_name
from .common import check_loss, fitting, set_up
from .options import MODEL_HELP, Common, with_common
from .recipes import recipe_for
from .training import make_optimizer

FORMATS = ("onnx",)

_TRAINING = "Training"


@with_common
def export_(
    common: Common,
    model: Annotated[str, Argument(metavar="MODEL", help=MODEL_HELP)],
    output: Annotated[
        Path, Option("--output", "-o", metavar="DIR", help="Folder to write. It appears whole or not at all.")
    ],
    format: Annotated[str, Option("--format", metavar="NAME", help="onnx, the one there is.")] = "onnx",
    data_file: Annotated[
        Path | None,
        Option(metavar="FILE", help="Also write the data set as the .npz file that the trainer takes with --data."),
    ] = None,
    epochs: Annotated[
        int | None,
        Option(
            help="Passes over the data, as a default. [dim]\\[default: of the recipe][/dim]", rich_help_panel=_TRAINING
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        Option(help="Samples a step, as a default. [dim]\\[default: of the recipe][/dim]", rich_help_panel=_TRAINING),
    ] = None,
    lr: Annotated[
        float | None,
        Option(help="Learning rate, as a default. [dim]\\[default: of the recipe][/dim]", rich_help_panel=_TRAINING),
    ] = None,
    optimizer: Annotated[
        str | None, Option(help="sgd, adam or adamw. [dim]\\[default: of the recipe][/dim]", rich_help_panel=_TRAINING)
    ] = None,
    force: Annotated[
        bool, Option("--force", help="Replace what was exported into DIR before. Nothing else is ever replaced.")
    ] = False,
) -> None:
    """Write a model's training step as ONNX: it trains where only inference runs, without torch.

    Standard operators only: the forward, the noise, the gradients, what feedback learns and the optimizer's update, as
    one model and as one a task of the step. `python -m onward.runtime.onnx train DIR --data FILE` trains from there,
    with nothing installed but onnxruntime and numpy.

    [bold]Example[/bold]

      onward export resnet5 --data digits -o out/resnet5 --data-file out/digits.npz

      python -m onward.runtime.onnx train out/resnet5 --data out/digits.npz -o out/trained.onnx
    """
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    try:
        from ..runtime.export.save import export
        from ..runtime.onnx.folder import FORMAT
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "onnxruntime"):
            raise
        raise OptionError(f"exporting needs {error.name}: pip install 'onward[onnx]'") from error
    check_folder(output, replace=force, format=FORMAT)
    if data_file is not None:
        check_writable(data_file)
    recipe = recipe_for(model)
    given: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "optimizer": optimizer}
    training = replace(recipe.training, **{name: value for name, value in given.items() if value is not None})
    setup = set_up(replace(recipe, training=training), common)
    check_loss(setup)
    batch, target = setup.dataset.batch(training.batch_size)
    with fitting(setup):
        program = compile_program(
            setup.model, batch, loss=setup.dataset.loss, estimator=setup.estimator, seed=common.seed,
            unbatched=setup.dataset.unbatched,
        )  # fmt: skip
    settings = {
        "training": asdict(training),
        "data": setup.dataset.name,
        "model_options": common.model_option or [],
        "freeze": common.freeze or [],
    }
    made = export(
        program, make_optimizer(setup.model, training), batch, target, output, name=model, settings=settings,
        replace=force,
    )  # fmt: skip
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{output}: {len(made.manifest['tasks'])} tasks, {made.files} files, {quantity(made.bytes)}B")
    if training.augment != "none":
        console.print(f"The recipe augments its samples ({training.augment}); on ONNX Runtime they are as they are.")
    if data_file is not None:
        _write(setup.dataset, data_file)
        console.print(f"{data_file}: {setup.dataset.name}")


def _write(dataset: Dataset, path: Path) -> None:
    """The data set's arrays, as `runtime.onnx.data` reads them."""
    arrays: dict[str, Any] = {}
    for split, suffix in ((dataset.train, ""), (dataset.test, "_test")):
        x, y = (tensor.cpu().numpy() for tensor in split.tensors)
        arrays |= {f"x{suffix}": x, f"y{suffix}": y}
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)
