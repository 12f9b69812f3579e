"""The reference beside which forward-only training is shown: the same model by backpropagation, in the same trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...compiler.capture import as_call
from ...runtime.training.batches import batch_size


class Backpropagation:
    """A program whose step is ``loss.backward()``: what `onward.Trainer` needs of one, and nothing else.

    Given the seed of a forward-only run, the trainer shows it the same batches in the same order. With `unbatched` a
    batch is one sample, a whole graph.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[Any, Any], Tensor], seed: int, *, unbatched: bool = False
    ) -> None:
        self.model = model
        self.loss = loss
        self.seed = seed
        self.unbatched = unbatched
        self.forwards = 0.0
        self.clean_forwards = 0.0

    def step(self, inputs: Any, target: Any, /) -> Tensor:
        """Add the gradient of the mean loss to every ``.grad``."""
        args, kwargs = as_call(inputs)
        loss = self.loss(self.model(*args, **kwargs), target).mean()  # of one number a sample, or of the mean itself
        loss.backward()
        self.clean_forwards += 1 if self.unbatched else batch_size(inputs, target)
        return loss.detach()

    def per_sample_loss(self, output: Any, target: Any, /) -> Tensor:
        """What the loss returns: one number a sample, or the mean of the batch."""
        return self.loss(output, target)

    def trust(self) -> dict[str, float]:
        """Every step is taken whole."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Its counters."""
        return {"seed": self.seed, "forwards": self.forwards, "clean_forwards": self.clean_forwards}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Restore `state_dict`'s result."""
        self.seed, self.forwards, self.clean_forwards = state["seed"], state["forwards"], state["clean_forwards"]
