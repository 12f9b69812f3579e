"""Runs the passes over a captured model and keeps the graph after each."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..passes.complete_gradients import complete_gradient, model_outputs
from ..passes.errors import CaptureError, OptionError, UnsupportedModelError, unknown_name
from ..passes.extend_reach import extend_reach
from ..passes.find_sites import Site, find_sites, sites
from ..passes.graph import Kind, Role, describe, outputs, placeholders
from ..passes.infer_sign_domains import infer_sign_domains
from ..passes.insert_captures import captures_of, insert_captures
from ..passes.insert_noise import insert_noise
from ..passes.key_random_operations import key_random_operations
from ..passes.locate_samples import locate_samples
from ..passes.mask_noise import mask_noise
from ..passes.share_prefixes import clean_run, perturbed_nodes, perturbed_run
from ..passes.split_stages import split_stages
from ..passes.trace_gradients import trace_gradients
from .capture import CapturedModel, as_call, capture
from .cost import forward_share
from .estimator import LikelihoodRatio
from .probe import probe_copies, probe_samples
from .program import CompiledModel, GradientSubgraph, PassRecord, PerturbedRun
from .verify import verify

GraphPass = Callable[[fx.GraphModule], fx.GraphModule]


def compile_model(model: nn.Module, example_inputs: Any, estimator: LikelihoodRatio) -> CompiledModel:
    """Capture `model` and run the passes.

    Raises:
        CaptureError, UnsupportedModelError, UnreachedParameterError, BatchError, OptionError: see `passes.errors`.
    """
    started = time.perf_counter()
    captured = capture(model, example_inputs)
    history = [PassRecord("capture", captured.module, time.perf_counter() - started)]

    def run(name: str, rewrite: GraphPass) -> fx.GraphModule:
        begun = time.perf_counter()
        history.append(PassRecord(name, rewrite(history[-1].module), time.perf_counter() - begun))
        return history[-1].module

    mixes_samples = ""
    bind: dict[fx.Node, Any] = {}

    def locate_and_probe(module: fx.GraphModule) -> fx.GraphModule:
        nonlocal mixes_samples
        located = locate_samples(module)
        bind.update(_bind_example(located, model, captured, example_inputs))
        try:
            located, mixes_samples = probe_samples(located, bind, captured.signature.batch)
        except (RuntimeError, IndexError, ValueError) as error:
            reason = str(error).split("\n\nWhile executing")[0]
            raise CaptureError(
                f"{type(model).__name__} does not run on the example: {reason}\nTry `model(example)`: dtype, width and "
                "device of the example have to be the model's."
            ) from error
        return located

    run("key_random_operations", key_random_operations)
    run("locate_samples", locate_and_probe)
    alive = estimator.placement == "alive"
    run(
        "find_sites",
        lambda module: find_sites(module, join_statistics=estimator.capture == "exact", share_sums=alive),
    )
    points: list[int] | None = None
    if estimator.feedback == "learned":
        if not captured.out_spec.is_leaf():
            raise UnsupportedModelError(
                'feedback="learned" needs a model that returns one tensor, not a structure of '
                f'{captured.out_spec.num_leaves} value(s). Return the one that the loss reads, or use feedback="none".'
            )
        run("extend_reach", lambda module: extend_reach(module, reach=estimator.reach))
        points = noise_points(history[-1].module)
    begun = time.perf_counter()
    vjps = trace_gradients(history[-1].module, capture=estimator.capture)
    traced = time.perf_counter() - begun
    run("insert_noise", lambda module: insert_noise(module, noise=estimator.noise, at=points))
    if alive:
        run("mask_noise", mask_noise)
    run("infer_sign_domains", infer_sign_domains)
    run("insert_captures", lambda module: insert_captures(module, gradients=vjps, capture=estimator.capture))
    history.append(PassRecord("trace_gradients", history[-1].module, traced))

    module = history[-1].module
    found = tuple(sites(module))
    if mixes_samples and estimator.credit == "sample":
        raise UnsupportedModelError(
            f"{mixes_samples} mixes the samples of a batch, so a sample's loss does not belong to its own noise alone. "
            'Use LikelihoodRatio(credit="batch"), which takes one loss for the whole batch.'
        )
    groups = resolve_groups(estimator.groups, found) if points is None else [tuple(points)] if points else []
    runs, gradients, sequential = _split(module, groups, vjps, estimator, bool(mixes_samples))
    stages = _clean_stages(module, runs, gradients)
    if not sequential:
        sequential = bool(probe_copies(stages, [run.module for run in runs], bind, len(found)))
    compiled = CompiledModel(
        captured, estimator, tuple(history), found, stages, runs, gradients, mixes_samples, sequential
    )
    verify(compiled)
    return compiled


def resolve_groups(groups: str | Sequence[Sequence[str]], found: Sequence[Site]) -> list[tuple[int, ...]]:
    """The partition of the sites that the estimator asks for, as site indices."""
    if groups == "joint":
        return [tuple(site.index for site in found)]
    if groups == "layerwise":
        return [(site.index,) for site in found]
    partition = []
    taken: dict[int, str] = {}
    for patterns in groups:
        members: list[int] = []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matched = matching_sites(pattern, found)
            for index in matched:
                if index in taken:
                    raise OptionError(
                        f"groups: the site {found[index].name!r} is matched by {taken[index]!r} and {pattern!r}; every "
                        "site belongs to exactly one group."
                    )
                taken[index] = pattern
            members += matched
        partition.append(tuple(sorted(members)))
    left = [site.name for site in found if site.index not in taken]
    if left:
        raise OptionError(f"groups: no group holds the site(s) {', '.join(left)}; every site belongs to one group.")
    return partition


def matching_sites(pattern: str, found: Sequence[Site]) -> list[int]:
    """Indices of the sites whose name matches `pattern` (``*``, ``?``); an error with the nearest name if none does."""
    matched = [site.index for site in found if fnmatch.fnmatchcase(site.name, pattern)]
    if not matched:
        raise unknown_name("site", pattern, [site.name for site in found])
    return matched


def resolve_sigmas(sigma: float | Mapping[str, float], found: Sequence[Site]) -> list[float]:
    """σ of every site, in order."""
    if not isinstance(sigma, Mapping):
        return [float(sigma)] * len(found)
    values: dict[int, float] = {}
    for pattern, value in sigma.items():
        for index in matching_sites(pattern, found):
            values.setdefault(index, float(value))
    left = [site.name for site in found if site.index not in values]
    if left:
        raise OptionError(f"sigma: no pattern covers the site(s) {', '.join(left)}. Add '*' as the last pattern.")
    return [values[site.index] for site in found]


def _bind_example(
    module: fx.GraphModule, model: nn.Module, captured: CapturedModel, example_inputs: Any
) -> dict[fx.Node, Any]:
    leaves = pytree.tree_leaves(as_call(example_inputs))
    values: dict[fx.Node, Any] = {}
    for node in placeholders(module):
        target = node.meta["target"]
        match node.meta["role"]:
            case Role.PARAMETER:
                values[node] = model.get_parameter(target).detach()
            case Role.BUFFER:
                values[node] = model.get_buffer(target).clone()
            case Role.CONSTANT:
                values[node] = captured.constants[target]
            case Role.INPUT:
                values[node] = leaves[target]
            case _:
                device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))
                values[node] = torch.zeros(2, dtype=torch.int64, device=device)
    return values


def _split(
    module: fx.GraphModule,
    groups: list[tuple[int, ...]],
    vjps: dict[int, fx.GraphModule],
    estimator: LikelihoodRatio,
    mixes: bool,
) -> tuple[tuple[PerturbedRun, ...], tuple[GradientSubgraph, ...], bool]:
    captures = captures_of(module)
    masks = {n.meta["site"].index: n.meta["alive"] for n in module.graph.nodes if "alive" in n.meta}
    by_index = {site.index: site for site in sites(module)}
    nodes = {node.name: node for node in module.graph.nodes}
    runs: list[PerturbedRun] = []
    gradients: list[GradientSubgraph] = []
    untileable = ""

    def complete(index: int, run: int, per_copy: bool, source: str) -> GradientSubgraph:
        graph = complete_gradient(
            vjps[index],
            by_index[index],
            captures[index],
            per_copy=per_copy,
            noise=estimator.noise,
            score=estimator.score,
            graph_module=module,
            source=source,
        )
        return GradientSubgraph(by_index[index], run, per_copy, captures[index], graph, source)

    for number, group in enumerate(groups):
        perturbed = perturbed_nodes(module, group)
        # whether the copies differ in what the site's gradient reads. A gradient through batch statistics always reads
        # the clean run (DESIGN.md 9), whose statistics they are: copies side by side must not meet in them
        own = {
            index: estimator.placement == "operation"
            and not by_index[index].joined
            and any(nodes[capture.source] in perturbed for capture in captures[index])
            for index in group
        }
        taken = [capture for index in group if own[index] for capture in captures[index]]
        perturbed_module = perturbed_run(module, group, taken)
        untileable = untileable or _untileable(perturbed_module)
        share = forward_share(perturbed_module, module)
        runs.append(PerturbedRun(number, group, perturbed_module, share, {i: masks[i] for i in group if i in masks}))
        if estimator.feedback == "none":
            gradients += [complete(index, number, own[index], "noise") for index in group]
    if estimator.feedback == "learned":
        returned = {node.name for node in model_outputs(module.graph)}
        for index, site in by_index.items():
            exact = returned.issuperset(site.ends)  # `e` pulled back, nothing is predicted
            source = "feedback" if exact or estimator.correction == "none" else "corrected"
            gradients.append(complete(index, 0, False, source))
    if untileable and estimator.credit == "sample":
        raise UnsupportedModelError(
            f"{untileable} has no dimension that holds the samples, so a sample's loss cannot be told apart. Use "
            'LikelihoodRatio(credit="batch").'
        )
    return tuple(runs), tuple(sorted(gradients, key=lambda g: g.site.index)), mixes or bool(untileable)


def noise_points(module: fx.GraphModule) -> list[int]:
    """The sites at whose noise point a predicted gradient is read; the model's output needs no prediction.

    Raises:
        UnsupportedModelError: the model's output is not one tensor with the samples first.
    """
    results = [node for output, node in outputs(module) if output.kind == "output"]
    layout = results[0].meta.get("layout") if len(results) == 1 and isinstance(results[0], fx.Node) else None
    if layout is None or (layout.dim, layout.outer, layout.sizes[0]) != (0, 1, 1):
        raise UnsupportedModelError(
            f'feedback="learned" needs a model whose output is one tensor with the samples first; this one returns '
            f'{len(results)} value(s). Return the one that the loss reads, or use feedback="none".'
        )
    nodes = {node.name: node for node in module.graph.nodes}
    ends = {nodes[name] for site in sites(module) for name in site.ends} - model_outputs(module.graph)
    return sorted(end.meta["site"].index for end in ends)


def _untileable(run: fx.GraphModule) -> str:
    for node in run.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            layout = node.meta.get("layout")
            if node.meta.get("kind") == Kind.ACTIVATION and (layout is None or not layout.batched):
                return describe(node.args[0] if "noise_of" in node.meta else node)  # type: ignore[arg-type]
    return ""


def _clean_stages(
    module: fx.GraphModule, runs: tuple[PerturbedRun, ...], gradients: tuple[GradientSubgraph, ...]
) -> tuple[fx.GraphModule, ...]:
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
    clean = clean_run(module, values, captures)
    points = [node.name for node in module.graph.nodes if "site" in node.meta]
    assert outputs(clean)
    return tuple(split_stages(clean, points))


def node_count(module: fx.GraphModule) -> int:
    """Operations of a graph (calls, without placeholders and output)."""
    return sum(node.op == "call_function" for node in module.graph.nodes)
