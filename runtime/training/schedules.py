"""Schedules of the learning rate; without torch, for whatever trains."""

from __future__ import annotations

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * min(done, 1.0))),
}
"""What the learning rate is multiplied with, by the share of the run's steps that are done."""
