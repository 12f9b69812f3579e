"""What the trainer and its checkpoints need of a compiled program."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ..execution.step import Updates


class CheckpointedProgram(Protocol):
    """What a checkpoint needs of a compiled program."""

    model: nn.Module
    seed: int

    def state_dict(self) -> dict[str, Any]:
        """Everything beyond the model's own state: step count, forwards spent, learned tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Take over what `state_dict` gave. The tensors are on the CPU, and the program's to keep."""
        ...


class TrainableProgram(CheckpointedProgram, Protocol):
    """What the trainer needs of a compiled program."""

    forwards: float
    """Perturbed forwards spent so far, in samples × copies."""
    clean_forwards: float
    """Unperturbed forwards spent so far, in samples."""

    def step(self, inputs: Any, target: Any, /) -> Tensor:
        """Add to ``.grad`` of every trainable parameter; return the mean loss, 0-d."""
        ...

    def per_sample_loss(self, output: Any, target: Any, /) -> Tensor:
        """The loss of each sample, (N,), or of the batch, 0-d."""
        ...

    def trust(self) -> dict[str, float]:
        """The share of its step that each parameter named takes; parameters not named take all of it."""
        ...


@runtime_checkable
class ChasingProgram(TrainableProgram, Protocol):
    """A program whose step can begin with the optimizer's updates after the step before."""

    def step(self, inputs: Any, target: Any, /, *, updates: Updates | None = None) -> Tensor:
        """As ever, on the updated weights; when it returns or raises, all updates are done."""
        ...

    def waits(self, *, perturbed: bool | None = None) -> str:
        """Why a step with or without a perturbed run (None: the next) waits for all updates before its tasks; "" if it
        does not."""
        ...

    def measures(self, *, perturbed: bool) -> bool:
        """Whether that is still being measured."""
        ...
