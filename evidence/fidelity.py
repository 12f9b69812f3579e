"""Fidelity: how a program's gradients agree with the exact ones, with autograd as the judge.

One batch, fixed weights. The step is repeated with fresh noise; the exact gradient of the mean loss comes from autograd
through the user's own module, in the model's dtype (its rounding, about 1e-7 of the gradient in float32, is the floor
of every number here); sums over coordinates are in float64. What the repetitions scatter is variance, what their mean
is off by is bias, against the gradient of the *clean* loss: the smoothing by σ counts as bias (`fidelity_statistics`).
Intervals are about the noise alone; other weights, or another batch, are another measurement.

What learned feedback has learned belongs to the estimate and is the same in every repetition, so `learn` comes first.
With ``correction="none"`` a gradient holds no noise of its own step, and its variance is 0 by construction; all of its
error is bias, of what was learned here. Trust, which scales the optimizer's steps, is no part of a gradient.

An operation without derivative (a sign) has an exact gradient of zero before it: numbers relative to it are NaN.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from ..compiler.program import CompiledModel
from ..passes.errors import DataError, OptionError
from ..passes.key_random_operations import is_random
from ..runtime.loss import SampleLoss
from ..runtime.program import Program
from ..runtime.training.batches import batch_size, split_batch
from .fidelity_statistics import FEWEST, Agreement, Moments, agreement, moments


@dataclass(frozen=True)
class Fidelity:
    """What `measure` found."""

    whole: Agreement
    """All parameters as one vector."""
    sites: dict[str, Agreement]
    """By site; sites that share a parameter are one, their names joined by " + "."""
    replicates: int
    samples: int
    dtype: str
    """Of the estimates and of the exact gradient."""
    varies: bool
    """False if no gradient holds noise of its own step: the deviation is 0 by construction."""
    learned: int
    """Learning steps that the feedback had; 0 without feedback."""
    forwards: float
    """Forwards a sample beside the clean one in a step that perturbs, the mean of the steps; a suffix counts by its
    share of the FLOPs. Where perturbed runs only teach feedback, and are left out here: those of such a step."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def measure(
    program: Program,
    inputs: Any,
    target: Any,
    *,
    replicates: int = 64,
    each: Callable[[], object] = lambda: None,
) -> Fidelity:
    """Repeat the program's step on one batch, from the same state and with fresh noise, and judge its gradients.

    Program and model are afterwards as before: weights, ``.grad``, buffers, step count, σ, and what feedback has
    learned. With ``sigma="auto"`` and none measured yet, σ is measured once, on this batch. The estimates are held in
    the model's dtype: `replicates` times the size of its parameters.

    Args:
        program: what `onward.compile` returned.
        inputs, target: a batch, as for `Program.step`.
        replicates: repetitions, at least `FEWEST`.
        each: called after each of them.

    Raises:
        OptionError: too few replicates; feedback that is still in its warm-up; a model that draws random numbers, or
            a loss that autograd cannot differentiate.
        BatchError, ModeError, LossShapeError, NonFiniteLossError: as for `Program.step`.
    """
    check_replicates(replicates)
    _check_learned(program)
    groups = site_parameters(program.compiled)
    names = [name for parameters in groups.values() for name in parameters]
    with _at_rest(program):
        exact = exact_gradient(program, inputs, target)
        _settle_sigma(program, inputs, target)
        start = program.state_dict()
        from_clean = all(gradient.from_clean for gradient in program.compiled.gradients)
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        samples, spent = batch_size(inputs, target), 0.0
        for number in range(replicates):
            program.load_state_dict(start)
            program.step_count += number
            program.next_calibration = sys.maxsize
            if from_clean:
                program.next_probe = sys.maxsize  # what a perturbed run teaches is for the steps to come
            before = program.forwards + program.clean_forwards
            for name, gradient in _step(program, inputs, target).items():
                found[name].append(gradient)
            spent += program.forwards + program.clean_forwards - before - samples
            each()
    if from_clean:
        estimator = program.compiled.estimator
        spent = replicates * program.compiled.forwards * estimator.num_probed(samples)
    sites = {
        label: reduce(add, (_moments(found.pop(name), exact[name]) for name in parameters))
        for label, parameters in groups.items()
    }
    whole = agreement(reduce(add, sites.values()))
    first = next(iter(exact.values()))
    return Fidelity(
        whole=whole,
        sites={label: agreement(of) for label, of in sites.items()},
        replicates=replicates,
        samples=samples,
        dtype=str(first.dtype).removeprefix("torch."),
        varies=not from_clean or whole.deviation.value > 0,  # the loss may be a black box to the program
        learned=0 if program.feedback is None else program.feedback.steps,
        forwards=spent / samples / replicates,
    )


def learn(
    program: Program,
    batches: Iterable[Any],
    steps: int,
    *,
    each: Callable[[], object] = lambda: None,
) -> None:
    """Let learned feedback learn for `steps` steps; does nothing for a program that has nothing to learn.

    Weights, buffers and ``.grad`` stay. `batches` are a loader's, (inputs…, target), gone through as often as it takes.

    Raises:
        OptionError: fewer steps than the feedback's warm-up, whose gradients are zero.
        DataError: `batches` is empty.
    """
    state, warmup = program.feedback, program.compiled.estimator.warmup
    if state is None or not state.jacobians:  # a reach beyond the last noise point leaves none to learn at
        return
    if state.steps + steps < warmup:
        raise OptionError(
            f"learn={steps}: learned feedback gives zero gradients for its first {warmup} steps (warmup). Learn for "
            "longer, or lower the warm-up."
        )
    with _at_rest(program, forget=False):
        device = next(program.model.parameters()).device
        for batch in itertools.islice(_endless(batches), steps):
            _step(program, *split_batch(batch, device))
            each()


def check_replicates(replicates: int) -> None:
    """Raise OptionError for too few."""
    if replicates < FEWEST:
        raise OptionError(f"replicates={replicates}: an interval needs at least {FEWEST}.")


def exact_gradient(program: Program, inputs: Any, target: Any) -> dict[str, Tensor]:
    """The gradient of the batch's mean loss by autograd, for every trainable parameter; zeros where nothing reaches it.

    Model and ``.grad`` stay as they are, but for buffers that the model itself writes.

    Raises:
        OptionError: the model draws random numbers (those of autograd's run would be others), or the loss has no
            derivative.
    """
    for node in program.compiled.captured.module.graph.nodes:
        if node.op == "call_function" and is_random(node):
            raise OptionError(
                f"the model draws random numbers ({node.target}); autograd's run would draw others than the program's, "
                "and judge another gradient. Measure with dropout and the like off (model.eval(), or p=0)."
            )
    model, loss = program.model, program.loss
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        output = _call(model, inputs)
        try:
            losses = loss.loss(output, target)
            mean = (loss.reduce_positions(losses) if isinstance(loss, SampleLoss) else losses).mean()
            gradients = torch.autograd.grad(mean, list(trained.values()), allow_unused=True)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise OptionError(
                f"autograd, which judges here, cannot differentiate the loss {loss.name}: {error}. Measure with a loss "
                "of torch operations that ends in one number a sample."
            ) from error
    found = zip(trained.items(), gradients, strict=True)
    return {name: torch.zeros_like(p) if gradient is None else gradient for (name, p), gradient in found}


def site_parameters(compiled: CompiledModel) -> dict[str, tuple[str, ...]]:
    """The trainable parameters of each site, every parameter once: sites that share one are joined by " + "."""
    joined: list[tuple[list[str], list[str]]] = []
    for gradient in compiled.gradients:
        site = gradient.site
        sharing = [group for group in joined if set(group[1]) & set(site.parameters)]
        names = [name for group in sharing for name in group[0]] + [site.name]
        parameters = [name for group in sharing for name in group[1]] + list(site.parameters)
        at = joined.index(sharing[0]) if sharing else len(joined)
        joined = [group for group in joined if group not in sharing]
        joined.insert(at, (names, list(dict.fromkeys(parameters))))
    return {" + ".join(names): tuple(parameters) for names, parameters in joined}


def _moments(estimates: list[Tensor], gradient: Tensor) -> Moments:
    dtype = torch.promote_types(gradient.dtype, torch.float32)  # NumPy knows no bfloat16
    rows = torch.stack(estimates).flatten(1).to("cpu", dtype)
    return moments(rows.numpy(), gradient.detach().flatten().to("cpu", dtype).numpy())


def _step(program: Program, inputs: Any, target: Any) -> dict[str, Tensor]:
    """The gradients of one step, and buffers as before it."""
    buffers = {name: buffer.clone() for name, buffer in program.model.named_buffers()}
    parameters = dict(program.model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = None
    program.step(inputs, target)
    with torch.no_grad():
        for name, buffer in program.model.named_buffers():
            buffer.copy_(buffers[name])
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


@contextmanager
def _at_rest(program: Program, *, forget: bool = True) -> Iterator[None]:
    """Put back ``.grad`` and buffers at the end, and with `forget` the program's own state, whatever happens."""
    gradients = {parameter: parameter.grad for parameter in program.model.parameters()}
    buffers = {name: buffer.clone() for name, buffer in program.model.named_buffers()}
    state, due, probe = program.state_dict(), program.next_calibration, program.next_probe
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for name, buffer in program.model.named_buffers():
                buffer.copy_(buffers[name])
        if forget:
            program.load_state_dict(state)
            program.next_calibration, program.next_probe = due, probe


def _settle_sigma(program: Program, inputs: Any, target: Any) -> None:
    """With ``sigma="auto"`` that is due, let one step measure it; no repetition does so again."""
    if program.compiled.estimator.sigma == "auto" and program.step_count >= program.next_calibration:
        _step(program, inputs, target)


def _check_learned(program: Program) -> None:
    warmup, state = program.compiled.estimator.warmup, program.feedback
    if state is not None and state.jacobians and state.steps < warmup:
        raise OptionError(
            f"learned feedback has had {state.steps} of the {warmup} steps of its warm-up, and its gradients are zero. "
            "Let it learn first (evidence.fidelity.learn, --learn), or compile with warmup=0."
        )


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches over and over; a loader that shuffles gives each round another order."""
    for number in itertools.count():
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise DataError(f"the loader gave no batch in round {number + 1} of learning.")


def _call(model: torch.nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
