"""The bytes of tensors that are alive, counted operation by operation; on fake tensors, so that nothing is computed."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .kernels import Temporary, temporary

KERNELS = "inside a kernel"
"""The part of what an operation allocates for itself and frees before it returns."""


class LiveBytes(TorchDispatchMode):
    """Counts storages from the operation that makes them until they are freed, each for the `part` of the step that is
    set then.

    Whatever reads a number out of a tensor gets a one: so code that checks its values, as a step does, runs on fake
    tensors, the way of finite numbers.

    Attributes:
        part: what new storages count for.
        now: bytes alive.
        peak: the most that was alive since `restart`, operations' temporaries and NumPy's buffers included.
        tensors: the same without NumPy's buffers.
        parts: `peak` by part.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = ""
        self.now = self.peak = self.tensors = 0
        self.parts: Counter[str] = Counter()
        self._by_part: Counter[str] = Counter()
        self._known: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def restart(self) -> None:
        """Look for the peak anew, from here."""
        self.peak = self.tensors = 0
        self._look(Temporary())

    def ignore(self, *tensors: Tensor) -> None:
        """Do not count these tensors' memory: it was there before."""
        for tensor in tensors:
            self._count(tensor, 0)

    def of(self, part: str) -> int:
        """Bytes alive of a part."""
        return self._by_part[part]

    def relabel(self, values: Any, part: str) -> None:
        """From here on the tensors in `values` count for this part."""
        for leaf in _tensors(values):
            key = leaf.untyped_storage()._cdata
            if key not in self._known:
                continue  # it was there before anybody counted
            reference, size, before = self._known[key]
            self._known[key] = reference, size, part
            self._by_part[before] -= size
            self._by_part[part] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(*args) if not isinstance(args[0], FakeTensor) else _one(args[0].dtype)
        result = func(*args, **(kwargs or {}))
        for leaf in _tensors(result):
            self._count(leaf, leaf.untyped_storage().nbytes())
        self._look(temporary(func, args, result))
        return result

    def _count(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = weakref.ref(storage, self._forgetting(key)), size, self.part
            self.now += size
            self._by_part[self.part] += size

    def _forgetting(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            _, size, part = self._known.pop(key)
            self.now -= size
            self._by_part[part] -= size

        return forget

    def _look(self, own: Temporary) -> None:
        self.tensors = max(self.tensors, self.now + own.tensors)
        if self.now + own.tensors + own.arrays > self.peak:
            self.peak = self.now + own.tensors + own.arrays
            self.parts = +self._by_part
            if own.tensors + own.arrays:
                self.parts[KERNELS] = own.tensors + own.arrays


def _one(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
