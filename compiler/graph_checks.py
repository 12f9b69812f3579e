"""What holds for any one graph in normal form, as the passes and the compiler make them: the table `GRAPH_CHECKS`."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from ..passes import ops
from ..passes.find_sites import Site, sites
from ..passes.graph import Role, placeholders
from ..passes.key_random_operations import is_random
from ..passes.locate_samples import batch_symbol, multiple_of_batch
from .program import binding_key

OUTPUT_KINDS = ("mutation", "output", "value", "capture", "gradient")
RUNTIME_VALUES = ("copies", "draws", "key", "sigmas", "weights", "error", "projected_error")


@dataclass(frozen=True)
class Finding:
    """A broken invariant, and where."""

    message: str
    graph: str = ""
    node: fx.Node | None = None


@dataclass(frozen=True)
class GraphCheck:
    """A check of one graph in normal form."""

    invariant: str
    run: Callable[[fx.GraphModule], Iterator[Finding]]
    keyed: bool = False
    """Holds only once ``key_random_operations`` has run."""


def _placeholders_have_a_role(module: fx.GraphModule) -> Iterator[Finding]:
    seen: dict[str, fx.Node] = {}
    for node in placeholders(module):
        if not isinstance(node.meta.get("role"), Role) or "target" not in node.meta:
            yield Finding("the placeholder has no role or target, so nothing can be bound to it", node=node)
            continue
        if node.meta["role"] == Role.RUNTIME and not _is_made_up(node.meta["target"]):
            yield Finding(f"no executor makes up {node.meta['target']!r}", node=node)
        if node.meta["role"] == Role.PARAMETER and "trainable" not in node.meta:
            yield Finding("the parameter does not say whether it is trainable", node=node)
        first = seen.setdefault(binding_key(node), node)
        if first is not node:
            yield Finding(f"%{first.name} is bound to {binding_key(node)} already", node=node)


def _is_made_up(target: str) -> bool:
    return target in (*RUNTIME_VALUES, "cotangent") or target.startswith(("feedback.", "weights."))


def _outputs_are_described(module: fx.GraphModule) -> Iterator[Finding]:
    node = module.graph.output_node()
    described, values = node.meta.get("outputs"), node.args[0]
    if described is None or not isinstance(values, (tuple, list)) or len(described) != len(values):
        yield Finding(
            f"{len(described or ())} outputs are described but the graph returns {values!r:.80}; each element of the "
            "output tuple needs one description",
            node=node,
        )
        return
    for output, value in zip(described, values, strict=True):
        if output.kind not in OUTPUT_KINDS:
            yield Finding(f"the output {output.name!r} has the unknown kind {output.kind!r}", node=node)
        if output.kind != "output" and not isinstance(value, fx.Node):
            yield Finding(f"the {output.kind} {output.name!r} is {value!r} and not the result of a node", node=node)
    for (kind, name), count in Counter((output.kind, output.name) for output in described).items():
        if count > 1:
            yield Finding(f"the {kind} {name!r} is returned {count} times; only the last would be seen", node=node)


_PYTHON_OPERATIONS = {
    operator.getitem, operator.mul, operator.add, operator.sub, operator.floordiv, operator.truediv, operator.neg,
    operator.mod, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.pow,
    torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_int, torch.sym_float, torch.sym_ite, torch.sym_sum,
}  # fmt: skip
"""Functions beside registered operators that a graph may call: elements of tuples, and arithmetic of sizes."""


def _is_functional(module: fx.GraphModule) -> Iterator[Finding]:
    for node in module.graph.nodes:
        if node.op in ("call_method", "call_module"):
            yield Finding(f"{node.op} is not in the normal form, only registered operators are", node=node)
        elif node.op == "call_function":
            target: Any = node.target
            if isinstance(target, torch._ops.OpOverload):
                if target._schema.is_mutable:
                    yield Finding("the operation writes into its argument, which another graph may read", node=node)
            elif isinstance(target, torch._ops.HigherOrderOperator) or target not in _PYTHON_OPERATIONS:
                yield Finding(f"{target} is no registered operator, so nothing is known of what it does", node=node)


def _random_numbers_are_keyed(module: fx.GraphModule) -> Iterator[Finding]:
    keyed: dict[tuple[Any, ...], fx.Node] = {}
    for node in module.graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            continue
        if target.namespace != "onward":
            if is_random(node):
                yield Finding("it draws from torch's generator, so a step could not be repeated", node=node)
            continue
        position = _KEY_ARGUMENT.get(target)
        if position is not None:
            key = node.args[position]
            if not (isinstance(key, fx.Node) and key.op == "placeholder" and key.meta.get("target") == "key"):
                yield Finding("its key is not the step's", node=node)
        if target in (ops.keyed_random, *_CAPTURING):
            drawn = (target in _CAPTURING, node.args[4 if target in _CAPTURING else 1])
            first = keyed.setdefault(drawn, node)
            if first is not node:
                yield Finding(f"it draws the same numbers as %{first.name}", node=node)


_KEY_ARGUMENT = {
    ops.perturb: 2,
    ops.perturb_weight: 2,
    ops.weighted_noise_sum: 2,
    ops.weight_noise_sum: 2,
    ops.weighted_noise: 2,
    ops.keyed_random: 0,
    ops.stochastic_sign: 3,
    ops.pack_stochastic_signs: 3,
}
_CAPTURING = (ops.stochastic_sign, ops.pack_stochastic_signs)


def _noise_has_its_own_site(module: fx.GraphModule) -> Iterator[Finding]:
    seen: dict[Any, fx.Node] = {}
    for node in perturbations(module):
        z, site = node.args[0], node.args[4]
        first = seen.setdefault(site, node)
        if first is not node:
            yield Finding(f"%{first.name} adds the noise of site {site} already: two noises would be one", node=node)
        if node.meta.get("noise_of") != site:
            yield Finding(f"it adds the noise of site {site} but is marked as {node.meta.get('noise_of')}", node=node)
        for user in z.users if isinstance(z, fx.Node) else ():
            past = user is not node and user.op == "call_function" and user.target != ops.tile
            if past and not {"capture", "clean", "returned"} & user.meta.keys():
                yield Finding(f"%{user.name} reads %{z} past the noise", node=node)


def _sites_fit_the_graph(module: fx.GraphModule) -> Iterator[Finding]:
    found = sites(module)
    if [site.index for site in found] != list(range(len(found))):
        yield Finding(f"the sites are numbered {[site.index for site in found]}")
    nodes = {node.name: node for node in module.graph.nodes}
    trainable = {node.meta["target"] for node in placeholders(module, Role.PARAMETER) if node.meta["trainable"]}
    batch = batch_symbol(module) if found else None
    for node in module.graph.nodes:
        site: Site | None = node.meta.get("site")
        if site is None:
            continue
        if site.output != node.name:
            yield Finding(f"site {site.name!r} has its noise at %{site.output}", node=node)
        missing = [name for name in (site.core, *site.region, *site.operands) if name not in nodes]
        if missing:
            yield Finding(f"site {site.name!r} speaks of %{missing[0]}, which the graph lacks", node=node)
        if not site.parameters or not trainable.issuperset(site.parameters):
            yield Finding(f"site {site.name!r} has the parameters {site.parameters}, not all trainable", node=node)
        yield from _fits(node, node.meta.get("val"), site.layout.sizes, site.layout.dim, site.layout.outer, batch)
    for node in perturbations(module):
        sizes, dim, outer = node.args[6], node.args[7], node.args[8]
        layout = node.meta.get("layout")
        if layout is not None and (list(layout.sizes), layout.dim, layout.outer) != (sizes, dim, outer):
            yield Finding(f"its arguments say {sizes, dim, outer}, its layout {layout}", node=node)
        blocks = node.kwargs.get("blocks")
        if blocks and layout is not None and len(blocks) != len(layout.extents):  # type: ignore[arg-type]
            yield Finding(f"blocks of {blocks} do not fit a sample of {layout.extents}", node=node)


def _fits(
    node: fx.Node, val: Any, sizes: tuple[int, ...], dim: int, outer: int, batch: sympy.Symbol | None
) -> Iterator[Finding]:
    if not isinstance(val, torch.Tensor) or len(val.shape) != len(sizes):
        yield Finding(f"a layout of sizes {sizes} does not fit the value {val}", node=node)
        return
    for position, (extent, size) in enumerate(zip(val.shape, sizes, strict=True)):
        rows = multiple_of_batch(extent, batch)
        if (rows, position == dim) != (size, True) and (rows or position == dim or extent != size):
            yield Finding(f"dimension {position} is {extent}, its layout says {sizes} with samples at {dim}", node=node)
    if dim >= 0 and (outer < 1 or sizes[dim] % outer):
        yield Finding(f"{outer} outer rows do not divide the {sizes[dim]} rows a sample", node=node)


def perturbations(module: fx.GraphModule) -> list[fx.Node]:
    """The noise nodes of a graph."""
    return [node for node in module.graph.nodes if node.op == "call_function" and node.target in ops.PERTURBING]


GRAPH_CHECKS: tuple[GraphCheck, ...] = (
    GraphCheck("2 (a graph reads what exists)", _placeholders_have_a_role),
    GraphCheck("2 (a graph returns what it says)", _outputs_are_described),
    GraphCheck("5 (graphs are functional)", _is_functional),
    GraphCheck("5 (random numbers are keyed)", _random_numbers_are_keyed, keyed=True),
    GraphCheck("4 (every noise node has its own site)", _noise_has_its_own_site),
    GraphCheck("4 (sites fit their values)", _sites_fit_the_graph),
)
