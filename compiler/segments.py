"""Where a model is cut into segments (method.md 13): by name, by number, or by its shape."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..passes.errors import OptionError, unknown_name
from ..passes.find_sites import Site, sites
from ..passes.graph import Kind, origin
from ..passes.join_segments import forced_cuts
from ..passes.separate_outputs import influential, output_nodes
from .cost import count_flops

_aten = torch.ops.aten

PRODUCTS = {
    _aten.mul.Tensor, _aten.matmul.default, _aten.mm.default, _aten.bmm.default, _aten.baddbmm.default,
    _aten.scaled_dot_product_attention.default, _aten.einsum.default,
}  # fmt: skip
"""Operations whose derivative in one operand is the other: the mean Jacobian of a query, key or gate is nearly zero."""

MAX_JOINED = 16
"""Sites of a stretch that ``"auto"`` joins at most: where nothing narrow follows, joining would be backpropagation."""

WIDTH_WEIGHT = 0.5
"""How much a cut's width counts against balance where a number of segments is asked for."""


def resolve_segments(segments: str | int | Sequence[str], module: fx.GraphModule) -> list[int]:
    """Indices of the sites of `module` to cut behind; `join_segments` adds those it must.

    Raises:
        OptionError: the model has fewer places to cut than segments are asked for.
        UnknownNameError: a pattern matches no module that holds a site.
    """
    if isinstance(segments, int):
        return _balanced(module, segments)
    if segments == "auto":
        return _around_products(module)
    patterns = [segments] if isinstance(segments, str) else segments
    return sorted({index for pattern in patterns for index in _behind(pattern, module)})


def resolve_reach(reach: int | str, module: fx.GraphModule) -> int:
    """Hops: as given, or for ``"auto"`` 1, and 2 where stretches are joined around products."""
    if isinstance(reach, int):
        return reach
    return 2 if any(_is_joined(stretch) for stretch in _stretches(module)) else 1


@dataclass(frozen=True)
class _Stretch:
    """The sites from one bottleneck to the next, by index."""

    sites: tuple[int, ...]
    multiplies: bool
    """Whether trained values are multiplied with each other."""
    end: int | None
    """The bottleneck's site; None for the last stretch, up to the output."""


def _around_products(module: fx.GraphModule) -> list[int]:
    """Every site; but where trained values are multiplied with each other, cuts only in front of stretches that do so.

    A stretch with a product (an attention, a gated unit) becomes one segment, together with the stretches without one
    that follow it (a transformer's perceptron): a block. What comes before the first belongs to the first.
    """
    stretches = _stretches(module)
    joined = [_is_joined(stretch) for stretch in stretches]
    cuts: list[int] = []
    for number, stretch in enumerate(stretches):
        if True not in joined or len(stretch.sites) > MAX_JOINED:
            cuts += stretch.sites
        elif stretch.end is not None and True in joined[: number + 1]:
            after = stretches[number + 1]
            if _is_joined(after) or len(after.sites) > MAX_JOINED:
                cuts.append(stretch.end)
    return cuts


def _is_joined(stretch: _Stretch) -> bool:
    return stretch.multiplies and len(stretch.sites) <= MAX_JOINED


def _stretches(module: fx.GraphModule) -> list[_Stretch]:
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    trained = _trained(module)
    at = {node.meta["site"].index: position for node, position in order.items() if "site" in node.meta}
    products = [order[n] for n in trained if n.target in PRODUCTS and len(trained.intersection(n.all_input_nodes)) > 1]
    found, start = [], -1
    for end in [*(site.index for site in bottlenecks(module)), None]:
        stop = len(order) if end is None else at[end]
        members = tuple(index for index, position in at.items() if start < position <= stop)
        found.append(_Stretch(members, any(start < position <= stop for position in products), end))
        start = stop
    return found


def bottlenecks(module: fx.GraphModule) -> list[Site]:
    """The sites whose value holds everything that later operations read of trained values: no way leads around them."""
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    ways, trained = influential(module), _trained(module)
    furthest, found = -1, []
    ends = output_nodes(module)
    for node, position in order.items():
        site: Site | None = node.meta.get("site")
        if site is not None and furthest <= position and node not in ends:
            found.append(site)
        if node in trained and node in ways:
            furthest = max([furthest, *(order[user] for user in node.users if user in ways)])
    return found


def _trained(module: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose value depends on a site."""
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        inside = "site" in node.meta or any(source in found for source in node.all_input_nodes)
        if inside and node.op != "output" and node.meta.get("kind") != Kind.SIZE:
            found.add(node)
    return found


def _balanced(module: fx.GraphModule, number: int) -> list[int]:
    """The cuts of `number` segments that balance FLOPs, at narrow tensors, by dynamic programming."""
    candidates, must = bottlenecks(module), forced_cuts(module)
    if number > len(candidates) + 1:
        raise OptionError(
            f"segments={number}: the model has {len(candidates)} place(s) to cut where one tensor holds everything "
            f'that is known of the input, so at most {len(candidates) + 1} segments. Use "op" or module names.'
        )
    order = {node.name: position for position, node in enumerate(module.graph.nodes)}
    flops = count_flops(module)
    whole = sum(flops.values()) or 1
    widest = max((site.layout.elements for site in candidates), default=1)
    spent: list[float] = []
    total = 0
    positions = [order[site.output] for site in candidates]
    for name, position in sorted(order.items(), key=lambda item: item[1]):
        while len(spent) < len(positions) and positions[len(spent)] < position:
            spent.append(total / whole)
        total += flops.get(name, 0)
    spent += [total / whole] * (len(positions) - len(spent))
    # best[k][i]: least cost of k segments that end at candidate i, and the cut before it
    best: list[dict[int, tuple[float, int]]] = [{-1: (0.0, -1)}]
    for _ in range(number - 1):
        level: dict[int, tuple[float, int]] = {}
        for i, site in enumerate(candidates):
            width = WIDTH_WEIGHT * site.layout.elements / widest / number
            options = [
                (cost + (spent[i] - (spent[j] if j >= 0 else 0.0)) ** 2 + width, j)
                for j, (cost, _) in best[-1].items()
                if j < i
            ]
            if options:
                level[i] = min(options)
        best.append(level)
    end = min(best[-1], key=lambda i: best[-1][i][0] + (1.0 - (spent[i] if i >= 0 else 0.0)) ** 2)
    cuts = []
    for level in reversed(best[1:]):
        cuts.append(candidates[end].index)
        end = level[end][1]
    return sorted({*cuts, *must})


def _behind(pattern: str, module: fx.GraphModule) -> list[int]:
    """The last site of every outermost module whose path matches `pattern`."""
    last: dict[str, int] = {}
    nodes = {node.name: node for node in module.graph.nodes}
    for site in sites(module):
        parts = origin(nodes[site.core]).module.split(".")
        for depth in range(1, len(parts) + 1):
            last[".".join(parts[:depth])] = site.index
    matched = [path for path in last if fnmatch.fnmatchcase(path, pattern)]
    if not matched:
        raise unknown_name("module (segments)", pattern, last)
    outer = [path for path in matched if not any(path.startswith(f"{other}.") for other in matched)]
    return [last[path] for path in outer]


__all__ = ["bottlenecks", "resolve_segments"]
