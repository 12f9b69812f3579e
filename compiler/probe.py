"""One run of the captured graph on the example batch, to see what shapes do not tell.

Two runs that differ in the last sample alone show which rows of every tensor belong to it: whether a flattened batch
dimension is ordered samples first or last, and whether an operation mixes samples.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.graph import Layout, Role, clone, describe, finish
from ..passes.rules import uses_batch_statistics


def probe_samples(module: fx.GraphModule, bind: dict[fx.Node, Any], batch: int) -> tuple[fx.GraphModule, str]:
    """Correct the layouts of `module`, and name the first operation that mixes samples (``""`` if none does).

    Args:
        module: a graph with layouts (`passes.locate_samples`).
        bind: the value of every placeholder, for a batch of the example's size.
        batch: the example's batch size. A single sample is taken twice.
    """
    module = clone(module)
    places = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
    values = {places[node.name]: value for node, value in bind.items()}
    if batch == 1:
        values = {node: torch.cat([value, value]) if _holds_batch(node) else value for node, value in values.items()}
        batch = 2
    with torch.no_grad():
        base = _Recorder(module, values, None)
        changed = {node: _other_sample(node, value, batch) for node, value in values.items()}
        other = _Recorder(module, changed, base.results)
    mixing = ""
    for node in module.graph.nodes:
        layout: Layout | None = node.meta.get("layout")
        before, after = base.results.get(node), other.results.get(node)
        if node.op != "call_function" or not isinstance(before, Tensor) or not isinstance(after, Tensor):
            continue
        if layout is not None and before.dim() != len(layout.sizes):
            continue  # a by-product whose shape is not what its fake kernel said (aten.embedding_bag), read by nobody
        if layout is None or not layout.batched:
            if not mixing and not _same(before, after):
                mixing = describe(node)
            continue
        rows = _changed_rows(before, after, layout.dim)
        outer = next((o for o in _divisors(layout.sizes[layout.dim]) if rows <= _rows(layout, o, batch)), None)
        if outer is not None:
            node.meta["layout"] = replace(layout, outer=outer)
        elif not mixing:
            mixing = describe(node)
    return finish(module), mixing


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every result; batch statistics are taken from `reference` where given."""

    def __init__(self, module: fx.GraphModule, values: dict[fx.Node, Any], reference: dict[fx.Node, Any] | None) -> None:
        super().__init__(module)
        self.results: dict[fx.Node, Any] = {}
        self.reference = reference
        self.run(*[values[node] for node in module.graph.nodes if node.op == "placeholder"])

    def run_node(self, n: fx.Node) -> Any:
        if self.reference is not None and n.op == "call_function" and uses_batch_statistics(n):
            result = self._normalize(n, self.reference[n])
        else:
            result = super().run_node(n)
        self.results[n] = result
        return result

    def _normalize(self, node: fx.Node, reference: Any) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(node)
        mean, rstd = reference[1], reference[2]
        variance = rstd.pow(-2) - args[-1]
        result = torch.nn.functional.batch_norm(args[0], mean, variance, args[1], args[2], False, 0.0, args[-1])
        return (result, *reference[1:])


def _other_sample(node: fx.Node, value: Any, batch: int) -> Any:
    """`value` with its last sample replaced: by another sample, and moved a little where it is a float."""
    if not _holds_batch(node):
        return value
    changed = value.clone()
    changed[-1] = value[0]
    if not value.is_floating_point() and torch.equal(changed, value):
        changed[-1] = 0
    if value.is_floating_point():
        changed[-1] += 0.1 + 0.1 * torch.linspace(0, 1, max(changed[-1].numel(), 1), dtype=value.dtype).reshape_as(
            changed[-1]
        ).to(value.device)
    return changed


def _holds_batch(node: fx.Node) -> bool:
    return node.meta["role"] == Role.INPUT and "layout" in node.meta and bool(node.meta["layout"].batched)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, which may differ between runs of parallel reductions."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return bool((a == b).all())
    return torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


def _changed_rows(a: Tensor, b: Tensor, dim: int) -> set[int]:
    if a.shape != b.shape:
        return set(range(a.shape[dim]))
    left, right = (x.movedim(dim, 0).reshape(x.shape[dim], -1) for x in (a, b))
    if a.is_floating_point():
        differs = ~torch.isclose(left, right, rtol=1e-4, atol=1e-6, equal_nan=True)
    else:
        differs = left != right
    return set(differs.any(1).nonzero().flatten().tolist())


def _rows(layout: Layout, outer: int, batch: int) -> set[int]:
    """The rows of the last sample, for rows ordered (outer, batch, inner)."""
    inner = layout.sizes[layout.dim] // outer
    return {(o * batch + batch - 1) * inner + i for o in range(outer) for i in range(inner)}


def _divisors(count: int) -> list[int]:
    return [d for d in range(1, count + 1) if count % d == 0]


__all__ = ["probe_samples"]
