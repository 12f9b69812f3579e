"""Text in columns: tables, numbers with units, wrapped lines."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 100
"""Columns of every text."""

NO_BREAK = "\N{NO-BREAK SPACE}"
"""A space at which no cell of a table is broken; the table shows an ordinary one."""


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], align: str, wrap: Sequence[str] = (), width: int = WIDTH
) -> str:
    """Rows under headings, at most `width` wide: the columns in `wrap` are wrapped, else the widest one shortened."""
    widths = [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]
    room = width - 2 - 2 * (len(columns) - 1)
    flexible = [columns.index(name) for name in wrap] or [place for place, how in enumerate(align) if how == "l"]
    while sum(widths) > room and max(widths[place] for place in flexible) > 8:
        widest = max(flexible, key=widths.__getitem__)
        widths[widest] -= 1
    lines = []
    for number, row in enumerate([columns, *rows]):
        cells = [
            textwrap.wrap(value, widths[place], break_on_hyphens=False) or [""]
            if number and columns[place] in wrap
            else [shorten(value, widths[place])]
            for place, value in enumerate(row)
        ]
        for depth in range(max(map(len, cells))):
            parts = [
                f"{cell[depth] if depth < len(cell) else '':{'>' if how == 'r' else '<'}{one}}"
                for cell, how, one in zip(cells, align, widths, strict=True)
            ]
            lines.append(("  " + "  ".join(parts)).rstrip().replace(NO_BREAK, " "))
        if number == 0:
            lines.append("  " + "─" * (sum(widths) + 2 * (len(columns) - 1)))
    return "\n".join(lines)


def quantity(number: float) -> str:
    """1234567 as "1.23M"; "–" for nothing."""
    return magnitude(number) if number else "–"


def magnitude(number: float) -> str:
    """1234567 as "1.23M"; 0 as "0"."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def size(count: float) -> str:
    """Bytes: "4.0 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    """Seconds: "1.50 s", "2.5 ms"."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def shorten(value: str, width: int) -> str:
    """`value`, with an ellipsis at the end if it is longer than `width`."""
    return value if len(value) <= width else value[: width - 1] + "…"


def wrapped(value: str, first: str) -> str:
    """`value` in lines of `WIDTH`, `first` before the first and as many spaces before the others."""
    return textwrap.fill(
        value, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
