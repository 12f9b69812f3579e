"""Keyed noise in ONNX's operators: the same bits as `onward.runtime.noise` makes, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from onnx_session import Session, exported
from torch import Tensor

from onward.compiler.to_onnx import random
from onward.compiler.to_onnx.builder import Builder
from onward.compiler.to_onnx.emit import NUMPY, Emission, emit
from onward.compiler.to_onnx.random import Stream
from onward.compiler.to_onnx.trace import Described, Like, trace
from onward.passes import ops
from onward.passes.errors import ExportError
from onward.passes.graph import Layout as Form
from onward.passes.tie_blocks import grid
from onward.runtime.export.decompositions import DECOMPOSITIONS
from onward.runtime.noise import levels, operators, packing  # noqa: F401  (the operators, for torch)
from onward.runtime.noise.distributions import NOISES, UNIFORM
from onward.runtime.noise.philox import Key, Purpose, philox_lanes_numpy
from onward.runtime.noise.source import Layout, Source

CPU = torch.device("cpu")
SEEDS = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, -1, 2**32, -(2**63), 2**63 - 1])
STEPS = st.integers(0, 2**33)
SITES = st.integers(0, 2**24 - 1)
NUMBERS = {**NOISES, "uniform": UNIFORM}
IDS = [(0,), (0, 1, 2), (0, 1, ~0, ~1), (0, ~0, 1, ~1), (~2, 1, ~1, 3), (3, 4, ~3, ~4), (5,), (~1,), (2, 0, ~2)]
"""Copies in the orders that chunks have, and in others."""
PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate)


def same_bits(mine: Any, theirs: Any) -> None:
    assert mine.dtype == theirs.dtype
    assert mine.shape == theirs.shape
    np.testing.assert_array_equal(
        np.ascontiguousarray(mine).view(np.uint8), np.ascontiguousarray(theirs).view(np.uint8)
    )


def key_of(seed: int, step: int) -> Tensor:
    return torch.tensor([seed, step])


# ---------------------------------------------------------------------------------------------------------- the words

KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
"""Counter, key and words, as Random123 1.14 ships them (tests/kat_vectors, philox4x32 10)."""


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    b = Builder("words")
    given = b.input("key", torch.int64, [2])
    first, third = b.constant([counter[0]], np.uint64), b.constant([counter[2]], np.uint64)
    b.output("words", random._philox(b, given, first, [counter[1]], third), torch.uint32, [1, 1, 4])
    seed = np.array([key[0] | key[1] << 32, counter[3]], np.uint64).view(np.int64)
    assert Session(b.model(""))({"key": seed})["words"].reshape(4).tolist() == list(expected)


def made(draws: tuple[int, ...], streams: list[tuple[int, bool, int]]) -> Session:
    """Words of several streams (site, one bit, purpose) of so many elements each."""
    b = Builder("words")
    key = b.input("key", torch.int64, [2])
    counts = [b.input(f"elements{place}", torch.int64, []) for place in range(len(streams))]
    of = [Stream(site, count, bit, purpose) for (site, bit, purpose), count in zip(streams, counts, strict=True)]
    for place, (value, stream) in enumerate(zip(random.words(b, key, draws, of), of, strict=True)):
        shape, dtype = (["D", "bytes"], torch.uint8) if stream.one_bit else (["D", "blocks", 4], torch.uint32)
        b.output(f"words{place}", value, dtype, shape)
    return Session(b.model(""))


@hypothesis.settings(max_examples=25, phases=PHASES)
@hypothesis.given(
    seed=SEEDS,
    step=STEPS,
    draws=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3, unique=True),
    streams=st.lists(
        st.tuples(SITES, st.booleans(), st.sampled_from([0, 1, 2]), st.integers(1, 600)), min_size=1, max_size=3
    ),
)
def test_words_are_philox(seed: int, step: int, draws: list[int], streams: list[tuple[int, bool, int, int]]) -> None:
    run = made(tuple(draws), [(site, bit, purpose) for site, bit, purpose, _ in streams])
    counts = {f"elements{place}": np.array(stream[3]) for place, stream in enumerate(streams)}
    found = run({"key": key_of(seed, step), **counts})
    for place, (site, bit, purpose, count) in enumerate(streams):
        blocks = -(-count // (128 if bit else 4))
        lanes = philox_lanes_numpy(draws, 0, blocks, Key(seed, step, site, Purpose(purpose)))
        expected = np.stack(lanes, -1).astype(np.uint32)
        if bit:
            expected = expected.view(np.uint8).reshape(len(draws), -1)[:, : -(-count // 8)]
        same_bits(found[f"words{place}"], expected)


# -------------------------------------------------------------------------------------------------------- the numbers


def numbers_session(noise: str, draws: tuple[int, ...], site: int, purpose: int, dtype: torch.dtype) -> Session:
    b = Builder("numbers")
    key, count = b.input("key", torch.int64, [2]), b.input("elements", torch.int64, [])
    one_bit = noise == "rademacher"
    (words,) = random.words(b, key, draws, [Stream(site, count, one_bit, purpose)])
    if one_bit:
        scale = b.input("scale", dtype, [])
        b.output("numbers", random.signs(b, words, scale, count, False, NUMPY[dtype]), dtype, [len(draws), "n"])
    else:
        b.output("numbers", random.numbers(b, words, noise, count), torch.float32, [len(draws), "n"])
    return Session(b.model(""))


def expected_numbers(
    noise: str, draws: tuple[int, ...], key: Key, count: int, dtype: torch.dtype, scale: float = 1.0
) -> Any:
    source = Source(NUMBERS[noise], draws, key, dtype, CPU, scale)
    expected = np.zeros((len(draws), count), np.float64 if dtype == torch.float64 else np.float32)
    for i, j, (_, _, inner), values in source.pieces(Layout(1, 1, count)):
        expected[i:j, inner] = values.reshape(j - i, -1)
    return expected


@pytest.mark.parametrize("noise", NUMBERS)
@hypothesis.settings(max_examples=8, phases=PHASES)
@hypothesis.given(
    seed=SEEDS, step=STEPS, site=SITES, count=st.integers(1, 700), purpose=st.sampled_from([0, 1, 2]), data=st.data()
)
def test_numbers(noise: str, seed: int, step: int, site: int, count: int, purpose: int, data: st.DataObject) -> None:
    draws = tuple(data.draw(st.lists(st.integers(0, 2**31), min_size=1, max_size=3, unique=True)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64])) if noise == "rademacher" else torch.float32
    scale = data.draw(st.sampled_from([1.0, 0.03125])) if noise == "rademacher" else 1.0
    run = numbers_session(noise, draws, site, purpose, dtype)
    feeds = {"key": key_of(seed, step), "elements": np.array(count), "scale": torch.tensor(scale, dtype=dtype)}
    expected = expected_numbers(noise, draws, Key(seed, step, site, Purpose(purpose)), count, dtype, scale)
    same_bits(run(feeds)["numbers"], expected)


@pytest.mark.parametrize("noise", ["gaussian", "laplace", "uniform"])
def test_numbers_of_every_size(noise: str) -> None:
    """A hundred thousand words, and those at every edge of the logarithm's exponent and of the angle."""
    edges = (
        [1 << bit for bit in range(32)] + [(1 << bit) - 1 for bit in range(33)] + [(1 << bit) + 1 for bit in range(31)]
    )
    roots = [round(2**24 * 2 ** -(power + 0.5)) + off for power in range(24) for off in range(-2, 3)]
    tops = [(((number - 1) ^ 0x800000) & 0xFFFFFF) << 8 for number in roots + [n + 1 for n in roots]]
    generator = np.random.default_rng(0)
    words = np.concatenate([np.array(edges + tops), generator.integers(0, 2**32, 100_000)]).astype(np.uint32)
    words = np.concatenate([words, words[::-1], np.repeat(words[:400], 400), np.tile(words[:400], 400)])
    words = words[: len(words) // 8 * 8].reshape(2, -1, 4)
    b = Builder("numbers")
    value = b.input("words", torch.uint32, [2, words.shape[1], 4])
    count = b.constant(words.shape[1] * 4, np.int64)
    b.output("numbers", random.numbers(b, value, noise, count), torch.float32, [2, "n"])
    lanes = tuple(np.ascontiguousarray(words[..., lane]).view(np.int32) for lane in range(4))
    sample = NUMBERS[noise].sample
    assert sample is not None
    same_bits(Session(b.model(""))({"words": words})["numbers"], sample(lanes))


# ------------------------------------------------------------------------------------------------------ the operators

FORMS = [
    ([1, 5], 0, 1), ([1, 3, 8], 0, 1), ([3, 1, 4], 1, 1), ([2, 3, 1], 2, 1), ([4, 3], 0, 2), ([2, 6], 1, 3),
    ([3, 5], -1, 1), ([1], 0, 1), ([1, 16], 0, 1),
]  # fmt: skip
"""Sizes, batch dimension and outer rows of clean tensors (`passes.ops`)."""


def like(sizes: list[int], dim: int, dtype: torch.dtype, copies: int = 1) -> Like:
    return Like(tuple((size * copies,) if axis == dim else size for axis, size in enumerate(sizes)), dtype)


def tensor(kind: Like, samples: int, seed: int = 0) -> Tensor:
    shape = [size[0] * samples if isinstance(size, tuple) else size for size in kind.shape]
    generator = torch.Generator().manual_seed(seed)
    if kind.dtype == torch.bool:
        return torch.rand(shape, generator=generator) > 0.4
    return torch.randn(shape, generator=generator, dtype=kind.dtype)


@st.composite
def situations(draw: st.DrawFn, several: bool = True) -> tuple[Any, ...]:
    """(sizes, dim, outer), copies, dtype, noise, samples, seed, step, site."""
    form = draw(st.sampled_from(FORMS))
    ids = draw(st.sampled_from(IDS if form[1] >= 0 and several else [ids for ids in IDS if len(ids) == 1]))
    return (
        form, ids, draw(st.sampled_from([torch.float32, torch.float64])), draw(st.sampled_from(sorted(NOISES))),
        draw(st.integers(1, 4)), draw(SEEDS), draw(STEPS), draw(st.integers(0, 2)),
    )  # fmt: skip


def run_with_copies(
    function: Callable[..., Any], kinds: list[Described], given: list[Any], at: int, ids: tuple[int, ...]
) -> list[Any]:
    graph = trace(lambda *values: [function(*values)], kinds, DECOMPOSITIONS)
    session = exported(graph, kinds, {at: ids})
    return list(session({f"x{place}": value for place, value in enumerate(given)}).values())


SIGMAS = torch.tensor([0.1, 0.37, 1.0], dtype=torch.float64)


@hypothesis.settings(max_examples=20, phases=PHASES)
@hypothesis.given(situation=situations(), tiled=st.booleans(), masked=st.booleans(), tied=st.booleans())
def test_perturb(situation: tuple[Any, ...], tiled: bool, masked: bool, tied: bool) -> None:
    (sizes, dim, outer), ids, dtype, noise, samples, seed, step, site = situation
    count = len(ids) if dim >= 0 else 1
    blocks = (
        [2 if extent > 1 else 1 for extent in Form(tuple(sizes), dim, outer).extents] if tied and dim >= 0 else None
    )
    kinds: list[Described] = [
        like(sizes, dim, dtype, count if tiled else 1),
        Like((len(ids),), torch.int64),
        Like((2,), torch.int64),
        Like((3,), dtype),
        like(sizes, dim, torch.bool),
    ]
    z, alive = tensor(kinds[0], samples), tensor(kinds[4], samples, 1)

    def perturb(z: Tensor, copies: Tensor, key: Tensor, sigmas: Tensor, alive: Tensor) -> Tensor:
        mask = alive if masked else None
        return ops.perturb(z, copies, key, sigmas, site, noise, sizes, dim, outer, tiled, mask, blocks)

    given = [z, torch.tensor(ids), key_of(seed, step), SIGMAS.to(dtype), alive]
    (found,) = run_with_copies(perturb, kinds, given, 1, ids)
    same_bits(found, perturb(*given).numpy())


@hypothesis.settings(max_examples=12, phases=PHASES)
@hypothesis.given(situation=situations(), scored=st.sampled_from(["exact", "sign"]), summed=st.booleans())
def test_weighted_noise(situation: tuple[Any, ...], scored: str, summed: bool) -> None:
    (sizes, dim, outer), ids, dtype, noise, samples, seed, step, site = situation
    if summed:
        ids = tuple(dict.fromkeys(max(each, ~each) for each in ids))
    operator = ops.weighted_noise_sum if summed else ops.weighted_noise
    kinds: list[Described] = [Like((len(ids), (1,)), dtype), Like((len(ids),), torch.int64), Like((2,), torch.int64)]

    def weighted(weights: Tensor, copies: Tensor, key: Tensor) -> Tensor:
        return operator(weights, copies, key, site, noise, scored, sizes, dim, outer)

    given = [tensor(kinds[0], samples), torch.tensor(ids), key_of(seed, step)]
    (found,) = run_with_copies(weighted, kinds, given, 1, ids)
    expected = weighted(*given).numpy()
    assert found.dtype == expected.dtype
    if not summed and dim >= 0:
        same_bits(found, expected)
    else:  # sums, in another order: |weights| · |noise| ≤ 8 bounds their terms
        np.testing.assert_allclose(found, expected, rtol=0, atol=16 * len(ids) * samples * np.finfo(found.dtype).eps)


def test_draws_of_a_chunk_are_cut_from_words_at_hand() -> None:
    sizes, draws, ids = [1, 11], (0, 1, 2, 3), (2, 3, ~2, ~3)
    kinds: list[Described] = [
        like(sizes, 0, torch.float32), Like((4,), torch.int64), Like((2,), torch.int64), Like((1,), torch.float32)
    ]  # fmt: skip
    for noise in sorted(NOISES):

        def perturb(z: Tensor, copies: Tensor, key: Tensor, sigmas: Tensor, noise: str = noise) -> Tensor:
            return ops.perturb(z, copies, key, sigmas, 0, noise, sizes, 0, 1, False)

        graph = trace(lambda *values, f=perturb: [f(*values)], kinds)
        b = Builder("chunk")
        z, key = b.input("z", torch.float32, ["N", 11]), b.input("key", torch.int64, [2])
        sigmas, copies = b.constant([0.5], np.float32), b.ints(ids)
        count = b.op("Size", z)
        (words,) = random.words(b, key, draws, [Stream(0, count, noise == "rademacher")])
        emission = Emission(b, {(0, noise): (words, draws)}, {copies: ids})
        found, _ = emit(emission, graph, [z, copies, key, sigmas], "chunk")
        b.output("found", found[0], torch.float32, ["4*N", 11])
        x = torch.randn(3, 11)
        mine = Session(b.model(""))({"z": x, "key": key_of(-7, 9)})["found"]
        same_bits(mine, perturb(x, torch.tensor(ids), key_of(-7, 9), torch.tensor([0.5])).numpy())


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_random_numbers_of_the_model(distribution: str, dtype: torch.dtype) -> None:
    kinds: list[Described] = [Like((2,), torch.int64), Like(((1,), 5), torch.float32)]

    def draw(key: Tensor, x: Tensor) -> list[Tensor]:
        free = ops.keyed_random(key, 3, distribution, [x.shape[0], 5], dtype, CPU)
        return [free, ops.keyed_random(key, 4, distribution, [3, 2], dtype, CPU)]

    run = exported(trace(draw, kinds), kinds)
    for samples, seed in ((1, 0), (3, -1), (7, 2**40 + 3)):
        given = [key_of(seed, samples), torch.zeros(samples, 5)]
        for mine, theirs in zip(run({"x0": given[0], "x1": given[1]}).values(), draw(*given), strict=True):
            same_bits(mine, theirs.numpy())


def test_random_numbers_of_half_precision_are_refused() -> None:
    kinds: list[Described] = [Like((2,), torch.int64)]
    graph = trace(lambda key: [ops.keyed_random(key, 0, "uniform", [2], torch.float16, CPU)], kinds)
    with pytest.raises(ExportError, match="float32 and float64"):
        exported(graph, kinds)


@hypothesis.settings(max_examples=12, phases=PHASES)
@hypothesis.given(situation=situations())
def test_stochastic_sign(situation: tuple[Any, ...]) -> None:
    (sizes, dim, outer), ids, dtype, _, samples, seed, step, site = situation
    kinds: list[Described] = [
        like(sizes, dim, dtype, len(ids)), Like((), dtype), Like((len(ids),), torch.int64), Like((2,), torch.int64)
    ]  # fmt: skip

    def signs(x: Tensor, scale: Tensor, copies: Tensor, key: Tensor) -> Tensor:
        return ops.stochastic_sign(x, scale, copies, key, site, sizes, dim, outer)

    def packed(x: Tensor, scale: Tensor, copies: Tensor, key: Tensor) -> Tensor:
        return ops.pack_stochastic_signs(x, scale, copies, key, site, "signed", sizes, dim, outer)

    x = tensor(kinds[0], samples)
    given = [x, x.abs().max(), torch.tensor(ids), key_of(seed, step)]
    for function in (signs, packed) if dim == 0 else (signs,):
        (found,) = run_with_copies(function, kinds, given, 2, ids)
        same_bits(found, function(*given).numpy())


# ------------------------------------------------------------------------------------------------ as torch's operations


def as_onnx(operator: Any, x: Tensor, *rest: Any) -> list[Any]:
    """What Onward's operator gives by its decomposition and in ONNX, the batch in front and free."""
    kinds: list[Described] = [Like(((1,), *x.shape[1:]), x.dtype)]
    graph = trace(lambda x: [operator(x, *rest)], kinds, DECOMPOSITIONS)
    (found,) = exported(graph, kinds)({"x0": x}).values()
    return [DECOMPOSITIONS[operator](x, *rest).numpy(), found]


@pytest.mark.parametrize("domain", ops.DOMAINS)
@hypothesis.settings(max_examples=3, phases=PHASES)
@hypothesis.given(shape=st.lists(st.integers(1, 9), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_packed_signs(domain: str, shape: list[int], seed: int) -> None:
    x = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()
    packed = ops.pack_signs(x, domain, 0)
    for found in as_onnx(ops.pack_signs, x, domain, 0):
        same_bits(found, packed.numpy())
    sizes = [1, *shape[1:]]
    back = ops.unpack_signs(packed, domain, sizes, 0, torch.float32)
    planes = list(packed.shape)
    kinds: list[Described] = [Like((planes[0], (1,), planes[2]), torch.uint8)]
    graph = trace(lambda packed: [ops.unpack_signs(packed, domain, sizes, 0, torch.float32)], kinds, DECOMPOSITIONS)
    (found,) = exported(graph, kinds)({"x0": packed}).values()
    same_bits(found, back.numpy())


@pytest.mark.parametrize("bits", ops.LEVEL_BITS.values())
@pytest.mark.parametrize("domain", ["nonnegative", "signed"])
@hypothesis.settings(max_examples=2, phases=PHASES)
@hypothesis.given(shape=st.lists(st.integers(1, 7), min_size=2, max_size=3), seed=st.integers(0, 99))
def test_packed_levels(domain: str, bits: int, shape: list[int], seed: int) -> None:
    largest = ops.num_levels(domain, bits)
    low = -largest if domain == "signed" else 0
    x = torch.randint(low, largest + 1, shape, generator=torch.Generator().manual_seed(seed)).float()
    packed = ops.pack_levels(x, domain, bits, 0)
    for found in as_onnx(ops.pack_levels, x, domain, bits, 0):
        same_bits(found, packed.numpy())
    rest = (domain, bits, [1, *shape[1:]], 0, torch.float32)
    for found in as_onnx(ops.unpack_levels, packed, *rest):
        same_bits(found, ops.unpack_levels(packed, *rest).numpy())


@pytest.mark.parametrize(("sizes", "dim", "outer"), FORMS)
def test_operators_without_random_numbers_are_torchs(sizes: list[int], dim: int, outer: int) -> None:
    """Their decompositions, in torch; in ONNX the programs of `test_export.py` run them."""
    x = tensor(like(sizes, dim, torch.float32), 3)
    copies = torch.arange(3 if dim >= 0 else 1)
    same_bits(DECOMPOSITIONS[ops.tile](x, copies, dim, outer).numpy(), ops.tile(x, copies, dim, outer).numpy())
    same_bits(DECOMPOSITIONS[ops.pack_signs](x, "signed", dim).numpy(), ops.pack_signs(x, "signed", dim).numpy())
    packed = ops.pack_signs(x, "signed", dim)
    rest = ("signed", sizes, dim, torch.float32)
    same_bits(DECOMPOSITIONS[ops.unpack_signs](packed, *rest).numpy(), ops.unpack_signs(packed, *rest).numpy())
    if dim < 0:
        return
    fine = Form(tuple(sizes), dim, outer)
    blocks = [2 if extent > 1 else 1 for extent in fine.extents]
    small = tensor(like(list(grid(fine, tuple(blocks)).sizes), dim, torch.float32), 3)
    where = (sizes, dim, outer, blocks)
    same_bits(DECOMPOSITIONS[ops.spread_blocks](small, *where).numpy(), ops.spread_blocks(small, *where).numpy())
    for alive in (None, tensor(like(sizes, dim, torch.bool), 3)):
        found = DECOMPOSITIONS[ops.count_blocks](small, alive, *where)
        same_bits(found.numpy(), ops.count_blocks(small, alive, *where).numpy())
