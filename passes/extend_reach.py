"""Pass: let a site's gradient be pulled back exactly from noise points further on (method.md 13, 14).

With ``reach = r`` the gradient subgraph of a site is the local vjp from its parameters to the noise points r hops
further on, its *frontier*, where the predicted gradient is read. ``reach = 0`` is the site alone, with nothing pulled
back through another site's operation; each hop more is one more stretch of **local backpropagation**, recomputed
inside the subgraph from the captured input, and a reach beyond the last site is backpropagation. Subgraphs stay
independent of each other.

A noise point at fewer than r hops (counted along the shortest way) is passed, any other that is met ends the way: so
no way is counted twice. The model's outputs end every way (`separate_outputs`). Hops are counted from the end of a
site's own segment (`join_segments`).

Writes ``meta["site"]`` anew with `frontier` and `beyond`.

Declines: a noise point behind which any way meets an operation without derivative (`WITHOUT_DERIVATIVE`, or one whose
result is not floating-point) is not passed; the way ends there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from .graph import Kind, clone, finish
from .separate_outputs import influential, output_nodes

_aten = torch.ops.aten

WITHOUT_DERIVATIVE = {
    _aten.sign.default, _aten.sgn.default, _aten.round.default, _aten.round.decimals, _aten.floor.default,
    _aten.ceil.default, _aten.trunc.default, _aten.heaviside.default, _aten.detach.default,
    _aten.floor_divide.default, _aten.fake_quantize_per_tensor_affine.default,
}  # fmt: skip
"""Operations of floating-point results whose derivative is zero almost everywhere or not to be relied on."""


def extend_reach(module: fx.GraphModule, *, reach: int) -> fx.GraphModule:
    module = clone(module)
    nodes = {node.name: node for node in module.graph.nodes}
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    ends = output_nodes(module)
    starts = [node for node in module.graph.nodes if "site" in node.meta]
    points = {node for node in starts if node.meta["site"].ends == (node.name,)} | ends
    ways = influential(module)
    after = {point: following(point, points, ways) for point in points}
    for start in starts:
        site = start.meta["site"]
        own = [nodes[name] for name in site.ends]
        passed = _passed(own, after, ends, reach)
        between = _between([start, *own], passed | ({start} - points), points)
        frontier = {node for node in between | set(own) if node in points and node not in passed}
        between |= {nodes[name] for name in site.beyond}  # of a segment, other sites on its way to its own ends
        between -= {nodes[name] for name in site.region}
        start.meta["site"] = replace(
            site,
            frontier=tuple(node.name for node in sorted(frontier, key=order.__getitem__)),
            beyond=tuple(node.name for node in sorted(between, key=order.__getitem__)),
        )
    return finish(module)


def following(point: fx.Node, points: Collection[fx.Node], ways: Collection[fx.Node]) -> set[fx.Node] | None:
    """The next points behind `point` on `ways`, the nodes that influence an output; None if a way there has no
    derivative, or there is none."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = list(point.users)
    while stack:
        node = stack.pop()
        if node in seen or node not in ways or node.meta.get("kind") == Kind.SIZE:
            continue
        seen.add(node)
        val = node.meta.get("val")
        if node.target in WITHOUT_DERIVATIVE or (isinstance(val, Tensor) and not val.is_floating_point()):
            return None
        if node in points:
            found.add(node)
        else:
            stack.extend(node.users)
    return found or None


def _passed(
    starts: Sequence[fx.Node], after: dict[fx.Node, set[fx.Node] | None], ends: set[fx.Node], reach: int
) -> set[fx.Node]:
    """The points at fewer than `reach` hops from `starts` that have a derivative behind them."""
    passed: set[fx.Node] = set()
    level = set(starts)
    for _ in range(reach):
        here = {point for point in level if after[point] is not None and point not in ends}
        passed |= here
        level = {further for point in here for further in after[point] or ()} - passed
    return passed


def _between(starts: Sequence[fx.Node], passed: set[fx.Node], points: set[fx.Node]) -> set[fx.Node]:
    """The nodes behind `starts` on ways over passed points to points that are not passed, these included."""
    forward: set[fx.Node] = set()
    stack = [user for start in starts if start in passed for user in start.users]
    while stack:
        node = stack.pop()
        if node in forward or node.op == "output" or node.meta.get("kind") == Kind.SIZE:
            continue
        forward.add(node)
        if node not in points or node in passed:
            stack.extend(node.users)
    useful = {node for node in forward if node in points and node not in passed}
    stack = list(useful)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in forward and source not in useful:
                useful.add(source)
                stack.append(source)
    return useful
