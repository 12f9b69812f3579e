"""Pass: split the one-copy graph into the clean run and one perturbed run a group of sites (method.md 5).

``perturbed_run(module, sites)`` keeps only what the noise of those sites can change. Everything before is computed
once, in the clean run, and shared by all copies. The perturbed run holds all copies of a chunk side by side in the
batch:

1. A noise node of the group branches: it takes the clean value and returns its copies (noise on a weight takes the
   activation clean, or in copies where other noise has reached it).
2. A clean value that a perturbed operation reads is tiled, if it has a batch dimension, or shared as it is.
3. A size that depends on the batch is multiplied by the number of copies, unless it is a value (``h / len(h)``).
4. Noise nodes of other groups vanish.
5. An operation with batch statistics (batch normalisation in training mode) sees the clean run's statistics: copies
   then do not depend on each other or on other samples, and the per-sample losses stay attributable. Running
   statistics are moved by the clean run alone, once a step.

``clean_run(module, values)`` is the model's own forward with captures, and with every value that the other graphs read.

Declines: tiling a size that is not a multiple of the batch size; the error names it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import fx

from . import ops
from .errors import UnsupportedModelError
from .graph import (
    Kind,
    Layout,
    Output,
    Role,
    add_runtime_placeholder,
    append_placeholder,
    describe,
    finish,
    getitem,
    outputs,
    set_outputs,
)
from .insert_captures import Capture
from .locate_samples import batch_symbol, multiple_of_batch
from .rules import BATCH_STATISTICS, uses_batch_statistics

_aten = torch.ops.aten


def perturbed_nodes(module: fx.GraphModule, group: Iterable[int]) -> set[fx.Node]:
    """The nodes that the noise of the sites in `group` can change, those noise nodes included."""
    group = set(group)
    reached: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.meta.get("clean"):
            continue  # a mask of the clean run, whatever it reads
        if node.meta.get("noise_of") in group or any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return reached


def perturbed_run(module: fx.GraphModule, group: Iterable[int], captures: Iterable[Capture] = ()) -> fx.GraphModule:
    """The perturbed run of the sites in `group`; `captures` are those to take a copy, in this run."""
    names = {name for one in captures for name in (one.name, one.scale)}
    compute = perturbed_nodes(module, group)
    compute |= {node for node in module.graph.nodes if node.meta.get("capture") in names}
    wanted = [
        (output, node)
        for output, node in outputs(module)
        if output.kind == "output" or (output.kind == "capture" and output.name in names)
    ]
    return _Extraction(module, compute, copies=True, group=set(group)).build(wanted)


def clean_run(module: fx.GraphModule, values: Iterable[str], captures: Iterable[str]) -> fx.GraphModule:
    """The model's own forward, its buffers' new values, the named `captures`, and the named nodes' `values`."""
    nodes = {node.name: node for node in module.graph.nodes}
    kept = set(captures)
    wanted = [(o, node) for o, node in outputs(module) if o.kind != "capture" or o.name in kept]
    extraction = _Extraction(module, set(nodes.values()), copies=False, group=set())
    extra = []
    for name in values:
        node = nodes.get(name)
        extra.append((Output("value", name), node if node is not None else name))
    return extraction.build([*wanted, *extra])


def statistic_name(node: fx.Node, index: int) -> str:
    """Name of the clean run's batch mean (1) or reciprocal deviation (2) at a batch-normalisation node."""
    existing = getitem(node, index)
    return existing.name if existing is not None else f"{node.name}_{'mean' if index == 1 else 'rstd'}"


class _Extraction:
    """Copies the nodes in `compute` that are needed into a new graph; the others become placeholders."""

    def __init__(self, module: fx.GraphModule, compute: set[fx.Node], *, copies: bool, group: set[int]) -> None:
        self.source, self.compute, self.copies, self.group = module, compute, copies, group
        self.batch = batch_symbol(module)
        self.graph = fx.Graph()
        self.mapping: dict[fx.Node, fx.Node] = {}
        self.tiled: dict[fx.Node, fx.Node] = {}
        self.statistics = {
            statistic_name(node, index): (node, index)
            for node in module.graph.nodes
            if node.target in BATCH_STATISTICS and uses_batch_statistics(node)
            for index in (1, 2)
        }

    def build(self, wanted: Sequence[tuple[Output, fx.Node | str | None]]) -> fx.GraphModule:
        needed = self._needed([node for _, node in wanted])
        for node in self.source.graph.nodes:  # placeholders first, in the source's order
            if node in needed and not self._computed(node):
                self._placeholder(node)
        for node in self.source.graph.nodes:
            if node in needed and node not in self.mapping:
                self._copy(node)
        results = []
        for output, node in wanted:
            results.append((output, self._result(node)))
        self.graph.output(tuple(value for _, value in results))
        module = fx.GraphModule(self.source, self.graph)
        set_outputs(module, results)
        return finish(module)

    def _computed(self, node: fx.Node) -> bool:
        return node in self.compute and node.op == "call_function"

    def _needed(self, roots: list[fx.Node | str | None]) -> set[fx.Node]:
        needed: set[fx.Node] = set()
        stack = [self.statistics[root][0] if root in self.statistics else root for root in roots]
        while stack:
            node = stack.pop()
            if isinstance(node, fx.Node) and node not in needed:
                needed.add(node)
                if self._computed(node):
                    stack.extend(node.all_input_nodes)
        return needed

    def _placeholder(self, node: fx.Node) -> None:
        new = self.graph.placeholder(node.name)
        new.meta = {name: value for name, value in node.meta.items() if name not in ("site", "captures")}
        if node.op != "placeholder":
            new.meta.update(role=Role.VALUE, target=node.name)
        self.mapping[node] = new

    def _runtime(self, name: str) -> fx.Node:
        return add_runtime_placeholder(self.graph, name, None)

    def _copy(self, node: fx.Node) -> None:
        if "noise_of" in node.meta and not (self.copies and node.meta["noise_of"] in self.group):
            original = node.args[0]  # another group's noise, or the clean run
            assert isinstance(original, fx.Node)
            self.mapping[node] = self._argument(original)
        elif "noise_of" in node.meta:
            original = node.args[0]
            assert isinstance(original, fx.Node)
            rest = [self.mapping.get(arg, arg) if isinstance(arg, fx.Node) else arg for arg in node.args[1:-1]]
            copied = self.graph.node_copy(node, lambda n: self.mapping.get(n, n))
            copied.args = (self.mapping[original], *rest, self._computed(original))
            if "x" in node.kwargs:
                copied.kwargs = {**copied.kwargs, "x_tiled": self._computed(node.kwargs["x"])}  # type: ignore[arg-type]
            self.mapping[node] = copied
        elif self.copies and uses_batch_statistics(node):
            self.mapping[node] = self._frozen(node)
        else:
            values = _sizes_used_as_values(node) if self.copies else set()
            self.mapping[node] = self.graph.node_copy(
                node, lambda n: self.mapping[n] if n in values else self._argument(n)
            )
        new = self.mapping[node]
        if new.op == "call_function":
            new.meta.pop("site", None)
            new.meta.pop("captures", None)

    def _argument(self, node: fx.Node) -> fx.Node:
        """What a computed node reads in place of `node`: tiled or scaled where that is clean and has a batch."""
        new = self.mapping[node]
        if not self.copies or self._computed(node):
            return new
        if node in self.tiled:
            return self.tiled[node]
        if node.meta.get("kind") == Kind.SIZE:
            new = self._scaled(node, new)
        else:
            layout: Layout | None = node.meta.get("layout")
            if layout is not None and layout.batched:
                tiled = self.graph.call_function(ops.tile, (new, self._runtime("copies"), layout.dim, layout.outer))
                tiled.meta.update(node.meta, tile_of=node.name)
                tiled.meta.pop("site", None)
                tiled.meta.pop("captures", None)
                new = tiled
        self.tiled[node] = new
        return new

    def _scaled(self, node: fx.Node, new: fx.Node) -> fx.Node:
        factor = multiple_of_batch(node.meta["val"], self.batch)
        if factor == 0:
            return new
        if factor is None:
            raise UnsupportedModelError(
                f"{describe(node)}: the size {node.meta['val']} grows with the batch but is not a multiple of it, so "
                'copies cannot stand side by side in the batch. Use credit="batch", which runs one copy at a time.'
            )
        count = self.graph.call_function(_aten.sym_size.int, (self._runtime("copies"), 0))
        scaled = self.graph.call_function(operator.mul, (new, count))
        scaled.meta.update(kind=Kind.SIZE, val=node.meta["val"])
        return scaled

    def _frozen(self, node: fx.Node) -> fx.Node:
        """Batch normalisation with the clean run's statistics; only its first result is ever read."""
        mean, rstd = (self._statistic(node, index) for index in (1, 2))
        eps = node.args[-1]
        variance = self.graph.call_function(_aten.pow.Tensor_Scalar, (rstd, -2.0))
        variance = self.graph.call_function(_aten.sub.Scalar, (variance, eps))
        x, weight, bias = (self._argument(a) if isinstance(a, fx.Node) else a for a in node.args[:3])
        target = _aten._native_batch_norm_legit_no_training.default
        new = self.graph.call_function(target, (x, weight, bias, mean, variance, 0.0, eps))
        new.meta = dict(node.meta)
        return new

    def _statistic(self, node: fx.Node, index: int) -> fx.Node:
        name = statistic_name(node, index)
        for existing in self.graph.nodes:
            if existing.op == "placeholder" and existing.meta.get("target") == name:
                return cast(fx.Node, existing)
        new = append_placeholder(self.graph, name)
        new.meta.update(role=Role.VALUE, target=name, val=node.meta["val"][index], kind=Kind.CONSTANT)
        return new

    def _result(self, node: fx.Node | str | None) -> Any:
        if isinstance(node, str) and node in self.statistics:  # that the clean run has to hand over
            owner, index = self.statistics[node]
            return self.graph.call_function(operator.getitem, (self.mapping[owner], index))
        return self._argument(node) if isinstance(node, fx.Node) else node


def _sizes_used_as_values(node: fx.Node) -> set[fx.Node]:
    """The sizes that an operation computes with, where its schema wants a tensor or a number."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return set()
    found = set()
    for position, argument in enumerate(node.target._schema.arguments):
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        wants_value = any(name in str(argument.type) for name in ("Tensor", "number"))
        if wants_value and isinstance(given, fx.Node) and given.meta.get("kind") == Kind.SIZE:
            found.add(given)
    return found
