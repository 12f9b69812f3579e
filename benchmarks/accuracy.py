"""Test accuracy of forward-only training beside backpropagation: same first weights, batches and epochs.

    python benchmarks/accuracy.py --threads 1
    python benchmarks/accuracy.py --cases vit mlp-12 --rows bp auto "op, reach 0" "op, reach 1" --seeds 0 1 2

Everything goes through the public API, with the recipes of ``onward train`` (epochs, batch, optimizer, learning rate,
and what "auto" is for a model). Beside a model without derivative, "bp" is its twin (`onward.models.TWINS`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import announce
from rich.table import Table

from onward import LikelihoodRatio, models
from onward import compile as compile_program
from onward.cli.recipes import recipe_for
from onward.cli.train import Outcome, run
from onward.evidence.baselines.backpropagation import Backpropagation
from onward.models import TWINS


@dataclass(frozen=True)
class Case:
    """What is trained, on what."""

    model: str
    data: str = "digits"
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    lr: float | None = None


CASES: dict[str, Case] = {
    "mlp": Case("mlp"),
    "resnet5": Case("resnet5"),
    "mlp-12": Case("mlp", options={"depth": 12}, epochs=20, lr=1e-3),
    "vit": Case("vit"),
    "gcn": Case("gcn", "sbm"),
    "gat": Case("gat", "sbm"),
    "gcn-karate": Case("gcn", "karate"),
    "gat-karate": Case("gat", "karate"),
    "mlp-mnist": Case("mlp", "mnist5k", epochs=15, lr=1e-3),
    "resnet5-mnist": Case("resnet5", "mnist5k", epochs=15, lr=3e-3),
    "resnet9-mnist": Case("resnet9", "mnist5k", options={"width": 8}, epochs=6),
    "resnet18": Case("resnet18", options={"width": 8}),
    **{name: Case(name) for name in TWINS},
    **{model: Case(model, "surnames") for model in ("rnn_text", "gru_text", "lstm_text")},
    "gpt": Case("gpt", "python-docs"),
}
"""The cases by name."""


def _auto(**settings: Any) -> Callable[[], LikelihoodRatio]:
    return lambda: LikelihoodRatio.auto(**settings)


def _joint(**settings: Any) -> Callable[[], LikelihoodRatio]:
    """Plain likelihood ratio with 32 copies of all sites at once, on alive coordinates."""
    return lambda: LikelihoodRatio(groups="joint", placement="alive", copies=32, sigma="auto", **settings)


ROWS: dict[str, Callable[[], LikelihoodRatio] | None] = {
    "bp": None,
    "auto": _auto(),
    "auto, blocks 1": _auto(blocks=1),
    "auto, blocks 1, 8 copies": _auto(blocks=1, copies=8),
    "auto, narrow": _auto(placement="narrow"),
    "op, reach 0, narrow": _auto(segments="op", reach=0, placement="narrow"),
    "auto, every step": _auto(probe_every=1),
    "auto, 2 copies": _auto(copies=2),
    "auto, 8 copies": _auto(copies=8),
    "op, reach 1, 8 copies": _auto(segments="op", reach=1, copies=8),
    "alr 32": lambda: LikelihoodRatio.alr(copies=32),
    "layerwise 16": lambda: LikelihoodRatio(groups="layerwise", copies=16),
    "joint 32": _joint(),
    "joint 32, one-sided": _joint(antithetic=False),
    "joint 32, by error": _joint(sampling="error"),
    "joint 32, one-sided, by error": _joint(antithetic=False, sampling="error"),
    **{f"op, reach {hops}": _auto(segments="op", reach=hops) for hops in range(4)},
    **{
        f"{number} segments, reach {hops}": _auto(segments=number, reach=hops)
        for number in (2, 3, 4, 6)
        for hops in (0, 1)
    },
    **{f"blocks, reach {hops}": _auto(segments=["blocks.*"], reach=hops) for hops in range(3)},
}
"""The methods by name; those that are not backpropagation's, the paper's or plain are "auto" with something held fixed.

"op": every operation its own gradient subgraph; "N segments": as many stretches; "blocks": a transformer's blocks.
"""

BUDGETS = {f"calibrated {budget}": float(budget) for budget in (4, 8, 26)}
"""Plain likelihood ratio as `Program.calibrate` sets it for a budget of perturbed forwards, on 128 training images."""

ROWS |= dict.fromkeys(BUDGETS, LikelihoodRatio)


@dataclass(frozen=True)
class Result:
    """One training run."""

    case: str
    row: str
    seed: int
    test_accuracy: float
    perturbed_forwards: float
    """A sample and step, a suffix counted by its share of the FLOPs."""
    seconds: float


def train(name: str, row: str, seed: int, epochs: int | None = None, lr: float | None = None) -> Result:
    """Train once and test."""
    case = replace(CASES[name], **({} if lr is None else {"lr": lr}))
    dataset = models.load(case.data)
    training = recipe_for(case.model).training
    number = next(n for n in (epochs, case.epochs, training.epochs) if n is not None)
    training = replace(training, epochs=number, lr=training.lr if case.lr is None else case.lr)
    make = ROWS[row]
    torch.manual_seed(seed)
    twin = TWINS.get(case.model, {}) if make is None else {}
    net = models.build_for(case.model, dataset, **{**case.options, **twin})
    if make is None:
        outcome: Outcome = run(
            Backpropagation(net, dataset.loss, seed, unbatched=dataset.unbatched), dataset, training, progress=False
        )
    else:
        example, _ = dataset.batch(training.batch_size)
        estimator = recipe_for(case.model).estimator if row == "auto" else make()
        compiled = partial(compile_program, net, example, loss=dataset.loss, unbatched=dataset.unbatched, seed=seed)
        program = compiled(estimator=estimator)
        if row in BUDGETS:
            inputs, target = dataset.batch(128)
            found = program.calibrate(inputs, target, budget=BUDGETS[row], batch_size=training.batch_size)
            program = compiled(estimator=found)
        outcome = run(program, dataset, training, progress=False)
    perturbed = outcome.forwards_per_sample_and_step - 1
    return Result(name, row, seed, outcome.test_accuracy, perturbed, outcome.seconds)


def table(name: str, results: list[Result], rows: list[str]) -> Table:
    """Means and standard deviations over the seeds, and each row's time beside backpropagation's of the same seed."""
    found = {row: [result for result in results if (result.case, result.row) == (name, row)] for row in rows}
    seconds = {result.seed: result.seconds for result in found.get("bp", [])}
    shown = Table(title=f"{name} on {CASES[name].data}, {len({r.seed for r in results})} seeds", title_justify="left")
    shown.add_column("method")
    for heading in ("test accuracy", "perturbed forwards", "seconds", "÷ bp"):
        shown.add_column(heading, justify="right")
    for row, runs in found.items():
        accuracies = [result.test_accuracy for result in runs]
        spread = f" ± {stdev(accuracies):.4f}" if len(accuracies) > 1 else ""
        ratios = [result.seconds / seconds[result.seed] for result in runs if result.seed in seconds]
        shown.add_row(
            row,
            f"{mean(accuracies):.4f}{spread}",
            "a backward" if row == "bp" else f"{mean(r.perturbed_forwards for r in runs):.2f}",
            f"{mean(r.seconds for r in runs):.1f}",
            f"{mean(ratios):.1f}" if ratios else "–",
        )
    return shown


def main(argv: list[str] | None = None) -> None:
    """Train everything and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["mlp", "resnet5"], metavar="NAME")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["bp", "auto"], metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S")
    parser.add_argument("--epochs", type=int, help="in place of the cases'")
    parser.add_argument("--lr", type=float, help="in place of the cases'")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run")
    options = parser.parse_args(argv)
    console, found = announce(options.threads)
    results: list[Result] = []
    for name in options.cases:
        for seed in options.seeds:
            for row in options.rows:
                result = train(name, row, seed, options.epochs, options.lr)
                results.append(result)
                console.print(
                    f"{name}, {row}, seed {seed}: {result.test_accuracy:.4f} in {result.seconds:.1f} s",
                    style="dim",
                    highlight=False,
                )
        console.print(table(name, results, options.rows))
    if options.json is not None:
        written = {"machine": found, "runs": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
