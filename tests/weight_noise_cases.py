"""What tests of noise on weights share: operations, their noise made again, a model of several kinds of site."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward.passes import ops
from onward.passes.perturb_weights import WeightNoise
from onward.runtime.program import Program

DOUBLE = torch.float64
KEY = torch.tensor([2**40 + 17, 5])


def window(stride: Any, padding: Any, dilation: Any, groups: int = 1) -> dict[str, Any]:
    return {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


CASES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], int, int, dict[str, Any]]] = {
    "linear": ("linear", (3, 4), (1, 4), 0, 1, {}),
    "tokens": ("linear", (3, 4), (1, 5, 4), 0, 1, {}),
    "tokens-first": ("linear", (3, 4), (5, 1, 4), 1, 1, {}),
    "rows-of-tokens": ("linear", (3, 4), (5, 4), 0, 1, {}),
    "outer-rows": ("linear", (2, 3), (6, 3), 0, 2, {}),
    "product": ("product", (4, 3), (1, 5, 4), 0, 1, {}),
    "conv1d": ("convolution", (4, 1, 3), (1, 2, 9), 0, 1, window([2], [2], [2], 2)),
    "conv2d": ("convolution", (3, 2, 3, 2), (1, 2, 5, 6), 0, 1, window([1, 1], [0, 0], [1, 1])),
    "conv2d-strided": ("convolution", (3, 2, 3, 2), (1, 2, 5, 6), 0, 1, window([2, 3], [1, 0], [1, 2])),
    "conv2d-groups": ("convolution", (6, 2, 2, 3), (1, 4, 4, 4), 0, 1, window([1, 1], [0, 2], [1, 1], 2)),
    "conv2d-depthwise": ("convolution", (3, 1, 3, 3), (1, 3, 4, 4), 0, 1, window([1, 1], [1, 1], [1, 1], 3)),
    "conv2d-frames": ("convolution", (2, 1, 3, 3), (4, 1, 4, 4), 0, 2, window([1, 1], [1, 1], [1, 1])),
    "conv3d": ("convolution", (2, 2, 2, 2, 1), (1, 2, 3, 3, 2), 0, 1, window([1, 2, 1], [0, 1, 0], [1, 1, 1])),
}
"""Name to operation, weight, sizes of the activation, batch dimension, outer rows and the convolution's window."""


def noise_of(name: str, on: str, bias: bool) -> WeightNoise:
    operation, weight, _, _, _, options = CASES[name]
    return WeightNoise(on, operation, 0, "w", weight, "b" if bias else "", **options)


def drawn(at: WeightNoise, site: int, noise: str, copy: int, samples: int, key: Tensor = KEY) -> tuple[Tensor, Tensor]:
    """The noise of a copy on the weight, (samples, *weight), and on the bias, (samples, channels), by `ops.perturb`."""
    where, rows = at.layout, samples if at.layout.batched else 1
    zeros = torch.zeros(rows, math.prod(where.sizes), dtype=DOUBLE).reshape(-1, *where.sizes[1:])
    ones = torch.ones(site + 1, dtype=DOUBLE)
    numbers = ops.perturb(zeros, torch.tensor([abs(copy) if copy >= 0 else ~copy]), key, ones, site, noise,
                          list(where.sizes), where.dim, 1, False).reshape(rows, -1)  # fmt: skip
    numbers = numbers.expand(samples, -1)
    if at.on == "rank-one":
        u = numbers[:, : at.channels].reshape(samples, at.groups, -1, 1)
        v = numbers[:, at.channels :].reshape(samples, at.groups, 1, -1)
        full = u * v
        entries = full[..., : at.fan_in].reshape(samples, at.channels, at.fan_in)
        entries = entries.transpose(1, 2) if at.operation == "product" else entries
        bias = full[..., at.fan_in :].reshape(samples, -1)
    else:
        entries, bias = numbers[:, : math.prod(at.shape)], numbers[:, math.prod(at.shape) :]
    return entries.reshape(samples, *at.shape), bias.reshape(samples, -1)


def applied(at: WeightNoise, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if at.operation == "convolution":
        still = [0] * len(at.stride)
        return torch.convolution(x, weight, bias, at.stride, at.padding, at.dilation, False, still, at.groups)
    z: Tensor = F.linear(x, weight if at.operation == "linear" else weight.T, bias)
    return z


def rows_of(tensor: Tensor, dim: int, outer: int, count: int, place: int) -> Tensor:
    """Of a tensor with rows (outer, count, rest) those at a place: of one copy of several, or of one sample."""
    rows: Tensor = tensor.unflatten(dim, (outer, count, -1)).select(dim + 1, place)
    return rows.flatten(dim, dim + 1)


class Net(nn.Module):
    """Convolutions with groups and stride, a linear layer on tokens, a product without bias and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, stride=2, groups=2)
        self.tokens = nn.Linear(4, 3)
        self.head = nn.Linear(12, 3)
        self.head.bias.requires_grad_(False)
        self.mix = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.stem(x))))
        x = torch.tanh(self.tokens(x.flatten(2).transpose(1, 2)))
        logits: Tensor = self.head(torch.tanh(x @ self.mix).flatten(1))
        return logits


def net_and_batch() -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(3)
    return Net().double(), torch.randn(4, 2, 5, 5, dtype=DOUBLE), torch.tensor([0, 2, 1, 2])


def compiled(model: nn.Module, x: Any, on: Any, loss: Any = F.cross_entropy, seed: int = 7, **settings: Any) -> Program:
    estimator = onward.LikelihoodRatio(**{"noise_on": on, "copies": 6, "sigma": 0.5, **settings})
    return onward.compile(model, x, loss=loss, estimator=estimator, seed=seed)
