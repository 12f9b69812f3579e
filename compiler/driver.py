"""Runs the passes over a captured model and keeps the graph after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..passes.errors import CaptureError, OptionError, UnsupportedModelError
from ..passes.extend_reach import extend_reach
from ..passes.find_sites import credit_rows, find_sites, sites
from ..passes.graph import Role, placeholders
from ..passes.infer_sign_domains import infer_sign_domains
from ..passes.insert_captures import insert_captures
from ..passes.insert_noise import insert_noise
from ..passes.join_segments import join_segments
from ..passes.key_random_operations import key_random_operations
from ..passes.locate_samples import locate_samples
from ..passes.mask_noise import mask_noise
from ..passes.narrow_noise import narrow_noise
from ..passes.perturb_weights import perturb_weights, weight_gradients
from ..passes.reuse_values import reuse_values
from ..passes.separate_outputs import separate_outputs
from ..passes.tie_blocks import tie_blocks
from ..passes.trace_gradients import trace_gradients
from .assembly import assemble, noise_points
from .capture import CapturedModel, as_call, capture
from .estimator import LikelihoodRatio
from .feedback_size import resolve_rank
from .node_reach import find_reach
from .probe import probe_copies, probe_samples
from .program import CompiledModel, PassRecord, binding_key
from .segments import resolve_reach, resolve_segments
from .site_options import check_separable, resolve_blocks, resolve_groups, resolve_noise_on
from .verify import verify
from .whole import capture_whole

GraphPass = Callable[[fx.GraphModule], fx.GraphModule]


def compile_model(
    model: nn.Module, example_inputs: Any, estimator: LikelihoodRatio, *, unbatched: bool = False
) -> CompiledModel:
    """Capture `model`, run the passes, and split the result into what runs.

    With `unbatched` the example is one sample without a batch dimension (`whole`).

    Raises:
        CaptureError, UnsupportedModelError, UnreachedParameterError, BatchError, OptionError: see `passes.errors`.
    """
    if unbatched and estimator.credit == "batch":
        raise OptionError('unbatched=True: the batch is one sample, whose loss is the batch\'s: leave credit="sample".')
    started = time.perf_counter()
    captured = (capture_whole if unbatched else capture)(model, example_inputs)
    history = [PassRecord("capture", captured.module, time.perf_counter() - started)]
    _run_passes(history, [("key_random_operations", key_random_operations), ("locate_samples", locate_samples)])
    values = _example_values(history[-1].module, model, captured, example_inputs)
    located, mixes_samples = _probe(history[-1].module, values, model, captured)
    history[-1] = PassRecord("locate_samples", located, history[-1].seconds)
    return _compile_located(captured, history, values, mixes_samples, estimator)


def recompile(compiled: CompiledModel, estimator: LikelihoodRatio, bound: Mapping[str, Any]) -> CompiledModel:
    """The captured model of `compiled`, compiled for another estimator; neither the module nor a capture is needed.

    Args:
        compiled: any program of the model; what no estimator changes is shared with it.
        estimator: the settings of the new program.
        bound: parameters, buffers, constants, inputs of any batch size, and ``runtime:key``, by binding key: two runs
            on them show whether copies can stand side by side.

    Raises:
        UnsupportedModelError, OptionError: see `compile_model`.
    """
    number = next(n for n, record in enumerate(compiled.history) if record.name == "locate_samples")
    history = list(compiled.history[: number + 1])
    found = {node: bound[binding_key(node)] for node in placeholders(history[-1].module)}
    values = {n: value.clone() if n.meta["role"] == Role.BUFFER else value for n, value in found.items()}
    return _compile_located(compiled.captured, history, values, compiled.mixes_samples, estimator)


def _compile_located(
    captured: CapturedModel,
    history: list[PassRecord],
    values: dict[fx.Node, Any],
    mixes_samples: str,
    estimator: LikelihoodRatio,
) -> CompiledModel:
    """The passes that an estimator has a say in, behind those that find the samples; `values` are of placeholders."""
    feedback, alive = estimator.feedback == "learned", estimator.placement != "operation"
    if mixes_samples and estimator.credit == "sample":
        raise UnsupportedModelError(
            f"{mixes_samples} mixes the samples of a batch, so a sample's loss does not belong to its own noise alone. "
            'Use LikelihoodRatio(credit="batch"), which takes one loss for the whole batch; if the input is one whole '
            "graph, whose nodes are no batch, compile with unbatched=True."
        )

    if estimator.sampling == "error":
        check_separable(history[-1].module)

    join = partial(find_sites, share_sums=alive)
    _run_passes(history, [("find_sites", join)])
    if estimator.placement == "narrow":
        _run_passes(history, [("narrow_noise", narrow_noise)])
    if feedback:
        names = _output_names(captured)
        _run_passes(history, [("separate_outputs", partial(separate_outputs, names=names))])
    reach = resolve_reach(estimator.reach, history[-1].module)
    if estimator.segments != "op":
        cuts = resolve_segments(estimator.segments, history[-1].module)
        _run_passes(history, [("join_segments", partial(join_segments, cuts=cuts))])
    if feedback:
        _run_passes(history, [("extend_reach", partial(extend_reach, reach=reach))])
    if estimator.blocks != 1:
        sizes = resolve_blocks(estimator.blocks, history[-1].module)
        _run_passes(history, [("tie_blocks", partial(tie_blocks, sizes=sizes))])
    if estimator.noise_on != "output":
        at_weights = resolve_noise_on(estimator.noise_on, history[-1].module)
        _run_passes(history, [("perturb_weights", partial(perturb_weights, noise=at_weights))])
    points = noise_points(history[-1].module) if feedback else None
    at_points = [site for site in sites(history[-1].module) if site.index in (points or ())]
    rank = resolve_rank(history[-1].module, at_points, estimator) if at_points else None

    started = time.perf_counter()
    reuses = alive and not estimator.recompute
    vjps = trace_gradients(history[-1].module, capture=estimator.capture, values=reuses)
    vjps = {index: reuse_values(vjp) for index, vjp in vjps.items()} if reuses else vjps
    vjps |= weight_gradients(history[-1].module, noise=estimator.noise, score=estimator.score)
    history.append(PassRecord("trace_gradients", history[-1].module, time.perf_counter() - started))
    reached = {}
    if captured.signature.whole and rank is None:
        reached = find_reach(history[-1].module, values, at_points if feedback else sites(history[-1].module))
    if reached and not feedback:
        _run_passes(history, [("credit_rows", partial(credit_rows, rows={i: len(r) for i, r in reached.items()}))])
    masks: list[tuple[str, GraphPass]] = [("mask_noise", mask_noise)]
    _run_passes(
        history,
        [
            ("insert_noise", partial(insert_noise, noise=estimator.noise, at=points)),
            *(masks if alive else []),
            ("infer_sign_domains", infer_sign_domains),
            ("insert_captures", partial(insert_captures, gradients=vjps, capture=estimator.capture)),
        ],
    )
    module = history[-1].module
    found = tuple(sites(module))
    groups = resolve_groups(estimator.groups, found) if points is None else [tuple(points)] if points else []
    parts = assemble(module, groups, vjps, estimator, rank)
    runs = [run.module for run in parts.runs]
    sequential = bool(mixes_samples or parts.untileable or probe_copies(parts.stages, runs, values, len(found)))
    compiled = CompiledModel(
        captured,
        estimator,
        tuple(history),
        found,
        parts.stages,
        parts.runs,
        parts.gradients,
        mixes_samples,
        sequential,
        rank,
        reach,
        reached,
    )
    verify(compiled)
    return compiled


def _run_passes(history: list[PassRecord], passes: list[tuple[str, GraphPass]]) -> None:
    for name, rewrite in passes:
        started = time.perf_counter()
        history.append(PassRecord(name, rewrite(history[-1].module), time.perf_counter() - started))


def _output_names(captured: CapturedModel) -> list[str]:
    """The leaves of the model's output as errors call them: ``output['logits']``."""
    count = captured.out_spec.num_leaves
    try:
        tree = pytree.tree_unflatten(list(range(count)), captured.out_spec)
        return [f"output{pytree.keystr(path)}" for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    except (ValueError, TypeError, KeyError):  # a class of the user's that was registered without names of its parts
        return [f"output {number}" for number in range(count)]


def _probe(
    module: fx.GraphModule, values: dict[fx.Node, Any], model: nn.Module, captured: CapturedModel
) -> tuple[fx.GraphModule, str]:
    try:
        return probe_samples(module, values, captured.signature.batch)
    except (RuntimeError, IndexError, ValueError) as error:
        reason = str(error).split("\n\nWhile executing")[0]
        raise CaptureError(
            f"{type(model).__name__} does not run on the example: {reason}\nTry `model(example)`: dtype, width and "
            "device of the example have to be the model's."
        ) from error


def _example_values(
    module: fx.GraphModule, model: nn.Module, captured: CapturedModel, example_inputs: Any
) -> dict[fx.Node, Any]:
    leaves = captured.signature.lead(pytree.tree_leaves(as_call(example_inputs)))
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


def node_count(module: fx.GraphModule) -> int:
    """Operations of a graph (calls, without placeholders and output)."""
    return sum(node.op == "call_function" for node in module.graph.nodes)
