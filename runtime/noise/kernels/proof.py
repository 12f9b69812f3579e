"""A kernel is trusted once it has agreed with its definition, on the device and for the kind of call that it is for.

The first call of a kind runs both and compares them: exactly, or where a sum may be rounded in another order within a
derived bound. A kernel that differs, or that Triton cannot compile, is named in a warning and not used again for that
kind of call; the definition's result is returned. A call that shows nothing, such as noise times a zero weight, proves
nothing: it is answered by the definition.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Kind = tuple[object, ...]


@dataclass(frozen=True)
class Kernel:
    """A kernel beside its definition; all functions take the operator's arguments.

    Attributes:
        name: the operator's.
        definition: the torch code.
        launch: the kernel.
        fits: whether the kernel covers such a call; the definition does where it does not.
        telling: whether the definition's result, the first argument here, could show that the kernel is wrong.
        reference: the result in float64, and how far from it the kernel's may be by rounding; None where the kernel's
            must equal the definition's.
        variant: what the kernel is compiled for beside the arguments' dtypes, names and flags.
        excerpt: the arguments of a smaller call of the same kind, to compare where a whole one would take much memory;
            None for the call itself.
    """

    name: str
    definition: Callable[..., Tensor]
    launch: Callable[..., Tensor]
    fits: Callable[..., bool]
    telling: Callable[..., bool] = lambda expected, *_: bool(expected.any())
    reference: Callable[..., tuple[Tensor, Tensor]] | None = None
    variant: Callable[..., object] = lambda *_: None
    excerpt: Callable[..., tuple[Any, ...] | None] = lambda *_: None


_verdicts: dict[Kind, bool] = {}
_proving = threading.RLock()


def proved(kernel: Kernel, *args: Any) -> Tensor:
    """The kernel's result if it can be trusted with this call, else the definition's."""
    if not kernel.fits(*args):
        return kernel.definition(*args)
    kind = kind_of(kernel, *args)
    verdict = _verdicts.get(kind)
    if verdict is None:
        with _proving:
            verdict = _verdicts.get(kind)
            if verdict is None:
                return _first_call(kernel, kind, *args)
    return _launched(kernel, *args) if verdict else kernel.definition(*args)


def kind_of(kernel: Kernel, *args: Any) -> Kind:
    """What a kernel is compiled for: the device, the dtypes, the names and the flags of a call, not its sizes."""
    kind: list[object] = [kernel.name, _device(*args), kernel.variant(*args)]
    for value in args:
        if isinstance(value, Tensor):
            kind.append(value.dtype)
        elif value is None or isinstance(value, (str, bool, torch.dtype)):
            kind.append(value)
    return tuple(kind)


def _device(*args: Any) -> torch.device:
    """The device that a call runs on: its first tensor's."""
    return next(value.device for value in args if isinstance(value, Tensor))


def _launched(kernel: Kernel, *args: Any) -> Tensor:
    with torch.cuda.device_of(next(value for value in args if isinstance(value, Tensor))):
        return kernel.launch(*args)


def _first_call(kernel: Kernel, kind: Kind, *args: Any) -> Tensor:
    some = kernel.excerpt(*args) or args
    expected = kernel.definition(*some)
    if not kernel.telling(expected, *some):
        return expected if some is args else kernel.definition(*args)
    try:
        actual = _launched(kernel, *some)
        difference = _difference(kernel, expected, actual, *some)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or driver raises: training goes on without the kernel
        difference = f"could not be run: {type(error).__name__}: {error}"
    _verdicts[kind] = difference is None
    if difference is None:
        return actual if some is args else _launched(kernel, *args)
    described = ", ".join(str(part).removeprefix("torch.") for part in kind[2:] if part is not None)
    warnings.warn(
        f"The Triton kernel '{kernel.name}' on {kind[1]} ({described}) {difference}. Its torch definition is used from "
        "now on, with the same results; ONWARD_KERNELS=0 leaves all kernels out.",
        UserWarning,
        stacklevel=2,
    )
    return expected if some is args else kernel.definition(*args)


def _difference(kernel: Kernel, expected: Tensor, actual: Tensor, *args: Any) -> str | None:
    """In words how the kernel's result differs from what is expected; None where it does not."""
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return f"gave {actual.dtype} {tuple(actual.shape)} for {expected.dtype} {tuple(expected.shape)}"
    if kernel.reference is None:
        equal = (actual == expected) | ((actual != actual) & (expected != expected))
        wide, expected = actual.double(), expected.double()
    else:
        expected, bound = kernel.reference(*args)
        wide = actual.double()
        equal = ~((wide - expected).abs() > bound)  # a NaN in the weights is one in the sum
        equal &= wide.isnan() == expected.isnan()
    if bool(equal.all()):
        return None
    wrong = ~equal
    largest = float((wide - expected).abs()[wrong].max())
    return f"differs in {int(wrong.sum())} of {wrong.numel()} numbers, by up to {largest:.3g}"
