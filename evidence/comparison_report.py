"""What came of a comparison: tables, plot and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from .comparison import VALIDATION_SHARE, Comparison, Mean, first_at, mean_curve
from .methods import CONVENTION, METHODS
from .plots import Panel, Series, to_svg

SUBJECTS = ("auto", "auto-op")
"""The methods whose forwards all others' are measured in."""

NEAR = 0.01
"""How far below a method's best accuracy "near" it is: one point. The best itself may be the noise of one mark."""


@dataclass(frozen=True)
class Ratio:
    """Forwards of a method to an accuracy of its own, and of one of `SUBJECTS` to the same."""

    method: str
    subject: str
    goal: str
    """``"best"`` or ``"near"``."""
    accuracy: float
    forwards: float
    subject_forwards: float | None
    """None: it did not get there."""
    rising: bool
    """Whether the method's best is at one of its last two marks: with more forwards it would get further."""

    @property
    def times(self) -> float | None:
        """How many times as many the method needs."""
        return None if not self.subject_forwards else self.forwards / self.subject_forwards


def curves(found: Comparison) -> dict[str, list[Mean]]:
    """Each raced method's mean over the seeds."""
    return {key: mean_curve(entry, found.budget) for key, entry in found.entries.items()}


def ratios(means: Mapping[str, list[Mean]]) -> list[Ratio]:
    """Every method beside every subject: forwards to the method's best mean accuracy, and to one point below."""
    found = []
    for subject in SUBJECTS:
        for key, curve in means.items():
            if key == subject or subject not in means:
                continue
            best = max(one.accuracy for one in curve)
            rising = first_at(curve, best) in curve[-2:]
            for goal, accuracy in (("best", best), ("near", best - NEAR)):
                own, its = first_at(curve, accuracy), first_at(means[subject], accuracy)
                assert own is not None
                spent = None if its is None else its.forwards
                found.append(Ratio(key, subject, goal, accuracy, own.forwards, spent, rising))
    return found


def results_table(found: Comparison) -> Table:
    """A row a method: what was chosen, best mean accuracy, forwards and seconds to it."""
    shown = Table(
        title="Best mean test accuracy, and what it took",
        title_justify="left",
        caption=CONVENTION,
        caption_justify="left",
    )
    shown.add_column("method", no_wrap=True)
    for heading in ("lr", "settings", "best accuracy", "forwards", "seconds", "in the end", "ms a forward"):
        shown.add_column(heading, justify="right")
    for key, curve in curves(found).items():
        entry = found.entries[key]
        top = first_at(curve, max(one.accuracy for one in curve))
        assert top is not None
        last = curve[-1]
        settings = ", ".join(f"{name} {value}" for name, value in entry.chosen.settings.items())
        ended = sum(bool(one.ended) for one in entry.curves.values())
        shown.add_row(
            METHODS[key].name + (f" ({ended} of {len(entry.curves)} diverged)" if ended else ""),
            f"{entry.chosen.lr:.2g}",
            settings or "–",
            f"{top.accuracy:.4f} [{top.low:.4f}, {top.high:.4f}]",
            f"{top.forwards:.1f}",
            f"{top.seconds:.2f}",
            f"{last.accuracy:.4f}",
            f"{1e3 * last.seconds / last.forwards:.1f}" if last.forwards else "–",
        )
    for key in found.refused:
        shown.add_row(METHODS[key].name, *["–"] * 6, "left out")
    return shown


def ratios_table(found: Comparison, subject: str) -> Table | None:
    """Forwards of every method to its best, and of `subject` to the same accuracy; None where it was not raced."""
    means = curves(found)
    pairs: dict[str, dict[str, Ratio]] = {}
    for one in ratios(means):
        if one.subject == subject:
            pairs.setdefault(one.method, {})[one.goal] = one
    if not pairs:
        return None
    name = METHODS[subject].name
    shown = Table(
        title=f"Forwards to a method's best accuracy, beside {name}'s to the same",
        title_justify="left",
        caption="+: still rising when the budget ended, so that its best, and how many times, depend on the budget."
        if any(goals["best"].rising for goals in pairs.values())
        else None,
        caption_justify="left",
    )
    shown.add_column("method", no_wrap=True)
    for heading in ("its best", "its forwards", f"{name}'s", "times", f"times, {NEAR:g} below"):
        shown.add_column(heading, justify="right")
    for key, goals in pairs.items():
        best = goals["best"]
        shown.add_row(
            METHODS[key].name,
            f"{best.accuracy:.4f}",
            f"{best.forwards:.1f}{'+' if best.rising else ''}",
            "not reached" if best.subject_forwards is None else f"{best.subject_forwards:.1f}",
            *("–" if goals[goal].times is None else f"{goals[goal].times:.1f}" for goal in ("best", "near")),
        )
    return shown


def plot(found: Comparison, title: str, caption: str) -> str:
    """SVG: accuracy against forwards and against seconds."""
    means = curves(found)

    def panel(label: str, unit: str, attribute: str) -> Panel:
        series = []
        for key, curve in means.items():
            shown = [one for one in curve if getattr(one, attribute) > 0]
            series.append(
                Series(
                    METHODS[key].name,
                    [getattr(one, attribute) for one in shown],
                    [one.accuracy for one in shown],
                    [one.low for one in shown],
                    [one.high for one in shown],
                    dashed=key not in SUBJECTS,
                )
            )
        return Panel(f"{title}: by {label}", unit, "test accuracy", series, log_x=True)

    panels = [
        panel("forwards", "forwards a training sample", "forwards"),
        panel("seconds", "seconds of training", "seconds"),
    ]
    return to_svg(panels, caption)


def to_json(found: Comparison, task: Mapping[str, Any], machine: Mapping[str, Any]) -> dict[str, Any]:
    """Everything: task, machine, settings, every curve and every candidate of the tuning."""
    means = curves(found)
    return {
        "kind": "onward comparison",
        "version": 1,
        "task": dict(task),
        "machine": dict(machine),
        "budget": found.budget,
        "convention": CONVENTION,
        "seeds": list(found.seeds),
        "interrupted": found.interrupted,
        "tuning": {
            "seed": found.tuning_seed,
            "lr_grid": list(found.lr_grid),
            "validation_share": VALIDATION_SHARE,
        },
        "methods": {
            key: {
                "name": METHODS[key].name,
                "about": METHODS[key].about,
                "paper": METHODS[key].paper,
                "lr": entry.chosen.lr,
                "settings": dict(entry.chosen.settings),
                "candidates": [asdict(candidate) for candidate in entry.candidates],
                "compile_seconds": entry.compile_seconds,
                "runs": {str(seed): asdict(curve) for seed, curve in entry.curves.items()},
                "mean": [asdict(one) for one in means[key]],
            }
            for key, entry in found.entries.items()
        },
        "refused": dict(found.refused),
        "failed": dict(found.failed),
        "ratios": [{**asdict(one), "times": one.times} for one in ratios(means)],
    }
