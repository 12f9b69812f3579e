"""Pass: give the model's own random operations a key, so that every copy of a step sees the same numbers.

Rewrites:
1. ``native_dropout`` / ``dropout`` in training mode -> ``x * (keyed_random >= p) / (1 - p)``
2. ``scaled_dot_product_attention`` with dropout -> the formula that it documents, with the dropout of 1.
   (attention without dropout draws nothing and stays)
3. ``rand``, ``rand_like``, ``randn``, ``randn_like``, ``bernoulli`` -> ``onward.keyed_random``

The numbers depend on (seed, step, operation) and not on the copy: the copies, hence both halves of an antithetic pair,
differ in nothing but the injected noise, as in backpropagation where a step has one dropout mask a sample.

Declines (with UnsupportedModelError): any other operation that torch tags ``nondeterministic_seeded``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from . import ops
from .errors import UnsupportedModelError
from .graph import add_runtime_placeholder, clone, describe, finish

_aten = torch.ops.aten


def key_random_operations(module: fx.GraphModule) -> fx.GraphModule:
    module = clone(module)
    index = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not is_random(node):
            continue
        rule = _RULES.get(node.target)
        if rule is None:
            raise UnsupportedModelError(
                f"{describe(node)} draws random numbers that Onward cannot repeat for every copy. Supported: dropout, "
                "attention with dropout, rand, rand_like, randn, randn_like, bernoulli."
            )
        key = add_runtime_placeholder(module.graph, "key", None)
        with module.graph.inserting_before(node):
            rule(_Builder(module.graph, node, key, index))
        index += 1
    return finish(module)


def is_random(node: fx.Node) -> bool:
    """Whether `node` draws from torch's generator."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace == "onward":
        return False
    if target == _aten.scaled_dot_product_attention.default and not _attention_dropout(node):
        return False
    return torch.Tag.nondeterministic_seeded in target.tags


def _attention_dropout(node: fx.Node) -> Any:
    return node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)


class _Builder:
    """Adds nodes before a random node, carrying its metadata, and replaces it."""

    def __init__(self, graph: fx.Graph, node: fx.Node, key: fx.Node, index: int) -> None:
        self.graph, self.node, self.key, self.index = graph, node, key, index

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = self.graph.call_function(target, args, kwargs)
        new.meta.update({name: self.node.meta[name] for name in _ORIGIN if name in self.node.meta})
        with _fake_mode(self.node):
            new.meta["val"] = target(*fx.map_arg(args, _value), **kwargs)
        return new

    def random(self, distribution: str, like: fx.Node) -> fx.Node:
        """``keyed_random`` of the shape of the node `like`."""
        val = like.meta["val"]
        size = [
            extent if isinstance(extent, int) else self.call(_aten.sym_size.int, like, dim)
            for dim, extent in enumerate(val.shape)
        ]
        return self.sized(distribution, size, val)

    def sized(self, distribution: str, size: list[Any], val: torch.Tensor) -> fx.Node:
        dtype = val.dtype if val.is_floating_point() else torch.float32
        return self.call(ops.keyed_random, self.key, self.index, distribution, size, dtype, val.device)

    def replace(self, new: fx.Node) -> None:
        self.node.replace_all_uses_with(new)
        self.graph.erase_node(self.node)


_ORIGIN = ("nn_module_stack", "stack_trace", "source_fn_stack", "from_node")


def _value(node: fx.Node) -> Any:
    return node.meta["val"] if node.meta["val"] is not None else torch.empty(2, dtype=torch.int64)


def _fake_mode(node: fx.Node) -> Any:
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode([node.meta["val"]])
    assert mode is not None
    return mode


def _dropout(b: _Builder) -> None:
    x, p, training = (*b.node.args, True)[:3]
    result = b.node
    if b.node.target == _aten.native_dropout.default:  # returns (value, mask)
        for user in list(b.node.users):
            if user.target is not operator.getitem or user.args[1] != 0:
                raise UnsupportedModelError(
                    f"{describe(b.node)}: the dropout mask itself is used; only its value may be."
                )
            result = user
    assert isinstance(x, fx.Node)
    uniform = b.random("uniform", x) if training and p else None
    result.replace_all_uses_with(_dropped(b, x, p, uniform))
    if result is not b.node:
        b.graph.erase_node(result)
    b.graph.erase_node(b.node)


def _dropped(b: _Builder, x: fx.Node, p: Any, uniform: fx.Node | None) -> fx.Node:
    if uniform is None:
        return x
    new = b.call(_aten.mul.Tensor, x, b.call(_aten.ge.Scalar, uniform, p))
    return b.call(_aten.mul.Tensor, new, 0.0 if p == 1 else 1.0 / (1.0 - p))


def _attention(b: _Builder) -> None:
    given: list[Any] = list(b.node.args) + [None, 0.0, False][len(b.node.args) - 3 :]
    query, key, value, mask, p, causal = given
    scale, grouped = b.node.kwargs.get("scale"), b.node.kwargs.get("enable_gqa", False)
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    width = query.meta["val"].shape[-1]
    rows, columns = query.meta["val"].shape[-2], key.meta["val"].shape[-2]
    if grouped or not all(isinstance(extent, int) for extent in (width, rows, columns)):
        raise UnsupportedModelError(
            f"{describe(b.node)} with dropout needs as many key as query heads and fixed lengths; set its dropout to 0."
        )
    query = b.call(_aten.mul.Tensor, query, width**-0.5 if scale is None else scale)
    scores = b.call(_aten.matmul.default, query, b.call(_aten.transpose.int, key, -2, -1))
    if causal:
        device = scores.meta["val"].device
        ones = b.call(_aten.ones.default, [rows, columns], dtype=torch.bool, device=device)
        scores = b.call(_aten.masked_fill.Scalar, scores, b.call(_aten.triu.default, ones, 1), -torch.inf)
    if isinstance(mask, fx.Node) and mask.meta["val"].dtype == torch.bool:
        scores = b.call(_aten.masked_fill.Scalar, scores, b.call(_aten.logical_not.default, mask), -torch.inf)
    elif isinstance(mask, fx.Node):
        scores = b.call(_aten.add.Tensor, scores, mask)
    weights = b.call(_aten.softmax.int, scores, -1)
    weights = _dropped(b, weights, p, b.random("uniform", weights))
    b.replace(b.call(_aten.matmul.default, weights, value))


def _like(distribution: str) -> Callable[[_Builder], None]:
    def rule(b: _Builder) -> None:
        like = b.node.args[0]
        assert isinstance(like, fx.Node)
        b.replace(b.random(distribution, like))

    return rule


def _sized(distribution: str) -> Callable[[_Builder], None]:
    def rule(b: _Builder) -> None:
        b.replace(b.sized(distribution, list(b.node.args[0]), b.node.meta["val"]))  # type: ignore[arg-type]

    return rule


def _bernoulli(b: _Builder) -> None:
    like = b.node.args[0]
    assert isinstance(like, fx.Node)
    less, probability = (_aten.lt.Tensor, like) if len(b.node.args) == 1 else (_aten.lt.Scalar, b.node.args[1])
    below = b.call(less, b.random("uniform", like), probability)
    b.replace(b.call(_aten._to_copy.default, below, dtype=like.meta["val"].dtype))


_RULES: dict[Any, Callable[[_Builder], None]] = {
    _aten.dropout.default: _dropout,
    _aten.native_dropout.default: _dropout,
    _aten.scaled_dot_product_attention.default: _attention,
    _aten.rand_like.default: _like("uniform"),
    _aten.randn_like.default: _like("normal"),
    _aten.rand.default: _sized("uniform"),
    _aten.randn.default: _sized("normal"),
    _aten.bernoulli.default: _bernoulli,
    _aten.bernoulli.p: _bernoulli,
}

__all__ = ["is_random", "key_random_operations"]
