"""Integer networks: sums exact to the last bit, derivatives of a product, layers and twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import onward
from onward.models import integer_cnn, integer_mlp
from onward.models.integer import IntegerConv2d, IntegerLinear, Whole, integer_convolution, integer_linear, quantise
from onward.passes.errors import OptionError

ONE = torch.ones((), dtype=torch.float64)


def whole(*shape: int, largest: int = 127, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).double()


def as_int64(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().numpy().astype(np.int64)


def convolved(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> np.ndarray[Any, Any]:
    """By NumPy, in int64."""
    padded = np.pad(as_int64(x), [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    side = weight.shape[2]
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(2, 3))[:, :, ::stride, ::stride]
    return np.einsum("nchwij,ocij->nohw", windows, as_int64(weight)) + as_int64(bias)[:, None, None]


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 13, 5), (33, 1000, 10)])
@pytest.mark.parametrize("extreme", [False, True])
def test_a_linear_layers_sums_are_exact(shape: tuple[int, int, int], extreme: bool) -> None:
    """At the extreme the sums go up to 16 million, and the bias beyond what float32 and int16 hold."""
    samples, inputs, outputs = shape
    x, weight = whole(samples, inputs), whole(outputs, inputs, seed=1)
    if extreme:
        x, weight = 127 * x.sign(), 127 * weight.sign()
    bias = whole(outputs, largest=100_000_000, seed=2)
    expected = as_int64(x) @ as_int64(weight).T + as_int64(bias)
    np.testing.assert_array_equal(as_int64(integer_linear(x, weight, bias, ONE)), expected)


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (1, 0), (3, 2)])
@pytest.mark.parametrize("side", [1, 3])
def test_a_convolutions_sums_are_exact(stride: int, padding: int, side: int) -> None:
    x, weight, bias = whole(3, 5, 8, 7), whole(4, 5, side, side, seed=1), whole(4, largest=10_000, seed=2)
    found = integer_convolution(x, weight, bias, ONE, stride, padding)
    np.testing.assert_array_equal(as_int64(found), convolved(x, weight, bias, stride, padding))


def test_sums_are_exact_where_floats_would_round() -> None:
    """2,001 products of 127² in a row are an odd number beyond 2²⁴, which float32 does not have."""
    x, weight, bias = torch.full((1, 2001), 127.0), torch.full((1, 2001), 127.0), torch.zeros(1)
    assert integer_linear(x.double(), weight.double(), bias.double(), ONE).item() == 2001 * 127**2
    assert F.linear(x, weight).item() != 2001 * 127**2


def test_a_products_derivative_is_that_of_real_numbers() -> None:
    x, weight, bias = (t.requires_grad_() for t in (whole(3, 2, 6, 6), whole(4, 2, 3, 3, seed=1), whole(4, seed=2)))
    for found, real in (
        (integer_convolution(x, weight, bias, 0.5 * ONE, 2, 1), 0.5 * F.conv2d(x, weight, bias, 2, 1)),
        (integer_linear(x.flatten(1), weight.reshape(1, -1), bias[:1], 0.5 * ONE), None),
    ):
        other = 0.5 * F.linear(x.flatten(1), weight.reshape(1, -1), bias[:1]) if real is None else real
        cotangent = whole(*found.shape, seed=3)
        for one, two in zip(
            torch.autograd.grad(found, (x, weight, bias), cotangent),
            torch.autograd.grad(other, (x, weight, bias), cotangent),
            strict=True,
        ):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("operator", ["linear", "convolution"])
def test_torch_finds_the_operators_sound(operator: str) -> None:
    """Schema, fake tensors with a free batch, autograd, as `torch.library.opcheck` has them."""
    if operator == "linear":
        arguments: tuple[Any, ...] = (whole(4, 6), whole(3, 6), whole(3), ONE)
        op = torch.ops.onward_models.integer_linear.default
    else:
        arguments = (whole(4, 2, 5, 5), whole(3, 2, 3, 3), whole(3), ONE, 2, 1)
        op = torch.ops.onward_models.integer_convolution.default
    given = tuple(a.requires_grad_() if isinstance(a, Tensor) and a is not ONE else a for a in arguments)
    torch.library.opcheck(op, given)


def test_layers_round_weight_and_bias_to_their_steps() -> None:
    torch.manual_seed(0)
    layer = IntegerLinear(6, 4, step=0.25, gain=1.0).double()
    torch.nn.init.normal_(layer.bias)
    x = whole(5, 6)
    step = np.abs(layer.weight.detach().numpy()).max() / 127
    weight, bias = np.rint(layer.weight.detach().numpy() / step), np.rint(layer.bias.detach().numpy() / (step * 0.25))
    assert np.abs(weight).max() == 127
    sums = as_int64(x) @ weight.astype(np.int64).T + bias.astype(np.int64)
    np.testing.assert_allclose(layer(x).detach().numpy(), sums * (step * 0.25), rtol=1e-14)
    # what the layer stands for, wrong by half a step of each weight and of the bias at most
    real = F.linear(0.25 * x, layer.weight, layer.bias)
    bound = step * 0.25 * (0.5 * x.abs().sum(1, keepdim=True) + 0.5)
    assert bool(((layer(x) - real).abs() <= bound + 1e-12).all())


def test_a_weight_passes_its_gradient_on_as_if_it_were_not_rounded() -> None:
    torch.manual_seed(0)
    layer, x = IntegerConv2d(2, 3, step=0.5, gain=1.0).double(), whole(4, 2, 5, 5)
    weight, bias, step = quantise(layer.weight, layer.bias, 0.5)  # type: ignore[arg-type]
    rounded = [(step / 0.5 * weight).detach().requires_grad_(), (step * bias).detach().requires_grad_()]
    real = F.conv2d(0.5 * x, *rounded, padding=1)  # type: ignore[misc]
    torch.testing.assert_close(layer(x), real)
    cotangent = whole(*real.shape, seed=3)
    for one, two in zip(
        torch.autograd.grad(layer(x), list(layer.parameters()), cotangent),
        torch.autograd.grad(real, rounded, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


def test_a_weight_of_zeros_stays_finite() -> None:
    layer = IntegerLinear(3, 2, step=0.1, gain=0.0)
    assert layer(whole(2, 3).float()).tolist() == [[0.0, 0.0]] * 2


def test_activations_are_rounded_to_even_and_clamped() -> None:
    values = torch.tensor([-9.0, -1.0, -0.4, 0.5, 1.5, 2.5, 126.6, 500.0])
    assert Whole(127.0)(values).tolist() == [-9, -1, 0, 0, 2, 2, 127, 127]
    inputs = (10 * torch.randn(1000, generator=torch.Generator().manual_seed(0))).requires_grad_()
    twin = Whole(4.0, straight_through=True)(inputs)
    assert torch.equal(twin, Whole(4.0)(inputs))
    (slope,) = torch.autograd.grad(twin.sum(), inputs)
    torch.testing.assert_close(slope, (inputs.abs() <= 4.0).float() * 127 / 4.0)
    for range in (0.0, -1.0, torch.inf):
        with pytest.raises(OptionError, match="positive and finite"):
            integer_mlp(range=range)


@pytest.mark.parametrize("network", [integer_mlp, integer_cnn])
def test_what_is_multiplied_is_whole(network: Any) -> None:
    """The operators' own operands, in a forward of the whole network: int8 numbers, and nothing else."""
    torch.manual_seed(0)
    model, seen = network(), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "onward_models":
                seen.extend(args[:2])
            assert func not in FLOAT_PRODUCTS
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        model(torch.randn(5, 1, 8, 8))
    assert len(seen) == 6
    assert all(torch.equal(operand, operand.to(torch.int8).to(operand.dtype)) for operand in seen)


FLOAT_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.convolution.default}


def test_perturbed_forwards_count_integer_products() -> None:
    """Two FLOPs a multiply-add, as for floats: so a suffix has its share, and the layers are the sites."""
    torch.manual_seed(0)
    model = integer_cnn(width=4)
    program = onward.compile(model, torch.randn(4, 1, 8, 8), loss=F.cross_entropy, estimator=onward.LikelihoodRatio())
    assert [site.operation for site in program.compiled.sites] == [
        "onward_models.integer_convolution",
        "onward_models.integer_convolution",
        "onward_models.integer_linear",
    ]
    first, second, last = (2 * n for n in (64 * 4 * 9, 16 * 8 * 36, 10 * 128))
    shares = [run.share for run in program.compiled.runs]
    assert shares == pytest.approx([(second + last) / (first + second + last), last / (first + second + last), 0.0])
    program.step(torch.randn(6, 1, 8, 8), torch.arange(6))
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.grad_fn is None
