"""Keyed noise: Philox words, numbers and moments, layouts against a plain NumPy formula, what must not matter.

Bounds of the statistical tests are z-scores of 5 (one false alarm in 1.7 million); seeds are fixed, so they never
flake.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import graph_tape
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onward.passes import ops
from onward.passes.errors import OptionError, UnknownNameError
from onward.runtime.noise import operators
from onward.runtime.noise import packing as _packing  # noqa: F401  (registers its operators)
from onward.runtime.noise import philox as philox_module
from onward.runtime.noise import source as noise_source
from onward.runtime.noise.distributions import MODEL_DISTRIBUTIONS, NOISES, UNIFORM, Distribution
from onward.runtime.noise.operators import perturb
from onward.runtime.noise.philox import Key, Purpose, philox, philox_lanes, philox_lanes_numpy
from onward.runtime.noise.source import Layout, Limits, Source, copy_runs, numbers_from_lanes

SEED, STEP, SITE = 2**40 + 17, 5, 2
KEY = torch.tensor([SEED, STEP])
SIGMAS = torch.tensor([0.0, 1.0, 0.25])
CPU = torch.device("cpu")
NOISE_KEY = Key(SEED, STEP, SITE, Purpose.NOISE)
Z_BOUND = 5.0

# ---------------------------------------------------------------------------------------------- reference formulas


def reference_words(counter: tuple[int, int, int, int], seed: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 with Python's integers, as printed in Salmon et al. 2011."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def reference_noise(noise: str, draw: int, count: int, key: Key = NOISE_KEY) -> Any:
    """One draw in float64 (exact for Rademacher and uniform)."""
    per_block = 128 if noise == "rademacher" else 4
    numbers: list[float] = []
    for block in range(-(-count // per_block)):
        words = reference_words((block, draw, key.site_word, key.step & 0xFFFFFFFF), key.seed)
        if noise == "rademacher":
            numbers += [2.0 * (word >> bit & 1) - 1 for word in words for bit in range(32)]
        elif noise == "uniform":
            numbers += [(word >> 8) / 2**24 for word in words]
        else:
            logs = [-math.log((((word >> 8) ^ 0x800000) + 1) / 2**24) for word in words]
            if noise == "laplace":
                numbers += [math.sqrt(0.5) * log * (-1) ** (word & 1) for log, word in zip(logs, words, strict=True)]
            else:
                for lane in (0, 2):
                    word = words[lane + 1]
                    turn = word & 0x7FFFFFFF
                    angle = (turn - 2**31 if turn >= 2**30 else turn) * math.pi / 2**31
                    radius = math.sqrt(2 * logs[lane]) * (-1) ** (word >> 31)
                    numbers += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.array(numbers[:count])


def reference_score(noise: str, score: str, values: Any) -> Any:
    if noise == "rademacher" or (noise, score) == ("gaussian", "exact"):
        return values
    return np.sign(values) * math.sqrt(2.0 if noise == "laplace" else math.pi / 2)


def signed_draw(copy: int) -> tuple[int, int]:
    return (copy, 1) if copy >= 0 else (-copy - 1, -1)


def naive_tiled(clean_copies: list[Any], dim: int, outer: int) -> Any:
    """Clean arrays, one a copy, side by side: rows (outer, K, N, inner) along `dim`."""
    if dim < 0:
        return clean_copies[0]
    halves = [np.split(array, outer, axis=dim) for array in clean_copies]
    return np.concatenate([halves[k][o] for o in range(outer) for k in range(len(clean_copies))], axis=dim)


def sample_index(sizes: list[int], dim: int, outer: int, batch: int) -> Any:
    """For every element of the clean tensor the number of its sample."""
    shape = list(sizes)
    shape[dim] *= batch
    inner = sizes[dim] // outer
    row = np.arange(shape[dim]).reshape([-1 if d == dim else 1 for d in range(len(shape))])
    return np.broadcast_to(row // inner % batch, shape)


LAYOUTS: list[tuple[list[int], int, int]] = [
    ([1, 10], 0, 1),
    ([1, 3, 5, 7], 0, 1),
    ([1], 0, 1),
    ([6, 3], 0, 3),
    ([4, 2], 0, 1),
    ([3, 1, 5], 1, 1),
    ([2, 4, 3], 1, 2),
    ([2, 4, 3], 1, 4),
    ([5, 2, 1], 2, 1),
]
ORDERS = {
    "pairs": [0, 3, 7, -1, -4, -8],
    "draws": [2, 5, 6, 9],
    "mixed": [4, -1, 4, 0, -5, -1, 8],
    "negative": [-3, -6],
    "one": [11],
}


def clean_shape(sizes: list[int], dim: int, batch: int) -> list[int]:
    shape = list(sizes)
    if dim >= 0:
        shape[dim] *= batch
    return shape


def numbers(distribution: Distribution, draws: list[int], count: int, limits: Limits | None = None) -> Any:
    """Draws as one array, made through `Source` and tiles of a one-dimensional layout."""
    source = Source(distribution, draws, Key(SEED, STEP, SITE, Purpose.NOISE), torch.float32, CPU, limits=limits)
    result = np.full((len(draws), count), np.nan, np.float32)
    for i, j, (_, _, inner), values in source.pieces(Layout(1, 1, count)):
        result[i:j, inner] = values.reshape(j - i, -1)
    return result


# ---------------------------------------------------------------------------------------------- Philox


@pytest.mark.parametrize(
    ("counter", "key", "output"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, output: str) -> None:
    """The vectors of Random123's kat_vectors for philox4x32 with 10 rounds."""
    c0, c1, c2, c3 = (int(word, 16) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())
    words = philox((torch.tensor(c0), torch.tensor(c1), torch.tensor(c2), torch.tensor(c3)), low | high << 32)
    assert [f"{int(word):08x}" for word in words] == output.split()
    assert reference_words((c0, c1, c2, c3), low | high << 32) == tuple(int(word, 16) for word in output.split())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**63 - 1),
    site=st.integers(0, 2**24 - 1),
    draws=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5),
    first=st.integers(0, 2**32 - 1),
    num_blocks=st.integers(1, 6),
    purpose=st.sampled_from(Purpose),
)
def test_every_form_of_philox_gives_the_same_words(
    seed: int, step: int, site: int, draws: list[int], first: int, num_blocks: int, purpose: Purpose
) -> None:
    key = Key(seed, step, site, purpose)
    lies = Key(torch.tensor(seed), torch.tensor(step), site, purpose)
    expected = [lane.tolist() for lane in philox_lanes(torch.tensor(draws), first, num_blocks, key)]
    for d, b in itertools.product(range(len(draws)), range(num_blocks)):
        counter = ((first + b) & 0xFFFFFFFF, draws[d], site | purpose << 24, step & 0xFFFFFFFF)
        assert tuple(lane[d][b] for lane in expected) == reference_words(counter, seed)
    blocks = np.arange(first, first + num_blocks).astype(np.uint64) & np.uint64(0xFFFFFFFF)
    for form in (philox_module._few_blocks, philox_module._many_blocks):
        lanes = form(np.array(draws, np.uint64), blocks, key.site_word, step & 0xFFFFFFFF, seed)
        assert [lane.tolist() for lane in lanes] == expected
    assert [lane.tolist() for lane in philox_lanes(torch.tensor(draws), first, num_blocks, lies)] == expected
    assert [lane.tolist() for lane in philox_lanes_numpy(draws, first, num_blocks, key)] == expected


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("distribution", [*NOISES.values(), UNIFORM], ids=lambda row: row.name)
def test_numbers_against_the_formula(distribution: Distribution) -> None:
    count = 1001
    values = numbers(distribution, [0, 9], count)
    for row, draw in zip(values, (0, 9), strict=True):
        exact = distribution.name in ("rademacher", "uniform")
        # float32 logarithm, root and sine: a few units in the last place of numbers of size up to 6.
        np.testing.assert_allclose(
            row, reference_noise(distribution.name, draw, count), rtol=0, atol=0 if exact else 4e-6
        )


@pytest.mark.parametrize("distribution", [*NOISES.values(), UNIFORM], ids=lambda row: row.name)
def test_numpy_and_torch_give_identical_bits(distribution: Distribution) -> None:
    key = Key(SEED, STEP, SITE, Purpose.NOISE)
    num_blocks = 3000
    count = num_blocks * distribution.elements_per_block
    expected = numbers_from_lanes(distribution, philox_lanes(torch.tensor([3, 1]), 0, num_blocks, key)).numpy()
    assert numbers(distribution, [3, 1], count).tobytes() == expected.tobytes()


@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
def test_extreme_words_give_finite_numbers(noise: str) -> None:
    words = [0, 1, 255, 256, 2**30, 2**31 - 1, 2**31, 2**31 + 255, 2**32 - 1]
    lanes = tuple(torch.tensor(column) for column in zip(*itertools.product(words, repeat=4), strict=True))
    values = numbers_from_lanes(NOISES[noise], (lanes[0][None], lanes[1][None], lanes[2][None], lanes[3][None]))
    assert values.isfinite().all()
    assert values.abs().max() < 12


@pytest.mark.parametrize("distribution", [*NOISES.values(), UNIFORM], ids=lambda row: row.name)
@settings(max_examples=20, deadline=None)
@given(
    draws=st.lists(st.integers(0, 40), min_size=1, max_size=7, unique=True),
    count=st.integers(1, 700),
    elements=st.integers(1, 300),
    blocks=st.integers(1, 40),
    amount=st.integers(1, 400),
)
def test_blocking_changes_nothing(
    distribution: Distribution, draws: list[int], count: int, elements: int, blocks: int, amount: int
) -> None:
    whole = numbers(distribution, list(range(41)), 700)[draws, :count]
    assert numbers(distribution, draws, count, Limits(elements, blocks, amount)).tobytes() == whole.tobytes()


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5), samples=st.integers(0, 5), inner=st.integers(0, 9), capacity=st.integers(1, 60))
def test_tiles_cover_a_layout_in_order(rows: int, samples: int, inner: int, capacity: int) -> None:
    layout = Layout(rows, samples, inner)
    order = np.arange(rows * samples * inner).reshape(rows, samples, inner)
    seen: list[int] = []
    for tile in layout.tiles(capacity):
        part = order[tile].reshape(-1).tolist()
        assert 1 <= len(part) <= capacity
        assert layout.elements(tile) == (part[0], part[-1] + 1)
        seen += part
    assert seen == list(range(order.size))


def test_copy_runs() -> None:
    assert copy_runs((4, 7, -5, -8)) == ((4, 7), ((0, 2, 0, 1), (0, 2, 2, -1)))
    assert copy_runs((1, 2, 3)) == ((1, 2, 3), ((0, 3, 0, 1),))
    assert copy_runs((-2, 1, 1)) == ((1,), ((0, 1, 0, -1), (0, 1, 1, 1), (0, 1, 2, 1)))


# ---------------------------------------------------------------------------------------------- statistics

COUNT = 400_000


def z_score(values: Any, expected: float) -> float:
    return float((values.mean() - expected) / (values.std() / math.sqrt(values.size)))


@pytest.mark.parametrize(("noise", "kurtosis"), [("gaussian", 3.0), ("laplace", 6.0), ("rademacher", 1.0)])
def test_moments(noise: str, kurtosis: float) -> None:
    """400,000 numbers: sees, with power above 0.99, a mean off by 0.012 and a variance off by 0.026 (Laplace; less
    else)."""
    values = numbers(NOISES[noise], [0, 1, 2, 3], COUNT // 4).astype(np.float64).reshape(-1)
    assert abs(z_score(values, 0.0)) < Z_BOUND
    if noise == "rademacher":
        assert (values**2 == 1).all()
    else:
        assert abs(z_score(values**2, 1.0)) < Z_BOUND
        assert abs(z_score(values**3, 0.0)) < Z_BOUND
        assert abs(z_score(values**4, kurtosis)) < Z_BOUND
    for lag in (1, 2, 3, 4, 8, 32, 128):
        assert abs(z_score(values[lag:] * values[:-lag], 0.0)) < Z_BOUND
    halves = values.reshape(2, -1)
    assert abs(z_score(halves[0] * halves[1], 0.0)) < Z_BOUND  # draws do not correlate


@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
def test_distribution_function(noise: str) -> None:
    """Kolmogorov-Smirnov at 400,000 numbers: the bound 2.6/sqrt(n) = 0.004 has a false alarm rate of 3e-6."""
    values = np.sort(numbers(NOISES[noise], [0], COUNT).astype(np.float64).reshape(-1))
    if noise == "gaussian":
        function = 0.5 * (1 + torch.erf(torch.from_numpy(values) / math.sqrt(2)).numpy())
    else:
        function = np.where(values < 0, 0.5 * np.exp(math.sqrt(2) * values), 1 - 0.5 * np.exp(-math.sqrt(2) * values))
    assert np.abs(function - (np.arange(COUNT) + 0.5) / COUNT).max() < 2.6 / math.sqrt(COUNT)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("score", ["exact", "sign"])
def test_score_times_noise_is_one_on_average(noise: str, score: str) -> None:
    """400,000 numbers: with power above 0.99 a constant off by 0.013 is seen (sqrt(2/pi) would be off by 0.2)."""
    values = numbers(NOISES[noise], [0], COUNT).reshape(-1)
    scored = NOISES[noise].score(score)
    scores = values.copy() if scored is None else scored(values.copy())
    np.testing.assert_allclose(scores, reference_score(noise, score, values), rtol=1e-6)
    product = (scores.astype(np.float64) * values).reshape(-1)
    if noise == "rademacher":
        assert (product == 1).all()
    else:
        assert abs(z_score(product, 1.0)) < Z_BOUND


def test_each_part_of_a_key_matters() -> None:
    def first(key: Key, draw: int) -> bytes:
        return bytes(np.stack([lane[0] for lane in philox_lanes_numpy([draw], 0, 4, key)]).tobytes())

    keys = [
        Key(1, 2, 3, Purpose.NOISE),
        Key(1 + 2**32, 2, 3, Purpose.NOISE),
        Key(2, 2, 3, Purpose.NOISE),
        Key(1, 3, 3, Purpose.NOISE),
        Key(1, 2, 4, Purpose.NOISE),
        Key(1, 2, 3, Purpose.STOCHASTIC_CAPTURE),
        Key(1, 2, 3, Purpose.MODEL),
    ]
    assert len({first(key, draw) for key in keys for draw in (0, 1)}) == 2 * len(keys)


# ---------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize(("sizes", "dim", "outer"), LAYOUTS, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("noise", NOISES)
def test_operators_against_numpy(sizes: list[int], dim: int, outer: int, order: str, noise: str) -> None:
    batch, copies = 3, ORDERS[order]
    shape = clean_shape(sizes, dim, batch)
    count = math.prod(shape)
    z = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    draws = {d: reference_noise(noise, d, count).reshape(shape) for d in {signed_draw(copy)[0] for copy in copies}}
    eps = [sign * draws[d] for d, sign in map(signed_draw, copies)]
    ids = torch.tensor(copies)

    tiled = naive_tiled([z.numpy()] * len(copies), dim, outer)
    np.testing.assert_array_equal(ops.tile(z, ids, dim, outer), tiled)

    expected = naive_tiled([z.numpy() + 0.25 * e for e in eps], dim, outer)
    result = ops.perturb(z, ids, KEY, SIGMAS, SITE, noise, sizes, dim, outer, False)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=5e-6)
    again = ops.perturb(torch.from_numpy(tiled), ids, KEY, SIGMAS, SITE, noise, sizes, dim, outer, True)
    assert torch.equal(again, result)

    weights = torch.randn(len(copies), batch, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sample = sample_index(sizes, dim, outer, batch)
    for score in ("exact", "sign"):
        terms = [w.numpy()[sample] * reference_score(noise, score, e) for w, e in zip(weights, eps, strict=True)]
        each = ops.weighted_noise(weights, ids, KEY, SITE, noise, score, sizes, dim, outer)
        np.testing.assert_allclose(each, naive_tiled(terms, dim, outer), rtol=1e-6, atol=5e-6)
        total = ops.weighted_noise_sum(weights, ids, KEY, SITE, noise, score, sizes, dim, outer)
        np.testing.assert_allclose(total, sum(terms), rtol=1e-6, atol=5e-5)


@pytest.mark.parametrize("noise", NOISES)
def test_without_a_batch_dimension(noise: str) -> None:
    z, one = torch.randn(3, 7), torch.tensor([-6])
    eps = -reference_noise(noise, 5, 21).reshape(3, 7)
    result = ops.perturb(z, one, KEY, SIGMAS, SITE, noise, [3, 7], -1, 1, False)
    np.testing.assert_allclose(result, z.numpy() + 0.25 * eps, rtol=1e-5, atol=1e-5)
    assert torch.equal(ops.tile(z, one, -1, 1), z)
    weights = torch.randn(1, 4)
    for operator in (ops.weighted_noise, ops.weighted_noise_sum):
        value = operator(weights, one, KEY, SITE, noise, "exact", [3, 7], -1, 1)
        expected = weights.sum().item() * reference_score(noise, "exact", eps)
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


def test_several_copies_need_a_batch_dimension() -> None:
    z, ids, weights = torch.randn(3, 7), torch.tensor([0, 1]), torch.ones(2, 4)
    calls: list[Callable[[], Tensor]] = [
        lambda: ops.perturb(z, ids, KEY, SIGMAS, SITE, "gaussian", [3, 7], -1, 1, False),
        lambda: ops.tile(z, ids, -1, 1),
        lambda: ops.weighted_noise(weights, ids, KEY, SITE, "gaussian", "exact", [3, 7], -1, 1),
        lambda: ops.stochastic_sign(z, torch.ones(()), ids, KEY, SITE, [3, 7], -1, 1),
    ]
    for call in calls:
        with pytest.raises(OptionError, match="without a batch dimension cannot hold 2 copies"):
            call()


def test_unknown_names() -> None:
    z, ids = torch.randn(2, 3), torch.tensor([0])
    with pytest.raises(UnknownNameError, match=r"unknown noise 'gausian'\. Did you mean 'gaussian'"):
        ops.perturb(z, ids, KEY, SIGMAS, SITE, "gausian", [1, 3], 0, 1, False)
    with pytest.raises(UnknownNameError, match="unknown score 'sing'"):
        ops.weighted_noise_sum(torch.ones(1, 2), ids, KEY, SITE, "laplace", "sing", [1, 3], 0, 1)
    with pytest.raises(UnknownNameError, match="unknown distribution 'norml'"):
        ops.keyed_random(KEY, 0, "norml", [3], torch.float32, CPU)
    with pytest.raises(OptionError, match=r"torch\.int64"):
        ops.keyed_random(KEY, 0, "normal", [3], torch.int64, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("noise", NOISES)
def test_twins_are_exactly_opposite_in_every_dtype(noise: str, dtype: torch.dtype) -> None:
    zeros = torch.zeros(5, 33, dtype=dtype)
    result = ops.perturb(zeros, torch.tensor([0, 6, -1, -7]), KEY, SIGMAS, SITE, noise, [1, 33], 0, 1, False)
    assert result.dtype == dtype
    assert torch.equal(result[:10], -result[10:])
    unit = torch.from_numpy(numbers(NOISES[noise], [0, 6], 165)).reshape(10, 33).to(dtype)
    assert torch.equal(result[:10], unit * SIGMAS[SITE].to(dtype))


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sigma_zero_changes_no_bit(tiled: bool, dtype: torch.dtype) -> None:
    z = torch.tensor([[-0.0, 0.0, 1.0, -torch.inf]], dtype=dtype)
    copies = torch.tensor([0, -1])
    given_z = z.repeat(2, 1) if tiled else z
    result = ops.perturb(given_z, copies, KEY, SIGMAS, 0, "rademacher", [1, 4], 0, 1, tiled)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(result.view(bits), z.repeat(2, 1).view(bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_are_summed_in_float32(dtype: torch.dtype) -> None:
    weights, draws = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).to(dtype), torch.arange(64)
    arguments = (draws, KEY, SITE, "rademacher", "exact", [1, 9], 0, 1)
    result = ops.weighted_noise_sum(weights, *arguments)
    assert torch.equal(result, ops.weighted_noise_sum(weights.float(), *arguments).to(dtype))


def test_chunks_of_copies_change_nothing() -> None:
    z = torch.randn(4, 3, 6, 6)
    sizes = [1, 3, 6, 6]

    def perturbed(copies: list[int]) -> Tensor:
        ids = torch.tensor(copies)
        return perturb(z, ids, KEY, SIGMAS, SITE, "gaussian", sizes, 0, 1, False).view(len(copies), *z.shape)

    whole = perturbed([*range(8), *(~d for d in range(8))])
    for chunk in ([0, 1, -1, -2], [5, -6], [7], [-3, 2]):
        rows = [d if d >= 0 else 8 + ~d for d in chunk]
        assert torch.equal(perturbed(chunk), whole[rows])


def test_seed_and_threads_of_torch_do_not_matter() -> None:
    z, weights = torch.randn(16, 40, 30), torch.randn(6, 16)
    ids = torch.tensor([0, 1, 2, -1, -2, -3])

    def results() -> list[Tensor]:
        values = [ops.keyed_random(KEY, 3, name, [50, 999], torch.float32, CPU) for name in MODEL_DISTRIBUTIONS]
        for noise in NOISES:
            values.append(ops.perturb(z, ids, KEY, SIGMAS, SITE, noise, [1, 40, 30], 0, 1, False))
            values.append(ops.weighted_noise_sum(weights, ids, KEY, SITE, noise, "sign", [1, 40, 30], 0, 1))
            values.append(ops.weighted_noise(weights, ids, KEY, SITE, noise, "sign", [1, 40, 30], 0, 1))
        values.append(ops.stochastic_sign(z[:12], torch.ones(()), ids[:3], KEY, SITE, [1, 40, 30], 0, 1))
        return values

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        expected = results()
        state = torch.get_rng_state()
        torch.set_num_threads(2)
        torch.manual_seed(1)
        actual = results()
        torch.manual_seed(0)
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one, other)


def test_weighted_noise_sum_stays_within_a_few_megabytes() -> None:
    """512 draws of 65,536 elements would be 128 MiB; tracemalloc sees NumPy's buffers, which are all but the result."""
    tracemalloc = pytest.importorskip("tracemalloc")
    weights, draws = torch.randn(512, 64), torch.arange(512)
    tracemalloc.start()
    try:
        ops.weighted_noise_sum(weights, draws, KEY, SITE, "rademacher", "exact", [1, 1024], 0, 1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20


# ---------------------------------------------------------------------------------------------- the model's own numbers


def test_keyed_random() -> None:
    key = Key(SEED, STEP, 7, Purpose.MODEL)
    uniform = ops.keyed_random(KEY, 7, "uniform", [3, 50], torch.float64, CPU)
    np.testing.assert_array_equal(uniform.view(-1), reference_noise("uniform", 0, 150, key))
    normal = ops.keyed_random(KEY, 7, "normal", [3, 50], torch.float32, CPU)
    np.testing.assert_allclose(normal.view(-1), reference_noise("gaussian", 0, 150, key), atol=4e-6)
    assert ops.keyed_random(KEY, 7, "normal", [0, 4], torch.float32, CPU).shape == (0, 4)
    assert ops.keyed_random(KEY, 7, "normal", [], torch.float32, CPU).shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_uniform_numbers_stay_below_one(dtype: torch.dtype) -> None:
    """Of 100,000 numbers 195 (bfloat16) and 24 (float16) would round to 1."""
    values = ops.keyed_random(KEY, 1, "uniform", [100_000], dtype, CPU)
    assert values.dtype == dtype
    assert values.min() >= 0
    assert values.max() < 1
    resolution = max(float(torch.finfo(dtype).eps) / 2, 2.0**-24)
    assert abs(z_score(values.double().numpy(), 0.5 - resolution / 2)) < Z_BOUND


# ---------------------------------------------------------------------------------------------- stochastic signs


def test_stochastic_sign_against_the_formula() -> None:
    sizes, dim, outer, batch, copies = [2, 4, 3], 1, 2, 3, [3, 0, -4]
    x = torch.randn(2, 36, 3, generator=torch.Generator().manual_seed(0))
    scale = x.abs().amax(dim=(0, 2), keepdim=True)
    count = 2 * 12 * 3
    key = Key(SEED, STEP, SITE, Purpose.STOCHASTIC_CAPTURE)
    uniforms = [reference_noise("uniform", d, count, key).reshape(2, 12, 3) for d in (6, 0, 7)]
    kept = naive_tiled(uniforms, dim, outer) * scale.double().numpy() < x.abs().double().numpy()
    result = ops.stochastic_sign(x, scale, torch.tensor(copies), KEY, SITE, sizes, dim, outer)
    assert batch * len(copies) * sizes[dim] == x.shape[dim]
    np.testing.assert_array_equal(result, np.sign(x.numpy()) * kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stochastic_sign_is_unbiased(dtype: torch.dtype) -> None:
    """2,000 draws of 60 elements: bound sqrt(p (1 - p) / 2000) a unit of z, so a bias of 0.08 is seen with power above
    0.98."""
    row = torch.linspace(-1.5, 1.5, 60, dtype=torch.float64).to(dtype)
    copies = torch.tensor([*range(1000), *(~d for d in range(1000))])
    x = row.repeat(2000, 1)
    scale = torch.tensor(1.5, dtype=dtype)
    signs = ops.stochastic_sign(x, scale, copies, KEY, SITE, [1, 60], 0, 1)
    assert signs.dtype == dtype
    assert set(signs.unique().tolist()) == {-1.0, 0.0, 1.0}
    probability = (row.double() / 1.5).abs()
    error = (signs.double().mean(0) * 1.5 - row.double()) / 1.5
    assert (error.abs() <= Z_BOUND * (probability * (1 - probability) / 2000).sqrt() + 1e-7).all()
    one, twin = signs[:1000].double(), signs[1000:].double()
    kept = (one.abs() - probability) * (twin.abs() - probability)
    assert abs(z_score(kept.mean(1).numpy(), 0.0)) < Z_BOUND  # a copy and its twin are independent


def test_stochastic_sign_at_the_ends() -> None:
    x = torch.tensor([[0.0, 2.0, -2.0, 3.0, -0.0]]).repeat(500, 1)
    signs = ops.stochastic_sign(x, torch.tensor(2.0), torch.arange(500), KEY, SITE, [1, 5], 0, 1)
    assert (signs == torch.tensor([0.0, 1.0, -1.0, 1.0, 0.0])).all()
    nothing = ops.stochastic_sign(0 * x, torch.tensor(0.0), torch.arange(500), KEY, SITE, [1, 5], 0, 1)
    assert (nothing == 0).all()


# ---------------------------------------------------------------------------------------------- declarations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("sizes", "dim", "outer"), [*LAYOUTS[::3], ([3, 4], -1, 1)], ids=str)
def test_operators_pass_opcheck(sizes: list[int], dim: int, outer: int, dtype: torch.dtype) -> None:
    """Schema (no aliasing, no mutation) and fake tensors (shape, dtype, strides)."""
    ids = torch.tensor([0, 3, -1, -4]) if dim >= 0 else torch.tensor([3])
    z = torch.randn(clean_shape(sizes, dim, 2)).to(dtype)
    weights = torch.randn(len(ids), 2).to(dtype)
    tiled = ops.tile(z, ids, dim, outer)
    weighted = (weights, ids, KEY, SITE, "gaussian", "sign", sizes, dim, outer)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.perturb, (z, ids, KEY, SIGMAS, SITE, "rademacher", sizes, dim, outer, False)),
        (ops.perturb, (tiled, ids, KEY, SIGMAS, 0, "gaussian", sizes, dim, outer, True)),
        (ops.tile, (z, ids, dim, outer)),
        (ops.weighted_noise_sum, weighted),
        (ops.weighted_noise, weighted),
        (ops.keyed_random, (KEY, 1, "uniform", [2, 3], dtype, CPU)),
        (ops.stochastic_sign, (tiled, torch.ones((), dtype=dtype), ids, KEY, SITE, sizes, dim, outer)),
        (ops.pack_stochastic_signs, (tiled, torch.ones((), dtype=dtype), ids, KEY, SITE, "signed", sizes, dim, outer)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_inputs_need_no_particular_form() -> None:
    z = torch.randn(3, 5, 4).permute(1, 0, 2).requires_grad_()
    with torch.no_grad():
        result = ops.perturb(z, torch.tensor([1]), KEY, SIGMAS, SITE, "laplace", [1, 3, 4], 0, 1, False)
        plain = z.detach().contiguous()
        direct = perturb(plain, torch.tensor([1]), KEY, SIGMAS, SITE, "laplace", [1, 3, 4], 0, 1, False)
    assert torch.equal(result, direct)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("sizes", "dim", "outer"), LAYOUTS[::3], ids=str)
@pytest.mark.parametrize("noise", NOISES)
def test_the_form_for_devices_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, noise: str, sizes: list[int], dim: int, outer: int, dtype: torch.dtype
) -> None:
    """What runs on a GPU, run on the CPU: identical bits; sums, whose order differs, up to rounding."""
    ids = torch.tensor(ORDERS["pairs"])
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(clean_shape(sizes, dim, 2), generator=generator).to(dtype)
    weights = torch.randn(len(ids), 2, generator=generator).to(dtype)
    tiled = ops.tile(z, ids, dim, outer)

    def results() -> list[Tensor]:
        weighted = (weights, ids, KEY, SITE, noise, "sign", sizes, dim, outer)
        return [
            ops.perturb(z, ids, KEY, SIGMAS, SITE, noise, sizes, dim, outer, False),
            ops.perturb(tiled, ids, KEY, SIGMAS, SITE, noise, sizes, dim, outer, True),
            ops.perturb(z, ids, KEY, SIGMAS, 0, noise, sizes, dim, outer, False),
            ops.stochastic_sign(tiled, tiled.abs().amax(), ids, KEY, SITE, sizes, dim, outer),
            *(ops.keyed_random(KEY, 3, name, [7, 99], dtype, CPU) for name in MODEL_DISTRIBUTIONS),
            ops.weighted_noise(*weighted),
            ops.weighted_noise_sum(*weighted),
        ]

    expected = results()
    monkeypatch.setattr(noise_source, "on_host", lambda device: False)
    actual = results()
    for one, other in zip(expected[:-1], actual[:-1], strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    torch.testing.assert_close(actual[-1], expected[-1])


@pytest.mark.parametrize("noise", NOISES)
def test_the_form_for_devices_can_be_captured_for_other_steps(monkeypatch: pytest.MonkeyPatch, noise: str) -> None:
    """Played again, every operator makes the numbers of the key that stands there by then: nothing read it before."""
    monkeypatch.setattr(noise_source, "on_host", lambda device: False)
    sizes, dim, outer = LAYOUTS[0]
    ids, key, seed = torch.tensor(ORDERS["pairs"]), KEY.clone(), torch.Generator().manual_seed(3)
    z, weights = torch.randn(clean_shape(sizes, dim, 2), generator=seed), torch.randn(len(ids), 2, generator=seed)
    tiled = ops.tile(z, ids, dim, outer)

    def results() -> list[Tensor]:
        return [
            operators.perturb(z, ids, key, SIGMAS, SITE, noise, sizes, dim, outer, False),
            operators.weighted_noise(weights, ids, key, SITE, noise, "exact", sizes, dim, outer),
            operators.weighted_noise_sum(weights, ids, key, SITE, noise, "exact", sizes, dim, outer),
            operators.stochastic_sign(tiled, tiled.abs().amax(), ids, key, SITE, sizes, dim, outer),
            operators.keyed_random(key, 3, "uniform", [7, 99], torch.float32, CPU),
        ]

    played, play = graph_tape.capture(results, CPU)
    first = [each.clone() for each in played]
    key.copy_(torch.tensor([SEED + 1, STEP + 1]))
    play()
    for one, other, before in zip(played, results(), first, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("noise", NOISES)
def test_a_gpu_gives_the_same_bits(noise: str) -> None:
    z, ids = torch.randn(8, 100, 30), torch.tensor([0, 4, -1, -5])
    arguments = (SITE, noise, [1, 100, 30], 0, 1, False)
    there = ops.perturb(z.cuda(), ids, KEY, SIGMAS.cuda(), *arguments)
    assert torch.equal(there.cpu(), ops.perturb(z, ids, KEY, SIGMAS, *arguments))
