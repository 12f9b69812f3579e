"""The evidence page as Markdown: claims with what came out, then every experiment with its command and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from claims import CLAIMS
from experiments import EXPERIMENTS, Experiment, Result
from judges import Finding
from reading import Results, measured, runs, show, show_share, squared_errors

from onward.evidence.fidelity_report import spread
from onward.evidence.methods import METHODS
from onward.evidence.plots import Panel, Series, to_svg
from onward.evidence.provenance import describe

INTRODUCTION = """# Evidence

Every claim of the README, of [method.md](method.md) and of the papers that can be tested on two CPU cores: who makes
it, the command that tests it, and what came out. No number on this page was typed: `make evidence` runs all commands
below, judges the claims by their numbers, and writes this page and its figures anew (`benchmarks/evidence/`). A claim
that does not hold stays here and says so.

{machine}. Every command ran with one thread, two at a time, so that its seconds are those of a busy machine. Seeds: 0
for a gradient's fidelity; 0, 1 and 2 where something is trained, 3 for tuning. {duration}

Intervals in brackets hold with 95 %: they are about the noise of the estimate, at these weights and on this batch.

## Claims

| claim | who makes it | verdict | what came out | measured by |
|---|---|---|---|---|
"""

NOT_HERE = """
Not tested here: whatever needs a GPU (the paper's speed-up of 2.04 by its pipeline; `python benchmarks/streams.py` and
`python benchmarks/step.py --device cuda` are what to run there), and the papers' accuracies on CIFAR and larger sets,
which no package ships. Further measurements, of single pieces and on more data, are in [results.md](results.md).

## Experiments
"""


def write(results: Results, folder: Path, minutes: float | None) -> dict[str, Finding]:
    """Write ``evidence.md`` to `folder`, and the figures of fidelity at equal memory beside those the commands drew.

    Args:
        minutes: wall time of all commands; None if some were not run now.
    """
    findings = {claim.text: claim.judge(results) for claim in CLAIMS}
    machine = next(result.data["machine"] for result in results.values() if result.data)
    seconds = sum(result.seconds for result in results.values())
    duration = (
        f"All commands together took {minutes:.0f} minutes."
        if minutes
        else f"They were not run in one go: {seconds / 60:.0f} minutes, added up, on a machine that had other work."
    )
    parts = [INTRODUCTION.format(machine=describe(machine), duration=duration)]
    for claim in CLAIMS:
        found = findings[claim.text]
        links = ", ".join(f"[{key}](#{key})" for key in claim.experiments)
        parts.append(f"| {claim.text} | {claim.source} | **{found.verdict}** | {found.found} | {links} |\n")
    parts.append(NOT_HERE)
    figures = folder / "evidence"
    (figures / "bits.svg").write_text(_bits_figure(results["bits"], describe(machine)))
    for experiment in EXPERIMENTS:
        parts.append(_section(experiment, results[experiment.key], figures))
    text = "".join(parts)
    (folder / "evidence.md").write_text(text)
    return findings


def _section(experiment: Experiment, result: Result, figures: Path) -> str:
    drawn = (figures / f"{experiment.key}.svg").exists()
    figure = f"\n![{experiment.title}](evidence/{experiment.key}.svg)\n" if drawn else ""
    return (
        f'\n<a id="{experiment.key}"></a>\n### {experiment.title}\n\n{experiment.about}\n\n    {experiment.command}\n\n'
        f"{_tables(result)}{figure}\n{result.seconds:.0f} seconds.\n"
    )


def _tables(result: Result) -> str:
    data = result.data
    if data is None:
        return f"{result.output.strip().splitlines()[-1]}\n"
    for key, show_as in _TABLES.items():
        if key in data:
            return show_as(data, result)
    raise AssertionError(f"nothing is known of the result of {result.command}")


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _fidelity(data: Mapping[str, Any], result: Result) -> str:
    """Of a sweep over copies what is left at the most of them, and slopes; of another all combinations."""
    found = list(measured(result))
    lines = data["scaling"]
    if not lines:
        header = [*found[0]["settings"], "cosine", "error", "bias", "deviation"]
        return _markdown(
            header,
            [
                [
                    *one["settings"].values(),
                    *(show(one["whole"][name]) for name in ("cosine", "error", "bias", "deviation")),
                ]
                for one in found
            ],
        )
    rows = []
    for line in lines:
        of = [one for one in found if line["settings"].items() <= one["settings"].items()]
        last = max(of, key=lambda one: int(one["settings"]["copies"]))
        row = [*line["settings"].values(), last["settings"]["copies"], f"{last['forwards']:.3g}"]
        row += [show(last["whole"][name]) for name in ("cosine", "error", "bias")]
        row += [show(line["deviation"]), show(line["error"])]
        trained = [one for one in of if "trained" in one]
        if trained:
            ends = {one["settings"]["copies"]: [run[-1] for run in one["trained"]["accuracies"]] for one in trained}
            row.append("; ".join(f"{copies}: {spread(values)}" for copies, values in ends.items()))
        rows.append(row)
    header = [
        *lines[0]["settings"],
        "copies",
        "forwards",
        "cosine",
        "error",
        "bias",
        "slope of deviation",
        "slope of error",
    ]
    return _markdown([*header, "accuracy by copies"] if len(rows[0]) > len(header) else header, rows)


def _comparison(data: Mapping[str, Any], result: Result) -> str:
    rows = []
    pairs = {(one["method"], one["goal"]): one for one in data["ratios"] if one["subject"] == "auto"}
    for key, method in data["methods"].items():
        top = max(method["mean"], key=lambda one: one["accuracy"])
        settings = ", ".join(
            [f"lr {method['lr']:.2g}", *(f"{name} {value}" for name, value in method["settings"].items())]
        )
        times = [pairs[key, goal]["times"] if (key, goal) in pairs else None for goal in ("best", "near")]
        rows.append(
            [
                METHODS[key].name,
                settings,
                f"{top['accuracy']:.4f} [{top['low']:.4f}, {top['high']:.4f}]",
                f"{method['mean'][-1]['accuracy']:.4f}",
                f"{top['forwards']:.1f}{'+' if (key, 'best') in pairs and pairs[key, 'best']['rising'] else ''}",
                f"{top['seconds']:.1f}",
                *("–" if value is None else f"{value:.1f}" for value in times),
            ]
        )
    header = ["method", "chosen", "best mean accuracy [least, most]", "in the end", "forwards to it", "seconds to it"]
    return (
        f"Adam, batches of {data['task']['batch_size']}, {data['task']['samples']:,} training samples; "
        f"forwards are counted for each. {data['convention']} +: still rising when the budget ended.\n\n"
        + _markdown([*header, "÷ `auto`'s to the same", "÷, one point below"], rows)
        + "".join(f"\n{METHODS[key].name} left out: {reason}\n" for key, reason in data["refused"].items())
    )


def _accuracy(data: Mapping[str, Any], result: Result) -> str:
    keys = list(dict.fromkeys((one["case"], one["row"]) for one in data["runs"]))
    rows = []
    for case, row in keys:
        perturbed = "–" if row == "bp" else f"{mean(runs(result, case, row, 'perturbed_forwards')):.2f}"
        seconds = f"{mean(runs(result, case, row, 'seconds')):.1f}"
        rows.append([case, row, spread(runs(result, case, row)), perturbed, seconds])
    return _markdown(["model", "method", "test accuracy", "perturbed forwards", "seconds"], rows)


def _variance(data: Mapping[str, Any], result: Result) -> str:
    columns = list(data["errors"])
    shares = [squared_errors(result, column) for column in columns]
    rows = [[name, *(show_share(of[name]) for of in shares)] for name in shares[0]]
    sigmas = [
        [f"{one['start']:g}", "learned" if one["learned"] else "fixed", spread([run[0] for run in one["runs"]])]
        for one in data["sigmas"]
    ]
    return (
        _markdown(["variant", *columns], rows)
        + "\nσ of `mlp`, 8 epochs, 32 Gaussian copies, one-sided:\n\n"
        + _markdown(["σ at first", "", "test accuracy"], sigmas)
    )


def _memory(data: Mapping[str, Any], result: Result) -> str:
    rows = [
        [
            one["estimator"],
            str(one["copies"]),
            str(one["chunk"]),
            f"{one['captures_mib']:.2f}",
            f"{one['measured_mib']:.1f}",
        ]
        for one in data["growth"]
    ]
    return _markdown(["captures", "copies", "in chunks of", "captures, MiB", "peak of a step, MiB"], rows)


def _speed(data: Mapping[str, Any], result: Result) -> str:
    rows = [
        [
            one["where"],
            one["noise"],
            str(one["copies"]),
            f"{one['ns']['compiled']:.2f}",
            f"{one['ratio']['NumPy']['median']:.1f}",
        ]
        for one in data["elements"]
    ]
    return _markdown(["", "noise", "copies", "ns a number, compiled", "NumPy ÷ compiled"], rows)


_TABLES = {
    "scaling": _fidelity,
    "ratios": _comparison,
    "runs": _accuracy,
    "sigmas": _variance,
    "growth": _memory,
    "elements": _speed,
}
"""By a key that the JSON of one kind of experiment has."""

_BITS = {"stochastic": 1, "stochastic-2": 2, "stochastic-4": 4, "stochastic-8": 8, "exact": 32}


def _bits_figure(result: Result, caption: str) -> str:
    """Error against copies, and against bits kept for each number: copies times bits of a copy."""
    copies, memory = [], []
    for capture, bits in _BITS.items():
        found = sorted(measured(result, capture=capture), key=lambda one: int(one["settings"]["copies"]))
        counts = [float(one["settings"]["copies"]) for one in found]
        ends = [[one["whole"]["error"][end] for one in found] for end in ("value", "low", "high")]
        name = "exact, 32 bits" if bits == 32 else f"stochastic, {bits} bit{'s' if bits > 1 else ''}"
        copies.append(Series(name, counts, *ends))
        memory.append(Series(name, [count * bits for count in counts], *ends))
    panels = [
        Panel("Error of one step, by copies", "copies", "relative error", copies, log_x=True, log_y=True),
        Panel(
            "Error of one step, by memory",
            "bits kept for each number (copies × bits)",
            "relative error",
            memory,
            log_x=True,
            log_y=True,
        ),
    ]
    return to_svg(panels, f"mlp on digits, after 1 epoch, seed 0. {caption}")
