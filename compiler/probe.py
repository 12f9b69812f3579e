"""One run of the captured graph on the example batch, to see what shapes do not tell.

Two runs that differ in the last sample alone show which rows of every tensor belong to it: whether a flattened batch
dimension is ordered samples first or last, and whether an operation mixes samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.graph import Layout, Role, clone, describe, finish, outputs
from ..passes.rules import uses_batch_statistics
from .program import binding_key, input_keys, output_keys


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
        base = _Recorder(module, values, base.results)  # again, normalised by the formula that `other` uses
        changed = {node: _other_sample(node, value, batch) for node, value in values.items()}
        other = _Recorder(module, changed, base.results)
    mixing = ""
    for node in module.graph.nodes:
        layout: Layout | None = node.meta.get("layout")
        before, after = base.results.get(node), other.results.get(node)
        if node.op != "call_function" or not isinstance(before, Tensor) or not isinstance(after, Tensor):
            continue
        if not node.users or (layout is not None and before.dim() != len(layout.sizes)):
            continue  # read by nobody: uninitialised memory, or a by-product of another shape than its fake kernel says
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


def probe_copies(
    stages: Sequence[fx.GraphModule], runs: Sequence[fx.GraphModule], bind: dict[fx.Node, Any], num_sites: int
) -> str:
    """Why copies cannot stand side by side in the batch (``""`` if they can), found by running two beside one alone.

    A model may use row numbers or the batch size as values (``h[torch.arange(len(h)), last]``): it then reads other
    copies' rows, though it does not mix the samples of one.

    Args:
        stages: the clean run's stages.
        runs: the perturbed runs.
        bind: the value of every placeholder of the captured graph, for a batch of the example's size.
        num_sites: how many sites have noise.
    """
    environment = {binding_key(node): _few(node, value) for node, value in bind.items()}
    device = next(value.device for value in environment.values() if isinstance(value, Tensor))
    environment["runtime:key"] = torch.zeros(2, dtype=torch.int64, device=device)
    environment["runtime:sigmas"] = torch.ones(num_sites, device=device)

    def run(module: fx.GraphModule, *copies: int) -> dict[str, Any]:
        environment["runtime:copies"] = torch.tensor(copies, device=device)
        results = module.forward(*[environment[key] for key in input_keys(module)])
        return dict(zip(output_keys(module), results, strict=True))

    with torch.no_grad():
        for stage in stages:
            environment.update(run(stage, 0))
        for module in runs:
            alone = run(module, 1)
            try:
                beside = run(module, 0, 1)
            except (RuntimeError, IndexError, ValueError) as error:
                return f"two copies cannot stand side by side in the batch: {error}"
            for output, node in outputs(module):
                if output.kind != "output" or not isinstance(node, fx.Node):
                    continue
                key, layout = f"output:{output.name}", node.meta.get("layout")
                if layout is not None and not _same(copy_of(beside[key], layout, 1, 2), alone[key]):
                    return f"the output {output.name} of a copy depends on the copies beside it in the batch"
    return ""


def copy_of(tiled: Any, layout: Layout | None, index: int, copies: int) -> Any:
    """Copy `index` of a tiled tensor (rows ``(outer, copies, N, inner)``); itself if it has no batch dimension."""
    if copies == 1 or layout is None or not layout.batched:
        return tiled
    rows = tiled.unflatten(layout.dim, (layout.outer, copies, -1)).select(layout.dim + 1, index)
    return rows.flatten(layout.dim, layout.dim + 1)


def _few(node: fx.Node, value: Any) -> Any:
    """Two to four samples of a batched input."""
    if not _holds_batch(node):
        return value
    return torch.cat([value, value]) if len(value) == 1 else value[:4]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every result; batch statistics are taken from `reference` where given."""

    def __init__(
        self, module: fx.GraphModule, values: dict[fx.Node, Any], reference: dict[fx.Node, Any] | None
    ) -> None:
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


__all__ = ["copy_of", "probe_copies", "probe_samples"]
