"""Pass: find the batch dimension of every tensor.

Writes ``meta["layout"]`` (a `Layout`) on every node that holds one tensor. The batch size is a symbol in the shapes
that ``torch.export`` recorded; a dimension of size ``c * batch`` holds the samples, ``c`` rows each. Whether its rows
are ordered samples first (``x.flatten(0, 1)``) or last cannot be read off a shape: this pass assumes samples first and
``compiler.probe`` corrects it from a run.

Sizes that depend on the batch are rewritten to read the batch size from an input, never from a tensor that noise will
reach: a perturbed run scales them by its number of copies (`share_prefixes`).

Declines: a tensor in which two dimensions depend on the batch size (a sample-by-sample matrix), or a dimension that is
not a multiple of it, gets no layout. Such a graph mixes samples and runs one copy at a time (``credit="batch"``).
"""

from __future__ import annotations

import operator

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from .graph import Layout, Role, clone, finish, placeholders


def locate_samples(module: fx.GraphModule) -> fx.GraphModule:
    module = clone(module)
    batch = batch_symbol(module)
    _read_sizes_from_input(module, batch)
    for node in module.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor):
            layout = layout_of(val, batch)
            if layout is not None:
                node.meta["layout"] = layout
            else:
                node.meta.pop("layout", None)
    return finish(module)


def _read_sizes_from_input(module: fx.GraphModule, batch: sympy.Symbol | None) -> None:
    source = next((node for node in placeholders(module, Role.INPUT) if _size_is(node, batch)), None)
    if source is None:
        return
    reads = [node for node in module.graph.nodes if node.target == torch.ops.aten.sym_size.int]
    for node in reads:
        factor = multiple_of_batch(node.meta["val"], batch)
        if not factor or node.args == (source, 0):
            continue
        with module.graph.inserting_before(node):
            new = module.graph.call_function(torch.ops.aten.sym_size.int, (source, 0))
            new.meta = {**node.meta, "val": source.meta["val"].shape[0]}
            if factor > 1:
                new = module.graph.call_function(operator.mul, (new, factor))
                new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)


def _size_is(node: fx.Node, batch: sympy.Symbol | None) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.dim() > 0 and multiple_of_batch(val.shape[0], batch) == 1


def batch_symbol(module: fx.GraphModule) -> sympy.Symbol | None:
    """The symbol of the batch size; None if the graph's inputs have a fixed size."""
    for node in placeholders(module, Role.INPUT):
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor) and val.dim() > 0 and isinstance(val.shape[0], torch.SymInt):
            expression = val.shape[0].node.expr
            if isinstance(expression, sympy.Symbol):
                return expression
    return None


def multiple_of_batch(size: int | torch.SymInt, batch: sympy.Symbol | None) -> int | None:
    """``c`` if `size` is ``c * batch``; 0 if it does not depend on the batch; None if it does in another way."""
    if isinstance(size, int) or not hasattr(size, "node"):
        return 0
    expression = size.node.expr
    if batch is None or batch not in expression.free_symbols:
        return 0
    # an exact test at a few sizes also sees through floor divisions that sympy leaves standing
    ratios = {sympy.Rational(expression.subs(batch, n), n) for n in (60, 120, 840)}
    ratio = ratios.pop() if len(ratios) == 1 else None
    return int(ratio) if ratio is not None and ratio.is_integer else None


def layout_of(val: torch.Tensor, batch: sympy.Symbol | None) -> Layout | None:
    """The layout of a tensor with symbolic shape, samples first; None if the samples cannot be told apart."""
    sizes: list[int] = []
    dim = -1
    for position, size in enumerate(val.shape):
        factor = multiple_of_batch(size, batch)
        if factor is None or (factor and dim >= 0):
            return None
        if factor:
            dim = position
        sizes.append(factor or int(size))
    return Layout(tuple(sizes), dim)


__all__ = ["batch_symbol", "layout_of", "locate_samples", "multiple_of_batch"]
