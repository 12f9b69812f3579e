"""Out of memory: say how many copies would fit."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ...compiler.program import CompiledModel
from .budget import describe_parts, fitting_chunk
from .rehearsal import rehearse

SHARE_TO_USE = 0.55
"""Of the free memory, what a step may take: allocators keep some, and compiling anew with the chunk takes some."""


def suggest_chunk(compiled: CompiledModel, samples: int, device: torch.device) -> str:
    """The message for a step that ran out of memory, with a chunk of copies that is predicted to fit, if one is."""
    free = available_bytes(device)
    taken = rehearse(compiled, samples)
    advice = "A smaller batch takes less."
    if compiled.runs and not compiled.sequential:
        chunk, least = fitting_chunk(compiled, int(SHARE_TO_USE * free), samples)
        smaller = max(compiled.estimator.step, taken.chunk // 2)  # it was too much, whatever is predicted
        smaller -= smaller % compiled.estimator.step
        if least is None:
            advice = f"chunk={smaller if chunk is None else min(chunk, smaller)} fits"
        else:
            advice = f"Even chunk={chunk} takes about {least.peak / 2**20:.1f} MiB: make the batch smaller"
        advice += "; chunks do not change the noise."
    return (
        f"a step of {samples} samples ran out of memory with {taken.chunk} copies side by side: it takes about "
        f"{taken.peak / 2**20:.1f} MiB ({describe_parts(taken)}) and {free / 2**20:.0f} MiB are free. {advice} "
        "Gradients, buffers and weights are as before the step."
    )


def available_bytes(device: torch.device) -> int:
    """Free memory of a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError):  # not Linux
        return free
    return free if limit == resource.RLIM_INFINITY else max(0, min(free, limit - used))
