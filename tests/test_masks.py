"""Noise on alive coordinates only, and one noise point for the sites that meet in a sum (DESIGN.md 10).

A mask has to be the set of coordinates with a non-zero derivative of what reads the noise point, which autograd gives
with a random cotangent. Statistics are z-scores: `BOUND` = 6 is exceeded by chance in 2e-9 of all coordinates; every
comparison holds fewer than 1000.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import onward
from onward.compiler.program import CompiledModel, input_keys, output_keys
from onward.passes import ops
from onward.passes.graph import placeholders
from onward.passes.mask_noise import BLOCKING

BOUND = 6.0
Function = Callable[[Tensor], Any]


class Apply(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Any:
        return self.function(z)


class Site(nn.Module):
    """One convolution, then a function of it."""

    def __init__(self, function: Function | nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.function = function if isinstance(function, nn.Module) else Apply(function)

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv(x))


def site_model(function: Function | nn.Module) -> tuple[Site, Tensor]:
    torch.manual_seed(0)
    model = Site(function).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)  # reaches both ends of relu6 and hardsigmoid
    return model, torch.randn(3, 1, 6, 6, dtype=torch.float64)


def squares(output: Any, target: Tensor) -> Tensor:
    tensors = output if isinstance(output, (tuple, list)) else [output]
    return sum(((tensor.flatten(1) - target[:, :1]) ** 2).sum(1) for tensor in tensors)  # type: ignore[return-value]


def alive_program(model: nn.Module, x: Tensor, loss: Any = squares, **settings: Any) -> onward.Program:
    estimator = onward.LikelihoodRatio(**{"placement": "alive", "groups": "joint", "copies": 2, **settings})
    return onward.compile(model, x, loss=loss, estimator=estimator)


class Recorder(fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.values[n.name] = result
        return result

    def start(self, environment: dict[str, Any]) -> dict[str, Any]:
        self.values: dict[str, Any] = {}
        self.run(*[environment[key] for key in input_keys(self.module)])  # type: ignore[arg-type]
        return self.values


def clean_environment(program: onward.Program, x: Tensor) -> dict[str, Any]:
    """All that a perturbed run may read, of the program's next step."""
    compiled = program.compiled
    environment: dict[str, Any] = {
        "input:0": x,
        "runtime:key": torch.tensor([program.seed, program.step_count]),
        "runtime:sigmas": torch.full((len(compiled.sites),), float(compiled.estimator.sigma)),  # type: ignore[arg-type]
        "runtime:copies": torch.zeros(1, dtype=torch.int64),
        **{f"parameter:{name}": parameter.detach() for name, parameter in program.model.named_parameters()},
        **{f"buffer:{name}": buffer for name, buffer in program.model.named_buffers()},
    }
    with torch.no_grad():
        for stage in compiled.stages:
            results = stage(*[environment[key] for key in input_keys(stage)])
            environment.update(zip(output_keys(stage), results, strict=True))
    return environment


def mask_names(compiled: CompiledModel) -> dict[int, str]:
    return compiled.runs[0].alive


BLOCKED: dict[str, Function | nn.Module] = {
    "relu": torch.relu,
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(),
    "hardtanh-bounds": nn.Hardtanh(-0.5, 1.5),
    "clamp": lambda z: z.clamp(-1.0, 0.5),
    "hardsigmoid": nn.Hardsigmoid(),
    "pool": nn.MaxPool2d(2),
    "pool-overlapping": nn.MaxPool2d(3, stride=1, padding=1),
    "pool-strided": nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
    "pool-with-gaps": nn.MaxPool2d(2, stride=3),
    "relu-pool": nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
    "several-readers": lambda z: (torch.relu(z), F.max_pool2d(z, 2)),
    "two-clamps": lambda z: z.clamp(-1.0, 0.0) * 2 + z.clamp(0.5, 1.0),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_the_mask_is_where_the_derivative_is_not_zero(name: str) -> None:
    model, x = site_model(BLOCKED[name])
    program = alive_program(model, x)
    (mask,) = mask_names(program.compiled).values()
    found = clean_environment(program, x)[f"value:{mask}"]

    z = model.conv(x).detach().requires_grad_()
    results = model.function(z)
    results = results if isinstance(results, tuple) else (results,)
    cotangents = [torch.randn_like(result) for result in results]
    (derivative,) = torch.autograd.grad(results, z, cotangents)
    assert found.dtype == torch.bool
    assert 0.02 < found.double().mean() < 0.98
    assert torch.equal(found, derivative != 0)


def test_each_operation_that_blocks_was_tested() -> None:
    covered = set()
    for function in BLOCKED.values():
        graph = torch.export.export(Site(function), (torch.randn(2, 1, 6, 6),)).graph
        covered |= {node.target for node in graph.nodes if node.target in BLOCKING}
    # torch.export writes relu6 as a hardtanh; the product of two-clamps masks nothing, dropout's is tested below
    assert set(BLOCKING) - covered == {torch.ops.aten.relu6.default}


def test_clamping_at_the_bound_itself_blocks_nothing() -> None:
    """As autograd has it, so that units that start at a bound (weights of zero) are not dead for good."""
    model, x = site_model(lambda z: z.clamp(0.0, 1.0))
    nn.init.zeros_(model.conv.weight)
    nn.init.zeros_(model.conv.bias)
    program = alive_program(model, x)
    assert bool(clean_environment(program, x)[f"value:{mask_names(program.compiled)[0]}"].all())


def test_dropout_right_behind_a_site_masks_its_noise() -> None:
    model, x = site_model(nn.Dropout(0.4))
    program = alive_program(model, x)
    environment = clean_environment(program, x)
    mask = environment[f"value:{mask_names(program.compiled)[0]}"]
    assert torch.equal(mask, environment["output:0"] != 0)
    assert 0.4 < mask.double().mean() < 0.8


class Buffered(nn.Module):
    """A multiplication by a boolean buffer that is broadcast: no mask of the noise's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.rand(1, 2, 6, 6) > 0.5)

    def forward(self, z: Tensor) -> Tensor:
        return z * self.kept  # type: ignore[operator]


UNBLOCKED: dict[str, Function | nn.Module] = {
    "unknown": torch.tanh,
    "one-sided-clamp": lambda z: z.clamp(min=0.0),
    "known-and-unknown": lambda z: (torch.relu(z), torch.tanh(z)),
    "returned": lambda z: z,
    "returned-and-read": lambda z: (torch.relu(z), z),
    "dilated": nn.MaxPool2d(2, dilation=2),
    "buffer": Buffered(),
    "product-with-itself": lambda z: z * z,
}


@pytest.mark.parametrize("name", UNBLOCKED)
def test_what_may_pass_is_not_masked(name: str) -> None:
    model, x = site_model(UNBLOCKED[name])
    program = alive_program(model, x)
    assert mask_names(program.compiled) == {}
    program.step(x, torch.zeros(3, 1, dtype=torch.float64))


# --- where the noise goes ---------------------------------------------------------------------------------------------


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def batch(samples: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, classes, (samples,), generator=generator)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_in_a_joint_run_exactly_the_clean_runs_alive_coordinates_get_noise(noise: str) -> None:
    torch.manual_seed(0)
    model = mlp(4, 9, 7, 3)
    x, y = batch(5, 4, 3)
    program = alive_program(model, x, F.cross_entropy, copies=6, sigma=3.0, noise=noise)
    environment = clean_environment(program, x)
    environment["runtime:copies"] = torch.tensor([0, 1, 2, ~0, ~1, ~2])
    run = program.compiled.runs[0]
    with torch.no_grad():
        values = Recorder(run.module).start(environment)
    noisy = {node.meta["noise_of"]: node for node in run.module.graph.nodes if node.target == ops.perturb}
    first = model[0](x)
    expected = {0: first > 0, 1: model[2](torch.relu(first)) > 0}
    flipped = 0
    for site, name in run.alive.items():
        before, after = values[noisy[site].args[0].name], values[noisy[site].name]  # type: ignore[union-attr]
        before = before.repeat(6, 1) if len(before) == 5 else before
        alive = environment[f"value:{name}"].repeat(6, 1)
        assert torch.equal(after != before, alive)
        assert torch.equal(environment[f"value:{name}"], expected[site])
        flipped += int(((before > 0) != alive).sum())
    assert set(run.alive) == {0, 1}
    assert flipped > 10, "the second site's own mask in the perturbed run would be another"
    program.step(x, y)


# --- the estimate -----------------------------------------------------------------------------------------------------


def estimates(program: onward.Program, x: Tensor, y: Any, steps: int) -> Tensor:
    """The gradients of `steps` steps, flat, ``(steps, parameters)``."""
    rows = []
    for _ in range(steps):
        program.model.zero_grad()
        program.step(x, y)
        rows.append(torch.cat([parameter.grad.flatten().clone() for parameter in program.model.parameters()]))
    return torch.stack(rows)


def exact(model: nn.Module, x: Tensor, y: Any, loss: Any = F.cross_entropy) -> Tensor:
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(model(x), y).mean(), parameters)
    return torch.cat([gradient.flatten() for gradient in gradients])


def check_mean(found: Tensor, expected: Tensor, detected: float = 0.5) -> None:
    """All z-scores within `BOUND`. An error of `detected` of the gradient's norm, spread as the standard errors are,
    would exceed it."""
    error = found.std(0) / len(found) ** 0.5
    deviation = (found.mean(0) - expected).abs()
    rounding = 1e-6 * expected.abs().max()  # what σ² and a coordinate without noise leave
    assert bool((deviation <= BOUND * error + rounding).all()), float((deviation / error.clamp_min(1e-300)).max())
    assert (error * BOUND).norm() < detected * expected.norm()


@pytest.mark.parametrize("groups", ["layerwise", "joint"])
def test_the_estimate_is_autograds_gradient(groups: str) -> None:
    torch.manual_seed(0)
    model = mlp(4, 8, 6, 3)
    x, y = batch(6, 4, 3)
    program = alive_program(model, x, F.cross_entropy, groups=groups, copies=64, sigma=1e-4)
    check_mean(estimates(program, x, y, 60), exact(model, x, y))


def test_the_variance_falls_by_the_share_of_the_coordinates_that_are_alive() -> None:
    """With signs as noise a sample's estimate has the variance ``‖g‖² - g_k²`` at each noisy coordinate k, hence
    ``‖g‖² (d - 1)`` in total, times ``‖x‖² + 1`` for weight and bias: d is all coordinates, or the alive ones."""
    torch.manual_seed(0)
    model = mlp(4, 12, 3)
    x, y = batch(6, 4, 3)
    z = model[0](x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model[2](torch.relu(z)), y), z)
    size = gradient.square().sum(1) * (x.square().sum(1) + 1)
    totals = {}
    for placement, dimensions in (("operation", torch.full((6,), 12.0)), ("alive", (z > 0).sum(1))):
        expected = float((size * (dimensions - 1)).sum()) / 4
        program = alive_program(
            model, x, F.cross_entropy, groups="layerwise", copies=8, sigma=1e-4, **{"placement": placement}
        )
        first = estimates(program, x, y, 300)[:, : 12 * 5]
        spread = (first - exact(model, x, y)[: 12 * 5]).square().sum(1)
        assert abs(float(spread.mean()) - expected) < BOUND * float(spread.std()) / 300**0.5
        assert BOUND * float(spread.std()) / 300**0.5 < 0.3 * expected
        totals[placement] = float(spread.mean())
    assert totals["alive"] < 0.75 * totals["operation"]


# --- one noise point a sum --------------------------------------------------------------------------------------------


class Sums(nn.Module):
    """A projected block, an identity block, a sum that is read twice, a scaled and a broadcast one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)
        self.c = nn.Linear(4, 4)
        self.d, self.e = nn.Linear(4, 4), nn.Linear(4, 4)
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 1)
        self.h, self.i = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.a(x) + self.b(x))  # one site at the sum
        x = torch.relu(self.c(x) + x)  # its noise at the sum
        x = torch.tanh(torch.add(self.d(x), self.e(x), alpha=2.0))  # alpha: two sites
        x = torch.tanh(self.f(x) + self.g(x))  # f's noise at the sum, g is broadcast: its own
        h = self.h(x)  # read twice: its own
        return self.head(torch.tanh(h + self.i(x)) * h)


def test_sites_that_meet_in_a_sum_share_its_noise() -> None:
    torch.manual_seed(0)
    model = Sums().double()
    x, y = batch(5, 3, 3)
    program = alive_program(model, x, F.cross_entropy, copies=128, sigma=1e-4, groups="layerwise")
    nodes = {node.name: node for node in program.compiled.graph.graph.nodes}
    at = {site.name: nodes[site.output].target for site in program.compiled.sites}
    linear, add = torch.ops.aten.linear.default, torch.ops.aten.add.Tensor
    assert at == {"a+b": add, "c": add, "d": linear, "e": linear, "f": add, "g": linear, "h": linear, "i": add,
                  "head": linear}  # fmt: skip
    assert program.compiled.sites[0].parameters == ("a.weight", "a.bias", "b.weight", "b.bias")
    masked = [program.compiled.sites[run.sites[0]].name for run in program.compiled.runs if run.alive]
    assert masked == ["a+b", "c"]
    check_mean(estimates(program, x, y, 80), exact(model, x, y))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_residual_block_has_one_noise_point_behind_its_sum(stride: int) -> None:
    from onward.models.resnet import ResidualBlock

    torch.manual_seed(0)
    model = nn.Sequential(ResidualBlock(2, 2, stride=stride), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(4, 2, 4, 4)
    model(x)
    program = alive_program(model.double(), x.double(), F.cross_entropy)
    names = [site.name for site in program.compiled.sites]
    second = ["0.conv2+0.shortcut"] if stride == 2 else ["0.conv2"]
    assert names == ["0.conv1", *second, "2"]
    assert sorted(mask_names(program.compiled)) == [0, 1]
    every = {node.meta["target"] for stage in program.compiled.stages for node in placeholders(stage)}
    assert {"0.conv1.weight", "0.conv2.weight"} <= every
