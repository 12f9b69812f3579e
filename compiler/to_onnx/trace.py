"""A graph, or a function of tensors, as core ATen operations with a free batch size: what `operators` has rules for.

Programs hold what ``torch.export`` and the passes left, at whatever level. Here they are traced once more, under
torch's own decompositions: derivatives, normalisations and attention become some sixty operations, functional and with
a fake tensor of every value in ``meta["val"]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.traceback import preserve_node_meta

from ...passes.errors import ExportError
from ...passes.graph import drop_detaches
from ...passes.locate_samples import multiple_of_batch
from ...passes.ops import PERTURBING, REGENERATING  # noqa: F401  (declares the operators)

BATCH_HINT = 60
"""What the free batch size is while tracing: a size that no model is likely to have as another one's factor."""

_aten = torch.ops.aten

KEPT = (
    _aten.native_layer_norm.default,
    _aten.native_group_norm.default,
    _aten._native_batch_norm_legit_no_training.default,
    _aten._softmax.default,
    _aten._log_softmax.default,
    _aten.gelu.default,
    _aten.hardswish.default,
    _aten.hardsigmoid.default,
    _aten.elu.default,
    _aten.leaky_relu.default,
    _aten.softplus.default,
    _aten.threshold_backward.default,
    _aten.addmm.default,
    _aten.stack.default,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.unbind.int,
    _aten.t.default,
    _aten.transpose.int,
    _aten.tril.default,
    _aten.triu.default,
    _aten._unsafe_view.default,
)
"""Operations with a decomposition that ONNX has an operator for."""


@dataclass(frozen=True)
class Like:
    """A tensor by shape and dtype. The entry of `shape` may be ``(c,)``: c times the batch size."""

    shape: tuple[int | tuple[int], ...]
    dtype: torch.dtype

    @property
    def multiples(self) -> tuple[int, ...]:
        """By dimension the multiple of the batch size, 0 where it does not depend on it."""
        return tuple(size[0] if isinstance(size, tuple) else 0 for size in self.shape)


Number = int
Described = Like | Number
"""What a graph reads: a tensor, or c times the batch size as an int64 scalar."""


def described(val: Any, name: str) -> Described:
    """A fake tensor of any trace as a `Like`; a size as its multiple of the batch size."""
    if isinstance(val, Tensor):
        return Like(tuple(_size(size, name) for size in val.shape), val.dtype)
    if isinstance(val, torch.SymInt):
        multiple = _size(val, name)
        assert isinstance(multiple, tuple)
        return multiple[0]
    raise ExportError(f"{name} is {type(val).__name__}, no tensor: ONNX has nothing for it.")


def _size(size: int | torch.SymInt, name: str) -> int | tuple[int]:
    if not isinstance(size, torch.SymInt):
        return int(size)
    symbols = size.node.expr.free_symbols
    factor = multiple_of_batch(size, next(iter(symbols))) if len(symbols) == 1 else None
    if not symbols:
        return int(size)
    if not factor:
        raise ExportError(f"a size of {name} is {size.node.expr}, no multiple of the batch size, which must be free.")
    return (factor,)


def trace(
    function: Callable[..., Sequence[Any]],
    given: Sequence[Described],
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    *,
    strict: bool = False,
    batch: int | None = None,
) -> fx.GraphModule:
    """The graph of ``function(*given) -> results`` in core ATen, the batch size free; a GraphModule is such a function.

    Args:
        function: of tensors and, for a `Number`, ints, in the order of `given`; returns a flat sequence of tensors and
            ints.
        given: what it gets.
        decompositions: of operators of Onward's, beside torch's.
        strict: whether a comparison of the batch size fixes it too. It does in a user's code; in a graph it is torch's
            own choice of a kernel.
        batch: the batch size, where it is fixed.

    Returns:
        A graph with one placeholder for each of `given`, ``meta["val"]`` on every node, and a tuple as its output.

    Raises:
        ExportError: the batch size would have to be fixed.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    with mode:
        size_of_batch = _free_size(mode) if batch is None else batch
        fakes: list[Any] = []
        for each in given:
            if isinstance(each, Like):
                shape = [size_of_batch * size[0] if isinstance(size, tuple) else size for size in each.shape]
                fakes.append(torch.empty(shape, dtype=each.dtype))
            else:
                fakes.append(size_of_batch * each)
    table = {**_decompositions(), **(decompositions or {})}
    run = fx.Interpreter(function).run if isinstance(function, fx.GraphModule) else function
    traced = _traced(lambda *arguments: tuple(run(*arguments)), fakes, table, mode)
    if _mutates(traced):  # losses write, and some of torch's decompositions do
        traced = _traced(functionalize(fx.Interpreter(traced).run), fakes, table, mode)
    fixed = [guard.expr for guard in mode.shape_env.guards if _fixes(guard.expr, strict)]  # type: ignore[union-attr]
    if fixed:
        raise ExportError(f"the batch size would have to be fixed: {fixed[0]} was assumed on the way.")
    drop_detaches(traced)
    for node in [node for node in traced.graph.nodes if "_assert_" in str(node.target)]:
        traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Torch's core ones, whose table takes longer to make than a small graph to trace, and `DECOMPOSED`."""
    return {target: rule for target, rule in core_aten_decompositions().items() if target not in KEPT} | DECOMPOSED


def _traced(
    run: Callable[..., Any], fakes: Sequence[Any], table: Mapping[Any, Callable[..., Any]], mode: FakeTensorMode
) -> fx.GraphModule:
    """Torch's own operations are taken apart in Python, where a free size stays free."""
    with mode, torch.no_grad(), enable_python_dispatcher(), preserve_node_meta():
        return make_fx(run, decomposition_table=dict(table), _allow_non_fake_inputs=True)(*fakes)


def _mutates(graph: fx.GraphModule) -> bool:
    operators = (node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload))
    return any(operator._schema.is_mutable for operator in operators)


def _free_size(mode: FakeTensorMode) -> torch.SymInt:
    free: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    with torch.utils._python_dispatch._disable_current_modes():
        example = torch.empty(BATCH_HINT)
    size = mode.from_tensor(example, symbolic_context=free).shape[0]
    assert isinstance(size, torch.SymInt)
    return size


def _fixes(guard: Any, strict: bool) -> bool:
    """Whether a guard of a trace holds for some batch sizes only; that it is not 0 or 1 is no matter."""
    if not guard.free_symbols or not (strict or guard.func is sympy.Eq):
        return False
    return not all(_holds(guard, size) for size in (2, 3, 7, 60, 120))


def _holds(guard: Any, size: int) -> bool:
    try:
        return bool(guard.subs(dict.fromkeys(guard.free_symbols, size)))
    except ZeroDivisionError:  # a part of the size that this one has none of
        return False


def _embedding_backward(
    grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """The rows' sum as a product with indicators: ONNX sums equal indices in no operator that runs everywhere."""
    rows = grad.reshape(-1, grad.shape[-1])
    numbers = torch.arange(num_weights, dtype=indices.dtype)
    chosen = (indices.reshape(-1)[None, :] == numbers[:, None]).to(grad.dtype)
    if padding_idx >= 0:
        chosen = chosen * (numbers != padding_idx).to(grad.dtype)[:, None]
    return chosen @ rows


DECOMPOSED: dict[Any, Callable[..., Any]] = {
    **get_decompositions(
        [
            _aten._native_batch_norm_legit_functional,
            _aten._native_batch_norm_legit.no_stats,
            _aten.native_batch_norm_backward,
        ]
    ),
    _aten.embedding_dense_backward.default: _embedding_backward,
}
"""Decompositions beside torch's core ones."""
