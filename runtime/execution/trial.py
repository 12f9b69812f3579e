"""Which way of running a step's tasks is the fastest: the first steps are run each way in turn, and timed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from enum import Enum


class Way(Enum):
    """How the tasks of a step are run."""

    IN_A_ROW = "one after the other"
    SIDE_BY_SIDE = "side by side, behind all updates"
    CHASE = "side by side, the updates among them"


TRIALS = 8
"""Steps that are measured each way, of every kind of step."""

WARM_UP = 4
"""The first of them, which tell what the tasks cost and not which way is faster."""


GAIN = 0.95
"""What a way has to need at most of the time of a simpler one: single steps scatter by as much."""


class Trial:
    """The seconds of steps of a kind, run each way in turn until the fastest is known.

    The ways are from the simplest on; a later one has to be faster by `GAIN` than what was chosen of those before.

    Attributes:
        choice: the fastest way, once it is known.
    """

    def __init__(self, ways: Sequence[Way]) -> None:
        self.ways = ways
        self.seconds: dict[Way, list[float]] = {way: [] for way in ways}
        self.choice: Way | None = None

    def next(self) -> Way:
        """How to run the next step."""
        return self.choice or min(self.ways, key=lambda way: len(self.seconds[way]))

    def tell(self, way: Way, seconds: float) -> None:
        """How long a step took that was run this way."""
        self.seconds[way].append(seconds)
        if min(map(len, self.seconds.values())) >= TRIALS:
            medians = {way: statistics.median(self.seconds[way][WARM_UP:]) for way in self.ways}
            self.choice = self.ways[0]
            for way in self.ways[1:]:
                if medians[way] < GAIN * medians[self.choice]:
                    self.choice = way
