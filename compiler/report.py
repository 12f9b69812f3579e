"""What ``onward inspect`` knows of a compiled model, as plain data; or of one that does not compile (`refusal`).

Every number is of one sample: FLOPs are those of matrix products and convolutions, two a multiply-add; bytes are those
of the captured activations. Nothing here prints, runs the model or needs the runtime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx, nn

from ..passes import ops
from ..passes.errors import BatchError, OnwardError, UnreachedParameterError, UnsupportedModelError
from ..passes.find_sites import Site
from ..passes.graph import Role, operation_name, placeholders
from ..passes.insert_captures import Capture
from ..passes.rules import Rule, rule_for
from ..passes.separate_outputs import error_like, output_nodes
from .capture import capture
from .columns import size
from .cost import count_flops, total_flops
from .driver import node_count
from .feedback_size import jacobian_bytes, jacobian_shapes
from .program import CompiledModel, GradientSubgraph
from .site_options import resolve_sigmas


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
    """Numbers of noise, of a sample (``noise_on="weight"``: of all)."""
    noise_on: str
    """``"output"``, ``"weight"``, ``"sample"`` or ``"rank-one"``."""
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
class JacobianReport:
    """What feedback learns at a noise point."""

    site: str
    rows: int
    """Coordinates of a sample, or blocks of them."""
    columns: int
    """Outputs, or directions of them."""
    form: str
    """``"full"``, ``"tied over 2×2"``, ``"rank 4"``, or the two."""
    bytes: int


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
    jacobians: tuple[JacobianReport, ...]
    """Of learned feedback; empty without."""
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


def examine(compiled: CompiledModel, *, name: str, plan: str = "") -> Report:
    """The report of a compiled model called `name`; `plan` is its plan as text (the runtime's, which makes it)."""
    everything = placeholders(compiled.graph, Role.PARAMETER)
    trainable = [node for node in everything if node.meta["trainable"]]
    taken = {one.name: one.bytes for gradient in compiled.gradients for one in gradient.captures}
    return Report(
        model=name,
        captured_by="torch.fx.symbolic_trace" if compiled.captured.how == "symbolic_trace" else "torch.export",
        num_parameters=sum(node.meta["val"].numel() for node in trainable),
        num_tensors=len(trainable),
        frozen=tuple(node.meta["target"] for node in everything if not node.meta["trainable"]),
        estimator=compiled.estimator.to_json(),
        passes=pass_reports(compiled),
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
        jacobians=_jacobians(compiled),
        subgraphs=tuple(_subgraph(compiled, gradient) for gradient in compiled.gradients),
        forward_flops=total_flops(compiled.captured.module),
        perturbed_forwards=compiled.forwards,
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


def pass_reports(compiled: CompiledModel) -> tuple[PassReport, ...]:
    """What every pass changed, in order."""
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
                perturbation_dimension=site.noise_layout.elements,
                noise_on="output" if site.weight_noise is None else site.weight_noise.on,
                sigma=sigmas[site.index],
                forward_flops=sum(flops.get(name, 0) for name in site.region),
                gradient_flops=total_flops(gradient.module),
                exact_bytes=sum(one.exact_bytes for one in gradient.captures),
                packed_bytes=_packed_bytes(site, rule, gradient.captures),
                captured_bytes=sum(one.bytes for one in gradient.captures),
            )
        )
    return tuple(reports)


def _jacobians(compiled: CompiledModel) -> tuple[JacobianReport, ...]:
    taken = jacobian_bytes(compiled)
    reports = []
    for index, (rows, columns) in jacobian_shapes(compiled).items():
        site = compiled.sites[index]
        form = [f"tied over {'×'.join(str(block) for block in site.blocks if block > 1)}"] if site.blocks else []
        form += [] if compiled.rank is None else [f"rank {compiled.rank}"]
        reports.append(JacobianReport(site.name, rows, columns, ", ".join(form) or "full", taken[index]))
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


def _locality(compiled: CompiledModel) -> str:
    """How much of the gradients is predicted, and how much pulled back by local backpropagation."""
    if not compiled.runs:
        return "the reach covers the whole model: the gradients are backpropagation's, and nothing is perturbed."
    returned = {node.name for node in output_nodes(compiled.graph)}
    exact = [site for site in compiled.sites if returned.issuperset(site.ends)]
    local = sum(site.beyond != () or site.ends != (site.output,) or site.joined for site in compiled.sites)
    how = f"pulled back inside {local} of them by local backpropagation" if local else "without any backpropagation"
    last = " (the last operation's own)" if len(exact) == 1 and not local else ""
    predicted = len(compiled.sites) - len(exact)
    chosen = f"reach auto is {compiled.reach} here; " if compiled.estimator.reach == "auto" else ""
    return (
        f"{chosen}of {len(compiled.sites)} gradient subgraphs {predicted} start from a predicted gradient at a noise "
        f"point and {len(exact)} from the loss's own at the output{last}, {how}."
    )


def _lowered(compiled: CompiledModel) -> str:
    """Of the rank that the memory leaves: a bias nobody asked for."""
    outputs, item = int(error_like(compiled.graph.graph).shape[1]), error_like(compiled.graph.graph).element_size()
    whole = outputs * item * sum(rows for rows, _ in jacobian_shapes(compiled).values())
    return (
        f"feedback keeps {compiled.rank} directions of the {outputs:,} outputs: Jacobians of all of them would take "
        f"{size(whole)}, and feedback_memory={compiled.estimator.feedback_memory} MiB. What lies outside these "
        "directions is missing from every prediction, a bias that more copies do not remove."
    )


def _notes(compiled: CompiledModel) -> Iterable[str]:
    estimator = compiled.estimator
    if compiled.captured.how == "symbolic_trace":
        yield "torch.export refused this model; it was captured by torch.fx.symbolic_trace."
    if estimator.feedback == "learned":
        yield _locality(compiled)
        if compiled.rank is not None and estimator.rank is None:
            yield _lowered(compiled)
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
