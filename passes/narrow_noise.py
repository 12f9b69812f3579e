"""Pass: move a site's noise past a cheap local chain to its narrowest tensor (method.md 10).

What follows a site is often a pointwise operation and a pooling that alone read it: of a convolution's coordinates only
the pooled ones go on. Noise behind the pooling has fewer numbers for the same parameters, and the chain's own
derivative, which is known exactly in each sample, goes into the site's gradient subgraph: less variance without any
bias. The chain goes on over operations of one activation that have a derivative, as long as each has one reader.

Writes ``meta["site"]`` anew, on the first of the chain's tensors with the fewest elements a sample.

Declines: a chain whose tensors are nowhere narrower leaves the noise where it is (an alive mask does for ReLUs).
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx

from .extend_reach import WITHOUT_DERIVATIVE
from .find_sites import sites
from .graph import Kind, clone, finish, is_floating, operation_name
from .separate_outputs import output_nodes

_aten = torch.ops.aten

POOLINGS = {
    _aten.max_pool1d.default, _aten.max_pool2d.default, _aten.max_pool2d_with_indices.default,
    _aten.max_pool3d.default, _aten.avg_pool1d.default, _aten.avg_pool2d.default, _aten.avg_pool3d.default,
    _aten.adaptive_avg_pool1d.default, _aten.adaptive_avg_pool2d.default, _aten.adaptive_avg_pool3d.default,
    _aten.adaptive_max_pool2d.default, _aten.mean.dim, _aten.sum.dim_IntList, _aten.amax.default,
}  # fmt: skip
"""Operations that make one number of several of a sample, at a cost that is small beside a product's."""

REARRANGEMENTS = {
    _aten.reshape.default, _aten.view.default, _aten.flatten.using_ints, _aten.squeeze.dim, _aten.squeeze.dims,
    _aten.permute.default, _aten.transpose.int,
}  # fmt: skip
"""Operations that move numbers, and make none."""


def narrow_noise(module: fx.GraphModule) -> fx.GraphModule:
    module = clone(module)
    nodes = {node.name: node for node in module.graph.nodes}
    ends = output_nodes(module)
    for site in sites(module):
        point = nodes[site.output]
        chain = [] if point in ends else _chain(point, ends)
        points = [node for node in chain if is_floating(node) and _elements(node) < site.layout.elements]
        if not points:
            continue
        best = min(points, key=_elements)  # of several the first
        passed = chain[: chain.index(best) + 1]
        inside = {*site.region, *(node.name for node in passed)}
        read = [source.name for node in passed for source in node.all_input_nodes if source.name not in inside]
        del point.meta["site"]
        best.meta["site"] = replace(
            site,
            output=best.name,
            operation="+".join([site.operation, *(operation_name(n) for n in passed if n.target in POOLINGS)]),
            region=(*site.region, *(node.name for node in passed)),
            operands=tuple(dict.fromkeys([*site.operands, *read])),
            layout=best.meta["layout"],
        )
    return finish(module)


def _chain(point: fx.Node, ends: set[fx.Node]) -> list[fx.Node]:
    """The nodes that each alone read the one before."""
    found: list[fx.Node] = []
    node = point
    while len(node.users) == 1 and node not in ends:
        (reader,) = node.users
        if "site" in reader.meta or not _passes(reader, node):
            break
        found.append(reader)
        node = reader
    return found


def _passes(reader: fx.Node, node: fx.Node) -> bool:
    """Whether an operation reads no other activation or parameter, and each result belongs to one sample."""
    if reader.op != "call_function" or reader.target in WITHOUT_DERIVATIVE:
        return False
    others = [source for source in reader.all_input_nodes if source is not node]
    if any(source.meta.get("kind") in (Kind.ACTIVATION, Kind.PARAMETER) for source in others):
        return False
    if reader.target is operator.getitem or isinstance(reader.meta["val"], (tuple, list)):
        return reader.target in (operator.getitem, _aten.max_pool2d_with_indices.default)
    layout = reader.meta.get("layout")
    if layout is None or not layout.batched or not is_floating(reader):
        return False
    pointwise = isinstance(reader.target, torch._ops.OpOverload) and torch.Tag.pointwise in reader.target.tags
    return pointwise or reader.target in POOLINGS or reader.target in REARRANGEMENTS


def _elements(node: fx.Node) -> int:
    elements: int = node.meta["layout"].elements
    return elements


__all__ = ["narrow_noise"]
