"""Pass: find the sites, the operations that combine parameters with activations.

A node is a site if it reads both a value that depends on a trainable parameter and no input (a parameter, or an
expression of parameters such as weight norm, a tied or transposed weight) and one that depends on an input. Its *region*
is the node with the parameter expressions it reads: what the local vjp differentiates. A parameter read by several sites
sums their gradients.

With ``join_statistics`` an operation that normalises by statistics of the batch (batch normalisation in training mode)
joins the site that feeds it, if nothing else reads that site: its statistics couple the samples, the copies see the
clean run's (`share_prefixes`), so only the local vjp can know how they depend on the weights before them.

Writes ``meta["site"]`` (a `Site`) on the node whose value receives the noise.

Declines (with an error that names the parameter or the operation):
- a trainable parameter that no site reaches, or whose site does not influence the model's output;
- a site whose result is not a floating-point tensor, or has no readable layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from .errors import UnreachedParameterError, UnsupportedModelError
from .graph import (
    Kind,
    Layout,
    Role,
    classify,
    clone,
    describe,
    finish,
    getitem,
    is_floating,
    operation_name,
    origin,
    outputs,
    placeholders,
)
from .rules import uses_batch_statistics


@dataclass(frozen=True)
class Site:
    """An operation that consumes parameters, and the value it produces, where the noise goes."""

    index: int
    name: str
    """Module path, with ``:operation`` where a module has several sites and ``@n`` where it is called again."""
    operation: str
    """Short name of the operation, joined by ``+`` where batch statistics joined it."""
    output: str
    """Name of the node that receives the noise: the *noise point*."""
    core: str
    """Name of the node that reads the parameters."""
    region: tuple[str, ...]
    """Names of the nodes that the gradient subgraph recomputes, in order."""
    parameters: tuple[str, ...]
    operands: tuple[str, ...]
    """Names of the nodes outside the region that the region reads, parameters excepted."""
    layout: Layout
    line: str
    """``file:line: code`` in the user's source."""


def find_sites(module: fx.GraphModule, *, join_statistics: bool = True) -> fx.GraphModule:
    module = clone(module)
    classify(module)
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    names: dict[str, int] = {}
    found = []
    for node in module.graph.nodes:
        if node.op == "call_function" and node.meta["kind"] == Kind.ACTIVATION:
            reads_parameter = any(source.meta["kind"] == Kind.PARAMETER for source in node.all_input_nodes)
            if reads_parameter and not node.meta.get("joined"):
                found.append(node)
                if join_statistics:
                    _join(node)
    for index, node in enumerate(found):
        last = node.meta.pop("last", node)
        region = _region(node, last, order)
        output = _output(last)
        site = Site(
            index=index,
            name=_unique(_readable(node), names),
            operation=operation_name(node) if last is node else f"{operation_name(node)}+{operation_name(last)}",
            output=output.name,
            core=node.name,
            region=tuple(member.name for member in region),
            parameters=_parameters(region),
            operands=_operands(region),
            layout=_layout(output, node),
            line=origin(node).line,
        )
        output.meta["site"] = site
    for node in module.graph.nodes:
        node.meta.pop("joined", None)
    _check_reached(module)
    return finish(module)


def sites(module: fx.GraphModule) -> list[Site]:
    """The sites of a graph in order."""
    return sorted((node.meta["site"] for node in module.graph.nodes if "site" in node.meta), key=lambda s: s.index)


def _join(node: fx.Node) -> None:
    users = list(node.users)
    if len(users) == 1 and uses_batch_statistics(users[0]) and users[0].args[0] is node:
        users[0].meta["joined"] = True
        node.meta["last"] = users[0]


def _output(node: fx.Node) -> fx.Node:
    """The noise point of a site: the node itself, or the first of its results."""
    output: fx.Node | None = node
    if isinstance(node.meta.get("val"), (tuple, list)):
        output = getitem(node, 0)
    if output is None or not is_floating(output):
        raise UnsupportedModelError(
            f"{describe(node)} reads a trainable parameter but its result is not a floating-point tensor, so no noise "
            "can be added to it and the parameter has no local derivative. Split it into a floating-point operation "
            "and what follows: `(x - threshold) > 0` instead of `x > threshold`; or freeze the parameter."
        )
    return output


def _region(node: fx.Node, last: fx.Node, order: dict[fx.Node, int]) -> list[fx.Node]:
    members = {node, last}
    stack = [source for member in (node, last) for source in member.all_input_nodes]
    while stack:
        source = stack.pop()
        if source.meta["kind"] == Kind.PARAMETER and source not in members:
            members.add(source)
            stack.extend(source.all_input_nodes)
    if isinstance(last.meta.get("val"), (tuple, list)):
        members.add(_output(last))
    return sorted(members, key=order.__getitem__)


def _parameters(region: list[fx.Node]) -> tuple[str, ...]:
    return tuple(n.meta["target"] for n in region if n.op == "placeholder" and n.meta["role"] == Role.PARAMETER)


def _operands(region: list[fx.Node]) -> tuple[str, ...]:
    inside = set(region)
    outside = {source.name: None for member in region for source in member.all_input_nodes if source not in inside}
    return tuple(outside)


def _layout(output: fx.Node, node: fx.Node) -> Layout:
    layout: Layout | None = output.meta.get("layout")
    if layout is None:
        raise UnsupportedModelError(
            f"{describe(node)}: the batch size appears in its result in a way that does not tell which element belongs "
            "to which sample. Keep the batch in one dimension where parameters are used."
        )
    return layout


def _readable(node: fx.Node) -> str:
    module = origin(node).module or "model"
    return module if _is_layer(node) else f"{module}:{operation_name(node).split('.')[-1]}"


def _is_layer(node: fx.Node) -> bool:
    """Whether a module's one operation reads the parameters, so that its path alone is a good name."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return bool(stack) and "torch.nn.modules" in str(stack[-1][1])


def _unique(name: str, seen: dict[str, int]) -> str:
    seen[name] = seen.get(name, 0) + 1
    return name if seen[name] == 1 else f"{name}@{seen[name]}"


def _check_reached(module: fx.GraphModule) -> None:
    influential: set[fx.Node] = set()
    stack = [value for output, value in outputs(module) if output.kind == "output" and isinstance(value, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in influential:
            influential.add(node)
            stack.extend(node.all_input_nodes)
    reached = set()
    for node in module.graph.nodes:
        site = node.meta.get("site")
        if site is not None:
            if node in influential:
                reached.update(site.parameters)
            else:
                del node.meta["site"]
    _renumber(module)
    missing = [
        node
        for node in placeholders(module, Role.PARAMETER)
        if node.meta["trainable"] and node.meta["target"] not in reached
    ]
    if missing:
        listed = ", ".join(repr(node.meta["target"]) for node in missing)
        unused = [node.meta["target"] for node in missing if not node.users]
        reason = (
            "it is never read in forward" if unused else "what it feeds does not combine with an input or never reaches "
            "the model's output"
        )
        raise UnreachedParameterError(
            f"no site reaches the trainable parameter(s) {listed}: {reason}. They would stay untrained. Freeze them "
            "(`parameter.requires_grad_(False)`) or use them in the model's output."
        )


def _renumber(module: fx.GraphModule) -> None:
    for index, site in enumerate(sites(module)):
        for node in module.graph.nodes:
            if node.meta.get("site") is site:
                node.meta["site"] = replace(site, index=index)


__all__ = ["Site", "find_sites", "sites"]
