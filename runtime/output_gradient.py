"""The gradient of the loss at the model's outputs: the one vector a sample that learned feedback is driven by."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedOperatorException
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree
from torch.utils._pytree import TreeSpec

from ..passes import ops
from ..passes.graph import drop_detaches
from .bindings import with_bindings
from .loss import SampleLoss
from .random_state import capture_rng, restore_rng
from .targets import repeat_target, target_leaves

BLACK_BOX_DRAWS = 64
"""Antithetic pairs of evaluations of a loss without derivative; they cost no forward of the model."""

BLACK_BOX_SIGMA = 0.5
"""Standard deviation of their noise, in units of the outputs' own."""

CHECK_EVERY = 50
"""Steps from one comparison of a traced loss with the user's code to the next: it costs as much as the loss."""

_MOST_KNOWN = 64
"""Shapes of batches whose graphs are at hand."""

_SITE = (1 << 24) - 1
"""Site number of the noise at the first output, the others' are below; the compiler numbers sites from 0."""


class OutputGradient:
    """``(output, target, key) -> (losses (N,), error (N, outputs))``, the error being that of the mean loss.

    `output` is what the model returns, whatever its structure. The error is that of the leaves whose numbers are `at`
    (None: all floating-point ones), flattened and put one behind the other, of the dtype they have in common; the loss
    may read the others, but they have no error.

    A loss with a derivative is traced once to a graph of its losses and their gradient (once a batch size if its code
    depends on it, as by ``len(output)``), so that no autograd graph is built while training, and its own code is not
    called again. Now and then it is (`CHECK_EVERY`): a loss that has come to give other numbers than its graph, because
    something that it reads has changed, is traced anew, with a warning. One that draws random numbers is not compared.
    A black box (a loss that cannot be traced, or has no derivative, or whose target holds anything but tensors) is
    differentiated by likelihood ratio at the output, which is one more site: perturbed outputs, `BLACK_BOX_DRAWS` pairs
    of them, but no perturbed model.
    """

    def __init__(self, loss: SampleLoss, at: Sequence[int] | None = None) -> None:
        self.loss = loss
        self.at = at
        self._known: dict[Any, list[tuple[Any, fx.GraphModule]]] = {}
        """Graphs by the shapes that they were made for, with the structures of output and target."""
        self._graphs: dict[int | None, fx.GraphModule | None] = {}  # by batch size; None is any
        self._traced_for: Any = None
        self._calls = 0
        self._compares = True

    def __call__(self, output: Any, target: Any, key: Tensor) -> tuple[Tensor, Tensor]:
        leaves, spec = pytree.tree_flatten(output)
        parts, target_spec = pytree.tree_flatten(target)
        tensors = [value for value in (*leaves, *parts) if isinstance(value, Tensor)]
        shapes = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        rest = [value for value in (*leaves, *parts) if not isinstance(value, Tensor)]
        described = (spec, target_spec, rest)
        graph = next((each for known, each in self._known.get(shapes, ()) if known == described), None)
        if graph is not None:
            losses, *found = graph(*tensors)
            self._calls += 1
            if self._compares and self._calls % CHECK_EVERY == 0 and self._has_changed(output, target, losses):
                self._known, self._traced_for = {}, None
                return self(output, target, key)
        else:
            at = [index for index, leaf in enumerate(leaves) if _is_floating(leaf)] if self.at is None else self.at
            before = capture_rng()
            losses = self.loss(output, target, leaves[at[0]].shape[0])  # checks what it returns
            given = _Given(leaves, spec, target, len(losses), list(at))
            graph = self._derivative(given)
            if graph is None:
                found = self._estimate(given, key)
            else:
                restore_rng(before)  # as if the loss had been called once, as in all later steps
                self._known = self._known if len(self._known) < _MOST_KNOWN else {}
                self._known.setdefault(shapes, []).append((described, with_bindings(graph)))
                losses, *found = graph(*tensors)
        rows = [each.reshape(len(losses), -1) for each in found]
        error = rows[0].contiguous() if len(rows) == 1 else torch.cat(rows, 1)  # however an output lies
        return losses, error / len(losses)

    def _has_changed(self, output: Any, target: Any, losses: Tensor) -> bool:
        """Whether the loss now gives other numbers than its graph, and the same when asked twice."""
        before = capture_rng()
        copies = [pytree.tree_map(_copied, (output, target)) for _ in range(2)]
        once, again = (self.loss(out, wanted, len(losses)) for out, wanted in copies)
        restore_rng(before)
        if not torch.allclose(once, again, equal_nan=True):
            self._compares = False
            return False
        if torch.allclose(once, losses, rtol=1e-3, atol=1e-6, equal_nan=True):
            return False
        warnings.warn(
            f"the loss {self.loss.name} gives other numbers than when it was traced: it reads something that has "
            f"changed, which is noticed every {CHECK_EVERY} steps only. Give it what changes in the target, or as a "
            "tensor that you write into.",
            stacklevel=2,
        )
        return True

    def _derivative(self, given: _Given) -> fx.GraphModule | None:
        """The graph of ``(*tensors) -> losses and the gradients at the leaves``; None for a black box."""
        if not given.traceable:
            return None
        described = given.described()
        if self._traced_for != described:
            general = _trace(self.loss, given, free=True)
            self._graphs = {} if general is None else {None: general}
            self._traced_for = described
        if None in self._graphs:
            return self._graphs[None]
        if given.samples not in self._graphs:
            self._graphs[given.samples] = _trace(self.loss, given, free=False)
        return self._graphs[given.samples]

    def _estimate(self, given: _Given, key: Tensor) -> list[Tensor]:
        """The gradients at the leaves, all perturbed together, each by noise of its own in units of its own spread."""
        samples = given.samples
        draws = torch.arange(BLACK_BOX_DRAWS)
        copies = torch.cat([draws, ~draws])
        perturbed = repeat_target(given.leaves, len(copies), samples)
        sites = {index: (_SITE - place, given.leaves[index]) for place, index in enumerate(given.at)}
        spreads = {}
        for index, (site, leaf) in sites.items():
            sigma = BLACK_BOX_SIGMA * max(float(leaf.std(correction=0)), 1e-6)
            spreads[index] = sigma
            sigmas = torch.tensor(sigma, dtype=leaf.dtype).expand(_SITE + 1)
            where = ([1, *leaf.shape[1:]], 0, 1)
            perturbed[index] = ops.perturb(leaf, copies, key, sigmas, site, "gaussian", *where, False)
        repeated = repeat_target(given.target, len(copies), samples)
        output = pytree.tree_unflatten(perturbed, given.spec)
        losses = self.loss(output, repeated, samples * len(copies)).reshape(2, BLACK_BOX_DRAWS, samples)
        found = []
        for index, (site, leaf) in sites.items():
            weights = (losses[0] - losses[1]).to(leaf.dtype) / (2 * spreads[index] * BLACK_BOX_DRAWS)
            where = ([1, *leaf.shape[1:]], 0, 1)
            found.append(ops.weighted_noise_sum(weights, draws, key, site, "gaussian", "exact", *where))
        return found


class _Given:
    """An output and a target, taken apart."""

    def __init__(self, leaves: list[Any], spec: TreeSpec, target: Any, samples: int, at: list[int]) -> None:
        self.leaves, self.spec, self.target, self.samples, self.at = leaves, spec, target, samples, at
        parts, self.target_spec = pytree.tree_flatten(target)
        # a list of one tensor a sample differs from batch to batch
        whole = len(target_leaves(target, samples)) == len(parts)
        self.traceable = whole and all(part is None or isinstance(part, Tensor) for part in parts)
        self.everything = [*leaves, *parts]
        self.places = [place for place, value in enumerate(self.everything) if isinstance(value, Tensor)]

    @property
    def tensors(self) -> list[Tensor]:
        """Those of the output, then those of the target."""
        return [self.everything[place] for place in self.places]

    def put(self, tensors: Sequence[Tensor]) -> tuple[Any, Any]:
        """Output and target with other tensors."""
        values = list(self.everything)
        for place, tensor in zip(self.places, tensors, strict=True):
            values[place] = tensor
        count = len(self.leaves)
        return (
            pytree.tree_unflatten(values[:count], self.spec),
            pytree.tree_unflatten(values[count:], self.target_spec),
        )

    def described(self) -> Any:
        """All that a graph depends on but the number of samples."""
        rest = [value for value in self.leaves if not isinstance(value, Tensor)]
        shapes = [(self.batched(t), t.shape[self.batched(t) :], t.dtype, t.device) for t in self.tensors]
        return self.target_spec, self.places, rest, shapes

    def batched(self, tensor: Tensor) -> bool:
        """Whether its first dimension is the samples."""
        return tensor.dim() > 0 and tensor.shape[0] == self.samples


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _equates_sizes(guard: Any) -> bool:
    """Whether a guard of the trace only says that output and target have the same number of samples."""
    return bool(guard.is_Relational and guard.rel_op == "==" and guard.lhs.is_Symbol and guard.rhs.is_Symbol)


def _copied(leaf: Any) -> Any:
    """A tensor of its own: a loss may write into what it is given."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


class _BlackBoxError(Exception):
    pass


def _trace(loss: SampleLoss, given: _Given, *, free: bool) -> fx.GraphModule | None:
    """The graph of ``(*tensors) -> losses (N,), and ∂ Σ losses / ∂ leaf`` for each leaf of `given.at`.

    It is for a `free` batch size or this one. None for a black box, and where a free batch size is asked for but the
    loss's code depends on it.
    """

    def gradient(*tensors: Tensor) -> list[Tensor]:
        values = dict(zip(given.places, tensors, strict=True))
        leaves = [values[index].detach().requires_grad_() for index in given.at]
        values.update(zip(given.at, leaves, strict=True))
        with torch.enable_grad():
            try:
                losses = loss.loss(*given.put(list(values.values())))
            except Exception as error:  # whatever stops a tracer inside the user's loss makes it a black box
                raise _BlackBoxError from error
            if not isinstance(losses, Tensor) or not losses.requires_grad:
                raise _BlackBoxError
            losses = loss.reduce_positions(losses)
        try:
            found = torch.autograd.grad(losses, leaves, torch.ones_like(losses), allow_unused=True)
        except (NotImplementedError, UnsupportedOperatorException) as error:  # of the loss, and no tracer knows it
            raise _BlackBoxError from error
        gradients = [torch.zeros_like(x) if each is None else each for x, each in zip(leaves, found, strict=True)]
        return [losses.detach().to(torch.promote_types(losses.dtype, torch.float32)), *gradients]

    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    fakes = []
    for tensor in given.tensors:
        batched = given.batched(tensor)
        constant = free and batched and tensor.shape[0] == 1  # a size of 1 would be one
        two = torch.cat([tensor, tensor]) if constant else tensor
        dynamic = [DimDynamic.STATIC] * tensor.dim()
        if free and batched:
            dynamic[0] = DimDynamic.DYNAMIC
        fakes.append(mode.from_tensor(two, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic)))
    try:
        with mode, torch.no_grad():
            graph = make_fx(gradient, _allow_non_fake_inputs=True)(*fakes)
    except _BlackBoxError:
        return None
    if any(not _equates_sizes(guard.expr) for guard in mode.shape_env.guards):  # type: ignore[union-attr]
        return None
    drop_detaches(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
