"""``onward compile``: write a compiled program to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Argument, Option

from ..compiler.save import check_folder, save_program
from ..runtime.plan import format_plan, make_plan
from ..runtime.versions import versions
from .common import compile_setup, set_up
from .options import MODEL_HELP, Common, with_common
from .recipes import recipe_for


@with_common
def compile_(
    common: Common,
    model: Annotated[str, Argument(metavar="MODEL", help=MODEL_HELP)],
    output: Annotated[
        Path, Option("--output", "-o", metavar="DIR", help="Folder to write. It appears whole or not at all.")
    ],
    force: Annotated[
        bool, Option("--force", help="Replace what was compiled into DIR before. Nothing else is ever replaced.")
    ] = False,
) -> None:
    """Compile a model and write the program: the graph after every pass, stages, runs, gradients, and a manifest.

    Every graph is a Python file that can be read and run; manifest.json says which value goes from which to which.

    [bold]Example[/bold]

      onward compile resnet5 --data digits -o out/resnet5
    """
    check_folder(output, replace=force)
    setup = set_up(recipe_for(model), common)
    compiled = compile_setup(setup)
    manifest = save_program(
        compiled,
        output,
        name=model,
        plan=format_plan(make_plan(compiled)),
        versions=versions(),
        settings={
            "data": setup.dataset.name,
            "model_options": common.model_option or [],
            "freeze": common.freeze or [],
            "seed": common.seed,
        },
        replace=force,
    )
    counts = {part: len(manifest[part]) for part in ("passes", "stages", "runs", "gradients")}
    Console(highlight=False).print(
        f"{output}: {', '.join(f'{count} {part}' for part, count in counts.items())}, manifest.json", soft_wrap=True
    )
