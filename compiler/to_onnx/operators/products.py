"""Rules of matrix products."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..emit import Emission, Value, rule


@rule("aten.mm.default", "aten.bmm.default", "aten.matmul.default", "aten.mv.default", "aten.dot.default")
def _product(e: Emission, node: fx.Node, x: Value, y: Value) -> str:
    return e.op("MatMul", x, y)


@rule("aten.addmm.default")
def _addmm(e: Emission, node: fx.Node, bias: Value, x: Value, y: Value, beta: Any = 1, alpha: Any = 1) -> str:
    return e.op("Gemm", x, y, bias, alpha=float(alpha), beta=float(beta))


@rule("aten.baddbmm.default")
def _baddbmm(e: Emission, node: fx.Node, bias: Value, x: Value, y: Value, beta: Any = 1, alpha: Any = 1) -> str:
    product = e.op("MatMul", x, y)
    if alpha != 1:
        product = e.op("Mul", product, e.scalar(alpha, x.dtype))
    return e.op("Add", product, bias if beta == 1 else e.op("Mul", bias, e.scalar(beta, x.dtype)))
