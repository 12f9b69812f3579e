"""A step on several streams of a GPU, beside one stream, inference, the naive implementation and backpropagation.

    python benchmarks/streams.py
    python benchmarks/streams.py --models vgg8 --copies 500 --chunk 50 --streams 1 4 --plan --json streams.json

Images of 32 by 32. The limit of a step is inference of as many samples as it runs forwards of, in pieces as large as
its chunks; the naive implementation takes the same copies, as many at a time as a chunk has. *auto* is learned feedback
in a step with a perturbed run. All variants run in turn, A B C A B C …, and every ratio is formed within a round.
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
from naive import NaiveLikelihoodRatio
from rich.console import Console
from rich.table import Table
from step import in_ms, ratio
from torch import Tensor, nn

from onward import LikelihoodRatio, Program, models
from onward import compile as compile_program
from onward.evidence.provenance import describe, machine
from onward.runtime.execution.executor import SerialExecutor
from onward.runtime.execution.stream_plan import format_stream_plan
from onward.runtime.execution.streams import StreamedExecutor

Step = Callable[[], object]
SIZE = 32

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet9": lambda: models.resnet9(num_classes=10, in_channels=3),
    "vgg8": lambda: models.vgg8(num_classes=10, in_channels=3),
}


@dataclass(frozen=True)
class Case:
    """A model, a batch, and an estimator: `copies` at a time `chunk`, or without copies *auto*."""

    model: str
    batch: int
    device: torch.device
    copies: int | None
    chunk: int

    @property
    def setting(self) -> str:
        return "auto" if self.copies is None else f"joint {self.copies}"

    def estimator(self) -> LikelihoodRatio:
        if self.copies is None:
            return LikelihoodRatio.auto()
        return LikelihoodRatio(groups="joint", copies=self.copies, placement="alive", chunk=self.chunk)

    def build(self) -> tuple[nn.Module, Tensor, Tensor]:
        """The model and a batch shaped like its images."""
        torch.manual_seed(0)
        images = torch.randn(self.batch, 3, SIZE, SIZE, device=self.device)
        return MODELS[self.model]().to(self.device), images, torch.randint(0, 10, (self.batch,), device=self.device)


@dataclass(frozen=True)
class Row:
    """What was measured of one case on one number of streams."""

    model: str
    setting: str
    streams: int
    forwards: float
    """Forwards of a sample in a step, the clean one included."""
    step_ms: Spread
    one_over_step: Spread
    """Above 1 where several streams are faster than one."""
    step_over_limit: Spread
    step_over_naive: Spread | None
    step_over_backpropagation: Spread


def onward_step(case: Case, streams: int) -> tuple[Program, Step]:
    """The program on so many streams, past the step in which it measures σ, and its step with a perturbed run."""
    net, images, target = case.build()
    program = compile_program(net, (images,), loss=F.cross_entropy, estimator=case.estimator())
    program.step(images, target)
    if streams > 1:
        program.executor = StreamedExecutor(program.compiled, program.sigmas, streams)

    def step() -> object:
        program.next_probe, program.next_calibration = 0, program.step_count + 1
        return program.step(images, target)

    return program, step


def inference(case: Case, forwards: float) -> Step:
    """The model in eval mode on as many samples, at most a chunk of copies at a time."""
    net, images, _ = case.build()
    net.eval()
    samples = round(forwards * case.batch)
    most = case.chunk * case.batch
    pieces = [min(most, samples - begun) for begun in range(0, samples, most)]
    tiled = images.repeat(-(-pieces[0] // case.batch), 1, 1, 1)

    @torch.no_grad()
    def run() -> None:
        for piece in pieces:
            net(tiled[:piece])

    return run


def naive(case: Case, copies: int) -> Step:
    """The naive implementation, a chunk of copies a call."""
    net, images, target = case.build()

    def losses(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none")

    plain = NaiveLikelihoodRatio(net, losses, copies=min(case.chunk, copies))

    def run() -> None:
        for _ in range(0, copies, case.chunk):
            plain.step(images, target)

    return run


def backpropagation(case: Case) -> Step:
    net, images, target = case.build()
    return lambda: F.cross_entropy(net(images), target).backward()


def measure(case: Case, streams: list[int], rounds: int, clock: str) -> tuple[list[Row], dict[int, SerialExecutor]]:
    """One case on every number of streams, one among them, and the executors."""
    programs, variants = {}, {}
    for count in sorted({1, *streams}):
        programs[count], variants[f"streams {count}"] = onward_step(case, count)
    share = [run.copies * run.share for run in programs[1].compiled.runs]
    forwards = 1 + sum(share)
    variants |= {"limit": inference(case, forwards), "backpropagation": backpropagation(case)}
    if case.copies is not None:
        variants["naive"] = naive(case, case.copies)
    times = interleave(variants, rounds, CLOCKS[clock], case.device)
    rows = []
    for count in programs:
        own = times[f"streams {count}"]
        rows.append(
            Row(
                case.model,
                case.setting,
                count,
                forwards,
                in_ms(own),
                ratio(times["streams 1"], own),
                ratio(own, times["limit"]),
                ratio(own, times["naive"]) if "naive" in times else None,
                ratio(own, times["backpropagation"]),
            )
        )
    return rows, {count: program.executor for count, program in programs.items()}


def table(rows: list[Row], batch: int) -> Table:
    """The measurements."""
    shown = Table(title=f"A step of {batch} samples (medians, quartiles)", title_justify="left")
    for heading in ("model", "setting"):
        shown.add_column(heading)
    for heading in ("streams", "forwards", "step, ms", "one stream ÷", "÷ limit", "÷ naive", "÷ backprop."):
        shown.add_column(heading, justify="right")
    for row in rows:
        cells = [row.model, row.setting, str(row.streams), f"{row.forwards:.1f}", f"{row.step_ms.median:.2f}"]
        cells += [row.one_over_step.show(), row.step_over_limit.show()]
        cells.append("–" if row.step_over_naive is None else row.step_over_naive.show())
        shown.add_row(*cells, row.step_over_backpropagation.show(1))
    return shown


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument(
        "--copies", nargs="*", type=int, default=[100, 500], metavar="K", help="beside auto; multiples of the chunk"
    )
    parser.add_argument("--chunk", type=int, default=20, metavar="K", help="copies in one run; even")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N", help="one is always run")
    parser.add_argument("--batch", type=int, default=128, metavar="N")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument(
        "--device", default="cuda", help="cpu: streams that run at once, to try the program; says nothing"
    )
    parser.add_argument("--plan", action="store_true", help="also show which task is issued on which stream")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    options = arguments(argv)
    device = torch.device(options.device)
    console = Console(width=None if Console().is_terminal else 160)
    found: dict[str, Any] = machine(device)
    console.print(describe(found), highlight=False)
    rows: list[Row] = []
    for model in options.models:
        for copies in (None, *options.copies):
            case = Case(model, options.batch, device, copies, options.chunk)
            measured, executors = measure(case, options.streams, options.rounds, options.clock)
            rows += measured
            for executor in executors.values() if options.plan else ():
                if isinstance(executor, StreamedExecutor):
                    console.print(
                        format_stream_plan(executor.stream_plan(options.batch, perturbed=True)), soft_wrap=True
                    )
            console.print(table(measured, options.batch))
    console.print(table(rows, options.batch))
    if options.json is not None:
        result = {"machine": found, "batch": options.batch, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
