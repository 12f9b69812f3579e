"""What the gradient of a segment has to be (DESIGN.md 13, 14), said in autograd's own terms.

The graph is run with the parameters alive only where the segment reads them, every noise point that is not passed is
cut off, and there the gradient is ``alive ⊙ J e``. Which noise points those are follows from sets of sites that flow
through the graph, in one pass forward.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

import onward
from onward.compiler.program import binding_key
from onward.passes.find_sites import Site
from onward.passes.graph import Kind, Role, outputs
from onward.runtime.noise.rows import to_rows


def graph_after(program: onward.Program, name: str) -> fx.GraphModule:
    return next(record.module for record in program.compiled.history if record.name == name)


def graph_of_sites(program: onward.Program) -> fx.GraphModule:
    """The graph with every operation its own site, noise points where they are placed."""
    narrow = program.compiled.estimator.placement == "narrow"
    return graph_after(program, "narrow_noise" if narrow else "find_sites")


def has_no_derivative(node: fx.Node) -> bool:
    val, name = node.meta.get("val"), getattr(getattr(node.target, "_schema", None), "name", "")
    return name in ("aten::sign", "aten::round", "aten::detach") or (
        isinstance(val, Tensor) and not val.is_floating_point()
    )


def flows(module: fx.GraphModule, points: Collection[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """The points and sites whose value reaches each node on a way that no other point is on."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in module.graph.nodes:
        found[node] = set()
        if node.op != "output" and node.meta.get("kind") != Kind.SIZE:
            for source in node.all_input_nodes:
                found[node] |= {source} if source in points else found[source]
            found[node] |= {node} if "site" in node.meta and node not in points else set()
    return found


class Cuts:
    """The sites of a graph grouped by the first points behind them."""

    def __init__(self, module: fx.GraphModule, asked: Collection[str]) -> None:
        self.sites = {node: node.meta["site"] for node in module.graph.nodes if "site" in node.meta}
        (self.output,) = (node for output, node in outputs(module) if output.kind == "output")
        everywhere = flows(module, {*self.sites, self.output})
        stopped = [reaching for node, reaching in everywhere.items() if has_no_derivative(node)]
        self.forced = set().union(*stopped) & self.sites.keys() - {self.output}
        self.points = {node for node in self.sites if node.name in asked} | self.forced | {self.output}
        flow = flows(module, self.points)
        self.dead = set[fx.Node]().union(*(flow[node] for node in flow if has_no_derivative(node)))
        self.after = {point: {other for other in self.points if point in flow[other]} for point in self.points}
        self.segments: dict[frozenset[fx.Node], list[Site]] = {}
        for node, site in self.sites.items():
            ends = [node] if node in self.points else [point for point in self.points if node in flow[point]]
            self.segments.setdefault(frozenset(ends), []).append(site)

    def passed(self, ends: Collection[fx.Node], reach: int) -> set[fx.Node]:
        """The points at fewer than `reach` hops from `ends`, with a derivative behind them."""
        passed: set[fx.Node] = set()
        level = set(ends)
        for _ in range(reach):
            here = {point for point in level if point not in self.dead and point is not self.output}
            passed |= here
            level = {further for point in here for further in self.after[point]} - passed
        return passed


def reference(program: onward.Program, x: Any, y: Any, asked: Collection[str], reach: int) -> dict[str, Tensor]:
    """The gradients that segments cut behind the nodes called `asked` have to give."""
    module = graph_of_sites(program)
    cuts = Cuts(module, asked)
    environment = program.bind(x, y)[0].environment
    clean = {**environment, "runtime:copies": torch.zeros(1, dtype=torch.int64)}
    for stage in program.executor.stages:
        clean.update(stage(clean))
    output = clean["output:0"].clone().requires_grad_()
    (error,) = torch.autograd.grad(program.loss.loss(output, y).mean(), output)
    masks = {index: name for run in program.compiled.runs for index, name in run.alive.items()}
    numbers = {site.output: site.index for site in program.compiled.sites}

    def arriving(node: fx.Node) -> Tensor:
        rows: Tensor = error.flatten(1)
        if node is cuts.output:
            return rows
        assert program.feedback is not None
        number = numbers[node.name]
        predicted = rows @ program.feedback.jacobians[number].T
        if number not in masks:
            return predicted
        return predicted * to_rows(clean[f"value:{masks[number]}"], node.meta["layout"], len(error))

    found = {name: torch.zeros_like(p) for name, p in program.model.named_parameters() if p.requires_grad}
    for ends, members in cuts.segments.items():
        passed, own = cuts.passed(ends, reach), {name for member in members for name in member.region}
        leaves: dict[str, Tensor] = {}
        values: dict[fx.Node, Any] = {}
        total = error.new_zeros(())
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = clean[binding_key(node)]
                if node.meta["role"] == Role.PARAMETER and node.meta["trainable"]:
                    values[node] = leaves[node.meta["target"]] = values[node].clone().requires_grad_()
            elif node.op == "call_function":
                reads = node.name in own or node.meta["kind"] == Kind.PARAMETER
                given = {n: v if reads or n.meta["kind"] != Kind.PARAMETER else v.detach() for n, v in values.items()}
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
                values[node] = node.target(*args, **kwargs)
            if node in cuts.points and node not in passed:
                if values[node].requires_grad:
                    total = total + (to_rows(values[node], node.meta["layout"], len(error)) * arriving(node)).sum()
                values[node] = values[node].detach()
        names = sorted({name for member in members for name in member.parameters})
        given_to = torch.autograd.grad(total, [leaves[name] for name in names])
        for name, gradient in zip(names, given_to, strict=True):
            found[name] += gradient
    return found
