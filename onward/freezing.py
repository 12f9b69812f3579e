"""`freeze`: which parameters a fine-tuning leaves as they are."""

from __future__ import annotations

import fnmatch
from itertools import accumulate

from torch import nn

from .passes.errors import OptionError, unknown_name


def freeze(model: nn.Module, *patterns: str, keep: str | tuple[str, ...] = ()) -> tuple[str, ...]:
    """Stop training the parameters that match: ``requires_grad_(False)``, for what is compiled afterwards.

    A compiled program does not perturb them and computes no gradient of theirs. What runs before the first site that
    still trains is one clean run, which all perturbed copies share; they cost what is behind it (`Program.forwards`).

    Args:
        model: changed in place. Only ``requires_grad``: dropout and batch normalisation of a frozen module go on as its
            mode says; ``module.eval()`` before compiling stops them.
        patterns: names of parameters or of modules that hold them (``named_parameters``, ``named_modules``); ``*``,
            ``?`` and ``[…]`` match as in a shell, dots included: ``"stem"``, ``"blocks.[01]"``, ``"*.bias"``.
        keep: patterns of what stays as it is all the same: ``freeze(model, "*", keep="head")``.

    Returns:
        The names of the parameters that are frozen now, in the model's order.

    Raises:
        UnknownNameError: nothing matches a pattern; the message shows the nearest name. The model is as it was.
        OptionError: nothing would be left to train. The model is as it was.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept = _matching((keep,) if isinstance(keep, str) else keep, parameters)
    frozen = {id(parameters[name]) for name in _matching(patterns, parameters) - kept}
    frozen -= {id(parameters[name]) for name in kept}  # a tied weight under its other name
    if not any(parameter.requires_grad and id(parameter) not in frozen for parameter in parameters.values()):
        listed = ", ".join(map(repr, patterns)) or "no pattern"
        raise OptionError(f"freeze: {listed} leaves the model no trainable parameter; there would be nothing to train.")
    for parameter in parameters.values():
        if id(parameter) in frozen:
            parameter.requires_grad_(False)
    return tuple(name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def _matching(patterns: tuple[str, ...], names: dict[str, nn.Parameter]) -> set[str]:
    """The parameters whose name, or that of a module around them, matches one of the patterns."""
    paths = {name: list(accumulate(name.split("."), lambda path, part: f"{path}.{part}")) for name in names}
    matched = set()
    for pattern in patterns:
        found = {name for name, path in paths.items() if any(fnmatch.fnmatchcase(part, pattern) for part in path)}
        if not found:
            raise unknown_name("parameter or module", pattern, {part for path in paths.values() for part in path})
        matched |= found
    return matched
