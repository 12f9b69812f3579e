"""The graphs of a program by name, and who waits for whom."""

from __future__ import annotations

import networkx
from torch import fx

from .program import CompiledModel, input_keys, output_keys


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
