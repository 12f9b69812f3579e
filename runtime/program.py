"""A compiled model that trains: ``step`` fills ``.grad`` without a backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..compiler.capture import as_call
from ..compiler.driver import resolve_sigmas
from ..compiler.program import CompiledModel
from ..passes.errors import BatchError, CheckpointError, ModeError, OutOfMemoryError
from ..passes.graph import Role, placeholders
from . import noise as _noise  # noqa: F401  (registers the kernels)
from . import packing as _packing  # noqa: F401
from .executor import Environment, SerialExecutor, StepResult
from .loss import BatchLoss, Loss, SampleLoss
from .memory import is_out_of_memory, suggest_chunk


class Program:
    """A model compiled for forward-only training (made by `onward.compile`).

    The model is trained in place: it stays an ordinary module, and `step` leaves gradients in ``.grad`` for any torch
    optimizer. A step's result is a function of (parameters, buffers, batch, seed, step count).

    Attributes:
        model: the user's module.
        compiled: the graphs, sites and settings, as data.
        seed: the seed of all noise.
        step_count: steps taken; the next step's noise is keyed by it.
        forwards: perturbed forwards spent, in samples x copies; a suffix counts by its share of the FLOPs.
        clean_forwards: unperturbed forwards spent, in samples.
    """

    def __init__(self, model: nn.Module, compiled: CompiledModel, loss: Loss, seed: int) -> None:
        self.model = model
        self.compiled = compiled
        self.seed = seed
        self.step_count = 0
        self.forwards = 0.0
        self.clean_forwards = 0.0
        self.loss = BatchLoss(loss) if compiled.estimator.credit == "batch" else SampleLoss(loss)
        self.sigmas = resolve_sigmas(compiled.estimator.sigma, compiled.sites)
        self.executor = SerialExecutor(compiled, self.sigmas)
        everything = placeholders(compiled.captured.module)
        self._parameters = {n.meta["target"]: n.meta["trainable"] for n in everything if n.meta["role"] == Role.PARAMETER}
        self._buffers = [n.meta["target"] for n in everything if n.meta["role"] == Role.BUFFER]

    def step(self, inputs: Any, target: Any) -> Tensor:
        """Estimate the gradient of the mean loss on a batch and add it to every trainable parameter's ``.grad``.

        Args:
            inputs: as the example inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments,
                of any batch size, shapes, dtypes and device otherwise as in the example.
            target: whatever the loss takes; every tensor in it whose first dimension is the batch is repeated for the
                copies.

        Returns:
            The mean loss of the unperturbed run, a 0-d tensor.

        Raises:
            BatchError: the batch is empty or does not fit the example.
            ModeError: train/eval mode or trainable parameters are not those the program was compiled for.
            LossShapeError, NonFiniteLossError, OutOfMemoryError: see `passes.errors`. Whatever is raised, gradients,
                buffers and weights are as before the step.
        """
        leaves, samples = self._check_batch(inputs)
        self._check_target(target, samples)
        self._check_model()
        environment = self._environment(leaves)
        try:
            with torch.no_grad():
                result = self.executor.run(environment, self._loss(target, samples), samples)
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(suggest_chunk(self.compiled, samples, environment["runtime:key"].device)) from error
            raise
        self._commit(result, samples)
        return result.losses.mean()

    def per_sample_loss(self, output: Any, target: Any) -> Tensor:
        """The loss of an output of the model, ``(N,)``; ``()`` with ``credit="batch"``."""
        return self.loss(output, target, _samples(target))

    def state_dict(self) -> dict[str, int | float]:
        """What the program needs beyond the model's own state to continue exactly."""
        return {
            "seed": self.seed,
            "step_count": self.step_count,
            "forwards": self.forwards,
            "clean_forwards": self.clean_forwards,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s result.

        Raises:
            CheckpointError: a value is missing.
        """
        try:
            self.seed = int(state["seed"])
            self.step_count = int(state["step_count"])
            self.forwards = float(state["forwards"])
            self.clean_forwards = float(state["clean_forwards"])
        except KeyError as error:
            raise CheckpointError(f"the program's state lacks {error}") from error

    def _check_batch(self, inputs: Any) -> tuple[list[Any], int]:
        expected = self.compiled.captured.signature
        leaves, spec = pytree.tree_flatten(as_call(inputs))
        if spec != expected.spec:
            raise BatchError(
                f"the inputs have another structure than the example: expected {expected.spec}, got {spec}. Pass a tensor, "
                "a tuple of positional arguments or a dict of keyword arguments, as in the example."
            )
        samples: int | None = None
        for position, (leaf, described) in enumerate(zip(leaves, expected.leaves, strict=True)):
            if not isinstance(described, tuple):
                if isinstance(leaf, Tensor) or leaf != described:
                    raise BatchError(f"input {position} is {leaf!r}; the program was compiled for {described!r}.")
                continue
            samples = _check_leaf(position, leaf, described, samples)
        if not samples:
            raise BatchError("the batch is empty: a step needs at least one sample.")
        return leaves, samples

    def _check_target(self, target: Any, samples: int) -> None:
        for leaf in pytree.tree_leaves(target):
            if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] != samples and self._per_sample:
                raise BatchError(
                    f"the target's first dimension is {leaf.shape[0]} but the batch has {samples} samples."
                )

    @property
    def _per_sample(self) -> bool:
        return self.compiled.estimator.credit == "sample"

    def _check_model(self) -> None:
        for name, training in self.compiled.captured.training.items():
            if self.model.get_submodule(name).training != training:
                mode, wanted = ("eval", "train") if training else ("train", "eval")
                raise ModeError(
                    f"module {name or type(self.model).__name__!r} is in {mode} mode; the program was compiled in {wanted} "
                    f"mode, which its graph holds. Call .{wanted}() on it before step, or compile again."
                )
        for name, trainable in self._parameters.items():
            if self.model.get_parameter(name).requires_grad != trainable:
                change = "frozen" if trainable else "made trainable"
                raise ModeError(f"the parameter {name!r} was {change} after the program was compiled. Compile again.")

    def _environment(self, leaves: list[Any]) -> Environment:
        environment: Environment = {}
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        for name in self._parameters:
            environment[f"parameter:{name}"] = self.model.get_parameter(name).detach()
        for name in self._buffers:
            environment[f"buffer:{name}"] = self.model.get_buffer(name)
        for name, value in self.compiled.captured.constants.items():
            environment[f"constant:{name}"] = value.to(device) if isinstance(value, Tensor) else value
        for index, leaf in enumerate(leaves):
            environment[f"input:{index}"] = leaf
        environment["runtime:key"] = torch.tensor([self.seed, self.step_count], dtype=torch.int64, device=device)
        environment["runtime:sigmas"] = torch.tensor(self.sigmas, dtype=torch.float64, device=device)
        return environment

    def _loss(self, target: Any, samples: int) -> Any:
        """``(output leaves, copies) -> (copies, N)``, or ``(copies, 1)`` with batch credit."""
        spec = self.compiled.captured.out_spec

        def per_sample(leaves: list[Any], copies: int) -> Tensor:
            output = pytree.tree_unflatten(leaves, spec)
            repeated = target if copies == 1 else _repeat(target, copies, samples)
            return self.loss(output, repeated, copies * samples).reshape(copies, samples)

        def batch(leaves: list[Any], copies: int) -> Tensor:
            rows = [
                pytree.tree_unflatten([_copy_of(leaf, index, copies) for leaf in leaves], spec) for index in range(copies)
            ]
            return torch.stack([self.loss(output, target, samples) for output in rows]).reshape(copies, 1)

        return per_sample if self._per_sample else batch

    def _commit(self, result: StepResult, samples: int) -> None:
        with torch.no_grad():
            for name, gradient in result.gradients.items():
                parameter = self.model.get_parameter(name)
                if parameter.grad is None:
                    parameter.grad = gradient.to(parameter.dtype).clone(memory_format=torch.contiguous_format)
                else:
                    parameter.grad.add_(gradient)
            for name, value in result.buffers.items():
                self.model.get_buffer(name).copy_(value)
        self.step_count += 1
        self.clean_forwards += samples
        self.forwards += samples * self.compiled.estimator.copies * sum(run.share for run in self.compiled.runs)


def _check_leaf(position: int, leaf: Any, described: tuple[Any, ...], samples: int | None) -> int | None:
    shape, dtype, device, batched = described
    if not isinstance(leaf, Tensor):
        raise BatchError(f"input {position} is {type(leaf).__name__}; the example has a tensor there.")
    if leaf.dtype != dtype:
        raise BatchError(f"input {position} has dtype {leaf.dtype}; the example has {dtype}. Convert it with .to({dtype}).")
    if leaf.device != device:
        raise BatchError(f"input {position} is on {leaf.device}; the program was compiled on {device}.")
    free = 1 if batched else 0
    if leaf.dim() != len(shape) or tuple(leaf.shape[free:]) != tuple(shape[free:]):
        wanted = ("N", *shape[1:]) if batched else shape
        raise BatchError(
            f"input {position} has shape {tuple(leaf.shape)}; the program was compiled for ({', '.join(map(str, wanted))})."
        )
    if not batched:
        return samples
    if samples is not None and leaf.shape[0] != samples:
        raise BatchError(f"input {position} holds {leaf.shape[0]} samples, the inputs before it {samples}.")
    return int(leaf.shape[0])


def _samples(target: Any) -> int:
    return next((leaf.shape[0] for leaf in pytree.tree_leaves(target) if isinstance(leaf, Tensor) and leaf.dim()), 1)


def _repeat(target: Any, copies: int, samples: int) -> Any:
    """`target` for every copy: tensors (and NumPy arrays and lists) of one entry a sample, tiled."""

    def repeat(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == samples:
            return leaf.repeat(copies, *[1] * (leaf.dim() - 1))
        return leaf

    if isinstance(target, list) and len(target) == samples and not any(isinstance(x, Tensor) for x in target):
        return target * copies
    return pytree.tree_map(repeat, target)


def _copy_of(leaf: Any, index: int, copies: int) -> Any:
    return leaf.chunk(copies)[index] if isinstance(leaf, Tensor) and copies > 1 else leaf
