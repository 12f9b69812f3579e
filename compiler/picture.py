"""A graph as a picture: boxes and the edges between them, whoever draws them.

To keep them few,

- parameters, buffers and constants are lines in the box of the operation that reads them,
- sizes, keys, copy ids and σ are left out, and an element taken of a tuple is the tuple's box,
- the operations that make one capture are one box; what is captured as it is, is marked on its own box.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..passes import ops
from ..passes.graph import Kind, Role, operation_name, origin, outputs
from .source import describe_value, provenance, tiled_nodes

COLOURS = {
    "input": ("#eceff1", "#78909c", "input, value of another graph"),
    "operation": ("#ffffff", "#90a4ae", "operation"),
    "parameter": ("#e3f2fd", "#1e88e5", "reads parameters"),
    "site": ("#bbdefb", "#1565c0", "site"),
    "noise": ("#ffe0b2", "#ef6c00", "noise"),
    "capture": ("#c8e6c9", "#2e7d32", "capture"),
    "gradient": ("#e1bee7", "#7b1fa2", "gradient"),
    "output": ("#eceff1", "#37474f", "output"),
}
"""Role to fill, border and what the legend calls it."""

_SHORT = {
    "_native_batch_norm_legit_functional": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm (given statistics)",
}

_NOISE = {*ops.PERTURBING, *ops.REGENERATING, ops.keyed_random}
_MADE_UP = {
    "error": "e, the loss's gradient at the output",
    "projected_error": "e along the feedback's basis",
    "feedback": "learned Jacobian",
    "weights": "losses' weights",
}
"""What the executor gives a gradient subgraph, as its readers' boxes name it (copies and keys go without saying)."""

_FOLDED = {Role.PARAMETER, Role.BUFFER, Role.CONSTANT}


@dataclass(eq=False)
class Box:
    """A box of the picture."""

    name: str
    role: str
    title: str
    shape: str = ""
    module: str = ""
    details: list[str] = field(default_factory=list)
    """Parameters it reads, buffers it moves."""
    captured: bool = False
    tooltip: str = ""


@dataclass
class Picture:
    """Boxes and the edges between them."""

    boxes: list[Box]
    edges: list[tuple[Box, Box]]


def picture_of(module: fx.GraphModule, batch: Any = None) -> Picture:
    """The boxes and edges of a graph; `batch` is the symbol of the batch size."""
    return _Builder(module, batch).build()


class _Builder:
    def __init__(self, module: fx.GraphModule, batch: Any) -> None:
        self.module, self.batch = module, batch
        self.tiled = tiled_nodes(module)
        self.boxes: dict[str, Box] = {}
        self.of: dict[fx.Node, Box] = {}
        self.edges: dict[tuple[Box, Box], None] = {}

    def build(self) -> Picture:
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op != "output":
                self._call(node)
        self._outputs()
        idle = self._idle()
        return Picture(
            [box for box in self.boxes.values() if box not in idle],
            [(a, b) for a, b in self.edges if a not in idle and b not in idle],
        )

    def _add(self, key: str, box: Box) -> Box:
        return self.boxes.setdefault(key, box)

    def _placeholder(self, node: fx.Node) -> None:
        role = node.meta.get("role")
        if role in _FOLDED or role == Role.RUNTIME or _is_size(node):
            return
        shape = describe_value(node, self.batch, node in self.tiled)
        target = str(node.meta["target"])
        if "capture" in node.meta:
            name = target.removesuffix(".scale")
            box = Box(node.name, "capture", name, shape, details=[f"captured {node.meta['capture']}"])
            self.of[node] = self._add(f"captured {name}", box)
        else:
            title = f"input {target}" if role == Role.INPUT else target
            self.of[node] = self._add(node.name, Box(node.name, "input", title, shape))

    def _call(self, node: fx.Node) -> None:
        if _is_size(node):
            return
        if node.target is operator.getitem and node.args[0] in self.of:
            self.of[node] = owner = self.of[node.args[0]]  # type: ignore[index]
            if "site" in node.meta:
                owner.role = "site"
            if node.args[1] == 0:
                owner.shape = describe_value(node, self.batch, node in self.tiled)
            return
        key = f"capture {node.meta['capture']}" if "capture" in node.meta else node.name
        box = self._add(key, self._box(node))
        self.of[node] = box
        for source in node.all_input_nodes:
            if source in self.of and self.of[source] is not box:
                self.edges[self.of[source], box] = None
            elif source.op == "placeholder" and source.meta.get("role") in _FOLDED and box.role != "capture":
                line = self._detail(source, box)
                if line not in box.details:
                    box.details.append(line)
            elif source.meta.get("role") == Role.RUNTIME and str(source.meta["target"]).partition(".")[0] in _MADE_UP:
                box.details.append(_MADE_UP[str(source.meta["target"]).partition(".")[0]])

    def _box(self, node: fx.Node) -> Box:
        shape = describe_value(node, self.batch, node in self.tiled)
        if shape.startswith("("):
            shape = ""
        module = origin(node).module if node.meta.get("nn_module_stack") else ""
        title = operation_name(node).removeprefix("aten.").removeprefix("onward.")
        title = _SHORT.get(title, title)
        role = "operation"
        if "capture" in node.meta:
            role, title, shape = "capture", f"capture {node.meta['capture']}", ""
        elif node.target in _NOISE:
            role = "noise"
        elif node.target in (ops.unpack_signs, ops.pack_signs):
            role = "capture"
        elif "site" in node.meta:
            role = "site"
        elif any(s.op == "placeholder" and s.meta.get("role") == Role.PARAMETER for s in node.all_input_nodes):
            role = "parameter"
        where = provenance(node)
        return Box(node.name, role, title, shape, module, tooltip=f"{node.name}\n{where}".strip())

    def _detail(self, source: fx.Node, box: Box) -> str:
        name = str(source.meta["target"]).removeprefix(f"{box.module}.")
        shape = describe_value(source, self.batch)
        return f"{name} {shape[shape.find('[') :]}" if shape else name

    def _outputs(self) -> None:
        for output, node in outputs(self.module):
            if not isinstance(node, fx.Node) or node not in self.of:
                continue
            source = self.of[node]
            if output.kind == "capture":
                if source.role != "capture":
                    source.captured = True
            elif output.kind == "mutation":
                name = output.name.removeprefix(f"{source.module}.")
                source.details = [line for line in source.details if line.partition(" ")[0] != name]
                source.details.append(f"moves {name}")
            elif output.kind in ("output", "gradient"):
                role = "gradient" if output.kind == "gradient" else "output"
                box = Box(f"{output.kind} {output.name}", role, f"{output.kind} {output.name}")
                self.edges[source, self._add(f"{output.kind}:{output.name}", box)] = None
            else:  # a value for another graph
                box = Box(f"value {output.name}", "output", f"value {output.name}")
                self.edges[source, self._add(f"{output.kind}:{output.name}", box)] = None

    def _idle(self) -> set[Box]:
        """Boxes without an edge that only count something up, as batch normalisation counts its batches."""
        linked = {box for edge in self.edges for box in edge}
        lone = {box for box in self.boxes.values() if box not in linked and box.role == "operation"}
        return lone if len(lone) < len(self.boxes) else set()


def _is_size(node: fx.Node) -> bool:
    if node.meta.get("kind") == Kind.SIZE or isinstance(node.meta.get("val"), (int, torch.SymInt)):
        return True
    return node.target == torch.ops.aten.sym_size.int or (
        node.target is operator.mul and all(_is_size(source) for source in node.all_input_nodes)
    )
