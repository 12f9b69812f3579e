"""The verifier: proves the invariants of a compiled program, a table of checks over graphs and over the whole.

====  ==========================================================================================================
no.   invariant (DESIGN.md)
====  ==========================================================================================================
1     every trainable parameter is reached by a site and given by a gradient subgraph
2     no gradient subgraph reads what another computes, and every graph reads only what exists when it runs
3     only captures, constants, sizes, keys and loss weights cross into a gradient subgraph; noise is never stored
4     all noise comes from ``onward.perturb``: the clean run has none, a perturbed run exactly that of its group
5     every random number is keyed, and no graph writes into what it reads
====  ==========================================================================================================

Invariant 4's other half (σ = 0 computes the model's own forward, bit for bit) and 6 (no autograd graph) are about
values, so ``tests/test_invariants.py`` shows them.

A check is a generator of findings; the first one is raised. `verify_graph` runs the checks that make sense for one
graph, `verify` those and the checks of the program.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import networkx
import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from ..passes import ops
from ..passes.complete_gradients import model_outputs
from ..passes.errors import VerificationError
from ..passes.find_sites import Site, sites
from ..passes.graph import Kind, Role, describe, outputs, placeholders
from ..passes.key_random_operations import is_random
from ..passes.locate_samples import batch_symbol, multiple_of_batch
from .program import CompiledModel, GradientSubgraph, binding_key, input_keys, output_keys

OUTPUT_KINDS = ("mutation", "output", "value", "capture", "gradient")
RUNTIME_VALUES = ("copies", "draws", "key", "sigmas", "weights", "error")
_WEIGHTED = (ops.weighted_noise, ops.weighted_noise_sum)


@dataclass(frozen=True)
class Finding:
    """A broken invariant, and where."""

    message: str
    graph: str = ""
    node: fx.Node | None = None


def verify(compiled: CompiledModel) -> None:
    """Prove the invariants of a whole program.

    Raises:
        VerificationError: the first that is broken, with the graph and the node. A bug in Onward or in a pass.
    """
    for name, module in graphs(compiled).items():
        verify_graph(module, name=name)
    for check in PROGRAM_CHECKS:
        _raise_first(check.invariant, check.run(compiled))


def verify_graph(module: fx.GraphModule, *, name: str = "the graph", keyed: bool = True) -> None:
    """Prove what holds for any one graph, as the passes' results do.

    Args:
        module: a graph in normal form (`passes.graph`).
        name: what messages call it.
        keyed: whether ``key_random_operations`` has run, so that no other random operation may be left.

    Raises:
        VerificationError: the first invariant that is broken.
    """
    for check in GRAPH_CHECKS:
        if keyed or not check.keyed:
            _raise_first(check.invariant, check.run(module), name)


def verify_history(compiled: CompiledModel) -> None:
    """Prove what holds after every pass.

    Raises:
        VerificationError: the first invariant that is broken, naming the pass.
    """
    for number, record in enumerate(compiled.history):
        verify_graph(record.module, name=f"the graph after {record.name}", keyed=number > 0)


def graphs(compiled: CompiledModel) -> dict[str, fx.GraphModule]:
    """Every graph of a program by the name that messages and plans use."""
    return {
        "the one-copy graph": compiled.graph,
        **{f"clean_{number}": stage for number, stage in enumerate(compiled.stages)},
        **{run.name: run.module for run in compiled.runs},
        **{gradient.name: gradient.module for gradient in compiled.gradients},
    }


def task_graph(compiled: CompiledModel) -> networkx.DiGraph:
    """Who reads whose results, as a directed graph of the names in `graphs`; each edge has the ``key`` it carries.

    A subgraph with captures of its own (``per_copy``) finds a value in its perturbed run first, then in the clean run,
    as the executors do; a gradient subgraph reads its run's losses, unless feedback predicts it from the clean run.
    """
    dag = networkx.DiGraph()
    clean: dict[str, str] = {}
    perturbed: dict[int, dict[str, str]] = {}
    for number, stage in enumerate(compiled.stages):
        _add_task(dag, f"clean_{number}", stage, clean)
        clean |= dict.fromkeys(output_keys(stage), f"clean_{number}")
    for run in compiled.runs:
        _add_task(dag, run.name, run.module, clean)
        perturbed[run.index] = dict.fromkeys(output_keys(run.module), run.name)
    for gradient in compiled.gradients:
        available = clean | perturbed[gradient.run] if gradient.per_copy else clean
        _add_task(dag, gradient.name, gradient.module, available)
        if not gradient.from_clean:
            dag.add_edge(f"perturbed_{gradient.run}", gradient.name, key="runtime:weights")
    return dag


def _add_task(dag: networkx.DiGraph, name: str, module: fx.GraphModule, available: dict[str, str]) -> None:
    dag.add_node(name)
    for key in input_keys(module):
        if key in available:
            dag.add_edge(available[key], name, key=key)


def _raise_first(invariant: str, findings: Iterator[Finding], graph: str = "the program") -> None:
    for finding in findings:
        where = finding.graph or graph
        node = f", node %{finding.node.name} ({describe(finding.node)})" if finding.node is not None else ""
        raise VerificationError(
            f"invariant {invariant} is broken in {where}{node}: {finding.message}. This is a bug in Onward or in a "
            "pass; please report it with the model."
        )


# ---- checks of one graph --------------------------------------------------------------------------------------------


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
        if target in (ops.keyed_random, ops.stochastic_sign):
            drawn = (target, node.args[1] if target == ops.keyed_random else node.args[4])
            first = keyed.setdefault(drawn, node)
            if first is not node:
                yield Finding(f"it draws the same numbers as %{first.name}", node=node)


_KEY_ARGUMENT = {
    ops.perturb: 2,
    ops.weighted_noise_sum: 2,
    ops.weighted_noise: 2,
    ops.keyed_random: 0,
    ops.stochastic_sign: 3,
}


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
            if past and "capture" not in user.meta and not user.meta.get("clean"):
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


GRAPH_CHECKS: tuple[GraphCheck, ...] = (
    GraphCheck("2 (a graph reads what exists)", _placeholders_have_a_role),
    GraphCheck("2 (a graph returns what it says)", _outputs_are_described),
    GraphCheck("5 (graphs are functional)", _is_functional),
    GraphCheck("5 (random numbers are keyed)", _random_numbers_are_keyed, keyed=True),
    GraphCheck("4 (every noise node has its own site)", _noise_has_its_own_site),
    GraphCheck("4 (sites fit their values)", _sites_fit_the_graph),
)


def perturbations(module: fx.GraphModule) -> list[fx.Node]:
    """The noise nodes of a graph."""
    return [node for node in module.graph.nodes if node.op == "call_function" and node.target == ops.perturb]


# ---- checks of a program --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProgramCheck:
    """A check of everything the compiler made of a model."""

    invariant: str
    run: Callable[[CompiledModel], Iterator[Finding]]


def _parameters_are_reached(compiled: CompiledModel) -> Iterator[Finding]:
    at_sites = {name for site in compiled.sites for name in site.parameters}
    given: dict[str, list[str]] = {}
    for gradient in compiled.gradients:
        for output, _ in outputs(gradient.module):
            given.setdefault(output.name, []).append(gradient.name)
    shapes = {}
    for node in placeholders(compiled.captured.module, Role.PARAMETER):
        name = node.meta["target"]
        shapes[name] = tuple(node.meta["val"].shape)
        if not node.meta["trainable"]:
            if name in given:
                yield Finding(f"the frozen parameter {name!r} is given a gradient", given[name][0], node)
        elif name not in at_sites:
            yield Finding(f"no site reaches the trainable parameter {name!r}", node=node)
        elif name not in given:
            yield Finding(f"no gradient subgraph gives the trainable parameter {name!r}", node=node)
    for gradient in compiled.gradients:
        names = tuple(output.name for output, _ in outputs(gradient.module))
        if names != gradient.site.parameters:
            yield Finding(f"it gives {names}, its site has {gradient.site.parameters}", _title(gradient))
        for output, node in outputs(gradient.module):
            val = node.meta.get("val")
            if output.kind != "gradient":
                yield Finding(f"a gradient subgraph returns the {output.kind} {output.name!r}", _title(gradient), node)
            elif isinstance(val, torch.Tensor) and tuple(val.shape) != shapes[output.name]:
                message = f"the gradient of {output.name!r} has shape {tuple(val.shape)}, it {shapes[output.name]}"
                yield Finding(message, _title(gradient), node)


def noise_points(compiled: CompiledModel) -> list[int]:
    """With feedback, the sites at whose noise point some gradient is read, the model's output excepted."""
    at = {site.output: site.index for site in compiled.sites}
    returned = {node.name for node in model_outputs(compiled.graph.graph)}
    return sorted({at[end] for site in compiled.sites for end in site.ends if end not in returned})


def _sites_are_partitioned(compiled: CompiledModel) -> Iterator[Finding]:
    everything = list(range(len(compiled.sites)))
    perturbed = sorted(index for run in compiled.runs for index in run.sites)
    if perturbed != (everything if compiled.estimator.feedback == "none" else noise_points(compiled)):
        yield Finding(f"the runs {[run.sites for run in compiled.runs]} do not perturb each of {everything} once")
    if [gradient.site.index for gradient in compiled.gradients] != everything:
        yield Finding("not every site has exactly one gradient subgraph")
    for gradient in compiled.gradients:
        if gradient.source == "noise" and gradient.site.index not in compiled.runs[gradient.run].sites:
            yield Finding(f"its losses come from run {gradient.run}, which does not perturb it", _title(gradient))


def _gradients_are_independent(compiled: CompiledModel) -> Iterator[Finding]:
    dag = task_graph(compiled)
    if not networkx.is_directed_acyclic_graph(dag):
        yield Finding(f"the tasks {networkx.find_cycle(dag)} wait for each other")
        return
    titles = {gradient.name: _title(gradient) for gradient in compiled.gradients}
    for name, title in titles.items():
        for other in networkx.descendants(dag, name) & titles.keys():
            path = " -> ".join(networkx.shortest_path(dag, name, other))
            yield Finding(f"it waits for another gradient subgraph: {path}", titles[other])
            return
        if dag.out_degree(name):
            yield Finding(f"{next(iter(dag.successors(name)))} reads its result", title)


def _everything_read_exists(compiled: CompiledModel) -> Iterator[Finding]:
    bindings = set(input_keys(compiled.captured.module))
    bindings |= {f"constant:{name}" for name in compiled.captured.constants}
    bindings |= {"runtime:key", "runtime:sigmas", "runtime:copies"}
    clean: set[str] = set()
    for number, stage in enumerate(compiled.stages):
        yield from _available(f"clean_{number}", stage, bindings | clean)
        again = clean & set(output_keys(stage))
        if again:
            yield Finding(f"{min(again)} was computed before", f"clean_{number}")
        clean |= set(output_keys(stage))
    perturbed = {}
    for run in compiled.runs:
        yield from _available(run.name, run.module, bindings | clean)
        perturbed[run.index] = set(output_keys(run.module))
    for gradient in compiled.gradients:
        available = bindings | clean | {f"runtime:{value}" for value in _crossing(compiled, gradient)}
        available |= perturbed[gradient.run] if gradient.per_copy else set()
        yield from _available(_title(gradient), gradient.module, available)


def _available(graph: str, module: fx.GraphModule, available: set[str]) -> Iterator[Finding]:
    for node in placeholders(module):
        if binding_key(node) not in available:
            yield Finding(f"{binding_key(node)} is neither a binding nor computed by an earlier graph", graph, node)


def _outputs_are_complete(compiled: CompiledModel) -> Iterator[Finding]:
    described = outputs(compiled.captured.module)
    leaves = sorted(output.name for output, _ in described if output.kind == "output")
    mutations = sorted(output.name for output, _ in described if output.kind == "mutation")
    made = [output for stage in compiled.stages for output, _ in outputs(stage)]
    if len(leaves) != compiled.captured.out_spec.num_leaves:
        yield Finding(f"the model returns {compiled.captured.out_spec.num_leaves} leaves, its graph {len(leaves)}")
    for kind, wanted in (("output", leaves), ("mutation", mutations)):
        given = sorted(output.name for output in made if output.kind == kind)
        if given != wanted:
            yield Finding(f"the clean run gives the {kind}s {given}, the model {wanted}")
    for run in compiled.runs:
        given = sorted(output.name for output, _ in outputs(run.module) if output.kind == "output")
        if given != leaves:
            yield Finding(f"it gives the outputs {given}, the model {leaves}", run.name)
        for output, node in outputs(run.module):
            if output.kind not in ("output", "capture"):
                yield Finding(f"a perturbed run returns the {output.kind} {output.name!r}", run.name, node)


def _only_captures_cross(compiled: CompiledModel) -> Iterator[Finding]:
    nodes = {node.name: node for node in compiled.graph.graph.nodes}
    noise_points = {node.meta["site"].index: node for node in nodes.values() if "site" in node.meta}
    for gradient in compiled.gradients:
        title = _title(gradient)
        captured = {name for one in gradient.captures for name in (one.name, one.scale)}
        downstream = _downstream(noise_points[gradient.site.index])
        for one in gradient.captures:
            if nodes[one.source] in downstream:
                yield Finding(f"the capture {one.name!r} holds the site's own noise", title, nodes[one.source])
        for node in placeholders(gradient.module):
            role, target = node.meta["role"], node.meta["target"]
            if role == Role.RUNTIME:
                if target not in _crossing(compiled, gradient):
                    yield Finding(f"the runtime value {target!r} crosses into it", title, node)
            elif role == Role.INPUT:
                yield Finding("an input crosses into it that is not captured", title, node)
            elif role == Role.VALUE and "capture" in node.meta:
                if target not in captured:
                    yield Finding(f"{target!r} is not one of its captures", title, node)
            elif role == Role.VALUE:
                source = nodes.get(target)
                if target in {nodes[end].meta.get("alive") for end in gradient.site.ends}:
                    continue
                allowed = (
                    (Kind.CONSTANT, Kind.SIZE, Kind.PARAMETER) if gradient.site.beyond else (Kind.CONSTANT, Kind.SIZE)
                )
                if source is None or source.meta.get("kind") not in allowed:
                    yield Finding(f"%{target} crosses into it, neither a capture nor a constant or size", title, node)


def _crossing(compiled: CompiledModel, gradient: GradientSubgraph) -> set[str]:
    """The runtime values that a gradient subgraph may read, by the source of its cotangent."""
    noise = {"weights", "key", "copies" if gradient.per_copy else "draws"}
    if gradient.source == "noise":
        return noise
    at = {site.output: site.index for site in compiled.sites}
    points = [at[end] for end in gradient.site.ends if end in at]
    feedback = {"error", *(f"feedback.{point}" for point in points)}
    if gradient.source == "feedback":
        return feedback
    return feedback | {"key", "draws", *(f"weights.{point}" for point in points)}


def _downstream(node: fx.Node) -> set[fx.Node]:
    """The noise node of a noise point and all that depends on it."""
    reached: set[fx.Node] = set()
    stack = [user for user in node.users if user.target == ops.perturb]
    while stack:
        current = stack.pop()
        if current not in reached:
            reached.add(current)
            stack.extend(current.users)
    return reached


def _noise_is_regenerated(compiled: CompiledModel) -> Iterator[Finding]:
    estimator = compiled.estimator
    perturbed = {index for run in compiled.runs for index in run.sites}
    for gradient in compiled.gradients:
        title = _title(gradient)
        made = [node for node in gradient.module.graph.nodes if node.target in _WEIGHTED]
        if gradient.from_clean:
            if made:
                yield Finding("a gradient predicted from the clean run reads noise", title, made[0])
            continue
        points = [point for point in compiled.sites if point.output in gradient.site.ends and point.index in perturbed]
        if len(made) != len(points):
            yield Finding(f"noise is made {len(made)} times for {len(points)} noise points", title)
            continue
        wanted = ops.weighted_noise if gradient.per_copy else ops.weighted_noise_sum
        expected = [
            (p.index, estimator.noise, estimator.score, list(p.layout.sizes), p.layout.dim, p.layout.outer)
            for p in points
        ]
        for node in made:
            if node.target != wanted or node.args[3:] not in expected:
                yield Finding(f"its cotangent {node.args[3:]} is not {wanted} of one of {expected}", title, node)
        for other in perturbations(gradient.module):
            yield Finding("a gradient subgraph adds noise", title, other)


def _noise_of_the_group_alone(compiled: CompiledModel) -> Iterator[Finding]:
    for number, stage in enumerate(compiled.stages):
        for node in perturbations(stage):
            yield Finding("the clean run has noise", f"clean_{number}", node)
    for run in compiled.runs:
        noise = perturbations(run.module)
        if sorted(node.args[4] for node in noise) != sorted(run.sites):  # type: ignore[type-var]
            yield Finding(
                f"it holds the noise of sites {[node.args[4] for node in noise]}, not of {run.sites}", run.name
            )
        for node in noise:
            site = compiled.sites[node.args[4]]  # type: ignore[index]
            layout = site.layout
            arguments = (compiled.estimator.noise, list(layout.sizes), layout.dim, layout.outer)
            if node.args[5:9] != arguments:
                yield Finding(
                    f"the noise {node.args[5:9]} is not that of site {site.name!r}, {arguments}", run.name, node
                )
    noisy = perturbations(compiled.graph)
    if sorted(node.args[4] for node in noisy) != sorted(i for run in compiled.runs for i in run.sites):  # type: ignore[type-var]
        yield Finding("it does not add the noise of every perturbed site once", "the one-copy graph")


PROGRAM_CHECKS: tuple[ProgramCheck, ...] = (
    ProgramCheck("1 (every trainable parameter is reached)", _parameters_are_reached),
    ProgramCheck("1 (every site is perturbed once)", _sites_are_partitioned),
    ProgramCheck("2 (a graph reads what exists)", _everything_read_exists),
    ProgramCheck("2 (gradient subgraphs are independent)", _gradients_are_independent),
    ProgramCheck("2 (the model's outputs are complete)", _outputs_are_complete),
    ProgramCheck("3 (only captures cross)", _only_captures_cross),
    ProgramCheck("3 (noise is regenerated)", _noise_is_regenerated),
    ProgramCheck("4 (a run has the noise of its group)", _noise_of_the_group_alone),
)


def _title(gradient: GradientSubgraph) -> str:
    return f"{gradient.name} (site {gradient.site.name!r})"


__all__ = [
    "GRAPH_CHECKS",
    "PROGRAM_CHECKS",
    "graphs",
    "perturbations",
    "task_graph",
    "verify",
    "verify_graph",
    "verify_history",
]
