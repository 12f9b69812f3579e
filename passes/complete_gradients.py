"""Pass: complete each traced vjp to a standalone gradient subgraph.

In front of the vjp go

1. ``unpack_signs`` or ``unpack_levels`` (and the scale) for every encoded capture,
2. the cotangent at the noise point, from one of
   - ``"noise"``: the losses' ``weights`` and regenerated noise. ``weighted_noise_sum`` where the captures are the clean
     run's and all copies share one vjp (method.md 5), ``weighted_noise`` where every copy has its own captures (1);
   - ``"feedback"``: the learned Jacobian of the outputs, times the outputs' error ``e`` (12);
   - ``"corrected"``: the sum of both, the weights being what feedback leaves unexplained;
   - ``"error"``: the part of ``e`` that belongs to it, at one of the model's outputs;
   times the alive mask, where the noise point has one (10); plus its part of ``e`` at a noise point that is itself
   returned (`separate_outputs`). Where its noise is tied over blocks, what noise and losses
   give a block is divided by its alive coordinates, and each of them receives the block's number (`tie_blocks`),
3. in the second case, the scaling of sizes by the number of copies, and the tiling of constants with one row a sample.

What a completed subgraph reads is captures, parameters, constants, ``weights``, the ids of draws or copies, the key,
and the feedback matrix and ``e`` (or ``e`` along the feedback's basis): never another subgraph's result, and never
noise.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from . import ops
from .find_sites import Site
from .graph import Kind, Layout, Role, add_runtime_placeholder, append_placeholder, finish, outputs, set_outputs
from .insert_captures import Capture
from .locate_samples import batch_symbol, multiple_of_batch
from .separate_outputs import error_like

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
    source: str = "noise",
    rank: int | None = None,
) -> fx.GraphModule:
    """The gradient subgraph of `site`; `graph_module` is the one-copy graph, `source` that of the cotangent (above).

    With a `rank` the feedback matrices have that many columns, and ``e`` enters them as its coordinates along a basis.
    """
    by_operand = {capture.operand: capture for capture in captures}
    batch = batch_symbol(graph_module)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    late: list[tuple[fx.Node, Capture]] = []
    for node in vjp.graph.nodes:
        if node.op != "placeholder" or _is_cotangent(node):
            continue
        capture = by_operand.get(node.meta["target"]) if node.meta["role"] == Role.VALUE else None
        new = graph.placeholder(node.name)
        new.meta = dict(node.meta)
        mapping[node] = new
        if capture is not None:
            new.meta["target"] = capture.name
            new.meta["capture"] = capture.encoding
            late.append((node, capture))
    ids = add_runtime_placeholder(graph, "copies", None) if per_copy else None
    for node, capture in late:
        if capture.encoding != "exact":
            mapping[node] = _decoded(graph, mapping[node], capture, node)
    captured = {node for node, _ in late}
    layouts = {node.name: node.meta.get("layout") for node in graph_module.graph.nodes}
    for node in list(mapping) if ids is not None else ():
        assert ids is not None
        layout = layouts.get(node.meta["target"]) if node.meta["role"] == Role.VALUE else None
        if isinstance(node.meta.get("val"), (int, torch.SymInt)):
            mapping[node] = _scaled(graph, mapping[node], ids, multiple_of_batch(node.meta["val"], batch))
        elif layout is not None and layout.batched and node not in captured:  # a constant with one row a sample
            mapping[node] = graph.call_function(ops.tile, (mapping[node], ids, layout.dim, layout.outer))
    ends = {node.name: node for node in graph_module.graph.nodes}
    cotangents = [node for node in vjp.graph.nodes if node.op == "placeholder" and _is_cotangent(node)]
    for place, name in zip(cotangents, site.ends, strict=True):
        alive = ends[name].meta.get("alive")
        mask = None if alive is None else _mask(graph, ends, alive, site.layout, ids)
        cotangent = _cotangent(graph, ends[name], site, noise, score, source, ids, mask, rank)
        if mask is not None:
            cotangent = graph.call_function(_aten.mul.Tensor, (cotangent, mask))
        for own in (user for user in ends[name].users if "returned" in user.meta):
            cotangent = graph.call_function(_aten.add.Tensor, (cotangent, _at_output(graph, own)))
        # views of it, a slice of ``e``, a mask in another memory format: the vjp was traced for a contiguous cotangent
        cotangent = graph.call_function(_aten.contiguous.default, (cotangent,))
        cotangent.meta["val"] = place.meta.get("val")
        dtype = place.meta["val"].dtype
        same = source == "feedback" and error_like(graph_module.graph).dtype == dtype  # losses may have any
        mapping[place] = cotangent if same else graph.call_function(_aten.to.dtype, (cotangent, dtype))
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


def _is_cotangent(node: fx.Node) -> bool:
    return node.meta["role"] == Role.RUNTIME and str(node.meta["target"]).startswith("cotangent")


def _mask(graph: fx.Graph, nodes: dict[str, fx.Node], name: str, layout: Layout, copies: fx.Node | None) -> fx.Node:
    mask = append_placeholder(graph, name)
    mask.meta.update(role=Role.VALUE, target=name, val=nodes[name].meta["val"])
    return mask if copies is None else graph.call_function(ops.tile, (mask, copies, layout.dim, layout.outer))


def _cotangent(
    graph: fx.Graph,
    end: fx.Node,
    site: Site,
    noise: str,
    score: str,
    source: str,
    copies: fx.Node | None,
    alive: fx.Node | None,
    rank: int | None,
) -> fx.Node:
    """The gradient of the loss at `end`, a noise point or one of the model's outputs, before the mask `alive`."""
    point: Site | None = end.meta.get("site")
    layout: Layout = end.meta["layout"]
    if source != "noise" and "offsets" in end.meta:
        return _at_output(graph, end)
    point = site if point is None else point
    number, coarse = point.index, point.grid if point.blocks else layout
    noisy = point.credited if point.rows else coarse  # rows that have losses of their own are samples, for the noise
    where = (list(noisy.sizes), noisy.dim, noisy.outer)
    terms = []
    if source in ("noise", "corrected"):
        key = add_runtime_placeholder(graph, "key", None)
        weights = add_runtime_placeholder(graph, "weights" if source == "noise" else f"weights.{number}", None)
        if copies is not None:
            term = graph.call_function(ops.weighted_noise, (weights, copies, key, number, noise, score, *where))
        else:
            draws = add_runtime_placeholder(graph, "draws", None)
            term = graph.call_function(ops.weighted_noise_sum, (weights, draws, key, number, noise, score, *where))
        if point.blocks:
            counts = graph.call_function(ops.count_blocks, (term, alive, *_of_blocks(point)))
            counts = graph.call_function(_aten.clamp_min.default, (counts, 1))
            term = graph.call_function(_aten.div.Tensor, (term, counts))
        if point.rows:
            term = graph.call_function(_aten.reshape.default, (term, [-1, *layout.sizes[1:]]))
        terms.append(term)
    if source in ("feedback", "corrected"):
        error = _error(graph, end.graph, rank)
        learned = error.meta["val"].new_empty(coarse.elements, error.meta["val"].shape[1])
        jacobian = add_runtime_placeholder(graph, f"feedback.{number}", learned)
        rows = graph.call_function(_aten.mm.default, (error, graph.call_function(_aten.t.default, (jacobian,))))
        terms.append(from_rows(graph, rows, coarse))
    value = terms[0] if len(terms) == 1 else graph.call_function(_aten.add.Tensor, tuple(terms))
    return _spread(graph, value, point) if point.blocks else value


def _of_blocks(point: Site) -> tuple[list[int], int, int, list[int]]:
    layout = point.layout
    return list(layout.sizes), layout.dim, layout.outer, list(point.blocks)


def _spread(graph: fx.Graph, value: fx.Node, point: Site) -> fx.Node:
    """One element a block to one a coordinate; by views alone where blocks are whole and the samples come first."""
    layout, extents, blocks = point.layout, point.layout.extents, point.blocks
    if layout.dim or layout.outer > 1 or any(extent % block for extent, block in zip(extents, blocks, strict=True)):
        return graph.call_function(ops.spread_blocks, (value, *_of_blocks(point)))
    opened, whole = [-1], [-1]
    for extent, block in zip(extents[1:], blocks[1:], strict=True):  # the first is `outer`, of one
        opened += [extent // block, 1]
        whole += [extent // block, block]
    value = graph.call_function(_aten.reshape.default, (value, opened))
    value = graph.call_function(_aten.expand.default, (value, whole))
    return graph.call_function(_aten.reshape.default, (value, [-1, *layout.sizes[1:]]))


def _error(graph: fx.Graph, whole: fx.Graph, rank: int | None) -> fx.Node:
    """The placeholder of ``e``, ``(N, outputs)``, or of its coordinates, ``(N, rank)``."""
    like = error_like(whole)
    if rank is not None:
        return add_runtime_placeholder(graph, "projected_error", like.new_empty(like.shape[0], rank))
    return add_runtime_placeholder(graph, "error", like)


def _at_output(graph: fx.Graph, end: fx.Node) -> fx.Node:
    """The gradient at one of the model's outputs: its part of ``e``, or the sum of them if it is returned twice."""
    error, layout = _error(graph, end.graph, None), end.meta["layout"]
    parts = []
    for start in end.meta["offsets"]:
        whole = layout.elements == error.meta["val"].shape[1]
        where = (error, 1, start, start + layout.elements)
        rows = error if whole else graph.call_function(_aten.slice.Tensor, where)
        parts.append(from_rows(graph, rows, layout))
    total = parts[0]
    for part in parts[1:]:
        total = graph.call_function(_aten.add.Tensor, (total, part))
    return total


def from_rows(graph: fx.Graph, rows: fx.Node, layout: Layout) -> fx.Node:
    """``(N, elements a sample)`` brought to the shape of a clean tensor of this layout."""
    before, after = list(layout.sizes[: layout.dim]), list(layout.sizes[layout.dim + 1 :])
    inner = layout.sizes[layout.dim] // layout.outer
    if not layout.dim and layout.outer == 1:
        return rows if len(after) == inner == 1 else graph.call_function(_aten.reshape.default, (rows, [-1, *after]))
    value = graph.call_function(_aten.reshape.default, (rows, [-1, *before, layout.outer, inner, *after]))
    value = graph.call_function(_aten.movedim.int, (value, 0, layout.dim + 1))
    return graph.call_function(_aten.reshape.default, (value, [*before, -1, *after]))


def _decoded(graph: fx.Graph, packed: fx.Node, capture: Capture, node: fx.Node) -> fx.Node:
    layout = capture.layout
    assert layout is not None
    val = node.meta["val"]
    samples = val.shape[layout.dim] if layout.batched else 1
    sizes, bits = (list(layout.sizes), layout.dim, val.dtype), capture.level_bits
    if bits is None:
        planes, row_bytes = ops.DOMAINS[capture.domain], ops.row_bytes(layout.elements, 1)
        packed.meta["val"] = val.new_empty((planes, samples, row_bytes), dtype=torch.uint8)
        decoded = graph.call_function(ops.unpack_signs, (packed, capture.domain, *sizes))
    else:
        packed.meta["val"] = val.new_empty((samples, ops.row_bytes(layout.elements, bits)), dtype=torch.uint8)
        decoded = graph.call_function(ops.unpack_levels, (packed, capture.domain, bits, *sizes))
    decoded.meta["val"] = val
    if capture.encoding == "sign":
        return decoded
    with graph.inserting_after(packed):
        scale = graph.placeholder(f"{packed.name}_scale")
    extents = [extent if dim == layout.dim else 1 for dim, extent in enumerate(val.shape)]
    scale.meta.update(role=Role.VALUE, target=capture.scale, capture=capture.encoding, kind=Kind.ACTIVATION)
    scale.meta["val"] = val.new_empty(extents)
    if bits is not None:
        decoded = graph.call_function(_aten.div.Tensor, (decoded, ops.num_levels(capture.domain, bits)))
        decoded.meta["val"] = val
    scaled = graph.call_function(_aten.mul.Tensor, (decoded, scale))
    scaled.meta["val"] = val
    return scaled


def _scaled(graph: fx.Graph, size: fx.Node, copies: fx.Node, factor: int | None) -> fx.Node:
    if factor == 0:
        return size
    count = graph.call_function(_aten.sym_size.int, (copies, 0))
    return graph.call_function(operator.mul, (size, count))
