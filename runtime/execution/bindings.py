"""Graphs ready to be called: by the names of what they read, with operators called by their Python bindings.

A graph names ``torch.ops.aten.mm.default``, whose call looks its arguments up in the operator's schema in general ways;
``torch.mm`` parses them in code made for it, and saves 1 to 1.6 of some 2.5 microseconds. For a small model that is a
tenth of a step. Noise on a CPU, whose operators are in Python, leaves out the dispatcher. What runs, and its bits, are
the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ...compiler.program import input_keys, output_keys
from ..noise import cpu_kernels
from .inductor import Inductor, InductorGraph

Environment = dict[str, Any]
"""Values by binding key (`compiler.program.binding_key`)."""

Function = Callable[..., Any]

_aten = torch.ops.aten

BINDINGS: dict[Any, Callable[..., Any]] = {
    _aten.add.Tensor: torch.add,
    _aten.addmm.default: torch.addmm,
    _aten.bmm.default: torch.bmm,
    _aten.cat.default: torch.cat,
    _aten.contiguous.default: Tensor.contiguous,
    _aten.conv2d.default: torch.conv2d,
    _aten.div.Scalar: torch.div,
    _aten.div.Tensor: torch.div,
    _aten.exp.default: torch.exp,
    _aten.expand.default: Tensor.expand,
    _aten.gt.Scalar: torch.gt,
    _aten.linear.default: torch._C._nn.linear,
    _aten.mm.default: torch.mm,
    _aten.mul.Scalar: torch.mul,
    _aten.mul.Tensor: torch.mul,
    _aten.neg.default: torch.neg,
    _aten.permute.default: torch.permute,
    _aten.relu.default: torch.relu,
    _aten.reshape.default: Tensor.reshape,
    _aten.sub.Tensor: torch.sub,
    _aten.sum.dim_IntList: torch.sum,
    _aten.t.default: torch.t,
    _aten.transpose.int: torch.transpose,
    _aten.unsqueeze.default: torch.unsqueeze,
    _aten.view.default: Tensor.view,
    **cpu_kernels.BINDINGS,
}
"""Bindings whose positional and keyword arguments are those of the operator's schema."""


def with_bindings(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of `module` that calls the bindings of `BINDINGS`; `module` itself, which is printed and checked, stays as
    it is."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = BINDINGS.get(node.target, node.target)
    return fx.GraphModule(module, graph)


class BoundGraph:
    """A graph with the names of what it reads and returns; `around` is put around its function."""

    def __init__(self, module: fx.GraphModule, around: Callable[[Function], Function] | None = None) -> None:
        self.module, self.around = module, around
        self.inputs = input_keys(module)
        self.outputs = output_keys(module)
        self._plain: Function = with_bindings(module).forward
        self._call(self._plain)

    def _call(self, function: Function) -> None:
        self.forward = function if self.around is None else self.around(function)

    def use_inductor(self, inductor: Inductor, name: str) -> None:
        """Have it compiled. Inductor gets the operators, and not their bindings."""
        self._call(InductorGraph(inductor, name, self.module, self._plain))

    def __call__(self, environment: Environment, *others: Environment) -> Environment:
        """Run on the first environment that has each input."""
        if not others:
            return dict(zip(self.outputs, self.forward(*[environment[key] for key in self.inputs]), strict=True))
        arguments, environments = [], (environment, *others)
        for key in self.inputs:
            for environment in environments:
                if key in environment:
                    arguments.append(environment[key])
                    break
        assert len(arguments) == len(self.inputs), set(self.inputs).difference(*environments)
        return dict(zip(self.outputs, self.forward(*arguments), strict=True))
