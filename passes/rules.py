"""The table of rules: what is special about the gradient of an operation. Everything absent uses the default.

The gradient subgraph of a site is the local vector-Jacobian product of its operations, traced by ``make_fx`` (see
`trace_gradients`): that needs no rule. A rule only says whether the activation may be captured as signs:

- ``bilinear``: the parameters' gradient is linear in the captured activation, so an unbiased encoding of the activation
  gives an unbiased gradient (method.md 3), and the sign of the activation a meaningful one (2).
- ``normalized``: the gradient is linear in the normalised activation ``x̂`` (``z = x̂ γ + β``), so ``x̂`` is captured.
- anything else: the gradient is not linear in what it reads, which is therefore captured exactly whatever the estimator
  asks for. ``onward inspect`` says so in the site's row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten


@dataclass(frozen=True)
class Rule:
    """What may be captured for an operation, and how the captured value is made."""

    name: str
    encodable: bool
    """Whether sign and stochastic capture apply."""
    normalize: Callable[[fx.Graph, fx.Node], fx.Node] | None = None
    """Adds the node of ``x̂`` after the site's; None captures the operands as they are."""
    affine: Callable[[Any, Any, Any], Any] | None = None
    """``(x̂, γ, β) -> z``: what the gradient is taken of when ``x̂`` is captured."""
    note: str = ""


GENERIC = Rule("generic", encodable=False, note="traced local vjp; operands captured exactly")
BILINEAR = Rule("bilinear", encodable=True, note="traced local vjp, linear in the captured activation")
LOOKUP = Rule("lookup", encodable=False, note="traced local vjp; integer indices captured exactly")


def _without_affine(weight: int, bias: int, result: int | None) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    """``x̂``: the same call with the affine parameters taken out."""

    def build(graph: fx.Graph, node: fx.Node) -> fx.Node:
        import operator

        args = list(node.args)
        args[weight] = args[bias] = None
        call = graph.call_function(node.target, tuple(args), dict(node.kwargs))  # type: ignore[arg-type]
        call.meta = {name: value for name, value in node.meta.items() if name != "site"}
        if result is None:
            return call
        with graph.inserting_after(call):
            first = graph.call_function(operator.getitem, (call, result))
        first.meta = {**call.meta, "val": node.meta["val"][result]}
        return first

    return build


def _last_dims(x: Any, gamma: Any, beta: Any) -> Any:
    z = x if gamma is None else x * gamma
    return z if beta is None else z + beta


def _channels(x: Any, gamma: Any, beta: Any) -> Any:
    shape = (1, -1) + (1,) * (x.dim() - 2)
    return _last_dims(x, None if gamma is None else gamma.reshape(shape), None if beta is None else beta.reshape(shape))


RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        (
            _aten.linear.default,
            _aten.conv1d.default,
            _aten.conv1d.padding,
            _aten.conv2d.default,
            _aten.conv2d.padding,
            _aten.conv3d.default,
            _aten.conv3d.padding,
            _aten.convolution.default,
            _aten.conv_transpose1d.default,
            _aten.conv_transpose2d.input,
            _aten.conv_transpose3d.input,
            _aten.mm.default,
            _aten.addmm.default,
            _aten.bmm.default,
            _aten.baddbmm.default,
            _aten.matmul.default,
            _aten.mv.default,
            _aten.einsum.default,
            _aten.bilinear.default,
            _aten.mul.Tensor,
            _aten.add.Tensor,
            _aten.sub.Tensor,
            _aten.addcmul.default,
        ),
        BILINEAR,
    ),
    _aten.embedding.default: LOOKUP,
    _aten.embedding_bag.default: LOOKUP,
    _aten.index.Tensor: LOOKUP,
    _aten.layer_norm.default: Rule("normalized", True, _without_affine(2, 3, None), _last_dims, "γ reads x̂, β nothing"),
    _aten.group_norm.default: Rule("normalized", True, _without_affine(2, 3, None), _channels, "γ reads x̂, β nothing"),
    **dict.fromkeys(
        (_aten._native_batch_norm_legit_functional.default, _aten._native_batch_norm_legit.no_stats),
        Rule("normalized", True, _without_affine(1, 2, 0), _channels, "γ reads x̂, β nothing"),
    ),
}


def rule_for(target: Any) -> Rule:
    """The rule of an operation; the default where the table has none."""
    return RULES.get(target, GENERIC)


BATCH_STATISTICS = (_aten._native_batch_norm_legit_functional.default, _aten._native_batch_norm_legit.no_stats)
"""Operations whose result for one sample depends on the others through statistics of the batch."""


def uses_batch_statistics(node: fx.Node) -> bool:
    """Whether `node` normalises by statistics of the running batch."""
    if node.target == BATCH_STATISTICS[0]:
        return bool(node.args[5])
    return node.target == BATCH_STATISTICS[1]


def support_matrix() -> list[tuple[str, str, str]]:
    """Rows ``(operation, rule, note)`` of the table, the default last."""
    rows = [(str(target), rule.name, rule.note) for target, rule in RULES.items()]
    return [*sorted(rows), ("any other operation", GENERIC.name, GENERIC.note)]
