"""What holds for a whole compiled program: the table `PROGRAM_CHECKS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import networkx
import torch
from torch import fx

from ..passes import ops
from ..passes.find_sites import Site
from ..passes.graph import Kind, Role, downstream, outputs, placeholders
from ..passes.perturb_weights import noise_arguments
from ..passes.separate_outputs import output_nodes
from .estimator import LikelihoodRatio
from .graph_checks import Finding, perturbations
from .program import CompiledModel, GradientSubgraph, binding_key, input_keys, output_keys
from .task_graph import task_graph


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
    returned = {node.name for node in output_nodes(compiled.graph)}
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
        point = noise_points[gradient.site.index]
        noisy = downstream(user for user in point.users if user.target in ops.PERTURBING)
        for one in gradient.captures:
            if gradient.source == "noise" and nodes[one.source] in noisy:  # feedback reads the clean run alone
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
    feedback = {"error", "projected_error", *(f"feedback.{point}" for point in points)}
    if gradient.source == "feedback":
        return feedback
    return feedback | {"key", "draws", *(f"weights.{point}" for point in points)}


def _noise_is_regenerated(compiled: CompiledModel) -> Iterator[Finding]:
    estimator = compiled.estimator
    perturbed = {index for run in compiled.runs for index in run.sites}
    for gradient in compiled.gradients:
        title = _title(gradient)
        made = [node for node in gradient.module.graph.nodes if node.target in ops.REGENERATING]
        if gradient.from_clean:
            if made:
                yield Finding("a gradient predicted from the clean run reads noise", title, made[0])
            continue
        points = [point for point in compiled.sites if point.output in gradient.site.ends and point.index in perturbed]
        if len(made) != len(points):
            yield Finding(f"noise is made {len(made)} times for {len(points)} noise points", title)
            continue
        wanted = ops.weighted_noise if gradient.per_copy else ops.weighted_noise_sum
        if gradient.site.weight_noise is not None:
            wanted = ops.weight_noise_sum
        expected = [_noise_of(point, estimator) for point in points]
        for node in made:
            if node.target != wanted or node.args[3:] not in expected:
                yield Finding(f"its cotangent {node.args[3:]} is not {wanted} of one of {expected}", title, node)
        for other in perturbations(gradient.module):
            yield Finding("a gradient subgraph adds noise", title, other)


def _noise_of(point: Site, estimator: LikelihoodRatio) -> tuple[object, ...]:
    """The noise of a site as the operators that make it again are given it."""
    if point.weight_noise is not None:
        return noise_arguments(point, estimator.noise, estimator.score)
    layout = point.credited
    return (point.index, estimator.noise, estimator.score, list(layout.sizes), layout.dim, layout.outer)


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
            if tuple(node.kwargs.get("blocks") or ()) != site.blocks:  # type: ignore[arg-type]
                yield Finding(f"its blocks are not those of site {site.name!r}, {site.blocks}", run.name, node)
            described = {} if site.weight_noise is None else site.weight_noise.arguments
            given = {name: value for name, value in node.kwargs.items() if name in ops.WEIGHT_NOISE}
            if given != described:
                yield Finding(f"the noise {given} is not that of site {site.name!r}, {described}", run.name, node)
    noisy = perturbations(compiled.graph)
    if sorted(node.args[4] for node in noisy) != sorted(i for run in compiled.runs for i in run.sites):  # type: ignore[type-var]
        yield Finding("it does not add the noise of every perturbed site once", "the one-copy graph")


def _title(gradient: GradientSubgraph) -> str:
    return f"{gradient.name} (site {gradient.site.name!r})"


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
