"""Values of a graph: tensors, and what is known without running it, as NumPy arrays.

Shape arithmetic has to stay out of the tensors: ``torch.export`` would lose sight of the batch size in them. So what
``Shape`` returns is an array of Python's own numbers (dtype ``object``), of which the batch size may be a symbol, and
`static_operators` computes with those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...passes.errors import UnsupportedModelError

Array = npt.NDArray[Any]

LARGEST_CONSTANT = 1 << 28
"""Elements that a tensor made of a shape in the file alone may have: a small file must not fill the memory."""

DTYPES: dict[int, torch.dtype] = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32, 7: torch.int64,
    9: torch.bool, 10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64, 16: torch.bfloat16,
}  # fmt: skip
"""``TensorProto.DataType`` -> torch's. Strings, complex numbers and floats of 8 bits or less are not read."""

_NAMES = {8: "string", 14: "complex64", 15: "complex128"}


def dtype_of(number: int) -> torch.dtype:
    """The dtype with this number in ONNX.

    Raises:
        UnsupportedModelError: It is none of `DTYPES`.
    """
    if number not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
        raise UnsupportedModelError(
            f"a tensor of type {_NAMES.get(number, number)}, which is not read. Those that are: {known}."
        )
    return DTYPES[number]


def to_tensor(array: Array) -> Tensor:
    """An array as a tensor: whole numbers of dtype ``object`` become int64, other numbers float32."""
    if array.dtype != object:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(np.array(array))  # a copy that can be written, 0-d too
    elements = array.ravel().tolist()
    if any(isinstance(each, (torch.SymInt, torch.SymFloat)) for each in elements):
        whole = all(isinstance(each, (int, torch.SymInt)) for each in elements)
        dtype = torch.int64 if whole else torch.float32
        return torch.stack([torch.full((), each, dtype=dtype) for each in elements]).reshape(array.shape)
    if all(isinstance(each, bool) for each in elements) and elements:
        dtype = torch.bool
    else:
        dtype = torch.float32 if any(isinstance(each, float) for each in elements) else torch.int64
    return torch.full((), elements[0], dtype=dtype) if array.ndim == 0 else torch.tensor(array.tolist(), dtype=dtype)


def to_array(tensor: Tensor) -> Array:
    """A tensor of known values as an array."""
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: Array = tensor.detach().numpy()
    return array


def integers(array: Array) -> list[Any]:
    """The elements in order, as Python's ints (or symbols)."""
    return [each if isinstance(each, torch.SymInt) else int(each) for each in array.ravel().tolist()]


def integer(array: Array) -> Any:
    """The only element."""
    return integers(array)[0]


def number(array: Array | None, default: float | int | None = None) -> Any:
    """The only element, or `default` where there is no array."""
    return default if array is None or array.size == 0 else array.ravel().tolist()[0]


def check_size(shape: list[Any]) -> list[Any]:
    """`shape`, if a tensor of it may be made.

    Raises:
        UnsupportedModelError: It has a negative extent, or more elements than `LARGEST_CONSTANT`.
    """
    known = [extent for extent in shape if not isinstance(extent, torch.SymInt)]
    if any(extent < 0 for extent in known) or math.prod(known) > LARGEST_CONSTANT:
        raise UnsupportedModelError(f"it would make a tensor of shape {shape}, which no batch asked for.")
    return shape


def elementwise(function: Callable[..., Any]) -> Callable[..., Array]:
    """A function of numbers (or symbols) as one of arrays, broadcast as NumPy does."""

    def apply(*arrays: Array) -> Array:
        spread = np.broadcast_arrays(*(np.asarray(array, dtype=object) for array in arrays))
        result = np.empty(spread[0].shape, dtype=object)
        flat = [function(*each) for each in zip(*(one.ravel().tolist() for one in spread), strict=True)]
        for index, value in zip(np.ndindex(result.shape), flat, strict=True):
            result[index] = value
        return result

    return apply


def objects(elements: list[Any], shape: tuple[int, ...] | None = None) -> Array:
    """Numbers and symbols as an array of dtype ``object``; one-dimensional unless `shape` says otherwise."""
    array = np.empty(len(elements), dtype=object)
    for index, element in enumerate(elements):
        array[index] = element
    return array if shape is None else array.reshape(shape)
