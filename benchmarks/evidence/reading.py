"""Reading what the experiments wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import mean
from typing import Any

from experiments import Result

from onward.evidence.fidelity_report import cell
from onward.evidence.fidelity_statistics import Estimate

Results = Mapping[str, Result]
"""Results by the key of their experiment."""


def measured(result: Result, **settings: Any) -> Iterator[dict[str, Any]]:
    """The combinations of a sweep that were measured, of those with these settings."""
    wanted = {name: str(value) for name, value in settings.items()}
    for one in result.data["measured"]:
        if "refusal" not in one and wanted.items() <= one["settings"].items():
            yield one


def whole(result: Result, **settings: Any) -> dict[str, Any]:
    """The fidelity of the whole model in the one combination with these settings."""
    (one,) = measured(result, **settings)
    found: dict[str, Any] = one["whole"]
    return found


def show(estimate: Mapping[str, Any]) -> str:
    """``0.12 (0.11–0.13)``; "–" where there is no number."""
    return cell(Estimate(**{name: float("nan") if value is None else value for name, value in estimate.items()}))


def variance(fidelity: Mapping[str, Any]) -> float:
    """Over the squared length of the gradient."""
    return float(fidelity["deviation"]["value"] ** 2)


def show_share(value: float) -> str:
    """``0.57``, ``715``."""
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def runs(result: Result, case: str, row: str, what: str = "test_accuracy") -> list[float]:
    """A number of every seed of a row of ``benchmarks/accuracy.py``."""
    return [one[what] for one in result.data["runs"] if (one["case"], one["row"]) == (case, row)]


def cases(result: Result) -> list[str]:
    """The cases of ``benchmarks/accuracy.py`` that ran, in order."""
    return list(dict.fromkeys(one["case"] for one in result.data["runs"]))


def best(result: Result, method: str) -> float:
    """The best mean test accuracy of a method of ``onward compare``."""
    return float(max(one["accuracy"] for one in result.data["methods"][method]["mean"]))


def ratio(result: Result, method: str, goal: str = "best") -> dict[str, Any]:
    """Forwards of a method to its best, and of ``auto`` to the same accuracy."""
    (one,) = [
        one for one in result.data["ratios"] if (one["method"], one["subject"], one["goal"]) == (method, "auto", goal)
    ]
    found: dict[str, Any] = one
    return found


def squared_errors(result: Result, column: str) -> dict[str, float]:
    """Mean squared error of every variant of ``benchmarks/variance.py``, over that of antithetic pairs."""
    found = result.data["errors"][column]
    return {name: mean(values) / mean(found["antithetic"]) for name, values in found.items()}
