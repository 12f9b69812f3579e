"""Graphs as pictures: ``to_dot`` for Graphviz, ``to_svg`` without any other program.

Both draw the same boxes. To keep them few,

- parameters, buffers and constants are lines in the box of the operation that reads them,
- sizes, keys, copy ids and σ are left out, and an element taken of a tuple is the tuple's box,
- the operations that make one capture are one box; what is captured as it is, is marked on its own box.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import fmean
from typing import Any

import networkx as nx
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

_NOISE = {ops.perturb, ops.weighted_noise, ops.weighted_noise_sum, ops.keyed_random}
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


# --- what is drawn ----------------------------------------------------------------------------------------------------


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


# --- Graphviz ---------------------------------------------------------------------------------------------------------


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


# --- SVG --------------------------------------------------------------------------------------------------------------

_CHARACTER = 6.4
_LINE = 15.0
_GAP_X = 22.0
_GAP_Y = 34.0
_LANE = 8.0
_MARGIN = 20.0


@dataclass(eq=False)
class _Place:
    """A box, or (without one) a point where an edge passes a layer, with its position."""

    box: Box | None
    layer: int
    width: float
    height: float
    bottom: float = 0.0
    """Of its layer."""
    x: float = 0.0
    """Centre."""
    y: float = 0.0
    """Top."""
    above: list[_Place] = field(default_factory=list)
    below: list[_Place] = field(default_factory=list)


def to_svg(graphs: fx.GraphModule | Mapping[str, fx.GraphModule], *, title: str = "", batch: Any = None) -> str:
    """The graph as SVG, in layers from top to bottom; several graphs stand side by side, by name."""
    named = graphs if isinstance(graphs, Mapping) else {"": graphs}
    pictures = {name: picture_of(module, batch) for name, module in named.items()}
    roles = {box.role for picture in pictures.values() for box in picture.boxes}
    if any(box.captured for picture in pictures.values() for box in picture.boxes):
        roles.add("capture")
    legend = [role for role in COLOURS if role in roles]
    top = _MARGIN + 58
    left, bottom = _MARGIN, top
    body: list[str] = []
    for name, picture in pictures.items():
        layers = _layout(picture)
        places = [place for layer in layers for place in layer]
        if not places:
            continue
        shift = left - min(place.x - place.width / 2 for place in places)
        head = 24.0 if name else 0.0
        for place in places:
            place.x += shift
            place.y += top + head
            place.bottom += top + head
        if name:
            body.append(f'<text class="name" x="{left:.1f}" y="{top + 6:.1f}">{escape(name)}</text>')
        body += _draw(picture, layers)
        right = max([place.x + place.width / 2 for place in places] + [left + len(name) * 8.0])
        bottom = max([bottom] + [place.y + place.height for place in places])
        left = right + 3 * _GAP_X
    width = max(left - 3 * _GAP_X + _MARGIN, _legend_width(legend), 2 * _MARGIN + 9.0 * len(title))
    height = bottom + _MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}">',
            f"<title>{escape(title)}</title>",
            _STYLE,
            f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
            f'<text class="head" x="{_MARGIN}" y="{_MARGIN + 10}">{escape(title)}</text>',
            *_legend(legend),
            *body,
            "</svg>",
            "",
        ]
    )


_STYLE = """<style>
text { font-family: Helvetica, Arial, sans-serif; font-size: 11px; fill: #37474f; }
.head { font-size: 16px; font-weight: bold; fill: #102027; }
.name { font-size: 13px; font-weight: bold; }
.op { font-size: 12px; font-weight: bold; fill: #102027; }
.shape { fill: #455a64; text-anchor: end; }
.where { fill: #78909c; }
.edge { fill: none; stroke: #90a4ae; stroke-width: 1.3; }
.tip { fill: #90a4ae; }
</style>"""


def _legend_width(roles: Sequence[str]) -> float:
    return 2 * _MARGIN + sum(30 + _CHARACTER * len(COLOURS[role][2]) for role in roles)


def _legend(roles: Sequence[str]) -> Iterable[str]:
    x = _MARGIN
    for role in roles:
        fill, border, label = COLOURS[role]
        y = _MARGIN + 22
        yield f'<rect x="{x:.1f}" y="{y}" width="12" height="12" rx="3" fill="{fill}" stroke="{border}"/>'
        yield f'<text x="{x + 17:.1f}" y="{y + 10}">{escape(label)}</text>'
        x += 30 + _CHARACTER * len(label)


def _layout(picture: Picture) -> list[list[_Place]]:
    layers = _order(_layers(picture))
    _set_x(layers)
    y = 0.0
    for layer in layers:
        tallest = max(place.height for place in layer)
        for place in layer:
            place.y, place.bottom = y, y + tallest
            if place.box is None:
                place.height = tallest
        y += tallest + _GAP_Y
    return layers


def _size(box: Box) -> tuple[float, float]:
    rows = [f"{box.title}    {box.shape}", _where(box), *box.details]
    width = max(len(row) for row in rows) * _CHARACTER + 22
    height = 12 + _LINE * (1 + bool(_where(box)) + len(box.details)) + (16 if box.captured else 0)
    return max(width, 84.0), height


def _where(box: Box) -> str:
    return box.module


def _layers(picture: Picture) -> list[list[_Place]]:
    """Longest-path layers; what no input feeds stands right above its reader; long edges pass through points."""
    graph = nx.DiGraph()
    graph.add_nodes_from(picture.boxes)
    graph.add_edges_from(picture.edges)
    layer_of: dict[Box, int] = {}
    for number, generation in enumerate(nx.topological_generations(graph)):
        layer_of.update(dict.fromkeys(generation, number))
    inputs = {box for box in picture.boxes if box.role == "input" and box.title.startswith("input ")}
    fed = inputs.union(*(nx.descendants(graph, box) for box in inputs))
    for box in reversed(list(nx.topological_sort(graph))):
        if box not in fed and graph.out_degree(box):
            layer_of[box] = min(layer_of[reader] for reader in graph.successors(box)) - 1
    first = min(layer_of.values(), default=0)
    layers: list[list[_Place]] = [[] for _ in range(max(layer_of.values(), default=-1) - first + 1)]
    place_of: dict[Box, _Place] = {}
    for box in picture.boxes:
        width, height = _size(box)
        place_of[box] = _Place(box, layer_of[box] - first, width, height)
        layers[layer_of[box] - first].append(place_of[box])
    for source, reader in picture.edges:
        upper = place_of[source]
        for layer in range(upper.layer + 1, place_of[reader].layer):
            point = _shared_point(upper, layer)
            if point is None:
                point = _Place(None, layer, _LANE, 0.0)
                layers[layer].append(point)
                _link(upper, point)
            upper = point
        _link(upper, place_of[reader])
    return layers


def _shared_point(upper: _Place, layer: int) -> _Place | None:
    """The point that an earlier long edge of the same source already has in `layer`: edges share their way."""
    return next((place for place in upper.below if place.box is None and place.layer == layer), None)


def _link(upper: _Place, lower: _Place) -> None:
    upper.below.append(lower)
    lower.above.append(upper)


def _order(layers: list[list[_Place]]) -> list[list[_Place]]:
    """Fewest crossings found by barycentre sweeps."""
    best, fewest = [list(layer) for layer in layers], _crossings(layers)
    for sweep in range(12):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            index = {place: number for one in layers for number, place in enumerate(one)}
            weight = {
                place: fmean([index[n] for n in near])
                if (near := place.above if down else place.below)
                else index[place]
                for place in layer
            }
            layer.sort(key=weight.__getitem__)
        crossings = _crossings(layers)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
        if not fewest:
            break
    return best


def _crossings(layers: list[list[_Place]]) -> int:
    count = 0
    for upper, lower in itertools.pairwise(layers):
        index = {place: number for number, place in enumerate(lower)}
        ends = [sorted(index[reader] for reader in place.below) for place in upper]
        flat = [end for group in ends for end in group]
        count += sum(a > b for a, b in itertools.combinations(flat, 2))
    return count


def _set_x(layers: list[list[_Place]]) -> None:
    """Centres near those of the neighbours, in the given order and without overlap."""
    for layer in layers:
        x = 0.0
        for place in layer:
            place.x = x + place.width / 2
            x += place.width + _GAP_X
    for sweep in range(24):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            wanted = []
            weights = []
            for place in layer:
                near = (place.above if down else place.below) or (place.below if down else place.above)
                wanted.append(fmean([other.x for other in near]) if near else place.x)
                straight = place.box is None and all(other.box is None for other in near)
                weights.append(8.0 if straight else 2.0 if place.box is None else 1.0)
            _spread(layer, wanted, weights)


def _spread(layer: Sequence[_Place], wanted: Sequence[float], weights: Sequence[float]) -> None:
    """The positions nearest to `wanted` (least squares) that keep the order and the gaps: pooled adjacent violators."""
    offset = 0.0
    offsets = []
    for number, place in enumerate(layer):
        if number:
            offset += layer[number - 1].width / 2 + _GAP_X + place.width / 2
        offsets.append(offset)
    blocks: list[list[float]] = []  # weight, mean of wanted - offset, members
    for want, weight, shift in zip(wanted, weights, offsets, strict=True):
        blocks.append([weight, want - shift, 1])
        while len(blocks) > 1 and blocks[-2][1] >= blocks[-1][1]:
            weight_b, mean_b, count_b = blocks.pop()
            weight_a, mean_a, count_a = blocks.pop()
            both = weight_a + weight_b
            blocks.append([both, (weight_a * mean_a + weight_b * mean_b) / both, count_a + count_b])
    means = [mean for _, mean, count in blocks for _ in range(int(count))]
    for place, mean, shift in zip(layer, means, offsets, strict=True):
        place.x = mean + shift


def _draw(picture: Picture, layers: list[list[_Place]]) -> list[str]:
    lines = []
    tips = []
    for layer in layers:
        for place in layer:
            for lower in place.below:
                lines.append(f'<path class="edge" d="{_curve(place, lower)}"/>')
                if lower.box is not None:
                    x, y = lower.x, lower.y
                    tips.append(
                        f'<path class="tip" d="M{x - 4:.1f} {y - 7:.1f} L{x + 4:.1f} {y - 7:.1f} L{x:.1f} {y:.1f} Z"/>'
                    )
            if place.box is None:
                x, y = place.x, place.y
                lines.append(f'<path class="edge" d="M{x:.1f} {y:.1f} V{y + place.height:.1f}"/>')
    boxes = [line for layer in layers for place in layer if place.box for line in _draw_box(place, place.box)]
    return [*lines, *tips, *boxes]


def _curve(upper: _Place, lower: _Place) -> str:
    x0, y0 = upper.x, upper.y + upper.height
    x1, y1 = lower.x, lower.y - (6.0 if lower.box is not None else 0.0)
    bend = upper.bottom  # straight down past the taller boxes of its layer, then the curve
    middle = (bend + y1) / 2
    return f"M{x0:.1f} {y0:.1f} V{bend:.1f} C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"


def _draw_box(place: _Place, box: Box) -> Iterable[str]:
    fill, border, _ = COLOURS[box.role]
    left, top = place.x - place.width / 2, place.y
    width, height = place.width, place.height
    yield f"<g><title>{escape(box.tooltip or box.name)}</title>"
    stroke = 2 if box.role == "site" else 1.2
    yield (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" rx="6" fill="{fill}" '
        f'stroke="{border}" stroke-width="{stroke}"/>'
    )
    y = top + 18
    yield f'<text class="op" x="{left + 10:.1f}" y="{y:.1f}">{escape(box.title)}</text>'
    if box.shape:
        yield f'<text class="shape" x="{left + width - 10:.1f}" y="{y:.1f}">{escape(box.shape)}</text>'
    for style, row in [("where", _where(box)), *(("", detail) for detail in box.details)]:
        if row:
            y += _LINE
            yield f'<text class="{style}" x="{left + 10:.1f}" y="{y:.1f}">{escape(row)}</text>'
    if box.captured:
        fill, border, _ = COLOURS["capture"]
        yield (
            f'<rect x="{left + 8:.1f}" y="{top + height - 20:.1f}" width="{width - 16:.1f}" height="15" rx="4" '
            f'fill="{fill}" stroke="{border}" stroke-width="0.8"/>'
        )
        yield f'<text x="{left + 14:.1f}" y="{top + height - 9:.1f}">captured</text>'
    yield "</g>"
