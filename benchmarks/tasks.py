"""Forward-only training of many kinds of tasks, beside backpropagation: same first weights, batches and epochs.

    python benchmarks/tasks.py --threads 1
    python benchmarks/tasks.py --tasks ctc "edit distance" --rows bp auto --seeds 0 --threads 1

A loss without derivative is what forward-only training lowers; "bp" lowers another in its place (cross-entropy), and
the score, which is the same, says how far that goes. The tasks are those of ``task_definitions.py``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import announce
from rich.table import Table
from task_definitions import TASKS, Batches, Split, Task, take
from torch import nn

from onward import LikelihoodRatio, Trainer
from onward import compile as compile_program
from onward.compiler.capture import as_call
from onward.evidence.baselines.backpropagation import Backpropagation

ROWS: dict[str, Callable[[Task], LikelihoodRatio | None]] = {
    "bp": lambda task: None,
    "auto": lambda task: LikelihoodRatio.auto(),
    "op, reach 0": lambda task: LikelihoodRatio.auto(segments="op", reach=0),
    "plain": lambda task: LikelihoodRatio(**task.plain),
}
"""The methods by name. "op, reach 0": "auto" without any local backpropagation; "plain": without feedback, too."""


@dataclass(frozen=True)
class Result:
    """One training run."""

    task: str
    row: str
    seed: int
    before: float
    """The score on the test split, untrained."""
    after: float
    perturbed_forwards: float
    """A sample and step, a suffix counted by its share of the FLOPs."""
    seconds: float
    """Compiling included."""


def train(name: str, row: str, seed: int, epochs: int | None = None) -> Result:
    """Train once and test."""
    task = TASKS[name]
    training, test = task.data()
    torch.manual_seed(seed)
    net = task.model()
    before, begun = score(task, net, test), time.perf_counter()
    estimator = ROWS[row](task)
    if estimator is None:
        lowered = task.surrogate or task.loss
        program: Any = Backpropagation(net, lambda output, target: lowered(output, target).mean(), seed)
    else:
        example, _ = take(training, slice(0, task.batch))
        program = compile_program(net, example, loss=task.loss, estimator=estimator, seed=seed)
    trainer = Trainer(program, torch.optim.Adam(net.parameters(), lr=task.lr), metrics=None, progress=False)
    trainer.fit(Batches(training, task.batch, torch.Generator()), task.epochs if epochs is None else epochs)
    seconds = time.perf_counter() - begun
    forwards = program.forwards / max(program.clean_forwards, 1)
    return Result(name, row, seed, before, score(task, net, test), forwards, seconds)


@torch.no_grad()
def score(task: Task, net: nn.Module, split: Split) -> float:
    """The mean score of a net on a split."""
    inputs, target = split
    args, kwargs = as_call(inputs)
    return float(task.score(net(*args, **kwargs), target).mean())


def table(results: list[Result]) -> Table:
    """Means and standard deviations of the scores over the seeds."""
    shown = Table(title=f"score on the test split, {len({r.seed for r in results})} seeds", title_justify="left")
    for heading in ("task", "score", "method"):
        shown.add_column(heading)
    for heading in ("before", "after", "perturbed forwards", "seconds"):
        shown.add_column(heading, justify="right")
    for name, row in dict.fromkeys((result.task, result.row) for result in results):
        runs = [result for result in results if (result.task, result.row) == (name, row)]
        after = [run.after for run in runs]
        method = f"bp of {TASKS[name].lowers}" if row == "bp" and TASKS[name].lowers else row
        shown.add_row(
            name,
            TASKS[name].scored,
            method,
            f"{mean(run.before for run in runs):.3f}",
            f"{mean(after):.3f}" + (f" ± {stdev(after):.3f}" if len(after) > 1 else ""),
            "a backward" if row == "bp" else f"{mean(run.perturbed_forwards for run in runs):.2f}",
            f"{mean(run.seconds for run in runs):.1f}",
        )
    return shown


def main(argv: list[str] | None = None) -> None:
    """Train everything and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S")
    parser.add_argument("--epochs", type=int, help="in place of the tasks'")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run")
    options = parser.parse_args(argv)
    console, found = announce(options.threads)
    results = []
    for name in options.tasks:
        for row in options.rows:
            if row == "plain" and not TASKS[name].plain:
                continue
            for seed in options.seeds:
                result = train(name, row, seed, options.epochs)
                results.append(result)
                line = f"{name}, {row}, seed {seed}: {result.after:.4f} in {result.seconds:.1f} s"
                console.print(line, style="dim", highlight=False)
    console.print(table(results))
    if options.json is not None:
        written = {"machine": found, "runs": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
