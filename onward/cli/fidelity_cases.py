"""The combinations of a sweep on the command line, as the options that say the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args, get_type_hints

from ..compiler.estimator import LikelihoodRatio
from ..evidence.sweep import Axis, Settings, combinations
from ..models.registry import find_signature
from ..passes.errors import OptionError, UnknownNameError
from ..runtime.calibration.record import Calibration
from .common import AUTO, make_estimator, settings_of
from .options import Common

ESTIMATOR_OPTIONS = {field.name for field in dataclasses.fields(LikelihoodRatio)} & {
    field.name for field in dataclasses.fields(Common)
}
"""What can be swept of the estimator; a value is written as for the option of that name."""


@dataclass(frozen=True)
class Case:
    """A combination of swept settings, as the options that say the same."""

    settings: Settings
    common: Common
    estimator: LikelihoodRatio | Calibration | None
    """None if the options cannot be had together."""
    refusal: str = ""


def sweepable(model: str) -> set[str]:
    """What can be swept: options of the estimator, and arguments of the model's factory."""
    signature = find_signature(model)
    return ESTIMATOR_OPTIONS | set(signature.parameters if signature is not None else ())


def make_cases(common: Common, axes: Sequence[Axis], recipe: LikelihoodRatio = AUTO) -> list[Case]:
    """Every combination of the swept settings, in place of those options on the command line and those of the recipe.

    Where one combination asks for what learned feedback does not have, all that leave `feedback` open are without it:
    else they would differ in more than what is swept.

    Raises:
        OptionError: a value cannot be read, or no combination can be had.
        UnknownNameError: a value is a name that is not known.
    """
    cases = [(settings, _with(common, settings)) for settings in combinations(axes)]
    estimators = [_try_estimator(each, recipe) for _, each in cases]
    plain = [settings_of(made).feedback == "none" for made, _ in estimators if made is not None]
    if common.feedback is None and common.calibration is None and any(plain) and not all(plain):
        cases = [
            (settings, each if "feedback" in settings else replace(each, feedback="none")) for settings, each in cases
        ]
        estimators = [_try_estimator(each, recipe) for _, each in cases]
    made = [
        Case(settings, each, estimator, refusal)
        for (settings, each), (estimator, refusal) in zip(cases, estimators, strict=True)
    ]
    if all(case.estimator is None for case in made):
        raise OptionError(made[0].refusal)
    return made


def _with(common: Common, settings: Settings) -> Common:
    """`common` with what is swept: the options of the estimator by name, all else for the model's factory."""
    options = {name: _read(name, text) for name, text in settings.items() if name in ESTIMATOR_OPTIONS}
    pairs = [f"{name}={text}" for name, text in settings.items() if name not in ESTIMATOR_OPTIONS]
    return replace(common, model_option=[*(common.model_option or []), *pairs], **options)


def _read(name: str, text: str) -> Any:
    """A value of the option `name`, as the command line would read it."""
    kinds = get_args(_TYPES[name]) or (_TYPES[name],)
    if list[str] in kinds:
        return [text]
    for kind, (expected, convert) in _READERS.items():
        if kind in kinds:
            try:
                return convert(text)
            except (KeyError, ValueError):
                raise OptionError(f"sweep {name}={text}: expected {expected}.") from None
    return text


_TYPES: Mapping[str, Any] = get_type_hints(Common)

_READERS: Mapping[type, tuple[str, Callable[[str], Any]]] = {
    bool: ("true or false", lambda text: {"true": True, "false": False}[text.lower()]),
    int: ("a whole number", int),
    float: ("a number", float),
}


def _try_estimator(common: Common, recipe: LikelihoodRatio) -> tuple[LikelihoodRatio | Calibration | None, str]:
    """The estimator, or why there is none. A name that is not known is a mistake, whatever it is combined with."""
    try:
        return make_estimator(common, recipe), ""
    except UnknownNameError:
        raise
    except OptionError as error:
        return None, str(error)
