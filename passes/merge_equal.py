"""Pass: compute once what a graph computes several times: the same operation of the same operands.

Gradient subgraphs are independent of each other, so that two of them recompute the same activations and pull the same
predicted gradient back over the same stretch (method.md 13, 14). Where one graph holds both (`execution.fusion`) the
second is the first: fewer operations and the same bits, for the memory of values that wait for their last reader.

Operations that draw random numbers are never merged (two noises would become one), and a graph that writes in place
stays as it is: there equal operands may hold other numbers later. Keyed noise is a function of its key, and is merged.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .graph import clone, finish

_OF_SIZES = {
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg,
}  # fmt: skip
"""What a graph calls beside operators of tensors: parts of their results, and arithmetic of sizes."""


def merge_equal(module: fx.GraphModule) -> fx.GraphModule:
    """The same outputs, every operation on the same operands done once."""
    module = clone(module)
    if any(_writes(node) for node in module.graph.nodes):
        return module
    known: dict[Any, fx.Node] = {}
    for node in list(module.graph.nodes):
        if not _repeats(node):
            continue
        kwargs = tuple(sorted((name, _comparable(value)) for name, value in node.kwargs.items()))
        first = known.setdefault((node.target, _comparable(node.args), kwargs), node)
        if first is not node:
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)
    return finish(module)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _repeats(node: fx.Node) -> bool:
    """Whether two calls of an operation give the same."""
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded not in node.target.tags
    return node.target in _OF_SIZES


def _comparable(value: Any) -> Any:
    """An argument as something that is equal for equal arguments alone: 1, 1.0, True and -0.0 differ."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_comparable, value))
    return value if isinstance(value, fx.Node) else (type(value), repr(value))
