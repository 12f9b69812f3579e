"""What a calibration chooses, and the judge behind it: variances and biases of gradients, groups, placement, place of
the noise, corrections."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward.passes.errors import CalibrationError, OnwardError, UnknownNameError
from onward.runtime.calibration.allocation import Load, bought, partition, variance_of
from onward.runtime.calibration.choose import CHOICES
from onward.runtime.calibration.gradient_noise import repeated_gradients, squared_bias, variance

DOUBLE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=DOUBLE)


def program_for(model: nn.Module, x: Tensor, loss: Any = F.cross_entropy, **settings: Any) -> onward.Program:
    return onward.compile(model, x, loss=loss, estimator=onward.LikelihoodRatio(**{"copies": 2, **settings}))


def repeated(program: onward.Program, x: Tensor, y: Tensor, repetitions: int) -> dict[int, Tensor]:
    given, _, _ = program.bind(x, y)
    return repeated_gradients(program.compiled, program.sigmas, given, repetitions)


def spent(compiled: Any) -> float:
    return sum(run.copies * run.share for run in compiled.runs)


def deep(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    pairs = itertools.pairwise(widths or (6, 16, 12, 8, 8, 3))
    layers: list[nn.Module] = [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def batch(samples: int = 32, features: int = 6) -> tuple[Tensor, Tensor]:
    return normal(samples, features, seed=3), torch.arange(samples) % 3


# --- the judge --------------------------------------------------------------------------------------------------------


def linear_case() -> tuple[onward.Program, Tensor, Tensor]:
    x, t = normal(24, 5, seed=1), normal(24, 4, seed=2)
    torch.manual_seed(0)
    model = nn.Linear(5, 4, bias=False).double()
    return program_for(model, x, loss=lambda output, target: (output * target).sum(1), sigma=0.3), x, t


def covariance(x: Tensor, t: Tensor) -> Tensor:
    """Of ``vec(mean(ε xᵀ (t·ε)))`` for Rademacher ε, one a sample: ``ε_k t·ε`` has the mean t_k, the variance
    ``|t|² - t_k²`` and with ``ε_l t·ε`` the covariance ``t_k t_l``; samples are independent."""
    own = torch.einsum("nk,nl->nkl", t, t)
    index = range(t.shape[1])
    own[:, index, index] = t.square().sum(1, keepdim=True) - t.square()
    rows = torch.einsum("nkl,nj,ni->kjli", own, x, x) / len(x) ** 2
    return rows.reshape(x.shape[1] * t.shape[1], -1)


@pytest.mark.parametrize("repetitions", [8, 200])
def test_the_variance_of_a_linear_model_is_the_closed_form(repetitions: int) -> None:
    """The sum of sample variances of nearly normal numbers (24 samples' sum) has a variance ``2 tr(Σ²) / (K - 1)``."""
    program, x, t = linear_case()
    found = repeated(program, x, t, repetitions)[0]
    exact, error = covariance(x, t), t.T @ x / len(x)
    expected = float(exact.trace())
    assert expected == pytest.approx(float(3 * (x.square().sum(1) * t.square().sum(1)).sum()) / len(x) ** 2)
    deviation = math.sqrt(2 * float((exact @ exact).trace()) / (repetitions - 1))
    assert variance(found) == pytest.approx(expected, abs=5 * deviation)
    off = float((found.mean(0) - error.flatten()).square().sum()) * repetitions
    assert off == pytest.approx(expected, abs=5 * deviation * math.sqrt(repetitions - 1))
    assert torch.equal(found[:4], repeated(program, x, t, 4)[0])


def test_a_calibration_shows_that_variance() -> None:
    program, x, t = linear_case()
    (row,) = program.calibrate(x, t, budget=2.0, choose=("copies",)).sites
    given, _, _ = program.bind(x, t)
    assert row.variance == variance(repeated_gradients(program.compiled, [0.3], given, 8)[0])
    assert row.sigma == 0.3
    # the loss is linear: mean((t·ε)²) is |t|² but for products of different numbers
    pairs = 4 * float((t.square().sum(1).square() - t.pow(4).sum(1)).sum()) / 2 / 4
    assert row.response == pytest.approx(float(t.square().sum(1).mean()), abs=5 * math.sqrt(pairs) / len(t))


def test_repetitions_have_the_same_dropout_masks() -> None:
    """Noise apart they estimate the same gradient: where it has none, they do not differ."""
    x, y = batch()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    settings: dict[str, Any] = {"feedback": "learned", "placement": "alive", "groups": "joint"}
    found = repeated(program_for(model, x, **settings), x, y, 3)
    assert found[1].any()
    assert torch.equal(found[1][0], found[1][1])
    assert torch.equal(found[1][0], found[1][2])


def test_sites_that_share_a_weight_are_judged_each_for_itself() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))

    torch.manual_seed(0)
    model, (x, y) = Twice().double(), batch(256)
    program = program_for(model, x, sigma=0.01)
    found = repeated(program, x, y, 32)
    assert [site.name for site in program.compiled.sites] == ["inner", "inner@2", "head"]
    loss = F.cross_entropy(model(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    exact = torch.cat([parameter.grad.flatten() for parameter in model.inner.parameters()])  # type: ignore[union-attr]
    both = found[0] + found[1]
    off, expected = float((both.mean(0) - exact).square().sum()), variance(both) / 32
    assert off < 3 * expected
    assert variance(both) == pytest.approx(variance(found[0]) + variance(found[1]), rel=0.5)
    assert min(variance(found[0]), variance(found[1])) > 0


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_the_squared_bias_is_estimated_without_bias(bias: float) -> None:
    """Over 400 sets of 12 noisy vectors of 20 numbers: the mean, and the jackknife's error beside the true one."""
    noise = normal(400, 12, 20, seed=4)
    truth = normal(20, seed=5)
    predicted = truth + bias / math.sqrt(20)
    found = [squared_bias(truth + each, predicted) for each in noise]
    deviation = math.sqrt(4 * bias**2 / 12 + 2 * 20 / (12 * 11))  # 4 bᵀΣb / K + 2 tr Σ² / K (K - 1)
    errors = torch.tensor([error for _, error in found], dtype=DOUBLE)
    low, high = (1.0, 1.6) if bias == 0 else (0.9, 1.4)
    assert low < float(errors.square().mean().sqrt()) / deviation < high
    values = torch.tensor([value for value, _ in found], dtype=DOUBLE)
    if bias == 0:  # negative half of the time, and cut
        assert 0.35 < float((values == 0).double().mean()) < 0.65
    else:
        assert float(values.mean()) == pytest.approx(1.0, abs=5 * deviation / math.sqrt(400) + 0.02)


# --- groups -----------------------------------------------------------------------------------------------------------


def test_the_partition_is_nearly_the_best_and_within_the_budget() -> None:
    """Beside all contiguous partitions of up to 7 sites: the best in 95 of 100 cases, never twice its variance."""
    chance, ratios = random.Random(0), []
    for _ in range(400):
        count = chance.randint(1, 7)
        costs = sorted((chance.uniform(0, 1) for _ in range(count)), reverse=True)
        loads = [Load(10 ** chance.uniform(-2, 2), 10 ** chance.uniform(-1.5, 1.5), cost) for cost in costs]
        step = chance.choice([1, 2])
        budget = chance.uniform(step * costs[0], 3 * step * sum(costs))
        groups = partition(loads, budget, step)
        assert [index for group in groups for index in group] == list(range(count))
        left = bought([[loads[index] for index in group] for group in groups], budget, step)
        assert left < math.inf
        every = itertools.product([False, True], repeat=count - 1)
        ratios.append(left / min(bought(_cut(loads, cuts), budget, step) for cuts in every))
    assert max(ratios) < 2
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) > 0.95 * len(ratios)


def _cut(loads: list[Load], cuts: tuple[bool, ...]) -> list[list[Load]]:
    groups = [[loads[0]]]
    for cut, load in zip(cuts, loads[1:], strict=True):
        if cut:
            groups.append([load])
        else:
            groups[-1].append(load)
    return groups


def test_without_a_least_number_of_pairs_layerwise_is_best() -> None:
    """Cauchy-Schwarz (`allocation`): with a budget that pays for many pairs."""
    chance = random.Random(1)
    for _ in range(50):
        loads = [
            Load(10 ** chance.uniform(-1, 1), 10 ** chance.uniform(-1, 1), chance.uniform(0.1, 1)) for _ in "abcde"
        ]
        assert partition(loads, 1e4, 2) == [(0,), (1,), (2,), (3,), (4,)]
    assert partition(loads, 0.0, 2) == [(0, 1, 2, 3, 4)]


@pytest.mark.parametrize("budget", [1.7, 2.2, 3.0, 6.0, 30.0])
def test_groups_for_a_budget(budget: float) -> None:
    x, y = batch()
    program = program_for(deep(), x)
    found = program.calibrate(x, y, budget=budget, choose=("sigma", "groups", "copies"))
    compiled = onward.compile(deep(), x, loss=F.cross_entropy, estimator=found).compiled
    assert spent(compiled) <= budget * (1 + 1e-9)
    assert [site.group for site in found.sites] == [run.index for run in compiled.runs for _ in run.sites]
    assert (found.estimator.groups == "layerwise") == (budget >= 6.0)
    assert [site.site for site in found.sites] == [compiled.sites[i].name for run in compiled.runs for i in run.sites]
    again = onward.Calibration.from_json(found.to_json())
    assert again.to_json() == found.to_json()


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({}, {"choose": ["groups"]}, "nothing to choose: 'groups' needs .* \"copies\" beside it"),
        ({}, {"choose": ["correction"]}, "nothing to choose: 'correction' needs feedback=\"learned\""),
        ({"capture": "sign"}, {"choose": ["placement"]}, "nothing to choose: 'placement' needs"),
        ({"noise_on": "weight"}, {"choose": ["noise_on"]}, "nothing to choose: 'noise_on' needs"),
        ({}, {"choose": "sigmas"}, "unknown choice of a calibration 'sigmas'. Did you mean 'sigma'"),
        ({}, {"batch_size": 0}, "batch_size=0"),
        ({}, {"batch_size": 1.5}, "batch_size=1.5"),
    ],
)
def test_choices_that_cannot_be_made(settings: dict[str, Any], given: dict[str, Any], message: str) -> None:
    x, y = batch()
    program = onward.compile(
        deep(), x, loss=F.cross_entropy, estimator=onward.LikelihoodRatio(**{"copies": 4, **settings})
    )
    with pytest.raises(OnwardError, match=message):
        program.calibrate(x, y, budget=40.0, **given)


def test_a_choice_by_its_name_alone() -> None:
    x, y = batch()
    program = onward.compile(deep(), x, loss=F.cross_entropy, estimator=onward.LikelihoodRatio(copies=4))
    found = program.calibrate(x, y, budget=40.0, choose="sigma").estimator
    assert isinstance(found.sigma, dict)
    assert found.copies == 4


def test_too_small_a_budget_for_one_joint_pair() -> None:
    x, y = batch()
    with pytest.raises(CalibrationError, match=r"a budget of 0.5 .* too small: one pair in each of 1 run\(s\) takes"):
        program_for(deep(), x).calibrate(x, y, budget=0.5)
    with pytest.raises(CalibrationError, match=r"the copies given in each of 5 run\(s\) take"):
        program_for(deep(), x, copies=32).calibrate(x, y, budget=20.0, choose=("sigma",))


def test_the_variance_that_a_merger_is_predicted_to_have() -> None:
    """To first order; σ is small. Within a half: variances from 64 repetitions, responses from 4 pairs."""
    x, y = batch(64)
    alone = program_for(deep(), x, sigma=0.02)
    rows = alone.calibrate(x, y, budget=100.0, choose=("copies",)).sites
    variances = {index: variance(each) for index, each in repeated(alone, x, y, 64).items()}
    loads = [Load(variances[n], row.response or 0.0, row.share or 0.0) for n, row in enumerate(rows)]
    joint = repeated(program_for(deep(), x, sigma=0.02, groups="joint", placement="alive"), x, y, 64)
    assert variance_of(loads) == pytest.approx(sum(variance(each) for each in joint.values()), rel=0.5)
    assert variance_of(loads) > 3 * sum(variances.values())


def test_a_partition_that_was_asked_for_is_kept() -> None:
    x, y = batch()
    groups = [["0", "2"], ["4", "6", "8"]]
    program = program_for(deep(), x, groups=groups, placement="alive", noise_on={"0": "weight"})
    found = program.calibrate(x, y, budget=12.0)
    assert found.estimator.groups == groups
    assert found.estimator.noise_on == {"0": "weight"}
    assert [site.noise_on for site in found.sites] == ["weight", *["output"] * 4]
    assert len(set(found.estimator.copies.values())) == 2  # type: ignore[union-attr]
    chosen = program.calibrate(x, y, budget=40.0, choose=CHOICES)
    assert chosen.estimator.groups == "layerwise"
    held = onward.compile(deep(), x, loss=F.cross_entropy, estimator=found).calibrate(x, y, budget=12.0)
    assert held.estimator == found.estimator  # all of it is set site by site


def test_one_loss_for_the_batch_and_copies_one_at_a_time() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(x))
            return self.last(hidden - hidden.mean(0, keepdim=True))

    torch.manual_seed(0)
    model, (x, y) = Centred().double(), batch(8)
    program = program_for(model, x, loss=F.cross_entropy, credit="batch")
    assert program.compiled.sequential
    found = program.calibrate(x, y, budget=6.0)
    compiled = onward.compile(model, x, loss=F.cross_entropy, estimator=found).compiled
    assert spent(compiled) <= 6.0
    assert all(site.variance and site.variance > 0 for site in found.sites)


# --- where the noise goes ---------------------------------------------------------------------------------------------


def test_the_place_of_the_noise() -> None:
    """40 numbers of a first convolution move 576 positions; 1,731 of the layer behind move 3."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(576, 3))
    model, x, y = nn.Sequential(*layers).double(), normal(16, 1, 12, 12), torch.arange(16) % 3
    program = program_for(model, x)
    found = program.calibrate(x, y, budget=20.0)
    assert found.estimator.noise_on == {"0": "sample"}
    assert [site.noise_on for site in found.sites] == ["sample", "output"]
    assert [site.elements for site in found.sites] == [40, 3]
    held = program.calibrate(x, y, budget=20.0, choose=("sigma", "copies", "groups", "placement"))
    assert held.estimator.noise_on == "output"
    assert held.sites[0].elements == 576
    # V c is what is compared: what is left of the variance with the same budget
    both = [(site.variance or 0) * max(site.share or 0, 0.01) for site in (found.sites[0], held.sites[0])]
    assert both[0] < both[1]
    compiled = onward.compile(model, x, loss=F.cross_entropy, estimator=found)
    assert spent(compiled.compiled) <= 20.0
    compiled.step(x, y)


def test_alive_placement_where_a_gate_blocks_half_of_the_noise() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)).double()
    x, y = batch()
    program = program_for(model, x)
    found = program.calibrate(x, y, budget=12.0)
    assert found.estimator.placement == "alive"
    held = program.calibrate(x, y, budget=12.0, choose=[name for name in CHOICES if name != "placement"])
    assert held.estimator.placement == "operation"
    assert sum(site.variance or 0 for site in found.sites) < 0.7 * sum(site.variance or 0 for site in held.sites)
    signs = program_for(model, x, capture="sign")
    assert signs.calibrate(x, y, budget=12.0).estimator.placement == "operation"


# --- where feedback is corrected --------------------------------------------------------------------------------------


class Product(nn.Module):
    """A linear path, whose Jacobian is the same for all samples, and a product, whose mean Jacobian is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.straight = nn.Linear(6, 6)
        self.left, self.right = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.straight(x) + 0.7 * self.left(x) * self.right(x))


def corrections(budget: float, batch_size: int | None = None, **settings: Any) -> onward.Calibration:
    torch.manual_seed(0)
    model, (x, y) = Product().double(), batch(256)
    settings = {"sigma": "auto", **settings}
    estimator = onward.LikelihoodRatio.feedback_learned(16, **settings)
    program = onward.compile(model, x, loss=F.cross_entropy, estimator=estimator)
    found = program.calibrate(x, y, budget=budget, batch_size=batch_size)
    assert onward.compile(model, x, loss=F.cross_entropy, estimator=found).compiled.estimator == found.estimator
    return found


def test_a_correction_where_the_mean_jacobian_cannot_see_and_none_where_it_is_exact() -> None:
    found = corrections(60.0)
    rows = {site.site: site for site in found.sites}
    chosen = {name: site.correction for name, site in rows.items() if site.bias is not None}
    assert chosen["left"] == chosen["right"] == "full"
    assert chosen["straight"] == "none"
    assert rows["straight"].bias < 0.05 * rows["left"].bias  # type: ignore[operator]
    assert found.estimator.correction == {"left": "full", "right": "full", "*": "none"}
    assert (found.estimator.probe, found.estimator.probe_every) == (1.0, 1)
    assert onward.Calibration.from_json(found.to_json()) == found


@pytest.mark.parametrize("settings", [{"probe_every": "auto"}, {"probe": 0.5}], ids=str)
def test_no_correction_unasked_where_steps_do_without_copies(settings: dict[str, Any]) -> None:
    """It would need the copies of every sample in every step; who asks for it by name gets that."""
    torch.manual_seed(0)
    model, (x, y) = Product().double(), batch(256)
    estimator = onward.LikelihoodRatio.feedback_learned(16, sigma="auto", **settings)
    program = onward.compile(model, x, loss=F.cross_entropy, estimator=estimator)
    found = program.calibrate(x, y, budget=60.0).estimator
    assert found.correction == "none"
    assert {name: getattr(found, name) for name in settings} == settings
    asked = program.calibrate(x, y, budget=60.0, choose=["correction"]).estimator
    assert asked.correction != "none"
    assert (asked.probe, asked.probe_every) == (1.0, 1)


def test_no_correction_where_its_noise_is_larger_than_the_bias() -> None:
    """A batch of one sample has 256 times the noise of the one that was measured."""
    found = corrections(3.0, batch_size=1)
    assert found.estimator.correction == "none"


def test_a_correction_that_is_held() -> None:
    given = {"left": "shrunk", "*": "none"}
    found = corrections(60.0, correction=given, probe_every=1)
    assert found.estimator.correction == given
    assert {site.correction for site in found.sites} == {"shrunk", "none"}
    assert {(site.bias, site.variance) for site in found.sites} == {(None, None)}


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_choice_that_is_none() -> None:
    x, y = batch()
    with pytest.raises(UnknownNameError, match=r"unknown choice of a calibration 'group'\. Did you mean 'groups'\?"):
        program_for(deep(), x).calibrate(x, y, choose=["group"])
