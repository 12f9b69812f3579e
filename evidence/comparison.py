"""The race of all methods: each tuned on a validation split of the training data, then run once a seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ..models import Dataset
from ..passes.errors import NonFiniteGradientError, NonFiniteLossError, OnwardError, OptionError, unknown_name
from ..runtime.loss import Loss
from ..runtime.training.trainable import TrainableProgram
from .methods import METHODS, Method
from .race import Curve, marks, race

LR_GRID = (0.3, 1.0, 3.0)
"""What the recipe's learning rate is multiplied with."""

MOST_FACTOR = 1e6
"""The largest factor: beyond, optimizers overflow."""

VALIDATION_SHARE = 0.2
"""The share of the training data that tuning holds out."""


@dataclass(frozen=True)
class Task:
    """What all methods train."""

    dataset: Dataset
    make_model: Callable[[], nn.Module]
    """A new model; its weights follow from torch's global generator."""
    make_optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    """The optimizer of a model with a learning rate."""
    loss: Loss
    batch_size: int
    lr: float
    """The recipe's, the middle of the grid."""


@dataclass(frozen=True)
class Candidate:
    """A point of a method's grid, and how it did on the validation split."""

    lr: float
    settings: Mapping[str, Any]
    accuracy: float
    """Where the run has settled (`Curve.settled`)."""
    mean: float
    """The mean of its marks."""
    ended: str
    """Why it ended early, if it did."""


@dataclass(frozen=True)
class Entry:
    """A method, tuned and raced."""

    key: str
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    curves: Mapping[int, Curve]
    """By seed."""
    compile_seconds: float
    """Of the last seed: from a model to a program that can step; in no curve."""


@dataclass
class Comparison:
    """What `compare` found so far."""

    budget: float
    seeds: tuple[int, ...]
    lr_grid: tuple[float, ...]
    entries: dict[str, Entry] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Methods that cannot train this model, with the reason."""
    failed: dict[str, str] = field(default_factory=dict)
    """Methods that ended with an error that nobody foresaw."""
    interrupted: bool = False

    @property
    def tuning_seed(self) -> int:
        """The seed of the tuning's weights, batches, noise and split; none of the reported ones."""
        return max(self.seeds) + 1


def grid(method: Method, lr: float, lr_grid: Sequence[float]) -> Iterator[tuple[float, dict[str, Any]]]:
    """(learning rate, settings) of every point of a method's grid."""
    for factor, *values in product(lr_grid, *method.settings.values()):
        yield lr * factor, dict(zip(method.settings, values, strict=True))


def validation_split(dataset: Dataset, seed: int) -> Dataset:
    """The training data split in two, the held-out part in place of the test data, which is not looked at.

    Raises:
        OptionError: there are too few samples to hold one out.
    """
    samples = len(dataset.train)
    held = round(samples * VALIDATION_SHARE)
    if not 0 < held < samples:
        raise OptionError(f"data set {dataset.name!r} has {samples} training samples: too few to hold some out.")
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    test, train = (
        TensorDataset(*(tensor[rows.to(tensor.device)] for tensor in dataset.train.tensors))
        for rows in (order[:held], order[held:])
    )
    return replace(dataset, train=train, test=test)


def check(budget: float, methods: Sequence[str], seeds: Sequence[int], lr_grid: Sequence[float]) -> None:
    """Raise `OptionError` if `compare` cannot run with these."""
    for key in methods:
        if key not in METHODS:
            raise unknown_name("method", key, METHODS)
    for what, values in (("method", methods), ("seed", seeds), ("factor of the learning rate", lr_grid)):
        if not values:
            raise OptionError(f"a comparison needs at least one {what}.")
        if len(set(values)) < len(values):
            raise OptionError(f"each {what} once, not {', '.join(map(str, values))}.")
    if bad := [seed for seed in seeds if not 0 <= seed < 2**31]:
        raise OptionError(f"seed {bad[0]}: seeds are from 0 to 2**31 - 1.")
    if bad_factors := [factor for factor in lr_grid if not 0 < factor <= MOST_FACTOR]:
        raise OptionError(
            f"{bad_factors[0]:g} as a factor of the learning rate: it must be positive, and {MOST_FACTOR:g} at most."
        )
    marks(budget)


def compare(
    task: Task,
    budget: float,
    methods: Sequence[str],
    seeds: Sequence[int],
    lr_grid: Sequence[float] = LR_GRID,
    advance: Callable[[str, float], None] = lambda what, share: None,
) -> Comparison:
    """Tune every method and race it with every seed. Ctrl-C ends it with the methods that were finished.

    Args:
        budget: forwards for each training sample that a run has.
        methods: keys of `METHODS`.
        lr_grid: factors of the recipe's learning rate.
        advance: told what is being done, and the share of it that is done.

    Raises:
        OptionError: as `check`; or no method can train this model.
    """
    check(budget, methods, seeds, lr_grid)
    found = Comparison(budget, tuple(seeds), tuple(lr_grid))
    try:
        for key in methods:
            if reason := _refusal(task, METHODS[key], seeds[0]):
                found.refused[key] = reason
        able = [key for key in methods if key not in found.refused]
        if not able:
            raise OptionError(f"none of the methods can train this model. {next(iter(found.refused.values()))}")
        for key in able:
            try:
                found.entries[key] = _enter(task, key, found, advance)
            except Exception as error:  # hours of the other methods are not lost for it
                found.failed[key] = f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        found.interrupted = True
    return found


def _refusal(task: Task, method: Method, seed: int) -> str:
    """Why the method cannot train the model, by one step with it; empty if it can."""
    inputs, target = (tensor[: task.batch_size] for tensor in task.dataset.train.tensors)
    try:
        settings = {name: values[0] for name, values in method.settings.items()}
        _make(task, method, task.dataset, seed, settings).step(inputs, target)
    except NotImplementedError as error:  # of forward-mode derivatives, for one
        return f"torch lacks what {method.name} needs of this model: {error}"
    except (NonFiniteGradientError, NonFiniteLossError):
        return ""  # that is for the race to show
    except OnwardError as error:
        return str(error)
    return ""


def tune(
    task: Task,
    method: Method,
    budget: float,
    seed: int,
    lr_grid: Sequence[float],
    advance: Callable[[float], None] = lambda share: None,
) -> tuple[Candidate, ...]:
    """Run every point of the method's grid on a split of the training data; the best first.

    The best is the one that settles highest, then with the highest mean; one that diverges is behind all others. Each
    has the whole budget: a part of it would choose learning rates that are too high for the whole.
    """
    dataset = validation_split(task.dataset, seed)
    points = list(grid(method, task.lr, lr_grid))
    candidates = []
    for number, (lr, settings) in enumerate(points):
        curve, _ = _run(task, method, dataset, seed, lr, settings, budget)
        candidates.append(Candidate(lr, settings, curve.settled, curve.mean, curve.ended))
        advance((number + 1) / len(points))
    return tuple(sorted(candidates, key=lambda one: (bool(one.ended), -one.accuracy, -one.mean)))


def _enter(task: Task, key: str, found: Comparison, advance: Callable[[str, float], None]) -> Entry:
    method = METHODS[key]
    candidates = tune(
        task,
        method,
        found.budget,
        found.tuning_seed,
        found.lr_grid,
        lambda share: advance(f"{method.name}: tuning", share),
    )
    chosen = candidates[0]
    curves: dict[int, Curve] = {}
    compile_seconds = 0.0
    for seed in found.seeds:
        what = f"{method.name}: seed {seed}"
        curves[seed], compile_seconds = _run(
            task,
            method,
            task.dataset,
            seed,
            chosen.lr,
            chosen.settings,
            found.budget,
            lambda share, what=what: advance(what, share),  # type: ignore[misc]
        )
    return Entry(key, candidates, chosen, curves, compile_seconds)


def _run(
    task: Task,
    method: Method,
    dataset: Dataset,
    seed: int,
    lr: float,
    settings: Mapping[str, Any],
    budget: float,
    advance: Callable[[float], None] = lambda share: None,
) -> tuple[Curve, float]:
    """A run from new weights, and the seconds it took to make the program."""
    begun = time.perf_counter()
    program = _make(task, method, dataset, seed, settings)
    made = time.perf_counter() - begun
    optimizer = task.make_optimizer(program.model, lr)
    curve = race(program, method.uncounted(program), optimizer, dataset, task.batch_size, budget, advance)
    return curve, made


def _make(task: Task, method: Method, dataset: Dataset, seed: int, settings: Mapping[str, Any]) -> TrainableProgram:
    """The program of a new model, whose weights are those of every method with this seed."""
    torch.manual_seed(seed)
    model = task.make_model()
    return method.build(model, dataset.train.tensors[0][: task.batch_size], task.loss, seed, settings)


@dataclass(frozen=True)
class Mean:
    """The runs of a method at a mark, over the seeds."""

    forwards: float
    seconds: float
    accuracy: float
    low: float
    high: float


def mean_curve(entry: Entry, budget: float) -> list[Mean]:
    """Mean, lowest and highest accuracy at every mark. A run that ended early stays where it ended."""
    means: list[Mean] = []
    for mark in [0.0, *marks(budget)]:
        held = [
            next((point for point in curve.points if point.forwards >= mark * (1 - 1e-9)), curve.points[-1])
            for curve in entry.curves.values()
        ]
        accuracies = [point.accuracy for point in held]
        one = Mean(
            fmean(point.forwards for point in held),
            fmean(point.seconds for point in held),
            fmean(accuracies),
            min(accuracies),
            max(accuracies),
        )
        if not means or one != means[-1]:
            means.append(one)
    return means


def first_at(curve: Sequence[Mean], accuracy: float) -> Mean | None:
    """The first mark at which the mean accuracy is there; None where it never is."""
    return next((one for one in curve if one.accuracy >= accuracy - 1e-9), None)
