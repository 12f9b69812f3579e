"""A CUDA graph for a CPU: the operations of a function on a tape, which is played again on the same memory.

Played again an operation reads and writes the tensors that it read and wrote; whatever Python knew when it was recorded
(a number, another step's tensor) stays as it was, as in a graph. A number that is read is refused, as by a stream that
captures; what else such a one does not allow (to bring memory to the GPU) has no likeness on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Result = TypeVar("Result")


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        found = func(*args, **(kwargs or {}))
        if torch.Tag.inplace_view not in func.tags:  # a tensor keeps the shape that it came to have
            self.operations.append((func, args, kwargs or {}, pytree.tree_leaves(found)))
        return found

    def play(self) -> None:
        for func, args, kwargs, results in self.operations:
            read = {
                leaf.untyped_storage()._cdata for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
            }
            for new, result in zip(pytree.tree_leaves(func(*args, **kwargs)), results, strict=True):
                if isinstance(result, Tensor) and result.untyped_storage()._cdata not in read:  # no view, not in place
                    result.as_strided(new.shape, new.stride()).copy_(new)


def capture(function: Callable[[], Result], device: torch.device) -> tuple[Result, Callable[[], None]]:
    """`runtime.execution.graphs.capture`."""
    function()
    with Tape() as tape:
        result = function()

    def replay() -> None:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # what was recorded is behind autocast
            tape.play()

    return result, replay
