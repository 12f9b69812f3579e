"""What the methods of others have in common as programs: counters, per-sample losses, randomness from (seed, step)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...compiler.capture import as_call
from ...passes.errors import CheckpointError, LossShapeError
from ...runtime.loss import Loss, SampleLoss
from .layers import gpus_of


class Baseline:
    """A program without its step (`runtime.training.trainable.TrainableProgram`).

    The gradient it estimates is that of the mean over the batch of the loss of each sample, as `onward.compile` has it.
    Whatever is random in a step follows from (seed, step): its own noise and the model's (dropout), so that a run that
    is resumed goes on as it would have.

    Attributes:
        model: trained in place.
        seed: of all randomness.
        step_count: steps taken.
        forwards: perturbed forwards spent, in samples; a forward-mode derivative is one more beside its forward.
        clean_forwards: unperturbed forwards spent, in samples.
    """

    def __init__(self, model: nn.Module, loss: Loss, seed: int) -> None:
        self.model = model
        self.seed = seed
        self.step_count = 0
        self.forwards = 0.0
        self.clean_forwards = 0.0
        self._loss = SampleLoss(loss)

    def per_sample_loss(self, output: Any, target: Any, /) -> Tensor:
        """The loss of each sample, ``(N,)``."""
        return self._loss(output, target, len(output))

    def trust(self) -> dict[str, float]:
        """Every step is taken whole."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Counters, and what the method has learned."""
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return counters | {f"tensor:{name}": value for name, value in self.learned().items()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Restore `state_dict`'s result; raises `CheckpointError` if it lacks something, and changes nothing then."""
        try:
            counters = {name: state[name] for name in _COUNTERS}
            learned = {name: state[f"tensor:{name}"] for name in self.learned()}
        except KeyError as error:
            raise CheckpointError(f"the program's state lacks {error}") from error
        for name, value in counters.items():
            setattr(self, name, value)
        for name, tensor in self.learned().items():
            tensor.copy_(learned[name])

    def learned(self) -> dict[str, Tensor]:
        """Tensors of the method's own by name, to be checkpointed."""
        return {}

    def differentiable_losses(self, output: Tensor, target: Any) -> Tensor:
        """As `per_sample_loss`, and autograd goes through it."""
        losses: Tensor = self._loss.reduce_positions(self._loss.loss(output, target))
        if losses.shape != (len(output),):
            raise LossShapeError(
                f"the loss {self._loss.name} returned shape {tuple(losses.shape)} for {len(output)} samples; it has to "
                f"return one number a sample, shape ({len(output)},)."
            )
        return losses

    def output_error(self, output: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        """The mean loss, 0-d, and its derivative by the output, shaped like that: from the loss alone."""
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            loss = self.differentiable_losses(leaf, target).mean()
            (error,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), error

    def run_model(self, inputs: Any) -> Tensor:
        """The model's output; its own random numbers are the same in every run of a step."""
        args, kwargs = as_call(inputs)
        with self.random_numbers():
            output: Tensor = self.model(*args, **kwargs)
        return output

    @contextlib.contextmanager
    def random_numbers(self) -> Iterator[None]:
        """The global generators at a state that follows from (seed, step), put back afterwards."""
        gpus = gpus_of(self.model)
        with torch.random.fork_rng(gpus):
            # torch.manual_seed would also format a stack trace for the CUDA that is not there, half the time of a step
            for generator in (torch.default_generator, *(torch.cuda.default_generators[gpu.index] for gpu in gpus)):
                generator.manual_seed(self.key("model"))
            yield

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator that follows from (seed, step, purpose)."""
        return torch.Generator().manual_seed(self.key(purpose))

    def key(self, purpose: str) -> int:
        """63 bits from (seed, step, purpose)."""
        digest = hashlib.sha256(f"onward baseline {purpose} {self.seed} {self.step_count}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


_COUNTERS = ("seed", "step_count", "forwards", "clean_forwards")


def add_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Add to ``.grad`` of every parameter that is trainable."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        parameter.grad.add_(gradient)


def normal_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of `tensor`'s shape, dtype and device, drawn on the CPU."""
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
