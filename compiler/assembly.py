"""From the graph after its last pass to what runs: clean stages, perturbed runs, gradient subgraphs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from ..passes.complete_gradients import complete_gradient
from ..passes.errors import UnsupportedModelError
from ..passes.find_sites import Site, sites
from ..passes.graph import Kind, Role, describe, placeholders
from ..passes.insert_captures import captures_of
from ..passes.separate_outputs import output_nodes
from ..passes.share_prefixes import clean_run, perturbed_nodes, perturbed_run
from ..passes.split_stages import split_stages
from .cost import forward_share
from .estimator import LikelihoodRatio
from .program import GradientSubgraph, PerturbedRun
from .site_options import resolve_copies, resolve_corrections


@dataclass(frozen=True)
class Assembly:
    """The runnable parts of a program."""

    stages: tuple[fx.GraphModule, ...]
    runs: tuple[PerturbedRun, ...]
    gradients: tuple[GradientSubgraph, ...]
    untileable: str
    """The first perturbed operation whose result has no dimension that holds the samples, or ``""``."""


def assemble(
    module: fx.GraphModule,
    groups: Sequence[tuple[int, ...]],
    vjps: dict[int, fx.GraphModule],
    estimator: LikelihoodRatio,
    rank: int | None = None,
) -> Assembly:
    """Split the one-copy graph by groups of sites, and complete each site's vjp; `rank` is the feedback's.

    Raises:
        UnsupportedModelError: samples cannot be told apart although each is to have its own credit.
    """
    by_index = {site.index: site for site in sites(module)}
    own = {index: copies for group in groups for index, copies in _own_captures(module, group, estimator).items()}
    copies = resolve_copies(estimator.copies, list(by_index.values()), groups)
    runs = tuple(_run(module, number, group, own, copies[number]) for number, group in enumerate(groups))
    run_of = {index: run.index for run in runs for index in run.sites}
    captures = captures_of(module)
    corrections = resolve_corrections(estimator.correction, list(by_index.values()))
    gradients = []
    for index, site in by_index.items():
        source = _source(module, site, corrections[index] if estimator.feedback == "learned" else None)
        graph = vjps[index]
        if site.weight_noise is None:  # else it is complete: there is no vjp
            graph = complete_gradient(
                graph,
                site,
                captures[index],
                per_copy=own.get(index, False),
                noise=estimator.noise,
                score=estimator.score,
                graph_module=module,
                source=source,
                rank=rank,
            )
        number = run_of.get(index, 0)
        shrunk = source == "corrected" and corrections[index] == "shrunk"
        gradients.append(GradientSubgraph(site, number, own.get(index, False), captures[index], graph, source, shrunk))
    untileable = next(filter(None, (_untileable(run.module) for run in runs)), "")
    if untileable and estimator.credit == "sample":
        raise UnsupportedModelError(
            f"{untileable} has no dimension that holds the samples, so a sample's loss cannot be told apart. Use "
            'LikelihoodRatio(credit="batch").'
        )
    return Assembly(_clean_stages(module, runs, gradients), runs, tuple(gradients), untileable)


def noise_points(module: fx.GraphModule) -> list[int]:
    """The sites at whose noise point a predicted gradient is read; the model's outputs need no prediction."""
    nodes = {node.name: node for node in module.graph.nodes}
    ends = {nodes[name] for site in sites(module) for name in site.ends} - output_nodes(module)
    return sorted(end.meta["site"].index for end in ends)


def _own_captures(module: fx.GraphModule, group: Iterable[int], estimator: LikelihoodRatio) -> dict[int, bool]:
    """Whether the copies of each site of a group differ in what its gradient reads, and so have captures of their own.

    A gradient through batch statistics always reads the clean run (method.md 9), whose statistics they are: copies side
    by side must not meet in them.
    """
    if estimator.placement != "operation":
        return dict.fromkeys(group, False)
    perturbed = perturbed_nodes(module, group)
    nodes = {node.name: node for node in module.graph.nodes}
    captures, joined = captures_of(module), {site.index: site.joined for site in sites(module)}
    return {i: not joined[i] and any(nodes[one.source] in perturbed for one in captures[i]) for i in group}


def _run(
    module: fx.GraphModule, number: int, group: tuple[int, ...], own: dict[int, bool], copies: int
) -> PerturbedRun:
    captures = captures_of(module)
    masks = {n.meta["site"].index: n.meta["alive"] for n in module.graph.nodes if "alive" in n.meta}
    graph = perturbed_run(module, group, [one for index in group if own[index] for one in captures[index]])
    alive = {index: masks[index] for index in group if index in masks}
    return PerturbedRun(number, group, graph, forward_share(graph, module), copies, alive)


def _source(module: fx.GraphModule, site: Site, correction: str | None) -> str:
    """Where the site's cotangent comes from (`GradientSubgraph.source`); `correction` is None without feedback."""
    if correction is None:
        return "noise"
    returned = {node.name for node in output_nodes(module)}
    exact = returned.issuperset(site.ends)  # `e` pulled back, nothing is predicted
    return "feedback" if exact or correction == "none" else "corrected"


def _untileable(run: fx.GraphModule) -> str:
    for node in run.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            layout = node.meta.get("layout")
            if node.meta.get("kind") == Kind.ACTIVATION and (layout is None or not layout.batched):
                return describe(node.args[0] if "noise_of" in node.meta else node)
    return ""


def _clean_stages(
    module: fx.GraphModule, runs: Iterable[PerturbedRun], gradients: Iterable[GradientSubgraph]
) -> tuple[fx.GraphModule, ...]:
    """The clean run, with every value and capture that another graph reads, cut behind each noise point."""
    gradients = list(gradients)
    readers = [run.module for run in runs] + [gradient.module for gradient in gradients]
    values = {
        node.meta["target"]: None
        for reader in readers
        for node in placeholders(reader, Role.VALUE)
        if "capture" not in node.meta
    }
    captures = {
        name for gradient in gradients if not gradient.per_copy for c in gradient.captures for name in (c.name, c.scale)
    }
    points = [node.name for node in module.graph.nodes if "site" in node.meta]
    return tuple(split_stages(clean_run(module, values, captures), points))
