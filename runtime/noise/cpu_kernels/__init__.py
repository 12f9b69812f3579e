"""Compiled loops for the operators of noise on a CPU, each beside the NumPy code that defines it.

The definitions (`noise.operators`) take about forty NumPy calls however small a tensor is, and go through memory as
often however large. Numba compiles each operator to one call and one pass, with the same bits. `table` lists them.

They are registered where Numba can be found; it is imported, and the loops are compiled or read from its cache, when
the first noise is made. The environment variable ``ONWARD_KERNELS=0``, set before Onward is imported, leaves them out.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ....passes import ops as _declarations  # noqa: F401  (declares what is implemented here)

if TYPE_CHECKING:
    from .table import CompiledOperator

OPERATORS = ("perturb", "weighted_noise_sum", "weighted_noise", "stochastic_sign", "keyed_random", "count_blocks")
"""Operators of `onward.passes.ops` that have a compiled loop."""


in_use = True
"""Where it is False the definitions serve every call, as for a test that gives them numbers of its own."""


@cache
def _row(name: str) -> CompiledOperator:
    from .table import KERNELS

    return KERNELS[name]


def call(name: str, *args: Any, **named: Any) -> Tensor:
    """The compiled operator called `name`, or its definition where that does not fit or cannot be trusted."""
    row = _row(name)
    return row(*args, **named) if in_use else row.definition(*args, **named)


def register() -> None:
    """Put the loops in the place of the definitions for tensors on a CPU."""
    for name in OPERATORS:
        torch.library.impl(f"onward::{name}", "CPU", partial(call, name))


def bound(name: str) -> Callable[..., Tensor]:
    """The operator as a function that calls the compiled one past torch's dispatcher, which takes ten microseconds for
    its arguments; by way of it where it has something to do: other devices, fake tensors, modes."""
    operator = getattr(torch.ops.onward, name).default

    def called(tensor: Tensor, *args: Any, **named: Any) -> Tensor:
        plain = type(tensor) is Tensor and tensor.is_cpu and not torch._C._len_torch_dispatch_stack()
        return call(name, tensor, *args, **named) if plain else operator(tensor, *args, **named)

    return called


registered = importlib.util.find_spec("numba") is not None and os.environ.get("ONWARD_KERNELS") != "0"
"""Whether the loops serve this process."""

if registered:
    register()

BINDINGS = {getattr(torch.ops.onward, name).default: bound(name) for name in OPERATORS if registered}
"""By operator, what calls it from Python with less ado."""
