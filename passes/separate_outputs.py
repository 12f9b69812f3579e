"""Pass: find the outputs that learned feedback responds to, and let each end the ways that lead to it (method.md 12).

What a perturbed run shows of a sample is one vector ``o``: every floating-point leaf of the model's output that depends
on a site, flattened and put one behind the other in the order of the leaves. Other leaves (an argmax, a mask that is
passed through) are not in it: a loss may read them, but no gradient comes through them.

A leaf that further outputs are computed from is returned as an alias of its own, behind which nothing comes: noise at
the leaf itself does not reach the alias (`insert_noise`), so that ``e`` there counts exactly, and what feedback learns
at the leaf is only what the leaf does to the others.

Writes ``meta["offsets"]`` on the nodes that hold a part of ``o``: where in ``o`` it begins, more than once if it is
returned more than once; and ``meta["returned"]`` on the aliases.

Declines: a leaf in ``o`` without the samples first; a model without any; a site that none of ``o`` depends on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, fx

from .errors import UnsupportedModelError
from .find_sites import Site, sites
from .graph import Layout, clone, downstream, finish, is_floating, origin, outputs, set_outputs, upstream


def separate_outputs(module: fx.GraphModule, *, names: Sequence[str]) -> fx.GraphModule:
    """`names` are those of the output's leaves, as errors call them."""
    module = clone(module)
    leaves = [value for output, value in outputs(module) if output.kind == "output"]
    trained = downstream(node for node in module.graph.nodes if "site" in node.meta)
    floating = [isinstance(leaf, fx.Node) and is_floating(leaf) and leaf in trained for leaf in leaves]
    offsets: dict[fx.Node, tuple[int, ...]] = {}
    at = 0
    for name, leaf, responds in zip(names, leaves, floating, strict=True):
        if responds:
            offsets[leaf] = (*offsets.get(leaf, ()), at)
            at += _elements(leaf, name)
    if not offsets:
        raise UnsupportedModelError(
            'feedback="learned" needs a model with a floating-point output that depends on its parameters; of '
            f'{", ".join(names)} none is. Return what the loss is computed from, or use feedback="none".'
        )
    influence = upstream(offsets)
    _check_sites(module, influence)
    for leaf in list(offsets):
        if any(user in influence for user in leaf.users):
            offsets[_separated(module, leaf)] = offsets.pop(leaf)
    for leaf, places in offsets.items():
        leaf.meta["offsets"] = places
    return finish(module)


def returned(graph: fx.Graph) -> list[tuple[int, fx.Node]]:
    """The leaves in ``o`` in order: number of the leaf among all of the output's, and its node."""
    node = graph.output_node()
    described = zip(node.meta["outputs"], node.args[0], strict=True)  # type: ignore[arg-type]
    return [
        (int(output.name), value)
        for output, value in described
        if output.kind == "output" and isinstance(value, fx.Node) and "offsets" in value.meta
    ]


def error_like(graph: fx.Graph) -> Tensor:
    """An empty tensor like ``o`` of a batch: ``(N, outputs)``, of the dtype that its leaves have in common."""
    values = [node.meta["val"] for _, node in returned(graph)]
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    elements = sum(node.meta["layout"].elements for _, node in returned(graph))
    like: Tensor = values[0].new_empty(values[0].shape[0], elements, dtype=dtype)
    return like


def influential(module: fx.GraphModule) -> set[fx.Node]:
    """The nodes that ``o`` depends on, its own included; without `separate_outputs`, that any output depends on."""
    return upstream(output_nodes(module))


def output_nodes(module: fx.GraphModule) -> set[fx.Node]:
    """The nodes that hold ``o``; without `separate_outputs`, all outputs."""
    found = {node for output, node in outputs(module) if output.kind == "output" and isinstance(node, fx.Node)}
    return {node for node in found if "offsets" in node.meta} or found


def _elements(leaf: fx.Node, name: str) -> int:
    layout: Layout | None = leaf.meta.get("layout")
    if layout is None or (layout.dim, layout.outer, layout.sizes[:1]) != (0, 1, (1,)):
        raise UnsupportedModelError(
            f'feedback="learned" needs a model whose outputs have the samples first; {name} has the shape '
            f"{tuple(leaf.meta['val'].shape)}. Return it with one row a sample (`.transpose(0, 1)`), detach it if the "
            'loss does not need it, or use feedback="none".'
        )
    return layout.elements


def _check_sites(module: fx.GraphModule, influence: Collection[fx.Node]) -> None:
    nodes = {node.name: node for node in module.graph.nodes}
    for site in sites(module):
        if nodes[site.output] not in influence:
            raise UnsupportedModelError(_no_way(site, nodes[site.core]))


def _no_way(site: Site, node: fx.Node) -> str:
    return (
        f"site {site.name!r} in {origin(node)} reaches only outputs that are not floating-point, through which "
        f'feedback="learned" learns nothing; {", ".join(site.parameters)} would stay untrained. Return what they are '
        'computed from, freeze the parameters, or use feedback="none".'
    )


def _separated(module: fx.GraphModule, leaf: fx.Node) -> fx.Node:
    """An alias that is returned in place of `leaf`."""
    with module.graph.inserting_after(leaf):
        alias = module.graph.call_function(torch.ops.aten.alias.default, (leaf,))
    kept = ("val", "kind", "layout", "nn_module_stack", "stack_trace")
    alias.meta.update({name: leaf.meta[name] for name in kept if name in leaf.meta}, returned=True)
    replaced = [(o, alias if o.kind == "output" and node is leaf else node) for o, node in outputs(module)]
    set_outputs(module, replaced)
    return alias


__all__ = ["error_like", "influential", "output_nodes", "returned", "separate_outputs"]
