"""A compiled model that trains: ``step`` fills ``.grad`` without a backward pass."""

from __future__ import annotations

import json
import traceback
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..compiler.capture import as_call
from ..compiler.probe import copy_of
from ..compiler.program import CompiledModel
from ..compiler.site_options import resolve_sigmas
from ..passes.errors import BatchError, CheckpointError, ModeError, OutOfMemoryError
from ..passes.graph import Role, describe, outputs, placeholders
from ..passes.rules import uses_batch_statistics
from . import noise as _noise  # noqa: F401  (registers the kernels)
from . import packing as _packing  # noqa: F401
from .executor import Environment, SerialExecutor, StepInput, StepResult
from .feedback import FeedbackState, initial_state
from .loss import BatchLoss, Loss, SampleLoss
from .memory import is_out_of_memory, suggest_chunk
from .output_gradient import OutputGradient
from .targets import num_rows, repeat_target, target_leaves


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
        self._parameters = {
            n.meta["target"]: (n.meta["trainable"], n.meta["val"])
            for n in everything
            if n.meta["role"] == Role.PARAMETER
        }
        canonical = {id(parameter): name for name, parameter in model.named_parameters()}
        self._names = {name: canonical[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        results = [node for output, node in outputs(compiled.graph) if output.kind == "output"]
        self._layouts = [node.meta.get("layout") if isinstance(node, fx.Node) else None for node in results]
        self._buffers = [n.meta["target"] for n in everything if n.meta["role"] == Role.BUFFER]
        self._needs_two = _first_without_statistics_of_one(compiled.graph)
        self.feedback: FeedbackState | None = None
        self._output_gradient: OutputGradient | None = None
        if compiled.estimator.feedback == "learned":
            assert isinstance(self.loss, SampleLoss)
            self._output_gradient = OutputGradient(self.loss)
            self.feedback = self._initial_feedback()

    @torch.inference_mode(False)  # ``.grad`` and buffers outlive the caller's inference mode
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
        parameters, buffers = self._check_model()
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        environment = self._environment(parameters, buffers, leaves, device)
        try:
            with torch.no_grad():
                given = StepInput(
                    environment, self._loss(target, device), samples, target, self.feedback, self._output_gradient
                )
                result = self.executor.run(given)
        except Exception as error:
            if is_out_of_memory(error):
                traceback.clear_frames(error.__traceback__)  # they hold the step's tensors
                environment.clear()
                raise OutOfMemoryError(suggest_chunk(self.compiled, samples, device)) from error
            raise
        self._commit(result, samples, parameters, buffers)
        return result.losses.mean()

    def per_sample_loss(self, output: Any, target: Any) -> Tensor:
        """The loss of an output of the model, ``(N,)``; ``()`` with ``credit="batch"``."""
        leaves = zip(pytree.tree_leaves(output), self._layouts, strict=True)
        held = [(leaf.shape[at.dim] // at.sizes[at.dim]) for leaf, at in leaves if at is not None and at.batched]
        return self.loss(output, target, held[0] if held else 1)

    def trust(self) -> dict[str, float]:
        """How far each trainable parameter's predicted gradient is borne out by fresh copies, in [0, 1] (method.md 12).

        1 for all without feedback. Scale a parameter's *learning rate* with it (scaling its gradient does nothing under
        Adam): `Trainer` does; with your own loop, interpolate ``weight = before + trust * (after - before)`` around
        ``optimizer.step()``.
        """
        trusted = {name: 1.0 for name, (trainable, _) in self._parameters.items() if trainable}
        if self.feedback is not None and self.compiled.estimator.trust:
            at = {site.output: site.index for site in self.compiled.sites}
            for gradient in self.compiled.gradients:
                trust = min(self.feedback.trust(at[end]) if end in at else 1.0 for end in gradient.site.ends)
                for name in gradient.site.parameters:
                    trusted[name] = min(trusted[name], trust)
        return trusted

    def state_dict(self) -> dict[str, Tensor | int | float | str]:
        """What the program needs beyond the model's own state to continue exactly, feedback included."""
        state: dict[str, Tensor | int | float | str] = {
            "estimator": json.dumps(self.compiled.estimator.to_json(), sort_keys=True),
            "seed": self.seed,
            "step_count": self.step_count,
            "forwards": self.forwards,
            "clean_forwards": self.clean_forwards,
        }
        if self.feedback is not None:
            state.update(self.feedback.state_dict())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s result.

        Raises:
            CheckpointError: a value is missing, or another estimator saved it, which this one would not continue.
        """
        try:
            self._check_estimator(json.loads(state["estimator"]))
            self.seed = int(state["seed"])
            self.step_count = int(state["step_count"])
            self.forwards = float(state["forwards"])
            self.clean_forwards = float(state["clean_forwards"])
            if self.feedback is not None:
                self.feedback = self.feedback.loaded(state)
        except KeyError as error:
            raise CheckpointError(f"the program's state lacks {error}") from error

    def _check_estimator(self, saved: dict[str, Any]) -> None:
        mine = json.loads(json.dumps(self.compiled.estimator.to_json()))
        differing = [f"{k}={saved.get(k)!r}, now {v!r}" for k, v in mine.items() if saved.get(k) != v and k != "chunk"]
        if differing:
            raise CheckpointError(
                f"the saved run used another estimator: {'; '.join(differing)}. Resume with the same settings, or "
                "start a new run from the model's weights."
            )

    def _initial_feedback(self) -> FeedbackState:
        node = next(node for output, node in outputs(self.compiled.graph) if output.kind == "output")
        val, layout = node.meta["val"], node.meta["layout"]
        sites = [self.compiled.sites[index] for run in self.compiled.runs for index in run.sites]
        return initial_state(sites, layout.elements, torch.empty(0, dtype=val.dtype, device=val.device))

    def _check_batch(self, inputs: Any) -> tuple[list[Any], int]:
        expected = self.compiled.captured.signature
        args, kwargs = as_call(inputs)
        names = expected.spec.child(1).context
        if kwargs.keys() == set(names):
            kwargs = {name: kwargs[name] for name in names}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != expected.spec:
            raise BatchError(
                f"the inputs have another structure than the example: expected {_structure(expected.spec)}, got "
                f"{_structure(spec)}. Pass a tensor, a tuple of positional arguments or a dict of keyword arguments, "
                "as in the example."
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
        if samples == 1 and self._needs_two:
            raise BatchError(
                f"the batch has one sample, and {self._needs_two} normalises by statistics that need more than one "
                "value a channel. If it is the last of an epoch, use drop_last=True in the DataLoader."
            )
        return leaves, samples

    def _check_target(self, target: Any, samples: int) -> None:
        for leaf in target_leaves(target, samples):
            rows = num_rows(leaf)
            if rows not in (None, samples) and self._per_sample:
                raise BatchError(f"the target's first dimension is {rows} but the batch has {samples} samples.")

    @property
    def _per_sample(self) -> bool:
        return self.compiled.estimator.credit == "sample"

    def _check_model(self) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
        """The model's parameters and buffers under all their names, from one walk over its modules."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for name, training in self.compiled.captured.training.items():
            if name not in modules:
                raise ModeError(f"the module {name!r} was removed after the program was compiled. Compile again.")
            if modules[name].training != training:
                mode, wanted = ("eval", "train") if training else ("train", "eval")
                raise ModeError(
                    f"module {name or type(self.model).__name__!r} is in {mode} mode; the program was compiled in "
                    f"{wanted} mode, which its graph holds. Call .{wanted}() on it before step, or compile again."
                )
        found: dict[str, nn.Parameter] = {}
        buffers: dict[str, Tensor] = {}
        for path, module in modules.items():
            prefix = f"{path}." if path else ""
            found.update((prefix + name, p) for name, p in module._parameters.items() if p is not None)
            buffers.update((prefix + name, b) for name, b in module._buffers.items() if b is not None)
        for name, canonical in self._names.items():
            if (change := self._change(found, name, canonical)) is not None:
                raise ModeError(f"the parameter {name!r} {change} after the program was compiled. Compile again.")
        if len(found) > len(self._names):
            (name, *_) = found.keys() - self._names.keys()
            raise ModeError(f"the parameter {name!r} was added after the program was compiled. Compile again.")
        return found, buffers

    def _change(self, found: dict[str, nn.Parameter], name: str, canonical: str) -> str | None:
        """What happened to a parameter since the program was compiled."""
        if name not in found or canonical not in found:
            return "was removed"
        parameter = found[name]
        if parameter is not found[canonical]:
            return f"was separated from {canonical!r}, to which it was tied,"
        if canonical not in self._parameters:
            return None
        trainable, val = self._parameters[canonical]
        if parameter.requires_grad != trainable:
            return "was frozen" if trainable else "was made trainable"
        if (parameter.shape, parameter.dtype, parameter.device) != (val.shape, val.dtype, val.device):
            was, now = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (val, parameter))
            return f"was changed from {was} to {now}"
        return None

    def _environment(
        self, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor], leaves: list[Any], device: torch.device
    ) -> Environment:
        environment: Environment = {}
        for name in self._parameters:
            environment[f"parameter:{name}"] = parameters[name].detach()
        for name in self._buffers:
            environment[f"buffer:{name}"] = buffers[name]
        for name, value in self.compiled.captured.constants.items():
            environment[f"constant:{name}"] = value.to(device) if isinstance(value, Tensor) else value
        for index, leaf in enumerate(leaves):
            environment[f"input:{index}"] = leaf
        environment["runtime:key"] = torch.tensor([self.seed, self.step_count], dtype=torch.int64)  # read on the host
        environment["runtime:sigmas"] = torch.tensor(self.sigmas, dtype=torch.float64, device=device)
        return environment

    def _loss(self, target: Any, device: torch.device) -> Any:
        """``(output leaves, copies, samples) -> (copies, samples)``, or ``(copies, 1)`` with batch credit; of a
        perturbed part of the batch the samples are its first."""
        spec = self.compiled.captured.out_spec

        def per_sample(leaves: list[Any], copies: int, samples: int) -> Tensor:
            output = pytree.tree_unflatten(leaves, spec)
            losses = self.loss(output, repeat_target(target, copies, samples), copies * samples)
            return losses.reshape(copies, samples).to(device)

        def batch(leaves: list[Any], copies: int, samples: int) -> Tensor:
            rows = [
                pytree.tree_unflatten(
                    [copy_of(leaf, layout, row, copies) for leaf, layout in zip(leaves, self._layouts, strict=True)],
                    spec,
                )
                for row in range(copies)
            ]
            return torch.stack([self.loss(output, target, samples) for output in rows]).reshape(copies, 1).to(device)

        return per_sample if self._per_sample else batch

    def _commit(
        self, result: StepResult, samples: int, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor]
    ) -> None:
        estimator = self.compiled.estimator
        # without a noise point (a reach beyond the last) there is nothing to learn first
        learns = self.feedback is not None and bool(self.feedback.jacobians)
        warming_up = learns and self.feedback.steps < estimator.warmup  # type: ignore[union-attr]
        with torch.no_grad():
            for name, gradient in result.gradients.items():
                parameter = parameters[name]
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                if not warming_up:
                    parameter.grad.add_(gradient)
            for name, value in result.buffers.items():
                buffers[name].copy_(value)
        self.feedback = result.feedback
        self.step_count += 1
        self.clean_forwards += samples
        probed = self.executor.num_probed(samples)
        self.forwards += probed * estimator.copies * sum(run.share for run in self.compiled.runs)


def _first_without_statistics_of_one(module: fx.GraphModule) -> str:
    """The first batch normalisation that sees one value a sample and channel, or ``""``: of one sample its variance is
    zero and the unbiased one, which goes into the running statistics, not a number."""
    for node in module.graph.nodes:
        if node.op == "call_function" and uses_batch_statistics(node):
            source = node.args[0]
            layout, val = source.meta.get("layout"), source.meta["val"]
            if layout is not None and layout.batched and layout.elements == val.shape[1]:
                return describe(node)
    return ""


class _Leaf:
    def __repr__(self) -> str:
        return "*"


def _structure(spec: pytree.TreeSpec) -> str:
    """Arguments of forward with ``*`` for every leaf."""
    args, kwargs = pytree.tree_unflatten([_Leaf()] * spec.num_leaves, spec)
    return repr(kwargs or args)


def _check_leaf(position: int, leaf: Any, described: tuple[Any, ...], samples: int | None) -> int | None:
    shape, dtype, device, batched = described
    if not isinstance(leaf, Tensor):
        raise BatchError(f"input {position} is {type(leaf).__name__}; the example has a tensor there.")
    if leaf.dtype != dtype:
        raise BatchError(
            f"input {position} has dtype {leaf.dtype}; the example has {dtype}. Convert it with .to({dtype})."
        )
    if leaf.device != device:
        raise BatchError(f"input {position} is on {leaf.device}; the program was compiled on {device}.")
    free = 1 if batched else 0
    if leaf.dim() != len(shape) or tuple(leaf.shape[free:]) != tuple(shape[free:]):
        wanted = ("N", *shape[1:]) if batched else shape
        raise BatchError(
            f"input {position} has shape {tuple(leaf.shape)}; the program was compiled for "
            f"({', '.join(map(str, wanted))})."
        )
    if not batched:
        return samples
    if samples is not None and leaf.shape[0] != samples:
        raise BatchError(f"input {position} holds {leaf.shape[0]} samples, the inputs before it {samples}.")
    return int(leaf.shape[0])
