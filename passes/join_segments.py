"""Pass: join the sites between two noise points to one, a *segment* (method.md 13).

A site is one operation until this pass makes it a stretch of the graph: all sites from which the same *cuts* (the noise
points that are left) are the next, with everything on the way. Its gradient subgraph is then the traced local vjp of
that stretch, recomputed from the captured input: **local backpropagation** inside the segment, and still independent of
every other subgraph. With a cut at every site nothing is joined; without any cut the one segment is backpropagation.

The model's output ends the last segment. A site behind which an operation without derivative comes before the next cut
(`extend_reach.WITHOUT_DERIVATIVE`) is a cut whatever is asked for (`forced_cuts`).

Writes ``meta["site"]`` anew: on the cuts, and of segments that end at several cuts or at the output on their last site.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import fx

from .extend_reach import following
from .find_sites import Site, sites
from .graph import Kind, clone, finish, origin
from .separate_outputs import influential, output_nodes


def join_segments(module: fx.GraphModule, *, cuts: Collection[int]) -> fx.GraphModule:
    """The graph with the sites joined between `cuts`, indices of sites; forced cuts are added."""
    module = clone(module)
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    nodes = {node.name: node for node in module.graph.nodes}
    kept = {*cuts, *forced_cuts(module)}
    points = {node for node in order if "site" in node.meta and node.meta["site"].index in kept}
    points |= output_nodes(module)
    ways = influential(module)
    segments: dict[frozenset[fx.Node], list[Site]] = {}
    found = sites(module)
    for site in found:
        segments.setdefault(frozenset(_next_points(nodes[site.output], points, ways)), []).append(site)
    for site in found:
        del nodes[site.output].meta["site"]
    placed: list[tuple[fx.Node, Site]] = []
    for ends, members in segments.items():
        inside = _inside([nodes[member.output] for member in members], ends, points)
        frontier = sorted(ends, key=order.__getitem__)
        at = frontier[0] if frontier[0].name in {m.output for m in members} else nodes[members[-1].output]
        joined = _joined(members, at, frontier, sorted(inside, key=order.__getitem__), nodes, order)
        others = [nodes[site.core] for site in found if site not in members]
        placed.append((at, joined if len(members) == 1 else replace(joined, name=_name(members, nodes, others))))
    names: dict[str, int] = {}
    for index, (at, site) in enumerate(sorted(placed, key=lambda item: order[item[0]])):
        names[site.name] = names.get(site.name, 0) + 1
        name = site.name if names[site.name] == 1 else f"{site.name}@{names[site.name]}"
        at.meta["site"] = replace(site, index=index, name=name)
    return finish(module)


def forced_cuts(module: fx.GraphModule) -> set[int]:
    """Indices of the sites behind which an operation without derivative comes before the next site or the output."""
    places = [node for node in module.graph.nodes if "site" in node.meta]
    ends = output_nodes(module)
    points, ways = {*places, *ends}, influential(module)
    return {node.meta["site"].index for node in places if node not in ends and following(node, points, ways) is None}


def _next_points(start: fx.Node, points: Collection[fx.Node], ways: Collection[fx.Node]) -> set[fx.Node]:
    """The first points on every way from `start`: itself, if it is one."""
    if start in points:
        return {start}
    found = following(start, points, ways)
    assert found, start  # neither forced nor without influence on the output
    return found


def _inside(starts: Sequence[fx.Node], ends: Collection[fx.Node], points: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes behind `starts` on ways to `ends` that pass no point, `ends` included."""
    forward: set[fx.Node] = set()
    stack = [user for start in starts if start not in points for user in start.users]
    while stack:
        node = stack.pop()
        if node not in forward and node.op != "output" and node.meta.get("kind") != Kind.SIZE:
            forward.add(node)
            stack.extend(node.users if node not in points else ())
    useful = forward & set(ends)
    stack = list(useful)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in forward and source not in useful and source not in points:
                useful.add(source)
                stack.append(source)
    return useful


def _joined(
    members: Sequence[Site],
    at: fx.Node,
    frontier: Sequence[fx.Node],
    inside: Sequence[fx.Node],
    nodes: dict[str, fx.Node],
    order: dict[fx.Node, int],
) -> Site:
    """One site for `members`, placed at `at`; `inside` are the nodes behind them up to the `frontier`."""
    own = {name for member in members for name in member.region}
    ends = () if list(frontier) == [at] else tuple(node.name for node in frontier)
    if len(members) == 1:
        (site,) = members
        return replace(site, frontier=ends, beyond=tuple(node.name for node in inside if node.name not in own))
    foreign = [node.name for node in inside if node.name not in own and _reads_parameters(node)]
    kept = {*(nodes[name] for name in own), *(node for node in inside if node.name not in foreign)}
    region = sorted(kept, key=order.__getitem__)
    within = {*region, *inside} - set(frontier)
    read = dict.fromkeys(source.name for node in region for source in node.all_input_nodes if source not in within)
    return replace(
        members[0],
        operation=f"{members[0].operation}{'+…' if len(members) > 2 else ''}+{members[-1].operation}",
        output=at.name,
        region=tuple(node.name for node in region),
        parameters=tuple(dict.fromkeys(name for member in members for name in member.parameters)),
        operands=tuple(read),
        layout=next(member.layout for member in members if member.output == at.name),
        frontier=ends,
        beyond=tuple(foreign),
    )


def _reads_parameters(node: fx.Node) -> bool:
    return any(source.meta["kind"] == Kind.PARAMETER for source in node.all_input_nodes)


def _name(members: Sequence[Site], nodes: dict[str, fx.Node], others: Sequence[fx.Node]) -> str:
    """The innermost module that holds all `members` and no other site, or the first and the last of them."""
    paths = [origin(nodes[member.core]).module.split(".") for member in members]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    path = ".".join(shared)
    foreign = any(f"{origin(node).module}.".startswith(f"{path}.") for node in others)
    return path if path and not foreign else f"{members[0].name}…{members[-1].name}"


__all__ = ["forced_cuts", "join_segments"]
