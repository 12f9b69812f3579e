"""The noise of a noise point as a matrix: what learned feedback multiplies (method.md 12), by its definition."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ...passes import ops
from ...passes.find_sites import Site
from ...passes.graph import Layout
from . import cpu_kernels

_perturb: Any = cpu_kernels.BINDINGS.get(ops.perturb, ops.perturb)
_count_blocks: Any = cpu_kernels.BINDINGS.get(ops.count_blocks, ops.count_blocks)


@dataclass(frozen=True)
class Probe:
    """What a perturbed run showed: enough to learn from, noise excepted, which is regenerated.

    `response` is half the difference of the two twins' outputs, ``(draws, samples, outputs)``; `error` the loss's
    gradient at the clean output, ``(samples, outputs)``; `alive` the noise points' masks, of `samples` samples.
    """

    response: Tensor
    error: Tensor
    alive: dict[int, Tensor | None]
    draws: Tensor
    key: Tensor


@dataclass(frozen=True)
class NoiseRows:
    """Every draw's and sample's noise times the `amplitudes`, ``(draws * samples, blocks)``: a factor of products."""

    site: Site
    probe: Probe
    noise: str
    amplitudes: Tensor

    @property
    def alive(self) -> Tensor | None:
        return None if self.site.blocks else self.probe.alive.get(self.site.index)

    @cached_property
    def values(self) -> Tensor:
        site, probe, layout, samples = self.site, self.probe, self.site.grid, self.amplitudes.shape[0]
        zeros = probe.response.new_zeros(ops.clean_shape(layout.sizes, layout.dim, samples))
        ones = zeros.new_ones(site.index + 1)
        where = (list(layout.sizes), layout.dim, layout.outer, False)
        values = _perturb(zeros, probe.draws, probe.key, ones, site.index, self.noise, *where, self.alive)
        rows = to_rows(values, layout, samples * len(probe.draws))
        if site.blocks:
            rows = (rows.view(len(probe.draws), samples, -1) * self.amplitudes).view_as(rows)
        return rows


def product_of_rows(right: Tensor, rows: NoiseRows, transposed: bool, alive: Tensor | None) -> Tensor:
    """The definition of `noise_product`: the rows are stored, once for both products. `alive` is that of the rows."""
    return (rows.values.T if transposed else rows.values) @ right


def amplitudes_of(site: Site, probe: Probe) -> Tensor:
    """How many coordinates of every sample's blocks received noise, ``(samples, blocks)``."""
    samples, layout, coarse = probe.response.shape[1], site.layout, site.grid
    mask = probe.alive.get(site.index)
    if site.blocks:
        like = probe.response.new_empty(ops.clean_shape(coarse.sizes, coarse.dim, samples))
        where = (list(layout.sizes), layout.dim, layout.outer, list(site.blocks))
        return to_rows(_count_blocks(like, mask, *where), coarse, samples)
    if mask is None:
        return probe.response.new_ones(()).expand(samples, layout.elements)
    return to_rows(mask, layout, samples).to(probe.response.dtype)


def to_rows(value: Tensor, layout: Layout, rows: int) -> Tensor:
    """A tensor of this layout as ``(rows, elements a sample)``."""
    if layout.dim == 0 and layout.outer == 1:
        return value.reshape(rows, -1)
    inner = layout.sizes[layout.dim] // layout.outer
    before, after = value.shape[: layout.dim], value.shape[layout.dim + 1 :]
    parts = value.reshape(*before, layout.outer, rows, inner, *after)
    return parts.movedim(layout.dim + 1, 0).reshape(rows, -1)
