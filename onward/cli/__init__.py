"""The command line: ``onward train | compile | export | inspect | fidelity | compare | models | data | recipes``."""

from __future__ import annotations

from collections.abc import Callable
from inspect import getdoc
from typing import Annotated

import typer

from ..runtime.versions import versions
from .compare import compare_
from .compile import compile_
from .export import export_
from .fidelity import fidelity
from .inspect import inspect
from .lists import data, models, recipes
from .train import train

app = typer.Typer(
    name="onward",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _help(documented: Callable[..., object]) -> str:
    """The docstring with the lines of each paragraph joined: rich would keep its line breaks."""
    paragraphs = (getdoc(documented) or "").split("\n\n")
    return "\n\n".join(text if text.startswith(" ") else " ".join(text.split("\n")) for text in paragraphs)


for _name, _command in (
    ("train", train),
    ("compile", compile_),
    ("export", export_),
    ("inspect", inspect),
    ("fidelity", fidelity),
    ("compare", compare_),
    ("models", models),
    ("data", data),
    ("recipes", recipes),
):
    app.command(_name, help=_help(_command))(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        found = versions()
        print(f"onward {found['onward']}, torch {found['torch']}, python {found['python']}")
        raise typer.Exit


_ABOUT = (
    "Compile a PyTorch model into a trainer that never backpropagates.\n\n"
    "Gradients come from perturbed forward runs (the likelihood-ratio method). `train` is the main job; `inspect` "
    "shows what the compiler makes of a model, or why it cannot; `compile` writes it to a folder, and `export` its "
    "training step as ONNX; `fidelity` measures its gradients beside the exact ones; `compare` races it with the "
    "methods of others."
)


@app.callback(help=_ABOUT)
def _onward(
    version: Annotated[
        bool, typer.Option("--version", help="Show versions and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """See `_ABOUT`."""


def main() -> None:
    """Entry point of the ``onward`` command."""
    app()
