"""Spiking networks: the neuron, the readouts, the twins, and a gradient against the smoothed loss by quadrature."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from feedback_cases import BOUND, DOUBLE, normal
from torch import Tensor, nn

import onward
from onward.models.layers import linear
from onward.models.spiking import SLOPE, Membrane, RandomSpikes, Repeat, Spiking, spiking_cnn, spiking_mlp
from onward.passes.errors import OptionError, UnknownNameError


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 1.0])
def test_neurons_leak_fire_and_reset_by_subtraction(decay: float) -> None:
    currents = 0.8 * normal(5, 7, 3, 2)
    found = Spiking(decay)(currents)
    potential, expected = np.zeros((5, 3, 2)), np.zeros((5, 7, 3, 2))
    for step in range(7):
        potential = decay * potential + currents[:, step].numpy()
        expected[:, step] = potential > 1
        potential = potential - expected[:, step]
    np.testing.assert_array_equal(found.numpy(), expected)
    assert 0 < expected.mean() < 1
    assert torch.equal(Spiking(decay, surrogate=True)(currents), found)


def test_a_neuron_that_is_driven_steadily_has_a_rate() -> None:
    """Without leak and by a half, a spike every third step: at 1.5, and then from the half that is left."""
    assert Spiking(1.0)(torch.full((1, 7, 1), 0.5)).flatten().tolist() == [0, 0, 1, 0, 1, 0, 1]


def test_the_surrogate_is_that_of_a_fast_sigmoid() -> None:
    currents = torch.linspace(-3, 4, 57, dtype=DOUBLE)[:, None].requires_grad_()
    (slope,) = torch.autograd.grad(Spiking(0.5, surrogate=True)(currents).sum(), currents)
    torch.testing.assert_close(slope, 1 / (1 + SLOPE * (currents.detach() - 1).abs()) ** 2)
    spikes = Spiking(0.5)(currents)
    assert not spikes.requires_grad or not torch.autograd.grad(spikes.sum(), currents)[0].any()


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_the_readout_is_a_mean_of_leaky_membranes(decay: float) -> None:
    """Those of neurons that never spike, driven by a linear layer, over that of a current of 1."""
    spikes, head = (normal(4, 6, 5) > 0).double(), nn.Linear(5, 3).double()
    membrane, unit = torch.zeros(4, 3, dtype=DOUBLE), 0.0
    total, whole = torch.zeros_like(membrane), 0.0
    for step in range(6):
        membrane, unit = decay * membrane + head(spikes[:, step]), decay * unit + 1.0
        total, whole = total + membrane, whole + unit
    torch.testing.assert_close(head(Membrane(decay)(spikes)), total / whole)


NETWORKS: dict[str, Any] = {
    "mlp": functools.partial(spiking_mlp, hidden=(12, 8)),
    "cnn": functools.partial(spiking_cnn, width=4),
}


@pytest.mark.parametrize("encoding", ["direct", "rate"])
@pytest.mark.parametrize("readout", ["membrane", "count"])
@pytest.mark.parametrize("network", NETWORKS)
def test_twins_have_the_same_bits(network: str, encoding: str, readout: str) -> None:
    images, outputs, models = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), [], []
    for surrogate in (False, True):
        torch.manual_seed(0)
        models.append(NETWORKS[network](steps=3, encoding=encoding, readout=readout, surrogate=surrogate))
        outputs.append(models[-1](images))
    assert torch.equal(*outputs)
    assert outputs[0].shape == (6, 10)
    torch.autograd.backward(outputs[1].square().sum())
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in models[1].parameters())


def test_random_spikes_and_counts_compile_and_a_layer_is_one_site_however_many_steps_there_are() -> None:
    model, images = spiking_mlp(hidden=(6,), steps=2, encoding="rate", readout="count"), torch.randn(6, 1, 8, 8)
    estimator = onward.LikelihoodRatio.feedback_learned(copies=2, warmup=1)
    program = onward.compile(model, images[:4], loss=F.cross_entropy, estimator=estimator)
    assert len(program.compiled.sites) == 2
    for size in (4, 6):
        assert np.isfinite(float(program.step(images[:size], torch.arange(size))))
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.grad_fn is None
        assert parameter.grad.isfinite().all()


def test_random_spikes_have_logistic_rates() -> None:
    torch.manual_seed(0)
    rates = RandomSpikes()(torch.tensor([-1.0, 0.0, 2.0]).expand(40_000, 3)).mean(0)
    torch.testing.assert_close(rates, torch.sigmoid(torch.tensor([-1.0, 0.0, 2.0])), rtol=0, atol=BOUND * 0.5 / 200)


def test_bad_options_are_refused() -> None:
    for options, message in (
        ({"steps": 0}, "at least one time step"),
        ({"decay": 1.5}, r"decay=1.5: .* lies in \[0, 1\]"),
        ({"hidden": ()}, "hidden is empty"),
    ):
        with pytest.raises(OptionError, match=message):
            spiking_mlp(**options)
    with pytest.raises(UnknownNameError, match="Did you mean 'rate'"):
        spiking_mlp(encoding="rat")
    with pytest.raises(UnknownNameError, match="Did you mean 'count'"):
        spiking_cnn(readout="counts")


# --- the gradient of a smoothed loss, by quadrature -------------------------------------------------------------------

SIGMA = 0.7
GRID = 800
"""Midpoints along an axis. A sum over them is wrong by about the probability of a cell at each of the few jumps, a
thousandth; `ALLOWED` is ten times that."""
ALLOWED = 1e-2


def midpoints() -> tuple[Tensor, Tensor]:
    """Standard normal numbers and their probabilities."""
    edges = torch.linspace(-6, 6, GRID + 1, dtype=DOUBLE)
    probabilities = torch.special.ndtr(edges).diff()
    return (edges[1:] + edges[:-1]) / 2, probabilities / probabilities.sum()


class Tiny(nn.Module):
    """One neuron behind a current that is constant, or (`shared`) that a weight makes of spikes, step by step."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.layer, self.neuron, self.shared = linear(1, 1, gain=1.0), Spiking(0.5), shared
        self.repeat, self.membrane = Repeat(2), Membrane(0.5)
        with torch.no_grad():
            self.layer.weight.fill_(0.8), self.layer.bias.fill_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(batch, 1)``, or ``(batch, 2, 1)``, to the membrane ``(batch, 1)``."""
        currents = self.layer(x) if self.shared else self.repeat(self.layer(x))
        answer: Tensor = self.membrane(self.neuron(currents))
        return answer


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(1)


def by_quadrature(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    """``mean over samples of E[loss(z + σ ε) ε / σ] · ∂z``, for the weight and the bias."""
    points, probabilities = midpoints()
    total = torch.zeros(2, dtype=DOUBLE)
    for sample, target in zip(x, y, strict=True):
        z = model.layer(sample).flatten()
        if model.shared:  # two currents, each with noise of its own
            first, second = torch.meshgrid(points, points, indexing="ij")
            noise = torch.stack([first, second], -1).reshape(-1, 2)
            weights = torch.outer(probabilities, probabilities).flatten()
            currents = (z + SIGMA * noise)[..., None]
        else:
            noise, weights = points[:, None], probabilities
            currents = model.repeat(z + SIGMA * noise)
        losses = squared(model.membrane(model.neuron(currents)), target)
        cotangent = (weights * losses) @ noise / SIGMA
        total += torch.stack([cotangent @ sample.flatten(), cotangent.sum()])
    return total / len(x)


@pytest.mark.parametrize("shared", [False, True], ids=["constant current", "a weight shared over time"])
def test_the_gradient_is_that_of_the_smoothed_loss(shared: bool) -> None:
    model = Tiny(shared).double()
    x = torch.tensor([[[1.0], [0.0]], [[1.0], [1.0]], [[0.0], [1.0]]] if shared else [[0.4], [-0.5], [1.5]]).double()
    y = torch.tensor([[3.0], [2.0], [3.0]]).double()
    with torch.no_grad():
        expected = by_quadrature(model, x, y)
    estimator = onward.LikelihoodRatio(noise="gaussian", sigma=SIGMA, copies=1024)
    program = onward.compile(model, x, loss=squared, estimator=estimator)
    rows = []
    for _ in range(40):
        model.zero_grad()
        program.step(x, y)
        rows.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    found = torch.stack(rows)
    error = found.std(0) / len(rows) ** 0.5
    scale = expected.abs().max()
    assert bool(((found.mean(0) - expected).abs() <= BOUND * error + ALLOWED * scale).all()), (found.mean(0), expected)
    assert float(error.max()) < 0.05 * float(scale), "too noisy to notice anything"
