"""What ``onward inspect`` knows of a compiled model: plain data (`examine`), and that data as text.

Every number is of one sample: FLOPs are those of matrix products and convolutions, two a multiply-add; bytes are those
of the captured activations. Nothing here prints, runs the model or needs the runtime.
"""

from __future__ import annotations

import difflib
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx, nn

from ..passes import ops
from ..passes.errors import BatchError, OnwardError, UnreachedParameterError, UnsupportedModelError, unknown_name
from ..passes.find_sites import Site
from ..passes.graph import Role, operation_name, placeholders
from ..passes.insert_captures import Capture
from ..passes.locate_samples import batch_symbol
from ..passes.rules import Rule, rule_for, support_matrix
from .capture import capture
from .cost import count_flops, total_flops
from .driver import node_count, resolve_sigmas
from .program import CompiledModel, GradientSubgraph
from .source import file_of, function_of

WIDTH = 100
"""Columns of every text."""

_NO_BREAK = "\N{NO-BREAK SPACE}"

PARTS = {
    "share_prefixes": "one perturbed run a group of sites, behind the clean prefix that all copies share",
    "split_stages": "the stages of the clean run",
    "complete_gradients": "one standalone gradient subgraph a site",
}
"""Passes whose result is several graphs; they follow the passes over the one-copy graph."""


@dataclass(frozen=True)
class PassReport:
    """A pass and what it changed."""

    name: str
    operations: int
    change: dict[str, int]
    """Operation to how many more of it there are after the pass (negative: fewer)."""
    seconds: float


@dataclass(frozen=True)
class SiteReport:
    """A site: what is perturbed there, what its gradient costs, and what it keeps."""

    index: int
    name: str
    operation: str
    rule: str
    parameters: tuple[str, ...]
    num_parameters: int
    line: str
    perturbation_dimension: int
    """Elements of noise a sample."""
    sigma: float
    forward_flops: int
    gradient_flops: int
    exact_bytes: int
    """Bytes a sample of its captures if kept exactly."""
    packed_bytes: int | None
    """The same as packed signs; None where the rule allows none."""
    captured_bytes: int
    """The same as the estimator captures them."""


@dataclass(frozen=True)
class RunReport:
    """A perturbed run."""

    name: str
    sites: tuple[str, ...]
    operations: int
    flops: int
    share: float
    """FLOPs of one copy over those of a whole forward."""


@dataclass(frozen=True)
class CaptureReport:
    """What a gradient subgraph reads of an activation."""

    value: str
    encoding: str
    bytes: int


@dataclass(frozen=True)
class SubgraphReport:
    """A gradient subgraph: what it reads and what it gives."""

    name: str
    site: str
    cotangent: str
    """Where the cotangent comes from: ``"noise"`` weighted by losses, or what feedback learned."""
    after: str
    """Name of the perturbed run whose losses it needs, or "clean run"."""
    per_copy: bool
    captures: tuple[CaptureReport, ...]
    parameters_read: tuple[str, ...]
    """Parameters that the local derivative takes, be it for their shape."""
    inputs: tuple[str, ...]
    """Everything it reads, as ``role:name``."""
    gives: tuple[str, ...]
    operations: int
    flops: int


@dataclass(frozen=True)
class Report:
    """A compiled model, as data."""

    model: str
    captured_by: str
    num_parameters: int
    num_tensors: int
    frozen: tuple[str, ...]
    estimator: dict[str, Any]
    passes: tuple[PassReport, ...]
    sites: tuple[SiteReport, ...]
    num_stages: int
    runs: tuple[RunReport, ...]
    subgraphs: tuple[SubgraphReport, ...]
    forward_flops: int
    perturbed_forwards: float
    """Forwards a sample and step beside the clean one, a suffix counting by its share of the FLOPs."""
    capture_bytes: int
    """As captured, an activation that several sites read counted once."""
    notes: tuple[str, ...]
    plan: str

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-serialisable values."""
        return asdict(self)


@dataclass(frozen=True)
class Refusal:
    """Why a model does not compile."""

    model: str
    error: str
    """Class of the error."""
    reason: str
    captured: bool
    """Whether the model could at least be captured."""
    operations: dict[str, int]
    """Its operations, if so."""
    suggestion: str

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-serialisable values."""
        return {"supported": False, **asdict(self)}


# --- data -------------------------------------------------------------------------------------------------------------


def examine(compiled: CompiledModel, *, name: str, plan: str = "") -> Report:
    """The report of a compiled model called `name`; `plan` is its plan as text (the runtime's, which makes it)."""
    everything = placeholders(compiled.graph, Role.PARAMETER)
    trainable = [node for node in everything if node.meta["trainable"]]
    copies = compiled.estimator.copies
    taken = {one.name: one.bytes for gradient in compiled.gradients for one in gradient.captures}
    return Report(
        model=name,
        captured_by="torch.fx.symbolic_trace" if compiled.captured.how == "symbolic_trace" else "torch.export",
        num_parameters=sum(node.meta["val"].numel() for node in trainable),
        num_tensors=len(trainable),
        frozen=tuple(node.meta["target"] for node in everything if not node.meta["trainable"]),
        estimator=compiled.estimator.to_json(),
        passes=_passes(compiled),
        sites=_sites(compiled),
        num_stages=len(compiled.stages),
        runs=tuple(
            RunReport(
                run.name,
                tuple(compiled.sites[index].name for index in run.sites),
                node_count(run.module),
                total_flops(run.module),
                run.share,
            )
            for run in compiled.runs
        ),
        subgraphs=tuple(_subgraph(compiled, gradient) for gradient in compiled.gradients),
        forward_flops=total_flops(compiled.captured.module),
        perturbed_forwards=copies * sum(run.share for run in compiled.runs),
        capture_bytes=sum(taken.values()),
        notes=tuple(_notes(compiled)),
        plan=plan,
    )


def refusal(model: nn.Module, example_inputs: Any, error: OnwardError, *, name: str) -> Refusal:
    """What can be said of a model that `error` stopped."""
    operations: dict[str, int] = {}
    try:
        operations = _operations(capture(model, example_inputs).module)
    except (OnwardError, RuntimeError):
        captured = False
    else:
        captured = True
    suggestion = ""
    if isinstance(error, UnsupportedModelError) and 'credit="batch"' in str(error):
        suggestion = "on the command line: --credit batch"
    elif isinstance(error, UnreachedParameterError):
        suggestion = "a frozen parameter (requires_grad=False) needs no site"
    elif isinstance(error, BatchError):
        suggestion = "the model must take a batch of the data set's inputs, as it is"
    return Refusal(name, type(error).__name__, str(error), captured, operations, suggestion)


def _passes(compiled: CompiledModel) -> tuple[PassReport, ...]:
    reports = []
    before: dict[str, int] = {}
    for record in compiled.history:
        after = _operations(record.module)
        change = {key: after.get(key, 0) - before.get(key, 0) for key in sorted({*before, *after})}
        changed = {key: count for key, count in change.items() if count}
        reports.append(PassReport(record.name, sum(after.values()), changed, record.seconds))
        before = after
    return tuple(reports)


def _operations(module: fx.GraphModule) -> dict[str, int]:
    return dict(Counter(operation_name(node) for node in module.graph.nodes if node.op == "call_function"))


def _sites(compiled: CompiledModel) -> tuple[SiteReport, ...]:
    nodes = {node.name: node for node in compiled.graph.graph.nodes}
    by_target = {node.meta["target"]: node.meta["val"] for node in placeholders(compiled.graph, Role.PARAMETER)}
    flops = count_flops(compiled.captured.module)
    sigmas = resolve_sigmas(compiled.estimator.sigma, compiled.sites)
    gradients = {gradient.site.index: gradient for gradient in compiled.gradients}
    reports = []
    for site in compiled.sites:
        gradient = gradients[site.index]
        rule = rule_for(nodes[site.core].target)
        reports.append(
            SiteReport(
                index=site.index,
                name=site.name,
                operation=site.operation,
                rule=rule.name,
                parameters=site.parameters,
                num_parameters=sum(by_target[target].numel() for target in site.parameters),
                line=site.line,
                perturbation_dimension=site.layout.elements,
                sigma=sigmas[site.index],
                forward_flops=sum(flops.get(name, 0) for name in site.region),
                gradient_flops=total_flops(gradient.module),
                exact_bytes=sum(one.exact_bytes for one in gradient.captures),
                packed_bytes=_packed_bytes(site, rule, gradient.captures),
                captured_bytes=sum(one.bytes for one in gradient.captures),
            )
        )
    return tuple(reports)


def _packed_bytes(site: Site, rule: Rule, captures: Sequence[Capture]) -> int | None:
    if not rule.encodable or "+" in site.operation:
        return None
    if rule.normalize is not None:  # what is packed is x̂, shaped like the output
        return ops.DOMAINS["signed"] * ((site.layout.elements + 7) // 8)
    return sum(
        ops.DOMAINS[one.domain] * ((one.layout.elements + 7) // 8) if one.layout is not None else one.bytes
        for one in captures
    )


def _subgraph(compiled: CompiledModel, gradient: GradientSubgraph) -> SubgraphReport:
    inputs = placeholders(gradient.module)
    return SubgraphReport(
        name=gradient.name,
        site=gradient.site.name,
        cotangent=gradient.source,
        after="clean run" if gradient.from_clean else compiled.runs[gradient.run].name,
        per_copy=gradient.per_copy,
        captures=tuple(CaptureReport(one.source, one.encoding, one.bytes) for one in gradient.captures),
        parameters_read=tuple(node.meta["target"] for node in inputs if node.meta["role"] == Role.PARAMETER),
        inputs=tuple(f"{node.meta['role']}:{node.meta['target']}" for node in inputs),
        gives=gradient.site.parameters,
        operations=node_count(gradient.module),
        flops=total_flops(gradient.module),
    )


def _notes(compiled: CompiledModel) -> Iterable[str]:
    estimator = compiled.estimator
    if compiled.captured.how == "symbolic_trace":
        yield "torch.export refused this model; it was captured by torch.fx.symbolic_trace."
    if compiled.mixes_samples:
        yield f"{compiled.mixes_samples} mixes the samples of a batch: one loss is taken for the whole batch."
    if compiled.sequential:
        yield "copies run one at a time: side by side in the batch they would mix."
    if estimator.capture != "exact":
        exact = [
            gradient.site.name
            for gradient in compiled.gradients
            if any(one.encoding == "exact" for one in gradient.captures)
        ]
        if exact:
            yield f"captured exactly all the same, because their rule allows no signs: {', '.join(exact)}."
    if estimator.capture == "sign":
        yield "sign capture is biased: the magnitude of the activations is lost, and more copies do not bring it back."
    shared = [
        key for key, count in Counter(key for site in compiled.sites for key in site.parameters).items() if count > 1
    ]
    if shared:
        yield f"read at several sites, whose gradients are summed: {', '.join(shared)}."


# --- graphs -----------------------------------------------------------------------------------------------------------


def pass_names(compiled: CompiledModel) -> list[str]:
    """The names that `graphs_after` knows: the passes in order, then `PARTS`."""
    return [*(record.name for record in compiled.history), *PARTS]


def graphs_after(compiled: CompiledModel, name: str) -> dict[str, fx.GraphModule]:
    """The graph after a pass, by a name that can stand in a file; several for `PARTS`.

    Raises:
        UnknownNameError: no pass has this name; the message shows the nearest.
    """
    if name == "share_prefixes":
        return {run.name: run.module for run in compiled.runs}
    if name == "split_stages":
        return {f"stage_{index}": stage for index, stage in enumerate(compiled.stages)}
    if name == "complete_gradients":
        return {gradient.name: gradient.module for gradient in compiled.gradients}
    for record in compiled.history:
        if record.name == name:
            return {f"after_{name}": record.module}
    raise unknown_name("pass", name, pass_names(compiled))


def all_graphs(compiled: CompiledModel) -> dict[str, fx.GraphModule]:
    """Every graph there is: after each pass, then the stages, perturbed runs and gradient subgraphs."""
    return {key: module for name in pass_names(compiled) for key, module in graphs_after(compiled, name).items()}


def python(compiled: CompiledModel, name: str | None = None, *, model: str = "model") -> str:
    """A Python file with the graphs before and after the pass `name`, or with all graphs."""
    batch = batch_symbol(compiled.captured.module)
    if name is None:
        return file_of(all_graphs(compiled), f"{model}: the graph after every pass, and what is run.", batch)
    modules = graphs_after(compiled, name)
    if name in PARTS:
        return file_of(modules, f"{model}, {name}: {PARTS[name]}.", batch)
    previous = _before(compiled, name)
    if previous is not None:
        modules = {f"before_{name}": previous, **modules}
    return file_of(modules, f"{model} before and after {name}.", batch)


def sources(compiled: CompiledModel, graphs: Mapping[str, fx.GraphModule]) -> dict[str, str]:
    """Each graph as a Python function, by name."""
    batch = batch_symbol(compiled.captured.module)
    return {name: function_of(module, name, batch) for name, module in graphs.items()}


def _before(compiled: CompiledModel, name: str) -> fx.GraphModule | None:
    position = [record.name for record in compiled.history].index(name)
    return compiled.history[position - 1].module if position else None


def pass_text(compiled: CompiledModel, name: str, *, model: str = "model") -> str:
    """What a pass did: its time, the operations it added and removed, and the graph after it with changed lines marked.

    ``+`` marks a line that the pass added, ``-`` one that it removed.
    """
    batch = batch_symbol(compiled.captured.module)
    modules = graphs_after(compiled, name)
    if name in PARTS:
        sources = [function_of(module, key, batch) for key, module in modules.items()]
        return "\n\n".join([f"{model}, {name}: {PARTS[name]}.\n", *sources])
    record = next(record for record in compiled.history if record.name == name)
    report = next(one for one in _passes(compiled) if one.name == name)
    change = describe_change(report.change).replace(_NO_BREAK, " ")
    lines = [
        f"{model}, {name}: {report.operations} operations ({change}), {_time(record.seconds)}",
        "",
    ]
    after = function_of(record.module, f"after_{name}", batch).splitlines()
    previous = _before(compiled, name)
    if previous is None:
        return "\n".join([*lines, *after]) + "\n"
    before = function_of(previous, f"after_{name}", batch).splitlines()
    if before == after:
        lines[1:] = [_unchanged(name), ""]
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(a=before, b=after, autojunk=False).get_opcodes():
        if tag == "equal":
            lines += [f"  {line}" for line in after[j1:j2]]
        else:
            lines += [f"- {line}" for line in before[i1:i2]] + [f"+ {line}" for line in after[j1:j2]]
    return "\n".join(lines) + "\n"


def _unchanged(name: str) -> str:
    if name == "trace_gradients":
        return "It leaves this graph as it is; the subgraphs it traced are completed: --pass complete_gradients."
    return "It writes facts on the nodes and leaves the operations as they are."


# --- text -------------------------------------------------------------------------------------------------------------


def text(report: Report) -> str:
    """The report at `WIDTH` columns: overview, passes, sites, perturbed runs, gradient subgraphs, plan."""
    parts = [
        _overview(report),
        "Passes\n" + _pass_table(report),
        "Sites\n" + _site_table(report),
        "Perturbed runs\n" + _run_table(report),
        "Gradient subgraphs\n" + _subgraph_table(report),
    ]
    if report.plan:
        parts.append("Plan of a step (F stage, P run.chunk, G site)\n" + _wrap(report.plan, "  "))
    if report.notes:
        parts.append("Notes\n" + "\n".join(_wrap(note, "  · ") for note in report.notes))
    return "\n\n".join(parts) + "\n"


def refusal_text(refused: Refusal) -> str:
    """The refusal at `WIDTH` columns."""
    lines = [f"{refused.model} does not compile: {refused.error}", ""]
    for paragraph in refused.reason.splitlines():
        indent = " " * (len(paragraph) - len(paragraph.lstrip()))
        lines.append(_wrap(paragraph.strip(), "  " + indent) if paragraph.strip() else "")
    if refused.suggestion:
        lines += ["", _wrap(refused.suggestion, "  → ")]
    lines.append("")
    if refused.captured:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(refused.operations.items()))
        lines.append(_wrap(f"It was captured, with these operations: {counts}.", "  "))
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


def describe_estimator(estimator: Mapping[str, Any]) -> str:
    """The estimator's settings in one line."""
    copies = f"{estimator['copies']} copies"
    if estimator["antithetic"]:
        copies += f" ({estimator['copies'] // 2} antithetic pairs)"
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
            f"σ {sigma:g}"
            if isinstance(sigma, float | int)
            else "σ " + " ".join(f"{k}={v:g}" for k, v in sigma.items()),
            *(["batch credit"] if estimator["credit"] == "batch" else []),
            *(["noise on alive coordinates"] if estimator["placement"] == "alive" else []),
            *(
                [f"learned feedback, correction {estimator['correction']}"]
                if estimator["feedback"] == "learned"
                else []
            ),
        ]
    )


def describe_change(change: Mapping[str, int]) -> str:
    """``+5 onward.perturb``; "no operation added or removed"."""
    if not change:
        return "none added or removed"
    return ", ".join(f"{count:+d}{_NO_BREAK}{name}" for name, count in change.items())


def _overview(report: Report) -> str:
    exact = {capture.value: 0 for subgraph in report.subgraphs for capture in subgraph.captures}
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
        ("captures", f"{size(report.capture_bytes)} a sample in {len(exact)} activations"),
    ]
    lines = [f"{report.model}"]
    for key, value in rows:
        lines.append(textwrap.fill(value, WIDTH, initial_indent=f"  {key:<12}", subsequent_indent=" " * 14))
    return "\n".join(lines)


def _pass_table(report: Report) -> str:
    rows = [
        (one.name, str(one.operations), "" if not one.change else describe_change(one.change), _time(one.seconds))
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
            f"{site.perturbation_dimension:,}",
            quantity(site.forward_flops),
            quantity(site.gradient_flops),
            size(site.exact_bytes),
            "–" if site.packed_bytes is None else size(site.packed_bytes),
        )
        for site in report.sites
    ]
    legend = (
        "a sample: noise = perturbed elements; forward, gradient = FLOPs of matrix products and convolutions (the "
        "gradient once for all copies, or a copy); exact, packed = bytes captured as floats, as packed "
        "signs (–: always exactly)"
    )
    return table(columns, rows, "rlllrrrrrr") + "\n" + _wrap(legend, "  ")


def _run_table(report: Report) -> str:
    rows = [
        (
            run.name,
            _shorten(", ".join(run.sites), 44),
            str(run.operations),
            quantity(run.flops),
            f"{100 * run.share:.1f} %",
        )
        for run in report.runs
    ]
    return table(["run", "perturbs", "operations", "FLOPs a copy", "of a forward"], rows, "llrrr")


def _subgraph_table(report: Report) -> str:
    rows = []
    for one in report.subgraphs:
        prefix = one.site.partition(":")[0].partition("@")[0] + "."
        needs = [f"{c.value} ({c.encoding},{_NO_BREAK}{size(c.bytes).replace(' ', _NO_BREAK)})" for c in one.captures]
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
    return table(columns, rows, "llllllr", wrap=("site", "needs", "gives")) + "\n" + _wrap(legend, "  ")


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
            else [_shorten(value, widths[place])]
            for place, value in enumerate(row)
        ]
        for depth in range(max(map(len, cells))):
            parts = [
                f"{cell[depth] if depth < len(cell) else '':{'>' if how == 'r' else '<'}{one}}"
                for cell, how, one in zip(cells, align, widths, strict=True)
            ]
            lines.append(("  " + "  ".join(parts)).rstrip().replace(_NO_BREAK, " "))
        if number == 0:
            lines.append("  " + "─" * (sum(widths) + 2 * (len(columns) - 1)))
    return "\n".join(lines)


def quantity(number: float) -> str:
    """1234567 as "1.23M"; "–" for nothing."""
    if not number:
        return "–"
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


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _shorten(value: str, width: int) -> str:
    return value if len(value) <= width else value[: width - 1] + "…"


def _wrap(value: str, first: str) -> str:
    return textwrap.fill(
        value, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
