"""Convolutions and poolings of one, two or three spatial axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .node import Node, operator, refuse

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAXIMA: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEANS: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _by_rank(node: Node, table: dict[int, Callable[..., Any]], axes: int) -> Callable[..., Any]:
    if axes not in table:
        raise refuse(node, f"an input of {axes} spatial axes")
    return table[axes]


def _padding(
    node: Node, extents: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Zeros in front of and behind each spatial axis."""
    how, axes = node.get("auto_pad", "NOTSET"), len(kernel)
    if how in ("NOTSET", ""):
        pads = list(node.get("pads", [0] * 2 * axes))
        return pads[:axes], pads[axes:]
    if how == "VALID":
        return [0] * axes, [0] * axes
    before, after = [], []
    for extent, width, step, gap in zip(extents, kernel, stride, dilation, strict=True):
        total = max((-(-extent // step) - 1) * step + gap * (width - 1) + 1 - extent, 0)
        less, more = total // 2, total - total // 2
        before.append(less if how == "SAME_UPPER" else more)
        after.append(more if how == "SAME_UPPER" else less)
    return before, after


def _pad(value: Tensor, before: Sequence[int], after: Sequence[int], fill: float = 0.0) -> Tensor:
    flat = [each for pair in reversed(list(zip(before, after, strict=True))) for each in pair]
    return F.pad(value, flat, value=fill) if any(flat) else value


@operator("Conv", trains=(1, 2), limits="one to three spatial axes")
def conv(node: Node, value: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    axes = weight.dim() - 2
    compute = _by_rank(node, _CONVOLUTIONS, axes)
    stride, dilation = node.get("strides", [1] * axes), node.get("dilations", [1] * axes)
    before, after = _padding(node, value.shape[2:], weight.shape[2:], stride, dilation)
    if before != after:
        value, before = _pad(value, before, after), [0] * axes
    result: Tensor = compute(value, weight, bias, stride, before, dilation, node.get("group", 1))
    return result


@operator("ConvTranspose", trains=(1, 2), limits="one to three spatial axes")
def conv_transpose(node: Node, value: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What is cut off at the ends (`pads`) may differ on the two sides, which torch's own padding may not."""
    axes = weight.dim() - 2
    compute = _by_rank(node, _TRANSPOSED, axes)
    stride, dilation = node.get("strides", [1] * axes), node.get("dilations", [1] * axes)
    beyond = node.get("output_padding", [0] * axes)
    whole = [
        step * (extent - 1) + gap * (width - 1) + 1 + more
        for extent, width, step, gap, more in zip(
            value.shape[2:], weight.shape[2:], stride, dilation, beyond, strict=True
        )
    ]
    how = node.get("auto_pad", "NOTSET")
    if node.get("output_shape") is not None or how.startswith("SAME"):
        wanted = node.get("output_shape") or [
            extent * step for extent, step in zip(value.shape[2:], stride, strict=True)
        ]
        total = [each - want for each, want in zip(whole, wanted[-axes:], strict=True)]
        less = [each // 2 for each in total]
        more = [each - half for each, half in zip(total, less, strict=True)]
        before, after = (less, more) if how == "SAME_UPPER" else (more, less)
    else:
        pads = [0] * 2 * axes if how == "VALID" else list(node.get("pads", [0] * 2 * axes))
        before, after = pads[:axes], pads[axes:]
    groups = node.get("group", 1)
    if before == after and all(each >= 0 for each in before):
        result: Tensor = compute(value, weight, bias, stride, before, beyond, groups, dilation)
        return result
    result = compute(value, weight, bias, stride, 0, beyond_allowed(beyond, stride, dilation), groups, dilation)
    return _pad(result, [-each for each in before], [-each for each in after])


def beyond_allowed(beyond: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Sequence[int]:
    """`output_padding`, which torch wants smaller than the stride or the dilation."""
    return [min(more, max(step, gap) - 1) for more, step, gap in zip(beyond, stride, dilation, strict=True)]


def _ceiled(
    extents: Sequence[int], before: Sequence[int], after: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:  # fmt: skip
    """How much further than `after` the last window reaches where sizes are rounded up.

    A window that would begin in the padding behind does not count."""
    more = []
    for extent, front, back, width, step, gap in zip(extents, before, after, kernel, stride, dilation, strict=True):
        room = extent + front + back - gap * (width - 1) - 1
        windows = -(-room // step) + 1
        if (windows - 1) * step >= extent + front:
            windows -= 1
        more.append(max((windows - 1) * step - room, 0))
    return more


@operator("MaxPool", limits="one to three spatial axes; indices only where nothing is padded unevenly")
def max_pool(node: Node, value: Tensor) -> Any:
    kernel = node.get("kernel_shape")
    axes = len(kernel)
    compute = _by_rank(node, _MAXIMA, axes)
    stride, dilation = node.get("strides", [1] * axes), node.get("dilations", [1] * axes)
    before, after = _padding(node, value.shape[2:], kernel, stride, dilation)
    if node.get("ceil_mode", 0):
        more = _ceiled(value.shape[2:], before, after, kernel, stride, dilation)
        after = [back + extra for back, extra in zip(after, more, strict=True)]
    own = before == after and all(2 * pad <= width for pad, width in zip(before, kernel, strict=True))
    if len(node.outputs) > 1:
        if not own or node.get("storage_order", 0):
            raise refuse(node, "indices of uneven padding or column-major order")
        values, indices = compute(value, kernel, stride, before, dilation, return_indices=True)
        planes = torch.arange(math.prod(value.shape[:2])).reshape(*value.shape[:2], *[1] * axes)
        return values, indices + planes * math.prod(value.shape[2:])
    dtype = value.dtype
    value = value if value.is_floating_point() else value.to(torch.float32)  # whole numbers of 8 bits
    if not own:
        value, before = _pad(value, before, after, -math.inf), [0] * axes
    result: Tensor = compute(value, kernel, stride, before, dilation)
    return result.to(dtype)


@operator("AveragePool", limits="one to three spatial axes")
def average_pool(node: Node, value: Tensor) -> Tensor:
    kernel = node.get("kernel_shape")
    axes = len(kernel)
    compute = _by_rank(node, _MEANS, axes)
    stride, dilation = node.get("strides", [1] * axes), node.get("dilations", [1] * axes)
    before, after = _padding(node, value.shape[2:], kernel, stride, dilation)
    counts_padding = bool(node.get("count_include_pad", 0))
    more = [0] * axes
    if node.get("ceil_mode", 0):
        more = _ceiled(value.shape[2:], before, after, kernel, stride, dilation)
    plain = before == after and not any(more) and set(dilation) == {1}
    if plain and all(2 * pad <= width for pad, width in zip(before, kernel, strict=True)):
        result: Tensor = compute(value, kernel, stride, before, False, counts_padding)
        return result
    counted = torch.ones_like(value[:1, :1])
    if counts_padding:
        counted = _pad(counted, before, after, 1.0)
        counted = _pad(counted, [0] * axes, more)
    else:
        counted = _pad(counted, before, [back + extra for back, extra in zip(after, more, strict=True)])
    value = _pad(value, before, [back + extra for back, extra in zip(after, more, strict=True)])
    return _window_sum(value, kernel, stride, dilation) / _window_sum(counted, kernel, stride, dilation)


def _window_sum(value: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """The sum over each window, as a convolution of every channel with ones."""
    channels = value.shape[1]
    ones = torch.ones(channels, 1, *kernel, dtype=value.dtype, device=value.device)
    summed: Tensor = _CONVOLUTIONS[len(kernel)](value, ones, None, stride, 0, dilation, channels)
    return summed


@operator("LpPool", limits="one to three spatial axes")
def lp_pool(node: Node, value: Tensor) -> Tensor:
    kernel, order = node.get("kernel_shape"), node.get("p", 2)
    axes = len(kernel)
    _by_rank(node, _CONVOLUTIONS, axes)
    stride, dilation = node.get("strides", [1] * axes), node.get("dilations", [1] * axes)
    before, after = _padding(node, value.shape[2:], kernel, stride, dilation)
    if node.get("ceil_mode", 0):
        more = _ceiled(value.shape[2:], before, after, kernel, stride, dilation)
        after = [back + extra for back, extra in zip(after, more, strict=True)]
    powers = _pad(value.abs().pow(order), before, after)
    return _window_sum(powers, kernel, stride, dilation).pow(1 / order)


@operator("GlobalAveragePool")
def global_average_pool(node: Node, value: Tensor) -> Tensor:
    return value.mean(list(range(2, value.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(node: Node, value: Tensor) -> Tensor:
    return value.amax(list(range(2, value.dim())), keepdim=True)


@operator("GlobalLpPool")
def global_lp_pool(node: Node, value: Tensor) -> Tensor:
    order = node.get("p", 2)
    return value.abs().pow(order).sum(list(range(2, value.dim())), keepdim=True).pow(1 / order)
