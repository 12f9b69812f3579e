"""Binary weights: the latent weight's gradient against the loss smoothed by noise on it, and where it is biased."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from feedback_cases import BOUND, DOUBLE, normal
from torch import Tensor, nn

import onward
from onward.models.binarised import BinaryConv2d, BinaryLinear, binarise
from onward.passes.errors import UnreachedParameterError

X, Y = normal(4, 3), normal(4, 2, seed=1)
LATENT = torch.tensor([[0.6, -0.2, 1.7], [-0.9, 0.3, -1.2]], dtype=DOUBLE)
SCALE = LATENT.abs().mean(1, keepdim=True)


def linear_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output * target).sum(1)


def squared_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(1)


def layer() -> BinaryLinear:
    made = BinaryLinear(3, 2).double()
    with torch.no_grad():
        made.weight.copy_(LATENT)
        assert made.bias is not None
        made.bias.zero_()
    return made


def estimated(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The mean of the latent weight's gradient over many steps, and its standard error."""
    model = layer()
    program = onward.compile(model, X, loss=loss, estimator=onward.LikelihoodRatio(copies=128, sigma=0.5))
    rows = []
    for _ in range(30):
        model.zero_grad()
        program.step(X, Y)
        assert model.weight.grad is not None
        rows.append(model.weight.grad.clone())
    found = torch.stack(rows)
    return found.mean(0), found.std(0) / len(rows) ** 0.5


def smoothed(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The derivative by W of ``E[loss(α sign(W + u))]``, u uniform in [-1, 1] and α held fixed.

    One weight's sign is positive with probability p, ``p = (1 + clamp(w, -1, 1)) / 2``; so the mean over all signs of a
    layer is a sum over 2³ of them for each output, and its derivative is autograd's.
    """
    weight = LATENT.clone().requires_grad_()
    positive = (1 + weight.clamp(-1, 1)) / 2
    total = torch.zeros((), dtype=DOUBLE)
    for signs in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=DOUBLE)] * 6):
        signs = signs.reshape(2, 3)
        probability = torch.where(signs > 0, positive, 1 - positive).prod()
        total = total + probability * loss(X @ (SCALE * signs).T, Y).mean()
    return torch.autograd.grad(total, weight)[0]


def test_a_latent_weights_gradient_is_that_of_the_smoothed_loss_where_the_loss_is_linear() -> None:
    found, error = estimated(linear_loss)
    expected = smoothed(linear_loss)
    assert expected[0, 2] == expected[1, 2] == 0  # a latent weight beyond 1 has the same sign whatever the noise
    assert bool(((found - expected).abs() <= BOUND * error + 1e-12).all())
    assert float(error.max()) < 0.05 * float(expected.abs().max()), "too noisy to notice anything"


def test_it_is_biased_where_the_loss_is_not_linear() -> None:
    """It is the derivative at the signs themselves: wrong by what the loss curves up to where the noise takes it."""
    found, error = estimated(squared_loss)
    made = layer()
    (expected,) = torch.autograd.grad(squared_loss(made(X), Y).mean(), made.weight)
    assert bool(((found - expected).abs() <= BOUND * error + 1e-12).all())
    assert float((expected - smoothed(squared_loss)).abs().max()) > 0.2 * float(expected.abs().max())


@pytest.mark.parametrize("made", [BinaryLinear(6, 4), BinaryConv2d(3, 4, 3, padding=1)], ids=["linear", "convolution"])
def test_a_layer_multiplies_with_two_numbers_a_channel(made: nn.Linear | nn.Conv2d) -> None:
    weight = binarise(made.weight)
    scale = made.weight.detach().flatten(1).abs().mean(1)
    assert torch.equal(weight.flatten(1), scale[:, None] * made.weight.detach().flatten(1).sign())
    x = torch.randn(2, 6) if isinstance(made, nn.Linear) else torch.randn(2, 3, 5, 5)
    plain = nn.functional.linear(x, weight, made.bias) if isinstance(made, nn.Linear) else None
    other = nn.functional.conv2d(x, weight, made.bias, padding=1) if plain is None else plain
    assert torch.equal(made(x), other)


def test_a_sign_that_declares_nothing_is_refused_and_told_of_the_layers() -> None:
    class Undeclared(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, torch.sign(self.weight), self.bias)

    with pytest.raises(UnreachedParameterError, match=r"'weight' has no local derivative.* declare one"):
        onward.compile(Undeclared(3, 2), torch.randn(4, 3), loss=squared_loss)
