"""What a gradient subgraph takes from the clean run, and what it computes again (`passes.reuse_values`).

That it is right on random graphs is tested where those are (test_segments): reusing is the default.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward.compiler.program import CompiledModel
from onward.models import resnet5, vit
from onward.passes.errors import CheckpointError, OptionError
from onward.passes.find_sites import find_sites, sites
from onward.passes.graph import Role, outputs, placeholders
from onward.passes.reuse_values import reuse_values
from onward.passes.trace_gradients import trace_gradients

FORWARD = {
    torch.ops.aten.addmm.default, torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default,
    torch.ops.aten.linear.default, torch.ops.aten.relu.default, torch.ops.aten.tanh.default,
}  # fmt: skip


class Normalised(nn.Module):
    """Batch statistics and dropout on the way to the frontier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        self.drop, self.last = nn.Dropout(0.2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.first(x)))
        result: Tensor = self.last(self.drop(F.max_pool2d(torch.sigmoid(self.second(h)), 2).mean((2, 3))))
        return result


def images(size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 1, size, size, generator=generator, dtype=torch.float64), torch.arange(4) % 3


MODELS: dict[str, Any] = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 9), nn.Tanh(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)
    ),
    "resnet5": lambda: resnet5(num_classes=3, in_channels=1),
    "batch norm, dropout, max-pool": Normalised,
    "vit": lambda: vit(num_classes=3, in_channels=1, image_size=8),
}


def made(name: str, **settings: Any) -> onward.Program:
    """With feedback learned from nothing: random, so that it predicts something everywhere."""
    torch.manual_seed(0)
    estimator = onward.LikelihoodRatio.feedback_learned(warmup=0, **settings)
    program = onward.compile(MODELS[name]().double(), images()[0], loss=F.cross_entropy, estimator=estimator)
    assert program.feedback is not None
    jacobians = {index: torch.randn_like(jacobian) for index, jacobian in program.feedback.jacobians.items()}
    program.feedback = replace(program.feedback, jacobians=jacobians)
    return program


def step(program: onward.Program) -> dict[str, Tensor]:
    x, y = images()
    program.step(x, y)
    return {name: p.grad for name, p in program.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, settings) for name in list(MODELS)[:3] for settings in ({"reach": 1}, {"reach": 2}, {"segments": 2})),
        ("vit", {"reach": 2, "segments": "auto"}),
    ],
    ids=str,
)
def test_gradients_are_those_of_recomputing_everything(name: str, settings: dict[str, Any]) -> None:
    """To rounding in float64: the clean run's values are the same numbers by the same operations."""
    reused, recomputed = (step(made(name, recompute=again, **settings)) for again in (False, True))
    assert reused.keys() == recomputed.keys()
    for parameter, gradient in recomputed.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(reused[parameter], gradient, rtol=0, atol=1e-12 * max(scale, 1e-3), msg=parameter)


def computed(compiled: CompiledModel) -> int:
    return sum(node.target in FORWARD for g in compiled.gradients for node in g.module.graph.nodes)


@pytest.mark.parametrize("name", ["mlp", "resnet5"])
def test_no_subgraph_computes_what_the_clean_run_did(name: str) -> None:
    """All that is left of the matrix products of these is the derivative's own: with one more capture each."""
    reused, recomputed = (made(name, recompute=again, reach=1).compiled for again in (False, True))
    assert computed(recomputed) > 0
    assert computed(reused) == 0
    captured = [sum(one.bytes for g in c.gradients for one in g.captures) for c in (reused, recomputed)]
    assert captured[0] >= captured[1]


def test_what_is_read_is_only_what_the_derivative_needs() -> None:
    """A relu's derivative needs its result and nothing of what came before it."""
    compiled = made("mlp", reach=1).compiled
    (first,) = [g for g in compiled.gradients if g.site.index == 0]
    read = {node.meta["target"] for node in placeholders(first.module, Role.PARAMETER)}
    assert read == {"3.weight"}, read  # pulled back through the second layer; the first's own weight is not read


def test_a_vjp_without_values_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    history = {record.name: record.module for record in made("mlp").compiled.history}
    module = find_sites(history["locate_samples"])
    for site in sites(module):
        plain = trace_gradients(module, capture="exact")[site.index]
        reused = reuse_values(trace_gradients(module, capture="exact", values=True)[site.index])
        assert [output for output, _ in outputs(reused)] == [output for output, _ in outputs(plain)]
        assert all(output.kind == "gradient" for output, _ in outputs(reused))


class TwoHeads(nn.Module):
    """Two outputs at every token."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.first(h), self.second(h)


class Assigning(nn.Module):
    """Writes into a slice of an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).clone()
        h[:, :, 3:] = torch.tanh(h[:, :, :3])
        result: Tensor = self.second(h)
        return result


class Turned(nn.Module):
    """Its output, and so the loss's gradient there, lies across."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x)))).transpose(1, 2)


def both(output: Any, target: Tensor) -> Tensor:
    outputs = output if isinstance(output, tuple) else (output,)
    return torch.stack([(one.square() - target[:, None, None]).square().mean((1, 2)) for one in outputs]).sum(0)


@pytest.mark.parametrize("model", [TwoHeads, Assigning, Turned])
@pytest.mark.parametrize("again", [False, True])
def test_outputs_in_odd_places_and_slices_that_are_written(model: type[nn.Module], again: bool) -> None:
    """With the whole way to the outputs the gradient is autograd's, to rounding in float64."""
    torch.manual_seed(0)
    net, x, y = model().double(), torch.randn(4, 7, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    estimator = onward.LikelihoodRatio.feedback_learned(warmup=0, reach=9, recompute=again)
    onward.compile(net, x, loss=both, estimator=estimator).step(x, y)
    exact = torch.autograd.grad(both(net(x), y).mean(), list(net.parameters()))
    for parameter, gradient in zip(net.parameters(), exact, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_only_clean_captures_leave_a_choice() -> None:
    with pytest.raises(OptionError, match="recompute"):
        onward.LikelihoodRatio(recompute=True)


def test_a_run_goes_on_with_the_other_and_from_before_there_was_a_choice() -> None:
    program, other = made("mlp"), made("mlp", recompute=True)
    step(program)
    other.load_state_dict(program.state_dict())
    assert other.step_count == 1
    state = program.state_dict()
    settings = json.loads(str(state["estimator"]))
    del settings["recompute"]
    other.load_state_dict({**state, "estimator": json.dumps(settings)})
    settings["noise"] = "gaussian"
    with pytest.raises(CheckpointError, match="noise='gaussian', now 'rademacher'"):
        other.load_state_dict({**state, "estimator": json.dumps(settings)})
