"""What every pass needs to know of a graph: roles of placeholders, origins of nodes, layouts of tensors.

The normal form is the graph that ``torch.export`` lifts: functional ATen operations, one placeholder each parameter,
buffer, constant and input leaf, and one output tuple. Facts about a node live in ``node.meta``:

===============  ===================================================================================================
``val``          the fake tensor (shape, dtype, device) that ``torch.export`` recorded, or a SymInt
``role``         placeholders: a `Role`;  ``target``: the parameter's, buffer's, constant's name or the input's index
``trainable``    parameter placeholders: does it require a gradient
``kind``         a `Kind`: what the value depends on (see `classify`)
``layout``       a `Layout`: where the samples of the tensor are
``outputs``      output node: one `Output` for each element of the output tuple
===============  ===================================================================================================
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

import torch
from torch import fx


class Role(StrEnum):
    """What a placeholder is bound to when the graph runs."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"
    INPUT = "input"
    RUNTIME = "runtime"
    """``copies``, ``key``, ``sigmas``, ``weights``: what the executor makes up for a run (see `passes.ops`)."""
    VALUE = "value"
    """A value that another stage of the program computed."""


class Kind(StrEnum):
    """What a value depends on."""

    CONSTANT = "constant"
    """Buffers, constants and frozen parameters only."""
    SIZE = "size"
    """An integer computed from shapes."""
    PARAMETER = "parameter"
    """At least one trainable parameter, and no input."""
    ACTIVATION = "activation"
    """At least one input."""


@dataclass(frozen=True)
class Layout:
    """Where the samples of a tensor are.

    `sizes` is the shape with the batch dimension's entry divided by the batch size; the rows of dimension `dim` are
    ordered (outer, batch, sizes[dim] // outer). ``dim = -1``: no batch dimension.
    """

    sizes: tuple[int, ...]
    dim: int
    outer: int = 1

    @property
    def batched(self) -> bool:
        return self.dim >= 0

    @property
    def elements(self) -> int:
        """Elements a sample: the perturbation dimension of a site with this output."""
        count = 1
        for size in self.sizes:
            count *= size
        return count

    @property
    def extents(self) -> tuple[int, ...]:
        """The axes of one sample, in the order of its elements; a batch dimension holds two, (outer, inner)."""
        if not self.batched:
            return self.sizes
        rows = (self.outer, self.sizes[self.dim] // self.outer)
        return (*self.sizes[: self.dim], *rows, *self.sizes[self.dim + 1 :])


@dataclass(frozen=True)
class Output:
    """One element of a graph's output tuple: the program's value `name`, or a buffer's new value."""

    kind: str
    """``"mutation"`` (new value of the buffer `name`), ``"output"`` (leaf of the model's output), ``"value"``,
    ``"capture"`` or ``"gradient"`` (of the parameter `name`)."""
    name: str


@dataclass(frozen=True)
class Origin:
    """Where in the user's code a node comes from."""

    module: str
    """Module path, ``""`` for the root module."""
    line: str
    """``file:line: code`` of the innermost user frame, or ``""`` if unknown."""

    def __str__(self) -> str:
        where = f"module {self.module!r}" if self.module else "the model's own forward"
        return f"{where} ({self.line})" if self.line else where


_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
"""What ``torch.export`` puts for the module of nodes that it made itself (the batch size, for one)."""


def origin(node: fx.Node) -> Origin:
    """The module path and source line that `node` was traced from."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path != _NO_MODULE]
    module = paths[-1].removeprefix("L['self'].").removeprefix("L['self']") if paths else ""
    return Origin(module=module, line=_source_line(node.meta.get("stack_trace") or ""))


def _source_line(trace: str) -> str:
    frames = [line.strip() for line in trace.strip().splitlines() if line.strip()]
    for position in range(len(frames) - 1, -1, -1):
        frame = frames[position]
        if frame.startswith('File "') and "/torch/" not in f"/{frame.split(chr(34))[1]}":
            file, rest = frame.split('"')[1], frame.split("line ")[1]
            number = rest.split(",")[0].strip()
            code = frames[position + 1] if position + 1 < len(frames) else ""
            return f"{file}:{number}: {code}" if code and not code.startswith("File ") else f"{file}:{number}"
    return ""


def operation_name(node: fx.Node) -> str:
    """Short name of the operation of a node: ``aten.conv2d``, ``onward.perturb``, ``getitem``."""
    if isinstance(node.target, torch._ops.OpOverload):
        name: str = node.target.name().replace("::", ".")
        packet, _, overload = name.rpartition(".")
        return packet if overload in ("default", node.target._overloadname) and packet.count(".") else name
    return getattr(node.target, "__name__", str(node.target))


def describe(node: fx.Node) -> str:
    """Operation and origin, as error messages name a node."""
    return f"{operation_name(node)} in {origin(node)}"


def clone(module: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares no node with `module`: passes edit a clone and leave their input as it was."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    output = graph.output_node()
    output.meta = dict(module.graph.output_node().meta)
    return fx.GraphModule({}, graph)


def finish(module: fx.GraphModule) -> fx.GraphModule:
    """Check and recompile an edited clone."""
    module.graph.lint()
    module.recompile()
    return module


def placeholders(module: fx.GraphModule, role: Role | None = None) -> list[fx.Node]:
    """The placeholders in order, of one role if given."""
    return [
        node
        for node in module.graph.nodes
        if node.op == "placeholder" and (role is None or node.meta.get("role") == role)
    ]


def outputs(module: fx.GraphModule) -> list[tuple[Output, fx.Node]]:
    """The output tuple's elements with what they are."""
    node = module.graph.output_node()
    return list(zip(node.meta["outputs"], node.args[0], strict=True))  # type: ignore[arg-type]


def set_outputs(module: fx.GraphModule, items: Iterable[tuple[Output, fx.Node]]) -> None:
    """Replace the output tuple."""
    items = list(items)
    node = module.graph.output_node()
    node.args = (tuple(value for _, value in items),)
    node.meta["outputs"] = [output for output, _ in items]


def append_placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """A new placeholder behind those that the graph has."""
    last = next((node for node in reversed(graph.nodes) if node.op == "placeholder"), None)
    with graph.inserting_after(last) if last is not None else graph.inserting_before(next(iter(graph.nodes), None)):
        return graph.placeholder(name)


def add_runtime_placeholder(graph: fx.Graph, name: str, val: Any) -> fx.Node:
    """A placeholder of role RUNTIME called `name`, after the others; the existing one if the graph has it."""
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta.get("role") == Role.RUNTIME and node.meta["target"] == name:
            return cast(fx.Node, node)
    node = append_placeholder(graph, name.replace(".", "_"))
    node.meta.update(role=Role.RUNTIME, target=name, val=val, kind=Kind.CONSTANT)
    return node


def classify(module: fx.GraphModule) -> None:
    """Set ``meta["kind"]`` of every node (in place: a helper of passes that own their clone)."""
    for node in module.graph.nodes:
        if node.op == "placeholder":
            role = node.meta["role"]
            if role == Role.PARAMETER:
                node.meta["kind"] = Kind.PARAMETER if node.meta["trainable"] else Kind.CONSTANT
            else:
                node.meta["kind"] = Kind.ACTIVATION if role == Role.INPUT else Kind.CONSTANT
        elif node.op == "call_function":
            node.meta["kind"] = Kind.CONSTANT if _is_detached(node) else _kind_of_call(node)


def _is_detached(node: fx.Node) -> bool:
    """Whether the user cut a parameter off with ``.detach()``; of an activation it is passed by as its value."""
    source = node.args[0] if node.args else None
    detaches = node.target == torch.ops.aten.detach.default
    return detaches and isinstance(source, fx.Node) and source.meta["kind"] != Kind.ACTIVATION


def _kind_of_call(node: fx.Node) -> Kind:
    val = node.meta.get("val")
    if isinstance(val, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return Kind.SIZE
    kinds = {source.meta["kind"] for source in node.all_input_nodes}
    if Kind.ACTIVATION in kinds:
        return Kind.ACTIVATION
    return Kind.PARAMETER if Kind.PARAMETER in kinds else Kind.CONSTANT


def is_floating(node: fx.Node) -> bool:
    """Whether the node's value is a floating-point tensor."""
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.is_floating_point()


def upstream(starts: Iterable[fx.Node]) -> set[fx.Node]:
    """`starts` and all nodes that they depend on."""
    return _reached(starts, lambda node: node.all_input_nodes)


def downstream(starts: Iterable[fx.Node]) -> set[fx.Node]:
    """`starts` and all nodes that depend on them."""
    return _reached(starts, lambda node: node.users)


def _reached(starts: Iterable[fx.Node], further: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(further(node))
    return found


def drop_detaches(module: fx.GraphModule) -> None:
    """Read what a traced derivative detaches as it is (in place): no autograd graph is ever built."""
    for node in list(module.graph.nodes):
        if node.target == torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.all_input_nodes[0])
            module.graph.erase_node(node)


def getitem(node: fx.Node, index: int) -> fx.Node | None:
    """The node that takes element `index` of a node with several results, if there is one."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == index:
            return user
    return None
