"""Options that speak of sites by name: which sites form a group, which σ, blocks and place of the noise each has."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import fx

from ..passes.errors import OptionError, unknown_name
from ..passes.find_sites import Site, sites
from ..passes.graph import describe
from ..passes.perturb_weights import WeightNoise, weight_of
from ..passes.rules import uses_batch_statistics
from ..passes.tie_blocks import blocks_of

Value = TypeVar("Value", int, float, str)

UNMEASURED = 0.1
"""σ with ``sigma="auto"`` before the first measurement."""


def resolve_copies(
    copies: int | Mapping[str, int], found: Sequence[Site], groups: Sequence[tuple[int, ...]]
) -> list[int]:
    """Copies of every group, in order."""
    if isinstance(copies, int):
        return [copies] * len(groups)
    values = _covering("copies", copies, found)
    for group in groups:
        counts = {values[index]: found[index].name for index in group}
        if len(counts) > 1:
            (a, first), (b, second), *_ = counts.items()
            raise OptionError(
                f"copies: {first!r} has {a} and {second!r} {b}, but they are perturbed in one run. Give a group one "
                'number, or use groups="layerwise".'
            )
    return [values[group[0]] for group in groups]


def resolve_groups(groups: str | Sequence[Sequence[str]], found: Sequence[Site]) -> list[tuple[int, ...]]:
    """The partition of the sites that the estimator asks for, as site indices."""
    if groups == "joint":
        return [tuple(site.index for site in found)]
    if groups == "layerwise":
        return [(site.index,) for site in found]
    partition = []
    taken: dict[int, str] = {}
    for patterns in groups:
        members: list[int] = []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matched = matching_sites(pattern, found)
            for index in matched:
                if index in taken:
                    raise OptionError(
                        f"groups: the site {found[index].name!r} is matched by {taken[index]!r} and {pattern!r}; every "
                        "site belongs to exactly one group."
                    )
                taken[index] = pattern
            members += matched
        partition.append(tuple(sorted(members)))
    left = [site.name for site in found if site.index not in taken]
    if left:
        raise OptionError(f"groups: no group holds the site(s) {', '.join(left)}; every site belongs to one group.")
    return partition


def matching_sites(pattern: str, found: Sequence[Site]) -> list[int]:
    """Indices of the sites whose name matches `pattern` (``*``, ``?``); an error with the nearest name if none does."""
    matched = [site.index for site in found if fnmatch.fnmatchcase(site.name, pattern)]
    if not matched:
        raise unknown_name("site", pattern, [site.name for site in found])
    return matched


def resolve_corrections(correction: str | Mapping[str, str], found: Sequence[Site]) -> list[str]:
    """The correction of every site, in order."""
    if isinstance(correction, str):
        return [correction] * len(found)
    values = _covering("correction", correction, found)
    return [values[site.index] for site in found]


def resolve_sigmas(sigma: float | str | Mapping[str, float], found: Sequence[Site]) -> list[float]:
    """σ of every site, in order; for ``"auto"`` what it is before the first measurement."""
    if isinstance(sigma, str):
        return [UNMEASURED] * len(found)
    if not isinstance(sigma, Mapping):
        return [float(sigma)] * len(found)
    values = _covering("sigma", sigma, found)
    return [float(values[site.index]) for site in found]


def _matched(given: Mapping[str, Value], found: Sequence[Site]) -> dict[int, Value]:
    """The values of the sites that a pattern matches, by index: that of the first."""
    values: dict[int, Value] = {}
    for pattern, value in given.items():
        for index in matching_sites(pattern, found):
            values.setdefault(index, value)
    return values


def _covering(option: str, given: Mapping[str, Value], found: Sequence[Site]) -> dict[int, Value]:
    """The value of every site, by index; an error if no pattern matches one."""
    values = _matched(given, found)
    left = [site.name for site in found if site.index not in values]
    if left:
        raise OptionError(f"{option}: no pattern covers the site(s) {', '.join(left)}. Add '*' as the last pattern.")
    return values


def resolve_blocks(blocks: int | str | Mapping[str, int], module: fx.GraphModule) -> dict[int, int]:
    """Positions of a block along each axis, of the sites that `blocks` covers."""
    found = sites(module)
    if isinstance(blocks, str):
        return _image_blocks(module)
    if not isinstance(blocks, Mapping):
        return dict.fromkeys((site.index for site in found), blocks)
    return _matched(blocks, found)


def _image_blocks(module: fx.GraphModule) -> dict[int, int]:
    """``"auto"``: of tensors with two position axes or more, a quarter of the model's largest map along each, and 4 at
    least; deeper maps are smaller and so have fewer blocks."""
    whole = {n.meta["site"].index: blocks_of(n, sys.maxsize) for n in module.graph.nodes if "site" in n.meta}
    images = {index: max(extents) for index, extents in whole.items() if sum(extent > 1 for extent in extents) > 1}
    size = max(4, -(-max(images.values(), default=1) // 4))
    return dict.fromkeys(images, size)


def check_separable(module: fx.GraphModule) -> None:
    """Raise OptionError if a part of the batch, run on its own, would give other numbers (``sampling="error"``)."""
    for node in module.graph.nodes:
        if node.op == "call_function" and uses_batch_statistics(node):
            raise OptionError(
                f'sampling="error" runs a part of the batch on its own, and {describe(node)} normalises by the '
                'statistics of whatever is in the batch. Put it in eval mode, or use sampling="all".'
            )


def resolve_noise_on(noise_on: str | Mapping[str, str], module: fx.GraphModule) -> dict[int, WeightNoise]:
    """The noise of the sites whose weight has it, by index; that of the others is on their output.

    Raises:
        OptionError: a pattern asks for noise on weights, and no site that it matches can have it; the first is named.
        UnknownNameError: a pattern matches no site.
    """
    found = sites(module)
    points = {node.meta["site"].index: node for node in module.graph.nodes if "site" in node.meta}
    chosen: dict[int, WeightNoise | None] = {}
    for pattern, on in ({"*": noise_on} if isinstance(noise_on, str) else noise_on).items():
        matched = matching_sites(pattern, found)
        possible = {index: weight_of(points[index], "sample" if on == "auto" else on) for index in matched}
        reasons = [one for one in possible.values() if isinstance(one, str)]
        if on not in ("auto", "output") and len(reasons) == len(matched):
            site = found[matched[0]]
            raise OptionError(
                f"noise_on={on!r}: the site {site.name!r} ({site.operation}) cannot have noise on its weight: "
                f"{reasons[0]}. Linear layers and convolutions can that read weight and bias directly; others need "
                '"output".'
            )
        for index, one in possible.items():
            here = isinstance(one, WeightNoise) and on != "output"
            if here and on == "auto":
                positions = found[index].layout.elements // one.channels  # type: ignore[union-attr]
                here = one.fan_in < positions  # type: ignore[union-attr]
            chosen.setdefault(index, one if here else None)  # type: ignore[arg-type]
    return {index: one for index, one in chosen.items() if one is not None}
