"""Models that are files, ``path/to/model.onnx``, where a command takes the name of one."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..compiler.from_onnx import OnnxModel, load
from ..compiler.from_onnx.model import fitted
from ..models import Dataset, build_for
from ..passes.errors import BatchError, OptionError, unknown_name

OPTIONS = ("logits", "outputs")
"""What ``--model-option`` may say of a file: `logits`, true unless it says otherwise; `outputs`, names with commas."""


def is_file(model: str) -> bool:
    """Whether a command's MODEL is an ONNX file, and not a name."""
    return model.endswith(".onnx")


def model_for(model: str, dataset: Dataset, **options: object) -> nn.Module:
    """The model of this name (`onward.models.build_for`) or in this file, for a data set.

    Raises:
        OnwardError: As `build_for` or `onward.compiler.from_onnx.load`; or the file's input or output does not fit the
            data set.
    """
    if not is_file(model):
        return build_for(model, dataset, **options)
    for name in options:
        if name not in OPTIONS:
            raise unknown_name(f"option of model {model!r}", name, OPTIONS)
    wanted = options.get("outputs")
    outputs = None if wanted is None else [name.strip() for name in str(wanted).split(",")]
    read = load(model, outputs=outputs, logits=bool(options.get("logits", True)))
    _check_fits(read, model, dataset)
    return read


def check_saves(model: nn.Module, name: str) -> OnnxModel:
    """`model`, if it can be written as an ONNX file.

    Raises:
        OptionError: It was not read from one.
    """
    if not isinstance(model, OnnxModel):
        raise OptionError(
            f"--save-onnx writes back a model that was read from a file: --model path/to/model.onnx. {name!r} is none."
        )
    return model


def _check_fits(read: OnnxModel, name: str, dataset: Dataset) -> None:
    """Raise OptionError unless a file's inputs are what a data set gives, and its scores are one a class."""
    example, _ = dataset.batch(2)
    inputs = example if isinstance(example, tuple) else (example,)
    if len(inputs) != len(read.inputs):
        raise OptionError(
            f"model {name!r} reads {len(read.inputs)} inputs ({', '.join(each.name for each in read.inputs)}); data "
            f"set {dataset.name!r} gives {len(inputs)}."
        )
    try:
        [fitted(one, given) for one, given in zip(read.inputs, inputs, strict=True)]
    except BatchError as error:
        raise OptionError(f"model {name!r} does not take data set {dataset.name!r}: {error}") from error
    with torch.no_grad():
        scores = read(*inputs)
    if isinstance(scores, tuple):
        raise OptionError(
            f"model {name!r} has {len(scores)} outputs ({', '.join(read.outputs)}), and the loss of a data set takes "
            f"one: --model-option outputs={read.outputs[0]}"
        )
    if dataset.num_classes and scores.dim() == 2 and scores.shape[1] != dataset.num_classes:
        raise OptionError(
            f"model {name!r} gives {math.prod(scores.shape[1:])} scores a sample; data set {dataset.name!r} has "
            f"{dataset.num_classes} classes."
        )
