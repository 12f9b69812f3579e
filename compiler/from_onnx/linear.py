"""Matrix products, and the determinant."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .node import Node, operator


@operator("MatMul", trains=(0, 1))
def matmul(node: Node, left: Tensor, right: Tensor) -> Tensor:
    return torch.matmul(left, right)


@operator("Gemm", trains=(0, 1, 2))
def gemm(node: Node, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """``alpha A' B' + beta C``; as ``F.linear`` where it is one, which is what the compiler knows best."""
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    left = left.t() if node.get("transA", 0) else left
    if node.get("transB", 0) and alpha == 1.0:
        if bias is None or (beta == 1.0 and bias.dim() == 1 and bias.shape[0] == right.shape[0]):
            return F.linear(left, right, bias)
        return F.linear(left, right) + (bias if beta == 1.0 else beta * bias)
    product = torch.matmul(left, right.t() if node.get("transB", 0) else right)
    product = product if alpha == 1.0 else alpha * product
    if bias is None:
        return product
    return product + (bias if beta == 1.0 else beta * bias)


@operator("Einsum", trains=range(8))
def einsum(node: Node, *operands: Tensor) -> Tensor:
    return torch.einsum(node.get("equation").replace(" ", ""), *operands)


@operator("Det")
def det(node: Node, value: Tensor) -> Tensor:
    result: Tensor = torch.linalg.det(value)
    return result
