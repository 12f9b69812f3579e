"""Graphs in Graphviz's language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from .picture import COLOURS, Box, picture_of


def to_dot(graphs: fx.GraphModule | Mapping[str, fx.GraphModule], *, title: str = "", batch: Any = None) -> str:
    """The graph, or several by name, in Graphviz's language: a cluster for each module, colours by role."""
    named = graphs if isinstance(graphs, Mapping) else {"": graphs}
    lines = [
        "digraph onward {",
        f"  label={_quoted(title)}; labelloc=t; rankdir=TB; fontname=Helvetica;",
        '  node [shape=box, style="rounded,filled", fontname=Helvetica, fontsize=11];',
        '  edge [color="#78909c", arrowsize=0.6];',
    ]
    for number, (name, module) in enumerate(named.items()):
        picture = picture_of(module, batch)
        ids = {box: f"g{number}_{place}" for place, box in enumerate(picture.boxes)}
        inner = _dot_cluster(picture.boxes, ids, (), f"cluster_{number}") + [
            f"{ids[a]} -> {ids[b]};" for a, b in picture.edges
        ]
        if name:
            inner = [f"subgraph cluster_{number} {{", f"  label={_quoted(name)};", *(f"  {x}" for x in inner), "}"]
        lines += [f"  {line}" for line in inner]
    return "\n".join([*lines, "}"]) + "\n"


def _dot_cluster(boxes: Sequence[Box], ids: Mapping[Box, str], path: tuple[str, ...], prefix: str) -> list[str]:
    """The boxes of the module at `path` and of the modules in it, each in its cluster."""
    lines = []
    depth = len(path)
    children: dict[str, list[Box]] = {}
    for box in boxes:
        parts = tuple(box.module.split(".")) if box.module else ()
        if parts == path:
            fill, border, _ = COLOURS[box.role]
            label = "\n".join(
                [f"{box.title} {box.shape}".strip(), *box.details, *(["captured"] if box.captured else [])]
            )
            lines.append(
                f"{ids[box]} [label={_quoted(label)}, tooltip={_quoted(box.tooltip or box.name)}, "
                f'fillcolor="{fill}", color="{border}"];'
            )
        else:
            children.setdefault(parts[depth], []).append(box)
    for place, (name, members) in enumerate(children.items()):
        inner = _dot_cluster(members, ids, (*path, name), f"{prefix}_{place}")
        label = f'  label={_quoted(".".join((*path, name)))}; color="#cfd8dc"; fontcolor="#607d8b";'
        lines += [f"subgraph {prefix}_{place} {{", label, *(f"  {line}" for line in inner), "}"]
    return lines


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
