"""The first samples of a clean run's values: what a perturbed run of a part of the batch reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ...compiler.program import binding_key
from ...passes.graph import Kind, Layout, placeholders


def narrow(module: fx.GraphModule, environment: dict[str, Any], samples: int, kept: int) -> dict[str, Any]:
    """What `module` reads of `environment`, cut to the first `kept` of its `samples` samples."""
    if kept == samples:
        return environment
    found = {}
    for node in placeholders(module):
        key = binding_key(node)
        value = environment[key]
        layout: Layout | None = node.meta.get("layout")
        if isinstance(value, Tensor) and layout is not None and layout.batched:
            value = _first(value, layout, samples, kept)
        elif node.meta.get("kind") == Kind.SIZE and isinstance(node.meta.get("val"), torch.SymInt):
            value = value * kept // samples  # every size that reaches a run is a multiple of the batch size
        found[key] = value
    return found


def _first(value: Tensor, layout: Layout, samples: int, kept: int) -> Tensor:
    dim, inner = layout.dim, layout.sizes[layout.dim] // layout.outer
    if layout.outer == 1:
        return value.narrow(dim, 0, kept * inner)
    parts: Tensor = value.unflatten(dim, (layout.outer, samples, inner))
    return parts.narrow(dim + 1, 0, kept).flatten(dim, dim + 2)
