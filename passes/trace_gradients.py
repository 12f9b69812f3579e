"""Pass: trace one standalone gradient subgraph a site, the local vjp of its region with respect to its parameters.

The region alone is differentiated, traced by ``make_fx`` with symbolic batch, functionalised, dead code removed. What
is left of a convolution or a linear layer is exactly the weight-gradient kernel. Inputs are the operands that the vjp
really reads (others are dropped: they need no capture), the parameters that it reads, and ``cotangent``, the gradient
of the loss at the noise point, shaped like the site's output. Regions that differ in nothing but names (the steps of a
recurrence, equal blocks) are traced once. Outputs are the gradients of the site's parameters; with
`values` also every activation of the region by its node's name, for `reuse_values` to take from the clean run.

Returns the subgraphs by site index; the graph itself is not changed.

Declines: a parameter that only reaches its site through an operation without derivative (``sign(weight)``, rounding)
has a gradient that does not depend on the cotangent; the error names it. A model may declare a derivative there, as
``hard.detach() - (soft.detach() - soft)`` or by an operator with a formula of its own: it is part of the expression.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from .differentiable import DECOMPOSED, DIFFERENTIABLE
from .errors import UnreachedParameterError, UnsupportedModelError
from .find_sites import Site, sites
from .graph import Kind, Output, Role, describe, drop_detaches, finish, set_outputs
from .locate_samples import batch_symbol
from .rules import Rule, rule_for, uses_batch_statistics


def trace_gradients(module: fx.GraphModule, *, capture: str, values: bool = False) -> dict[int, fx.GraphModule]:
    """The vjp of every site; `capture` ``"exact"``, ``"sign"`` or ``"stochastic"`` decides what a norm layer reads.

    Sites with noise on their weight have none (`perturb_weights.weight_gradients`).
    """
    nodes = {node.name: node for node in module.graph.nodes}
    known: dict[Any, fx.GraphModule] = {}
    traced = [site for site in sites(module) if site.weight_noise is None]
    return {site.index: _trace(module, site, nodes, capture, values, known) for site in traced}


def captures_normalized(site: Site, core: fx.Node, capture: str) -> bool:
    """Whether the site's gradient is taken in terms of the normalised activation x̂ (see `passes.rules`)."""
    rule = rule_for(core.target)
    if not rule.encodable or rule.normalize is None or _last(site, core) is not core or site.beyond:
        return False
    # recomputed from its input, a copy's x̂ would have the statistics of the copies beside it, not the clean run's
    return capture != "exact" or uses_batch_statistics(core)


def _last(site: Site, core: fx.Node) -> fx.Node:
    return core if "+" not in site.operation else next(iter(core.users))


def _trace(
    module: fx.GraphModule,
    site: Site,
    nodes: dict[str, fx.Node],
    capture: str,
    with_values: bool,
    known: dict[Any, fx.GraphModule],
) -> fx.GraphModule:
    core = nodes[site.core]
    computed: tuple[str, ...] = ()
    region: Any
    if captures_normalized(site, core, capture):
        region, operands = _normalized_region(site, core, nodes)
    else:
        region, operands, computed = _copied_region(site, nodes, with_values)
    values = [nodes[name].meta["val"] for name in operands]
    parameters = [
        next(n for n in nodes.values() if n.op == "placeholder" and n.meta.get("target") == target
             and n.meta["role"] == Role.PARAMETER)
        for target in site.parameters
    ]  # fmt: skip
    weights = [node.meta["val"] for node in parameters]
    ends = [nodes[name].meta["val"] for name in site.ends]
    key = _structure(region, values, weights, ends) if isinstance(region, fx.GraphModule) else site
    if key not in known:
        known[key] = _vjp(region, values, weights, ends, batch_symbol(module), core)
    return _normal_form(known[key], site, operands, [nodes[name] for name in operands], parameters, core, computed)


def _structure(region: fx.GraphModule, *values: list[Any]) -> Any:
    """What a region's vjp depends on: its operations, and what its operands, parameters and results are like (apart: a
    frozen weight is an operand)."""
    number = {node: place for place, node in enumerate(region.graph.nodes)}

    def unnamed(node: fx.Node) -> Any:
        if node.op == "placeholder":
            return ()
        return str(node.target), repr(fx.map_arg((node.args, node.kwargs), lambda source: f"%{number[source]}"))

    return tuple(unnamed(node) for node in region.graph.nodes), tuple(tuple(map(_likeness, each)) for each in values)


def _likeness(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return str(value)
    return str(value.shape), str(value.stride()), value.dtype, value.device


def _vjp(
    region: Any, values: list[Any], weights: list[Any], ends: list[Any], batch: Any, core: fx.Node
) -> fx.GraphModule:
    """The traced vjp ``(cotangents, operands, parameters) -> (*gradients, *values inside)`` of a region."""
    mode = detect_fake_mode(ends)
    assert mode is not None

    def gradient(cotangents: list[Any], values: list[Any], weights: list[Any]) -> tuple[Any, ...]:
        # autograd.grad and not torch.func.vjp, whose wrappers read sizes as integers and so would fix the batch size
        leaves = [weight.detach().requires_grad_() for weight in weights]
        with torch.enable_grad():
            results, inside = region(*values, *leaves)
        pairs = [pair for pair in zip(results, cotangents, strict=True) if pair[0].requires_grad]
        if not pairs:
            return (None,) * len(leaves)
        found = torch.autograd.grad([p[0] for p in pairs], leaves, [p[1] for p in pairs], allow_unused=True)
        return *found, *inside

    with mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention counts as random, and is not core ATen
        cotangents = [torch.empty_like(end, memory_format=torch.contiguous_format) for end in ends]
        traced = make_fx(gradient, DECOMPOSED, _allow_non_fake_inputs=True)(cotangents, values, weights)
        if _writes_through_views(traced):
            functional = torch.func.functionalize(traced, remove="mutations")
            traced = make_fx(functional, DECOMPOSED, _allow_non_fake_inputs=True)(cotangents, values, weights)
    _check_symbolic(batch, core)  # `batch` was read before the trace: a symbol that it fixed is none any more
    drop_detaches(traced)
    _functionalize(traced)
    _cancel_transposes(traced)
    _ask_for_input_gradients(traced)
    for node in traced.graph.nodes:  # a value that is taken from a run may have other strides, which view would refuse
        if node.target == torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    traced.graph.eliminate_dead_code()
    return traced


def _check_symbolic(batch: Any, core: fx.Node) -> None:
    """A local derivative whose formula reads sizes as integers would silently fix the batch size: refuse it."""
    for node in core.graph.nodes:
        for extent in getattr(node.meta.get("val"), "shape", ()):
            if isinstance(extent, torch.SymInt):
                if batch is not None and batch in extent.node.shape_env.replacements:
                    raise UnsupportedModelError(f"the derivative of {describe(core)} does not allow a free batch size.")
                return


def _writes_through_views(module: fx.GraphModule) -> bool:
    """Whether an operation writes into a view, or into what views were taken of (the derivative of ``as_strided``):
    what it writes is then read under another name."""

    def is_view(node: fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        return schema is not None and not schema.is_mutable and any(result.alias_info for result in schema.returns)

    written = [
        node.args[0]
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.is_mutable
        and torch.Tag.inplace_view not in node.target.tags
    ]
    return any(is_view(node) or any(map(is_view, node.users)) for node in written if isinstance(node, fx.Node))


def _functionalize(module: fx.GraphModule) -> None:
    """Replace in-place operations by their functional twins (they act on the derivative's own intermediates)."""
    for node in list(module.graph.nodes):
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            name, overload = target._schema.name.removesuffix("_"), target._overloadname
            namespace, _, packet = name.partition("::")
            functional = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
            mutated = node.args[0]
            assert isinstance(mutated, fx.Node)
            node.target = functional
            mutated.replace_all_uses_with(node, delete_user_cb=_after(node).__contains__)
    module.recompile()


def _cancel_transposes(module: fx.GraphModule) -> None:
    """``x.t().t()`` is x: what derivatives of linear layers are full of."""
    transpose = torch.ops.aten.t.default
    for node in module.graph.nodes:
        if node.target == transpose and node.args[0].target == transpose:
            node.replace_all_uses_with(node.args[0].args[0])


def _ask_for_input_gradients(module: fx.GraphModule) -> None:
    """On a CPU, torch 2.13's derivative of a group normalisation of images with channels last crashes the process where
    the gradient of its input is not asked for, as in a site of its own: ask for it, and let it be."""
    for node in module.graph.nodes:
        if node.target == torch.ops.aten.native_group_norm_backward.default:
            *given, wanted = node.args
            node.args = (*given, [True, *wanted[1:]])


def _after(node: fx.Node) -> set[fx.Node]:
    later = set()
    current = node.next
    while current.op != "root":
        later.add(current)
        current = current.next
    return later


def _copied_region(
    site: Site, nodes: dict[str, fx.Node], with_values: bool
) -> tuple[fx.GraphModule, tuple[str, ...], tuple[str, ...]]:
    """The region as a function ``(*operands, *parameters) -> (values at the frontier, values inside)``, and the names
    of its operands and of the values inside: the activations that it computes, if they are asked for.

    Behind the region parameters are operands like any other value: also one that the site itself reads (a tied weight)
    is differentiated only where this site reads it, since its other reader has a subgraph of its own. So is a node at
    the frontier where another one reads it: the gradient there counts that way already.
    """
    members = {nodes[name] for name in site.region}
    behind = {nodes[name] for name in site.beyond}
    own = {node for node in members if node.meta.get("kind") != Kind.PARAMETER} | behind
    inner = own - {nodes[name] for name in site.ends}
    read = [source for node in behind for source in node.all_input_nodes if source not in inner]
    operands = list(dict.fromkeys([*(nodes[name] for name in site.operands), *read]))
    graph = fx.Graph()
    given = {node: graph.placeholder(node.name) for node in operands}
    mapping: dict[fx.Node, fx.Node] = {}
    by_target = {node.meta["target"]: node for node in members if node.op == "placeholder"}
    for target in site.parameters:
        mapping[by_target[target]] = graph.placeholder(f"{by_target[target].name}_own")
    for node in nodes.values():
        if node in members | behind and node not in mapping:
            known = inner if node in behind else inner | (members - own)
            sources = {n: mapping[n] if n in known else given[n] for n in node.all_input_nodes}
            mapping[node] = graph.node_copy(node, sources.__getitem__)
            mapping[node].target = DIFFERENTIABLE.get(node.target, node.target)
    inside = [
        node
        for node in mapping
        if with_values and node.meta.get("kind") == Kind.ACTIVATION and isinstance(node.meta["val"], Tensor)
    ]
    graph.output((tuple(mapping[nodes[name]] for name in site.ends), tuple(mapping[node] for node in inside)))
    return fx.GraphModule({}, graph), tuple(node.name for node in operands), tuple(node.name for node in inside)


def _normalized_region(site: Site, core: fx.Node, nodes: dict[str, fx.Node]) -> tuple[Any, tuple[str, ...]]:
    """``(x̂, *parameters) -> (z,), ()``; x̂ has the shape of the site's output, whose name stands for it."""
    rule: Rule = rule_for(core.target)
    assert rule.affine is not None
    affine = rule.affine
    by_name = {nodes[name].meta.get("target"): name for name in site.region if nodes[name].op == "placeholder"}
    direct = {argument.name for argument in core.args if isinstance(argument, fx.Node)}
    gamma_first = [target for target in site.parameters if by_name[target] in direct]
    position = {id(argument): place for place, argument in enumerate(core.args)}
    ordered = sorted(gamma_first, key=lambda target: position[id(nodes[by_name[target]])])
    first_is_gamma = len(ordered) == 2 or core.args[position[id(nodes[by_name[ordered[0]]])] + 1] is None

    def region(x: Any, *parameters: Any) -> Any:
        given = dict(zip(site.parameters, parameters, strict=True))
        values = [given[target] for target in ordered]
        if len(values) == 2:
            return (affine(x, *values),), ()
        return (affine(x, values[0], None) if first_is_gamma else affine(x, None, values[0]),), ()

    return region, (site.output,)


def _normal_form(
    traced: fx.GraphModule,
    site: Site,
    operands: tuple[str, ...],
    operand_nodes: list[fx.Node],
    parameters: list[fx.Node],
    core: fx.Node,
    computed: tuple[str, ...],
) -> fx.GraphModule:
    """Name the traced placeholders, drop those that are not read, and describe the outputs."""
    graph = traced.graph
    places = [node for node in graph.nodes if node.op == "placeholder"]
    roles: list[tuple[Role, Any, str]] = [
        (Role.RUNTIME, f"cotangent.{name}", f"cotangent_{name}")
        if site.beyond
        else (Role.RUNTIME, "cotangent", "cotangent")
        for name in site.ends
    ]
    for name, node in zip(operands, operand_nodes, strict=True):
        if node.op == "placeholder" and node.meta["role"] != Role.INPUT:
            roles.append((node.meta["role"], node.meta["target"], name))
        else:
            roles.append((Role.VALUE, name, name))
    roles += [(Role.PARAMETER, node.meta["target"], node.name) for node in parameters]
    clean = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    bound: dict[tuple[Role, Any], fx.Node] = {}
    for node, (role, target, name) in zip(places, roles, strict=True):
        known = bound.get((role, target))
        if known is not None:  # read here by the site and behind it
            mapping[node] = known
        elif node.users or str(target).startswith("cotangent"):
            mapping[node] = bound[role, target] = new = clean.placeholder(name)
            new.meta.update(role=role, target=target, val=node.meta.get("val"))
            if role == Role.PARAMETER:
                new.meta["trainable"] = True
    for node in graph.nodes:
        if node.op != "placeholder" and node.op != "output":
            mapping[node] = clean.node_copy(node, mapping.__getitem__)
    results = graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    gradients = []
    for target, result in zip(site.parameters, results[: len(site.parameters)], strict=True):
        if not isinstance(result, fx.Node) or not any(_depends_on(result, c) for c in places[: len(site.ends)]):
            raise UnreachedParameterError(
                f"the parameter {target!r} has no local derivative at {describe(core)}: on its way there it passes an "
                "operation whose derivative is zero (sign, round, comparison, argmax, detach). It would stay "
                "untrained. Freeze it, keep the operation without derivative on the activations, or let the model "
                "declare one for it (as onward.models.binarised does).",
                [target],
            )
        gradients.append((Output("gradient", target), mapping[result]))
    inside = results[len(site.parameters) :]
    gradients += [(Output("value", n), mapping[v]) for n, v in zip(computed, inside, strict=True)]
    clean.output(tuple(value for _, value in gradients))
    module = fx.GraphModule(traced, clean)
    set_outputs(module, gradients)
    return finish(module)


_SHAPE_ONLY = (torch.ops.aten.zeros_like.default, torch.ops.aten.ones_like.default, torch.ops.aten.full_like.default,
               torch.ops.aten.new_zeros.default)  # fmt: skip
"""Operations that read of a tensor nothing but its shape: the derivative of sign or round is a ``zeros_like``."""


def _depends_on(node: fx.Node, source: fx.Node) -> bool:
    """Whether a value of `source` reaches `node`."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current is source:
            return True
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes if current.target not in _SHAPE_ONLY else ())
    return False


__all__ = ["captures_normalized", "trace_gradients"]
