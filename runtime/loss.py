"""The user's loss as one number a sample, or one a batch."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.errors import LossShapeError, OptionError
from .targets import repeat_target

Loss = Callable[[Any, Any], Any]


class SampleLoss:
    """``(output, target) -> (N,)``: the loss of every sample.

    A torch loss function or module with a ``reduction`` is asked for ``"none"``, and what is left beyond the samples
    (positions, pixels) is averaged, or summed where its reduction is ``"sum"`` or ``"batchmean"``; the samples are
    always averaged. (Class weights and ``ignore_index`` therefore scale a sample's loss but do not change what the
    batch is divided by.) Anything else has to return one number a sample: a tensor, a NumPy array or a sequence, of any
    real dtype; it may be a black box and need not be traceable.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss, self.reduction = _unreduced(loss)
        self.name = getattr(loss, "__name__", type(loss).__name__)

    def __call__(self, output: Any, target: Any, samples: int) -> Tensor:
        """Raises LossShapeError unless the loss gives `samples` numbers."""
        losses = self.reduce_positions(as_real(self.loss(output, target), self.name))
        if losses.shape != (samples,):
            raise LossShapeError(
                f"the loss {self.name} returned shape {tuple(losses.shape)} for {samples} samples; it has to return "
                f"one number a sample, shape ({samples},). {_advice(losses, samples)}"
            )
        return losses

    def repeat(self, target: Any, copies: int, samples: int) -> Any:
        """The target for every copy."""
        return repeat_target(target, copies, samples)

    def reduce_positions(self, losses: Tensor) -> Tensor:
        """``(N, …)`` to ``(N,)`` for a torch loss that was asked not to reduce; anything else as it is."""
        if not self.reduction or losses.dim() <= 1:
            return losses
        losses = losses.flatten(1)
        return losses.sum(1) if self.reduction in ("sum", "batchmean") else losses.mean(1)


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


def _advice(losses: Tensor, samples: int) -> str:
    """What to do about losses of another shape."""
    if losses.dim() > 1 and losses.shape[0] == samples:
        return "Average or sum what each has at its positions: losses.flatten(1).mean(1)."
    if losses.numel() > samples and losses.numel() % samples == 0:
        return (
            f"It looks like {losses.numel() // samples} numbers a sample; if the samples come first, average them: "
            f"losses.reshape({samples}, -1).mean(1), with len(output) in place of {samples}."
        )
    return 'Do not reduce over the batch, or, if the loss couples the samples, use LikelihoodRatio(credit="batch").'


def check_loss(loss: Any) -> None:
    """Raises OptionError unless `loss` can be called as ``loss(output, target)``."""
    if not callable(loss):
        raise OptionError(f"loss is {type(loss).__name__}; it has to be callable as loss(output, target).")
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except (TypeError, ValueError):  # none to be had
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise OptionError(
            f"the loss {name} takes ({', '.join(signature.parameters)}) and cannot be called as loss(output, target): "
            f"{error}. Wrap it in a function that takes these two and returns one loss a sample, for example lambda "
            'output, target: F.triplet_margin_loss(*output, reduction="none"); CTC is onward.losses.ctc.'
        ) from error


def as_real(value: Any, name: str) -> Tensor:
    """`value` as a tensor of its own (a loss may reuse its memory) of at least single precision."""
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LossShapeError(f"the loss {name} returned {type(value).__name__}, which is no number: {error}") from error
    if tensor.is_complex():
        raise LossShapeError(f"the loss {name} returned complex numbers; it has to be real.")
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32, copy=True)


def _unreduced(loss: Loss) -> tuple[Loss, str]:
    """The loss without its reduction, and the name of that (``""`` if it has none)."""
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        unreduced = copy.copy(loss)
        unreduced.reduction = "none"  # type: ignore[assignment]
        return unreduced, str(loss.reduction)
    try:
        parameters = inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return loss, ""
    if "reduction" in parameters:
        asked: Loss = functools.partial(loss, reduction="none")  # type: ignore[call-arg]
        return asked, str(parameters["reduction"].default)
    return loss, ""
