"""Operations written out for the traced derivative (`passes.differentiable`), beside torch's own."""

from __future__ import annotations

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


@pytest.mark.parametrize("samples", [2, 5])
def test_one_segment_around_them_is_backpropagation_for_any_batch_size(samples: int) -> None:
    model, generator = Overlapping().double(), torch.Generator().manual_seed(1)
    example = torch.randn(3, 1, 5, 5, dtype=torch.float64, generator=generator)
    estimator = onward.LikelihoodRatio.feedback_learned(warmup=0, segments=1)
    program = onward.compile(model, example, loss=F.cross_entropy, estimator=estimator)
    x = torch.randn(samples, 1, 5, 5, dtype=torch.float64, generator=generator)
    target = torch.arange(samples) % 3
    program.step(x, target)
    found = [parameter.grad.clone() for parameter in model.parameters()]
    expected = torch.autograd.grad(F.cross_entropy(model(x), target), list(model.parameters()))
    torch.testing.assert_close(found, list(expected))
