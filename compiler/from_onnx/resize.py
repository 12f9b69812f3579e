"""Resizing of images: nearest, linear, cubic, along any axes, as products with one matrix an axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .node import Node, operator, refuse
from .values import Array, check_size, integers

_COORDINATES: dict[str, Callable[[Any, float, int, int], Any]] = {
    "half_pixel": lambda x, scale, old, new: (x + 0.5) / scale - 0.5,
    "half_pixel_symmetric": lambda x, scale, old, new: old / 2 * (1 - new / (scale * old)) + (x + 0.5) / scale - 0.5,
    "pytorch_half_pixel": lambda x, scale, old, new: (x + 0.5) / scale - 0.5 if new > 1 else np.zeros_like(x),
    "align_corners": lambda x, scale, old, new: x * (old - 1) / (new - 1) if new > 1 else np.zeros_like(x),
    "asymmetric": lambda x, scale, old, new: x / scale,
}
"""Where a new position lies among the old ones."""

_NEAREST: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


@operator("Resize", static=(1, 2, 3), limits="modes nearest, linear and cubic; without antialias, tf_crop_and_resize")
def resize(
    node: Node, value: Tensor, roi: Array | None = None, scales: Array | None = None, sizes: Array | None = None
) -> Tensor:
    if node.opset < 11:  # (value, scales), and the corner of a pixel is where it lies
        return _resize(node, value, roi, None, "asymmetric", "floor")
    if node.get("antialias", 0):
        raise refuse(node, "antialias=1")
    coordinates = node.get("coordinate_transformation_mode", "half_pixel")
    if coordinates not in _COORDINATES:
        raise refuse(node, f"coordinate_transformation_mode {coordinates!r}")
    return _resize(node, value, scales, sizes, coordinates, node.get("nearest_mode", "round_prefer_floor"))


@operator("Upsample", static=(1,))
def upsample(node: Node, value: Tensor, scales: Array | None = None) -> Tensor:
    scales = np.asarray(node.get("scales")) if scales is None else scales
    return _resize(node, value, scales, None, "asymmetric", "floor")


def _resize(
    node: Node, value: Tensor, scales: Array | None, sizes: Array | None, coordinates: str, nearest: str
) -> Tensor:
    axes = [axis % value.dim() for axis in node.get("axes", range(value.dim()))]
    given = [None] * len(axes) if scales is None or scales.size == 0 else scales.ravel().tolist()
    wanted = integers(sizes) if sizes is not None and sizes.size else [None] * len(axes)
    policy = node.get("keep_aspect_ratio_policy", "stretch")
    if sizes is not None and sizes.size and policy != "stretch":
        ratios = [want / value.shape[axis] for axis, want in zip(axes, wanted, strict=True)]
        ratio = min(ratios) if policy == "not_larger" else max(ratios)
        wanted, given = [math.floor(value.shape[axis] * ratio + 0.5) for axis in axes], [ratio] * len(axes)
    for axis, scale, want in zip(axes, given, wanted, strict=True):
        old = value.shape[axis]
        if isinstance(old, torch.SymInt) or isinstance(want, torch.SymInt):
            continue  # the batch: nothing resizes that
        if want is None and scale == 1.0:
            continue
        new = math.floor(old * scale) if want is None else want
        if want is not None and scale is None:
            scale = new / old
        check_size([new])
        if new != old or scale != 1.0:
            value = _along(value, axis, _matrix(node, old, new, scale, coordinates, nearest))
    return value


def _along(value: Tensor, axis: int, matrix: Array) -> Tensor:
    weights = torch.tensor(matrix.tolist(), dtype=value.dtype, device=value.device)
    if ((matrix == 0) | (matrix == 1)).all() and (matrix.sum(1) == 1).all():
        return value.index_select(axis, torch.tensor(matrix.argmax(1).tolist(), device=value.device))
    return torch.matmul(value.movedim(axis, -1), weights.t()).movedim(-1, axis)


def _matrix(node: Node, old: int, new: int, scale: float, coordinates: str, nearest: str) -> Array:
    """``(new, old)``: what each new position takes of each old one."""
    places = _COORDINATES[coordinates](np.arange(new, dtype=np.float64), scale, old, new)
    mode = node.get("mode", "nearest")
    matrix, rows = np.zeros((new, old)), np.arange(new)
    if mode == "nearest":
        chosen = np.clip(_NEAREST[nearest](places), 0, old - 1).astype(int)
        matrix[rows, chosen] = 1.0
    elif mode in ("linear", "bilinear"):
        places = np.clip(places, 0, old - 1)
        low = np.floor(places).astype(int)
        share = places - low
        np.add.at(matrix, (rows, low), 1 - share)
        np.add.at(matrix, (rows, np.minimum(low + 1, old - 1)), share)
    elif mode == "cubic":
        low = np.floor(places).astype(int)
        outside = bool(node.get("exclude_outside", 0))
        for offset in range(-1, 3):
            weight = _cubic(np.abs(places - (low + offset)), node.get("cubic_coeff_a", -0.75))
            at = low + offset
            if outside:
                weight = np.where((at >= 0) & (at < old), weight, 0.0)
            np.add.at(matrix, (rows, np.clip(at, 0, old - 1)), weight)
        matrix /= matrix.sum(1, keepdims=True)
    else:
        raise refuse(node, f"mode {mode!r}")
    return matrix


def _cubic(distance: Array, a: float) -> Array:
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    result: Array = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
    return result


_MODES = {"linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest", "cubic": "bicubic", "bicubic": "bicubic"}


@operator("GridSample", limits="two spatial axes for cubic")
def grid_sample(node: Node, value: Tensor, grid: Tensor) -> Tensor:
    return torch.nn.functional.grid_sample(
        value,
        grid,
        _MODES[node.get("mode", "linear")],
        node.get("padding_mode", "zeros"),
        bool(node.get("align_corners", 0)),
    )
