"""The tasks of a training step: forward stages, losses, noise, perturbed runs, learning, gradients, updates.

A program is exported for the plan that it has: the ids of copies and draws are constants of its graphs. Seed and step
number are not, so every step has noise of its own, the same that the program would make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...compiler.program import GradientSubgraph, PerturbedRun
from ...compiler.to_onnx.trace import Like
from ...passes.errors import ExportError
from ...passes.separate_outputs import error_like, returned
from ..loss import SampleLoss
from ..noise.rows import Probe
from ..plan import chunks
from ..program import Program
from ..traced_loss import LossInputs, NoDerivativeError, differentiate
from .ending import add_updates
from .learning import NAMES, Counters, learned
from .recorder import Recorder
from .task import Task, Tasks
from .updates import Optimizer


def make_tasks(
    program: Program, batch: Any, target: Any, optimizer: Optimizer, moments: Mapping[str, Tensor]
) -> tuple[Tasks, Recorder]:
    """All tasks of a program's step, and what recorded them.

    Args:
        program: not changed. With ``sigma="auto"`` its `sigmas` are taken as they are.
        batch, target: an example, which says the shapes; its batch size stays free.
        optimizer: how weights are updated.
        moments: what it keeps, by ``weight.state``.

    Raises:
        ExportError: a setting, an operation or the loss has no form in ONNX.
    """
    check_settings(program)
    r = Recorder(program, batch, target, optimizer, dict(moments))
    compiled = r.compiled
    r.runtime_kinds()
    for number, stage in enumerate(compiled.stages):
        r.module(f"F{number}", stage, {"runtime:copies": (0,)})
    _losses(r)
    for gradient in compiled.gradients:
        if gradient.from_clean:
            _gradient(r, gradient)
    for run in compiled.runs:
        _perturbed(r, run)
    add_updates(r)
    state = r.state()
    constants = {key: value for key, value in r.environment.items() if key.startswith("constant:")}
    given = {key: kind for key, kind in r.kinds.items() if key.startswith(("input:", "target:"))}
    return Tasks(
        tasks=tuple(r.tasks),
        state=state,
        new={key: _renewed(r, key) for key in state},
        constants=constants | {"runtime:sigmas": r.environment["runtime:sigmas"].cpu()},
        inputs={key: kind for key, kind in given.items() if isinstance(kind, Like)},
        probes=bool(r.learns and compiled.runs) and r.estimator.probe_every != 1,
        warmup=r.warmup,
    ), r


def _renewed(r: Recorder, key: str) -> str:
    """The key of a state's new value."""
    written = {each for task in r.tasks for each in task.writes}
    return next((each for each in (f"new:{key}", key.replace("buffer:", "mutation:", 1)) if each in written), key)


def check_settings(program: Program) -> None:
    """Raise ExportError for settings of a program that have no form here."""
    compiled, estimator = program.compiled, program.compiled.estimator
    held = {str(node.target) for run in compiled.runs for node in run.module.graph.nodes}
    learns = estimator.feedback == "learned"
    reasons = {
        f"rank={compiled.rank}: the basis of low-rank feedback needs eigenvectors, for which ONNX has no operator; "
        "give feedback_memory room for all outputs": compiled.rank is not None,
        'sampling="error": the number of its samples depends on their errors': estimator.sampling != "all",
        f"probe={estimator.probe}: the copies are of a part of the batch; probe=1 is exported": learns
        and estimator.probe != 1,
        'correction="shrunk": it compares halves of the copies as no graph does; "full" and "none" are exported': any(
            gradient.shrunk for gradient in compiled.gradients
        ),
        'noise_on: noise on weights has no rule; leave it at "output"': "onward.perturb_weight.default" in held,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ExportError(f"this program has no form in ONNX: {reason}.")


def _losses(r: Recorder) -> None:
    leaves, targets = r.leaves(), [f"target:{index}" for index in range(len(r.target_leaves))]
    count = len(leaves)
    if not r.learns:

        def losses(*values: Any) -> list[Tensor]:
            loss = r.program.loss_of(r.target(values[count:]), torch.device("cpu"))
            found: Tensor = loss(list(values[:count]), 1, values[0].shape[0] if values[0].dim() else 1)[0]
            return [found]

        r.function("E", losses, [*leaves, *targets], ["loss:clean"])
        return
    assert isinstance(r.program.loss, SampleLoss)
    at = [index for index, _ in returned(r.compiled.graph.graph)]

    def errors(*values: Any) -> list[Tensor]:
        output = list(values[:count])
        given = LossInputs(output, r.compiled.captured.out_spec, r.target(values[count:]), r.samples, at)
        losses, *found = differentiate(r.program.loss, given, given.tensors)  # type: ignore[arg-type]
        rows = [each.reshape(values[at[0]].shape[0], -1) for each in found]
        return [losses, torch.cat(rows, 1) / values[at[0]].shape[0]]

    try:
        r.function("E", errors, [*leaves, *targets], ["loss:clean", "runtime:error"])
    except NoDerivativeError as reason:
        raise ExportError(
            f"the loss {r.program.loss.name} has no derivative, or cannot be traced: with learned feedback its "
            "gradient at the output is part of the graph."
        ) from reason
    error = error_like(r.compiled.graph.graph)
    r.kinds["runtime:error"] = Like(((1,), int(error.shape[1])), error.dtype)


def _gradient(
    r: Recorder,
    gradient: GradientSubgraph,
    copies: Mapping[str, tuple[int, ...]] | None = None,
    chunk: int | None = None,
    weights: str = "",
) -> None:
    """A gradient subgraph; of one chunk it reads that chunk's captures, where it has its own."""
    name = f"G{gradient.site.index}" if chunk is None else f"G{gradient.site.index}.{chunk}"

    def renamed(key: str) -> str:
        own = f"P{gradient.run}.{chunk}/{key}"
        return weights if key == "runtime:weights" else own if chunk is not None and own in r.kinds else key

    r.module(
        name, gradient.module, copies or {}, renamed, lambda key: f"{key}@{name}",
        run=None if gradient.from_clean else gradient.run, perturbed=not gradient.from_clean and r.learns,
    )  # fmt: skip


def _perturbed(r: Recorder, run: PerturbedRun) -> None:
    compiled, number = r.compiled, run.index
    draws = tuple(range(r.estimator.draws(run.copies)))
    sites = [compiled.sites[index] for index in run.sites]
    noise = r.estimator.noise
    forms = [(site.credited if site.rows else site.grid if site.blocks else site.layout) for site in sites]
    words = tuple((site.index, noise, form.elements, form.batched) for site, form in zip(sites, forms, strict=True))
    reads = ("runtime:key", _batched_input(r))
    keys = tuple(f"words:{number}.{site.index}.{noise}" for site in sites)
    one_bit = noise == "rademacher"
    made = Like((len(draws), -1), torch.uint8) if one_bit else Like((len(draws), -1, 4), torch.uint32)
    kinds = tuple(r.kinds[key] for key in reads)
    r.tasks.append(
        Task(
            f"N{number}",
            reads,
            keys,
            kinds,
            (made,) * len(keys),
            words=words,
            draws=draws,
            run=number,
            perturbed=r.learns,
        )
    )
    own = [g for g in compiled.gradients if g.run == number and not g.from_clean]
    ids = chunks(compiled, run)
    for place, copies in enumerate(ids):
        r.module(
            f"P{number}.{place}", run.module, {"runtime:copies": copies}, run=number, perturbed=r.learns,
            written=lambda key, place=place: f"P{number}.{place}/{key}",  # type: ignore[misc]
        )  # fmt: skip
        if not r.learns or any(gradient.source == "corrected" for gradient in own):
            _chunk_losses(r, number, place, copies)
    if r.learns:
        _learning(r, run, ids)
    for gradient in own:
        _noisy_gradient(r, gradient, ids, draws)


def _batched_input(r: Recorder) -> str:
    for key, kind in r.kinds.items():
        if key.startswith("input:") and isinstance(kind, Like) and kind.multiples[:1] == (1,):
            return key
    raise ExportError("no input has the batch as its first dimension.")


def _chunk_losses(r: Recorder, run: int, place: int, copies: tuple[int, ...]) -> None:
    prefix = f"P{run}.{place}/"
    leaves = r.leaves(prefix)
    targets = [f"target:{index}" for index in range(len(r.target_leaves))]
    count, number = len(leaves), len(copies)

    def losses(*values: Any) -> list[Tensor]:
        loss = r.program.loss_of(r.target(values[count:]), torch.device("cpu"))
        samples = values[0].shape[0] // number if values[0].dim() else 1
        return [loss(list(values[:count]), number, samples)]

    r.function(f"{prefix}E", losses, [*leaves, *targets], [f"loss:{run}.{place}"], perturbed=r.learns)


def _learning(r: Recorder, run: PerturbedRun, ids: Sequence[tuple[int, ...]]) -> None:
    compiled, program, estimator = r.compiled, r.program, r.estimator
    sites = [compiled.sites[index] for index in run.sites]
    jacobians = [f"runtime:feedback.{site.index}" for site in sites]
    counters = [f"feedback:{name}" for name in NAMES]
    alive = [f"value:{run.alive[site.index]}" for site in sites if site.index in run.alive]
    at = [index for index, _ in returned(compiled.graph.graph)]
    outputs = [f"P{run.index}.{place}/output:{index}" for place in range(len(ids)) for index in at]
    draws = tuple(range(estimator.draws(run.copies)))
    corrects = any(g.source == "corrected" for g in compiled.gradients)
    losses = [f"loss:{run.index}.{place}" for place in range(len(ids))] if corrects else []
    runtime = ["runtime:key", "runtime:step", "runtime:draws", "runtime:error"]
    reads = [*runtime, *jacobians, *counters, *alive, *outputs, *losses]
    r.kinds["runtime:draws"] = Like((len(draws),), torch.int64)
    sigmas = list(program.sigmas)
    masked = [site.index for site in sites if site.index in run.alive]

    def learn(key: Tensor, step: Tensor, drawn: Tensor, error: Tensor, *values: Tensor) -> list[Tensor]:
        rest = list(values)
        held = {site.index: rest.pop(0) for site in sites}
        before = Counters(*(rest.pop(0) for _ in NAMES))
        masks: dict[int, Tensor | None] = {site.index: None for site in sites}
        masks |= {index: rest.pop(0) for index in masked}
        responses = []
        for copies in ids:
            shown = [rest.pop(0).reshape(len(copies), error.shape[0], -1) for _ in at]
            responses.append(torch.cat(shown, 2))
        probe = Probe(_differences(r, responses) / 2, error, masks, drawn, key)
        new, after, predicted = learned(
            held, before, probe, sites, sigmas, estimator.noise, estimator.probe_every, step, _reached(r)
        )
        found = [new[site.index] for site in sites] + after.tensors()
        if corrects:
            observed = _differences(r, rest) / (2 * error.shape[0])
            unexplained = observed - predicted
            found += [unexplained / (sigmas[site.index] * len(draws)) for site in sites]
        return found

    writes = [f"new:{key}" for key in (*jacobians, *counters)]
    writes += [f"runtime:weights.{site.index}" for site in sites] if corrects else []
    r.function(f"L{run.index}", learn, reads, writes, copies={"runtime:draws": draws}, run=run.index, perturbed=True)


def _reached(r: Recorder) -> dict[int, Tensor]:
    return {index: reach.cpu() for index, reach in r.compiled.reached.items()}


def _differences(r: Recorder, chunked: Sequence[Tensor]) -> Tensor:
    """ℓ⁺ − ℓ⁻ of every pair, in the order of the draws (`execution.step`)."""
    if r.compiled.sequential:
        pairs = zip(chunked[::2], chunked[1::2], strict=True)
        return torch.cat([plus - minus for plus, minus in pairs])
    return torch.cat([plus - minus for plus, minus in (chunk.chunk(2) for chunk in chunked)])


def _noisy_gradient(
    r: Recorder, gradient: GradientSubgraph, ids: Sequence[tuple[int, ...]], draws: tuple[int, ...]
) -> None:
    site = gradient.site.index
    if gradient.source == "corrected":
        r.kinds["runtime:draws"] = Like((len(draws),), torch.int64)
        _gradient(r, gradient, {"runtime:draws": draws})
        return
    if gradient.per_copy:
        for place, copies in enumerate(ids):
            weights = f"weights:{site}.{place}"
            _weights(r, gradient, [place], len(draws), weights)
            _gradient(r, gradient, {"runtime:copies": copies}, place, weights)
        return
    weights = f"weights:{site}"
    _weights(r, gradient, list(range(len(ids))), len(draws), weights)
    _gradient(r, gradient, {"runtime:draws": draws}, weights=weights)


def _weights(r: Recorder, gradient: GradientSubgraph, places: Sequence[int], draws: int, key: str) -> None:
    """The losses' weights (`execution.step.Step._weights`)."""
    estimator, compiled = r.estimator, r.compiled
    sigma = r.program.sigmas[gradient.site.index]
    reads = ["loss:clean", *(f"loss:{gradient.run}.{place}" for place in places)]
    batched, reach = gradient.site.noise_layout.batched, _reached(r).get(gradient.site.index)
    kind = r.kinds[_batched_input(r)]
    assert isinstance(kind, Like)
    reads.append(_batched_input(r))

    def weights(clean: Tensor, *values: Tensor) -> list[Tensor]:
        losses, samples = values[:-1], values[-1].shape[0]
        scale = sigma * draws
        if gradient.per_copy:
            found = (losses[0] - clean) / (scale * (2 if estimator.antithetic else 1))
        elif estimator.antithetic:
            found = _differences(r, losses) / (2 * scale)
        else:
            found = (torch.cat(list(losses)) - clean) / scale
        if estimator.credit == "sample":
            found = found / samples
        if compiled.credits_nodes:
            return [_credited(found, reach)]
        if estimator.credit == "batch" and batched:
            found = found.expand(-1, samples).contiguous()
        return [found]

    r.function(f"W:{key}", weights, reads, [key])


def _credited(weights: Tensor, reach: Tensor | None) -> Tensor:
    """`BoundModel.credited`."""
    if reach is None:
        return weights.sum(1, keepdim=True)
    if weights.shape[1] != reach.shape[1]:
        return weights.sum(1, keepdim=True).expand(-1, len(reach)).contiguous()
    return weights @ reach.T.to(weights.dtype)
