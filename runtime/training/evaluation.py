"""Loss and metrics over a loader, in evaluation mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...compiler.capture import as_call
from ...passes.errors import DataError, OptionError
from .batches import batch_size

Metric: TypeAlias = Callable[[Any, Any], Tensor]


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of right answers of each sample, (N,): class scores against whole class numbers (N, …).

    The scores are (N, C, …), as of torch's own losses, or else (N, …, C), as of a language model. Where both would do,
    because there are as many classes as positions, they are taken for (N, C, …). Positions whose class is -100, the
    ``ignore_index`` of torch's cross-entropy, do not count, and samples without any other are left out.
    """
    places = [dim for dim in (1, -1) if output.dim() > 1 and without(output.shape, dim) == target.shape]
    if target.is_floating_point() or not places:
        raise OptionError(
            "the metric 'accuracy' compares class scores (N, C, …) or (N, …, C) with whole class numbers (N, …), not "
            f"{output.dtype} {list(output.shape)} with {target.dtype} {list(target.shape)}. "
            "Pass metrics=None or metrics={name: function}."
        )
    right = (output.argmax(places[0]) == target).double().reshape(target.shape[0], -1)
    counted = (target != IGNORED).reshape(right.shape)
    if bool(counted.all()):
        return right.mean(1)
    kept = counted.any(1)
    return (right.sum(1) / counted.sum(1))[kept]


IGNORED = -100


def without(shape: torch.Size, dim: int) -> torch.Size:
    """A shape without one of its dimensions, which may be counted from the end."""
    return torch.Size(size for place, size in enumerate(shape) if place != dim % len(shape))


METRICS: dict[str, Metric] = {"accuracy": accuracy}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each module's ``training`` flag is what it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def evaluate(
    model: nn.Module,
    per_sample_loss: Callable[[Any, Any], Tensor],
    metrics: Mapping[str, Metric],
    batches: Iterable[tuple[Any, Any]],
) -> dict[str, float]:
    """The mean "loss" over the samples of all ``(inputs, target)``, and every metric, without gradients.

    Afterwards each module's ``training`` flag is what it was. Raises `DataError` if there is no batch.
    """
    sums: dict[str, float] = dict.fromkeys(("loss", *metrics), 0.0)
    counts = dict.fromkeys(sums, 0)
    with evaluating(model), torch.no_grad():
        for inputs, target in batches:
            args, kwargs = as_call(inputs)
            output = model(*args, **kwargs)
            count = batch_size(inputs, target)
            found = {"loss": per_sample_loss(output, target)}
            found |= {name: torch.as_tensor(metric(output, target)) for name, metric in metrics.items()}
            for name, value in found.items():
                of = len(value) if name != "loss" and value.dim() else count  # a metric may leave samples out
                sums[name] += float(value.double().mean()) * of if of else 0.0
                counts[name] += of
    if counts["loss"] == 0:
        raise DataError("the loader to evaluate on gave no batch")
    return {name: value / counts[name] if counts[name] else math.nan for name, value in sums.items()}
