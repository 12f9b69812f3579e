"""Graphs as SVG, without any other program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from torch import fx

from .layout import CHARACTER, GAP_X, LINE, Place, layout
from .picture import COLOURS, Box, picture_of

MARGIN = 20.0


def to_svg(graphs: fx.GraphModule | Mapping[str, fx.GraphModule], *, title: str = "", batch: Any = None) -> str:
    """The graph as SVG, in layers from top to bottom; several graphs stand side by side, by name."""
    named = graphs if isinstance(graphs, Mapping) else {"": graphs}
    pictures = {name: picture_of(module, batch) for name, module in named.items()}
    roles = {box.role for picture in pictures.values() for box in picture.boxes}
    if any(box.captured for picture in pictures.values() for box in picture.boxes):
        roles.add("capture")
    legend = [role for role in COLOURS if role in roles]
    top = MARGIN + 58
    left, bottom = MARGIN, top
    body: list[str] = []
    for name, picture in pictures.items():
        layers = layout(picture)
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
        body += _draw(layers)
        right = max([place.x + place.width / 2 for place in places] + [left + len(name) * 8.0])
        bottom = max([bottom] + [place.y + place.height for place in places])
        left = right + 3 * GAP_X
    width = max(left - 3 * GAP_X + MARGIN, _legend_width(legend), 2 * MARGIN + 9.0 * len(title))
    height = bottom + MARGIN
    return framed([*_legend(legend), *body], width, height, title, _STYLE)


def framed(body: Iterable[str], width: float, height: float, title: str, style: str) -> str:
    """A drawing of this size on white, `title` at its head in the class ``head`` of `style`."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}">',
            f"<title>{escape(title)}</title>",
            style,
            f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
            f'<text class="head" x="{MARGIN}" y="{MARGIN + 10}">{escape(title)}</text>',
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
    return 2 * MARGIN + sum(30 + CHARACTER * len(COLOURS[role][2]) for role in roles)


def _legend(roles: Sequence[str]) -> Iterable[str]:
    x = MARGIN
    for role in roles:
        fill, border, label = COLOURS[role]
        y = MARGIN + 22
        yield f'<rect x="{x:.1f}" y="{y}" width="12" height="12" rx="3" fill="{fill}" stroke="{border}"/>'
        yield f'<text x="{x + 17:.1f}" y="{y + 10}">{escape(label)}</text>'
        x += 30 + CHARACTER * len(label)


def _draw(layers: list[list[Place]]) -> list[str]:
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


def _curve(upper: Place, lower: Place) -> str:
    x0, y0 = upper.x, upper.y + upper.height
    x1, y1 = lower.x, lower.y - (6.0 if lower.box is not None else 0.0)
    bend = upper.bottom  # straight down past the taller boxes of its layer, then the curve
    middle = (bend + y1) / 2
    return f"M{x0:.1f} {y0:.1f} V{bend:.1f} C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"


def _draw_box(place: Place, box: Box) -> Iterable[str]:
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
    for style, row in [("where", box.module), *(("", detail) for detail in box.details)]:
        if row:
            y += LINE
            yield f'<text class="{style}" x="{left + 10:.1f}" y="{y:.1f}">{escape(row)}</text>'
    if box.captured:
        fill, border, _ = COLOURS["capture"]
        yield (
            f'<rect x="{left + 8:.1f}" y="{top + height - 20:.1f}" width="{width - 16:.1f}" height="15" rx="4" '
            f'fill="{fill}" stroke="{border}" stroke-width="0.8"/>'
        )
        yield f'<text x="{left + 14:.1f}" y="{top + height - 9:.1f}">captured</text>'
    yield "</g>"
