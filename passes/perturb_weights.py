"""Pass: move the noise of a site from its output to its weight (method.md 6, 11).

``z = op(x; W) + b`` becomes ``z + σ (op(x; E) + e)``, ``E`` shaped like the weight, and ``e`` like the bias where that
is trainable: to the loss, noise on the parameters. Their gradient is then the weighted noise itself, ``mean(ℓ E) / σ``,
so that nothing is captured and there is no vjp. ``E`` is

- ``"weight"``: one draw a copy, shared by all samples: cheapest, and every sample's loss is noise to the others;
- ``"sample"``: a draw a sample and copy;
- ``"rank-one"``: ``u vᵀ`` a sample and copy, ``u`` over the output channels and ``v`` over the fan-in (and a one for
  the bias), random signs: one projection in place of the operation. The mean of two entries' product is 1 for the same
  entry and else 0, which is all that an unbiased estimate needs. Groups have a ``v`` each.

The numbers of a draw are those of a tensor of shape (numbers,) with ``"weight"``, else (N, numbers): the entries of the
weight in its own order, then the bias; or ``u``, then ``v`` (of the bias last) of each group.

Writes ``meta["site"]`` anew with `weight_noise`, which `insert_noise` follows.

Declines (`weight_of` says why): what is no linear layer or convolution, reads its weight through another operation, has
its noise behind a normalisation or a sum, or takes its samples elsewhere than in the rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from . import ops
from .graph import Kind, Layout, Output, Role, add_runtime_placeholder, clone, finish, placeholders, set_outputs

_aten = torch.ops.aten


@dataclass(frozen=True)
class WeightNoise:
    """The noise on the weight of a site, and the operation that takes it to the output."""

    on: str
    """``"weight"``, ``"sample"`` or ``"rank-one"``."""
    operation: str
    """``"linear"``, weight (channels, fan-in); ``"product"``, weight (fan-in, channels); ``"convolution"``, weight
    (channels, fan-in of a group, *kernel)."""
    operand: int
    """Position of the activation among the operation's arguments."""
    weight: str
    shape: tuple[int, ...]
    """The weight's."""
    bias: str
    """The bias that is perturbed, too, or ``""``."""
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def channels(self) -> int:
        """Of the output."""
        return self.shape[1] if self.operation == "product" else self.shape[0]

    @property
    def fan_in(self) -> int:
        """Weights of an output channel."""
        return math.prod(self.shape) // self.channels

    @property
    def layout(self) -> Layout:
        """The layout of the numbers of noise."""
        if self.on == "rank-one":
            return Layout((1, self.channels + self.groups * (self.fan_in + bool(self.bias))), 0)
        count = math.prod(self.shape) + (self.channels if self.bias else 0)
        return Layout((1, count), 0) if self.on == "sample" else Layout((count,), -1)

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `ops.perturb_weight` that describe it."""
        return {
            "on": self.on,
            "operation": self.operation,
            "weight": list(self.shape),
            "bias": bool(self.bias),
            "stride": list(self.stride),
            "padding": list(self.padding),
            "dilation": list(self.dilation),
            "groups": self.groups,
        }


def perturb_weights(module: fx.GraphModule, *, noise: Mapping[int, WeightNoise]) -> fx.GraphModule:
    """The graph whose sites that `noise` has, by index, are perturbed at their weight."""
    module = clone(module)
    for node in module.graph.nodes:
        site = node.meta.get("site")
        if site is not None and site.index in noise:
            node.meta["site"] = replace(site, weight_noise=noise[site.index], blocks=())
    return finish(module)


def weight_gradients(module: fx.GraphModule, *, noise: str, score: str) -> dict[int, fx.GraphModule]:
    """The gradient subgraphs of the sites with noise on their weight: the weighted noise, cut into the parameters.

    They read ``weights`` (draws, N), ``draws`` and ``key``, and give gradients shaped and typed like the parameters.
    """
    vals = {node.meta["target"]: node.meta["val"] for node in placeholders(module, Role.PARAMETER)}
    found = [node.meta["site"] for node in module.graph.nodes if "site" in node.meta]
    return {site.index: _gradient(site, vals, noise, score) for site in found if site.weight_noise is not None}


def noise_arguments(site: Any, noise: str, score: str) -> tuple[Any, ...]:
    """The arguments of `ops.weight_noise_sum` from the site's index on."""
    at: WeightNoise = site.weight_noise
    return (site.index, noise, score, at.on, at.operation, list(at.shape), bool(at.bias), at.groups)


def _gradient(site: Any, vals: Mapping[str, torch.Tensor], noise: str, score: str) -> fx.GraphModule:
    at: WeightNoise = site.weight_noise
    graph = fx.Graph()
    given = [add_runtime_placeholder(graph, name, None) for name in ("weights", "draws", "key")]
    flat = graph.call_function(ops.weight_noise_sum, (*given, *noise_arguments(site, noise, score)))
    count = math.prod(at.shape)
    results = []
    for name in site.parameters:
        first, last = (0, count) if name == at.weight else (count, count + at.channels)
        part = graph.call_function(_aten.slice.Tensor, (flat, 0, first, last))
        part = graph.call_function(_aten.reshape.default, (part, list(vals[name].shape)))
        part = graph.call_function(_aten.to.dtype, (part, vals[name].dtype))
        part.meta["val"] = vals[name]
        results.append((Output("gradient", name), part))
    graph.output(tuple(node for _, node in results))
    module = fx.GraphModule({}, graph)
    set_outputs(module, results)
    return finish(module)


def weight_of(node: fx.Node, on: str) -> WeightNoise | str:
    """What noise on the weight is at the noise point `node`, or why there can be none."""
    site = node.meta["site"]
    core = next(each for each in node.graph.nodes if each.name == site.core)
    if core.target not in (*_LINEAR, *_CONVOLUTIONS):
        return "it is neither a linear layer nor a convolution"
    if core is not node:
        return "its noise is behind a normalisation or at a sum"
    arguments = _named_arguments(node)
    found = _linear(node, arguments) if node.target in _LINEAR else _convolution(arguments)
    if isinstance(found, str):
        return found
    operation, activation, weight, bias, rest = found
    if not _is_trainable(weight):
        return "its weight is not read directly from a trainable parameter"
    if not isinstance(activation, fx.Node) or activation.meta.get("kind") != Kind.ACTIVATION:
        return "it does not multiply its weight by an activation"
    trained = [one.meta["target"] for one in (weight, bias) if _is_trainable(one)]
    if sorted(trained) != sorted(site.parameters):
        return "its bias is not read directly from a parameter"
    reason = _rows_differ(activation.meta.get("layout"), site.layout, operation, len(weight.meta["val"].shape))
    if reason:
        return reason
    operand = next(place for place, given in enumerate(node.args) if given is activation)
    shape = tuple(int(extent) for extent in weight.meta["val"].shape)
    name = bias.meta["target"] if _is_trainable(bias) else ""
    return WeightNoise(on, operation, operand, weight.meta["target"], shape, name, **rest)


def _is_trainable(node: Any) -> bool:
    named = isinstance(node, fx.Node) and node.op == "placeholder" and node.meta["role"] == Role.PARAMETER
    return named and bool(node.meta["trainable"])


def _named_arguments(node: fx.Node) -> dict[str, Any]:
    assert isinstance(node.target, torch._ops.OpOverload)
    named = {}
    for place, argument in enumerate(node.target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        named[argument.name] = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name, default)
    return named


_Found = tuple[str, Any, Any, Any, dict[str, Any]] | str
"""Operation, activation, weight, bias, and the rest of a `WeightNoise`; or why not."""

_LINEAR = (_aten.linear.default, _aten.addmm.default, _aten.mm.default, _aten.matmul.default)
_CONVOLUTIONS = (
    _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.conv1d.padding, _aten.conv2d.padding,
    _aten.conv3d.padding, _aten.convolution.default,
)  # fmt: skip


def _linear(node: fx.Node, given: dict[str, Any]) -> _Found:
    if node.target == _aten.linear.default:
        return "linear", given["input"], given["weight"], given["bias"], {}
    if node.target == _aten.addmm.default:
        bias = given["self"]
        if (given["beta"], given["alpha"]) != (1, 1) or not isinstance(bias, fx.Node) or bias.meta["val"].dim() != 1:
            return "its bias is scaled, or no vector"
        return "product", given["mat1"], given["mat2"], bias, {}
    weight = given["other" if node.target == _aten.matmul.default else "mat2"]
    if not isinstance(weight, fx.Node) or weight.meta["val"].dim() != 2:
        return "its weight is no matrix"
    return "product", given["self"], weight, None, {}


def _convolution(given: dict[str, Any]) -> _Found:
    if given.get("transposed"):
        return "it is a transposed convolution"
    weight = given["weight"]
    kernel = [int(extent) for extent in weight.meta["val"].shape[2:]]
    stride, dilation = (_each(given[name], len(kernel)) for name in ("stride", "dilation"))
    padding = given["padding"]
    if padding == "same":
        missing = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(one % 2 for one in missing):
            return "it pads one side more than the other"
        padding = [one // 2 for one in missing]
    padding = _each(0 if padding == "valid" else padding, len(kernel))
    rest = {"stride": stride, "padding": padding, "dilation": dilation, "groups": given["groups"]}
    return "convolution", given["input"], weight, given["bias"], rest


def _each(value: Any, count: int) -> tuple[int, ...]:
    """One number for every spatial dimension."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * count if len(values) == 1 else values


def _rows_differ(x: Layout | None, z: Layout, operation: str, dims: int) -> str:
    """Why the samples of the activation and of the output are not in the same rows, ``""`` if they are."""
    if x is None or not z.batched or (x.dim, x.outer, x.sizes[x.dim]) != (z.dim, z.outer, z.sizes[z.dim]):
        return "its samples are not where those of its activation are"
    if operation == "convolution":
        return "" if z.dim == 0 and len(z.sizes) == dims else "its samples are not in its first dimension"
    return "" if x.sizes[:-1] == z.sizes[:-1] and z.dim < len(z.sizes) - 1 else "its samples are in its channels"


__all__ = ["WeightNoise", "noise_arguments", "perturb_weights", "weight_gradients", "weight_of"]
