"""Plots as SVG text, by matplotlib (the extra ``plots``): panels of lines, each with its spread."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..passes.errors import OptionError


@dataclass(frozen=True)
class Series:
    """A line: equally many numbers each; `low` and `high` bound what is shaded around it, if given."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes. Series of one name have one colour in all panels of a figure."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False


def require_matplotlib() -> None:
    """Raise `OptionError` if there is no matplotlib: before the work, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"plots need matplotlib, which cannot be imported ({error}). Install it with: pip install 'onward[plots]'. "
            "Tables and JSON do not need it."
        ) from error


def check_plot(file: Path) -> None:
    """Raise `OptionError` unless a plot can be drawn for `file`: before the work, not after it."""
    if file.suffix not in ("", ".svg"):
        raise OptionError(f"--plot {file}: the plot is SVG; name it {file.with_suffix('.svg').name}.")
    require_matplotlib()


def to_svg(panels: Sequence[Panel], caption: str, columns: int = 2) -> str:
    """The panels side by side under one legend, with `caption` (machine, versions, seeds) below.

    The text depends on what is given alone: no date, no random ids.

    Raises:
        OptionError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(one.name for panel in panels for one in panel.series))
    palette = mpl.colormaps["tab10" if len(names) <= 10 else "tab20"]
    colours = {name: palette(number) for number, name in enumerate(names)}
    with mpl.rc_context({"svg.hashsalt": "onward", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(5.2 * columns, 3.6 * rows + 0.9), layout="constrained")
        handles: dict[str, Line2D] = {}
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, number + 1)
            for one in panel.series:
                style = "--" if one.dashed else "-"
                marker = "o" if len(one.x) <= 12 else None
                (line,) = axes.plot(
                    one.x, one.y, color=colours[one.name], linestyle=style, marker=marker, markersize=3, linewidth=1.4
                )
                handles.setdefault(one.name, line)
                if one.low is not None and one.high is not None:
                    axes.fill_between(one.x, one.low, one.high, color=colours[one.name], alpha=0.15, linewidth=0)
            axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold")
            axes.set_xlabel(panel.x_label)
            axes.set_ylabel(panel.y_label)
            if panel.log_x:
                axes.set_xscale("log")
            if panel.log_y:
                axes.set_yscale("log")
            axes.grid(True, which="major", color="#dce3e6", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
        figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False, fontsize=8)
        figure.supxlabel("\n".join(textwrap.wrap(caption, 62 * columns)), fontsize=7, color="#546e7a")
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()
