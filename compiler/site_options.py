"""Options that speak of sites by name: which sites form a group, which σ each has."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from ..passes.errors import OptionError, unknown_name
from ..passes.find_sites import Site


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


def resolve_sigmas(sigma: float | Mapping[str, float], found: Sequence[Site]) -> list[float]:
    """σ of every site, in order."""
    if not isinstance(sigma, Mapping):
        return [float(sigma)] * len(found)
    values: dict[int, float] = {}
    for pattern, value in sigma.items():
        for index in matching_sites(pattern, found):
            values.setdefault(index, float(value))
    left = [site.name for site in found if site.index not in values]
    if left:
        raise OptionError(f"sigma: no pattern covers the site(s) {', '.join(left)}. Add '*' as the last pattern.")
    return [values[site.index] for site in found]
