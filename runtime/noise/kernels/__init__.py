"""Triton kernels for the operators of noise and signs on a GPU, each beside the torch code that defines it.

The definitions (`noise.operators`, `noise.packing`, `noise.rows`) write every number that they make to memory,
and the products and sums over it read it again. The kernels make the numbers in registers, where they are used.
`table` lists them, `proof` compares each with its definition before it is trusted.

They are registered where torch was built for CUDA and Triton can be found; nothing here imports Triton before a tensor
on a GPU arrives. The environment variable ``ONWARD_KERNELS=0``, set before Onward is imported, leaves them out.
"""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from typing import Any

import torch

from ....passes import ops as _declarations  # noqa: F401  (declares what is implemented here)

OPERATORS = (
    "perturb", "weighted_noise_sum", "weighted_noise", "stochastic_sign", "pack_signs", "pack_stochastic_signs",
    "unpack_signs", "packed_linear_gradient", "packed_convolution_gradient",
)  # fmt: skip
"""Operators of `onward.passes.ops` that have a kernel."""

_served: set[str] = set()


def serves(device: torch.device) -> bool:
    """Whether kernels are registered for a device of this type."""
    return device.type in _served


def call(name: str, *args: Any) -> Any:
    """The kernel called `name`, or its definition where it does not fit or has failed (`proof.proved`)."""
    from .proof import proved
    from .table import KERNELS

    return proved(KERNELS[name], *args)


def register(dispatch_key: str) -> None:
    """Put the kernels in the place of the definitions for tensors of this dispatch key: "CUDA", or in tests, where
    Triton interprets, "CPU"."""
    for name in OPERATORS:
        torch.library.impl(f"onward::{name}", dispatch_key, partial(call, name))
    _served.add(dispatch_key.lower())


if torch.backends.cuda.is_built() and importlib.util.find_spec("triton") and os.environ.get("ONWARD_KERNELS") != "0":
    register("CUDA")
