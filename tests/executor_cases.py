"""Programs of every kind for the executors, trained some steps: what all executors have to agree on, bit for bit."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward.compiler.driver import compile_model
from onward.compiler.program import CompiledModel
from onward.models.resnet import resnet5
from onward.passes.errors import NonFiniteLossError
from onward.runtime.execution.step import Step

Ratio = onward.LikelihoodRatio


class Recurrent(nn.Module):
    """One weight read at four sites: its gradients have to be summed in one order."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.tanh(self.cell(x))
        result: Tensor = self.head(x)
        return result


class Normalised(nn.Module):
    """Batch normalisation, whose buffers a step moves, and dropout, whose numbers are keyed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.Dropout(0.3),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.drop(F.relu(self.norm(self.first(x)))))
        return result


class TimeFirst(nn.Module):
    """Two positions of every sample, all samples' first ones before: a part of the batch is not a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 2, 3).transpose(0, 1).reshape(-1, 3)
        hidden = torch.relu(self.first(rows)).reshape(2, -1, 5).transpose(0, 1).reshape(-1, 10)
        result: Tensor = self.last(hidden)
        return result


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(4)


CASES: dict[str, tuple[Any, Ratio]] = {
    "auto": (mlp, Ratio.auto(reach=0, warmup=1)),
    "auto, convolutions": (lambda: resnet5(num_classes=10, in_channels=1), Ratio.auto(warmup=1)),
    "layerwise": (mlp, Ratio(copies=4)),
    "layerwise in chunks": (mlp, Ratio(copies=8, chunk=2)),
    "joint, a copy's own captures, in chunks": (mlp, Ratio(groups="joint", copies=6, chunk=2)),
    "the paper's": (mlp, Ratio.alr(copies=4, chunk=2)),
    "stochastic": (mlp, Ratio(capture="stochastic", groups="joint", copies=4)),
    "levels": (mlp, Ratio(capture="stochastic-4", groups="joint", copies=4, chunk=2)),
    "one copy at a time": (Normalised, Ratio(copies=4, credit="batch")),
    "corrected": (mlp, Ratio.feedback_learned(correction="full", copies=4, warmup=0)),
    "shrunk": (mlp, Ratio.feedback_learned(correction="shrunk", copies=4, warmup=0)),
    "shared weights": (Recurrent, Ratio.feedback_learned(copies=2, warmup=0)),
    "shared weights, layerwise": (Recurrent, Ratio(copies=4)),
    "batch statistics": (Normalised, Ratio.feedback_learned(copies=2, warmup=0)),
    "low rank": (mlp, Ratio.feedback_learned(copies=4, rank=2, warmup=0)),
    "a part of the batch, in chunks": (
        TimeFirst,
        Ratio.feedback_learned(copies=4, chunk=2, probe=0.5, correction="none", warmup=0),
    ),
    "weight noise": (mlp, Ratio(noise_on="weight", groups="joint", copies=4)),
}


def data_of(case: str) -> tuple[Tensor, Tensor]:
    return images() if "convolutions" in case else batch()


def model_for(case: str) -> nn.Module:
    """The case's model, each time anew with the same weights."""
    torch.manual_seed(0)
    model: nn.Module = CASES[case][0]()
    return model


@functools.cache
def compiled_for(case: str) -> CompiledModel:
    """Compiled once: graphs are data, which programs share, each with a model of its own."""
    return compile_model(model_for(case), data_of(case)[0], CASES[case][1])


def train(program: onward.Program, case: str, steps: int) -> list[Tensor]:
    """Some steps of gradient descent: losses, weights, buffers, and the program's state."""
    losses = descend(program, *data_of(case), steps)
    state = program.state_dict()
    numbers = [value if isinstance(value, Tensor) else torch.tensor(hash(value)) for value in state.values()]
    return [*losses, *program.model.state_dict().values(), *numbers]


def descend(program: onward.Program, x: Tensor, y: Any, steps: int) -> list[Tensor]:
    """The losses of some steps of gradient descent."""
    losses = []
    for _ in range(steps):
        program.model.zero_grad()
        losses.append(program.step(x, y))
        with torch.no_grad():
            for parameter in program.model.parameters():
                parameter.sub_(0.1 * parameter.grad)  # type: ignore[operator]
    return losses


def same(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def check_that_failed_steps_leave_nothing(program: onward.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps whose losses are not finite are gone from memory once they have raised, without a garbage collection."""
    steps, make = weakref.WeakSet[Step](), Step.__init__

    def counted(self: Step, *given: Any) -> None:
        make(self, *given)
        steps.add(self)

    monkeypatch.setattr(Step, "__init__", counted)
    gc.disable()
    try:
        for _ in range(3):
            with pytest.raises(NonFiniteLossError):
                program.step(*batch())
        assert len(steps) == 0
    finally:
        gc.enable()
