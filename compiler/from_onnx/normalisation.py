"""Normalisations, in the form of inference: batch normalisation by the statistics that the file holds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .node import Node, operator, refuse


@operator("BatchNormalization", trains=(1, 2), limits="by the file's statistics, which training leaves as they are")
def batch_normalization(node: Node, value: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    if node.get("training_mode", 0):
        raise refuse(node, "training_mode=1")
    return F.batch_norm(value, mean, var, scale, bias, False, 0.0, node.get("epsilon", 1e-5))


@operator("LayerNormalization", trains=(1, 2))
def layer_normalization(node: Node, value: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    axis, epsilon = node.get("axis", -1) % value.dim(), node.get("epsilon", 1e-5)
    shape = list(value.shape[axis:])
    result = F.layer_norm(value, shape, scale.expand(shape), None if bias is None else bias.expand(shape), epsilon)
    if len(node.outputs) == 1:
        return result
    axes = list(range(axis, value.dim()))
    mean = value.mean(axes, keepdim=True)
    return result, mean, (((value - mean) ** 2).mean(axes, keepdim=True) + epsilon).rsqrt()


@operator("RMSNormalization", trains=(1,))
def rms_normalization(node: Node, value: Tensor, scale: Tensor) -> Tensor:
    axes = list(range(node.get("axis", -1) % value.dim(), value.dim()))
    mean, epsilon = value.square().mean(axes, keepdim=True), float(node.get("epsilon", 1e-5))
    return value * (mean + epsilon).rsqrt() * scale


@operator("InstanceNormalization", trains=(1, 2))
def instance_normalization(node: Node, value: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(value, None, None, scale, bias, True, 0.0, node.get("epsilon", 1e-5))


@operator(
    "GroupNormalization", trains=(1, 2), limits="before opset 21 scale and bias are one a group, since then a channel"
)
def group_normalization(node: Node, value: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups, each = node.get("num_groups"), value.shape[1] // node.get("num_groups")
    if scale.shape[0] == groups and groups != value.shape[1]:
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(value, groups, scale, bias, node.get("epsilon", 1e-5))


_LRN = {"bias": 1.0, "alpha": 1e-4, "beta": 0.75}


@operator("LRN")
def lrn(node: Node, value: Tensor) -> Tensor:
    """By the sum over a window of channels; of an even width one more lies behind than in front."""
    width = node.get("size")
    squares = value.square().transpose(0, 1).flatten(2)  # channels first: padding is for the leading axis then
    squares = squares.permute(1, 2, 0)
    padded = F.pad(squares, ((width - 1) // 2, width // 2))
    summed = padded.unfold(2, width, 1).sum(-1).permute(0, 2, 1).reshape(value.shape)
    bias, alpha, beta = (float(node.get(name, usual)) for name, usual in _LRN.items())
    base: Tensor = bias + alpha / width * summed
    return value / base.pow(beta)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(node: Node, value: Tensor) -> Tensor:
    axes = node.get("axes", [0, 2, 3])
    mean = value.mean(axes, keepdim=True)
    variance = value.square().mean(axes, keepdim=True) - mean.square()
    return (value - mean) / (torch.sqrt(variance) + 1e-9)
