"""Weight gradients from packed signs by one operator: which subgraphs are rewritten, that a step's bits stay as they
are, and which calls kernels take. The kernels themselves are in `test_kernels.py`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
import onward.runtime.program  # registers the operators
from onward.compiler.driver import compile_model
from onward.compiler.program import CompiledModel, input_keys, output_keys
from onward.passes import ops
from onward.passes.errors import UnknownNameError
from onward.passes.fuse_packed_gradients import fuse_packed_gradients
from onward.passes.graph import outputs
from onward.runtime.noise import kernels

SAMPLES = 4
LINEAR, CONVOLUTION = ops.packed_linear_gradient, ops.packed_convolution_gradient


class Linears(nn.Module):
    """Linear layers on samples in every arrangement, each behind a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.clean, self.positions, self.positions_first = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 6)
        self.positions_as_rows, self.without_bias = nn.Linear(6, 4), nn.Linear(12, 9, bias=False)
        self.rows = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:  # (samples, 3, 5)
        x = torch.relu(self.positions(torch.relu(self.clean(x))))
        x = torch.relu(self.positions_first(x.transpose(0, 1))).transpose(0, 1)
        x = torch.relu(self.positions_as_rows(x.reshape(-1, 6))).reshape(-1, 12)
        result: Tensor = self.rows(torch.relu(self.without_bias(x)))
        return result


class Convolutions(nn.Module):
    """Convolutions of every form, each behind a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.clean, self.strides = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(6, 4, (3, 2), padding=(2, 1), dilation=2, bias=False)
        self.groups, self.transposed = nn.Conv2d(4, 4, 3, groups=2, padding=1), nn.ConvTranspose2d(4, 3, 2)
        self.signal = nn.Conv1d(3, 3, 4, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (samples, 1, 8, 8)
        x = torch.relu(self.dilated(torch.relu(self.strides(torch.relu(self.clean(x))))))
        x = torch.relu(self.transposed(torch.relu(self.groups(x))))
        return self.signal(x.flatten(2)).mean(2)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "linear": (
        Linears,
        (SAMPLES, 3, 5),
        dict.fromkeys(["positions", "positions_first", "positions_as_rows", "without_bias", "rows"], LINEAR),
    ),
    "convolutions": (
        Convolutions,
        (SAMPLES, 1, 8, 8),
        dict.fromkeys(["strides", "dilated", "signal"], CONVOLUTION) | dict.fromkeys(["groups", "transposed"]),
    ),
}
"""A model, its input, and by layer the operator in place of its gradient, if any."""


def alr(model: nn.Module, shape: tuple[int, ...], **options: Any) -> CompiledModel:
    return compile_model(model, torch.rand(shape), onward.LikelihoodRatio.alr(copies=2, **options))


def onwards(module: torch.fx.GraphModule) -> list[Any]:
    """Onward's operators in a graph."""
    return [node.target for node in module.graph.nodes if getattr(node.target, "namespace", "") == "onward"]


def gradients(model: nn.Module, compiled: CompiledModel, shape: tuple[int, ...]) -> dict[str, Tensor]:
    model.zero_grad()
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    onward.Program(model, compiled, F.cross_entropy, 0).step(x, torch.arange(SAMPLES) % 3)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("capture", ["sign", "stochastic"])
@pytest.mark.parametrize("name", CASES)
def test_one_operator_gives_the_bits_of_what_it_replaces(name: str, capture: str) -> None:
    make, shape, operators = CASES[name]
    model = make()
    compiled = alr(model, shape, capture=capture)
    for gradient in compiled.gradients:
        module, before = gradient.module, str(gradient.module.graph)
        fused, expected = fuse_packed_gradients(module), operators.get(gradient.site.name)
        assert str(module.graph) == before
        if expected is None:  # noise that is summed over the copies among them
            assert fused is module, gradient.site.name
            continue
        assert onwards(fused) == [expected], gradient.site.name
        assert (input_keys(fused), output_keys(fused)) == (input_keys(module), output_keys(module))
        for (_, one), (_, other) in zip(outputs(fused), outputs(module), strict=True):
            assert one.meta["val"].shape == other.meta["val"].shape

    expected = gradients(model, compiled, shape)
    with mock.patch.object(kernels, "serves", return_value=True):  # the operators' definitions run
        actual = gradients(model, compiled, shape)
    assert len(expected) == len([*model.parameters()])
    assert all(value.any() for value in expected.values())
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


@pytest.mark.parametrize("options", [{"capture": "stochastic-4"}, {"groups": "layerwise"}], ids=str)
def test_levels_and_clean_captures_stay_as_they_are(options: dict[str, Any]) -> None:
    for gradient in alr(small(), (SAMPLES, 5), **options).gradients:
        assert fuse_packed_gradients(gradient.module) is gradient.module


def test_nothing_is_rewritten_for_a_device_without_kernels() -> None:
    model = small()
    program = onward.Program(model, alr(model, (SAMPLES, 5)), F.cross_entropy, 0)
    assert fuse_packed_gradients(program.compiled.gradients[1].module) is not program.compiled.gradients[1].module
    with mock.patch.object(torch.ops.onward.packed_linear_gradient, "default", None):  # what a graph would call
        program.step(torch.rand(SAMPLES, 5), torch.arange(SAMPLES) % 3)


# ------------------------------------------------------------------------------------------------- the operators

COPIES, KEY = torch.tensor([3, -4]), torch.tensor([5, 7])
WEIGHTS = torch.linspace(-1.0, 2.0, 2 * SAMPLES).view(2, SAMPLES)


def linear_call(**changed: Any) -> tuple[Any, ...]:
    """The arguments for six inputs and three outputs."""
    return call(**{"x_sizes": [1, 6], "sizes": [1, 3], **changed})


def convolution_call(axes: int = 2, **changed: Any) -> tuple[Any, ...]:
    form = [torch.empty(3, 4, *[3] * axes), [1] * axes, [1] * axes, [1] * axes]
    return (*call(x_sizes=[1, 4, *[5] * axes], sizes=[1, 3, *[5] * axes], **changed), *form)


def call(x_sizes: list[int], sizes: list[int], **changed: Any) -> tuple[Any, ...]:
    x = torch.randn(2 * SAMPLES, *x_sizes[1:], generator=torch.Generator().manual_seed(0))
    given = {
        "packed": ops.pack_signs(x, "signed", 0), "scale": x.abs().amax(tuple(range(1, x.dim())), True),
        "domain": "signed", "x_sizes": x_sizes, "x_dim": 0, "weights": WEIGHTS, "copies": COPIES, "key": KEY, "site": 1,
        "noise": "gaussian", "score": "exact", "sizes": sizes, "dim": 0, "outer": 1, "dtype": torch.float32,
        "bias": True,
    }  # fmt: skip
    assert given.keys() >= changed.keys()
    return tuple((given | changed).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_operators_pass_opcheck(dtype: torch.dtype, bias: bool) -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(LINEAR, linear_call(dtype=dtype, bias=bias, scale=None), test_utils=checks)
    given = convolution_call(dtype=dtype, bias=bias, scale=None)
    torch.library.opcheck(CONVOLUTION, (*given[:-4], given[-4].to(dtype), *given[-3:]), test_utils=checks)


def test_unknown_names_are_told() -> None:
    with pytest.raises(UnknownNameError, match="sign domain 'singed'"):
        LINEAR(*linear_call(domain="singed"))
    with pytest.raises(UnknownNameError, match="score"):
        CONVOLUTION(*convolution_call(score="rank"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_what_the_kernels_leave_to_the_definitions() -> None:
    from onward.runtime.noise.kernels.table import KERNELS

    fits = {name: KERNELS[name].fits for name in ("packed_linear_gradient", "packed_convolution_gradient")}
    linear_fits, convolution_fits = fits.values()
    assert linear_fits(*linear_call())
    assert linear_fits(*linear_call(scale=None))
    assert convolution_fits(*convolution_call(axes=1))
    assert convolution_fits(*convolution_call())
    assert not convolution_fits(*convolution_call(axes=3))
    for changed in (
        {"dtype": torch.float64},
        {"weights": WEIGHTS.double()},
        {"scale": torch.ones(2 * SAMPLES, 1, dtype=torch.float16)},
        {"scale": torch.ones(())},
        {"sizes": [1, 1, 3], "x_sizes": [1, 1, 6], "dim": 1, "x_dim": 1},  # positions first
        {"sizes": [2, 3], "outer": 2},
        {"noise": "pink"},
        {"score": "rank"},
        {"domain": "singed"},
    ):
        assert not linear_fits(*linear_call(**changed)), changed
    assert not convolution_fits(*convolution_call(dtype=torch.float64))
    assert not linear_fits(*linear_call(x_sizes=[1, 2, 3]))  # rows that do not match
    assert not convolution_fits(*convolution_call()[:-4], torch.empty(3, 2, 3, 3), [1, 1], [1, 1], [1, 1])  # groups
