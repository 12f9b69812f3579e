"""Batches as a loader gives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...passes.errors import BatchError


def split_batch(batch: Any, device: torch.device) -> tuple[Any, Any]:
    """(inputs, target) on `device`; the inputs as a tuple where the batch has several."""
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise BatchError(
            f"a batch must be a tuple (inputs…, target), not a {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
            + "; a collate_fn of the loader can bring it into that form"
        )
    *inputs, target = (to_device(item, device) for item in batch)
    return inputs[0] if len(inputs) == 1 else tuple(inputs), target


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in its lists, tuples and dicts on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if type(value) in (list, tuple):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value


def batch_size(*values: Any) -> int:
    """Length of the first dimension of the first tensor in `values` that has one."""
    pending = list(values)
    while pending:
        value = pending.pop(0)
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
        if isinstance(value, list | tuple):
            pending[:0] = value
        elif isinstance(value, dict):
            pending[:0] = value.values()
    raise BatchError("the batch holds no tensor with a first dimension to count samples by")
