"""Which nodes' outputs a node's value at a site can reach, in a program of one whole graph (`whole`).

Noise at a node moves the outputs within a few edges of it. The losses of all other nodes are known to have nothing to
do with it: left in, they are variance and nothing else (method.md, "One sample: whole graphs"). Found by running the
graph behind the site with NaN at one row after the other: NaN goes wherever a value can, whatever the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.find_sites import Site
from ..passes.graph import Role, downstream, outputs, placeholders
from ..passes.separate_outputs import output_nodes

MOST_ROWS = 4096
"""Rows of a site above which its reach is not looked for: it takes a run of the graph a row, side by side."""

_ELEMENTS = 1 << 22
"""Elements of a tensor in runs that stand side by side."""


def find_reach(module: fx.GraphModule, values: dict[fx.Node, Any], points: Sequence[Site]) -> dict[int, Tensor]:
    """For each of the sites bool ``(rows, nodes)``, rows being the first dimension of one sample at its noise point.

    A site is left out, so that all outputs count as reached, where it has no rows or too many, where its noise is tied
    over blocks or lies on the weight, where something behind it stops NaN (comparisons, whole numbers, order
    statistics) or selects by what another step has otherwise (a mask of features, weights or random numbers), or where
    a row reaches every node. None has a reach where the model returns anything but one tensor with the nodes first.

    Args:
        module: a graph with sites and layouts.
        values: of every placeholder of the captured graph, by nodes of the same names; one sample.
        points: the sites that get noise.
    """
    returned = [node for output, node in outputs(module) if output.kind == "output"]
    if len(returned) != 1 or not isinstance(returned[0], fx.Node) or len(_sizes(returned[0])) < 3:
        return {}
    nodes = {node.name: node for node in module.graph.nodes}
    given = {nodes[node.name]: value for node, value in values.items()}
    widest = max((node.meta["layout"].elements for node in module.graph.nodes if "layout" in node.meta), default=1)
    found = {}
    varying = _varying(module)
    with torch.no_grad():
        for site in points:
            point = nodes[site.output]
            sizes = _sizes(point)
            if len(sizes) < 3 or not 1 < sizes[1] <= MOST_ROWS or site.blocks or site.weight_noise is not None:
                continue
            behind = downstream([point]) - output_nodes(module) - {point}
            if any(_stops(node) or _selects(node, varying) for node in behind):
                continue
            chunks = torch.arange(sizes[1]).split(max(1, _ELEMENTS // widest))
            reach = torch.cat([_Run(module, point, rows).reached(given, returned[0]) for rows in chunks])
            if not bool(reach.all()):
                found[site.index] = reach
    return found


def _sizes(node: fx.Node) -> tuple[int, ...]:
    """The shape with one sample in front; empty where the samples are not in front."""
    layout = node.meta.get("layout")
    return layout.sizes if layout is not None and (layout.dim, layout.outer, layout.sizes[:1]) == (0, 1, (1,)) else ()


def _varying(module: fx.GraphModule) -> set[fx.Node]:
    """What another step may have otherwise: all but constants, and buffers that no step changes."""
    changed = {output.name for output, _ in outputs(module) if output.kind == "mutation"}
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            fixed = node.meta["role"] == Role.CONSTANT
            varies = not fixed and (node.meta["role"] != Role.BUFFER or node.meta["target"] in changed)
        else:  # a size is no value
            varies = node.target != torch.ops.aten.sym_size.int and any(n in found for n in node.all_input_nodes)
        if varies:
            found.add(node)
    return found


def _stops(node: fx.Node) -> bool:
    """Whether an operation can hide that its input is NaN."""
    if node.op != "call_function":
        return False
    if _is_whole(node) or (isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in _KNOWN):
        return True
    return getattr(node.target, "__name__", "").startswith(_STOPPING)


def _selects(node: fx.Node, varying: set[fx.Node]) -> bool:
    """Whether an operation lets through what a mask or an index says that is another one in other steps."""
    arithmetic = getattr(node.target, "__name__", "").partition(".")[0] in ("add", "sub", "mul", "div", "_to_copy")
    return not arithmetic and any(_is_whole(source) and source in varying for source in node.all_input_nodes)


def _is_whole(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and not val.is_floating_point()


_KNOWN = ("aten", "prims", "onward")
_STOPPING = ("nan", "fmax", "fmin", "heaviside", "sign", "sgn", "copysign", "sort", "msort", "topk", "kthvalue", "mode",
             "pow.Tensor_Tensor", "pow.Scalar")  # fmt: skip
"""How operations begin that give a number for NaN, or put it in the last place of an order."""


class _Run(fx.Interpreter):
    """One sample for each of the rows, with NaN at that row of a point."""

    def __init__(self, module: fx.GraphModule, point: fx.Node, rows: Tensor) -> None:
        super().__init__(module)
        self.point, self.rows = point, rows

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n is self.point:
            result = result.clone()
            result[torch.arange(len(self.rows)), self.rows] = torch.nan
        return result

    def reached(self, given: dict[fx.Node, Any], output: fx.Node) -> Tensor:
        """Bool ``(rows, nodes)``: which nodes' results are NaN at the graph's `output`."""
        assert isinstance(self.module, fx.GraphModule)
        found = self.run(*[_repeated(node, given[node], len(self.rows)) for node in placeholders(self.module)])
        place = [node for _, node in outputs(self.module)].index(output)
        reached: Tensor = found[place].isnan().flatten(2).any(2).cpu()
        return reached


def _repeated(node: fx.Node, value: Any, times: int) -> Any:
    batched = node.meta["role"] == Role.INPUT and "layout" in node.meta and node.meta["layout"].batched
    return torch.cat([value] * times) if batched else value


__all__ = ["find_reach"]
