"""Pass: find the sites, the operations that combine parameters with activations.

A node is a site if it reads both a value that depends on a trainable parameter and no input (a parameter, or an
expression of parameters such as weight norm, a tied or transposed weight) and one that depends on an input. Its
*region* is the node with the parameter expressions it reads: what the local vjp differentiates. A parameter read by
several sites sums their gradients.

With ``join_statistics`` an operation that normalises by statistics of the batch (batch normalisation in training mode)
joins the site that feeds it, if nothing else reads that site: its statistics couple the samples, the copies see the
clean run's (`share_prefixes`), so only the local vjp can know how they depend on the weights before them.

With ``share_sums`` sites whose results meet in an addition that nothing bypasses (a block's last convolution and its
shortcut) become one site with its noise at the sum: their gradients are the same there; and a group or layer
normalisation that alone reads a site joins it, a cheap local chain that is known exactly (method.md 10).

Writes ``meta["site"]`` (a `Site`) on the node whose value receives the noise.

Declines (with an error that names the parameter or the operation):
- a trainable parameter that no site reaches, or whose site has no elements or does not influence the model's output;
- a site whose result is not a floating-point tensor, or has no readable layout.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
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
    upstream,
)
from .perturb_weights import WeightNoise
from .rules import uses_batch_statistics
from .tie_blocks import grid


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
    frontier: tuple[str, ...] = ()
    """Names of the nodes at which the gradient is read; empty stands for the noise point itself (`extend_reach`)."""
    beyond: tuple[str, ...] = ()
    """Names of the nodes behind the noise point up to the frontier, which the gradient is pulled back through."""
    blocks: tuple[int, ...] = ()
    """Extents of the blocks that share a number of noise, along ``layout.extents``; empty: each coordinate its own
    (`tie_blocks`)."""
    rows: int = 0
    """Rows of a sample that have losses of their own to be weighted by (`compiler.node_reach`); 0: the sample's."""
    weight_noise: WeightNoise | None = None
    """The noise on the site's weight, in place of that on its output (`perturb_weights`)."""

    @property
    def noise_layout(self) -> Layout:
        """The layout of the numbers that noise is drawn for."""
        return self.grid if self.weight_noise is None else self.weight_noise.layout

    @property
    def credited(self) -> Layout:
        """The layout of the noise as its loss weights see it: with `rows`, each of them is a sample."""
        return Layout((1, *self.noise_layout.sizes[2:]), 0) if self.rows else self.noise_layout

    @property
    def grid(self) -> Layout:
        """The layout of the tensor with one element for every block: what noise is drawn, and feedback learned, for."""
        return grid(self.layout, self.blocks)

    @property
    def ends(self) -> tuple[str, ...]:
        """The nodes at which the gradient is read."""
        return self.frontier or (self.output,)

    @property
    def joined(self) -> bool:
        """Whether several operations make up the site: its captures are exact, and its gradient reads the clean run."""
        return "+" in self.operation


def find_sites(module: fx.GraphModule, *, join_statistics: bool = True, share_sums: bool = False) -> fx.GraphModule:
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
                    _join(node, NORMALIZATIONS if share_sums else ())
    meeting: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = {}
    for node in found:
        last = node.meta.pop("last", node)
        meeting.setdefault(_sum(_output(last)) if share_sums else _output(last), []).append((node, last))
    for index, (output, members) in enumerate(sorted(meeting.items(), key=lambda item: order[item[0]])):
        region = _region(output, members, order)
        first = members[0][0]
        output.meta["site"] = Site(
            index=index,
            name=_unique("+".join(_readable(node) for node, _ in members), names),
            operation="+".join(operation_name(each) for node, last in members for each in dict.fromkeys((node, last))),
            output=output.name,
            core=first.name,
            region=tuple(member.name for member in region),
            parameters=_parameters(region),
            operands=_operands(region),
            layout=_layout(output, first),
            line=origin(first).line,
        )
    for node in module.graph.nodes:
        node.meta.pop("joined", None)
    _check_reached(module)
    return finish(module)


def sites(module: fx.GraphModule) -> list[Site]:
    """The sites of a graph in order."""
    return sorted((node.meta["site"] for node in module.graph.nodes if "site" in node.meta), key=lambda s: s.index)


def credit_rows(module: fx.GraphModule, *, rows: dict[int, int]) -> fx.GraphModule:
    """Pass: the noise of these sites is weighted row by row, so many rows a sample."""
    module = clone(module)
    for node in module.graph.nodes:
        site = node.meta.get("site")
        if site is not None and site.index in rows:
            node.meta["site"] = replace(site, rows=rows[site.index])
    return finish(module)


NORMALIZATIONS = (torch.ops.aten.group_norm.default, torch.ops.aten.layer_norm.default)


def _join(node: fx.Node, also: Collection[object]) -> None:
    users = list(node.users)
    if len(users) == 1 and users[0].args[0] is node and (uses_batch_statistics(users[0]) or users[0].target in also):
        users[0].meta["joined"] = True
        node.meta["last"] = users[0]


def _output(node: fx.Node) -> fx.Node:
    """The noise point of a site: the node itself, or the first of its results."""
    output: fx.Node | None = node
    if isinstance(node.meta.get("val"), (tuple, list)):
        output = getitem(node, 0)
        if any(_is_read(user) for user in node.users if user is not output):
            raise UnsupportedModelError(
                f"{describe(node)} reads a trainable parameter and has several results that are used. Noise on the "
                "first alone would miss what the parameter does through the others. Split it into operations with one "
                "result each (the formula of a cell instead of the fused cell); or freeze the parameter."
            )
    if output is None or not is_floating(output):
        raise UnsupportedModelError(
            f"{describe(node)} reads a trainable parameter but its result is not a floating-point tensor, so no noise "
            "can be added to it and the parameter has no local derivative. Split it into a floating-point operation "
            "and what follows: `(x - threshold) > 0` instead of `x > threshold`; or freeze the parameter."
        )
    return output


def _is_read(result: fx.Node) -> bool:
    """Whether a floating-point result is read by anything but a buffer's update."""
    if not is_floating(result):
        return False
    module = result.graph.owning_module
    assert module is not None
    kinds = {output.kind for output, node in outputs(module) if node is result}
    return any(user.op != "output" for user in result.users) or bool(kinds - {"mutation"})


def _sum(output: fx.Node) -> fx.Node:
    """The last of the sums of its own shape that all of a site's result goes into."""
    while len(output.users) == 1:
        reader = next(iter(output.users))
        whole = reader.target in _SUMS and not reader.kwargs and reader.meta["val"].shape == output.meta["val"].shape
        if not whole or reader.meta.get("layout") != output.meta.get("layout"):
            break
        output = reader
    return output


_SUMS = (torch.ops.aten.add.Tensor,)


def _region(output: fx.Node, members: list[tuple[fx.Node, fx.Node]], order: dict[fx.Node, int]) -> list[fx.Node]:
    """The nodes from the members to the noise point, and the parameter expressions that they read."""
    inside = {node for member in members for node in member}
    for _, last in members:
        current = last
        while current is not output:  # each step on the way has one reader
            current = (
                _output(current) if isinstance(current.meta.get("val"), (tuple, list)) else next(iter(current.users))
            )
            inside.add(current)
    stack = [source for node in inside for source in node.all_input_nodes]
    while stack:
        source = stack.pop()
        if source.meta["kind"] == Kind.PARAMETER and source not in inside:
            inside.add(source)
            stack.extend(source.all_input_nodes)
    return sorted(inside, key=order.__getitem__)


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
    influential = upstream(
        value for output, value in outputs(module) if output.kind == "output" and isinstance(value, fx.Node)
    )
    reached = set()
    for node in module.graph.nodes:
        site = node.meta.get("site")
        if site is not None:
            if node in influential and site.layout.elements:
                reached.update(site.parameters)
            else:
                del node.meta["site"]
    _renumber(module)
    for output, node in outputs(module):
        placed = output.kind == "output" and isinstance(node, fx.Node)
        if placed and (node.meta["kind"] == Kind.PARAMETER or node.meta.get("trainable")):
            raise UnsupportedModelError(
                f"the model returns {describe(node)}, an expression of trainable parameters alone, and no noise can "
                "show how the loss depends on it. Return it detached (`.detach()`), or compute it in the loss."
            )
    if not any(node.meta["trainable"] for node in placeholders(module, Role.PARAMETER)):
        raise UnreachedParameterError(
            "the model has no trainable parameter: there is nothing to train. Before compiling, call "
            "requires_grad_(True) on what is to be trained; if the model has no parameters, give it a layer that has."
        )
    missing = [
        node
        for node in placeholders(module, Role.PARAMETER)
        if node.meta["trainable"] and node.meta["target"] not in reached
    ]
    if missing:
        listed = ", ".join(repr(node.meta["target"]) for node in missing)
        unused = [node.meta["target"] for node in missing if not node.users]
        reason = (
            "it is never read in forward, or its result is thrown away"
            if unused
            else "it is detached, or what it feeds has no elements, does not combine with an input or never reaches "
            "the model's output"
        )
        raise UnreachedParameterError(
            f"no site reaches the trainable parameter(s) {listed}: {reason}. They would stay untrained. Freeze them "
            "(`parameter.requires_grad_(False)`) or use them in the model's output.",
            [node.meta["target"] for node in missing],
        )


def _renumber(module: fx.GraphModule) -> None:
    for index, site in enumerate(sites(module)):
        for node in module.graph.nodes:
            if node.meta.get("site") is site:
                node.meta["site"] = replace(site, index=index)


__all__ = ["Site", "credit_rows", "find_sites", "sites"]
