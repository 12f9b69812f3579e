"""Steps whose operations Python issues, beside the same replayed from CUDA graphs, compiled by inductor, and both.

    python benchmarks/cuda_graphs.py
    python benchmarks/cuda_graphs.py --inductor
    python benchmarks/cuda_graphs.py --inductor --device cpu --threads 1 --models mlp "mlp of 12 layers" resnet5 vgg8

Learned feedback (*auto*) after 25 steps, in steps without a perturbed run, with backpropagation beside them; with
``--inductor`` also in steps with one, which are never replayed. All variants run in turn, A B C A B C …, and every
ratio is formed within a round. The seconds of
compiling are this run's: inductor keeps kernels between runs in the folder ``TORCHINDUCTOR_CACHE_DIR``, which should be
a new one. A CPU has no CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import CLOCKS, Spread, interleave
from rich.console import Console
from rich.table import Table
from step import in_ms, ratio
from torch import nn

from onward import Program, models
from onward import compile as compile_program
from onward.evidence.provenance import describe, machine
from onward.runtime.execution.graphs import GraphedExecutor

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (models.mlp, (1, 8, 8)),
    "mlp of 12 layers": (lambda: models.mlp(hidden=[64] * 11), (1, 8, 8)),
    "resnet5": (lambda: models.resnet5(num_classes=10, in_channels=1), (1, 8, 8)),
    "vit": (models.vit, (1, 8, 8)),
    "resnet9": (lambda: models.resnet9(num_classes=10, in_channels=3), (3, 32, 32)),
    "vgg8": (lambda: models.vgg8(num_classes=10, in_channels=3), (3, 32, 32)),
}
"""Models and the shapes of their images."""

WARM_UP = 25
"""Steps before the first that is timed: feedback has been learned, graphs are captured."""

KINDS: dict[str, dict[str, bool]] = {
    "issued": {},
    "replayed": {"cuda_graphs": True},
    "compiled": {"inductor": True},
    "both": {"inductor": True, "cuda_graphs": True},
}
"""Options of the programs that are compared."""


@dataclass(frozen=True)
class Row:
    """What was measured of one model."""

    model: str
    ms: dict[str, Spread]
    """A step without a perturbed run by kind, and a step of backpropagation."""
    issued_over: dict[str, Spread]
    """How many times as long an issued step takes, by what it is compared to."""
    perturbed_ms: dict[str, Spread]
    """A step with a perturbed run, issued and compiled."""
    perturbed_issued_over_compiled: Spread | None
    compiled_graphs: int
    compile_seconds: float
    notes: tuple[str, ...]
    """Why no step is replayed, and which graphs are not compiled."""


def measure(name: str, batch: int, rounds: int, device: torch.device, inductor: bool) -> Row:
    """One model."""
    make, shape = MODELS[name]
    images, target = torch.randn(batch, *shape, device=device), torch.randint(0, 10, (batch,), device=device)
    variants: dict[str, Callable[[], object]] = {}
    notes: list[str] = []
    compiled, seconds = 0, 0.0
    for kind, options in KINDS.items():
        if (device.type != "cuda" and "cuda_graphs" in options) or (not inductor and "inductor" in options):
            continue
        torch.manual_seed(0)
        program = compile_program(make().to(device), images, loss=F.cross_entropy, estimator="auto", **options)

        def step(perturbed: bool = False, program: Program = program) -> object:
            program.next_probe = program.next_calibration = program.step_count + 1
            program.next_probe -= perturbed
            return program.step(images, target)

        for _ in range(WARM_UP):
            program.step(images, target)
        for _ in range(3):
            step()
        variants[kind] = step
        if inductor and not options.get("cuda_graphs"):
            step(perturbed=True)
            variants[f"{kind}, perturbed"] = partial(step, perturbed=True)
        executor = program.executor
        if isinstance(executor, GraphedExecutor) and not executor.replayed:
            notes.append(f"{kind}: {executor.reason or 'nothing was replayed'}")
        if executor.inductor is not None:
            notes += [f"{kind}: {graph} {why}" for graph, why in executor.inductor.refused.items()]
            if kind == "compiled":
                compiled, seconds = executor.inductor.compiled, executor.inductor.seconds
    net = make().to(device)
    variants["backpropagation"] = lambda: F.cross_entropy(net(images), target).backward()
    times = interleave(variants, rounds, CLOCKS["wall"], device)
    clean = {kind: of for kind, of in times.items() if "perturbed" not in kind}
    perturbed = {kind.removesuffix(", perturbed"): of for kind, of in times.items() if "perturbed" in kind}
    return Row(
        name,
        {kind: in_ms(of) for kind, of in clean.items()},
        {kind: ratio(times["issued"], of) for kind, of in clean.items() if kind != "issued"},
        {kind: in_ms(of) for kind, of in perturbed.items()},
        ratio(perturbed["issued"], perturbed["compiled"]) if perturbed else None,
        compiled,
        seconds,
        tuple(notes),
    )


def table(rows: list[Row], batch: int) -> Table:
    """The measurements."""
    shown = Table(title=f"A step of {batch} samples without a perturbed run (medians, quartiles)", title_justify="left")
    shown.add_column("model")
    kinds = list(rows[0].ms)
    for kind in kinds:
        shown.add_column(f"{kind}, ms", justify="right")
    for kind in rows[0].issued_over:
        shown.add_column(f"issued ÷ {kind}", justify="right")
    compiled = "compiled" in kinds
    if compiled:
        for heading in ("perturbed: issued ÷ compiled", "graphs compiled", "in seconds"):
            shown.add_column(heading, justify="right")
    for row in rows:
        cells = [f"{row.ms[kind].median:.2f}" for kind in kinds] + [each.show() for each in row.issued_over.values()]
        if row.perturbed_issued_over_compiled is not None:
            cells += [row.perturbed_issued_over_compiled.show(), str(row.compiled_graphs), f"{row.compile_seconds:.0f}"]
        shown.add_row(row.model, *cells)
    shown.caption = "\n".join(f"{row.model}, {note}" for row in rows for note in row.notes) or None
    return shown


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--batch", type=int, default=64, metavar="N")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--inductor", action="store_true", help="also compile the graphs of a step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    console = Console(width=None if Console().is_terminal else 200)
    found: dict[str, Any] = machine(device)
    console.print(describe(found), highlight=False)
    rows = [measure(name, options.batch, options.rounds, device, options.inductor) for name in options.models]
    console.print(table(rows, options.batch))
    if options.json is not None:
        result = {"machine": found, "batch": options.batch, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
