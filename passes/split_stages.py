"""Pass: split a graph into stages that run one after the other.

A stage ends behind each cut node. A stage's placeholders are what it reads of the program's inputs and of earlier
stages, its outputs what later stages read and what the whole graph returns: nothing else lives between stages.
Values between stages keep the names of the nodes that compute them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from .graph import Output, Role, finish, outputs, set_outputs


def split_stages(module: fx.GraphModule, cuts: Iterable[str]) -> list[fx.GraphModule]:
    """The stages of `module`, cut behind the nodes named in `cuts` (names that it lacks are ignored)."""
    names = set(cuts)
    segments: list[list[fx.Node]] = [[]]
    for node in module.graph.nodes:
        if node.op in ("call_function", "get_attr"):
            segments[-1].append(node)
            if node.name in names:
                segments.append([])
    segments = [segment for segment in segments if segment] or [[]]
    where = {node: number for number, segment in enumerate(segments) for node in segment}
    last = len(segments) - 1
    results: list[list[tuple[Output, fx.Node]]] = [[] for _ in segments]
    for output, node in outputs(module):
        results[where.get(node, last)].append((output, node))
    for number, segment in enumerate(segments):
        for node in segment:
            value = Output("value", node.name)
            if any(where.get(user, number) > number for user in node.users) and (value, node) not in results[number]:
                results[number].append((value, node))
    return [_stage(module, segment, result) for segment, result in zip(segments, results, strict=True)]


def _stage(module: fx.GraphModule, segment: list[fx.Node], results: list[tuple[Output, fx.Node]]) -> fx.GraphModule:
    graph = fx.Graph()
    inside = set(segment)
    mapping: dict[fx.Node, fx.Node] = {}
    read = [source for node in segment for source in node.all_input_nodes]
    read += [node for _, node in results if isinstance(node, fx.Node)]
    for node in dict.fromkeys(source for source in read if source not in inside):
        new = graph.placeholder(node.name)
        new.meta = dict(node.meta)
        if node.op != "placeholder":
            new.meta.update(role=Role.VALUE, target=node.name)
        mapping[node] = new
    for node in segment:
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
    items = [(output, mapping.get(node, node)) for output, node in results]
    graph.output(tuple(value for _, value in items))
    stage = fx.GraphModule(module, graph)
    set_outputs(stage, items)
    return finish(stage)
