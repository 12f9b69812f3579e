"""Options that several commands share: dataclasses whose fields become a command's options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from typer import Option

from ..passes.errors import OnwardError

MODEL_HELP = (
    "A model of the zoo (`onward models`), package.module:factory, found from the working directory, or "
    "path/to/model.onnx."
)

_MODEL = "Model and data"
_ESTIMATOR = "Estimator"
_FEEDBACK = "Learned feedback"
_RUN = "Run"


@dataclass(frozen=True)
class Common:
    """Options of every command that compiles a model."""

    model_option: Annotated[
        list[str] | None,
        Option(metavar="KEY=VALUE", help="Argument of the model's factory; may be repeated.", rich_help_panel=_MODEL),
    ] = None
    freeze: Annotated[
        list[str] | None,
        Option(
            metavar="PATTERN",
            help="Parameters, or modules with all of theirs, that stay as they are: 'stem', 'blocks.[01]', '*.bias'; "
            "may be repeated. What runs before the first that trains is run once for all copies.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    data: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="Data set (`onward data`). [dim]\\[default: of the model, digits for your own][/dim]",
            rich_help_panel=_MODEL,
        ),
    ] = None
    alr: Annotated[
        bool,
        Option(
            "--alr",
            help="The setting of Approximated Likelihood Ratio (arXiv 2403.12320), as we read it: Gaussian noise, sign "
            "score, sign capture, joint. The options below still change it.",
            rich_help_panel=_ESTIMATOR,
        ),
    ] = False
    calibration: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="The estimator that `onward inspect MODEL --calibrate -o FILE` chose; in place of the options below.",
            rich_help_panel=_ESTIMATOR,
        ),
    ] = None
    noise: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="gaussian, laplace or rademacher. [dim]\\[default: rademacher][/dim]",
            rich_help_panel=_ESTIMATOR,
        ),
    ] = None
    score: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="exact, or sign: weight by one bit of the noise. [dim]\\[default: exact][/dim]",
            rich_help_panel=_ESTIMATOR,
        ),
    ] = None
    capture: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="What is kept of an activation: exact, sign (one bit, biased), stochastic (one bit, unbiased) or "
            "stochastic-2, -4, -8 (so many bits, unbiased). "
            "[dim]\\[default: exact][/dim]",
            rich_help_panel=_ESTIMATOR,
        ),
    ] = None
    groups: Annotated[
        str | None,
        Option(
            metavar="GROUPS",
            help="layerwise (one site a run), joint (all at once), or a partition: 'stem,block.*;head'. "
            "[dim]\\[default: joint][/dim]",
            rich_help_panel=_ESTIMATOR,
        ),
    ] = None
    copies: Annotated[
        int | None,
        Option(
            help="Perturbed copies of the batch a group and step. [dim]\\[default: 4][/dim]",
            rich_help_panel=_ESTIMATOR,
        ),
    ] = None
    sigma: Annotated[
        list[str] | None,
        Option(
            metavar="NUMBER",
            help="Standard deviation of the noise; auto: measured; or for some sites only, repeated: 'block.*=0.05', "
            "'*=0.1'. [dim]\\[default: auto][/dim]",
            rich_help_panel=_ESTIMATOR,
        ),
    ] = None
    blocks: Annotated[
        list[str] | None,
        Option(
            metavar="NUMBER",
            help="Positions along each axis that share a number of noise: 2 is 2 x 2 pixels, or 2 tokens (biased: the "
            "block's mean gradient); auto: a quarter of an image's largest map, at least 4; or for some sites only, "
            "repeated: 'stem=4'. Not with --placement operation. "
            "[dim]\\[default: auto][/dim]",
            rich_help_panel=_ESTIMATOR,
        ),
    ] = None
    antithetic: Annotated[
        bool | None,
        Option(
            "--antithetic/--no-antithetic",
            help="Run every noise with both signs. [dim]\\[default: antithetic][/dim]",
            rich_help_panel=_ESTIMATOR,
        ),
    ] = None
    chunk: Annotated[
        int | None,
        Option(
            help="Copies that run side by side: bounds memory, does not change the noise. [dim]\\[default: all][/dim]",
            rich_help_panel=_ESTIMATOR,
        ),
    ] = None
    credit: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="sample: each sample's loss for its own noise; batch: one loss for the whole batch. "
            "[dim]\\[default: sample][/dim]",
            rich_help_panel=_ESTIMATOR,
        ),
    ] = None
    sampling: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="all: every sample is perturbed; error: each with a probability proportional to its error, unbiased "
            "and cheaper the fewer samples are still wrong. [dim]\\[default: all][/dim]",
            rich_help_panel=_ESTIMATOR,
        ),
    ] = None
    placement: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="operation: noise on every coordinate of every site; alive: not where the next operation blocks it, "
            "and one noise for sites that meet in a sum; narrow: and behind what pools them. "
            "[dim]\\[default: alive][/dim]",
            rich_help_panel=_ESTIMATOR,
        ),
    ] = None
    noise_on: Annotated[
        list[str] | None,
        Option(
            metavar="NAME",
            help="output, weight (one draw for all samples), sample (a draw each), rank-one, or auto: sample for "
            "convolutions of large maps; or for some sites only, repeated: 'stem=sample'. "
            "[dim]\\[default: output][/dim]",
            rich_help_panel=_ESTIMATOR,
        ),
    ] = None
    feedback: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="none, or learned: predict each gradient from the clean run by a mean Jacobian that the perturbed "
            "runs teach; needs --groups joint. [dim]\\[default: learned; an option that it cannot "
            "have chooses none, and layerwise, 64 copies, sigma 0.1 in place of the defaults here][/dim]",
            rich_help_panel=_FEEDBACK,
        ),
    ] = None
    correction: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="With feedback, none (biased), full (unbiased, noisier) or shrunk (between them, biased). "
            "[dim]\\[default: none][/dim]",
            rich_help_panel=_FEEDBACK,
        ),
    ] = None
    reach: Annotated[
        str | None,
        Option(
            metavar="HOPS",
            help="With feedback, how many noise points on a gradient is predicted, and pulled back from by local "
            "backpropagation; 0 has none; auto: 1, or 2 around attention. [dim]\\[default: auto][/dim]",
            rich_help_panel=_FEEDBACK,
        ),
    ] = None
    segments: Annotated[
        str | None,
        Option(
            metavar="SEGMENTS",
            help="With feedback, what one gradient subgraph covers: op (one operation), a number of stretches, auto "
            "(one operation, but whole blocks around attention and gates), or module names: 'blocks.*,head'. Inside, "
            "local backpropagation. "
            "[dim]\\[default: auto][/dim]",
            rich_help_panel=_FEEDBACK,
        ),
    ] = None
    probe: Annotated[
        float | None,
        Option(
            help="With feedback, the share of the batch that is perturbed. [dim]\\[default: 1][/dim]",
            rich_help_panel=_FEEDBACK,
        ),
    ] = None
    probe_every: Annotated[
        str | None,
        Option(
            metavar="STEPS",
            help="With feedback, steps from one perturbed run to the next, or auto: rare once it explains much. "
            "[dim]\\[default: auto][/dim]",
            rich_help_panel=_FEEDBACK,
        ),
    ] = None
    warmup: Annotated[
        int | None,
        Option(
            metavar="STEPS",
            help="With feedback, first steps that only learn it. [dim]\\[default: 20][/dim]",
            rich_help_panel=_FEEDBACK,
        ),
    ] = None
    rank: Annotated[
        int | None,
        Option(
            metavar="NUMBER",
            help="With feedback, directions of the outputs along which it is learned, where the errors are largest "
            "(biased). [dim]\\[default: all outputs, or as many as fit][/dim]",
            rich_help_panel=_FEEDBACK,
        ),
    ] = None
    feedback_memory: Annotated[
        int | None,
        Option(
            metavar="MIB",
            help="With feedback, MiB that it may take. [dim]\\[default: 512][/dim]",
            rich_help_panel=_FEEDBACK,
        ),
    ] = None
    recompute: Annotated[
        bool,
        Option(
            "--recompute",
            help="Compute activations inside a segment, or within its reach, again from its inputs: less memory, more "
            "time.",
            rich_help_panel=_FEEDBACK,
        ),
    ] = False
    trust: Annotated[
        bool | None,
        Option(
            "--trust/--no-trust",
            help="With feedback, scale each site's steps by how well it predicts. [dim]\\[default: trust][/dim]",
            rich_help_panel=_FEEDBACK,
        ),
    ] = None
    seed: Annotated[
        int, Option(help="Seed of the weights, the order of the data and the noise.", rich_help_panel=_RUN)
    ] = 0
    device: Annotated[str, Option(help="cpu or cuda.", rich_help_panel=_RUN)] = "cpu"
    threads: Annotated[
        int | None,
        Option(help="Threads of torch's operations. [dim]\\[default: torch's own][/dim]", rich_help_panel=_RUN),
    ] = None
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.", rich_help_panel=_RUN)] = False


def with_common(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command`, whose first parameter is a `Common`, the options of it in place of that parameter.

    An `OnwardError` becomes one red message and exit code 2.
    """
    signature = inspect.signature(command)
    hints = get_type_hints(command, include_extras=True)
    first, *own = signature.parameters.values()
    assert hints[first.name] is Common
    fields = dataclasses.fields(Common)
    types = get_type_hints(Common, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [inspect.Parameter(f.name, keyword, default=f.default, annotation=types[f.name]) for f in fields]
    named = [parameter.replace(kind=keyword, annotation=hints[parameter.name]) for parameter in own]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        common = Common(**{f.name: values.pop(f.name) for f in fields})
        with_errors(command, common.debug)(common, **values)

    run.__signature__ = signature.replace(parameters=[*named, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*named, *shared)}
    return run


def with_errors(command: Callable[..., None], debug: bool = False) -> Callable[..., None]:
    """`command` with every `OnwardError` as one red message and exit code 2, or with `debug` as it is."""

    @functools.wraps(command)
    def run(*args: Any, **values: Any) -> None:
        try:
            command(*args, **values)
        except OnwardError as error:
            if debug:
                raise
            Console(stderr=True, soft_wrap=True).print(
                f"error: {error}", style="bold red", markup=False, highlight=False
            )
            raise typer.Exit(2) from error

    return run
