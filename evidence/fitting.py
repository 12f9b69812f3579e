"""Whether a model and a data set fit each other, asked before hours of work."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models import Dataset
from ..passes.errors import OptionError
from .baselines.layers import forward_once

FEW = 2
"""Samples that are tried."""


def check_classifies(model: nn.Module, dataset: Dataset) -> None:
    """Raise OptionError unless the model runs on the data set's inputs and returns a number for each of its classes;
    or if the data set is one whole graph.

    The model's buffers and the global random numbers are as before.
    """
    if dataset.unbatched:
        raise OptionError(
            f"{dataset.name!r} is one whole graph; what is measured here is over many samples. "
            "`onward train --compare-bp` shows a graph beside backpropagation."
        )
    inputs = dataset.train.tensors[0][:FEW]
    name = type(model).__name__
    try:
        output = forward_once(model, inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise OptionError(
            f"{name} does not run on {dataset.name!r}, whose inputs are {tuple(inputs.shape[1:])} of "
            f"{str(inputs.dtype).removeprefix('torch.')}: {error}"
        ) from error
    if not isinstance(output, Tensor) or output.shape[:1] != (len(inputs),):
        shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise OptionError(f"{name} returns {shown} for {len(inputs)} samples; a tensor with a row a sample is needed.")
    classes = 0 if output.dim() < 2 else max(output.shape[1], output.shape[-1])  # as `accuracy` finds them
    if classes < dataset.num_classes or not torch.is_floating_point(output):
        raise OptionError(
            f"{name} returns {tuple(output.shape)} of {str(output.dtype).removeprefix('torch.')} for {len(inputs)} "
            f"samples; {dataset.name!r} has {dataset.num_classes} classes and needs that many floating-point numbers."
        )
