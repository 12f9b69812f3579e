"""A loss as a graph of its numbers and their gradient at the model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, UnsupportedOperatorException
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree
from torch.utils._pytree import TreeSpec

from ..passes.graph import drop_detaches
from .execution.bindings import with_bindings
from .loss import SampleLoss
from .targets import target_leaves


class LossInputs:
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


@dataclass(frozen=True)
class TracedLoss:
    """The graph of a loss, and what its operations do beside returning numbers."""

    forward: Callable[..., list[Tensor]]
    """``(*tensors) -> [losses (N,), *gradients of Σ losses at the leaves]``."""
    draws: bool
    """Whether it draws random numbers, so that no two calls agree."""
    remembers: bool
    """Whether it writes into tensors of the loss's own, so that a further call would count as a step."""
    writes: bool
    """Whether it writes into what it is given."""
    own: tuple[Tensor, ...]
    """The loss's own tensors that it reads or writes."""

    @classmethod
    def of(cls, graph: fx.GraphModule) -> TracedLoss:
        """That of `trace_loss`."""
        operations = [node for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        calls = [written(node.target, node.args, node.kwargs) for node in operations]
        changed = {_root(value).op for call in calls for value in call if isinstance(value, fx.Node)}
        return cls(
            with_bindings(graph).forward,
            any(torch.Tag.nondeterministic_seeded in node.target.tags for node in operations),
            "get_attr" in changed,
            "placeholder" in changed,
            tuple(getattr(graph, node.target) for node in graph.graph.nodes if node.op == "get_attr"),
        )

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Losses and gradients; the tensors stay as they are."""
        return self.forward(*(tensor.clone() for tensor in tensors) if self.writes else tensors)


def written(operator: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a call of an operator writes into."""
    arguments = operator._schema.arguments
    given = [*zip(arguments, args, strict=False), *((a, kwargs.get(a.name)) for a in arguments)]
    values = [value for argument, value in given if argument.alias_info is not None and argument.alias_info.is_write]
    return [leaf for leaf in pytree.tree_leaves(values) if leaf is not None]


def _root(node: fx.Node) -> fx.Node:
    """Whose memory a value may be: through views, operations in place and parts of lists."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        schema = getattr(node.target, "_schema", None)
        if schema is not None and not any(argument.alias_info for argument in schema.arguments):
            break
        node = node.args[0]
    return node


class NoDerivativeError(Exception):
    """A loss is a black box."""


def differentiate(loss: SampleLoss, given: LossInputs, tensors: Sequence[Tensor]) -> list[Tensor]:
    """``[losses (N,), *∂ Σ losses / ∂ leaf]`` for each leaf of `given.at`, by autograd through the loss's code.

    Raises NoDerivativeError where the loss's code fails, returns no tensor that depends on the leaves, or has an
    operation that autograd (or a tracer) cannot differentiate: no bug of our own.
    """
    values = dict(zip(given.places, tensors, strict=True))
    leaves = [values[index].detach().requires_grad_() for index in given.at]
    values.update(zip(given.at, leaves, strict=True))
    with torch.enable_grad():
        try:
            losses = loss.loss(*given.put(list(values.values())))
        except Exception as error:  # whatever stops a tracer inside the user's loss makes it a black box
            raise NoDerivativeError from error
        if not isinstance(losses, Tensor) or not losses.requires_grad:
            raise NoDerivativeError
        losses = loss.reduce_positions(losses)
    try:
        found = torch.autograd.grad(losses, leaves, torch.ones_like(losses), allow_unused=True)
    except (NotImplementedError, UnsupportedOperatorException) as error:
        raise NoDerivativeError from error
    gradients = [torch.zeros_like(x) if each is None else each for x, each in zip(leaves, found, strict=True)]
    return [losses.detach().to(torch.promote_types(losses.dtype, torch.float32)), *gradients]


_Attributes = list[tuple[dict[str, Any], dict[str, Any]]]


def _attributes(loss: Any) -> _Attributes:
    """What the modules of a loss hold by name, as dictionaries with copies of them."""
    owners = list(loss.modules()) if isinstance(loss, nn.Module) else [loss] if hasattr(loss, "__dict__") else []
    held = [each for owner in owners for each in (vars(owner), *_registered(owner))]
    return [(each, dict(each)) for each in held]


def _registered(owner: Any) -> list[dict[str, Any]]:
    return [owner._buffers, owner._parameters] if isinstance(owner, nn.Module) else []


def _put_back(before: _Attributes) -> bool:
    """Undo what a trace has left of its own in a loss that keeps tensors; whether it has, so that its state is not in
    the graph."""
    left = False
    for held, saved in before:
        for name, value in list(held.items()):
            if isinstance(value, FakeTensor):
                left = True
                if name in saved:
                    held[name] = saved[name]
                else:
                    del held[name]
    return left


def _equates_sizes(guard: Any) -> bool:
    """Whether a guard of the trace only says that output and target have the same number of samples."""
    return bool(guard.is_Relational and guard.rel_op == "==" and guard.lhs.is_Symbol and guard.rhs.is_Symbol)


def trace_loss(loss: SampleLoss, given: LossInputs, *, free: bool) -> TracedLoss | None:
    """The graph of ``(*tensors) -> losses (N,), and ∂ Σ losses / ∂ leaf`` for each leaf of `given.at`.

    It is for a `free` batch size or this one. None for a black box, and where a free batch size is asked for but the
    loss's code depends on it.
    """

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
    before = _attributes(loss.loss)
    try:
        with mode, torch.no_grad():
            graph = make_fx(lambda *tensors: differentiate(loss, given, tensors), _allow_non_fake_inputs=True)(*fakes)
    except (NoDerivativeError, AssertionError):  # torch's own, of shapes that it checks in the derivative only
        return None
    finally:
        left = _put_back(before)
    if left:
        return None
    if any(not _equates_sizes(guard.expr) for guard in mode.shape_env.guards):  # type: ignore[union-attr]
        return None
    drop_detaches(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return TracedLoss.of(graph)
