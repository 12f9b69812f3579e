"""One run of one method: train until a budget of forwards is spent, tested at marks on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..models import Batches, Dataset, loaders
from ..passes.errors import NonFiniteGradientError, NonFiniteLossError, OptionError
from ..runtime.finite import all_finite
from ..runtime.training.data_order import start_epoch
from ..runtime.training.evaluation import accuracy, evaluate
from ..runtime.training.history import Position
from ..runtime.training.trainable import TrainableProgram
from ..runtime.training.update import check_weights, update

NUM_MARKS = 30
"""Marks of a run, evenly spaced in the logarithm of the forwards."""

SETTLED = 8
"""Marks that say where a run has settled: of a budget the part from about a quarter on."""

FIRST_MARK = 5e-3
"""The first mark as a share of the budget."""


@dataclass(frozen=True)
class Point:
    """A test on the way."""

    forwards: float
    """Forwards of one sample spent until then, over the training samples: passes over the data, if all were clean."""
    seconds: float
    """Wall time of training until then: batches, steps and updates, without compiling and testing."""
    accuracy: float
    """Share of the test samples that are classified rightly."""


@dataclass(frozen=True)
class Curve:
    """A run."""

    points: tuple[Point, ...]
    """A point a mark that was reached, the first before any training."""
    ended: str = ""
    """Why the run ended before its budget was spent: what became NaN or infinite; else empty."""

    @property
    def settled(self) -> float:
        """The mean accuracy of the last `SETTLED` marks: a single mark has the luck of a moment."""
        last = self.points[-SETTLED:]
        return sum(point.accuracy for point in last) / len(last)

    @property
    def mean(self) -> float:
        """The mean accuracy of the marks."""
        return sum(point.accuracy for point in self.points) / len(self.points)


def marks(budget: float) -> list[float]:
    """Forwards at which a run is tested: `NUM_MARKS` in a geometric row up to the budget.

    Raises:
        OptionError: the budget is not positive, or infinite.
    """
    if not 0 < budget < math.inf:
        raise OptionError(f"a budget of {budget:g} forwards a training sample: it must be positive and finite.")
    return [budget * FIRST_MARK ** (1 - number / (NUM_MARKS - 1)) for number in range(NUM_MARKS)]


def race(
    program: TrainableProgram,
    uncounted: float,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    batch_size: int,
    budget: float,
    advance: Callable[[float], None] = lambda share: None,
) -> Curve:
    """Train `program` on ``dataset.train`` and test it on ``dataset.test`` at `marks`.

    The batches come in the order that the trainer has for the program's seed. A run whose loss, gradient or weights
    become NaN or infinite ends there: its curve has the points up to that and says so.

    Args:
        uncounted: forwards for every clean forward that the program does not count itself (`Method.uncounted`).
        budget: forwards for each training sample.
        advance: told the share of the budget that is spent, after every mark.
    """
    samples = len(dataset.train)
    train, test = loaders(dataset, batch_size, program.seed)
    points = [Point(0.0, 0.0, _accuracy(program, test))]
    due = marks(budget)
    seconds = 0.0
    epoch = 0
    while due:
        batches = start_epoch(train, program.seed, Position(epoch=epoch))
        epoch += 1
        while due:
            begun = time.perf_counter()
            try:
                batch = next(batches, None)
                if batch is None:
                    break
                _train_on(program, optimizer, batch)
            except (NonFiniteGradientError, NonFiniteLossError) as error:
                return Curve(tuple(points), str(error))
            seconds += time.perf_counter() - begun
            forwards = (program.forwards + program.clean_forwards * (1 + uncounted)) / samples
            if forwards < due[0]:
                continue
            due = [mark for mark in due if mark > forwards]
            try:
                check_weights(program.model)
            except NonFiniteGradientError as error:
                return Curve(tuple(points), str(error))
            points.append(Point(forwards, seconds, _accuracy(program, test)))
            advance(min(1.0, forwards / budget))
    return Curve(tuple(points))


def _train_on(program: TrainableProgram, optimizer: torch.optim.Optimizer, batch: list[torch.Tensor]) -> None:
    inputs, target = batch
    loss = program.step(inputs, target)
    if not all_finite(loss):
        raise NonFiniteLossError("the loss became NaN or infinite.")
    update(program, optimizer)


def _accuracy(program: TrainableProgram, test: Batches) -> float:
    batches = ((inputs, target) for inputs, target in test)
    return evaluate(program.model, program.per_sample_loss, {"accuracy": accuracy}, batches)["accuracy"]
