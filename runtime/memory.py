"""Out of memory: recognise it, and say how many copies would fit."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, fx

from ..compiler.program import CompiledModel, PerturbedRun
from ..passes.graph import Layout, outputs

SHARE_TO_USE = 0.55
"""Of the free memory, what copies may take: allocators keep some, and compiling anew with the chunk takes some."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is torch's or Python's way of saying that an allocation failed."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def suggest_chunk(compiled: CompiledModel, samples: int, device: torch.device) -> str:
    """The message for a step that ran out of memory, with a chunk of copies that fits by the liveness of its runs."""
    estimator = compiled.estimator
    per_copy = max((_copy_bytes(compiled, run) for run in compiled.runs), default=0) * samples
    free = available_bytes(device)
    fits = int(SHARE_TO_USE * free // per_copy) if per_copy else 0
    step = 2 if estimator.antithetic else 1
    copies = max((run.copies for run in compiled.runs), default=step)
    current = copies if estimator.chunk is None else min(estimator.chunk, copies)
    fits = max(step, min(fits, current // 2) // step * step)
    return (
        f"a step of {samples} samples ran out of memory with {current} copies side by side: a copy takes about "
        f"{per_copy / 2**20:.1f} MiB and {free / 2**20:.0f} MiB are free. chunk={fits} fits; chunks do not change the "
        "noise. Gradients, buffers and weights are as before the step."
    )


def _copy_bytes(compiled: CompiledModel, run: PerturbedRun) -> int:
    """Bytes a sample and copy of a run, or of the gradients that read the captures it leaves."""
    kept = sum(_bytes(node) for _, node in outputs(run.module) if isinstance(node, fx.Node))
    gradients = [g.site.layout.elements * 4 for g in compiled.gradients if g.run == run.index and g.per_copy]
    return max(peak_bytes(run.module), kept + 2 * max(gradients, default=0))


def peak_bytes(module: fx.GraphModule) -> int:
    """Bytes a sample and copy that are alive at once, at most, while `module` runs."""
    last_use = {}
    for node in module.graph.nodes:
        for source in node.all_input_nodes:
            last_use[source] = node
    alive = peak = 0
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        alive += _bytes(node)
        peak = max(peak, alive)
        alive -= sum(_bytes(s) for s in node.all_input_nodes if s.op == "call_function" and last_use[s] is node)
    return peak


def _bytes(node: fx.Node) -> int:
    layout: Layout | None = node.meta.get("layout")
    val = node.meta.get("val")
    return layout.elements * val.element_size() if layout is not None and isinstance(val, Tensor) else 0


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
