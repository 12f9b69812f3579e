"""Pass: one operator for a weight's gradient from packed signs and noise that every copy has of its own.

A completed subgraph (`complete_gradients`) with packed captures of the copies' own unpacks the signs, makes the
weighted noise and multiplies the two, each a tensor that grows with the copies. Rewritten are

1. ``t(noise) mm x`` with, where there is a bias, the noise's sum over all rows: `ops.packed_linear_gradient`;
2. ``convolution_backward(noise, x)``: `ops.packed_convolution_gradient`;

where ``x`` is `ops.unpack_signs`, times its scale or not, ``noise`` is `ops.weighted_noise` in the same dtype, both are
flattened to rows at most, and the graph gives nothing else. Both operators are defined as what they replace.

Declines, and returns the graph as it is: noise that is summed over the copies (captures of the clean run), levels,
weights that lie ``(in, out)``, transposed convolutions and those of several groups, a bias without a weight, and
regions with further operations.

It runs when a program is bound to a device that has kernels for the operators, and not when it is compiled: the graphs
that are printed, checked and exported are the composition.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from . import ops
from .graph import finish, getitem, outputs, set_outputs

_aten = torch.ops.aten

_FLATTENING = (_aten.reshape.default, _aten.view.default, _aten._unsafe_view.default, _aten.clone.default)


class Match(NamedTuple):
    """The call of an operator for the gradients of a weight and, behind it in one vector, of its bias."""

    target: Any
    args: tuple[Any, ...]
    weight: fx.Node
    bias: fx.Node | None


def fuse_packed_gradients(module: fx.GraphModule) -> fx.GraphModule:
    """The subgraph with one operator in the place of all others, or itself where it is of another form."""
    results = [node for _, node in outputs(module)]
    match = _linear(results) or _convolution(results)
    if match is None or {match.weight, match.bias or match.weight} != set(results):
        return module
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copied))
    given = []
    with graph.inserting_before(graph.output_node()):
        flat = graph.call_function(match.target, fx.map_arg(match.args, copied.__getitem__))
        for output, node in outputs(module):
            val = node.meta["val"]
            first = 0 if node is match.weight else match.weight.meta["val"].numel()
            part = graph.call_function(_aten.slice.Tensor, (flat, 0, first, first + val.numel()))
            part = graph.call_function(_aten.reshape.default, (part, list(val.shape)))
            part.meta["val"] = val
            given.append((output, part))
    fused = fx.GraphModule(module, graph)
    set_outputs(fused, given)
    graph.eliminate_dead_code()
    return finish(fused)


def _linear(results: Sequence[fx.Node]) -> Match | None:
    weight = next((node for node in results if node.target == _aten.mm.default), None)
    if weight is None or not _calls(weight.args[0], _aten.t.default):
        return None
    noise = _past(weight.args[0].args[0], _FLATTENING)  # type: ignore[union-attr]
    operands = _operands(_past(weight.args[1], _FLATTENING), noise)
    bias = next((node for node in results if node is not weight), None)
    if operands is None or (bias is not None and not _sums(bias, noise)):
        return None
    (x_sizes, sizes) = operands[3], operands[11]
    if tuple(weight.meta["val"].shape) != (sizes[-1], x_sizes[-1]):  # rows that were flattened otherwise
        return None
    return Match(ops.packed_linear_gradient, (*operands, bias is not None), weight, bias)


def _convolution(results: Sequence[fx.Node]) -> Match | None:
    core: Any = results[0].args[0] if results[0].target is operator.getitem else None
    if not _calls(core, _aten.convolution_backward.default):
        return None
    noise, x, like, _, stride, padding, dilation, transposed, _, groups, _ = core.args
    operands, weight, bias = _operands(x, noise), getitem(core, 1), getitem(core, 2)
    if operands is None or weight is None or transposed or groups != 1:
        return None
    args = (*operands, bias is not None, like, stride, padding, dilation)
    return Match(ops.packed_convolution_gradient, args, weight, bias)


def _operands(x: Any, noise: Any) -> tuple[Any, ...] | None:
    """What both operators read, up to the dtype, if these are packed signs and the noise of every copy."""
    signs, scale = x.args if _calls(x, _aten.mul.Tensor) else (x, None)
    if not (_calls(signs, ops.unpack_signs) and _calls(noise, _aten.to.dtype)):
        return None
    packed, domain, x_sizes, x_dim, dtype = signs.args
    wide, to = noise.args
    weighted = _past(wide, (_aten.contiguous.default,))
    if not _calls(weighted, ops.weighted_noise) or to != dtype:
        return None
    return (packed, scale, domain, x_sizes, x_dim, *weighted.args, dtype)


def _sums(node: fx.Node, noise: Any) -> bool:
    """Whether it is the noise's sum over all axes but the last."""
    total = _past(node, _FLATTENING)
    if not _calls(total, _aten.sum.dim_IntList):
        return False
    summed, axes = total.args[:2]
    last = len(total.meta["val"].shape) - 1
    kept = {last} == set(range(last + 1)) - {axis % (last + 1) for axis in axes} and bool(total.args[2:] == (True,))
    return kept and _past(summed, _FLATTENING) is noise


def _past(node: Any, targets: Sequence[Any]) -> Any:
    """What a node is made of by such operations alone."""
    while isinstance(node, fx.Node) and node.target in targets:
        node = node.args[0]
    return node


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target == target
