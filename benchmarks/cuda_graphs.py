"""Steps replayed from CUDA graphs, beside the same steps issued by Python, and backpropagation.

    python benchmarks/cuda_graphs.py
    python benchmarks/cuda_graphs.py --models mlp --steps clean perturbed --batch 32 --json graphs.json

*clean* and *perturbed* are steps of learned feedback (*auto*) after 25 steps; *copies* are the joint likelihood ratio's
with 16 copies, whose gradients need nothing but losses. *Branched* graphs have a branch for each stream. All variants
run in turn, A B C A B C …, and every ratio is formed within a round. On a CPU there are no graphs: ``--device cpu``
tries the program, without those columns.
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

from onward import LikelihoodRatio, models
from onward import compile as compile_program
from onward.evidence.provenance import describe, machine
from onward.runtime.execution.graphs import Graphed

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (models.mlp, (1, 8, 8)),
    "mlp of 12 layers": (lambda: models.mlp(hidden=[64] * 11), (1, 8, 8)),
    "resnet5": (lambda: models.resnet5(num_classes=10, in_channels=1), (1, 8, 8)),
    "vit": (models.vit, (1, 8, 8)),
    "resnet9": (lambda: models.resnet9(num_classes=10, in_channels=3), (3, 32, 32)),
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


@dataclass(frozen=True)
class Row:
    """What was measured of one model."""

    model: str
    step: str
    issued_ms: Spread
    """A step whose operations Python issues."""
    replayed_ms: Spread | None
    issued_over_replayed: Spread | None
    replayed_over_backpropagation: Spread | None
    issued_over_backpropagation: Spread
    branched_ms: Spread | None
    """Replayed from a graph with a branch for each of several streams."""
    replayed_over_branched: Spread | None
    reason: str
    """Why no step is replayed."""


def measure(name: str, kind: str, batch: int, rounds: int, streams: int, device: torch.device) -> Row:
    """One kind of steps of one model."""
    make, shape = MODELS[name]
    images, target = torch.randn(batch, *shape, device=device), torch.randint(0, 10, (batch,), device=device)
    variants: dict[str, Callable[[], object]] = {}
    reason = "a CPU has no graphs"
    for way in ("issued", "replayed", "branched") if device.type == "cuda" else ("issued",):
        torch.manual_seed(0)
        program = compile_program(
            make().to(device), images, loss=F.cross_entropy, estimator=STEPS[kind], cuda_graphs=way != "issued",
            streams=streams if way == "branched" else 1,
        )  # fmt: skip

        def step(program: Any = program) -> object:
            program.next_calibration = program.step_count + 1
            program.next_probe = program.step_count + (kind == "clean")
            return program.step(images, target)

        for _ in range(WARM_UP):
            program.step(images, target)
        for _ in range(3):
            step()
        variants[way] = step
        if isinstance(program.executor, Graphed):
            reason = program.executor.reason or ("" if program.executor.replayed else "nothing was replayed")
    net = make().to(device)
    variants["backpropagation"] = lambda: F.cross_entropy(net(images), target).backward()
    times = interleave(variants, rounds, CLOCKS["wall"], device)
    replayed, branched = (None, None) if reason else (times["replayed"], times["branched"])
    return Row(
        name,
        kind,
        in_ms(times["issued"]),
        in_ms(replayed) if replayed else None,
        ratio(times["issued"], replayed) if replayed else None,
        ratio(replayed, times["backpropagation"]) if replayed else None,
        ratio(times["issued"], times["backpropagation"]),
        in_ms(branched) if branched else None,
        ratio(replayed, branched) if replayed and branched else None,
        reason,
    )


def table(rows: list[Row], batch: int) -> Table:
    """The measurements."""
    shown = Table(title=f"A step of {batch} samples (medians, quartiles)", title_justify="left")
    shown.add_column("model")
    shown.add_column("step")
    headings = (
        "issued, ms", "replayed, ms", "issued ÷ replayed", "replayed ÷ backprop.", "replayed ÷ branched",
        "issued ÷ backprop.",
    )  # fmt: skip
    for heading in headings:
        shown.add_column(heading, justify="right")
    for row in rows:
        columns = (
            row.issued_ms, row.replayed_ms, row.issued_over_replayed, row.replayed_over_backpropagation,
            row.replayed_over_branched,
        )  # fmt: skip
        cells = ["–" if each is None else each.show() for each in columns]
        shown.add_row(row.model, row.step, *cells, row.issued_over_backpropagation.show())
    return shown


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="KIND")
    parser.add_argument("--batch", type=int, default=64, metavar="N")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--streams", type=int, default=4, help="branches of the graphs in the last variant")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    console = Console(width=None if Console().is_terminal else 140)
    found: dict[str, Any] = machine(device)
    console.print(describe(found), highlight=False)
    rows = [
        measure(name, kind, options.batch, options.rounds, options.streams, device)
        for name in options.models
        for kind in options.steps
    ]
    console.print(table(rows, options.batch))
    for reason in dict.fromkeys(row.reason for row in rows if row.reason):
        console.print(f"Not replayed: {reason}.", highlight=False)
    if options.json is not None:
        result = {"machine": found, "batch": options.batch, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
