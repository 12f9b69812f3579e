"""From options to objects: the data, the model, the estimator, the program."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..compiler.estimator import LikelihoodRatio
from ..models import Dataset, build_for, load
from ..passes.errors import OptionError, OutputError
from .options import Common
from .recipes import Recipe, recipe_for

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Setup:
    """What a command works on."""

    dataset: Dataset
    model: nn.Module
    example: Tensor
    estimator: LikelihoodRatio
    recipe: Recipe


def set_up(model: str, common: Common, batch_size: int | None = None) -> Setup:
    """Data, model and estimator as the options say; `batch_size` is that of the example."""
    recipe = recipe_for(model)
    estimator = make_estimator(common, recipe)  # first: it is quick, and most mistakes are there
    device = find_device(common.device)
    if common.threads is not None:
        if common.threads < 1:
            raise OptionError(f"--threads {common.threads}: at least one thread is needed.")
        torch.set_num_threads(common.threads)
    if ":" in model and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"--batch-size {batch_size}: a batch needs at least one sample.")
    dataset = on_device(load(common.data), device)
    torch.manual_seed(common.seed)
    built = build_for(model, dataset, **parse_options(common.model_option or [])).to(device)
    example = dataset.train.tensors[0][: batch_size or recipe.batch_size]
    return Setup(dataset, built, example, estimator, recipe)


def make_estimator(common: Common, recipe: Recipe) -> LikelihoodRatio:
    """The estimator: what is given, else the paper's setting (``--alr``), else the recipe's.

    Options that learned feedback cannot have (``--groups layerwise``, ``--capture sign``, …) choose the plain
    estimator.
    """
    given: dict[str, Any] = {
        "noise": common.noise,
        "score": common.score,
        "capture": common.capture,
        "groups": None if common.groups is None else parse_groups(common.groups),
        "copies": common.copies,
        "sigma": None if not common.sigma else parse_sigma(common.sigma),
        "antithetic": common.antithetic,
        "chunk": common.chunk,
        "credit": common.credit,
        "placement": common.placement,
        "feedback": common.feedback,
        "correction": common.correction,
        "reach": common.reach,
        "probe": common.probe,
        "warmup": common.warmup,
        "trust": common.trust,
    }
    settings = {key: value for key, value in given.items() if value is not None}
    if common.alr:
        return LikelihoodRatio.alr(**settings)
    return LikelihoodRatio(**{**(recipe.plain if _without_feedback(settings) else recipe.estimator), **settings})


def _without_feedback(settings: dict[str, Any]) -> bool:
    """Whether options ask for what learned feedback does not have, and none of them for feedback itself."""
    needs = {"feedback": "learned", "placement": "alive", "groups": "joint", "capture": "exact", "score": "exact",
             "credit": "sample", "antithetic": True}  # fmt: skip
    differs = any(name in settings and settings[name] != needed for name, needed in needs.items())
    return differs and settings.get("feedback") != "learned"


def parse_groups(text: str) -> str | list[list[str]]:
    """``joint``, ``layerwise``, or groups of site names: ``stem,block.*;head``."""
    if not any(character in text for character in ",;*?"):
        return text
    return [[name.strip() for name in group.split(",") if name.strip()] for group in text.split(";") if group.strip()]


def parse_sigma(values: list[str]) -> float | dict[str, float]:
    """One number, or a number for each pattern of site names."""
    sigmas: dict[str, float] = {}
    for value in values:
        pattern, equals, number = value.rpartition("=")
        try:
            sigmas[pattern if equals else "*"] = float(number)
        except ValueError:
            raise OptionError(f"--sigma {value!r}: expected a number, or PATTERN=NUMBER.") from None
    return sigmas["*"] if list(sigmas) == ["*"] else sigmas


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
    return replace(dataset, train=train, test=test)


def check_writable(path: Path) -> None:
    """Raise `OutputError` if `write_whole` could not write `path`: before the work, not after it."""
    _replace(path, None)


def write_whole(path: Path, content: str) -> None:
    """Write `path` in one rename, its folder made if missing.

    Raises:
        OutputError: it cannot be written. What was there stays.
    """
    _replace(path, content)


def _replace(path: Path, content: str | None) -> None:
    target = Path(os.path.abspath(path))
    if target.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder.")
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".tmp-{target.name}-", dir=target.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content or "")
            file.flush()
            os.fsync(file.fileno())
        if content is not None:
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, target)
            temporary = None
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def to_json(value: Any) -> str:
    """`value` as readable JSON, numbers that are not finite as null."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
