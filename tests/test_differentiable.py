"""Operations written out for the traced derivative (`passes.differentiable`), beside torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward.passes.differentiable import DIFFERENTIABLE

SETTINGS = [((3, 2), (1, 2), (1, 0), (2, 1)), ((3, 3), (1, 1), (1, 1), (1, 1)), ((2, 2), (1, 1), (0, 0), (2, 2))]
"""Kernel, dilation, padding and stride."""


@pytest.mark.parametrize("sliding", SETTINGS, ids=str)
def test_patches_and_their_sum_are_torchs(sliding: tuple[tuple[int, int], ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 7, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    expected, found = F.unfold(image, *sliding), DIFFERENTIABLE[torch.ops.aten.im2col.default](image, *sliding)
    assert torch.equal(found, expected)
    cotangent = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    gradients = [torch.autograd.grad(each, image, cotangent)[0] for each in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0])
    patches = cotangent.requires_grad_()
    expected = F.fold(patches, (7, 8), *sliding)
    found = DIFFERENTIABLE[torch.ops.aten.col2im.default](patches, (7, 8), *sliding)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(each, patches, torch.ones_like(each))[0] for each in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0])


class Overlapping(nn.Module):
    """A convolution by patches, and the mean of overlapping patches, as in some attention modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(9, 18), nn.Linear(18, 18), nn.Linear(50, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(F.unfold(x, 3, padding=1).transpose(1, 2)).relu()
        hidden = F.fold(self.second(hidden).transpose(1, 2), (5, 5), 3, padding=1)
        logits: Tensor = self.head(F.pad(hidden, (1, 0, 0, 1))[:, :, 1:, :-1].flatten(1))
        return logits


class Pooled(nn.Module):
    """Adaptive pooling: its derivative writes into a view (``as_strided``) of fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.pool = nn.AdaptiveAvgPool1d(1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x).relu())
        logits: Tensor = self.head(self.pool(hidden.transpose(1, 2)).flatten(1))
        return logits


class ChannelsLast(nn.Module):
    """A group normalisation that reads images with channels last, and trains, with nothing that trains before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.GroupNorm(1, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x.permute(0, 3, 1, 2)).relu().mean((2, 3)))
        return logits


class Resized(nn.Module):
    """Images made larger and smaller between layers."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mode = mode
        self.first, self.second, self.head = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        align = None if self.mode == "nearest" else False
        hidden = F.interpolate(self.first(x).relu(), scale_factor=2, mode=self.mode, align_corners=align)
        hidden = F.interpolate(self.second(hidden).relu(), (2, 2), mode=self.mode, align_corners=align)
        logits: Tensor = self.head(hidden.flatten(1))
        return logits


def image(generator: torch.Generator, samples: int) -> Tensor:
    return torch.randn(samples, 1, 5, 5, dtype=torch.float64, generator=generator)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator, int], Tensor]]] = {
    "patches": (Overlapping, image),
    "pool": (Pooled, lambda g, samples: torch.randn(samples, 5, 4, dtype=torch.float64, generator=g)),
    "channels last": (ChannelsLast, lambda g, n: torch.randn(n, 5, 5, 4, dtype=torch.float64, generator=g)),
    "bilinear": (lambda: Resized("bilinear"), image),
    "bicubic": (lambda: Resized("bicubic"), image),
    "nearest": (lambda: Resized("nearest"), image),
}


@pytest.mark.parametrize("case", CASES)
def test_one_segment_around_them_is_backpropagation_for_any_batch_size(case: str) -> None:
    build, inputs = CASES[case]
    model, generator = build().double(), torch.Generator().manual_seed(1)
    estimator = onward.LikelihoodRatio.feedback_learned(warmup=0, segments=1)
    program = onward.compile(model, inputs(generator, 3), loss=F.cross_entropy, estimator=estimator)
    for samples in (2, 5):
        x, target = inputs(generator, samples), torch.arange(samples) % 3
        model.zero_grad()
        program.step(x, target)
        found = [parameter.grad for parameter in model.parameters()]
        x.requires_grad_()  # and asked for: torch itself crashes on "channels last" where it is not
        *expected, _ = torch.autograd.grad(F.cross_entropy(model(x), target), [*model.parameters(), x])
        torch.testing.assert_close(found, expected)
