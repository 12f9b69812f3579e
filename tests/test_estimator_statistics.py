"""What the estimator's mean and variance are, against closed forms; bounds derived, not guessed.

**Truth.** The estimate is unbiased for the gradient of the *smoothed* loss, E ℓ(z + σ ε), not for the clean one.
Losses are chosen whose smoothed gradient has a closed form, or noise is Rademacher and *all* its sign vectors are run
(`every_sign_vector`): then the mean is exact and the test needs no statistics.

**Bounds.** A mean of M independent estimates is compared by its z-score. `BOUND` is the two-sided quantile that all
comparisons of this file together exceed once in a thousand files (Bonferroni). Each such test also asserts its power:
its standard error is so small that an error of `DETECTED`, 2 % of the expected value, would be found with a
probability above 0.998 (3 standard errors beyond the bound). Seeds are fixed, so nothing here flakes.

**Replicates.** `Point` is one trained row a sample, all rows equal: one step gives one independent estimate of the same
gradient for every sample.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from estimator_cases import Point
from torch import Tensor, nn

import onward
from onward import LikelihoodRatio
from onward.compiler.driver import compile_model
from onward.compiler.program import CompiledModel
from onward.runtime.noise import cpu_kernels
from onward.runtime.noise import source as noise_source
from onward.runtime.noise.philox import Key, Purpose, philox_lanes_numpy
from onward.runtime.program import Program

Array = Any
COMPARISONS = 64
"""At least the number of z-scores in this file."""
BOUND = NormalDist().inv_cdf(1 - 1e-3 / (2 * COMPARISONS))
DETECTED = 0.02
SIGMA = 0.5


def phi(x: float) -> float:
    """The normal density."""
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


@functools.cache
def compiled_point(samples: int, coordinates: int, noise: str, score: str) -> CompiledModel:
    """The graphs hold neither the loss nor the number of copies, which stands beside each run."""
    estimator = LikelihoodRatio(noise=noise, score=score)
    return compile_model(Point(samples, [0.0] * coordinates), (torch.arange(3),), estimator)


def estimates(
    loss: Callable[[Tensor], Tensor], z: list[float], samples: int, seed: int, *, noise: str, **settings: Any
) -> Array:
    """Independent estimates ``(samples, len(z))`` of the gradient of the smoothed `loss` at `z`."""
    model = Point(samples, z)
    index = torch.arange(samples)
    estimator = LikelihoodRatio(**{"sigma": SIGMA, "noise": noise, **settings})
    compiled = compiled_point(samples, len(z), noise, estimator.score)
    runs = tuple(replace(run, copies=int(estimator.copies)) for run in compiled.runs)  # type: ignore[arg-type]
    compiled = replace(compiled, estimator=estimator, runs=runs)
    Program(model, compiled, lambda z, _: loss(z), seed).step(index, index)
    assert model.rows.weight.grad is not None
    return model.rows.weight.grad.numpy() * samples


def check_mean(found: Array, expected: float, *, power: bool = True) -> None:
    """The z-score of the mean of `found`, and (unless 0 is expected) that the test could have found 2 %."""
    error = found.std(ddof=1) / math.sqrt(len(found))
    score = (found.mean() - expected) / error
    assert abs(score) < BOUND, f"mean {found.mean():.5f}, expected {expected:.5f}: z = {score:.1f}"
    if power:
        assert (BOUND + 3) * error < DETECTED * abs(expected), "too few samples to find an error of 2 %"


# --- one coordinate: closed forms -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Smoothed:
    """A loss of one coordinate and, by (noise, score), the expected estimate at z with deviation s."""

    loss: Callable[[Tensor], Tensor]
    expected: dict[tuple[str, str], Callable[[float, float], float]]
    z: float


B = math.sqrt(0.5)  # scale of Laplace noise of unit variance

SMOOTHED = {
    # E (z + s ε)³ = z³ + 3 z s² for every symmetric noise of unit variance: an exact score gives its gradient,
    # 3 z² + 3 s². A Gaussian's sign gives sqrt(π/2) E[(z + s ε)³ sign ε] / s = 3 z² + 2 s², by E|ε| = sqrt(2/π) and
    # E|ε|³ = 2 sqrt(2/π): right to first order, off by s². Rademacher noise gives the central difference, 3 z² + s².
    "cubic": Smoothed(
        lambda z: z[:, 0] ** 3,
        {
            ("gaussian", "exact"): lambda z, s: 3 * z * z + 3 * s * s,
            ("gaussian", "sign"): lambda z, s: 3 * z * z + 2 * s * s,
            ("laplace", "exact"): lambda z, s: 3 * z * z + 3 * s * s,
            ("laplace", "sign"): lambda z, s: 3 * z * z + 3 * s * s,
            ("rademacher", "exact"): lambda z, s: 3 * z * z + s * s,
        },
        z=0.7,
    ),
    # E |z + s ε| = a folded distribution's mean; its gradient is P(z + s ε > 0) - P(z + s ε < 0).
    "absolute": Smoothed(
        lambda z: z[:, 0].abs(),
        {
            ("gaussian", "exact"): lambda z, s: math.erf(z / s / math.sqrt(2)),
            ("laplace", "exact"): lambda z, s: 1 - math.exp(-z / (B * s)),
            ("laplace", "sign"): lambda z, s: 1 - math.exp(-z / (B * s)),
            ("rademacher", "sign"): lambda z, s: (abs(z + s) - abs(z - s)) / (2 * s),
        },
        z=0.3,
    ),
    # No derivative anywhere: the gradient of P(z + s ε > 0) - P(z + s ε < 0) is twice the density at z / s, over s.
    "sign": Smoothed(
        lambda z: z[:, 0].sign(),
        {
            ("gaussian", "exact"): lambda z, s: 2 * phi(z / s) / s,
            ("laplace", "exact"): lambda z, s: math.exp(-z / (B * s)) / (B * s),
            ("laplace", "sign"): lambda z, s: math.exp(-z / (B * s)) / (B * s),
            ("rademacher", "exact"): lambda z, s: 1 / s,
        },
        z=0.3,
    ),
}


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize(
    ("name", "noise", "score"), [(name, *key) for name, one in SMOOTHED.items() for key in one.expected]
)
def test_the_mean_is_the_gradient_of_the_smoothed_loss(name: str, noise: str, score: str, antithetic: bool) -> None:
    case = SMOOTHED[name]
    expected = case.expected[noise, score](case.z, SIGMA)
    settings: dict[str, Any] = {"noise": noise, "score": score, "antithetic": antithetic, "copies": 16}
    found = estimates(case.loss, [case.z], 100_000, 1, **settings)[:, 0]
    if noise == "rademacher" and antithetic:  # no randomness is left in one coordinate
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    else:
        check_mean(found, expected)


def test_the_gaussian_sign_scores_bias_is_found() -> None:
    """The test above would see the difference: 2 s² is not 3 s²."""
    settings: dict[str, Any] = {"noise": "gaussian", "score": "sign", "copies": 16}
    found = estimates(SMOOTHED["cubic"].loss, [0.7], 100_000, 1, **settings)[:, 0]
    unbiased = 3 * 0.7**2 + 3 * SIGMA**2
    assert (unbiased - found.mean()) / (found.std(ddof=1) / math.sqrt(len(found))) > BOUND + 3


# --- variance ---------------------------------------------------------------------------------------------------------


def relative_error_of_variance(found: Array) -> float:
    """The standard error of a sample variance over the variance: sqrt((κ - 1) / M), κ the kurtosis."""
    centred = found - found.mean()
    return math.sqrt(((centred**4).mean() / (centred**2).mean() ** 2 - 1) / len(found))


@pytest.mark.parametrize(
    ("noise", "score", "antithetic"),
    [
        ("gaussian", "exact", True),
        ("gaussian", "sign", False),
        ("laplace", "exact", True),
        ("rademacher", "exact", False),
    ],
)
def test_the_error_falls_as_one_over_the_root_of_the_copies(noise: str, score: str, antithetic: bool) -> None:
    """The log-log slope of the error against the copies is -1/2, within `BOUND` standard errors of the regression."""
    copies = np.array([2, 4, 8, 16, 32, 64])
    deviations, weights = [], []
    for seed, count in enumerate(copies):
        settings: dict[str, Any] = {"noise": noise, "score": score, "antithetic": antithetic, "copies": int(count)}
        found = estimates(lambda z: z.sin().sum(1) + z[:, 1], [0.4, -0.2, 0.9], 4000, 10 + seed, **settings)[:, 0]
        deviations.append(found.std(ddof=1))
        weights.append((relative_error_of_variance(found) / 2) ** -2)  # of the log of the deviation
    x, y, w = np.log(copies), np.log(deviations), np.array(weights)
    centred = x - np.average(x, weights=w)
    spread = (w * centred**2).sum()
    slope = (w * centred * y).sum() / spread
    assert abs(slope + 0.5) < BOUND / math.sqrt(spread)
    assert (BOUND + 3) / math.sqrt(spread) < 0.1  # a slope of -0.4 or -0.6 would have been found


def test_a_gaussian_sign_score_needs_half_pi_times_the_copies() -> None:
    """For a loss that a coordinate does not influence, Var = σ⁰ Σ t_j² E s(ε)²: E ε² = 1 against E (π/2) = π/2."""
    slope = torch.tensor([0.0, 1.0, -0.5, 2.0, 0.3, -1.5], dtype=torch.float64)
    variances, errors = [], []
    for score in ("exact", "sign"):
        settings: dict[str, Any] = {"noise": "gaussian", "score": score, "copies": 2}
        found = estimates(lambda z: z @ slope, [0.1] * 6, 60_000, 3, **settings)[:, 0]
        variances.append(found.var(ddof=1))
        errors.append(relative_error_of_variance(found))
    ratio, error = variances[1] / variances[0], math.hypot(*errors)
    assert abs(math.log(ratio / (math.pi / 2))) < BOUND * error
    assert (BOUND + 3) * error < math.log(math.pi / 2) / 2


def test_laplace_and_rademacher_lose_nothing_by_the_sign() -> None:
    for noise in ("laplace", "rademacher"):
        exact, sign = (
            estimates(lambda z: z.exp().sum(1), [0.3, 0.1], 50, 4, noise=noise, score=score, copies=6)
            for score in ("exact", "sign")
        )
        np.testing.assert_array_equal(exact, sign)


def test_antithetic_pairs_remove_even_orders() -> None:
    """Of c + q z² at 0 nothing is left, with whatever noise; one-sided copies keep the variance of q σ ε³."""
    for noise in ("gaussian", "laplace", "rademacher"):
        paired = estimates(lambda z: 3 + 2 * z.square().sum(1), [0.0, 0.0], 500, 5, noise=noise, copies=4)
        assert not paired.any()
    alone = estimates(
        lambda z: 3 + 2 * z.square().sum(1), [0.0], 20_000, 5, noise="gaussian", copies=2, antithetic=False
    )
    expected = (2 * SIGMA) ** 2 * 15 / 2  # E ε⁶ = 15, two copies
    assert abs(alone.var(ddof=1) / expected - 1) < BOUND * relative_error_of_variance(alone[:, 0])


def test_the_clean_loss_is_the_baseline_of_copies_without_a_twin() -> None:
    """A constant in the loss changes nothing: without a baseline it would add c² / σ² to the variance."""
    settings: dict[str, Any] = {"noise": "gaussian", "copies": 2, "antithetic": False}
    without = estimates(lambda z: z.square().sum(1), [0.3], 200, 6, **settings)
    with_constant = estimates(lambda z: z.square().sum(1) + 1e6, [0.3], 200, 6, **settings)
    np.testing.assert_allclose(with_constant, without, rtol=1e-6, atol=1e-8)


# --- every sign vector: exact expectations ----------------------------------------------------------------------------


@contextmanager
def every_sign_vector(elements: list[int]) -> Iterator[int]:
    """Rademacher noise whose draw d has at its sites, one after the other, the bits of d as signs.

    Yields the number of bits B: 2^B copies without twins, or the 2^(B-1) pairs, are all sign vectors once. The bits
    stand in the first lane of the first block, so that no site may have more than 32 `elements`.
    """
    offsets = np.cumsum([0, *elements])
    assert max(elements) <= 32
    original = philox_lanes_numpy

    def lanes(draws: Any, first: int, num_blocks: int, key: Key) -> Any:
        if key.purpose != Purpose.NOISE:
            return original(draws, first, num_blocks, key)
        assert (first, num_blocks) == (0, 1)
        word = (np.array(draws, np.uint64) >> np.uint64(offsets[key.site]))[:, None] & np.uint64(0xFFFFFFFF)
        return word, np.zeros_like(word), np.zeros_like(word), np.zeros_like(word)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise_source, "philox_lanes_numpy", lanes)
        patch.setattr(cpu_kernels, "in_use", False)
        yield int(offsets[-1])


def step_gradients(program: Program, inputs: Any, target: Any) -> dict[str, Array]:
    program.model.zero_grad()
    program.step(inputs, target)
    return {name: p.grad.numpy().copy() for name, p in program.model.named_parameters() if p.grad is not None}


class TwoLayers(nn.Module):
    """Linear, so that the smoothed quadratic loss has a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x))


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(1) / 2


def two_layers() -> tuple[TwoLayers, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TwoLayers().double()
        return model, torch.randn(2, 4).double(), torch.randn(2, 2).double()


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("groups", ["joint", "layerwise"])
def test_the_expectation_of_two_layers_is_exact(groups: str, antithetic: bool) -> None:
    """Quadratic loss, linear net, E ε εᵀ = I: layerwise the clean gradient; jointly σ₁² W₂ more for W₂, the derivative
    of the σ₁² |W₂|² / 2 that smoothing adds. The two agree to first order in σ, and differ by exactly that."""
    model, x, target = two_layers()
    sigmas = {"first": 0.7, "second": 0.4}
    with every_sign_vector([6, 4]) as bits:
        estimator = LikelihoodRatio(groups=groups, antithetic=antithetic, copies=2**bits, sigma=sigmas, chunk=64)
        found = step_gradients(onward.compile(model, (x,), loss=half_square, estimator=estimator), x, target)
    model.zero_grad()
    half_square(model(x), target).mean().backward()
    assert model.first.weight.grad is not None
    assert model.second.weight.grad is not None
    extra = 0.7**2 * model.second.weight.detach().numpy() if groups == "joint" else 0.0
    np.testing.assert_allclose(found["first.weight"], model.first.weight.grad.numpy(), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(found["second.weight"], model.second.weight.grad.numpy() + extra, rtol=1e-11, atol=1e-13)


def central_differences(loss: Callable[[Tensor], Tensor], z: Tensor, sigma: float) -> Array:
    """For every coordinate the central difference of `loss` along it, averaged over the signs of all the others."""
    count = z.numel()
    bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
    signs = torch.from_numpy(2.0 * bits - 1)
    losses = torch.stack([loss(z + sigma * row.reshape(z.shape)) for row in signs])
    return ((losses[:, None] * signs).mean(0) / sigma).reshape(z.shape).numpy()


def log_sum_exp(output: Tensor, target: Tensor) -> Tensor:
    """A loss that no sum over the samples is."""
    return torch.logsumexp((output - target).square().sum(1) * 2, 0)


@pytest.mark.parametrize("antithetic", [True, False])
def test_batch_credit_is_unbiased_for_a_loss_that_couples_samples(antithetic: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Linear(3, 2).double()
        x, target = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    for sigma in (0.5, 1e-3):
        with every_sign_vector([8]) as bits:
            estimator = LikelihoodRatio(
                antithetic=antithetic, copies=2**bits, sigma=sigma, credit="batch", chunk=32, groups="joint"
            )
            found = step_gradients(onward.compile(model, (x,), loss=log_sum_exp, estimator=estimator), x, target)
        with torch.no_grad():
            cotangent = central_differences(lambda z: log_sum_exp(z, target), model(x), sigma)
        tolerance: dict[str, Any] = {
            "rtol": 1e-9,
            "atol": 1e-11 / sigma,
        }  # a loss is rounded by 1e-16, and divided by σ
        np.testing.assert_allclose(found["weight"], cotangent.T @ x.numpy(), **tolerance)
        np.testing.assert_allclose(found["bias"], cotangent.sum(0), **tolerance)
    model.zero_grad()
    log_sum_exp(model(x), target).backward()
    assert model.weight.grad is not None
    np.testing.assert_allclose(
        found["weight"], model.weight.grad.numpy(), atol=1e-4
    )  # σ² = 1e-6 times third derivatives


class Pooled(nn.Module):
    """A site whose result holds no samples: every sample of a copy shares its noise."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.tensor([0.5, -1.0, 2.0])), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(x * (self.scale * x.mean(0)))


def mean_half_square(output: Tensor, target: Tensor) -> Tensor:
    return half_square(output, target).mean()


def test_a_site_without_samples_is_unbiased() -> None:
    """Linear in each site's noise and a quadratic loss: over every sign vector layerwise exactly the clean gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model, x, target = Pooled().double(), torch.randn(2, 3).double(), torch.randn(2, 1).double()
    with every_sign_vector([3, 2]) as bits:
        estimator = LikelihoodRatio(copies=2**bits, sigma=0.6, credit="batch")
        found = step_gradients(onward.compile(model, (x,), loss=mean_half_square, estimator=estimator), x, target)
    model.zero_grad()
    mean_half_square(model(x), target).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        np.testing.assert_allclose(found[name], parameter.grad.numpy(), rtol=1e-11, atol=1e-13)


def test_sample_credit_would_be_refused_for_a_loss_that_couples_samples() -> None:
    model = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(2)).double()
    program = onward.compile(model, (x,), loss=log_sum_exp, estimator=LikelihoodRatio(copies=2))
    with pytest.raises(onward.errors.LossShapeError):
        program.step(x, torch.zeros(4, 2).double())


def test_rademacher_is_the_central_difference() -> None:
    """A loss without derivative, every sign vector: per sample the central difference over the others' signs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Linear(3, 3).double()
        x = torch.randn(2, 3).double()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output.sign() * torch.tensor([1.0, -2.0, 0.5])).sum(1) + output.argmax(1)

    with every_sign_vector([6]) as bits:
        estimator = LikelihoodRatio(copies=2**bits, sigma=0.9)
        found = step_gradients(onward.compile(model, (x,), loss=loss, estimator=estimator), x, x)
    with torch.no_grad():
        z = model(x)
        cotangent = np.stack([central_differences(lambda row: loss(row[None], row)[0], row, 0.9) for row in z]) / 2
    assert np.abs(cotangent).max() > 0.1
    np.testing.assert_allclose(found["weight"], cotangent.T @ x.numpy(), rtol=1e-11, atol=1e-13)


# --- captures ---------------------------------------------------------------------------------------------------------


def one_layer() -> tuple[nn.Linear, Tensor, Tensor]:
    """Activations of very different magnitude, which their signs cannot tell."""
    model = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -0.3, 0.8, 0.1], [-0.2, 0.4, 0.6, -0.7]]))
    x = torch.tensor([[2.0, -0.1, 0.5, 0.02], [-0.3, 1.5, 0.1, -0.9]]).double()
    return model, x, torch.tensor([[1.0, -1.0], [0.5, 2.0]]).double()


def clean_gradient(model: nn.Module, x: Tensor, target: Tensor) -> Array:
    """Also the smoothed one: the loss is quadratic and the model linear in what the noise moves."""
    model.zero_grad()
    half_square(model(x), target).mean().backward()
    return next(parameter.grad.numpy().copy() for parameter in model.parameters() if parameter.grad is not None)


def test_sign_capture_is_biased_by_what_it_forgot() -> None:
    """Over every sign vector the expectation is exactly the cotangent times sign(x), which is another direction."""
    model, x, target = one_layer()
    with every_sign_vector([4]) as bits:
        estimator = LikelihoodRatio(copies=2**bits, capture="sign", sigma=0.5)
        found = step_gradients(onward.compile(model, (x,), loss=half_square, estimator=estimator), x, target)["weight"]
    with torch.no_grad():
        cotangent = (model(x) - target).numpy() / 2
    np.testing.assert_allclose(found, cotangent.T @ np.sign(x.numpy()), rtol=1e-11, atol=1e-13)
    exact = clean_gradient(model, x, target)
    cosine = (found * exact).sum() / np.linalg.norm(found) / np.linalg.norm(exact)
    assert cosine < 0.95


def test_more_copies_do_not_bring_the_magnitude_back() -> None:
    """The mean square error is floor² + V / copies. At 4 times the copies it stays above the floor with signs, while
    with exact captures it falls to a quarter. The floor is the known bias; bounds are `BOUND` standard errors."""
    model, x, target = one_layer()
    exact = clean_gradient(model, x, target)
    with torch.no_grad():
        signs = (model(x) - target).numpy().T @ np.sign(x.numpy()) / 2
    floor = ((signs - exact) ** 2).sum()
    errors: dict[tuple[str, int], Array] = {}
    for capture in ("sign", "exact"):
        for copies in (256, 1024):
            estimator = LikelihoodRatio(copies=copies, capture=capture, noise="gaussian", sigma=0.5)
            program = onward.compile(model, (x,), loss=half_square, estimator=estimator, seed=21)
            found = [step_gradients(program, x, target)["weight"] for _ in range(100)]
            errors[capture, copies] = np.array([((one - exact) ** 2).sum() for one in found])
    means = {key: one.mean() for key, one in errors.items()}
    deviations = {key: one.std(ddof=1) / math.sqrt(len(one)) for key, one in errors.items()}
    for copies in (256, 1024):
        assert means["sign", copies] > floor - BOUND * deviations["sign", copies]
        assert BOUND * deviations["sign", copies] < floor / 4  # so the bound says something
    ratio = means["exact", 1024] / means["exact", 256]
    error = math.hypot(*(deviations["exact", copies] / means["exact", copies] for copies in (256, 1024)))
    assert abs(math.log(4 * ratio)) < BOUND * error
    assert means["exact", 1024] < floor / 10


@pytest.mark.parametrize(
    ("groups", "capture"), [("joint", "stochastic"), ("layerwise", "stochastic"), ("joint", "stochastic-2")]
)
def test_stochastic_capture_is_unbiased(groups: str, capture: str) -> None:
    """Every sign vector each step, so that the captures' rounding is the only randomness; the mean over steps.

    Jointly the second layer's activations are the copies' own and rounded copy by copy; layerwise they are the clean
    run's and rounded once a step, so that only steps, not copies, average that rounding out. The first layer reads the
    model's input, which is not rounded.
    """
    model, x, target = two_layers()
    sigmas = {"first": 0.7, "second": 0.4}
    found: dict[str, list[Array]] = {"first.weight": [], "second.weight": []}
    with every_sign_vector([6, 4]) as bits:
        settings = {"groups": groups, "copies": 2**bits, "sigma": sigmas}
        exactly = onward.compile(model, (x,), loss=half_square, estimator=LikelihoodRatio(**settings))
        expected = step_gradients(exactly, x, target)
        estimator = LikelihoodRatio(capture=capture, **settings)
        program = onward.compile(model, (x,), loss=half_square, estimator=estimator, seed=22)
        for _ in range(400):
            for name, gradient in step_gradients(program, x, target).items():
                found[name].append(gradient)
    for gradient in found["first.weight"]:
        np.testing.assert_allclose(gradient, expected["first.weight"], rtol=1e-11, atol=1e-13)
    second = expected["second.weight"]
    # one z-score, along the expected direction: every element would be 6 comparisons
    along = (np.stack(found["second.weight"]) * second).sum((1, 2)) / (second**2).sum()
    check_mean(along, 1.0, power=False)
    assert along.std(ddof=1) > 0
    assert (BOUND + 3) * along.std(ddof=1) / math.sqrt(len(along)) < 0.1


def test_stochastic_captures_of_a_product_of_activations_are_unbiased() -> None:
    """A product of two activations is not linear in either alone: it is captured exactly (two roundings by the same
    random numbers would have a bias on the diagonal)."""
    model = nn.Bilinear(2, 2, 1, bias=False).double()
    x = torch.tensor([[0.9, -0.2]]).double()

    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.product = model

        def forward(self, x: Tensor) -> Any:
            return self.product(x, torch.tanh(x))

    with every_sign_vector([1]):
        estimator = LikelihoodRatio(copies=2, capture="stochastic", sigma=0.5)
        program = onward.compile(Squared(), (x,), loss=lambda z, _: z[:, 0], estimator=estimator)
        found = step_gradients(program, x, x)["product.weight"]
    np.testing.assert_allclose(found[0], x.T @ torch.tanh(x), rtol=1e-12)


# --- a model without derivative ---------------------------------------------------------------------------------------


class SignActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        return torch.sign(self.layer(x))


def test_a_sign_activation_has_the_gradient_of_the_normal_cdf() -> None:
    """E sign(z + σ ε) = 2 Φ(z / σ) - 1: gradient 2 φ(z / σ) / σ times x, where backpropagation gives zero."""
    model = SignActivation()
    with torch.no_grad():
        model.layer.weight.copy_(torch.tensor([[0.5, -0.2, 0.3]]))
        model.layer.bias.fill_(0.1)
    x = torch.tensor([[1.0, 0.5, -0.4]], dtype=torch.float64).expand(4000, 3)
    estimator = LikelihoodRatio(noise="gaussian", copies=8, sigma=SIGMA)
    program = onward.compile(model, (x[:3],), loss=lambda output, _: 3 * output[:, 0], estimator=estimator, seed=31)
    found = [step_gradients(program, x, x) for _ in range(60)]
    z = float(model.layer(x[:1]).detach())
    slope = 3 * 2 * phi(z / SIGMA) / SIGMA
    check_mean(np.array([one["layer.bias"][0] for one in found]), slope)
    check_mean(np.array([one["layer.weight"][0, 0] for one in found]), slope * 1.0)
    model.zero_grad()
    model(x).sum().backward()
    assert model.layer.weight.grad is not None
    assert not model.layer.weight.grad.any()
