"""A builder of ONNX graphs: nodes with readable names, equal ones once, constants once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper

OPSET = 20
"""Of the standard operators: the lowest that has all that `operators` uses (Gelu; bits are of 18)."""

IR_VERSION = 9
"""The one that came with the opset."""

Array = npt.NDArray[Any]

DTYPES: dict[torch.dtype, int] = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int64: onnx.TensorProto.INT64,
    torch.int32: onnx.TensorProto.INT32,
    torch.int16: onnx.TensorProto.INT16,
    torch.int8: onnx.TensorProto.INT8,
    torch.uint8: onnx.TensorProto.UINT8,
    torch.uint32: onnx.TensorProto.UINT32,
    torch.bool: onnx.TensorProto.BOOL,
}
"""Of what a graph may read and return."""


class Builder:
    """One graph in the making. Values are named by strings.

    A node that equals an earlier one in operator, inputs and attributes is that one: shapes, noise and masks that
    several parts of a graph need are computed once.

    Args:
        name: of the graph.
        parent: the graph around it, whose values it may read: this is a branch of an ``If``.
    """

    def __init__(self, name: str, parent: Builder | None = None) -> None:
        self.name, self.parent = name, parent
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {} if parent is None else parent.initializers
        self._constants: dict[Any, str] = {} if parent is None else parent._constants
        self._names: set[str] = set() if parent is None else parent._names
        self._known: dict[Any, tuple[str, ...]] = {}
        self._scope: list[str] = [] if parent is None else list(parent._scope)

    @contextmanager
    def scope(self, name: str) -> Any:
        """Names within begin with `name` and a slash."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def fresh(self, name: str, within: Sequence[str] | None = None) -> str:
        """`name` in this scope, or `within` another, numbered if it is taken."""
        full = "/".join([*(self._scope if within is None else within), name])
        chosen, number = full, 1
        while chosen in self._names:
            chosen, number = f"{full}_{number}", number + 1
        self._names.add(chosen)
        return chosen

    def op(self, operator: str, *inputs: str | None, **attributes: Any) -> str:
        """The one result of a node; inputs that are left out are None."""
        return self.ops(operator, inputs, 1, **attributes)[0]

    def ops(self, operator: str, inputs: Sequence[str | None], results: int, **attributes: Any) -> tuple[str, ...]:
        """The results of a node."""
        read = [name or "" for name in inputs]
        while read and not read[-1]:
            read.pop()
        key = (operator, tuple(read), results, tuple(sorted((k, _hashable(v)) for k, v in attributes.items())))
        found = self._find(key)
        if found is None:
            names = [self.fresh(operator) for _ in range(results)]
            self.nodes.append(helper.make_node(operator, read, names, name=names[0], **attributes))
            found = self._known[key] = tuple(names)
        return found

    def _find(self, key: Any) -> tuple[str, ...] | None:
        if key in self._known:
            return self._known[key]
        return None if self.parent is None else self.parent._find(key)

    def constant(self, values: Any, dtype: Any = None) -> str:
        """An initializer; equal ones once."""
        array = np.asarray(values, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            text = str(array.item()) if array.size == 1 else "x".join(map(str, array.shape))
            name = self._constants[key] = self._root.fresh(f"constant/{array.dtype}/{text}", within=())
            self.initializers[name] = numpy_helper.from_array(array, name)
        return self._constants[key]

    @property
    def _root(self) -> Builder:
        return self if self.parent is None else self.parent._root

    def ints(self, values: Iterable[int]) -> str:
        """A one-dimensional int64 constant."""
        return self.constant(list(values), np.int64)

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> str:
        """An input of the graph; a size may be a name."""
        self._names.add(name)
        self.inputs.append(helper.make_tensor_value_info(name, DTYPES[dtype], list(shape)))
        return name

    def output(self, name: str, value: str, dtype: torch.dtype, shape: Sequence[int | str]) -> None:
        """A result of the graph, under a name of its own."""
        self._names.add(name)
        self.nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}/output"))
        self.outputs.append(helper.make_tensor_value_info(name, DTYPES[dtype], list(shape)))

    def graph(self) -> onnx.GraphProto:
        """The graph as it is now; of a branch without the initializers, which stand in the outermost one."""
        held = list(self.initializers.values()) if self.parent is None else []
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, held)
        _name_by_outputs(graph)
        return graph

    def model(self, about: str) -> onnx.ModelProto:
        """The model, of names that are read outside as they are written; what nothing reads is left out."""
        graph = without_unread(self.graph())
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="onward",
            doc_string=about,
        )


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return id(value) if isinstance(value, onnx.GraphProto) else value


def _name_by_outputs(graph: onnx.GraphProto) -> None:
    """Give results the names of the outputs that copy them, in place, and drop the copies.

    ONNX Runtime 1.32 drops such copies itself, and has lost a value that another node read too.
    """
    outputs = {output.name for output in graph.output}
    free = {name for node in graph.node for name in node.output} - outputs
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        if node.op_type == "Identity" and node.output[0] in outputs and node.input[0] in free - renamed.keys():
            renamed[node.input[0]] = node.output[0]
        else:
            kept.append(node)
    for node in kept:
        _rename(node, renamed)
    del graph.node[:]
    graph.node.extend(kept)


def _rename(node: onnx.NodeProto, renamed: dict[str, str]) -> None:
    for names in (node.input, node.output):
        names[:] = [renamed.get(name, name) for name in names]
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                _rename(inner, renamed)


def without_unread(graph: onnx.GraphProto) -> onnx.GraphProto:
    """The graph without nodes and initializers whose results nothing reads."""
    wanted = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if any(name in wanted for name in node.output):
            kept.append(node)
            wanted.update(name for name in node.input if name)
            for branch in (a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH):
                wanted.update(_read_outside(branch))
    held = [tensor for tensor in graph.initializer if tensor.name in wanted]
    return helper.make_graph(kept[::-1], graph.name, graph.input, graph.output, held)


def _read_outside(branch: onnx.GraphProto) -> set[str]:
    """What a branch reads; more than it takes from outside does no harm, names being unique."""
    read = {name for node in branch.node for name in node.input}
    for node in branch.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                read |= _read_outside(attribute.g)
    return read | {output.name for output in branch.output}
