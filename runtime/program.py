"""A compiled model that trains: ``step`` fills ``.grad`` without a backward pass."""

from __future__ import annotations

import math
import traceback
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..compiler.program import CompiledModel
from ..compiler.site_options import resolve_sigmas
from ..passes.errors import BatchError, OutOfMemoryError
from ..passes.graph import Role, outputs, placeholders
from .calibration.choose import calibrate
from .calibration.record import Calibration
from .checks import ModelCheck, check_batch, first_without_statistics_of_one
from .execution.bindings import Environment
from .execution.executors import make_executor
from .execution.step import StepInput, StepResult, Updates
from .feedback import FeedbackState, probe_interval, untaught
from .linearity import measure
from .loss import BatchLoss, Loss, SampleLoss
from .memory.shortage import suggest_chunk
from .noise import levels as _levels  # noqa: F401
from .noise import operators as _noise  # noqa: F401  (registers the operators)
from .noise import packed_gradients as _packed_gradients  # noqa: F401
from .noise import packing as _packing  # noqa: F401
from .noise import weights as _weight_noise  # noqa: F401
from .out_of_memory import is_out_of_memory
from .output_gradient import OutputGradient
from .program_state import restore, saved
from .sampling import sampled
from .step_loss import StepLoss
from .targets import num_rows, target_leaves
from .whole_loss import WholeLoss


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
        sigmas: standard deviation of every site's noise; with ``sigma="auto"`` measured every `CALIBRATE_EVERY` steps.
        executor: what runs the plan of a step.
        needs_two: the operation that takes a batch of two samples or more, or "" or None.
        next_probe: with feedback, the step count from which on the next step has a perturbed run.
    """

    def __init__(
        self,
        model: nn.Module,
        compiled: CompiledModel,
        loss: Loss,
        seed: int,
        *,
        workers: int = 1,
        streams: int = 1,
        cuda_graphs: bool = False,
        inductor: bool = False,
    ) -> None:
        self.model = model
        self.compiled = compiled
        self.seed = seed
        self.step_count = 0
        self.forwards = 0.0
        self.clean_forwards = 0.0
        make = WholeLoss if compiled.captured.signature.whole else SampleLoss
        self.loss = BatchLoss(loss) if compiled.estimator.credit == "batch" else make(loss)
        self.sigmas = resolve_sigmas(compiled.estimator.sigma, compiled.sites)
        self.next_probe = 0
        self.next_calibration = 0
        self.executor = make_executor(compiled, self.sigmas, workers, streams, cuda_graphs, inductor)
        if streams == 1:  # streams issue every task apart
            self.executor.fused(self.executor.plan)  # made now, and not in the first steps
            if compiled.estimator.feedback == "learned":
                self.executor.fused(self.executor.clean_plan)
        results = [node for output, node in outputs(compiled.graph) if output.kind == "output"]
        self._layouts = [node.meta.get("layout") if isinstance(node, fx.Node) else None for node in results]
        self._buffers = [n.meta["target"] for n in placeholders(compiled.captured.module, Role.BUFFER)]
        self._check_model = ModelCheck(model, compiled)
        self.needs_two = first_without_statistics_of_one(compiled.graph)
        self.feedback: FeedbackState | None = None
        self._trusted: tuple[FeedbackState | None, dict[str, float]] | None = None
        """What `trust` said of a state of the feedback, which never changes."""
        self._output_gradient: OutputGradient | None = None
        if compiled.estimator.feedback == "learned":
            assert isinstance(self.loss, SampleLoss)
            self._output_gradient = OutputGradient(self.loss, self.executor.returned)
            self.feedback = untaught(self.compiled)
        elif compiled.estimator.sampling == "error":
            assert isinstance(self.loss, SampleLoss)
            self._output_gradient = OutputGradient(self.loss)

    @torch.inference_mode(False)  # ``.grad`` and buffers outlive the caller's inference mode
    def step(self, inputs: Any, target: Any, *, updates: Updates | None = None) -> Tensor:
        """Estimate the gradient of the mean loss on a batch and add it to every trainable parameter's ``.grad``.

        Args:
            inputs: as the example inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments,
                of any batch size, shapes, dtypes and device otherwise as in the example.
            target: whatever the loss takes; every tensor in it whose first dimension is the batch is repeated for the
                copies.
            updates: what the optimizer has still to do after the step before (`training.per_parameter`): tasks of this
                step, unless `waits` says why not; then they go first. When the step returns or raises, all are done.

        Returns:
            The mean loss of the unperturbed run, a 0-d tensor.

        Raises:
            BatchError: the batch is empty or does not fit the example.
            ModeError: train/eval mode or trainable parameters are not those the program was compiled for.
            LossShapeError, NonFiniteLossError, OutOfMemoryError: see `passes.errors`. Whatever is raised, gradients,
                buffers, weights (with the `updates`) and `sigmas` are as before the step.
        """
        with nullcontext() if updates is None else updates:
            given, parameters, buffers = self.bind(inputs, target)
            environment, sigmas = given.environment, list(self.sigmas)
            calibrates = self.compiled.estimator.sigma == "auto" and self.step_count >= self.next_calibration
            if updates is not None and (calibrates or self.waits()):
                updates.finish()
            elif updates is not None:
                given = replace(given, updates=updates)
            try:
                with torch.no_grad(), self.executor.threads():
                    spent, due = self._measure_sigmas(given) if calibrates else (0.0, self.next_calibration)
                    whole = given.samples
                    given, clean = self._sampled(given)
                    result = self.executor.run(given)
            except BaseException as error:
                self.sigmas[:] = sigmas
                if is_out_of_memory(error):
                    traceback.clear_frames(error.__traceback__)  # they hold the step's tensors
                    environment.clear()
                    raise OutOfMemoryError(suggest_chunk(self.compiled, given.samples, given.device)) from error
                raise
        if clean is not None:
            result.losses, result.buffers = clean.losses, clean.buffers
            self.clean_forwards += whole
        self._commit(result, given, parameters, buffers)
        self.next_calibration = due
        self.forwards += spent * whole
        return result.losses.mean()

    def waits(self, *, perturbed: bool | None = None) -> str:
        """Why a step waits for all updates of the weights after the one before; "" if its tasks wait only for those of
        the weights that they read. A step with or without a perturbed run, if there are both; None: the next."""
        if self.compiled.estimator.sampling != "all":
            return "a clean run draws the samples before a step's tasks"
        if self.feedback is None or perturbed is None:
            perturbed = self._perturbs()
        return self.executor.waits(perturbed=perturbed)

    def measures(self, *, perturbed: bool) -> bool:
        """Whether the first such steps still measure if they had better wait."""
        measures = self.executor.measures(perturbed=perturbed or self.feedback is None)
        return measures and not self.waits(perturbed=perturbed)

    @torch.inference_mode(False)
    def calibrate(
        self,
        inputs: Any,
        target: Any,
        *,
        budget: float = 4.0,
        choose: Collection[str] | None = None,
        batch_size: int | None = None,
    ) -> Calibration:
        """Measure the program on a batch and choose settings from it; changes nothing (`runtime.calibration`).

        Args:
            inputs, target: a batch, as for `step`; the larger, the surer.
            budget: perturbed forwards a sample and step that the settings may spend on average.
            choose: what to choose, names of ``("sigma", "placement", "noise_on", "groups", "copies", "correction")``;
                the rest is held. None: all but those that the estimator sets site by site, and a correction only
                where every step has copies of every sample anyway.
            batch_size: samples of a training step, if not those of this batch: in a larger one there is less noise to
                weigh against a bias.

        Returns:
            Settings to print, save, edit and give to `onward.compile` as its estimator.

        Raises:
            CalibrationError: the budget is too small for one pair in every run, all sites perturbed together if need
                be.
            UnknownNameError: `choose` has another name; the message shows the nearest.
            OptionError: `choose` names what this program leaves no choice of, or `batch_size` is no number of samples.
            BatchError, ModeError, LossShapeError, NonFiniteLossError: as for `step`.
        """
        given, _, _ = self.bind(inputs, target)
        with torch.no_grad(), self.executor.threads():
            return calibrate(self.executor, given, budget, choose, batch_size)

    @torch.inference_mode(False)
    def measured_sigmas(self, inputs: Any, target: Any) -> list[float]:
        """What ``sigma="auto"`` would measure on a batch, by site; changes nothing. Raises as `step`."""
        given, _, _ = self.bind(inputs, target)
        held = list(self.sigmas)
        try:
            with torch.no_grad(), self.executor.threads():
                self._measure_sigmas(given)
            return list(self.sigmas)
        finally:
            self.sigmas[:] = held

    def per_sample_loss(self, output: Any, target: Any) -> Tensor:
        """The loss of an output of the model, ``(N,)``; ``()`` with ``credit="batch"``."""
        if isinstance(self.loss, WholeLoss):
            return self.loss.of_graph(output, target)
        leaves = zip(pytree.tree_leaves(output), self._layouts, strict=True)
        held = [(leaf.shape[at.dim] // at.sizes[at.dim]) for leaf, at in leaves if at is not None and at.batched]
        return self.loss(output, target, held[0] if held else 1)

    def trust(self) -> dict[str, float]:
        """How far each trainable parameter's predicted gradient is borne out by fresh copies, in [0, 1] (method.md 12).

        Of a parameter that is read at several sites (a weight shared over time) it is that of the sites together. 1 for
        all without feedback. Scale a parameter's *learning rate* with it (scaling its gradient does nothing under
        Adam): `Trainer` does; with your own loop, interpolate ``weight = before + trust * (after - before)`` around
        ``optimizer.step()``.
        """
        if self._trusted is not None and self._trusted[0] is self.feedback:
            return dict(self._trusted[1])
        trusted = {name: 1.0 for name, (trainable, _) in self._check_model.parameters.items() if trainable}
        if self.feedback is not None and self.compiled.estimator.trust:
            at = {site.output: site.index for site in self.compiled.sites}
            read: dict[str, list[int]] = {}  # by parameter, the least trusted noise point of each of its sites
            for gradient in self.compiled.gradients:
                points = [at[end] for end in gradient.site.ends if at.get(end) in self.feedback.jacobians]
                for name in gradient.site.parameters:
                    read.setdefault(name, []).extend(sorted(points, key=self.feedback.trust)[:1])
            for name, points in read.items():
                trusted[name] = self.feedback.trust(*points) if points else 1.0  # exact, from the output
        self._trusted = self.feedback, trusted
        return dict(trusted)

    def state_dict(self) -> dict[str, Tensor | int | float | str]:
        """What the program needs beyond the model's own state to continue exactly, feedback included."""
        return saved(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s result.

        Raises:
            CheckpointError: a value is missing, or another estimator saved it, which this one would not continue; the
                program is as it was.
        """
        restore(self, state)

    def _check_target(self, target: Any, samples: int) -> None:
        for leaf in target_leaves(target, samples):
            rows = num_rows(leaf)
            if rows not in (None, samples) and self._per_sample:
                raise BatchError(f"the target's first dimension is {rows} but the batch has {samples} samples.")

    @property
    def _per_sample(self) -> bool:
        return self.compiled.estimator.credit == "sample"

    def bind(self, inputs: Any, target: Any) -> tuple[StepInput, dict[str, nn.Parameter], dict[str, Tensor]]:
        """What the next step is a function of, checked; and the model's parameters and buffers by name."""
        leaves, samples = check_batch(inputs, self.compiled.captured.signature, self.needs_two)
        if isinstance(self.loss, WholeLoss):
            self.loss.check(target)
        else:
            self._check_target(target, samples)
        parameters, buffers = self._check_model()
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        given = StepInput(
            self._environment(parameters, buffers, leaves, device),
            self.loss_of(target, device),
            samples,
            device,
            target,
            self.loss_of,
            self.feedback,
            self._output_gradient,
            self._perturbs(),
        )
        return given, parameters, buffers

    def _sampled(self, given: StepInput) -> tuple[StepInput, StepResult | None]:
        """What the step is done on: the samples that are drawn for it, with the result of the whole batch's clean run
        that they are drawn by; or all of them."""
        if self.compiled.estimator.sampling == "all":
            return given, None
        clean = self.executor.run_clean(given)
        return sampled(given, clean.error, self.compiled.captured.signature), clean.result

    def _measure_sigmas(self, given: StepInput) -> tuple[float, int]:
        """Take σ from the batch at hand; the perturbed forwards a sample that it took, and the step to do so again."""
        self.executor.release()
        found, spent = measure(self.executor, given)
        told = {index: one.sigma for index, one in found.items() if math.isfinite(one.sigma)}
        for index, sigma in told.items():
            self.sigmas[index] = sigma
        every = CALIBRATE_EVERY if len(told) == len(found) else REMEASURE_AFTER
        given.environment["runtime:sigmas"].copy_(torch.tensor(self.sigmas, dtype=torch.float64))
        return spent, self.step_count + every

    def _environment(
        self, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor], leaves: list[Any], device: torch.device
    ) -> Environment:
        environment: Environment = {}
        for name in self._check_model.parameters:
            environment[f"parameter:{name}"] = parameters[name].detach()
        for name in self._buffers:
            environment[f"buffer:{name}"] = buffers[name]
        for name, value in self.compiled.captured.constants.items():
            environment[f"constant:{name}"] = value.to(device) if isinstance(value, Tensor) else value
        for index, leaf in enumerate(leaves):
            environment[f"input:{index}"] = leaf
        own = {
            "runtime:key": torch.tensor([self.seed, self.step_count], dtype=torch.int64),
            "runtime:sigmas": torch.tensor(self.sigmas, dtype=torch.float64),
        }
        environment.update((key, value.to(device, non_blocking=True)) for key, value in own.items())
        return environment

    @property
    def loss_of(self) -> StepLoss:
        """`StepInput.loss` for any target."""
        return StepLoss(self.loss, self.compiled.captured.out_spec, self._layouts, self.compiled.credits_nodes)

    def _warms_up(self) -> bool:
        """Whether feedback is still learned before the weights move; without a noise point (a reach beyond the last)
        there is nothing to learn."""
        learns = self.feedback is not None and bool(self.feedback.jacobians)
        return learns and self.feedback.steps < self.compiled.estimator.warmup  # type: ignore[union-attr]

    def _perturbs(self) -> bool:
        """Whether the next step has a perturbed run, if the program has any."""
        return self._warms_up() or self.step_count >= self.next_probe

    def _commit(
        self, result: StepResult, given: StepInput, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor]
    ) -> None:
        """Write the result of a step."""
        warming_up = self._warms_up()
        with torch.no_grad():
            for name, gradient in result.gradients.items():
                parameter = parameters[name]
                if parameter.grad is not None:
                    if not warming_up:
                        parameter.grad.add_(gradient)
                    continue
                parameter.grad = torch.empty_like(parameter, memory_format=torch.contiguous_format)  # not an alias
                parameter.grad.copy_(gradient) if not warming_up else parameter.grad.zero_()
            for name, value in result.buffers.items():
                buffers[name].copy_(value)
        self.clean_forwards += given.samples
        if given.perturbed:
            probed = self.compiled.estimator.num_probed(given.samples)
            self.forwards += probed * self.compiled.forwards
            self.feedback = result.feedback
            if self.feedback is not None:
                self.next_probe = self.step_count + probe_interval(self.compiled.estimator.probe_every, self.feedback)
        self.step_count += 1


CALIBRATE_EVERY = 500
"""Steps from one measurement of σ to the next, with ``sigma="auto"``."""

REMEASURE_AFTER = 25
"""The same where the loss did not respond to some site, as behind a head of zeros that soon has other weights."""
