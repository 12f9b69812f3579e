"""The gradient of the loss at the model's output: the one vector a sample that learned feedback is driven by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedOperatorException
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ..passes import ops
from .loss import SampleLoss
from .targets import repeat_target

BLACK_BOX_DRAWS = 64
"""Antithetic pairs of evaluations of a loss without derivative; they cost no forward of the model."""

BLACK_BOX_SIGMA = 0.5
"""Standard deviation of their noise, in units of the outputs' own."""

_SITE = (1 << 24) - 1
"""Site number of the noise at the output; the compiler numbers sites from 0."""


class OutputGradient:
    """``(output, target, key) -> (losses (N,), error (N, outputs))``, the error being that of the mean loss.

    A loss with a derivative is traced once to a graph (once a batch size if its code depends on it, as by
    ``len(output)``), so that no autograd graph is built while training. A black box (a
    loss that cannot be traced, or has no derivative) is differentiated by likelihood ratio at the output, which is one
    more site: perturbed outputs, `BLACK_BOX_DRAWS` pairs of them, but no perturbed model.
    """

    def __init__(self, loss: SampleLoss) -> None:
        self.loss = loss
        self._graphs: dict[int | None, fx.GraphModule | None] = {}  # by batch size; None is any
        self._traced_for: Any = None

    def __call__(self, output: Tensor, target: Any, key: Tensor) -> tuple[Tensor, Tensor]:
        samples = output.shape[0]
        losses = self.loss(output, target, samples)
        graph = self._derivative(output, target)
        error = self._estimate(output, target, key) if graph is None else graph(output, target)
        return losses, error.reshape(samples, -1) / samples

    def _derivative(self, output: Tensor, target: Any) -> fx.GraphModule | None:
        if not isinstance(target, Tensor) or target.dim() == 0:
            return None
        described = (output.shape[1:], output.dtype, target.shape[1:], target.dtype, output.device)
        if self._traced_for != described:
            general = _trace(self.loss, output, target, free=True)
            self._graphs = {} if general is None else {None: general}
            self._traced_for = described
        if None in self._graphs:
            return self._graphs[None]
        samples = output.shape[0]
        if samples not in self._graphs:
            self._graphs[samples] = _trace(self.loss, output, target, free=False)
        return self._graphs[samples]

    def _estimate(self, output: Tensor, target: Any, key: Tensor) -> Tensor:
        samples = output.shape[0]
        sigma = BLACK_BOX_SIGMA * max(float(output.std(correction=0)), 1e-6)
        draws = torch.arange(BLACK_BOX_DRAWS)
        copies = torch.cat([draws, ~draws])
        where = ([1, *output.shape[1:]], 0, 1)
        sigmas = torch.tensor(sigma, dtype=output.dtype).expand(_SITE + 1)
        perturbed = ops.perturb(output, copies, key, sigmas, _SITE, "gaussian", *where, False)
        repeated = repeat_target(target, len(copies), samples)
        losses = self.loss(perturbed, repeated, samples * len(copies)).reshape(2, BLACK_BOX_DRAWS, samples)
        weights = (losses[0] - losses[1]).to(output.dtype) / (2 * sigma * BLACK_BOX_DRAWS)
        estimate: Tensor = ops.weighted_noise_sum(weights, draws, key, _SITE, "gaussian", "exact", *where)
        return estimate


def _equates_sizes(guard: Any) -> bool:
    """Whether a guard of the trace only says that output and target have the same number of samples."""
    return bool(guard.is_Relational and guard.rel_op == "==" and guard.lhs.is_Symbol and guard.rhs.is_Symbol)


class _BlackBoxError(Exception):
    pass


def _trace(loss: SampleLoss, output: Tensor, target: Tensor, *, free: bool) -> fx.GraphModule | None:
    """The graph of ``(output, target) -> ∂ Σ losses / ∂ output``, for a `free` batch size or this one.

    None for a black box, and where a free batch size is asked for but the loss's code depends on it.
    """

    def gradient(output: Tensor, target: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        with torch.enable_grad():
            try:
                losses = loss.loss(leaf, target)
            except Exception as error:  # whatever stops a tracer inside the user's loss makes it a black box
                raise _BlackBoxError from error
            if not isinstance(losses, Tensor) or not losses.requires_grad:
                raise _BlackBoxError
            total = loss.reduce_positions(losses).sum()
        try:
            (result,) = torch.autograd.grad(total, leaf)
        except (NotImplementedError, UnsupportedOperatorException) as error:  # of the loss, and no tracer knows it
            raise _BlackBoxError from error
        return result

    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
    fakes = []
    for tensor in (output, target):
        constant = free and tensor.shape[0] == 1  # a size of 1 would be one
        two = torch.cat([tensor, tensor]) if constant else tensor
        dynamic = [DimDynamic.DYNAMIC if free else DimDynamic.STATIC, *[DimDynamic.STATIC] * (tensor.dim() - 1)]
        fakes.append(mode.from_tensor(two, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic)))
    try:
        with mode, torch.no_grad():
            graph = make_fx(gradient, _allow_non_fake_inputs=True)(*fakes)
    except _BlackBoxError:
        return None
    if any(not _equates_sizes(guard.expr) for guard in mode.shape_env.guards):  # type: ignore[union-attr]
        return None
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
