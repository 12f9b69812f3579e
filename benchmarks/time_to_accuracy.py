"""How long training takes to come within half a point of backpropagation's accuracy, and where the time goes.

    python benchmarks/time_to_accuracy.py --threads 1
    python benchmarks/time_to_accuracy.py --cases resnet5-mnist --points 1.0 --json time.json

Backpropagation and ``auto`` train from the same first weights on the same batches, an epoch of the one, then an epoch
of the other, so that what disturbs the machine disturbs both; each is tested after every epoch, outside the clock. The
goal is the test accuracy that backpropagation has at the end, less `--points`. Compiling is outside the clock too;
tracing the loss and measuring sigma are inside.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from accuracy import CASES
from common import Stopwatch, announce
from rich.table import Table

from onward import LikelihoodRatio, Program, models
from onward import compile as compile_program
from onward.cli.recipes import recipe_for
from onward.cli.training import Training, make_optimizer
from onward.evidence.baselines.backpropagation import Backpropagation
from onward.models.data import loaders
from onward.runtime.training.evaluation import accuracy, evaluate
from onward.runtime.training.update import update

PARTS = {
    "F": "clean forward",
    "E": "loss and its gradient",
    "G": "gradient subgraphs",
    "P": "perturbed forwards",
    "L": "learning feedback",
}
"""What the actions of a plan are, by the first letter of their names."""


@dataclass(frozen=True)
class Curve:
    """A training run: seconds of training so far and test accuracy, after every epoch."""

    seconds: list[float]
    accuracy: list[float]

    def reach(self, goal: float) -> float | None:
        """Seconds until the test accuracy was first the goal or above; None if it never was."""
        return next((at for at, reached in zip(self.seconds, self.accuracy, strict=True) if reached >= goal), None)


@dataclass(frozen=True)
class Pair:
    """The two runs of a seed."""

    case: str
    seed: int
    bp: Curve
    auto: Curve


IMAGES = [name for name, case in CASES.items() if case.data in ("digits", "mnist5k")]
"""The cases that it is for."""


def settings(name: str, epochs: int | None) -> Training:
    """The recipe of a case."""
    case, training = CASES[name], recipe_for(CASES[name].model).training
    number = next(n for n in (epochs, case.epochs, training.epochs) if n is not None)
    return replace(training, epochs=number, lr=case.lr or training.lr)


def programs(name: str, seed: int, batch: int) -> tuple[Backpropagation, Program]:
    """The model of a case, twice."""
    case = CASES[name]
    dataset = models.load(case.data)
    torch.manual_seed(seed)
    net = models.build_for(case.model, dataset, **case.options)
    torch.manual_seed(seed)
    twin = models.build_for(case.model, dataset, **{**case.options, **models.TWINS.get(case.model, {})})
    example = dataset.train.tensors[0][:batch]
    program = compile_program(net, (example,), loss=F.cross_entropy, estimator=LikelihoodRatio.auto(), seed=seed)
    return Backpropagation(twin, F.cross_entropy, seed), program


def epochs_of(program: Backpropagation | Program, name: str, training: Training) -> Iterator[tuple[float, float]]:
    """Train an epoch at a time: ``(seconds, test accuracy)``."""
    optimizer = make_optimizer(program.model, training)
    train, test = loaders(models.load(CASES[name].data), training.batch_size, program.seed)
    for epoch in range(training.epochs):
        train.generator.manual_seed(program.seed + epoch)
        started = time.perf_counter()
        for images, target in train:
            program.step(images, target)
            update(program, optimizer)
        seconds = time.perf_counter() - started
        yield seconds, evaluate(program.model, program.per_sample_loss, {"accuracy": accuracy}, iter(test))["accuracy"]


def train(name: str, seed: int, epochs: int | None) -> Pair:
    """Both runs of a seed, epoch by epoch in turn."""
    training = settings(name, epochs)
    curves = Curve([], []), Curve([], [])
    both = [epochs_of(program, name, training) for program in programs(name, seed, training.batch_size)]
    for measured in zip(*both, strict=True):
        for curve, (seconds, reached) in zip(curves, measured, strict=True):
            curve.seconds.append(seconds + (curve.seconds[-1] if curve.seconds else 0.0))
            curve.accuracy.append(reached)
    return Pair(name, seed, *curves)


def where(name: str, epochs: int | None) -> dict[str, dict[str, float]]:
    """Milliseconds a step of both by part, over a whole training of seed 0."""
    training = settings(name, epochs)
    found: dict[str, dict[str, float]] = {}
    for label, program in zip(("bp", "auto"), programs(name, 0, training.batch_size), strict=True):
        clock = Stopwatch(time.perf_counter, torch.device("cpu"))
        optimizer = make_optimizer(program.model, training)
        step = clock.wrap("the rest of a step", program.step)
        if isinstance(program, Program):
            program.executor.do = _timed(program.executor.do, clock)  # type: ignore[method-assign]
            program._measure_sigmas = clock.wrap("measuring sigma", program._measure_sigmas)  # type: ignore[method-assign]
        else:
            program.model.forward = clock.wrap("clean forward", program.model.forward)
        apply = clock.wrap("optimizer and checks", update)
        train_batches, _ = loaders(models.load(CASES[name].data), training.batch_size, 0)
        steps = 0
        for _ in range(training.epochs):
            for images, target in train_batches:
                step(images, target)
                apply(program, optimizer)
                steps += 1
        parts = {part: 1e3 * seconds / steps for part, seconds in clock.seconds.items()}
        if label == "bp":
            parts["loss and backward"] = parts.pop("the rest of a step")
        found[label] = parts
    return found


def _timed(do: Callable[..., None], clock: Stopwatch) -> Callable[..., None]:
    """An executor's `do`, its time counted for the kind of action."""

    def timed(step: Any, action: Any, worker: int) -> None:
        with clock.timing(PARTS[str(action)[0]]):
            do(step, action, worker)

    return timed


def table(pairs: list[Pair], points: float) -> Table:
    """Both runs' times to the goal, and their ratio to each other and to all of backpropagation's training."""
    name = pairs[0].case
    shown = Table(title=f"{name}: to backpropagation's accuracy less {points:g} points", title_justify="left")
    for heading in ("seed", "bp ends at", "auto ends at", "goal", "bp [s]", "auto [s]", "÷ bp", "÷ all of bp"):
        shown.add_column(heading, justify="right")
    ratios, of_all = [], []
    for pair in pairs:
        goal = pair.bp.accuracy[-1] - points / 100
        bp, auto = pair.bp.reach(goal), pair.auto.reach(goal)
        assert bp is not None  # at the end at the latest
        row = [
            str(pair.seed),
            f"{pair.bp.accuracy[-1]:.4f}",
            f"{pair.auto.accuracy[-1]:.4f}",
            f"{goal:.4f}",
            f"{bp:.2f}",
        ]
        if auto is None:
            shown.add_row(*row, "never", "–", "–")
            continue
        ratios.append(auto / bp)
        of_all.append(auto / pair.bp.seconds[-1])
        shown.add_row(*row, f"{auto:.2f}", f"{ratios[-1]:.2f}", f"{of_all[-1]:.2f}")
    if ratios:
        means = [f"{mean(p.bp.accuracy[-1] for p in pairs):.4f}", f"{mean(p.auto.accuracy[-1] for p in pairs):.4f}"]
        whole = median(p.auto.seconds[-1] / p.bp.seconds[-1] for p in pairs)
        shown.add_section()
        shown.add_row("mean", *means, "", "", f"all: {whole:.2f} ×", f"{median(ratios):.2f}", f"{median(of_all):.2f}")
        shown.caption = f"{len(ratios)} of {len(pairs)} runs reach the goal; ratios are medians of those."
    return shown


def parts_table(name: str, found: dict[str, dict[str, float]]) -> Table:
    """Milliseconds a step."""
    shown = Table(title=f"{name}: milliseconds a step, on average over a training", title_justify="left")
    shown.add_column("part")
    for label in found:
        shown.add_column(label, justify="right")
    for part in sorted({part for parts in found.values() for part in parts}, key=lambda p: -found["auto"].get(p, 0)):
        shown.add_row(part, *(f"{parts[part]:.3f}" if part in parts else "–" for parts in found.values()))
    shown.add_section()
    shown.add_row("all", *(f"{sum(parts.values()):.3f}" for parts in found.values()))
    return shown


def main(argv: list[str] | None = None) -> None:
    """Train everything and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=IMAGES, default=["mlp", "resnet5"], metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="S")
    parser.add_argument("--points", type=float, default=0.5, help="below backpropagation's accuracy at its end")
    parser.add_argument("--epochs", type=int, help="in place of the cases'")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run")
    options = parser.parse_args(argv)
    console, found = announce(options.threads)
    pairs: dict[str, list[Pair]] = {}
    parts: dict[str, dict[str, dict[str, float]]] = {}
    for name in options.cases:
        pairs[name] = [train(name, seed, options.epochs) for seed in options.seeds]
        console.print(table(pairs[name], options.points))
        parts[name] = where(name, options.epochs)
        console.print(parts_table(name, parts[name]))
    if options.json is not None:
        runs = [asdict(pair) for several in pairs.values() for pair in several]
        written = {"machine": found, "points": options.points, "runs": runs, "milliseconds a step": parts}
        options.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
