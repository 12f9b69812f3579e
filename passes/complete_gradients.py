"""Pass: complete each traced vjp to a standalone gradient subgraph.

In front of the vjp go

1. ``unpack_signs`` (and the scale) for every encoded capture,
2. the cotangent, from the losses' ``weights`` and regenerated noise: ``weighted_noise_sum`` where the captures are the
   clean run's and all copies share one vjp (DESIGN.md 5), ``weighted_noise`` where every copy has its own captures (1),
3. in the second case, the scaling of sizes by the number of copies, and the tiling of constants with one row a sample.

What a completed subgraph reads is captures, parameters, constants, ``weights``, the ids of draws or copies, and the key:
never another subgraph's result, and never noise.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from . import ops
from .find_sites import Site
from .graph import Kind, Role, add_runtime_placeholder, finish, outputs, set_outputs
from .insert_captures import Capture
from .locate_samples import batch_symbol, multiple_of_batch

_aten = torch.ops.aten


def complete_gradient(
    vjp: fx.GraphModule,
    site: Site,
    captures: tuple[Capture, ...],
    *,
    per_copy: bool,
    noise: str,
    score: str,
    graph_module: fx.GraphModule,
) -> fx.GraphModule:
    """The gradient subgraph of `site`; `graph_module` is the one-copy graph (for sizes' symbols)."""
    by_operand = {capture.operand: capture for capture in captures}
    batch = batch_symbol(graph_module)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    late: list[tuple[fx.Node, Capture]] = []
    for node in vjp.graph.nodes:
        if node.op != "placeholder" or node.meta["target"] == "cotangent":
            continue
        capture = by_operand.get(node.meta["target"]) if node.meta["role"] == Role.VALUE else None
        new = graph.placeholder(node.name)
        new.meta = dict(node.meta)
        mapping[node] = new
        if capture is not None:
            new.meta["target"] = capture.name
            new.meta["capture"] = capture.encoding
            late.append((node, capture))
    ids = add_runtime_placeholder(graph, "copies" if per_copy else "draws", None)
    key = add_runtime_placeholder(graph, "key", None)
    weights = add_runtime_placeholder(graph, "weights", None)
    for node, capture in late:
        if capture.encoding != "exact":
            mapping[node] = _decoded(graph, mapping[node], capture, node)
    captured = {node for node, _ in late}
    layouts = {node.name: node.meta.get("layout") for node in graph_module.graph.nodes}
    for node in list(mapping) if per_copy else ():
        layout = layouts.get(node.meta["target"]) if node.meta["role"] == Role.VALUE else None
        if isinstance(node.meta.get("val"), (int, torch.SymInt)):
            mapping[node] = _scaled(graph, mapping[node], ids, multiple_of_batch(node.meta["val"], batch))
        elif layout is not None and layout.batched and node not in captured:  # a constant with one row a sample
            mapping[node] = graph.call_function(ops.tile, (mapping[node], ids, layout.dim, layout.outer))
    target = ops.weighted_noise if per_copy else ops.weighted_noise_sum
    at = site.layout
    cotangent = graph.call_function(
        target, (weights, ids, key, site.index, noise, score, list(at.sizes), at.dim, at.outer)
    )
    place = next(node for node in vjp.graph.nodes if node.op == "placeholder" and node.meta["target"] == "cotangent")
    cotangent.meta["val"] = place.meta.get("val")
    dtype = place.meta["val"].dtype
    mapping[place] = graph.call_function(_aten.to.dtype, (cotangent, dtype))
    for node in vjp.graph.nodes:
        if node.op == "call_function":
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
        elif node.op == "get_attr":
            mapping[node] = graph.node_copy(node)
    results = [(output, mapping[node]) for output, node in outputs(vjp)]
    graph.output(tuple(node for _, node in results))
    module = fx.GraphModule(vjp, graph)
    set_outputs(module, results)
    return finish(module)


def _decoded(graph: fx.Graph, packed: fx.Node, capture: Capture, node: fx.Node) -> fx.Node:
    layout = capture.layout
    assert layout is not None
    val = node.meta["val"]
    samples = val.shape[layout.dim] if layout.batched else 1
    planes, row_bytes = ops.DOMAINS[capture.domain], (layout.elements + 7) // 8
    packed.meta["val"] = val.new_empty((planes, samples, row_bytes), dtype=torch.uint8)
    signs = graph.call_function(ops.unpack_signs, (packed, capture.domain, list(layout.sizes), layout.dim, val.dtype))
    signs.meta["val"] = val
    if capture.encoding != "stochastic":
        return signs
    with graph.inserting_after(packed):
        scale = graph.placeholder(f"{packed.name}_scale")
    extents = [extent if dim == layout.dim else 1 for dim, extent in enumerate(val.shape)]
    scale.meta.update(role=Role.VALUE, target=capture.scale, capture=capture.encoding, kind=Kind.ACTIVATION)
    scale.meta["val"] = val.new_empty(extents)
    scaled = graph.call_function(_aten.mul.Tensor, (signs, scale))
    scaled.meta["val"] = val
    return scaled


def _scaled(graph: fx.Graph, size: fx.Node, copies: fx.Node, factor: int | None) -> fx.Node:
    if factor == 0:
        return size
    count = graph.call_function(_aten.sym_size.int, (copies, 0))
    return graph.call_function(operator.mul, (size, count))
