"""A tree of tensors and plain Python values as JSON and tensors by name, and back; nothing is pickled.

In the JSON ``{"!": "tensor", "name": …}`` stands for a tensor, and other tags for what JSON lacks (tuples, infinities).
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...passes.errors import CheckpointError

_TAG = "!"


class Encoder:
    """Split a tree of Python values and tensors into JSON and a flat dict of tensors that share no memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._storages: set[int] = set()

    def encode(self, value: object, path: str) -> Any:
        """`value` as JSON; `path` is its dotted place in the tree, for tensor names and messages."""
        if value is None or isinstance(value, bool) or type(value) in (int, str):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, np.ndarray):
            return {_TAG: "numpy", "of": self._tensor(torch.from_numpy(value.copy()), path)}
        if isinstance(value, np.generic):
            return self.encode(value.item(), path)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {_TAG: "float", "of": repr(float(value))}
        if isinstance(value, torch.dtype | torch.device):
            return {_TAG: type(value).__name__, "of": str(value).removeprefix("torch.")}
        if type(value) in (dict, OrderedDict):
            return self._mapping(value, path)
        if type(value) is Counter:
            return {_TAG: "counter", "of": self._pairs(value, path)}
        if type(value) is list:
            return self._items(value, path)
        if type(value) in (tuple, torch.Size):
            return {_TAG: "tuple", "of": self._items(value, path)}
        if type(value) is deque:
            return {_TAG: "deque", "of": self._items(value, path), "maxlen": value.maxlen}
        raise CheckpointError(
            f"cannot store {path!r} in a checkpoint: it is a {type(value).__module__}.{type(value).__qualname__}. "
            "Checkpoints hold tensors, numbers, strings, None, and lists, tuples and dicts of them."
        )

    def _items(self, values: Any, path: str) -> list[Any]:
        return [self.encode(value, f"{path}.{index}") for index, value in enumerate(values)]

    def _pairs(self, values: Any, path: str) -> list[list[Any]]:
        return [[self.encode(k, path), self.encode(v, f"{path}.{k}")] for k, v in values.items()]

    def _mapping(self, values: Any, path: str) -> Any:
        if all(type(key) is str for key in values) and _TAG not in values:
            return {key: self.encode(value, f"{path}.{key}" if path else key) for key, value in values.items()}
        return {_TAG: "dict", "of": self._pairs(values, path)}

    def _tensor(self, tensor: Tensor, path: str) -> dict[str, Any]:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "quantized" if tensor.is_quantized else "meta" if tensor.is_meta else str(tensor.layout)
            raise CheckpointError(f"cannot store the {kind} tensor {path!r} in a checkpoint: only dense ones.")
        name, number = path, 1
        while name in self.tensors:
            name, number = f"{path}#{number}", number + 1
        tag: dict[str, Any] = {_TAG: "tensor", "name": name}
        data = tensor.detach().resolve_conj().resolve_neg()
        if data.is_complex():
            tag["complex"] = True
            data = torch.view_as_real(data)
        elif not data.is_contiguous():
            for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
                if data.dim() == dims and data.is_contiguous(memory_format=memory_format):
                    tag["memory_format"] = str(memory_format).removeprefix("torch.")
        data = data.cpu().contiguous()
        storage = data.untyped_storage()
        if storage.data_ptr() in self._storages or storage.nbytes() != data.numel() * data.element_size():
            data = data.clone()
        self._storages.add(data.untyped_storage().data_ptr())
        self.tensors[name] = data
        return tag


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `Encoder.encode`. Tensors come on the CPU in fresh, aligned memory."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {key: decode(item, tensors) for key, item in value.items()}
    if kind == "tensor":
        data = tensors[value["name"]].clone()
        if value.get("complex"):
            data = torch.view_as_complex(data)
        if "memory_format" in value:
            data = data.contiguous(memory_format=getattr(torch, value["memory_format"]))
        return data
    of = value["of"]
    if kind == "numpy":
        return decode(of, tensors).numpy()
    if kind == "float":
        return float(of)
    if kind == "dtype":
        return getattr(torch, of)
    if kind == "device":
        return torch.device(of)
    if kind in ("dict", "counter"):
        pairs = {decode(key, tensors): decode(item, tensors) for key, item in of}
        return pairs if kind == "dict" else Counter(pairs)
    items = [decode(item, tensors) for item in of]
    return tuple(items) if kind == "tuple" else deque(items, value["maxlen"])
