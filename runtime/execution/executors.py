"""Which executor runs a program's steps: by the device that it was compiled for, and how much may run side by side."""

from __future__ import annotations

import torch

from ...compiler.program import CompiledModel
from ...passes.errors import OptionError
from .executor import SerialExecutor
from .graphs import GraphedExecutor, GraphedStreams, reason_against
from .streams import StreamedExecutor
from .threads import ThreadedExecutor


def make_executor(
    compiled: CompiledModel,
    sigmas: list[float],
    workers: int,
    streams: int,
    cuda_graphs: bool = False,
    inductor: bool = False,
) -> SerialExecutor:
    """On a GPU that of `streams`, on a CPU that of `workers`, if there is more than one; else the serial one. On a GPU
    its steps may be replayed from `cuda_graphs`. With `inductor` any of them has its graphs compiled.

    Raises:
        OptionError: `streams` or `cuda_graphs` on a CPU, which has none; graphs of a program that has no step for them;
            `inductor` without its compiler.
    """
    executor = _executor(compiled, sigmas, workers, streams, cuda_graphs)
    if inductor:
        executor.use_inductor()
    return executor


def _executor(
    compiled: CompiledModel, sigmas: list[float], workers: int, streams: int, cuda_graphs: bool
) -> SerialExecutor:
    devices = {leaf[2] for leaf in compiled.captured.signature.leaves if isinstance(leaf, tuple)}
    on_cpu = torch.device("cpu") in devices
    if streams > 1 and on_cpu:
        raise OptionError(
            f"streams={streams}: the example inputs are on the CPU, and streams are a GPU's. Compile the model and the "
            "inputs on a GPU, or let threads share a step (workers=2)."
        )
    if cuda_graphs and on_cpu:
        raise OptionError(
            "cuda_graphs=True: the example inputs are on the CPU, and graphs are a GPU's. Compile the model and the "
            "inputs on a GPU, or leave it out."
        )
    if cuda_graphs and (reason := reason_against(compiled)):
        raise OptionError(f"cuda_graphs=True: no step of this program would be replayed, since {reason}. Leave it out.")
    if streams > 1:
        return (GraphedStreams if cuda_graphs else StreamedExecutor)(compiled, sigmas, streams)
    if cuda_graphs:
        return GraphedExecutor(compiled, sigmas)
    return SerialExecutor(compiled, sigmas) if workers == 1 else ThreadedExecutor(compiled, sigmas, workers)
