"""Graphs as Python source: one readable, runnable function a graph, with shapes, roles and provenance.

The expressions are those of FX's own code generator; this module only lays them out. ``N`` is the batch size, ``K·N``
the batch of ``K`` copies side by side. Placeholders keep their order: the ``inputs`` in a manifest bind them.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..passes import ops
from ..passes.graph import Output, origin, placeholders

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
_FREED = re.compile(r";  (?:\w+ = )+None$")
_STARTS_COPIES = (ops.tile, ops.weighted_noise)


def header(modules: Mapping[str, fx.GraphModule], about: str) -> str:
    """The docstring and the imports that the functions of `modules` need."""
    lines = [f'"""{about}"""', "", "import torch", "", "import onward  # noqa: F401  (registers its operators)"]
    names: dict[str, Any] = {}
    for module in modules.values():
        names.update(module.graph.python_code("self").globals)
    text = "\n".join(_expressions(module)[name] for module in modules.values() for name in _expressions(module))
    imports = {_import(name, value) for name, value in names.items() if re.search(rf"(?<![\w.]){name}\b", text)}
    lines[3:3] = sorted(imports - {"import torch"})
    return "\n".join([*lines, "", "aten = torch.ops.aten", "ops = torch.ops.onward", ""])


def _import(name: str, value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return f"import {value.__name__}" if value.__name__ == name else f"import {value.__name__} as {name}"
    if name in ("inf", "nan"):
        return f"from math import {name}"
    if name == "NoneType":
        return "from types import NoneType"
    real = getattr(value, "__name__", name)
    return f"from {getattr(value, '__module__', 'builtins')} import {real}" + ("" if real == name else f" as {name}")


def file_of(modules: Mapping[str, fx.GraphModule], about: str, batch: Any = None) -> str:
    """A whole Python file: one function for each graph, by name; `batch` is the symbol of the batch size."""
    functions = [function_of(module, name, batch) for name, module in modules.items()]
    return "\n\n".join([header(modules, about), *functions])


def function_of(module: fx.GraphModule, name: str, batch: Any = None) -> str:
    """The graph as a function called `name`."""
    tiled = tiled_nodes(module)
    expressions = _expressions(module)
    lines = [f"def {name}("]
    if any(node.op == "get_attr" for node in module.graph.nodes):
        lines.append("    self,  # holds the constants that the graph refers to")
    for node in placeholders(module):
        shape = describe_value(node, batch, node in tiled)
        annotation = f': "{shape}"' if shape else ""
        lines.append(f"    {node.name}{annotation},  # {node.meta['role']} {node.meta['target']}".rstrip())
    lines.append("):")
    place = ""
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        here = provenance(node)
        if here and here != place:
            lines.append(f"    # {here}")
            place = here
        shape = describe_value(node, batch, node in tiled)
        annotation = f': "{shape}"' if shape else ""
        lines.append(f"    {node.name}{annotation} = {expressions[node.name]}")
    lines += _return(module)
    return "\n".join(lines) + "\n"


def _return(module: fx.GraphModule) -> list[str]:
    output = module.graph.output_node()
    described: list[Output] = output.meta.get("outputs") or []
    values = output.args[0]
    if not isinstance(values, (tuple, list)):
        return [f"    return {values}"]
    if not values:
        return ["    return ()"]
    names = [f"  # {item.kind} {item.name}" for item in described] or [""] * len(values)
    rows = [f"        {value},{name}" for value, name in zip(values, names, strict=True)]
    return ["    return (", *rows, "    )"]


def _expressions(module: fx.GraphModule) -> dict[str, str]:
    """Right-hand side of every call, as FX prints it, by node name."""
    calls = {node.name for node in module.graph.nodes if node.op not in ("placeholder", "output")}
    found = {}
    for line in module.graph.python_code("self").src.splitlines():
        left, equals, right = line.strip().partition(" = ")
        name = left.partition(" : ")[0]
        if equals and name in calls:
            right = _FREED.sub("", right)
            found[name] = right.replace("torch.ops.aten.", "aten.").replace("torch.ops.onward.", "ops.")
    assert found.keys() == calls, calls - found.keys()
    return found


def provenance(node: fx.Node) -> str:
    """``module — file:line: code`` of the user's source, as far as it is known; ``""`` for what a pass made up."""
    if not node.meta.get("nn_module_stack") and not node.meta.get("stack_trace"):
        return ""
    where = origin(node)
    return " — ".join(part for part in (where.module, short_line(where.line)) if part)


def short_line(line: str) -> str:
    """``file:line: code`` with only the last folder of the file's path."""
    path, colon, rest = line.partition(":")
    return "/".join(path.split("/")[-2:]) + colon + rest


def tiled_nodes(module: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose batch holds several copies side by side (their recorded shapes are those of one copy)."""
    tiled: set[fx.Node] = set()
    per_copy = any(node.target == ops.weighted_noise for node in module.graph.nodes)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if per_copy and "capture" in node.meta:
                tiled.add(node)
            continue
        branches = node.target in ops.PERTURBING and node.args[-1] is False
        counts = node.target == torch.ops.aten.sym_size.int and node.args[0].name == "copies"
        if branches or counts or node.target in _STARTS_COPIES or any(s in tiled for s in node.all_input_nodes):
            tiled.add(node)
    return tiled


def describe_value(node: fx.Node, batch: Any = None, tiled: bool = False) -> str:
    """Type and shape of a node's value: ``f32[N, 16, 8, 8]``; ``""`` if unknown."""
    return _describe(node.meta.get("val"), batch, "K·N" if tiled else "N")


def _describe(val: Any, batch: Any, name: str) -> str:
    if isinstance(val, torch.Tensor):
        shape = ", ".join(extent(size, batch, name) for size in val.shape)
        return f"{_DTYPES.get(val.dtype, str(val.dtype).removeprefix('torch.'))}[{shape}]"
    if isinstance(val, (tuple, list)):
        return f"({', '.join(_describe(item, batch, name) or '?' for item in val)})"
    if isinstance(val, torch.SymInt):
        return f"int {extent(val, batch, name)}"
    return ""


def extent(size: Any, batch: Any = None, name: str = "N") -> str:
    """One size of a shape, the batch's symbol written as `name`."""
    if not isinstance(size, torch.SymInt):
        return str(size)
    text = str(size.node.expr)
    return text if batch is None else re.sub(rf"\b{re.escape(str(batch))}\b", name, text)
