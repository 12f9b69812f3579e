"""Packed signs: layout of the bytes, round trips, agreement of the fast and the defining form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onward.passes import ops
from onward.passes.errors import UnknownNameError
from onward.runtime.noise import packing

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8]


def sign_values(shape: list[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator)


def expected(x: Tensor, domain: str) -> Tensor:
    if domain == "binary":
        return torch.where(x > 0, 1, -1)
    return (x > 0).to(torch.int64) - ((x < 0).to(torch.int64) if domain == "signed" else 0)


def test_bytes_are_laid_out_as_documented() -> None:
    x = torch.zeros(2, 9)
    x[0, 0] = x[0, 3] = x[1, 8] = 2.0
    x[1, 1] = -1.0
    assert ops.pack_signs(x, "nonnegative", 0).tolist() == [[[0b1001, 0], [0, 1]]]
    assert ops.pack_signs(x, "signed", 0).tolist() == [[[0b1001, 0], [0, 1]], [[0, 0], [0b10, 0]]]


def test_nan_is_neither_positive_nor_negative() -> None:
    assert ops.pack_signs(torch.full((1, 8), torch.nan), "signed", 0).sum() == 0


@pytest.mark.parametrize("domain", ops.DOMAINS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=4), data=st.data())
def test_round_trip(domain: str, dtype: torch.dtype, shape: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(-1, len(shape) - 1))
    x = sign_values(shape, data.draw(st.integers(0, 99)))
    packed = ops.pack_signs(x.to(dtype), domain, dim)
    rows = x.shape[dim] if dim >= 0 else 1
    elements = x.numel() // rows
    assert packed.shape == (ops.DOMAINS[domain], rows, -(-elements // 8))
    sizes = list(shape)
    if dim >= 0:
        sizes[dim] = 3  # ignored
    back = ops.unpack_signs(packed, domain, sizes, dim, dtype)
    assert back.dtype == dtype
    assert back.is_contiguous()
    assert torch.equal(back, expected(x, domain).to(dtype))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), elements=st.integers(1, 40), seed=st.integers(0, 99))
def test_fast_form_equals_definition(rows: int, elements: int, seed: int) -> None:
    bits = sign_values([rows, elements], seed) > 0
    packed = packing.pack_bits(bits)
    assert torch.equal(packed, packing._pack_bits_numpy(bits))
    assert torch.equal(packing.unpack_bits(packed, elements), bits.to(torch.uint8))
    for dtype in DTYPES:
        fast = packing._unpack_numpy(packed, elements, dtype, -1, 1)
        assert torch.equal(fast, packing._unpack_torch(packed, elements, dtype, -1, 1))


@pytest.mark.parametrize("domain", ops.DOMAINS)
def test_an_element_takes_as_many_bits_as_its_domain_says(domain: str) -> None:
    x = torch.randn(4, 16, 8, 8)
    assert ops.pack_signs(x, domain, 0).numel() * 8 == x.numel() * ops.DOMAINS[domain]


@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("domain", ops.DOMAINS)
def test_operators_pass_opcheck(domain: str, dim: int) -> None:
    x = sign_values([3, 4, 5], 0).to(torch.float32)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.pack_signs, (x, domain, dim), test_utils=checks)
    packed = ops.pack_signs(x, domain, dim)
    torch.library.opcheck(ops.unpack_signs, (packed, domain, [3, 4, 5], dim, torch.float32), test_utils=checks)


def test_non_contiguous_input() -> None:
    x = torch.randn(6, 5, 4).permute(2, 0, 1)
    assert torch.equal(ops.pack_signs(x, "signed", 1), ops.pack_signs(x.contiguous(), "signed", 1))


def test_unknown_domain_is_named() -> None:
    with pytest.raises(UnknownNameError, match=r"sign domain 'singed'\. Did you mean 'signed'"):
        ops.pack_signs(torch.ones(2, 2), "singed", 0)
    with pytest.raises(UnknownNameError):
        ops.unpack_signs(torch.zeros(1, 2, 1, dtype=torch.uint8), "", [2, 2], 0, torch.float32)
