"""Small tasks made one: the stages of the clean run, and the gradient subgraphs that start from it, as one graph each.

A task costs some ten microseconds of Python beside its operations: the values that it reads are looked up by name, what
it returns gets names. Where one thread runs them one after the other nothing is gained from their being apart. The
operations, their order and so the bits are the same, what several of them compute is computed once (`merge_equal`), and
what nothing else reads is let go inside the graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ...compiler.program import CompiledModel, binding_key, output_keys
from ...passes.graph import Output, outputs, placeholders, set_outputs
from ...passes.merge_equal import merge_equal
from ..plan import Action, Forward, Gradient
from .lifetimes import Lifetimes


@dataclass(frozen=True)
class Fused:
    """Consecutive actions of a plan, done by one graph."""

    actions: tuple[Action, ...]
    reads: tuple[str, ...]
    """The keys that they read or write, as often as they do (`Lifetimes`)."""

    def __str__(self) -> str:
        return f"{self.actions[0]}…{self.actions[-1]}"


def fuse_plan(compiled: CompiledModel, plan: Sequence[Action], known: Lifetimes) -> tuple[Action | Fused, ...]:
    """The plan with its stages, and its neighbouring gradients from the clean run, as one action each."""
    alone = {g.site.index for g in compiled.gradients if not g.from_clean or g.shrunk}
    kinds = {Forward: "forward", Gradient: "gradient"}
    fused: list[Action | Fused] = []
    for kind, group in itertools.groupby(plan, lambda action: kinds.get(type(action))):
        actions = tuple(group)
        if kind is None or len(actions) == 1 or any(isinstance(a, Gradient) and a.site in alone for a in actions):
            fused += actions
        else:
            fused.append(Fused(actions, tuple(key for action in actions for key in known.reads[action])))
    return tuple(fused)


def fuse(compiled: CompiledModel, fused: Fused, known: Lifetimes) -> fx.GraphModule:
    """The graph of fused actions: it returns the model's outputs, buffers and gradients, and what others of the plan
    read. Gradients of one parameter are added in the order of the actions."""
    gradients = {gradient.site.index: gradient.module for gradient in compiled.gradients}
    modules = [compiled.stages[a.stage] if isinstance(a, Forward) else gradients[a.site] for a in fused.actions]  # type: ignore[union-attr]
    kept = {key for action, keys in known.reads.items() if action not in fused.actions for key in keys}
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}
    written: set[str] = set()
    for module in modules:
        for node in placeholders(module):
            key = binding_key(node)
            if key not in values and key not in written:
                values[key] = graph.placeholder(f"input_{len(values)}")
                values[key].meta = dict(node.meta)
        written.update(output_keys(module))
    returned: dict[str, Output] = {}
    for module in modules:
        given = {node: values[binding_key(node)] for node in placeholders(module)}
        found = graph.graph_copy(module.graph, given)
        for key, (output, _), value in zip(output_keys(module), outputs(module), found, strict=True):  # type: ignore[arg-type]
            added = key in returned and output.kind == "gradient"
            values[key] = graph.call_function(torch.ops.aten.add.Tensor, (values[key], value)) if added else value
            if output.kind in ("output", "mutation", "gradient") or key in kept:
                returned[key] = output
    graph.output(())
    whole = fx.GraphModule({}, graph)
    set_outputs(whole, [(output, values[key]) for key, output in returned.items()])
    graph.eliminate_dead_code()
    return merge_equal(whole)
