"""``memory=``: how many copies run side by side, so that a step stays within a budget."""

from __future__ import annotations

import bisect
import numbers
import os
import re
from dataclasses import replace
from pathlib import Path

import torch

from ...compiler.columns import size
from ...compiler.program import CompiledModel
from ...passes.errors import OptionError
from .rehearsal import MemoryPlan, rehearse

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_memory(given: int | float | str, device: torch.device) -> int:
    """Bytes: a number of them, ``"2GiB"``, or a fraction below 1 (0.5, or ``"0.5"``) of the device's memory.

    Raises:
        OptionError: it is nothing of that kind, or not positive.
    """
    number, unit = given, ""
    if isinstance(given, str):
        found = re.fullmatch(r"\s*([0-9]+|[0-9]*\.[0-9]+)\s*([KMG]i?B|B)?\s*", given, re.IGNORECASE)
        if found is None:
            raise OptionError(
                f"memory={given!r}: expected a number with a unit ({', '.join(('KiB', 'MiB', 'GiB', 'KB', 'MB', 'GB'))}"
                "), for example 2GiB; a number of bytes; or a fraction of the device's memory, for example 0.5."
            )
        number, unit = (float(found[1]) if "." in found[1] else int(found[1])), (found[2] or "").upper()
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise OptionError(f"memory={given!r}: it has to be a number of bytes, a text such as '2GiB', or a fraction.")
    if not isinstance(number, numbers.Integral) and not unit:
        if not 0 < number < 1:
            raise OptionError(
                f"memory={given!r}: a fraction of the device's memory lies between 0 and 1. For bytes give a whole "
                "number, or a unit: '2GiB'."
            )
        return int(number * total_bytes(device))
    count = int(number * _UNITS.get(unit, 1))
    if count < 1:
        raise OptionError(f"memory={given!r}: a step needs at least some bytes.")
    return count


def total_bytes(device: torch.device) -> int:
    """Memory of a device, or of the container (cgroup version 2) that may use less."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        allowed = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no container, or no limit: "max"
        return total
    return min(total, allowed)


def within(compiled: CompiledModel, budget: int, *, workers: int = 1) -> CompiledModel:
    """The same program with the largest chunk of copies at which a step on a batch of the example's size is predicted
    to take `budget` bytes at most, beyond what `MemoryPlan` leaves out.

    Raises:
        OptionError: the estimator has a chunk already, or even the smallest takes more.
    """
    chunk = compiled.estimator.chunk
    if chunk is not None:
        raise OptionError(f"chunk={chunk} and memory= both say how many copies run side by side. Give one.")
    found, least = fitting_chunk(compiled, budget, workers=workers)
    if least is not None:
        side_by_side = f" with chunk={least.chunk}" if compiled.runs and not compiled.sequential else ""
        raise OptionError(
            f"memory={size(budget)} is too little: a step of {least.samples} samples takes {size(least.peak)} even"
            f"{side_by_side}, at {least.at}: {describe_parts(least)}. Allow more, or make the batch smaller."
        )
    return with_chunk(compiled, found)


def fitting_chunk(
    compiled: CompiledModel, budget: int, samples: int | None = None, *, workers: int = 1
) -> tuple[int | None, MemoryPlan | None]:
    """The largest chunk that fits (None: all copies at once, also while σ is measured), and None; or the smallest, and
    what it takes, if that does not fit."""

    def plan(chunk: int | None) -> MemoryPlan:
        return rehearse(with_chunk(compiled, chunk), samples, workers=workers)

    step = compiled.estimator.step
    choices = range(step, max((run.copies for run in compiled.runs), default=step) + 1, step)
    everything = plan(None)
    if everything.peak <= budget:
        return None, None
    if compiled.sequential or not compiled.runs:  # a chunk changes nothing
        return None, everything
    fits = bisect.bisect_right(choices, budget, key=lambda chunk: plan(chunk).peak)
    return (choices[fits - 1], None) if fits else (choices[0], plan(choices[0]))


def with_chunk(compiled: CompiledModel, chunk: int | None) -> CompiledModel:
    """The same program with other chunks: no graph depends on them."""
    return replace(compiled, estimator=replace(compiled.estimator, chunk=chunk))


def describe_parts(plan: MemoryPlan) -> str:
    """What the peak consists of, the largest first."""
    parts = sorted(plan.parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size(count)}" for name, count in parts if count >= plan.peak / 100)
