"""A core ATen graph (`trace`) as nodes of an ONNX graph: one rule of `operators` an operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx

from ...passes.errors import ExportError
from ...passes.graph import origin
from .builder import DTYPES, Builder

Rule = Callable[..., "str | Sequence[str | None]"]
"""``(emission, node, *args, **kwargs) -> value or values``: arguments as the node's, its nodes being values."""

RULES: dict[str, Rule] = {}
"""By the operation's name, as a graph prints it: ``aten.add.Tensor``."""

NUMPY: dict[torch.dtype, Any] = {
    torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16, torch.int64: np.int64,
    torch.int32: np.int32, torch.int16: np.int16, torch.int8: np.int8, torch.uint8: np.uint8, torch.bool: np.bool_,
}  # fmt: skip


R = TypeVar("R", bound=Rule)


def rule(*names: str) -> Callable[[R], R]:
    """Register a rule for the operations of these names."""

    def register(function: R) -> R:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


class Value(str):
    """The ONNX name of a graph's value, with what the trace knows of it."""

    val: Any

    def __new__(cls, name: str, val: Any) -> Value:
        made = super().__new__(cls, name)
        made.val = val
        return made

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor; int64 for a size, float64 for a number that sizes give."""
        if isinstance(self.val, Tensor):
            return self.val.dtype
        return torch.float64 if isinstance(self.val, (float, torch.SymFloat)) else torch.int64

    @property
    def shape(self) -> tuple[Any, ...]:
        """Of the tensor: ints, and SymInts where the batch size is in it."""
        return tuple(self.val.shape) if isinstance(self.val, Tensor) else ()

    @property
    def rank(self) -> int:
        """Dimensions."""
        return len(self.shape)


class Emission:
    """What a rule works with: the builder, and helpers that need types.

    Attributes:
        noise: by site and kind of noise, the value of its random words and the draws that it holds (`random.words`);
            what is not there is made where it is read.
        copies: by the value of copies or draws, their ids.
    """

    def __init__(
        self,
        builder: Builder,
        noise: Mapping[tuple[int, str], tuple[str, Sequence[int]]] | None = None,
        copies: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.b = builder
        self.noise, self.copies = noise, dict(copies or {})
        self.sizes: dict[str, str] = {}
        """By the expression of a size that depends on the batch, the value that holds it."""

    def op(self, operator: str, *inputs: str | None, **attributes: Any) -> str:
        """`Builder.op`."""
        return self.b.op(operator, *inputs, **attributes)

    def scalar(self, value: Any, dtype: torch.dtype) -> str:
        """A 0-d constant of a dtype."""
        if dtype == torch.bfloat16:
            return self.cast(self.b.constant(value, np.float32), torch.float32, dtype)
        return self.b.constant(value, NUMPY[dtype])

    def cast(self, name: str, before: torch.dtype, dtype: torch.dtype) -> str:
        """A value of another dtype, the same where it has that."""
        return name if before == dtype else self.op("Cast", name, to=DTYPES[dtype])

    def as_type(self, operand: Any, dtype: torch.dtype) -> str:
        """A value or a Python number as `dtype`."""
        return self.cast(operand, operand.dtype, dtype) if isinstance(operand, Value) else self.scalar(operand, dtype)

    def size(self, size: Any) -> str | int:
        """A size as an int where it is known, else as an int64 scalar."""
        if isinstance(size, Value):
            return str(size)
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if not expression.free_symbols:
            return static(size)
        if str(expression) in self.sizes:
            return self.sizes[str(expression)]
        (symbol,) = expression.free_symbols
        factor = expression.coeff(symbol)
        if expression != factor * symbol or str(symbol) not in self.sizes:
            raise ExportError(f"a size of the graph is {expression}, which no tensor that it reads has.")
        return self.op("Mul", self.sizes[str(symbol)], self.b.constant(int(factor), np.int64))

    def shape(self, sizes: Sequence[Any]) -> str:
        """A one-dimensional int64 value from sizes, constant where they are."""
        known = [self.size(size) for size in sizes]
        if all(isinstance(size, int) for size in known):
            return self.b.ints(known)  # type: ignore[arg-type]
        parts: list[str] = []
        pending: list[int] = []
        for size in known:
            if isinstance(size, int):
                pending.append(size)
                continue
            if pending:
                parts.append(self.b.ints(pending))
                pending = []
            parts.append(self.op("Unsqueeze", size, self.b.ints([0])))
        if pending:
            parts.append(self.b.ints(pending))
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def reshape(self, name: str, sizes: Sequence[Any]) -> str:
        """`name` in another shape; one size that is not known is inferred."""
        known = [size if isinstance(size, int) else self.size(size) for size in sizes]
        if sum(not isinstance(size, int) for size in known) == 1 and -1 not in known and 0 not in known:
            known = [size if isinstance(size, int) else -1 for size in known]
        return self.op("Reshape", name, self.shape(known))

    def slice(self, name: str, axis: int, start: Any, end: Any, step: int = 1) -> str:
        """Entries `start` … `end` - 1 along an axis; both may be values."""
        return self.op("Slice", name, self.shape([start]), self.shape([end]), self.b.ints([axis]), self.b.ints([step]))


def emit(emission: Emission, graph: fx.GraphModule, given: Sequence[str], name: str) -> tuple[list[str], list[Any]]:
    """Add a traced graph to the builder.

    Args:
        given: the values that its placeholders are.
        name: begins the names of its nodes.

    Returns:
        The values of its outputs, and what the trace knows of each (a fake tensor or a size).

    Raises:
        ExportError: an operation has no rule; the message names it and the line of the model.
    """
    values: dict[fx.Node, Any] = {}
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, value in zip(places, given, strict=True):
        values[node] = Value(value, node.meta.get("val"))
    with emission.b.scope(name):
        _find_sizes(emission, [values[node] for node in places])
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                values[node] = _held(emission, graph, node)
            elif node.op == "call_function":
                with emission.b.scope(_readable(node)):
                    values[node] = _call(emission, node, values)
    results = graph.graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    flat = [values[each] if isinstance(each, fx.Node) else _number(emission, each) for each in results]
    return [str(value) for value in flat], [value.val for value in flat]


def _number(emission: Emission, value: Any) -> Value:
    if value is None:
        raise ExportError("a graph returns None.")
    return Value(emission.b.constant(int(value), np.int64), int(value))


def _held(emission: Emission, graph: fx.GraphModule, node: fx.Node) -> Value:
    found: Any = graph
    for part in str(node.target).split("."):
        found = getattr(found, part)
    if not isinstance(found, Tensor):
        raise ExportError(f"{node.target} is {type(found).__name__}, no tensor.")
    array = found.detach().cpu()
    made = emission.b.constant(array.float().numpy() if array.dtype == torch.bfloat16 else array.numpy())
    return Value(emission.cast(made, torch.float32, array.dtype) if array.dtype == torch.bfloat16 else made, found)


def _find_sizes(emission: Emission, values: Sequence[Value]) -> None:
    """Where the batch size can be read from: a size that is given, or the shape of an input."""
    emission.sizes = {}
    for value in values:
        if isinstance(value.val, torch.SymInt):
            emission.sizes.setdefault(str(value.val.node.expr), str(value))
    for value in values:
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and size.node.expr.free_symbols:
                emission.sizes.setdefault(str(size.node.expr), size_of(emission, value, axis))
    for expression in list(emission.sizes):  # a tensor may have a multiple of the batch size only
        value = next(v for v in _expressions(values) if str(v) == expression)
        (symbol,) = value.free_symbols
        if str(symbol) not in emission.sizes:
            factor = int(value.coeff(symbol))
            divided = emission.op("Div", emission.sizes[expression], emission.b.constant(factor, np.int64))
            emission.sizes[str(symbol)] = divided


def _expressions(values: Sequence[Value]) -> list[Any]:
    sizes = [size for value in values for size in (*value.shape, value.val)]
    return [size.node.expr for size in sizes if isinstance(size, torch.SymInt)]


def static(size: Any) -> int:
    """A size as an int; ExportError where it depends on the batch. (``int`` of a SymInt would fix the batch size.)"""
    if isinstance(size, torch.SymInt):
        if size.node.expr.free_symbols:
            raise ExportError(f"a size of {size.node.expr}, which depends on the batch, where a rule needs a number.")
        return int(size.node.expr)
    return int(size)


def size_of(emission: Emission, value: str, axis: int) -> str:
    """One entry of a tensor's shape, an int64 scalar."""
    shape = emission.op("Shape", value, start=axis, end=axis + 1)
    return emission.op("Squeeze", shape, emission.b.ints([0]))


def _readable(node: fx.Node) -> str:
    """The name of the node of the program that this one came from."""
    sources = node.meta.get("from_node")
    return str(sources[-1].name) if sources else str(node.name)


def _call(emission: Emission, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    name = operation(node)
    if name == "getitem":
        source, index = node.args
        found = values[source][index]  # type: ignore[index]
        return Value(found, node.meta["val"])
    if name not in RULES:
        raise ExportError(
            f"{name} has no rule that expresses it in ONNX's standard operators; it comes from {origin(node)}."
        )
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    try:
        found = RULES[name](emission, node, *args, **kwargs)
    except ExportError as error:
        raise ExportError(f"{name}, from {origin(node)}: {error}") from error
    val = node.meta["val"]
    if isinstance(val, (tuple, list)):
        return [None if each is None else str(each) for each in found]
    assert isinstance(found, str), name
    return Value(found, val)


def operation(node: fx.Node) -> str:
    """The name by which a node's rule is found."""
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else getattr(node.target, "__name__", "")
