"""The end of a step: how far predictions are trusted, the updates, and the check for numbers that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...compiler.to_onnx.trace import Described, Like
from .learning import NAMES, Counters, trust_of
from .recorder import Recorder


def add_updates(r: Recorder) -> None:
    found: dict[str, list[str]] = {}
    for task in r.tasks:
        for key in task.writes:
            if key.startswith("gradient:"):
                found.setdefault(key.removeprefix("gradient:").rsplit("@", 1)[0], []).append(key)
    written = [key for task in r.tasks if not task.perturbed for key in task.writes]
    losses = ["loss:clean", *sorted(key for key in written if key.startswith("loss:") and key != "loss:clean")]
    rate = _rates(r, list(found))
    update, options = r.optimizer.update, r.optimizer.options
    checked = []
    r.kinds["optimizer:steps"] = Like((), torch.int64)
    for name, gradients in found.items():
        weight = r.parameters[name]
        r.kinds[f"parameter:{name}"] = Like(tuple(weight.shape), weight.dtype)
        moments = [f"optimizer:{name}.{each}" for each in update.state]
        for key in moments:
            r.kinds[key] = r.kinds[f"parameter:{name}"]
        taught = ["feedback:steps"] if r.warmup else []
        reads = [f"parameter:{name}", rate[name], "optimizer:steps", *moments, *taught, *gradients]

        def step(weight: Tensor, lr: Tensor, count: Tensor, *values: Tensor) -> list[Tensor]:
            rest = list(values)
            state = {each: rest.pop(0) for each in update.state}
            moves = (rest.pop(0) >= r.warmup).to(weight.dtype) if r.warmup else None
            gradient = sum(rest[1:], rest[0]).to(weight.dtype)
            if moves is not None:
                gradient = gradient * moves
            new, after = update.step(weight, gradient, state, lr, (count + 1).double(), options)
            return [new, *(after[each] for each in update.state), (new * 0).sum()]  # 0, or a NaN, as of the gradient

        writes = [f"new:{key}" for key in (f"parameter:{name}", *moments)] + [f"finite:{name}"]
        r.function(f"U:{name}", step, reads, writes)
        checked.append(f"finite:{name}")
    if r.learns and r.program.feedback is not None and r.program.feedback.jacobians:
        checked.append("new:feedback:slopes")  # a NaN in a perturbed output reaches them, as it does the Jacobians
    for task in r.tasks:  # statistics of a batch of one sample, say
        floats = [key for key, kind in zip(task.writes, task.results, strict=True) if _is_floating(kind)]
        checked += [key for key in floats if key.startswith("mutation:")]

    def check(count: Tensor, *values: Tensor) -> list[Tensor]:
        losses_, others = values[: len(losses)], values[len(losses) :]
        total = sum(((value * 0).sum().double() for value in (*losses_, *others)), torch.zeros((), dtype=torch.float64))
        loss = losses_[0].sum() if r.compiled.credits_nodes else losses_[0].mean()
        return [total == 0, loss.float(), count + 1]

    r.function("C", check, ["optimizer:steps", *losses, *checked], ["finite", "loss", "new:optimizer:steps"])


def _is_floating(kind: Described) -> bool:
    return isinstance(kind, Like) and kind.dtype.is_floating_point


def _rates(r: Recorder, names: Sequence[str]) -> dict[str, str]:
    """Keys of the learning rate of each parameter, by name: what is asked for, times the trust (`Program.trust`). To
    scale a step of SGD, Adam or AdamW is to scale its learning rate."""
    if not r.learns:
        return dict.fromkeys(names, "runtime:lr")
    program, compiled = r.program, r.compiled
    assert program.feedback is not None
    order = list(program.feedback.jacobians)
    at = {site.output: site.index for site in compiled.sites}
    read: dict[str, list[tuple[int, ...]]] = {}
    for gradient in compiled.gradients:
        points = tuple(at[end] for end in gradient.site.ends if at.get(end) in program.feedback.jacobians)
        for name in gradient.site.parameters:
            read.setdefault(name, []).append(points)
    alike = {name: tuple(read.get(name, ())) if r.estimator.trust else () for name in names}
    distinct = list(dict.fromkeys(alike.values()))
    counters = [f"feedback:{name}" for name in NAMES]
    merged = [f"new:{key}" if order else key for key in counters]

    def rates(lr: Tensor, *values: Tensor) -> list[Tensor]:
        state = Counters(*values)
        return [(lr.double() * trust_of(state, order, points)).to(lr.dtype) for points in distinct]

    for key, new in zip(counters, merged, strict=True):
        r.kinds[new] = r.kinds[key]
    r.function("T", rates, ["runtime:lr", *merged], [f"lr:{place}" for place in range(len(distinct))])
    return {name: f"lr:{distinct.index(points)}" for name, points in alike.items()}
