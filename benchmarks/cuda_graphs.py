"""Steps whose operations Python issues, beside the same replayed from CUDA graphs, compiled by inductor, and both.

    python benchmarks/cuda_graphs.py
    python benchmarks/cuda_graphs.py --models mlp --steps clean perturbed --inductor --json graphs.json
    python benchmarks/cuda_graphs.py --inductor --device cpu --threads 1 --models mlp "mlp of 12 layers" resnet5 vgg8

*clean* and *perturbed* are steps of learned feedback (*auto*) after 25 steps; *copies* are the joint likelihood ratio's
with 16 copies, whose gradients need nothing but losses. *Branched* graphs have a branch for each stream. All variants
run in turn, A B C A B C …, and every ratio is formed within a round. The seconds of compiling are this run's: inductor
keeps kernels between runs in the folder ``TORCHINDUCTOR_CACHE_DIR``, which should be a new one. A CPU has no CUDA
graphs: there a step is issued or compiled.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import CLOCKS, Spread, interleave
from rich.console import Console
from rich.table import Table
from step import in_ms, ratio
from torch import nn

from onward import LikelihoodRatio, Program, models
from onward import compile as compile_program
from onward.evidence.provenance import describe, machine
from onward.runtime.execution.graphs import Graphed

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (models.mlp, (1, 8, 8)),
    "mlp of 12 layers": (lambda: models.mlp(hidden=[64] * 11), (1, 8, 8)),
    "resnet5": (lambda: models.resnet5(num_classes=10, in_channels=1), (1, 8, 8)),
    "vit": (models.vit, (1, 8, 8)),
    "resnet9": (lambda: models.resnet9(num_classes=10, in_channels=3), (3, 32, 32)),
    "vgg8": (lambda: models.vgg8(num_classes=10, in_channels=3), (3, 32, 32)),
}
"""Models and the shapes of their images."""

STEPS: dict[str, LikelihoodRatio] = {
    "clean": LikelihoodRatio.auto(),
    "perturbed": LikelihoodRatio.auto(),
    "copies": LikelihoodRatio(copies=16, groups="joint"),
}
"""Kinds of steps and their estimators."""

WARM_UP = 25
"""Steps before the first that is timed: feedback has been learned, graphs are captured."""


def ways(streams: int, device: torch.device, inductor: bool) -> dict[str, dict[str, Any]]:
    """Options of the programs that are compared."""
    found: dict[str, dict[str, Any]] = {"issued": {}}
    graphs = {"cuda_graphs": True}
    if device.type == "cuda":
        found |= {"replayed": graphs, "branched": {**graphs, "streams": streams}}
    if inductor:
        found |= {"compiled": {"inductor": True}}
    if inductor and device.type == "cuda":
        found |= {"both": {**graphs, "inductor": True}}
    return found


@dataclass(frozen=True)
class Row:
    """What was measured of one kind of steps of one model."""

    model: str
    step: str
    ms: dict[str, Spread]
    """A step by the way it is run, and a step of backpropagation."""
    issued_over: dict[str, Spread]
    """How many times as long an issued step takes, by what it is compared to."""
    compiled_graphs: int
    compile_seconds: float
    notes: tuple[str, ...]
    """Why no step is replayed, and which graphs are not compiled."""


def measure(
    name: str, kind: str, batch: int, rounds: int, device: torch.device, options: dict[str, dict[str, Any]]
) -> Row:
    """One kind of steps of one model."""
    make, shape = MODELS[name]
    images, target = torch.randn(batch, *shape, device=device), torch.randint(0, 10, (batch,), device=device)
    variants: dict[str, Callable[[], object]] = {}
    notes: list[str] = []
    compiled, seconds = 0, 0.0
    for way, chosen in options.items():
        torch.manual_seed(0)
        program = compile_program(make().to(device), images, loss=F.cross_entropy, estimator=STEPS[kind], **chosen)

        def step(program: Program = program) -> object:
            program.next_calibration = program.step_count + 1
            program.next_probe = program.step_count + (kind == "clean")
            return program.step(images, target)

        for _ in range(WARM_UP):
            program.step(images, target)
        for _ in range(3):
            step()
        variants[way] = step
        executor = program.executor
        if isinstance(executor, Graphed):
            reasons = [executor.reason, *executor.refused.values()]
            notes += [f"{way}: {reason}" for reason in reasons if reason]
            notes += [] if executor.replayed or any(reasons) else [f"{way}: nothing was replayed"]
        if executor.inductor is not None:
            notes += [f"{way}: {graph} {why}" for graph, why in executor.inductor.refused.items()]
            if way == "compiled":
                compiled, seconds = executor.inductor.compiled, executor.inductor.seconds
    net = make().to(device)
    variants["backpropagation"] = lambda: F.cross_entropy(net(images), target).backward()
    times = interleave(variants, rounds, CLOCKS["wall"], device)
    return Row(
        name,
        kind,
        {way: in_ms(of) for way, of in times.items()},
        {way: ratio(times["issued"], of) for way, of in times.items() if way != "issued"},
        compiled,
        seconds,
        tuple(notes),
    )


def table(rows: list[Row], batch: int) -> Table:
    """The measurements."""
    shown = Table(title=f"A step of {batch} samples (medians, quartiles)", title_justify="left")
    shown.add_column("model")
    shown.add_column("step")
    for way in rows[0].ms:
        shown.add_column(f"{way}, ms", justify="right")
    for way in rows[0].issued_over:
        shown.add_column(f"issued ÷ {way}", justify="right")
    compiled = "compiled" in rows[0].ms
    for heading in ("graphs compiled", "in seconds") if compiled else ():
        shown.add_column(heading, justify="right")
    for row in rows:
        cells = [f"{each.median:.2f}" for each in row.ms.values()] + [each.show() for each in row.issued_over.values()]
        cells += [str(row.compiled_graphs), f"{row.compile_seconds:.0f}"] if compiled else []
        shown.add_row(row.model, row.step, *cells)
    shown.caption = "\n".join(f"{row.model}, {row.step}, {note}" for row in rows for note in row.notes) or None
    return shown


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="KIND")
    parser.add_argument("--batch", type=int, default=64, metavar="N")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--streams", type=int, default=4, help="branches of the graphs of one variant")
    parser.add_argument("--inductor", action="store_true", help="also compile the graphs of a step")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    given = parser.parse_args(argv)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    console = Console(width=None if Console().is_terminal else 200)
    found: dict[str, Any] = machine(device)
    console.print(describe(found), highlight=False)
    options = ways(given.streams, device, given.inductor)
    rows: list[Row] = []
    for name in given.models:
        rows += [measure(name, kind, given.batch, given.rounds, device, options) for kind in given.steps]
        console.print(table(rows, given.batch))
        if given.json is not None:
            result = {"machine": found, "batch": given.batch, "rows": [asdict(row) for row in rows]}
            given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
