"""The gradient of the loss at the model's outputs: the one vector a sample that learned feedback is driven by."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..passes import ops
from .execution.precision import autocast_dtypes
from .finite import alike, rounding_of
from .loss import SampleLoss
from .targets import repeat_target
from .traced_loss import LossInputs, NoDerivativeError, TracedLoss, differentiate, trace_loss

BLACK_BOX_DRAWS = 64
"""Antithetic pairs of evaluations of a loss without derivative; they cost no forward of the model."""

BLACK_BOX_SIGMA = 0.5
"""Standard deviation of their noise, in units of the outputs' own."""

CHECK_EVERY = 50
"""Steps from one comparison of a traced loss with the user's code to the next: it costs as much as the loss."""

SIZES_APART = 2
"""Batch sizes for which a loss is traced one by one: an epoch seldom has others than its own and its last batch's, and
the trace for any size takes several times as long, a tenth of a second at first."""

_MOST_KNOWN = 64
"""Shapes of batches whose graphs are at hand."""

_SITE = (1 << 24) - 1
"""Site number of the noise at the first output, the others' are below; the compiler numbers sites from 0."""


class OutputGradient:
    """``(output, target, key) -> (losses (N,), error (N, outputs))``, the error being that of the mean loss.

    `output` is what the model returns, whatever its structure. The error is that of the leaves whose numbers are `at`
    (None: all floating-point ones), flattened and put one behind the other, of the dtype they have in common; the loss
    may read the others, but they have no error.

    A loss with a derivative is traced to a graph of its losses and their gradient: for each of the first batch sizes
    (`SIZES_APART`), then for all (for each if its code depends on it, as by ``len(output)``). So no autograd graph is
    built while training, and its own code is not called again. Now and then it is, to compare (`CHECK_EVERY`), unless
    it draws random numbers or writes into tensors of its own: a loss that has come to give other numbers, because
    something that it reads has changed, is traced anew, and one that does so again is not traced any more; both with a
    warning.

    A loss that cannot be traced (its code depends on values, as that of ``F.ctc_loss`` does, or its target holds
    anything but tensors) is differentiated by autograd at the output in every step. A black box, without a derivative,
    is differentiated by likelihood ratio at the output, which is one more site: perturbed outputs, `BLACK_BOX_DRAWS`
    pairs of them, but no perturbed model.
    """

    def __init__(self, loss: SampleLoss, at: Sequence[int] | None = None) -> None:
        self.loss = loss
        self.at = at
        self.last: TracedLoss | None = None
        """The graph that answered the last call; None if autograd did, or an estimate."""
        self._known: dict[Any, list[tuple[Any, TracedLoss]]] = {}
        """Graphs by the shapes that they were made for, with the structures of output and target."""
        self._graphs: dict[int | None, TracedLoss | None] = {}  # by batch size; None is any
        self._traced_for: Any = None
        self._calls = 0
        self._changes = 0
        """How often it was found to give other numbers than its graph."""

    def __call__(self, output: Any, target: Any, key: Tensor) -> tuple[Tensor, Tensor]:
        leaves, spec = pytree.tree_flatten(output)
        parts, target_spec = pytree.tree_flatten(target)
        tensors = [value for value in (*leaves, *parts) if isinstance(value, Tensor)]
        shapes = (*((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors), autocast_dtypes())
        described = (spec, target_spec, [leaf for leaf in leaves if not isinstance(leaf, Tensor)])
        traced = next((each for known, each in self._known.get(shapes, ()) if known == described), None)
        self.last = traced if all(part is None or isinstance(part, Tensor) for part in parts) else None
        if self.last is not None:
            losses, *found = self.last(tensors)
            self._calls += 1
            if self._calls % CHECK_EVERY == 0 and self._has_changed(self.last, output, target, [losses, *found]):
                return self(output, target, key)
        else:
            losses, found = self._first(leaves, spec, target, key, shapes, described)
        rows = [each.reshape(len(losses), -1) for each in found]
        error = rows[0].contiguous() if len(rows) == 1 else torch.cat(rows, 1)  # however an output lies
        return losses, error / len(losses)

    def answers(self, traced: TracedLoss | None) -> bool:
        """Whether a graph that answered a call will answer the next of its kind alone, so that whoever has captured it
        may replay it instead (`answered`): not once it was dropped, nor where the loss's code is due to be compared."""
        known = any(traced is each for several in self._known.values() for _, each in several)
        return known and (self._calls + 1) % CHECK_EVERY > 0

    def answered(self) -> None:
        """A call was replayed; it counts as one."""
        self._calls += 1

    @contextmanager
    def unchecked(self) -> Iterator[None]:
        """Calls in which the loss's code is not compared, and which do not count."""
        held, self._calls = self._calls, 0
        try:
            yield
        finally:
            self._calls = held

    def _first(
        self, leaves: list[Any], spec: Any, target: Any, key: Tensor, shapes: Any, described: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """The losses and gradients of a batch unlike those before, or of a loss that is not traced."""
        given = self._given(leaves, spec, target)
        samples = given.samples
        traced = self._traced(given)
        values = traced(given.tensors) if traced is not None else self._differentiated(given)
        if values and values[0].shape == (samples,) and not values[0].is_complex():
            self.last = traced
            if traced is not None:
                self._known = self._known if len(self._known) < _MOST_KNOWN else {}
                self._known.setdefault(shapes, []).append((described, traced))
            return values[0], values[1:]
        losses = self.loss(pytree.tree_unflatten(leaves, spec), target, samples)  # or the reason why it is none
        return losses, self._estimate(given, key)

    def _given(self, leaves: list[Any], spec: Any, target: Any) -> LossInputs:
        at = [index for index, leaf in enumerate(leaves) if _is_floating(leaf)] if self.at is None else list(self.at)
        return LossInputs(leaves, spec, target, int(leaves[at[0]].shape[0]), at)

    def _differentiated(self, given: LossInputs) -> list[Tensor]:
        """Losses and gradients by autograd through the loss's own code; nothing of a black box."""
        try:
            return differentiate(self.loss, given, [tensor.clone() for tensor in given.tensors])  # it may write there
        except NoDerivativeError:
            return []

    def _has_changed(self, traced: TracedLoss, output: Any, target: Any, found: list[Tensor]) -> bool:
        """Whether the loss's code now gives other numbers, or other gradients, than its graph."""
        if traced.draws or traced.remembers:
            return False
        leaves, spec = pytree.tree_flatten(output)
        now = self._differentiated(self._given(leaves, spec, target))
        if len(now) == len(found) and all(map(_alike, now, found)):
            return False
        self._changes += 1
        self._known, self._graphs, self._traced_for = {}, {}, None
        again = self._changes > 1
        warnings.warn(
            f"the loss {self.loss.name} gives other numbers than when it was traced: it reads something that has "
            f"changed, which is noticed every {CHECK_EVERY} steps only. "
            + ("From now on it is called in every step. " if again else "It is traced anew. ")
            + "Give it what changes as a tensor in the target, or as one that you write into.",
            stacklevel=2,
        )
        return True

    def _traced(self, given: LossInputs) -> TracedLoss | None:
        """The loss as a graph; None for one that cannot be traced, and for a black box."""
        if not given.traceable or self._changes > 1:
            return None
        described = (*given.described(), autocast_dtypes())
        if self._traced_for != described:
            self._graphs, self._traced_for = {}, described
        if None in self._graphs:
            return self._graphs[None]
        if given.samples not in self._graphs:
            general = trace_loss(self.loss, given, free=True) if len(self._graphs) == SIZES_APART else None
            if general is not None:
                self._graphs = {None: general}
                return general
            self._graphs[given.samples] = trace_loss(self.loss, given, free=False)
        return self._graphs[given.samples]

    def _estimate(self, given: LossInputs, key: Tensor) -> list[Tensor]:
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
        repeated = self.loss.repeat(given.target, len(copies), samples)
        output = pytree.tree_unflatten(perturbed, given.spec)
        losses = self.loss(output, repeated, samples * len(copies)).reshape(2, BLACK_BOX_DRAWS, samples)
        found = []
        for index, (site, leaf) in sites.items():
            weights = (losses[0] - losses[1]).to(leaf.dtype) / (2 * spreads[index] * BLACK_BOX_DRAWS)
            where = ([1, *leaf.shape[1:]], 0, 1)
            found.append(ops.weighted_noise_sum(weights, draws, key, site, "gaussian", "exact", *where))
        return found


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _alike(now: Tensor, then: Tensor) -> bool:
    """Whether two results are the same to rounding; a graph and its code may round 16 bits differently."""
    return alike(now, then.to(now.dtype), rounding_of(then.dtype))
