"""The end of a step: how far predictions are trusted, the updates, and the check for numbers that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...compiler.to_onnx.trace import Like
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
    trust = _trust(r, list(found))
    update, options = r.optimizer.update, r.optimizer.options
    checked = []
    r.kinds["optimizer:steps"] = Like((), torch.int64)
    for name, gradients in found.items():
        weight = r.parameters[name]
        r.kinds[f"parameter:{name}"] = Like(tuple(weight.shape), weight.dtype)
        moments = [f"optimizer:{name}.{each}" for each in update.state]
        for key in moments:
            r.kinds[key] = r.kinds[f"parameter:{name}"]
        extra = [trust[name], "feedback:steps"] if r.learns else []
        reads = [f"parameter:{name}", "runtime:lr", "optimizer:steps", *extra, *moments, *gradients]

        def step(
            weight: Tensor, lr: Tensor, count: Tensor, *values: Tensor, number: int = len(gradients)
        ) -> list[Tensor]:
            rest = list(values)
            share, taught = (rest.pop(0), rest.pop(0)) if r.learns else (None, None)
            state = {each: rest.pop(0) for each in update.state}
            gradient = rest[0]
            for more in rest[1:number]:
                gradient = gradient + more
            gradient = gradient.to(weight.dtype)
            finite = (gradient * 0).sum()  # 0, or a NaN
            if taught is not None and r.warmup:
                gradient = torch.where(taught < r.warmup, torch.zeros_like(gradient), gradient)
            new, after = update.step(weight, gradient, state, lr, (count + 1).double(), options)
            if share is not None:
                new = torch.lerp(weight, new, share.to(weight.dtype))
            return [new, *(after[each] for each in update.state), finite.double()]

        writes = [f"new:{key}" for key in (f"parameter:{name}", *moments)] + [f"finite:{name}"]
        r.function(f"U:{name}", step, reads, writes)
        checked.append(f"finite:{name}")

    def check(count: Tensor, *values: Tensor) -> list[Tensor]:
        total = sum((value.double().sum() * 0 for value in values), torch.zeros((), dtype=torch.float64))
        loss = values[0].sum() if r.compiled.credits_nodes else values[0].mean()
        return [total == 0, loss.float(), count + 1]

    r.function("C", check, ["optimizer:steps", *losses, *checked], ["finite", "loss", "new:optimizer:steps"])


def _trust(r: Recorder, names: Sequence[str]) -> dict[str, str]:
    """Keys of the trust of each parameter, by name (`Program.trust`)."""
    if not r.learns:
        return {}
    program, compiled = r.program, r.compiled
    assert program.feedback is not None
    order = list(program.feedback.jacobians)
    at = {site.output: site.index for site in compiled.sites}
    read: dict[str, list[list[int]]] = {}
    for gradient in compiled.gradients:
        points = [at[end] for end in gradient.site.ends if at.get(end) in program.feedback.jacobians]
        for name in gradient.site.parameters:
            read.setdefault(name, []).append(points)
    counters = [f"feedback:{name}" for name in NAMES]
    merged = [f"new:{key}" if order else key for key in counters]

    def trust(*values: Tensor) -> list[Tensor]:
        state = Counters(*values)
        one = torch.ones((), dtype=torch.float64)
        return [trust_of(state, order, read.get(name, [])) if r.estimator.trust else one for name in names]

    for key, new in zip(counters, merged, strict=True):
        r.kinds[new] = r.kinds[key]
    r.function("T", trust, merged, [f"trust:{name}" for name in names])
    return {name: f"trust:{name}" for name in names}
