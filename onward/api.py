"""`compile`: from a model to a program that trains it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .compiler.driver import compile_model
from .compiler.estimator import LikelihoodRatio
from .passes.errors import OptionError, unknown_name
from .runtime.calibration.record import Calibration
from .runtime.loss import Loss, check_loss
from .runtime.memory.budget import parse_memory, within
from .runtime.program import Program


def compile(
    model: nn.Module,
    example_inputs: Any,
    *,
    loss: Loss,
    estimator: LikelihoodRatio | Calibration | str | None = None,
    unbatched: bool = False,
    seed: int = 0,
    workers: int = 1,
    streams: int = 1,
    cuda_graphs: bool = False,
    inductor: bool = False,
    memory: int | float | str | None = None,
) -> Program:
    """Compile `model` into a program that trains it without a backward pass.

    Args:
        model: any module that ``torch.export`` (or ``torch.fx.symbolic_trace``) can trace; trained in place, in the
            train/eval mode that it has now.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments of ``forward``.
            Tensors have the batch first; the batch size stays free.
        loss: ``(output, target) -> one loss a sample``; a torch loss with a ``reduction`` may be given as it is. It may
            have no derivative, be a black box, and need not be traceable.
        estimator: the settings; the default is `LikelihoodRatio()`. ``"auto"`` is `LikelihoodRatio.auto()`, which
            measures what it needs while it trains; a `Calibration` is what was measured and chosen before
            (`Program.calibrate`).
        unbatched: the example is one sample without a batch dimension, a whole graph: ``model(x, edge_index)`` with
            node features ``(nodes, features)``. Floating-point tensors are what a step reads; every other input (the
            edges) is part of the program, and a step has to be given the same. `loss` gets outputs as the model returns
            them and gives one number, or one a node (`runtime.whole_loss`).
        seed: seed of all noise.
        workers: CPU threads that share a step's gradient subgraphs and perturbed runs (`runtime.execution.threads`);
            torch's own threads are divided among them (2 workers have half of them each). With more than one, the first
            steps measure whether tasks go faster side by side or one after the other, and the faster way is kept; the
            result's bits do not depend on it. `Trainer` makes the optimizer's updates tasks of the next step, where
            that measures faster (`Trainer.pipeline`). Where nothing beats a step with all threads, leave it at 1.
        streams: streams of the GPU that they are issued on (`runtime.execution.streams`); no bit depends on it. On a
            GPU `workers` does nothing; on a CPU there are no streams, and more than one is an error.
        cuda_graphs: on a GPU, replay steps from CUDA graphs (`runtime.execution.graphs`): for models whose kernels take
            less time than issuing them. Each of up to four kinds of steps (a batch size, with or without a perturbed
            run) keeps the memory of a step, and all together a copy of what feedback has learned; a step that cannot be
            captured goes on as without. Numbers that a loss's code reads beside tensors stay as they were captured, but
            for a comparison every 50 steps. With `streams` a graph has as many branches. Not together with `memory`,
            which does not count what graphs keep.
        inductor: have torch's inductor compile the graphs of a step, each when it is first called
            (`runtime.execution.inductor`): seconds for each, of which a model has from three to hundreds, most where
            `workers` or `streams` keep tasks apart. Needs a C++ compiler on a CPU, Triton on a GPU. Results are those
            without to rounding, not bit for bit, and the same from run to run. A graph that cannot be compiled, or
            gives other numbers, stays as it is, with a warning. Each graph is compiled for up to four batch sizes;
            others go as without. Not together with `memory`, which does not count what compiled graphs hold.
        memory: what a step on a batch of the example's size may take, beyond parameters, buffers, the batch, what
            feedback has learned and the optimizer's state: bytes, ``"2GiB"``, or a fraction of the device's memory
            (0.5). Chooses how many copies run side by side, by prediction (`runtime.memory`); in place of the
            estimator's ``chunk``, and like that it does not change the noise.

    Raises:
        onward.errors.OnwardError: the model, an option or the example cannot work, or the calibration is of another
            model; the message says where and what to do.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is {type(model).__name__}; it has to be a torch.nn.Module.")
    check_loss(loss)
    if isinstance(estimator, str):
        if estimator != "auto":
            raise unknown_name("estimator", estimator, ("auto",))
        estimator = LikelihoodRatio.auto()
    if estimator is not None and not isinstance(estimator, (LikelihoodRatio, Calibration)):
        raise OptionError(
            f"estimator is {type(estimator).__name__}; it has to be an onward.LikelihoodRatio, an onward.Calibration "
            'or "auto".'
        )
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise OptionError(f"seed={seed!r}: it has to be an integer of 64 bits.")
    if type(workers) is not int or workers < 1:
        raise OptionError(f"workers={workers!r}: the threads of a step are a number from 1 on.")
    if type(streams) is not int or streams < 1:
        raise OptionError(f"streams={streams!r}: the streams of a step are a number from 1 on.")
    for name, chosen, uncounted in (
        ("cuda_graphs", cuda_graphs, "does not count what graphs keep"),
        ("inductor", inductor, "counts what operations hold one by one, not what compiled graphs do"),
    ):
        if not isinstance(chosen, bool):
            raise OptionError(f"{name}={chosen!r}: it is True or False.")
        if chosen and memory is not None:
            raise OptionError(
                f"memory={memory!r} with {name}=True: the plan of a step {uncounted}. Give the estimator a chunk "
                "instead."
            )
    if isinstance(estimator, Calibration):
        compiled = estimator.compile(model, example_inputs, unbatched=unbatched)
    else:
        compiled = compile_model(model, example_inputs, estimator or LikelihoodRatio(), unbatched=unbatched)
    if memory is not None:
        available = parse_memory(memory, compiled.captured.signature.device)
        compiled = within(compiled, available, workers=max(workers, streams))
    return Program(
        model, compiled, loss, seed, workers=workers, streams=streams, cuda_graphs=cuda_graphs, inductor=inductor
    )
