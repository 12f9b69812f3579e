"""The user's loss as one number a sample, or one a batch."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.errors import LossShapeError

Loss = Callable[[Any, Any], Any]


class SampleLoss:
    """``(output, target) -> (N,)``: the loss of every sample.

    A torch loss function or module with a ``reduction`` is asked for ``"none"``, and what is left beyond the samples
    (positions, pixels) is averaged, as its mean reduction would. Anything else has to return one number a sample: a
    tensor, a NumPy array or a sequence, of any real dtype; it may be a black box and need not be traceable.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss, self.reduces = _unreduced(loss)
        self.name = getattr(loss, "__name__", type(loss).__name__)

    def __call__(self, output: Any, target: Any, samples: int) -> Tensor:
        """Raises LossShapeError unless the loss gives `samples` numbers."""
        losses = as_real(self.loss(output, target), self.name)
        if self.reduces and losses.dim() > 1:
            losses = losses.flatten(1).mean(1)
        if losses.shape != (samples,):
            raise LossShapeError(
                f"the loss {self.name} returned shape {tuple(losses.shape)} for {samples} samples; it has to return one "
                f"number a sample, shape ({samples},). Do not reduce over the batch, or, if the loss couples the samples, "
                'use LikelihoodRatio(credit="batch").'
            )
        return losses


class BatchLoss:
    """``(output, target) -> ()``: one number for the whole batch, for losses that couple samples."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.name = getattr(loss, "__name__", type(loss).__name__)

    def __call__(self, output: Any, target: Any, samples: int) -> Tensor:
        """Raises LossShapeError unless the loss gives one number."""
        value = as_real(self.loss(output, target), self.name)
        if value.numel() != 1:
            raise LossShapeError(
                f'the loss {self.name} returned shape {tuple(value.shape)}; with credit="batch" it has to return one '
                "number for the batch."
            )
        return value.reshape(())


def as_real(value: Any, name: str) -> Tensor:
    """`value` as a floating-point tensor."""
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LossShapeError(f"the loss {name} returned {type(value).__name__}, which is no number: {error}") from error
    if tensor.is_complex():
        raise LossShapeError(f"the loss {name} returned complex numbers; it has to be real.")
    return tensor.detach() if tensor.is_floating_point() else tensor.to(torch.float32)


def _unreduced(loss: Loss) -> tuple[Loss, bool]:
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        unreduced = copy.copy(loss)
        unreduced.reduction = "none"  # type: ignore[assignment]
        return unreduced, True
    try:
        parameters = inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return loss, False
    if "reduction" in parameters:
        return functools.partial(loss, reduction="none"), True
    return loss, False
