"""A sweep's fidelities as rows of text, as data, and as panels to plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from .fidelity_statistics import Agreement, Estimate
from .plots import Panel, Series
from .sweep import Axis, Measured, Scaling, Settings

QUANTITIES: dict[str, tuple[str, Callable[[Agreement], Estimate]]] = {
    "cosine": ("Cosine of one step", lambda of: of.cosine),
    "error": ("Relative error of one step", lambda of: of.error),
    "bias": ("Bias, relative", lambda of: of.bias),
    "deviation": ("Standard deviation, relative", lambda of: of.deviation),
}
"""By column: the title of its panel, and where it is."""

SLOPE = -0.5
"""Of the error of independent draws; drawn dashed where copies are swept."""


def cell(of: Estimate) -> str:
    """``0.123 (0.11–0.14)``; "–" where there is no number."""
    if math.isnan(of.value):
        return "–"
    return f"{_short(of.value)} ({_short(of.low)}–{_short(of.high)})"


def cells(of: Agreement) -> list[str]:
    """One text for each of `QUANTITIES`."""
    return [cell(read(of)) for _, read in QUANTITIES.values()]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation: ``0.9444 ± 0.0102``; of one value that value."""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def label(settings: Settings, without: str = "") -> str:
    """``capture=sign, copies=4``."""
    return ", ".join(f"{name}={value}" for name, value in settings.items() if name != without)


def to_json(found: Iterable[Measured], slopes: Iterable[Scaling]) -> dict[str, Any]:
    """Everything as plain values; NaN where a number is relative to a gradient of zero."""
    return {
        "measured": [
            {
                "settings": dict(one.settings),
                "seconds": one.seconds,
                **({"refusal": one.refusal} if one.fidelity is None else one.fidelity.to_json()),
                **({} if one.trained is None else {"trained": asdict(one.trained)}),
                **({"untrained": one.untrained} if one.untrained else {}),
            }
            for one in found
        ],
        "scaling": [asdict(one) for one in slopes],
    }


def swept_number(axes: Sequence[Axis]) -> Axis | None:
    """What is plotted along: copies, or else the first axis of at least two numbers."""
    numeric = [axis for axis in axes if len(axis.numbers) > 1]
    return next((axis for axis in numeric if axis.name == "copies"), numeric[0] if numeric else None)


def panels(found: Sequence[Measured], axes: Sequence[Axis]) -> list[Panel]:
    """A panel for each of `QUANTITIES`: of the whole model over the swept number, or of the sites where none is swept.

    Over copies error and deviation are log-log, with a dashed line of slope -1/2.
    """
    measured = [one for one in found if one.fidelity is not None]
    axis = swept_number(axes)
    if axis is None:
        return [_by_site(measured, name) for name in QUANTITIES]
    return [_over(measured, axis, name) for name in QUANTITIES]


def _over(measured: Sequence[Measured], axis: Axis, quantity: str) -> Panel:
    title, read = QUANTITIES[quantity]
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for one in measured:
        assert one.fidelity is not None
        point = float(one.settings[axis.name]), read(one.fidelity.whole)
        lines.setdefault(label(one.settings, axis.name) or "estimate", []).append(point)
    copies = axis.name == "copies"
    positive = any(of.value > 0 for points in lines.values() for _, of in points)  # else nothing is on a log axis
    log = copies and quantity in ("error", "deviation") and positive
    series = [_series(name, sorted(points, key=lambda point: point[0]), log) for name, points in lines.items()]
    return Panel(title, axis.name, quantity, [*series, *(_reference(series) if log else [])], copies, log)


def _by_site(measured: Sequence[Measured], quantity: str) -> Panel:
    title, read = QUANTITIES[quantity]
    series = []
    for one in measured:
        assert one.fidelity is not None
        points = [(float(number), read(of)) for number, of in enumerate(one.fidelity.sites.values(), start=1)]
        series.append(_series(label(one.settings) or "estimate", points, False))
    return Panel(title, "site, in order of the forward", quantity, series)


def _series(name: str, points: Sequence[tuple[float, Estimate]], log: bool) -> Series:
    """A line with its intervals; a logarithmic axis has no 0, and leaves it out."""

    def shown(values: Iterable[float]) -> list[float]:
        return [math.nan if log and value <= 0 else value for value in values]

    estimates = [of for _, of in points]
    return Series(
        name,
        [at for at, _ in points],
        shown(of.value for of in estimates),
        shown(of.low for of in estimates),
        shown(of.high for of in estimates),
    )


def _reference(series: Sequence[Series]) -> list[Series]:
    """A line of slope -1/2 from the first point of the first series that has one."""
    for one in series:
        if len(one.x) > 1 and one.y[0] > 0:
            line = [one.y[0] * (at / one.x[0]) ** SLOPE for at in one.x]
            return [Series("slope -1/2", one.x, line, dashed=True)]
    return []


def _short(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.3f}" if 0.01 <= abs(value) < 10 else f"{value:.2g}" if abs(value) < 1000 else f"{value:.1e}"
