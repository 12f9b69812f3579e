"""Test accuracy of forward-only training on digits beside backpropagation: same first weights, batches and epochs.

    python benchmarks/accuracy.py --threads 1
    python benchmarks/accuracy.py --models mlp --rows bp recipe alr --seeds 0 1 2 3 4 --json accuracy.json

Everything goes through the public API, with the recipes of ``onward train`` (epochs, batch, optimizer, learning rate).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from common import describe, machine
from rich.console import Console
from rich.table import Table

from onward import LikelihoodRatio, models
from onward import compile as compile_program
from onward.cli.backpropagation import Backpropagation
from onward.cli.recipes import Recipe, recipe_for
from onward.cli.train import Outcome, Training, run

ROWS: dict[str, Callable[[Recipe, int], LikelihoodRatio] | None] = {
    "bp": None,
    "recipe": lambda recipe, copies: LikelihoodRatio(**recipe.estimator),
    "alr": lambda recipe, copies: LikelihoodRatio.alr(copies=copies),
    "layerwise exact": lambda recipe, copies: LikelihoodRatio(groups="layerwise", copies=16),
    "learned": lambda recipe, copies: LikelihoodRatio.feedback_learned(copies=2),
    "learned, reach 1": lambda recipe, copies: LikelihoodRatio.feedback_learned(copies=2, reach=1),
}
"""Each method as an estimator, by the model's recipe and the copies of the paper's setting."""


@dataclass(frozen=True)
class Result:
    """One training run."""

    model: str
    row: str
    seed: int
    test_accuracy: float
    forwards_per_sample_and_step: float
    seconds: float


def train(model: str, row: str, seed: int, alr_copies: int, epochs: int | None) -> Result:
    """Train once and test."""
    dataset = models.load("digits")
    recipe = recipe_for(model)
    training = Training(recipe.epochs if epochs is None else epochs, recipe.batch_size, recipe.lr, recipe.optimizer)
    torch.manual_seed(seed)
    net = models.build_for(model, dataset)
    make = ROWS[row]
    if make is None:
        outcome: Outcome = run(Backpropagation(net, F.cross_entropy, seed), dataset, training, progress=False)
    else:
        example = dataset.train.tensors[0][: recipe.batch_size]
        estimator = make(recipe, alr_copies)
        program = compile_program(net, (example,), loss=F.cross_entropy, estimator=estimator, seed=seed)
        outcome = run(program, dataset, training, progress=False)
    return Result(model, row, seed, outcome.test_accuracy, outcome.forwards_per_sample_and_step, outcome.seconds)


def table(model: str, results: list[Result], rows: list[str]) -> Table:
    """Means and standard deviations over the seeds."""
    shown = Table(title=f"{model} on digits, {len({r.seed for r in results})} seeds", title_justify="left")
    shown.add_column("method")
    for heading in ("test accuracy", "forwards a sample and step", "seconds"):
        shown.add_column(heading, justify="right")
    for row in rows:
        found = [result for result in results if (result.model, result.row) == (model, row)]
        accuracies = [result.test_accuracy for result in found]
        spread = f" ± {stdev(accuracies):.4f}" if len(accuracies) > 1 else ""
        forwards = "1 + a backward" if row == "bp" else f"{mean(r.forwards_per_sample_and_step for r in found):.1f}"
        shown.add_row(row, f"{mean(accuracies):.4f}{spread}", forwards, f"{mean(r.seconds for r in found):.1f}")
    return shown


def main(argv: list[str] | None = None) -> None:
    """Train everything and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mlp", "resnet5"], metavar="NAME")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S")
    parser.add_argument("--alr-copies", type=int, default=32, metavar="K", help="copies of the paper's setting")
    parser.add_argument("--epochs", type=int, help="in place of the recipes'")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console(width=None if Console().is_terminal else 120)
    found: dict[str, Any] = machine(torch.device("cpu"))
    console.print(describe(found), highlight=False)
    results: list[Result] = []
    for model in options.models:
        for seed in options.seeds:
            for row in options.rows:
                result = train(model, row, seed, options.alr_copies, options.epochs)
                results.append(result)
                console.print(
                    f"{model}, {row}, seed {seed}: {result.test_accuracy:.4f} in {result.seconds:.1f} s",
                    style="dim",
                    highlight=False,
                )
        console.print(table(model, results, options.rows))
    if options.json is not None:
        written = {"machine": found, "runs": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
