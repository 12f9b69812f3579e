"""``onward inspect --memory``: what a step takes, when, and with how many copies side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from ..compiler.columns import size, table, wrapped
from ..compiler.program import CompiledModel
from ..passes.errors import OptionError
from ..runtime.memory.budget import with_chunk
from ..runtime.memory.rehearsal import MemoryPlan, rehearse
from .common import to_json

FORMATS = ("text", "json")
"""Of `render_memory`."""


def check_memory(memory: bool, format_: str, others: dict[str, bool]) -> None:
    """Raise OptionError for what cannot be had together with ``--memory``."""
    if not memory:
        return
    for option, given in others.items():
        if given:
            raise OptionError(f"--memory shows what a step takes; {option} is another question. Ask one at a time.")
    if format_ not in FORMATS:
        raise OptionError(f"--format {format_} is of graphs; with --memory it is one of {', '.join(FORMATS)}.")


def render_memory(compiled: CompiledModel, name: str, format_: str) -> str:
    """The memory of a step of the model called `name`, on a batch of the example's size, in a format of `FORMATS`."""
    plan = rehearse(compiled)
    chunks = [rehearse(with_chunk(compiled, chunk)) for chunk in _choices(compiled)]
    if format_ == "json":
        return to_json({"model": name, **asdict(plan), "chunks": {one.chunk: one.peak for one in chunks}})
    beside = f", {plan.chunk} copies side by side" if plan.chunk else ""
    parts = [
        f"{name}\n  a step of {plan.samples} samples{beside} takes {size(plan.peak)} at {plan.at}",
        f"The peak consists of\n{_parts_table(plan)}",
        f"In the course of the step\n{_actions_table(plan)}",
    ]
    if chunks:
        parts.append(f"With other chunks\n{_chunks_table(chunks)}")
    return "\n\n".join([*parts, wrapped(_LEGEND, "  ")]) + "\n"


_LEGEND = (
    "Predicted: the step is run on tensors without data, and what is alive is counted. Not in it, because it is there "
    "before and after: parameters, buffers, the batch, what feedback has learned, the optimizer's state. "
    "`onward train --memory 2GiB` chooses the largest chunk that fits; chunks do not change the noise. "
    "Without a chunk σ is measured with 8 copies at once, with one in chunks too"
)


def _choices(compiled: CompiledModel) -> list[int]:
    """Chunks from a pair (or one copy) on, each twice the last, up to all copies."""
    if compiled.sequential or not compiled.runs:
        return []
    step, most = compiled.estimator.step, max(run.copies for run in compiled.runs)
    doubled = [step << power for power in range(most.bit_length()) if step << power < most]
    return [*doubled, most]


def _parts_table(plan: MemoryPlan) -> str:
    parts = sorted(plan.parts.items(), key=lambda item: -item[1])
    rows = [(name, size(count), f"{100 * count / plan.peak:.0f} %") for name, count in parts]
    return table(["part", "takes", "share"], rows, "lrr")


def _actions_table(plan: MemoryPlan) -> str:
    rows = [
        (one.name, size(one.before), size(one.peak), size(one.after), "●" if one.name == plan.at else "")
        for one in plan.actions
    ]
    return table(["action", "before", "peak", "after", "largest"], rows, "lrrrl")


def _chunks_table(plans: Sequence[MemoryPlan]) -> str:
    return table(["chunk", "peak", "at"], [(str(one.chunk), size(one.peak), one.at) for one in plans], "rrl")
