"""A report, a refusal and the table of rules as text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from ..passes.rules import support_matrix
from .columns import NO_BREAK, WIDTH, duration, quantity, shorten, size, table, wrapped
from .report import Refusal, Report


def text(report: Report) -> str:
    """The report at `WIDTH` columns: overview, passes, sites, perturbed runs, learned feedback, gradient subgraphs,
    plan."""
    parts = [
        _overview(report),
        "Passes\n" + _pass_table(report),
        "Sites\n" + _site_table(report),
        "Perturbed runs\n" + _run_table(report),
        *(["Learned feedback\n" + _jacobian_table(report)] if report.jacobians else []),
        "Gradient subgraphs\n" + _subgraph_table(report),
    ]
    if report.plan:
        parts.append("Plan of a step (F stage, P run.chunk, G site)\n" + wrapped(report.plan, "  "))
    if report.notes:
        parts.append("Notes\n" + "\n".join(wrapped(note, "  · ") for note in report.notes))
    return "\n\n".join(parts) + "\n"


def refusal_text(refused: Refusal) -> str:
    """The refusal at `WIDTH` columns."""
    lines = [f"{refused.model} does not compile: {refused.error}", ""]
    for paragraph in refused.reason.splitlines():
        indent = " " * (len(paragraph) - len(paragraph.lstrip()))
        lines.append(wrapped(paragraph.strip(), "  " + indent) if paragraph.strip() else "")
    if refused.suggestion:
        lines += ["", wrapped(refused.suggestion, "  → ")]
    lines.append("")
    if refused.captured:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(refused.operations.items()))
        lines.append(wrapped(f"It was captured, with these operations: {counts}.", "  "))
    else:
        lines.append("  It could not be captured, so no more can be said of its operations.")
    return "\n".join(lines) + "\n"


def rules_text() -> str:
    """The support matrix: what is special about the gradient of which operation."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for operation, rule, note in support_matrix():
        grouped.setdefault((rule, note), []).append(operation.removesuffix(".default"))
    rows = [(rule, ", ".join(operations), note) for (rule, note), operations in grouped.items()]
    columns = ["rule", "operations", "gradient and capture"]
    return "Rules\n" + table(columns, rows, "lll", wrap=columns[1:]) + "\n"


_PLACED = {"alive": "noise on alive coordinates", "narrow": "noise on alive coordinates of narrow tensors"}


def describe_estimator(estimator: Mapping[str, Any]) -> str:
    """The estimator's settings in one line."""
    count = estimator["copies"]
    copies = f"copies {_by_site(count)}" if isinstance(count, Mapping) else f"{count} copies"
    if estimator["antithetic"] and isinstance(count, int):
        copies += f" ({count // 2} antithetic pairs)"
    if estimator["chunk"] is not None:
        copies += f" in chunks of {estimator['chunk']}"
    groups, sigma = estimator["groups"], estimator["sigma"]
    return ", ".join(
        [
            f"{estimator['noise']} noise",
            f"{estimator['score']} score",
            f"{estimator['capture']} capture",
            groups if isinstance(groups, str) else f"{len(groups)} groups",
            copies,
            f"σ {_by_site(sigma)}",
            *(["batch credit"] if estimator["credit"] == "batch" else []),
            *(["samples by their error"] if estimator.get("sampling", "all") == "error" else []),
            *([_PLACED[estimator["placement"]]] if estimator["placement"] in _PLACED else []),
            *([f"noise on {_by_site(estimator['noise_on'])}"] if estimator["noise_on"] != "output" else []),
            *([f"tied over blocks of {_by_site(estimator['blocks'])}"] if estimator["blocks"] != 1 else []),
            *(
                [
                    f"learned feedback, correction {_by_site(estimator['correction'])}, reach {estimator['reach']}",
                    *([f"segments {estimator['segments']}"] if estimator["segments"] != "op" else []),
                    *_probing(estimator["probe_every"]),
                ]
                if estimator["feedback"] == "learned"
                else []
            ),
        ]
    )


def _probing(every: int | str) -> list[str]:
    """When copies are perturbed, where it is not every step."""
    if isinstance(every, str):
        return ["perturbed while it teaches"]
    return [f"perturbed every {every} steps"] if every != 1 else []


def _by_site(value: float | str | Mapping[str, Any]) -> str:
    """A number or a word, or ``pattern=value`` of each pattern of site names."""
    if isinstance(value, Mapping):
        return " ".join(f"{pattern}={_by_site(each)}" for pattern, each in value.items())
    return value if isinstance(value, str) else f"{value:g}"


def describe_change(change: Mapping[str, int]) -> str:
    """``+5 onward.perturb``; "no operation added or removed"."""
    if not change:
        return "none added or removed"
    return ", ".join(f"{count:+d}{NO_BREAK}{name}" for name, count in change.items())


def _overview(report: Report) -> str:
    activations = {capture.value for subgraph in report.subgraphs for capture in subgraph.captures}
    frozen = f", {len(report.frozen)} frozen" if report.frozen else ""
    whole = 1 + report.perturbed_forwards
    rows = [
        ("parameters", f"{report.num_parameters:,} in {report.num_tensors} tensors{frozen}"),
        ("graph", f"{len(report.sites)} sites, {report.num_stages} stages, captured by {report.captured_by}"),
        ("estimator", describe_estimator(report.estimator)),
        (
            "forwards",
            f"{whole:.1f} a sample and step: 1 clean + {report.perturbed_forwards:.1f} perturbed, each "
            f"{quantity(report.forward_flops)}FLOP",
        ),
        ("captures", f"{size(report.capture_bytes)} a sample in {len(activations)} activations"),
    ]
    if report.jacobians:
        taken = sum(one.bytes for one in report.jacobians)
        rows.append(("feedback", f"{size(taken)} in {len(report.jacobians)} Jacobians"))
    lines = [report.model]
    for key, value in rows:
        lines.append(textwrap.fill(value, WIDTH, initial_indent=f"  {key:<12}", subsequent_indent=" " * 14))
    return "\n".join(lines)


def _pass_table(report: Report) -> str:
    rows = [
        (one.name, str(one.operations), "" if not one.change else describe_change(one.change), duration(one.seconds))
        for one in report.passes
    ]
    return table(["pass", "operations", "change", "time"], rows, "lrlr", wrap=("change",))


def _site_table(report: Report) -> str:
    columns = ["", "site", "operation", "rule", "weights", "noise", "forward", "gradient", "exact", "packed"]
    rows = [
        (
            str(site.index),
            site.name,
            site.operation.replace("aten.", ""),
            site.rule,
            f"{site.num_parameters:,}",
            f"{site.perturbation_dimension:,}" + ("" if site.noise_on == "output" else f" {site.noise_on}"),
            quantity(site.forward_flops),
            quantity(site.gradient_flops),
            size(site.exact_bytes),
            "–" if site.packed_bytes is None else size(site.packed_bytes),
        )
        for site in report.sites
    ]
    legend = (
        "a sample: noise = its numbers of noise; forward, gradient = FLOPs of matrix products and convolutions (the "
        "gradient once for all copies, or a copy); exact, packed = bytes captured as floats, as packed "
        "signs (–: always exactly)"
    )
    if any(site.noise_on != "output" for site in report.sites):
        legend += (
            "; noise without a word is on the output, else on the weight, with numbers for all samples (weight) or for "
            "each (sample; rank-one: of two vectors)"
        )
    return table(columns, rows, "rlllrrrrrr") + "\n" + wrapped(legend, "  ")


def _run_table(report: Report) -> str:
    rows = [
        (
            run.name,
            shorten(", ".join(run.sites), 44),
            str(run.operations),
            quantity(run.flops),
            f"{100 * run.share:.1f} %",
        )
        for run in report.runs
    ]
    return table(["run", "perturbs", "operations", "FLOPs a copy", "of a forward"], rows, "llrrr")


def _jacobian_table(report: Report) -> str:
    rows = [(one.site, f"{one.rows:,}×{one.columns:,}", one.form, size(one.bytes)) for one in report.jacobians]
    legend = "J = coordinates of a sample (or blocks of them) × outputs (or directions of them)"
    return table(["noise point", "J", "form", "memory"], rows, "lrlr") + "\n" + wrapped(legend, "  ")


def _subgraph_table(report: Report) -> str:
    rows = []
    for one in report.subgraphs:
        prefix = one.site.partition(":")[0].partition("@")[0] + "."
        needs = [f"{c.value} ({c.encoding},{NO_BREAK}{size(c.bytes).replace(' ', NO_BREAK)})" for c in one.captures]
        needs += [name for name in one.parameters_read if name not in one.gives]
        rows.append(
            (
                one.name,
                one.site,
                one.after,
                ", ".join(needs) or "–",
                ", ".join(name.removeprefix(prefix) for name in one.gives),
                "each copy" if one.per_copy else "once",
                str(one.operations),
            )
        )
    legend = (
        "each may also read its own parameters, and needs the losses' weights, the noise key and the ids of its draws, "
        "or what feedback learned; none reads another's result, so each is ready as soon as its run is"
    )
    columns = ["subgraph", "site", "after", "needs", "gives", "vjp", "operations"]
    return table(columns, rows, "llllllr", wrap=("site", "needs", "gives")) + "\n" + wrapped(legend, "  ")
