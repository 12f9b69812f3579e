"""What ``onward fidelity`` prints: a row a combination, a row a site, and slopes over the copies."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ..evidence import fidelity_report
from ..evidence.sweep import Axis, Measured, Scaling

_LEGEND = (
    "In brackets 95 % intervals; a bias from 0 on: none was found. Error, bias and deviation relative to the exact "
    "gradient's length, by autograd in {}; – where that is zero. forwards: a sample's in a step, but the clean one."
)
_TRAINED = "Accuracy: on the test data after the last epoch, mean and standard deviation of the runs."
_NO_VARIANCE = (
    "Deviation 0: these gradients hold no noise of their own step (correction none), so all error is bias, of what was "
    "learned here from this seed."
)


def print_tables(
    console: Console, found: Sequence[Measured], axes: Sequence[Axis], slopes: Sequence[Scaling], per_site: bool
) -> None:
    """Everything that was measured, and what was refused with the reason."""
    measured = [one for one in found if one.fidelity is not None]
    tables = [
        *([_table(measured, axes)] if measured else []),
        *([_site_table(measured, axes)] if measured and per_site else []),
        *([_scaling_table(slopes, [axis for axis in axes if axis.name != "copies"])] if slopes else []),
    ]
    for table in tables:
        console.print(table)
        console.print()
    for one in found:
        if one.untrained:
            console.print(f"{fidelity_report.label(one.settings)}: not trained. {one.untrained}", markup=False)
        if one.fidelity is None:
            console.print(f"{fidelity_report.label(one.settings)}: not measured. {one.refusal}", markup=False)
    fidelities = [one.fidelity for one in measured if one.fidelity is not None]
    if fidelities:
        console.print(_LEGEND.format(fidelities[0].dtype), style="dim", markup=False)
    if any(one.trained is not None for one in measured):
        console.print(_TRAINED, style="dim", markup=False)
    if any(not one.varies for one in fidelities):
        console.print(_NO_VARIANCE, style="dim", markup=False)


def _new_table(axes: Sequence[Axis], columns: Sequence[str], title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for axis in axes:
        table.add_column(axis.name, overflow="fold")
    for heading in columns:
        if heading == "site":
            table.add_column(heading, overflow="fold", min_width=12)
        else:
            table.add_column(heading, justify="right")
    return table


def _table(measured: Sequence[Measured], axes: Sequence[Axis]) -> Table:
    """Fidelity, and where there was training what came of it."""
    trained = any(one.trained is not None for one in measured)
    table = _new_table(axes, [*fidelity_report.QUANTITIES, "forwards", *(["accuracy"] if trained else [])])
    for one in measured:
        assert one.fidelity is not None
        cells = [*fidelity_report.cells(one.fidelity.whole), f"{one.fidelity.forwards:.3g}"]
        if one.trained is not None:
            cells.append(fidelity_report.spread(one.trained.last))
        table.add_row(*one.settings.values(), *cells)
    return table


def _site_table(measured: Sequence[Measured], axes: Sequence[Axis]) -> Table:
    table = _new_table(axes, ["site", *fidelity_report.QUANTITIES], title="Sites")
    for one in measured:
        assert one.fidelity is not None
        for site, of in one.fidelity.sites.items():
            table.add_row(*one.settings.values(), site, *fidelity_report.cells(of))
        table.add_section()
    return table


def _scaling_table(slopes: Sequence[Scaling], axes: Sequence[Axis]) -> Table:
    columns = ["slope of deviation", "slope of error", "bias at the most copies"]
    table = _new_table(axes, columns, title="What copies buy: slopes of logarithms")
    for one in slopes:
        estimates = (one.deviation, one.error, one.floor)
        table.add_row(*one.settings.values(), *(fidelity_report.cell(each) for each in estimates))
    return table
