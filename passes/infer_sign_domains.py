"""Pass: find which values an activation's sign can take, hence how many bits capturing it costs.

Writes ``meta["sign_domain"]`` on every floating-point node: ``"binary"`` (±1, one bit), ``"nonnegative"`` (0 or +, one
bit: behind a ReLU, sigmoid, softmax, …) or ``"signed"`` (two bits). The tables below name the operations that establish
a domain and those that keep their operands' domain; everything else is signed.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from . import ops
from .graph import clone, finish

_aten = torch.ops.aten

NONNEGATIVE = {
    _aten.relu.default, _aten.relu6.default, _aten.sigmoid.default, _aten.hardsigmoid.default, _aten.softplus.default,
    _aten.exp.default, _aten.abs.default, _aten.softmax.int, _aten._softmax.default, _aten.square.default,
    _aten.sqrt.default,
}  # fmt: skip
"""Operations whose results are never negative."""

PRESERVING = {
    _aten.max_pool1d.default, _aten.max_pool2d.default, _aten.max_pool3d.default, _aten.avg_pool1d.default,
    _aten.avg_pool2d.default, _aten.avg_pool3d.default, _aten.adaptive_avg_pool1d.default,
    _aten.adaptive_avg_pool2d.default, _aten.adaptive_max_pool2d.default, _aten.max_pool2d_with_indices.default,
    _aten.mean.dim, _aten.mean.default, _aten.sum.dim_IntList, _aten.amax.default, _aten.view.default,
    _aten.reshape.default, _aten.flatten.using_ints, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.permute.default,
    _aten.transpose.int, _aten.expand.default, _aten.clone.default, _aten.slice.Tensor, _aten.select.int,
    _aten.cat.default, _aten.stack.default, _aten.add.Tensor, _aten.mul.Tensor, _aten.upsample_nearest2d.vec,
    _aten._to_copy.default, _aten.split.Tensor, _aten.chunk.default, _aten.unbind.int, _aten.t.default,
    _aten.contiguous.default, operator.getitem, ops.tile,
}  # fmt: skip
"""Operations of nonnegative operands whose results are nonnegative (scalars among the operands included)."""


def infer_sign_domains(module: fx.GraphModule) -> fx.GraphModule:
    module = clone(module)
    for node in module.graph.nodes:
        node.meta["sign_domain"] = _domain(node)
    return finish(module)


def _domain(node: fx.Node) -> str:
    if node.op != "call_function":
        return "signed"
    if node.target in NONNEGATIVE:
        return "nonnegative"
    if node.target in PRESERVING and all(_nonnegative(source) for source in _operands(node)):
        return "nonnegative"
    return "signed"


def _operands(node: fx.Node) -> list[object]:
    found: list[object] = list(node.all_input_nodes)
    if node.target in (_aten.add.Tensor, _aten.mul.Tensor):
        found += [argument for argument in (*node.args, *node.kwargs.values()) if not isinstance(argument, fx.Node)]
    return found


def _nonnegative(value: object) -> bool:
    if not isinstance(value, fx.Node):
        return isinstance(value, (int, float)) and value >= 0
    val = value.meta.get("val")
    if isinstance(val, torch.Tensor):
        return val.dtype in (torch.bool, torch.uint8) or value.meta.get("sign_domain") == "nonnegative"
    return not isinstance(val, (tuple, list)) or value.meta.get("sign_domain") == "nonnegative"  # others are sizes
