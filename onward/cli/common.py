"""From options to objects: the data, the model, the estimator, the program."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ..compiler.driver import compile_model
from ..compiler.estimator import SEGMENTS, LikelihoodRatio
from ..compiler.program import CompiledModel
from ..freezing import freeze
from ..models import MODELS, Dataset, load, twin_of
from ..passes.errors import BatchError, CaptureError, DataError, OptionError
from ..runtime.calibration.record import Calibration
from .onnx_models import model_for
from .options import Common
from .recipes import Recipe, recipe_for, see_working_directory

DEVICES = ("cpu", "cuda")

AUTO = LikelihoodRatio.auto()

PLAIN = LikelihoodRatio(groups="layerwise", copies=64, sigma=0.1)
"""In place of a recipe's learned feedback where options ask for what that does not have."""

Value = TypeVar("Value", int, float, str)


@dataclass(frozen=True)
class Setup:
    """What a command works on."""

    dataset: Dataset
    model: nn.Module
    example: Any
    estimator: LikelihoodRatio | Calibration
    recipe: Recipe
    """With the options' data and model options in place of its own."""
    twin: Callable[[], nn.Module]
    """Makes what backpropagation trains in the model's place, from the weights that the model has then."""


def set_up(recipe: Recipe, common: Common, batch_size: int | None = None) -> Setup:
    """Data, model and estimator as the recipe says, and before it the options; `batch_size` is that of the example."""
    estimator = make_estimator(common, recipe.estimator)  # first: it is quick, and most mistakes are there
    device = find_device(common.device)
    if common.threads is not None:
        if common.threads < 1:
            raise OptionError(f"--threads {common.threads}: at least one thread is needed.")
        torch.set_num_threads(common.threads)
    see_working_directory(recipe.model)
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"--batch-size {batch_size}: a batch needs at least one sample.")
    options = {**recipe.model_options, **parse_options(common.model_option or [])}
    dataset = on_device(_load(recipe, common.data), device)
    recipe = replace(recipe, data=dataset.name, model_options=options)
    built = build_model(recipe, dataset, common.seed, common.freeze).to(device)
    example, _ = dataset.batch(batch_size or recipe.training.batch_size)
    twin = functools.partial(twin_of, recipe.model, dataset, built, **options)
    return Setup(dataset, built, example, estimator, recipe, twin)


def build_model(
    recipe: Recipe, dataset: Dataset, seed: int, frozen: Sequence[str] | None = None, **options: object
) -> nn.Module:
    """A recipe's model for a data set, its weights from the seed; `options` go before the recipe's."""
    torch.manual_seed(seed)
    built = model_for(recipe.model, dataset, **{**recipe.model_options, **options})
    if frozen:
        freeze(built, *frozen)
    return built


def _load(recipe: Recipe, data: str | None) -> Dataset:
    try:
        return load(data or recipe.data)
    except DataError as error:
        if data not in (None, recipe.data) or recipe.twin is None:
            raise
        raise DataError(
            f"{error} The recipe {recipe.twin!r} is the twin of {recipe.name!r} on data that need no network: onward "
            f"train --recipe {recipe.twin}"
        ) from error


def make_estimator(common: Common, base: LikelihoodRatio = AUTO) -> LikelihoodRatio | Calibration:
    """The estimator: a calibration (``--calibration``), or what is given, else ``--alr``, else the recipe's.

    Options that learned feedback cannot have (``--groups layerwise``, ``--capture sign``, …) choose the plain
    estimator in its place.
    """
    given: dict[str, Any] = {
        "noise": common.noise,
        "score": common.score,
        "capture": common.capture,
        "groups": None if common.groups is None else parse_groups(common.groups),
        "copies": common.copies,
        "sigma": None if not common.sigma else parse_sigma(common.sigma),
        "blocks": None if not common.blocks else parse_blocks(common.blocks),
        "antithetic": common.antithetic,
        "chunk": common.chunk,
        "credit": common.credit,
        "sampling": common.sampling,
        "placement": common.placement,
        "noise_on": None if not common.noise_on else _by_site("--noise-on", common.noise_on, str, "a name"),
        "feedback": common.feedback,
        "correction": common.correction,
        "reach": None if common.reach is None else parse_number(common.reach),
        "segments": None if common.segments is None else parse_segments(common.segments),
        "probe": common.probe,
        "probe_every": None if common.probe_every is None else parse_number(common.probe_every),
        "warmup": common.warmup,
        "trust": common.trust,
        "rank": common.rank,
        "feedback_memory": common.feedback_memory,
        "recompute": common.recompute or None,
    }
    settings = {key: value for key, value in given.items() if value is not None}
    if common.calibration is not None:
        if settings or common.alr:
            more = ", ".join(["--alr"] * common.alr + [f"--{name.replace('_', '-')}" for name in settings])
            raise OptionError(f"--calibration holds the estimator's settings; edit the file in place of {more}.")
        return Calibration.load(common.calibration)
    if common.alr:
        return LikelihoodRatio.alr(**settings)
    if base.feedback == "learned" and _without_feedback(settings):
        base = PLAIN
    if settings.get("correction", "none") != "none":
        settings.setdefault("probe_every", 1)  # it needs copies every step
        settings.setdefault("blocks", 1)  # and is unbiased for blocks' means only
    return replace(base, **settings)


def settings_of(estimator: LikelihoodRatio | Calibration) -> LikelihoodRatio:
    """The settings themselves."""
    return estimator.estimator if isinstance(estimator, Calibration) else estimator


def compile_setup(setup: Setup) -> CompiledModel:
    """The model compiled as the options say."""
    with fitting(setup):
        if isinstance(setup.estimator, Calibration):
            return setup.estimator.compile(setup.model, setup.example, unbatched=setup.dataset.unbatched)
        return compile_model(setup.model, setup.example, setup.estimator, unbatched=setup.dataset.unbatched)


@contextmanager
def fitting(setup: Setup) -> Iterator[None]:
    """Inside, an error of a model that does not take what the data set gives says what that is, and what would fit."""
    try:
        yield
    except (BatchError, CaptureError) as error:
        raise type(error)(f"{error}\n{_misfit(setup)}") from error


def check_loss(setup: Setup) -> None:
    """Run the model on the example and the data set's loss on what it gives, which leaves the model as it was.

    Raises:
        OptionError: The loss cannot be computed of that output and the data set's targets.
    """
    example, target = setup.dataset.batch(setup.recipe.training.batch_size)
    buffers = {name: buffer.clone() for name, buffer in setup.model.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng():
        inputs = example if isinstance(example, tuple) else (example,)
        output = torch.func.functional_call(setup.model, buffers, inputs)
        try:
            setup.dataset.loss(output, target)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            given = _described(output) if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
            raise OptionError(
                f"the loss of the data set does not take the model's output, {given}, with its targets, "
                f"{_described(target)}: {error}\n{_misfit(setup)}"
            ) from error


def _misfit(setup: Setup) -> str:
    recipe, example = setup.recipe, setup.example
    inputs = " and ".join(map(_described, example if isinstance(example, tuple) else (example,)))
    own = recipe_for(recipe.model).data
    fits = f" The model's own recipe is on {own!r}." if recipe.model in MODELS and own != recipe.data else ""
    return f"Model {recipe.model!r} on data {recipe.data!r}, whose inputs are {inputs}.{fits}"


def _described(tensor: torch.Tensor) -> str:
    """A tensor's dtype and shape: ``float32 [32, 1, 8, 8]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _without_feedback(settings: dict[str, Any]) -> bool:
    """Whether options ask for what learned feedback does not have, and none of them for feedback itself."""
    needs = {"feedback": "learned", "groups": "joint", "capture": "exact", "score": "exact",
             "credit": "sample", "antithetic": True, "noise_on": "output", "sampling": "all"}  # fmt: skip
    differs = any(name in settings and settings[name] != needed for name, needed in needs.items())
    differs = differs or settings.get("placement") == "operation"
    return differs and settings.get("feedback") != "learned"


def parse_groups(text: str) -> str | list[list[str]]:
    """``joint``, ``layerwise``, or groups of site names: ``stem,block.*;head``."""
    if not any(character in text for character in ",;*?"):
        return text
    return [[name.strip() for name in group.split(",") if name.strip()] for group in text.split(";") if group.strip()]


def parse_segments(text: str) -> str | int | list[str]:
    """``op``, ``auto``, a number of segments, or module names: ``blocks.*,head``."""
    number = parse_number(text)
    if isinstance(number, int):
        return number
    return text if text in SEGMENTS else [name.strip() for name in text.split(",")]


def parse_number(text: str) -> int | str:
    """A whole number, or a word for the estimator to know."""
    try:
        return int(text)
    except ValueError:
        return text


def parse_sigma(values: list[str]) -> float | str | dict[str, float]:
    """``auto``, one number, or a number for each pattern of site names."""
    if values == ["auto"]:
        return "auto"
    return _by_site("--sigma", values, float, "a number")


def parse_blocks(values: list[str]) -> int | str | dict[str, int]:
    """``auto``, one number, or a number for each pattern of site names."""
    if values == ["auto"]:
        return "auto"
    return _by_site("--blocks", values, int, "a whole number")


def _by_site(
    option: str, values: list[str], convert: Callable[[str], Value], expected: str
) -> Value | dict[str, Value]:
    numbers: dict[str, Value] = {}
    for value in values:
        pattern, equals, number = value.rpartition("=")
        try:
            numbers[pattern if equals else "*"] = convert(number)
        except ValueError:
            raise OptionError(f"{option} {value!r}: expected {expected}, or PATTERN=NUMBER.") from None
    if "*" in numbers:
        numbers["*"] = numbers.pop("*")  # the first match counts: what holds for all others comes last
    return numbers["*"] if list(numbers) == ["*"] else numbers


def parse_options(pairs: list[str]) -> dict[str, object]:
    """``key=value`` pairs; a value is a Python literal (``64``, ``(128, 64)``, ``true``) or a string."""
    words: dict[str, object] = {"true": True, "false": False, "none": None}
    options: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise OptionError(f"--model-option {pair!r}: expected KEY=VALUE, for example width=32.")
        try:
            options[key] = words[value.lower()] if value.lower() in words else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def find_device(name: str) -> torch.device:
    """The device, if it is there."""
    if name.partition(":")[0] not in DEVICES:
        raise OptionError(f"--device {name!r}: known are {', '.join(DEVICES)}.")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device {name!r}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"--device {name}: torch {torch.__version__} finds no CUDA device here. Use --device cpu.")
    return device


def on_device(dataset: Dataset, device: torch.device) -> Dataset:
    """The data set with its tensors on `device`."""
    if device.type == "cpu":
        return dataset
    train, test = (TensorDataset(*(t.to(device) for t in split.tensors)) for split in (dataset.train, dataset.test))
    edges = None if dataset.edge_index is None else dataset.edge_index.to(device)
    return replace(dataset, train=train, test=test, edge_index=edges)


def to_json(value: Any) -> str:
    """`value` as readable JSON, numbers that are not finite as null."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
