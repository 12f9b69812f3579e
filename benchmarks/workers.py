"""A step on several CPU workers beside the same step on one, and beside the naive implementation.

    python benchmarks/workers.py
    python benchmarks/workers.py --workers 4 --cases "12 small layers" vgg8 --json workers.json

Every variant uses all the cores it is given: *serial* leaves them to torch's intra-op threads, *workers* to the tasks
of the step, *one core* is the serial executor with one thread, which has the bits that *workers* has. All variants run
in turn, A B C A B C …, and every ratio is formed within a round. *Bound*: no schedule of these tasks, measured one by
one, is shorter on so many workers.

A second table has a step with Adam's update of the weights. *One core*: one thread, the update behind the step.
*Barrier*: workers, the update behind the step. *Chase*: workers, the updates among the tasks of the next step, as
`onward.Trainer` does it. *Chosen*: what the executor, left to itself, does in a trainer. (No variant with all threads
in each operation is among these: threads that wait for more of its work would hold back whichever comes next.)
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import CLOCKS, Spread, interleave
from naive import NaiveLikelihoodRatio
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from onward import LikelihoodRatio, Program, models
from onward import compile as compile_program
from onward.evidence.provenance import describe, machine
from onward.runtime.execution.threads import ThreadedExecutor
from onward.runtime.schedule.bounds import lower_bound
from onward.runtime.schedule.costs import measured_costs
from onward.runtime.schedule.tasks import make_tasks
from onward.runtime.schedule.timeline import record
from onward.runtime.training.pipeline import Pipeline
from onward.runtime.training.update import update


def deep_mlp(width: int) -> Callable[[], nn.Module]:
    """12 layers of one width: as many small gradient subgraphs."""
    return lambda: models.mlp(hidden=[width] * 11)


def learned(**settings: Any) -> Callable[[], LikelihoodRatio]:
    """Feedback with every operation its own subgraph, and a perturbed run every step."""
    return lambda: LikelihoodRatio.feedback_learned(warmup=0, **settings)


@dataclass(frozen=True)
class Case:
    """A model, a batch of images of 8 by 8 (or `size`), and an estimator."""

    model: Callable[[], nn.Module]
    estimator: Callable[[], LikelihoodRatio]
    batch: int = 64
    size: int = 8
    naive_copies: int | None = None
    """Copies of the naive implementation beside it: joint, as the estimator is."""


def resnet5() -> nn.Module:
    return models.resnet5(num_classes=10, in_channels=1)


def vgg8() -> nn.Module:
    return models.vgg8(num_classes=10, in_channels=1)


CASES: dict[str, Case] = {
    "12 small layers": Case(deep_mlp(64), learned(copies=2)),
    "12 small layers, layerwise": Case(deep_mlp(64), lambda: LikelihoodRatio(copies=16)),
    "12 middling layers": Case(deep_mlp(256), learned(copies=2)),
    "12 large layers": Case(deep_mlp(512), learned(copies=2), batch=256),
    "resnet5, auto": Case(resnet5, LikelihoodRatio.auto, batch=32),
    "resnet5, layerwise 16": Case(resnet5, lambda: LikelihoodRatio(copies=16)),
    "resnet5, joint 16": Case(
        resnet5, lambda: LikelihoodRatio(groups="joint", copies=16, placement="alive", chunk=8), naive_copies=16
    ),
    "vgg8, joint 8": Case(
        vgg8,
        lambda: LikelihoodRatio(groups="joint", copies=8, placement="alive", chunk=4),
        batch=16,
        size=32,
        naive_copies=8,
    ),
    "vgg8, auto": Case(vgg8, LikelihoodRatio.auto, batch=16, size=32),
}


@dataclass(frozen=True)
class Row:
    """What was measured of one case."""

    case: str
    serial_ms: Spread
    one_core_ms: Spread
    workers_ms: Spread
    bound_ms: float
    one_core_over_workers: Spread
    serial_over_workers: Spread
    naive_over_workers: Spread | None
    chosen: bool
    """Whether the executor, left to itself, runs the tasks side by side."""


def batch_of(case: Case) -> tuple[Tensor, Tensor]:
    """Numbers shaped like the images."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 1, case.size, case.size, generator=generator)
    return images, torch.randint(0, 10, (case.batch,), generator=generator)


def program_of(case: Case, workers: int) -> Program:
    """The case's program, past the steps in which it measures σ."""
    torch.manual_seed(0)
    images, target = batch_of(case)
    net = case.model()
    program = compile_program(net, (images,), loss=F.cross_entropy, estimator=case.estimator(), workers=workers)
    program.step(images, target)
    return program


def variants_of(case: Case, programs: dict[str, Program], threads: int) -> dict[str, Callable[[], object]]:
    """The steps to time: always with a perturbed run, never measuring σ."""
    images, target = batch_of(case)

    def step(name: str, intra_op: int) -> Callable[[], object]:
        program = programs[name]

        def run() -> object:
            torch.set_num_threads(intra_op)
            program.next_probe, program.next_calibration = 0, program.step_count + 1
            return program.step(images, target)

        return run

    found = {"serial": step("serial", threads), "one core": step("one core", 1), "workers": step("workers", threads)}
    if case.naive_copies is not None:
        torch.manual_seed(0)

        def losses(output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output, target, reduction="none")

        plain = NaiveLikelihoodRatio(case.model(), losses, copies=case.naive_copies, encode="none")

        def naive() -> object:
            torch.set_num_threads(threads)
            return plain.step(images, target)

        found["naive"] = naive
    return found


def measure(name: str, workers: int, rounds: int) -> Row:
    """One case."""
    case, threads = CASES[name], workers
    torch.set_num_threads(threads)
    programs = {"serial": program_of(case, 1), "one core": program_of(case, 1), "workers": program_of(case, workers)}
    executor = threaded(programs["workers"])
    executor.concurrent = True
    variants = variants_of(case, programs, threads)
    times = interleave(variants, rounds, CLOCKS["wall"], torch.device("cpu"))
    alone = programs["one core"].executor
    timelines = [record(alone, variants["one core"]) for _ in range(rounds)]
    tasks = make_tasks(alone.compiled, alone.plan, in_flight=workers)
    costs = measured_costs(tasks, timelines)
    between = max(0.0, sorted(times["one core"])[rounds // 2] - sum(costs))  # checks, writing ``.grad``
    executor.concurrent = None
    while executor.chosen(perturbed=True) is None:
        variants["workers"]()
    torch.set_num_threads(threads)
    return Row(
        name,
        *(Spread.of([1e3 * value for value in times[kind]]) for kind in ("serial", "one core", "workers")),
        1e3 * (between + lower_bound(tasks, costs, workers)),
        ratio(times["one core"], times["workers"]),
        ratio(times["serial"], times["workers"]),
        ratio(times["naive"], times["workers"]) if "naive" in times else None,
        bool(executor.chosen(perturbed=True)),
    )


@dataclass(frozen=True)
class UpdateRow:
    """What was measured of one case with the optimizer's update."""

    case: str
    one_core_ms: Spread
    barrier_ms: Spread
    chase_ms: Spread
    barrier_over_chase: Spread
    one_core_over_chase: Spread
    chosen: str
    """How the executor, left to itself, has steps follow each other."""


def training_step(case: Case, program: Program, threads: int, *, barrier: bool = False) -> Callable[[], object]:
    """A step with a perturbed run and an update by Adam, as in a trainer or with a barrier in any case."""
    images, target = batch_of(case)
    optimizer = torch.optim.Adam(program.model.parameters(), lr=1e-5)
    optimizer.zero_grad()
    pipeline = Pipeline(program, optimizer)

    def run() -> object:
        torch.set_num_threads(threads)
        program.next_probe, program.next_calibration = 0, program.step_count + 1
        loss = float(pipeline.step(images, target))
        program.next_probe = 0  # the next has one, too: pipelines ask
        update(program, optimizer) if barrier else pipeline.update()
        return loss

    return run


def measure_updates(name: str, workers: int, rounds: int) -> UpdateRow:
    """One case with updates."""
    case = CASES[name]
    torch.set_num_threads(workers)
    kinds = {"one core": 1, "barrier": workers, "chase": workers}
    programs = {kind: program_of(case, count) for kind, count in kinds.items()}
    for kind in ("barrier", "chase"):
        threaded(programs[kind]).concurrent = True
    variants = {
        kind: training_step(case, program, kinds[kind], barrier=kind != "chase") for kind, program in programs.items()
    }
    times = interleave(variants, rounds, CLOCKS["wall"], torch.device("cpu"))
    free = programs["chase"]
    executor = threaded(free)
    executor.concurrent = None
    while executor.chosen(perturbed=True, updated=True) is None:
        variants["chase"]()
    torch.set_num_threads(workers)
    return UpdateRow(
        name,
        *(Spread.of([1e3 * value for value in times[kind]]) for kind in kinds),
        ratio(times["barrier"], times["chase"]),
        ratio(times["one core"], times["chase"]),
        free.waits(perturbed=True).removesuffix(" measured faster") or "chase",
    )


def threaded(program: Program) -> ThreadedExecutor:
    """The program's executor."""
    assert isinstance(program.executor, ThreadedExecutor)
    return program.executor


def ratio(theirs: list[float], ours: list[float]) -> Spread:
    """Round by round; above 1 where ours is faster."""
    return Spread.of([a / b for a, b in zip(theirs, ours, strict=True)])


def table(rows: list[Row], workers: int) -> Table:
    """The measurements."""
    shown = Table(title=f"A step on {workers} workers (medians, quartiles)", title_justify="left")
    shown.add_column("case")
    for heading in ("serial, ms", "one core", "workers", "bound", "one core ÷", "serial ÷", "naive ÷", "chosen"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            row.case,
            f"{row.serial_ms.median:.2f}",
            f"{row.one_core_ms.median:.2f}",
            f"{row.workers_ms.median:.2f}",
            f"{row.bound_ms:.2f}",
            row.one_core_over_workers.show(),
            row.serial_over_workers.show(),
            "–" if row.naive_over_workers is None else row.naive_over_workers.show(),
            "workers" if row.chosen else "one after the other",
        )
    return shown


def update_table(rows: list[UpdateRow], workers: int) -> Table:
    """The measurements with updates."""
    shown = Table(title=f"A step with Adam's update on {workers} workers (medians, quartiles)", title_justify="left")
    shown.add_column("case")
    for heading in ("one core, ms", "barrier", "chase", "barrier ÷ chase", "one core ÷ chase", "chosen"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            row.case,
            *(f"{spread.median:.2f}" for spread in (row.one_core_ms, row.barrier_ms, row.chase_ms)),
            row.barrier_over_chase.show(),
            row.one_core_over_chase.show(),
            row.chosen,
        )
    return shown


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2, help="and torch's threads, in all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args(argv)
    console = Console(width=None if Console().is_terminal else 140)
    found: dict[str, Any] = machine(torch.device("cpu"))
    console.print(describe(found), highlight=False)
    rows, updates = [], []
    for name in options.cases:
        rows.append(measure(name, options.workers, options.rounds))
        updates.append(measure_updates(name, options.workers, options.rounds))
        console.print(table(rows[-1:], options.workers), update_table(updates[-1:], options.workers))
    console.print(table(rows, options.workers), update_table(updates, options.workers))
    if options.json is not None:
        result = {
            "machine": found,
            "workers": options.workers,
            "rows": [asdict(row) for row in rows],
            "updates": [asdict(row) for row in updates],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
