"""The memory of a step: predicted and measured, and how it grows with the copies.

    python benchmarks/memory.py --threads 1
    python benchmarks/memory.py --models vit --estimators joint learned --json memory.json

Measured is the high-water mark of the resident set in a fresh process, in its second step, above its level before the
step (`common.peak_memory`), NumPy's buffers included: once with an allocator that gives freed blocks back to the system
(glibc's, told to), which is what was in use, and with ``--resident`` once as it is: by itself it keeps part of them.
Predicted is what ``onward inspect --memory`` shows. Every step measured has a perturbed run, and measures σ if its
estimator does.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import peak_memory
from rich.console import Console
from rich.table import Table
from torch import nn

from onward import LikelihoodRatio, Program, models
from onward import compile as compile_program
from onward.evidence.provenance import describe, machine
from onward.runtime.memory.rehearsal import MemoryPlan, rehearse


@dataclass(frozen=True)
class Model:
    """A model with the batch that it is measured on, large enough for peaks well above an allocator's noise."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int


MODELS: dict[str, Model] = {
    "mlp": Model(lambda: models.mlp(hidden=(1024, 1024)), (64,), 256),
    "resnet5": Model(lambda: models.resnet5(num_classes=10, in_channels=1), (1, 8, 8), 256),
    "resnet9": Model(lambda: models.resnet9(num_classes=10, in_channels=3), (3, 16, 16), 32),
    "vgg8": Model(lambda: models.vgg8(num_classes=10, in_channels=3), (3, 32, 32), 16),
    "vit": Model(models.vit, (1, 8, 8), 64),
}

ESTIMATORS: dict[str, Callable[[], LikelihoodRatio]] = {
    "joint": lambda: LikelihoodRatio(groups="joint", copies=16, chunk=8),
    "layerwise": lambda: LikelihoodRatio(groups="layerwise", copies=16, chunk=8),
    "sign": lambda: LikelihoodRatio(groups="joint", copies=16, chunk=8, capture="sign"),
    "learned": lambda: LikelihoodRatio.feedback_learned(copies=4),
    "auto": LikelihoodRatio.auto,
}

CAPTURES: dict[str, dict[str, str]] = {
    "exact": {},
    "sign": {"capture": "sign"},
    "stochastic": {"capture": "stochastic"},
    "stochastic-4": {"capture": "stochastic-4"},
    "clean": {"placement": "alive"},
}
"""What is kept of activations, by name: of every copy exactly, or as one bit; or the clean run's for all copies."""

COPIES = (50, 100, 200, 500, 1000)
CHUNK = 50
GROWING = Model(lambda: models.mlp(hidden=(1024, 1024)), (64,), 16)
"""What is measured with a growing number of copies. Behind a ReLU an element takes one bit, of the input two."""


def joint(capture: str, copies: int, chunk: int | None) -> LikelihoodRatio:
    """The estimator that keeps activations in a way of `CAPTURES`."""
    return LikelihoodRatio(groups="joint", copies=copies, chunk=chunk, **CAPTURES[capture])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Row:
    """One step; bytes, MiB."""

    model: str
    estimator: str
    copies: int
    chunk: int
    captures_mib: float
    predicted_mib: float
    measured_mib: float | None
    resident_mib: float | None
    at: str
    parts: dict[str, int]

    @property
    def ratio(self) -> float | None:
        return self.predicted_mib / self.measured_mib if self.measured_mib else None


def program_of(model: Model, estimator: LikelihoodRatio) -> Program:
    """The same weights and batch every time."""
    torch.manual_seed(0)
    built = model.build()
    return compile_program(built, torch.randn(model.batch, *model.shape), loss=F.cross_entropy, estimator=estimator)


M_MMAP_THRESHOLD = -3
"""Of ``malloc.h``: blocks from this size on are the system's, and given back when they are freed."""


def prepare(model: str, estimator: str, gives_back: bool) -> Callable[[], object]:
    """A step of the first table."""
    if gives_back:
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 14)
    return step_of(MODELS[model], ESTIMATORS[estimator]())


def prepare_growing(capture: str, copies: int, chunk: int | None) -> Callable[[], object]:
    """A step of the second table."""
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 14)
    return step_of(GROWING, joint(capture, copies, chunk))


def step_of(model: Model, estimator: LikelihoodRatio) -> Callable[[], object]:
    """A step as the prediction has it: all gradients are new, and nothing is left out."""
    program = program_of(model, estimator)
    inputs, target = torch.randn(model.batch, *model.shape), torch.randint(10, (model.batch,))

    def run() -> None:
        program.next_calibration = program.next_probe = 0
        program.step(inputs, target)
        for parameter in program.model.parameters():
            parameter.grad = None

    return run


def row(
    model: str, name: str, plan: MemoryPlan, copies: int, measured: float | None, resident: float | None = None
) -> Row:
    """What was predicted and measured."""
    mib = 2**20
    sizes = (plan.captures / mib, plan.peak / mib, measured, resident)
    return Row(model, name, copies, plan.chunk, *sizes, plan.at, plan.parts)


def accuracy(options: argparse.Namespace) -> list[Row]:
    """Predicted beside measured, model by model."""
    rows = []
    for model in options.models:
        for estimator in options.estimators:
            settings = ESTIMATORS[estimator]()
            plan = rehearse(program_of(MODELS[model], settings).compiled)
            ways = (True, False) if options.resident else (True,)
            found = [peak_memory(prepare, model, estimator, gives_back) for gives_back in ways]
            assert isinstance(settings.copies, int)
            rows.append(row(model, estimator, plan, settings.copies, *found))
    return rows


def growth(options: argparse.Namespace) -> list[Row]:
    """Captures and peaks by the copies, all at once and in chunks."""
    rows = []
    for capture in CAPTURES:
        for chunk in (None, CHUNK):
            for copies in options.copies:
                plan = rehearse(program_of(GROWING, joint(capture, copies, chunk)).compiled)
                measured = peak_memory(prepare_growing, capture, copies, chunk)
                rows.append(row("mlp", capture, plan, copies, measured))
    return rows


def accuracy_table(rows: list[Row]) -> Table:
    """One row a model and estimator."""
    table = Table(title="Peak of a step, MiB beyond weights and batch", title_justify="left")
    for heading in ("model", "estimator", "at"):
        table.add_column(heading)
    for heading in ("batch", "captures", "predicted", "measured", "predicted ÷ measured", "resident"):
        table.add_column(heading, justify="right")
    for one in rows:
        numbers = (f"{one.captures_mib:.1f}", f"{one.predicted_mib:.1f}", _shown(one.measured_mib, ".1f"))
        table.add_row(
            one.model,
            one.estimator,
            one.at,
            str(MODELS[one.model].batch),
            *numbers,
            _shown(one.ratio, ".2f"),
            _shown(one.resident_mib, ".1f"),
        )
    return table


def growth_table(rows: list[Row]) -> Table:
    """One row a kind of capture and number of copies."""
    title = f"Growth with the copies, mlp 64-1024-1024-10, batch of {GROWING.batch}, MiB"
    table = Table(title=title, title_justify="left")
    table.add_column("capture")
    for heading in ("copies", "side by side", "captures", "of exact", "predicted", "measured"):
        table.add_column(heading, justify="right")
    exact = {(one.copies, one.chunk): one.captures_mib for one in rows if one.estimator == "exact"}
    for one in rows:
        share = f"1/{exact[one.copies, one.chunk] / one.captures_mib:.1f}"
        numbers = (f"{one.captures_mib:.2f}", share, f"{one.predicted_mib:.1f}", _shown(one.measured_mib, ".1f"))
        table.add_row(one.estimator, str(one.copies), str(one.chunk), *numbers)
    return table


def _shown(number: float | None, how: str) -> str:
    return "–" if number is None else format(number, how)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS), metavar="NAME")
    parser.add_argument("--copies", nargs="*", type=int, default=list(COPIES), metavar="K", help="of the second table")
    parser.add_argument("--resident", action="store_true", help="also with the allocator as it is")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Predict, measure and print."""
    options = arguments(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console(width=None if Console().is_terminal else 160)
    result: dict[str, Any] = {"machine": machine(torch.device("cpu"))}
    console.print(describe(result["machine"]), highlight=False)
    rows = accuracy(options)
    if rows:
        console.print(accuracy_table(rows))
    grown = growth(options)
    if grown:
        console.print(growth_table(grown))
    result |= {"accuracy": [asdict(one) for one in rows], "growth": [asdict(one) for one in grown]}
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
