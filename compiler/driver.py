"""Runs the passes over a captured model and keeps the graph after each."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..passes.errors import CaptureError, UnsupportedModelError
from ..passes.extend_reach import extend_reach
from ..passes.find_sites import find_sites, sites
from ..passes.graph import Role, placeholders
from ..passes.infer_sign_domains import infer_sign_domains
from ..passes.insert_captures import insert_captures
from ..passes.insert_noise import insert_noise
from ..passes.key_random_operations import key_random_operations
from ..passes.locate_samples import locate_samples
from ..passes.mask_noise import mask_noise
from ..passes.trace_gradients import trace_gradients
from .assembly import assemble, noise_points
from .capture import CapturedModel, as_call, capture
from .estimator import LikelihoodRatio
from .probe import probe_copies, probe_samples
from .program import CompiledModel, PassRecord
from .site_options import resolve_groups
from .verify import verify

GraphPass = Callable[[fx.GraphModule], fx.GraphModule]


def compile_model(model: nn.Module, example_inputs: Any, estimator: LikelihoodRatio) -> CompiledModel:
    """Capture `model`, run the passes, and split the result into what runs.

    Raises:
        CaptureError, UnsupportedModelError, UnreachedParameterError, BatchError, OptionError: see `passes.errors`.
    """
    started = time.perf_counter()
    captured = capture(model, example_inputs)
    history = [PassRecord("capture", captured.module, time.perf_counter() - started)]
    feedback, alive = estimator.feedback == "learned", estimator.placement == "alive"

    _run_passes(history, [("key_random_operations", key_random_operations), ("locate_samples", locate_samples)])
    values = _example_values(history[-1].module, model, captured, example_inputs)
    located, mixes_samples = _probe(history[-1].module, values, model, captured)
    history[-1] = PassRecord("locate_samples", located, history[-1].seconds)
    if mixes_samples and estimator.credit == "sample":
        raise UnsupportedModelError(
            f"{mixes_samples} mixes the samples of a batch, so a sample's loss does not belong to its own noise alone. "
            'Use LikelihoodRatio(credit="batch"), which takes one loss for the whole batch.'
        )

    join = partial(find_sites, share_sums=alive)
    reach: list[tuple[str, GraphPass]] = [("extend_reach", partial(extend_reach, reach=estimator.reach))]
    _run_passes(history, [("find_sites", join), *(reach if feedback else [])])
    points = _noise_points(history[-1].module, captured) if feedback else None

    started = time.perf_counter()
    vjps = trace_gradients(history[-1].module, capture=estimator.capture)
    history.append(PassRecord("trace_gradients", history[-1].module, time.perf_counter() - started))
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
    parts = assemble(module, groups, vjps, estimator)
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
    )
    verify(compiled)
    return compiled


def _run_passes(history: list[PassRecord], passes: list[tuple[str, GraphPass]]) -> None:
    for name, rewrite in passes:
        started = time.perf_counter()
        history.append(PassRecord(name, rewrite(history[-1].module), time.perf_counter() - started))


def _noise_points(module: fx.GraphModule, captured: CapturedModel) -> list[int]:
    if not captured.out_spec.is_leaf():
        raise UnsupportedModelError(
            'feedback="learned" needs a model that returns one tensor, not a structure of '
            f'{captured.out_spec.num_leaves} value(s). Return the one that the loss reads, or use feedback="none".'
        )
    return noise_points(module)


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


def node_count(module: fx.GraphModule) -> int:
    """Operations of a graph (calls, without placeholders and output)."""
    return sum(node.op == "call_function" for node in module.graph.nodes)
