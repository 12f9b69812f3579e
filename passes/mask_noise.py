"""Pass: put no noise where the next operation blocks it (the alive mask, method.md 10).

A coordinate whose every reader blocks it locally (a ReLU at z ≤ 0, a max-pool's losers, a dropped unit) has a zero
gradient to first order; noise on it would only be variance. For every noise point whose readers are all in the table,
a boolean mask is computed from the **clean** run's value and given to the noise node, and is multiplied into the site's
cotangent by `complete_gradients`.

To first order in σ nothing changes; at finite σ the estimate is that of a loss smoothed over the alive coordinates
only.

Writes ``meta["clean"]`` on the mask's nodes (they are the clean run's also in a perturbed one) and ``meta["alive"]``,
the mask's name, on the noise point.

Declines: a reader that is not in the table blocks nothing, so the site gets no mask.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from .graph import Kind, clone, finish, getitem, outputs

_aten = torch.ops.aten
Mask = fx.Node | None


def mask_noise(module: fx.GraphModule) -> fx.GraphModule:
    module = clone(module)
    returned = {node for output, node in outputs(module) if output.kind != "capture"}
    for noisy in [node for node in module.graph.nodes if "noise_of" in node.meta]:
        point = noisy.args[0]
        if noisy in returned or point.meta["site"].weight_noise is not None:
            continue
        with module.graph.inserting_before(noisy):
            mask = _Masks(module.graph, point).alive(point, noisy)
        if mask is not None:
            if "val" not in mask.meta:
                like = point.meta["val"]
                with detect_fake_mode([like]):  # type: ignore[union-attr]
                    mask.meta["val"] = torch.empty_like(like, dtype=torch.bool)
            noisy.kwargs = {**noisy.kwargs, "alive": mask}
            point.meta["alive"] = mask.name
    return finish(module)


class _Masks:
    """Builds the mask of one noise point."""

    def __init__(self, graph: fx.Graph, point: fx.Node) -> None:
        self.graph, self.point = graph, point

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        kept = ("nn_module_stack", "stack_trace", "layout")
        node.meta.update({name: self.point.meta[name] for name in kept if name in self.point.meta})
        node.meta.update(kind=Kind.ACTIVATION, clean=True)
        return node

    def alive(self, value: fx.Node, readers_of: fx.Node) -> Mask:
        """Where any reader of `readers_of` lets a change of `value`, its clean twin, through; None if everywhere."""
        masks = []
        for reader in readers_of.users:
            rule = BLOCKING.get(reader.target)
            mask = rule(self, value, readers_of, reader) if rule is not None else None
            if mask is None:
                return None
            masks.append(mask)
        if not masks:
            return None
        result = masks[0]
        for mask in masks[1:]:
            result = self.call(_aten.logical_or.default, result, mask)
        return result


def _relu(masks: _Masks, value: fx.Node, source: fx.Node, reader: fx.Node) -> Mask:
    above = masks.call(_aten.gt.Scalar, value, 0)
    beyond = masks.alive(masks.call(_aten.relu.default, value), reader) if _pools(reader) else None
    return above if beyond is None else masks.call(_aten.logical_and.default, above, beyond)


def _between(low: float | None, high: float | None, *, bounds: bool = False) -> Callable[..., Mask]:
    """Between two numbers, or the reader's own arguments; with `bounds` also at them, as clamp's derivative has it."""
    above, below = (_aten.ge.Scalar, _aten.le.Scalar) if bounds else (_aten.gt.Scalar, _aten.lt.Scalar)

    def rule(masks: _Masks, value: fx.Node, source: fx.Node, reader: fx.Node) -> Mask:
        given = [argument for argument in reader.args[1:3] if isinstance(argument, (int, float))]
        lower, upper = (low, high) if low is not None else (given if len(given) == 2 else (None, None))
        if lower is None or upper is None:
            return None
        inside = masks.call(above, value, lower)
        return masks.call(_aten.logical_and.default, inside, masks.call(below, value, upper))

    return rule


def _max_pool(masks: _Masks, value: fx.Node, source: fx.Node, reader: fx.Node) -> Mask:
    if len(reader.args) > 4 and reader.args[4] not in (1, [1, 1]):
        return None  # dilated windows
    pooled = masks.call(_aten.max_pool2d_with_indices.default, value, *reader.args[1:])
    indices = masks.call(operator.getitem, pooled, 1)
    height, width = value.meta["val"].shape[-2:] if "val" in value.meta else masks.point.meta["val"].shape[-2:]
    winners = masks.call(_aten.ones_like.default, masks.call(operator.getitem, pooled, 0))
    back = masks.call(_aten.max_unpool2d.default, winners, indices, [int(height), int(width)])
    return masks.call(_aten.gt.Scalar, back, 0)


def _kept(masks: _Masks, value: fx.Node, source: fx.Node, reader: fx.Node) -> Mask:
    """Multiplication by a 0/1 mask that no noise reaches, such as dropout's."""
    other = next((argument for argument in reader.args if argument is not source), None)
    if not isinstance(other, fx.Node) or other.meta.get("kind") != Kind.CONSTANT or other.op == "placeholder":
        return None
    val = other.meta.get("val")
    if not isinstance(val, torch.Tensor) or val.dtype != torch.bool:
        return None
    if other.meta.get("layout") != masks.point.meta["layout"]:
        return None  # broadcast against the noise
    _move_before(other, source)
    return other


def _move_before(node: fx.Node, later: fx.Node) -> None:
    """Compute `node` before `later`, on which it does not depend."""
    if node.op == "call_function" and later < node:
        for argument in node.all_input_nodes:
            _move_before(argument, later)
        later.prepend(node)


def _pools(reader: fx.Node) -> bool:
    return bool(reader.users) and all(user.target in _POOLS for user in reader.users) and getitem(reader, 0) is None


_POOLS = (_aten.max_pool2d.default,)

BLOCKING: dict[Any, Callable[[_Masks, fx.Node, fx.Node, fx.Node], Mask]] = {
    _aten.relu.default: _relu,
    _aten.relu6.default: _between(0.0, 6.0),
    _aten.hardtanh.default: _between(None, None),
    _aten.clamp.default: _between(None, None, bounds=True),
    _aten.hardsigmoid.default: _between(-3.0, 3.0),
    _aten.max_pool2d.default: _max_pool,
    _aten.mul.Tensor: _kept,
}
"""What blocks which coordinates. Unknown operations block nothing."""
