"""Timelines as SVG, without any other program: workers as rows, a box a task, several timelines on one axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from ...compiler.layout import CHARACTER
from ...compiler.svg import MARGIN, framed
from .timeline import KINDS, Span, Timeline

COLOURS = {
    "clean forward": ("#bbdefb", "#1565c0"),
    "losses": ("#cfd8dc", "#37474f"),
    "gradient": ("#e1bee7", "#7b1fa2"),
    "perturbed run": ("#ffe0b2", "#ef6c00"),
    "feedback learns": ("#c8e6c9", "#2e7d32"),
    "update": ("#ffcdd2", "#c62828"),
    "other": ("#ffffff", "#90a4ae"),
}
"""Kind of task (`timeline.KINDS`) to fill and border, as in drawings of graphs."""
assert COLOURS.keys() >= set(KINDS.values())

_LEFT = MARGIN + 62
"""Where time begins, right of the workers' names."""
_PLOT = 1000.0
_RIGHT = 76.0
"""Room for a row's share."""
_ROW, _BETWEEN, _HEAD = 28.0, 4.0, 24.0
_TICKS = 10
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))

_STYLE = """<style>
text { font-family: Helvetica, Arial, sans-serif; font-size: 11px; fill: #37474f; }
.head { font-size: 16px; font-weight: bold; fill: #102027; }
.name { font-size: 12px; font-weight: bold; fill: #102027; }
.task { text-anchor: middle; fill: #102027; }
.tick { text-anchor: middle; fill: #546e7a; }
.row { fill: #f1f4f5; }
.grid { stroke: #dce3e6; stroke-width: 1; }
.end { stroke: #78909c; stroke-width: 1; }
</style>"""


def to_picture(steps: Mapping[str, Timeline], title: str) -> str:
    """Named steps below each other, on one time axis."""
    longest = max((timeline.seconds for timeline in steps.values()), default=0.0)
    scale, marks = (_PLOT / longest if longest else 0.0), ticks(longest)
    legend = [kind for kind in COLOURS if any(s.kind == kind for t in steps.values() for s in t.spans)]
    top = MARGIN + 54
    body: list[str] = []
    widest = 0.0
    y = top
    for name, timeline in steps.items():
        head = f"{name}: {_describe(timeline)}"
        widest = max(widest, CHARACTER * 1.15 * len(head))
        body.append(f'<text class="name" x="{MARGIN}" y="{y + 14:.1f}">{escape(head)}</text>')
        body += _rows(timeline, y + _HEAD, scale, [moment for moment in marks if moment < timeline.seconds])
        y += _HEAD + timeline.workers * (_ROW + _BETWEEN) + 12
    bottom = y - 8
    width = max(_LEFT + _PLOT + _RIGHT, 2 * MARGIN + 9.0 * len(title), 2 * MARGIN + widest)
    height = bottom + 22 + MARGIN
    return framed([*_legend(legend), *body, *_axis(marks, longest, scale, bottom)], width, height, title, _STYLE)


def _describe(timeline: Timeline) -> str:
    busy = f"{100 * timeline.efficiency:.0f} % busy"
    overlap = f", {show_seconds(timeline.overlap)} of it side by side" if timeline.workers > 1 else ""
    return f"{show_seconds(timeline.seconds)}{overlap}, {busy}"


def show_seconds(seconds: float) -> str:
    """Seconds in a unit that suits them: "1.50 s", "2.41 ms", "37 µs"."""
    factor, unit = _unit(seconds)
    return f"{seconds / factor:.0f} {unit}" if unit == "µs" else f"{seconds / factor:.2f} {unit}"


def _unit(seconds: float) -> tuple[float, str]:
    return next((one for one in _UNITS if seconds >= one[0]), _UNITS[-1])


def ticks(seconds: float) -> list[float]:
    """Round times from 0 on, at most eleven of them: steps of 1, 2 or 5 times a power of ten."""
    if not seconds:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(seconds / _TICKS))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * _TICKS >= seconds * (1 - 1e-9))
    return [number * step for number in range(int(seconds / step * (1 + 1e-9)) + 1)]


def _axis(marks: Iterable[float], seconds: float, scale: float, y: float) -> Iterable[str]:
    factor, unit = _unit(seconds)
    yield f'<line class="end" x1="{_LEFT}" y1="{y:.1f}" x2="{_LEFT + _PLOT}" y2="{y:.1f}"/>'
    for moment in marks:
        x = _LEFT + scale * moment
        yield f'<line class="end" x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{y + 4:.1f}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{y + 17:.1f}">{moment / factor:g} {unit}</text>'


def _legend(kinds: Iterable[str]) -> Iterable[str]:
    x, y = MARGIN, MARGIN + 24
    for kind in kinds:
        fill, border = COLOURS[kind]
        yield f'<rect x="{x:.1f}" y="{y}" width="12" height="12" rx="2" fill="{fill}" stroke="{border}"/>'
        yield f'<text x="{x + 18:.1f}" y="{y + 10}">{escape(kind)}</text>'
        x += 40 + CHARACTER * len(kind)


def _rows(timeline: Timeline, top: float, scale: float, marks: Sequence[float]) -> Iterable[str]:
    for worker in range(timeline.workers):
        y = top + worker * (_ROW + _BETWEEN)
        middle = y + _ROW / 2 + 4
        spans = [span for span in timeline.spans if span.worker == worker]
        share = sum(span.seconds for span in spans) / timeline.seconds if timeline.seconds else 0.0
        end = _LEFT + scale * timeline.seconds
        yield f'<text x="{MARGIN}" y="{middle:.1f}">worker {worker}</text>'
        yield f'<rect class="row" x="{_LEFT}" y="{y:.1f}" width="{end - _LEFT:.1f}" height="{_ROW}"/>'
        for x in (_LEFT + scale * moment for moment in marks):
            yield f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{y + _ROW:.1f}"/>'
        for span in spans:
            yield from _box(span, y, scale)
        yield f'<line class="end" x1="{end:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y + _ROW:.1f}"/>'
        yield f'<text x="{end + 8:.1f}" y="{middle:.1f}">{100 * share:.0f} % busy</text>'


def _box(span: Span, y: float, scale: float) -> Iterable[str]:
    fill, border = COLOURS[span.kind]
    x, width = _LEFT + scale * span.start, scale * span.seconds
    about = f"{span.name} ({span.kind}): {show_seconds(span.seconds)} from {show_seconds(span.start)} on"
    yield f'<g class="span"><title>{escape(about)}</title>'
    yield (
        f'<rect x="{x:.2f}" y="{y + 0.5:.1f}" width="{width:.2f}" height="{_ROW - 1}" rx="{min(2.0, width / 4):.2f}" '
        f'fill="{fill}" stroke="{border}" stroke-width="{min(1.0, max(0.2, width / 6)):.2f}"/>'
    )
    if CHARACTER * len(span.name) + 4 <= width:
        yield f'<text class="task" x="{x + width / 2:.2f}" y="{y + _ROW / 2 + 4:.1f}">{escape(span.name)}</text>'
    yield "</g>"
