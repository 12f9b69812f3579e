"""Pass: add a capture for every value that a gradient subgraph reads (method.md 2, 3).

For each site and each activation its vjp reads, by the estimator's ``capture``:

- ``"exact"``: the activation itself.
- ``"sign"``: ``pack_signs(x)``, one or two bits an element by the sign domain. Biased: the magnitude is gone.
- ``"stochastic"``: ``scale = max |x|`` of the sample, ``pack_stochastic_signs(x, scale)``: the same bits, unbiased.
- ``"stochastic-2"``, ``-4``, ``-8``: ``|x|`` rounded up or down to one of the levels that so many bits have between 0
  and the scale, at random and unbiased. Two bits of a signed activation are ``"stochastic"``, and so is any number of
  an activation that is ±1.

Sites whose rule does not allow an encoding, or that multiply two activations, are captured exactly. So is an input of
the model, or a view of one, in place of ``"stochastic"``: the batch is there in any case, and its encoding, one for all
copies of a step, would be a variance that copies do not average. Of a norm layer the normalised activation is captured
where signs are asked for, and of batch normalisation by the batch's statistics always. Sites that read the same
activation share its capture.

Writes ``meta["captures"]`` (a tuple of `Capture`) on each noise point, and appends the captured nodes to the outputs,
so that no dead-code elimination can take them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import ops
from .find_sites import Site, sites
from .graph import (
    Kind,
    Layout,
    Output,
    Role,
    add_runtime_placeholder,
    clone,
    finish,
    is_floating,
    outputs,
    placeholders,
    set_outputs,
)
from .rules import rule_for
from .trace_gradients import captures_normalized

_aten = torch.ops.aten


@dataclass(frozen=True)
class Capture:
    """One activation that crosses from a forward run to a gradient subgraph."""

    operand: str
    """The name the site's vjp knows the value by."""
    source: str
    """The node that is captured."""
    encoding: str
    """``"exact"``, ``"sign"``, ``"stochastic"``, or by levels (`ops.LEVEL_BITS`)."""
    domain: str
    """Sign domain (`ops.DOMAINS`)."""
    layout: Layout | None
    exact_bytes: int
    """Bytes a sample of the exact value."""
    bytes: int
    """Bytes a sample as captured."""

    @property
    def name(self) -> str:
        return self.source if self.encoding == "exact" else f"{self.source}.{self.encoding}"

    @property
    def level_bits(self) -> int | None:
        """Bits an element of a capture by levels."""
        return ops.LEVEL_BITS.get(self.encoding)

    @property
    def scale(self) -> str:
        """Name of the scale that goes with a stochastic capture."""
        return f"{self.name}.scale"


def insert_captures(module: fx.GraphModule, *, gradients: dict[int, fx.GraphModule], capture: str) -> fx.GraphModule:
    module = clone(module)
    nodes = {node.name: node for node in module.graph.nodes}
    added: dict[str, list[tuple[Output, fx.Node]]] = {}
    for site in sites(module):
        captures = []
        for place in placeholders(gradients[site.index], Role.VALUE):
            operand = place.meta["target"]
            source = _source(module, site, operand, nodes, capture)
            if source.meta["kind"] != Kind.ACTIVATION:
                continue  # a size or a constant: handed over as it is
            one = _describe(site, operand, source, nodes, capture)
            captures.append(one)
            if one.name not in added:
                added[one.name] = _encode(module, site, one, source)
        nodes[site.output].meta["captures"] = tuple(captures)
    set_outputs(module, outputs(module) + [item for items in added.values() for item in items])
    return finish(module)


def captures_of(module: fx.GraphModule) -> dict[int, tuple[Capture, ...]]:
    """The captures of every site."""
    return {node.meta["site"].index: node.meta["captures"] for node in module.graph.nodes if "site" in node.meta}


def _source(module: fx.GraphModule, site: Site, operand: str, nodes: dict[str, fx.Node], capture: str) -> fx.Node:
    core = nodes[site.core]
    if operand != site.output or not captures_normalized(site, core, capture):
        source = nodes[operand]  # with its noise, if it is a noise point itself: the activation that reaches this site
        return next((user for user in source.users if "noise_of" in user.meta and user.args[0] is source), source)
    name = f"{site.output}_normalized"
    if name not in nodes:
        rule = rule_for(core.target)
        assert rule.normalize is not None
        with module.graph.inserting_after(core):
            built = rule.normalize(module.graph, core)
        built.name = name
        built.meta.update(kind=Kind.ACTIVATION, sign_domain="signed", layout=site.layout)
        nodes[name] = built
    return nodes[name]


def _describe(site: Site, operand: str, source: fx.Node, nodes: dict[str, fx.Node], capture: str) -> Capture:
    core = nodes[site.core]
    encodable = rule_for(core.target).encodable and not site.joined and _reads_one_activation(core)
    layout: Layout | None = source.meta.get("layout")
    encodable = encodable and is_floating(source) and layout is not None
    encoding = "exact" if not encodable or (capture != "sign" and _is_given(source)) else capture
    domain = source.meta.get("sign_domain", "signed")
    bits = ops.LEVEL_BITS.get(encoding)
    if bits is not None and (domain == "binary" or ops.num_levels(domain, bits) == 1):
        encoding, bits = "stochastic", None
    val = source.meta["val"]
    elements = layout.elements if layout is not None else 0
    exact = elements * val.element_size()
    packed = ops.DOMAINS[domain] * ops.row_bytes(elements, 1) if bits is None else ops.row_bytes(elements, bits)
    packed += 0 if encoding == "sign" else 4
    return Capture(operand, source.name, encoding, domain, layout, exact, exact if encoding == "exact" else packed)


def _is_given(source: fx.Node) -> bool:
    """Whether the value is an input of the model, or a view of one."""
    while source.op == "call_function" and _is_view(source):
        source = source.all_input_nodes[0]
    return source.op == "placeholder" and source.meta["role"] == Role.INPUT


def _is_view(node: fx.Node) -> bool:
    """Whether an operation returns its operand's memory: the schema says that it may, and the dtype is the same."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.all_input_nodes:
        return False
    returned = node.target._schema.returns
    aliased = len(returned) == 1 and returned[0].alias_info is not None and not returned[0].alias_info.is_write
    return aliased and node.meta["val"].dtype == node.all_input_nodes[0].meta["val"].dtype


def _reads_one_activation(core: fx.Node) -> bool:
    """Whether a single operand depends on the inputs, so that the parameters' gradient is linear in it.

    The encodings of two factors (``nn.Bilinear``, ``einsum`` of three, an activation and itself) are not unbiased
    together.
    """
    operands = [one for one in pytree.tree_leaves((core.args, core.kwargs)) if isinstance(one, fx.Node)]
    return [one.meta["kind"] for one in operands].count(Kind.ACTIVATION) == 1


def _encode(module: fx.GraphModule, site: Site, one: Capture, source: fx.Node) -> list[tuple[Output, fx.Node]]:
    if one.encoding == "exact":
        return [(Output("capture", one.name), source)]
    graph, layout = module.graph, one.layout
    assert layout is not None
    copies = add_runtime_placeholder(graph, "copies", None)
    key = add_runtime_placeholder(graph, "key", None)
    anchor = source if source.op != "placeholder" else placeholders(module)[-1]
    items: list[tuple[Output, fx.Node]] = []

    def call(target: Any, *args: Any) -> fx.Node:
        nonlocal anchor
        with graph.inserting_after(anchor):
            anchor = graph.call_function(target, args)
        kept = ("nn_module_stack", "stack_trace")
        anchor.meta.update({name: source.meta[name] for name in kept if name in source.meta})
        anchor.meta.update(kind=Kind.ACTIVATION, capture=one.name)
        return anchor

    if one.encoding == "sign":
        items.append((Output("capture", one.name), call(ops.pack_signs, source, one.domain, layout.dim)))
        return items
    others = [dim for dim in range(len(layout.sizes)) if dim != layout.dim]
    magnitude = call(_aten.abs.default, source)
    scale = call(_aten.amax.default, magnitude, others, True) if others else magnitude
    drawn, where = (copies, key, site.index), (list(layout.sizes), layout.dim, layout.outer)
    if one.level_bits is None:
        packed = call(ops.pack_stochastic_signs, source, scale, *drawn, one.domain, *where)
    else:
        wide = torch.promote_types(source.meta["val"].dtype, torch.float32)  # in half precision a fraction is lost
        scale = call(_aten.clamp_min.default, scale, torch.finfo(source.meta["val"].dtype).tiny)
        share = call(_aten.div.Tensor, call(_aten.to.dtype, source, wide), call(_aten.to.dtype, scale, wide))
        whole = call(_aten.mul.Tensor, share, ops.num_levels(one.domain, one.level_bits))
        below = call(_aten.trunc.default, whole)
        rest = call(_aten.sub.Tensor, whole, below)
        up = call(ops.stochastic_sign, rest, call(_aten.ones_like.default, scale), *drawn, *where)
        level = call(_aten.add.Tensor, below, up)
        packed = call(ops.pack_levels, level, one.domain, one.level_bits, layout.dim)
    items += [(Output("capture", one.scale), scale), (Output("capture", one.name), packed)]
    return items
