"""Captures by levels of 2, 4 or 8 bits: bytes, round trips, rounding that is unbiased and gets finer with the bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import onward
from onward import LikelihoodRatio
from onward.compiler.driver import compile_model
from onward.passes import ops
from onward.passes.errors import OptionError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS = list(itertools.product(("nonnegative", "signed"), (2, 4, 8)))


def levels_of(shape: list[int], domain: str, bits: int, seed: int) -> Tensor:
    most = ops.num_levels(domain, bits)
    least = 0 if domain == "nonnegative" else -most
    return torch.randint(least, most + 1, shape, generator=torch.Generator().manual_seed(seed))


def test_bytes_are_laid_out_as_documented() -> None:
    assert ops.pack_levels(torch.tensor([[1, 2, 3, 0, 3.0]]), "nonnegative", 2, 0).tolist() == [[0b00_11_10_01, 0b11]]
    assert ops.pack_levels(torch.tensor([[-7, 7, 0.0]]), "signed", 4, 0).tolist() == [[0b1110_0000, 0b0111]]
    assert ops.pack_levels(torch.tensor([[-127, 127.0]]), "signed", 8, 0).tolist() == [[0, 254]]


@pytest.mark.parametrize(("domain", "bits"), KINDS)
@settings(max_examples=20, deadline=None)
@given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=4), dtype=st.sampled_from(DTYPES), data=st.data())
def test_round_trip(domain: str, bits: int, shape: list[int], dtype: torch.dtype, data: st.DataObject) -> None:
    dim = data.draw(st.integers(-1, len(shape) - 1))
    x = levels_of(shape, domain, bits, data.draw(st.integers(0, 99))).to(dtype)
    packed = ops.pack_levels(x, domain, bits, dim)
    rows = shape[dim] if dim >= 0 else 1
    assert packed.shape == (rows, math.ceil(x.numel() // rows * bits / 8))
    assert packed.dtype == torch.uint8
    sizes = [3 if number == dim else extent for number, extent in enumerate(shape)]  # that of dim is ignored
    back = ops.unpack_levels(packed, domain, bits, sizes, dim, dtype)
    assert back.is_contiguous()
    assert back.dtype == dtype
    assert torch.equal(back, x)


@pytest.mark.parametrize(("domain", "bits"), KINDS)
def test_operators_pass_opcheck_and_leave_their_input(domain: str, bits: int) -> None:
    x = levels_of([3, 4, 5], domain, bits, 0).float()
    for dim in (-1, 0, 1):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(ops.pack_levels, (x, domain, bits, dim), test_utils=checks)
        packed = ops.pack_levels(x, domain, bits, dim)
        described = (packed, domain, bits, [3, 4, 5], dim, torch.float32)
        torch.library.opcheck(ops.unpack_levels, described, test_utils=checks)


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capture", "kept"),
    [
        ("stochastic-2", [("exact", 6 * 4), ("stochastic", 2 * 1 + 4), ("stochastic-2", 3 + 4)]),
        ("stochastic-4", [("exact", 6 * 4), ("stochastic-4", 3 + 4), ("stochastic-4", 5 + 4)]),
        ("stochastic-8", [("exact", 6 * 4), ("stochastic-8", 6 + 4), ("stochastic-8", 9 + 4)]),
    ],
)
def test_bytes_a_sample(capture: str, kept: list[tuple[str, int]]) -> None:
    """6 inputs, kept as they are; 6 signed activations, then 9 behind a ReLU; two bits of a signed value are its sign
    or nothing, as with one."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2))
    compiled = compile_model(model, (torch.randn(4, 6),), LikelihoodRatio(copies=2, capture=capture, groups="joint"))
    assert [(one.encoding, one.bytes) for gradient in compiled.gradients for one in gradient.captures] == kept


class Activation(nn.Module):
    """The input's numbers as an activation: the input itself would be kept whole."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1


def roundings(x: Tensor, capture: str, steps: int, relu: bool) -> Tensor:
    """What was captured of `x`, or of relu(x), in so many steps, (steps, elements).

    One sample, one output, a loss that is the output, Rademacher noise: the weight's estimate is ε² x̂ = x̂.
    """
    layer = nn.Linear(len(x), 1, bias=False, dtype=x.dtype)
    model = nn.Sequential(nn.ReLU() if relu else Activation(), layer)
    nn.init.zeros_(layer.weight)
    estimator = LikelihoodRatio(copies=2, capture=capture, sigma=0.5)
    program = onward.compile(model, (x[None],), loss=lambda output, _: output[:, 0], estimator=estimator, seed=3)
    found = []
    for _ in range(steps):
        layer.zero_grad()
        program.step(x[None], torch.zeros(1))
        assert layer.weight.grad is not None
        found.append(layer.weight.grad[0].clone())
    return torch.stack(found)


@pytest.mark.parametrize("relu", [False, True], ids=["signed", "nonnegative"])
@pytest.mark.parametrize("capture", ops.LEVEL_BITS)
def test_a_value_is_rounded_to_a_neighbouring_level_and_unbiased(capture: str, relu: bool) -> None:
    """Mean x, variance p (1 - p) of a level, p its distance from the level below: 16 elements, 5 standard errors."""
    x = torch.linspace(-1.3, 1.7, 16, dtype=torch.float64)
    value = x.relu() if relu else x
    level = 1.7 / ops.num_levels("nonnegative" if relu else "signed", ops.LEVEL_BITS[capture])
    found = roundings(x, capture, 300, relu)
    assert ((found - value).abs() < level).all()
    torch.testing.assert_close((found / level).round() * level, found, rtol=0, atol=1e-12)
    above = (value / level).frac().abs()
    variance = above * (1 - above) * level**2
    error = (variance / len(found)).sqrt()
    assert ((found.mean(0) - value).abs() <= 5 * error + 1e-12).all()
    assert found.var(0).mean() == pytest.approx(float(variance.mean()), rel=0.25)


def test_rounding_is_unbiased_in_half_precision() -> None:
    """A bfloat16 near 200 levels has no fraction left: the rounding is done in float32. What is left is the rounding of
    what is read back, half of 2^-8 of it."""
    x = torch.tensor([1.7, 1.3359375, -0.90234375]).bfloat16()
    found = roundings(x, "stochastic-8", 400, relu=False).double()
    level = 1.7 / 127
    assert ((found.mean(0) - x.double()).abs() < 5 * level / 2 / 400**0.5 + 2.0**-9 * x.double().abs()).all()
    assert len(found.unique()) > 3


@pytest.mark.parametrize("capture", ops.LEVEL_BITS)
def test_zeros_stay_zero_and_a_nan_shows(capture: str) -> None:
    assert not roundings(torch.zeros(3), capture, 2, relu=False).any()
    with pytest.raises(onward.errors.NonFiniteLossError):
        roundings(torch.tensor([1.0, torch.nan]), capture, 1, relu=False)


def test_levels_need_a_copy_s_own_captures() -> None:
    with pytest.raises(OptionError, match="capture='stochastic-4' cannot"):
        LikelihoodRatio(capture="stochastic-4", placement="alive")
