"""Rules of matrix products."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..emit import Emission, Value, rule


@rule("aten.mm.default", "aten.bmm.default")
def _product(e: Emission, node: fx.Node, x: Value, y: Value) -> str:
    return e.op("MatMul", x, y)


@rule("aten.addmm.default")
def _addmm(e: Emission, node: fx.Node, bias: Value, x: Value, y: Value, beta: Any = 1, alpha: Any = 1) -> str:
    if x.dtype.is_floating_point:
        return e.op("Gemm", x, y, bias, alpha=float(alpha), beta=float(beta))
    product, dtype = e.op("MatMul", x, y), x.dtype
    scaled = product if alpha == 1 else e.op("Mul", product, e.scalar(alpha, dtype))
    return e.op("Add", scaled, bias if beta == 1 else e.op("Mul", bias, e.scalar(beta, dtype)))
