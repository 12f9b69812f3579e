"""Weight gradients from packed signs on a GPU: one kernel beside the graph that unpacks, makes noise and multiplies.

    python benchmarks/packed_gradients.py
    python benchmarks/packed_gradients.py --models vgg8 --width 128 --copies 100 --capture stochastic --json packed.json

Of every site whose copies have captures of their own both ways run in turn, on what a step gave it. The composition's
signs and noise are kernels too, its product is torch's. Memory is what torch's allocator needs at most beside the
operands. On a CPU (``--device cpu``) both ways are the composition: the program can be tried, its times say nothing.
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
from torch import nn

from onward import LikelihoodRatio, Program, models
from onward import compile as compile_program
from onward.evidence.provenance import describe, machine
from onward.passes.fuse_packed_gradients import fuse_packed_gradients
from onward.runtime.execution.bindings import BoundGraph

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": lambda width: nn.Sequential(nn.Flatten(), models.mlp(3 * 32 * 32, (16 * width, 16 * width))),
    "resnet9": lambda width: models.resnet9(num_classes=10, in_channels=3, width=width),
    "vgg8": lambda width: models.vgg8(num_classes=10, in_channels=3, width=width),
}


@dataclass(frozen=True)
class Row:
    """What was measured of one site."""

    model: str
    site: str
    rows: int
    """Of the product: copies × samples × positions."""
    shape: tuple[int, ...]
    """Of the weight."""
    kernel_ms: Spread
    composition_over_kernel: Spread
    kernel_mib: float
    composition_mib: float


def operands(program: Program, batch: tuple[Any, ...]) -> dict[int, list[Any]]:
    """What a step gives the gradient subgraphs that can be fused, by site."""
    found: dict[int, list[Any]] = {}
    for site, (graph, description) in program.executor.gradients.items():
        if fuse_packed_gradients(description.module) is not description.module:

            def keep(*given: Any, site: int = site, forward: Callable[..., Any] = graph.forward) -> Any:
                found[site] = list(given)
                return forward(*given)

            graph.forward = keep
    program.step(*batch)
    return found


def peak(run: Callable[[], object], device: torch.device) -> float:
    """MiB that a run adds to what is allocated, on a GPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def measure(name: str, options: argparse.Namespace, device: torch.device) -> list[Row]:
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (options.batch,), device=device)
    estimator = LikelihoodRatio.alr(copies=options.copies, capture=options.capture)
    model = MODELS[name](options.width).to(device)
    program = compile_program(model, (images,), loss=F.cross_entropy, estimator=estimator, seed=0)
    rows = []
    for site, given in operands(program, (images, labels)).items():
        gradient = program.executor.gradients[site][1]
        graphs = {"kernel": fuse_packed_gradients(gradient.module), "composition": gradient.module}
        ways = {way: partial(BoundGraph(graph).forward, *given) for way, graph in graphs.items()}
        times = interleave(ways, options.rounds, CLOCKS["wall"], device)
        ratios = [slow / fast for slow, fast in zip(times["composition"], times["kernel"], strict=True)]
        layout = gradient.site.layout
        shape = tuple(program.model.get_parameter(gradient.site.parameters[0]).shape)
        rows.append(
            Row(
                name,
                gradient.site.name,
                options.copies * options.batch * layout.elements // shape[0],
                shape,
                Spread.of([1000 * seconds for seconds in times["kernel"]]),
                Spread.of(ratios),
                *(peak(run, device) for run in ways.values()),
            )
        )
    return rows


def table_of(rows: list[Row]) -> Table:
    shown = Table(title="Gradients from packed signs (medians, quartiles)", title_justify="left")
    for heading in ("model", "site", "rows", "weight", "kernel, ms", "composition ÷", "kernel, MiB", "composition"):
        shown.add_column(heading, justify="left" if heading in ("model", "site", "weight") else "right")
    for row in rows:
        cells = (row.model, row.site, str(row.rows), " × ".join(map(str, row.shape)), row.kernel_ms.show(3))
        shown.add_row(*cells, row.composition_over_kernel.show(), f"{row.kernel_mib:.1f}", f"{row.composition_mib:.1f}")
    return shown


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage; mlp has 16 times as many")
    parser.add_argument("--copies", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--capture", choices=("sign", "stochastic"), default="sign")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu tries the program without its kernels.")
    console, found = Console(width=None if Console().is_terminal else 140), machine(device)
    console.print(describe(found), highlight=False)
    with torch.no_grad():
        rows = [row for name in options.models for row in measure(name, options, device)]
    console.print(table_of(rows))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": found, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
