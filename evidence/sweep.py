"""Sweeps: every combination of some settings' values, measured one after the other, and what copies buy.

A sweep is written ``NAME=V1,V2,…``. What a name means is the caller's: this module keeps values as text.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..passes.errors import OnwardError, OptionError, unknown_name
from .fidelity import Fidelity
from .fidelity_statistics import Estimate, Z

Settings = Mapping[str, str]
"""A combination: values as they were written, by name."""


@dataclass(frozen=True)
class Axis:
    """A setting and the values that it takes in turn."""

    name: str
    values: tuple[str, ...]

    @property
    def numbers(self) -> tuple[float, ...]:
        """The values as numbers; empty if one of them is none."""
        try:
            return tuple(float(value) for value in self.values)
        except ValueError:
            return ()


@dataclass(frozen=True)
class Trained:
    """Runs of training with a combination, each from weights, batches and noise of its own."""

    accuracies: tuple[tuple[float, ...], ...]
    """Test accuracy after every epoch, a tuple a run."""
    forwards: float
    """Of a training sample in a whole run, clean and perturbed; a suffix counts by its share of the FLOPs."""

    @property
    def last(self) -> tuple[float, ...]:
        """Test accuracy after the last epoch, one a run."""
        return tuple(run[-1] for run in self.accuracies)


@dataclass(frozen=True)
class Measured:
    """A combination and what came of it: a fidelity, or the reason why there is none."""

    settings: Settings
    fidelity: Fidelity | None = None
    trained: Trained | None = None
    untrained: str = ""
    """Why training with it came to nothing."""
    refusal: str = ""
    seconds: float = 0.0
    """Compiling, learning and measuring."""


@dataclass(frozen=True)
class Scaling:
    """How error and deviation fall with the copies, all else equal: a power of the copies is a slope of logarithms."""

    settings: Settings
    """Without the copies."""
    deviation: Estimate
    """Slope of log deviation on log copies: -1/2 where all that is random is drawn anew for every copy. (A stochastic
    capture of the clean run is drawn once for all copies, and no number of them averages it.)"""
    error: Estimate
    """Slope of log error: -1/2 without bias, and towards 0 where the bias has become most of the error."""
    floor: Estimate
    """Bias at the most copies, relative: what more of them do not remove."""


def parse_axis(text: str, known: Collection[str]) -> Axis:
    """An axis from ``NAME=V1,V2,…``; commas in brackets belong to a value: ``hidden=(128,64),(64,)``.

    Raises:
        OptionError: it is not of this form, or a value is empty or there twice.
        UnknownNameError: the name is not one of `known`; the message shows the nearest.
    """
    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_")
    split = tuple(value.strip() for value in _split(values))
    if not equals or not name or not all(split):
        raise OptionError(f"sweep {text!r}: expected NAME=VALUE,VALUE,…, for example copies=4,16,64.")
    if name not in known:
        raise unknown_name("setting to sweep", name, known)
    axis = Axis(name, split)
    if len(set(axis.numbers or split)) < len(split):
        raise OptionError(f"sweep {text!r}: a value is there twice.")
    return axis


def combinations(axes: Sequence[Axis]) -> list[Settings]:
    """The cartesian product, the last axis fastest; without axes one empty combination.

    Raises:
        OptionError: two axes have one name.
    """
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"sweep {name}: it is there twice; give all its values at once.")
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))]


def sweep(cases: Sequence[Settings], measure: Callable[[Settings], Fidelity]) -> Iterator[Measured]:
    """Each combination measured, in order.

    What Onward refuses (settings that cannot be had together, a model that does not compile with them) is a `Measured`
    with the reason; the others go on.
    """
    for settings in cases:
        started = time.perf_counter()
        try:
            yield Measured(settings, measure(settings), seconds=time.perf_counter() - started)
        except OnwardError as error:
            yield Measured(settings, refusal=str(error), seconds=time.perf_counter() - started)


def scaling(found: Sequence[Measured], name: str = "copies") -> list[Scaling]:
    """Slopes over the values of `name`, for every combination of the other settings that has at least two of them.

    Least squares of logarithms. Their intervals are those of the points, propagated, the points taken as independent;
    they do not say whether a power of the copies describes the points.
    """
    lines: dict[tuple[tuple[str, str], ...], list[tuple[float, Fidelity]]] = {}
    for one in found:
        if one.fidelity is not None and name in one.settings:
            others = tuple((key, value) for key, value in one.settings.items() if key != name)
            lines.setdefault(others, []).append((float(one.settings[name]), one.fidelity))
    return [
        Scaling(
            dict(others),
            slope([(at, fidelity.whole.deviation) for at, fidelity in points]),
            slope([(at, fidelity.whole.error) for at, fidelity in points]),
            max(points, key=lambda point: point[0])[1].whole.bias,
        )
        for others, points in lines.items()
        if len(points) > 1
    ]


def slope(points: Sequence[tuple[float, Estimate]]) -> Estimate:
    """Slope of log y on log x by least squares; NaN unless two points have a positive y with a positive lower bound."""
    usable = [(math.log(x), y) for x, y in points if y.low > 0]
    if len(usable) < 2:
        return Estimate(math.nan, math.nan, math.nan)
    centre = sum(x for x, _ in usable) / len(usable)
    square = sum((x - centre) ** 2 for x, _ in usable)
    weights = [(x - centre) / square for x, _ in usable]
    value = sum(weight * math.log(y.value) for weight, (_, y) in zip(weights, usable, strict=True))
    errors = [math.log(y.high / y.low) / (2 * Z) for _, y in usable]
    half = Z * math.sqrt(sum((weight * error) ** 2 for weight, error in zip(weights, errors, strict=True)))
    return Estimate(value, value - half, value + half)


def _split(text: str) -> list[str]:
    """`text` at the commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
