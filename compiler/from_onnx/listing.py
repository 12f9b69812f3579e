"""The tables of docs/onnx-import.md, from the table of operators: ``python -m onward.compiler.from_onnx.listing``."""

from __future__ import annotations

from . import FAMILIES, OPERATORS
from .classical import COEFFICIENTS
from .file import onnx_package
from .quantised import EXPANDED


def table() -> str:
    """A row a family, with its operators; below it what of an operator is not read."""
    rows = ["| family | operators |", "|---|---|"]
    for family in FAMILIES:
        own = {name for name, row in OPERATORS.items() if _defined_in(row.run, family.__name__)}
        own |= set(EXPANDED) if family.__name__.endswith("quantised") else set()
        title = (family.__doc__ or "").partition(":")[0].partition(",")[0].partition("\n")[0].rstrip(".")
        rows.append(f"| {title} | {', '.join(f'`{name}`' for name in sorted(own))} |")
    limits: dict[str, list[str]] = {}
    for name, row in sorted(OPERATORS.items()):
        if row.limits:
            limits.setdefault(row.limits, []).append(f"`{name}`")
    notes = [f"- {', '.join(names)}: {limit}." for limit, names in limits.items()]
    return "\n".join([*rows, "", *notes])


def weights() -> str:
    """A line an operator that has weights: the names that ONNX gives to their positions."""
    defs = onnx_package().defs
    positions: dict[str, list[str]] = {}
    for name, row in sorted(OPERATORS.items()):
        if not row.trains:
            continue
        inputs = () if name in COEFFICIENTS else defs.get_schema(name).inputs
        if name in COEFFICIENTS:
            names = ", ".join(COEFFICIENTS[name])
        elif len(inputs) == 1:
            names = "every input"
        else:
            names = ", ".join(inputs[position].name for position in sorted(row.trains))
        positions.setdefault(names, []).append(f"`{name}`")
    return "\n".join(f"- {', '.join(operators)}: {names}" for names, operators in positions.items())


def _defined_in(run: object, module: str) -> bool:
    return getattr(run, "__module__", "") == module


if __name__ == "__main__":
    print(weights(), table(), sep="\n\n")
