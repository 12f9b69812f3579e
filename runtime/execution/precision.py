"""``torch.autocast`` where it belongs: in forwards and losses, not in gradients nor in what feedback learns.

Captures of a forward in bfloat16 or float16 are as narrow as its values; gradient subgraphs and Jacobians take them as
float32, and sum in it. Kernels of derivatives also refuse operands of two dtypes, as weights and captures then have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

_DEVICES = ("cpu", "cuda")
_NARROW = (torch.bfloat16, torch.float16)

Result = TypeVar("Result")


def autocasting() -> list[str]:
    """The kinds of device on which this thread is within ``torch.autocast``."""
    return [device for device in _DEVICES if torch.is_autocast_enabled(device)]


def autocast_dtypes() -> tuple[Any, ...]:
    """What of ``torch.autocast`` decides which operations a trace, or a capture, records."""
    return tuple((device, torch.get_autocast_dtype(device)) for device in autocasting())


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """Within the caller's autocast, casting weights anew: a cast that was made before would not be in a graph that is
    captured, which would read it when it is gone."""
    with ExitStack() as stack:
        for device, dtype in autocast_dtypes():
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
        yield


def outside_autocast(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function` with autocast off, and the arguments that are tensors of 16 bits as float32, where it is called within
    autocast; elsewhere `function` as it is, and a model that has 16 bits of its own accord keeps them."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Result:
        devices = autocasting()
        if not devices:
            return function(*arguments)
        with ExitStack() as off:
            for device in devices:
                off.enter_context(torch.autocast(device, enabled=False))
            return function(*map(_wide, arguments))

    return run


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _NARROW else value
