"""Which constants of a file are weights.

A floating-point initializer (or ``Constant`` node, or the coefficients of a classical model) is trained if it reaches a
position of the table `OPERATORS` that is marked so (`Operator.trains`), of a node that also reads what depends on the
model's input; directly, or through operators that only carry it (`CARRIERS`). So weights and biases of convolutions,
products, normalisations and recurrent layers, embeddings, and what is added to or multiplied with activations; not the
mean and variance of a batch normalisation, nor shapes, scales of a ``Resize`` or of a quantiser, bounds of a ``Clip``.

Of what is added, multiplied or joined, these are no weights: a single number (but the bias of a single output is one),
a mask (it holds infinities or numbers below -1e4), and behind ``Concat`` what is all the same number.

Whole numbers are weights behind ``DequantizeLinear``: `quantised` says how those train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from .node import OPERATORS, Node
from .values import Array

CARRIERS = {
    "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast", "Expand", "Slice", "Split", "Concat",
    "DequantizeLinear", "QuantizeLinear",
}  # fmt: skip
"""Operators behind which a weight is still one."""

MASKED = -1e4
"""What a mask adds to what is not to be seen."""

_JOINED = {"Add", "Mul", "Concat", "Einsum"}
_PRODUCTS = {"MatMul", "Gemm", "Conv", "Einsum"}


def trainable(
    nodes: list[Node],
    constants: Mapping[str, Array],
    constant_names: set[str],
    producers: Mapping[str, Node],
    slots: set[str],
) -> list[str]:
    """The names of the constants that are weights, in the order in which the graph reads them.

    Args:
        nodes: In order.
        constants: What the file holds, by name.
        constant_names: Of every value that depends on no input, these included.
        producers: Value -> the node that makes it.
        slots: Names of the constants that can be written back.
    """
    found: dict[str, None] = {}

    def mark(read: str, is_weight: Callable[[Array], bool]) -> None:
        queue = [(read, False)]
        while queue:
            name, dequantised = queue.pop(0)
            node = producers.get(name)
            if name in constants:
                array = constants[name]
                floating = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
                whole = dequantised and array.dtype.kind in "iu"
                if name in slots and (floating or whole) and is_weight(array):
                    found[name] = None
            elif node is not None and node.kind in CARRIERS:
                dequantised = dequantised or node.kind == "DequantizeLinear"
                carried = node.inputs if node.kind == "Concat" else node.inputs[:1]
                queue += [(source, dequantised) for source in carried]

    for node in nodes:
        if node.kind not in OPERATORS or all(not name or name in constant_names for name in node.inputs):
            continue
        for position in sorted(OPERATORS[node.kind].trains):
            if position < len(node.inputs) and node.inputs[position] in constant_names:
                others = [producers.get(name) for k, name in enumerate(node.inputs) if k != position]
                mark(node.inputs[position], _rule(node, others))
    return list(found)


def _rule(node: Node, others: list[Node | None]) -> Callable[[Array], bool]:
    """Whether an array at a trained position of `node` is a weight; `others` make its other inputs."""
    if node.kind == "Gather":
        return lambda array: array.ndim >= 2
    if node.kind not in _JOINED:
        return lambda array: array.size > 0
    behind_product = any(other is not None and other.op_type in _PRODUCTS for other in others)

    def joined(array: Array) -> bool:
        if array.size < 2 and not (behind_product and array.ndim):
            return False
        values = array.astype(np.float64)
        if not np.isfinite(values).all() or values.min() <= MASKED:
            return False
        return node.kind != "Concat" or (array.ndim >= 2 and values.min() != values.max())

    return joined
