"""Programs of every kind of estimator, exported as fused training steps: each against the program that it is of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from executor_cases import Normalised, Recurrent, mlp
from onnx_session import Session
from torch import Tensor, nn

import onward
from onward.runtime.export.step import fused
from onward.runtime.export.task import Tasks
from onward.runtime.export.tasks import make_tasks
from onward.runtime.export.updates import described, state_of
from onward.runtime.training.update import update

Ratio = onward.LikelihoodRatio
Learned = Ratio.feedback_learned
SEED = -5
LEARNING_RATE = 0.0625
"""A number that float32 holds exactly."""


class Convolutions(nn.Module):
    """A strided, a grouped and a pooled one, so that maps have several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.max_pool2d(F.relu(x + self.second(x)), 2)
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def vectors(samples: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype), torch.arange(
        samples
    ) % 3


def images(samples: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 1, 8, 8, generator=generator, dtype=dtype), torch.arange(samples) % 3


@dataclass(frozen=True)
class ExportCase:
    """A program and what its steps read.

    `tolerance` is of the largest entry of a gradient: in float64 what sums in another order may differ by, in float32
    what the issue promises.
    """

    build: Callable[[], nn.Module]
    estimator: Ratio
    data: Callable[[int, int, torch.dtype], tuple[Any, Any]] = vectors
    loss: Any = F.cross_entropy
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9


def _f32(build: Callable[[], nn.Module], estimator: Ratio, data: Any = vectors) -> ExportCase:
    return ExportCase(build, estimator, data, dtype=torch.float32, tolerance=1e-5)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def squares(output: Tensor, target: Tensor) -> Tensor:
    """A loss of one's own, a number a sample."""
    return (output - F.one_hot(target, 3)).square().sum(1)


CASES: dict[str, ExportCase] = {
    "layerwise": _f32(small, Ratio(copies=4, sigma=0.5)),
    "joint, one pair at a time": ExportCase(small, Ratio(groups="joint", copies=4, chunk=2)),
    "the paper's": ExportCase(small, Ratio.alr(copies=4, chunk=2)),
    "gaussian signs, sign captures": ExportCase(small, Ratio(noise="gaussian", score="sign", capture="sign", copies=4)),
    "laplace, captures of two bits": ExportCase(
        small, Ratio(noise="laplace", capture="stochastic-2", groups="joint", copies=4)
    ),
    "captures of four bits, in chunks": ExportCase(small, Ratio(capture="stochastic-4", copies=4, chunk=2)),
    "stochastic captures, one-sided": ExportCase(
        small, Ratio(antithetic=False, capture="stochastic", copies=5), loss=squares
    ),
    "narrow": _f32(Convolutions, Ratio(placement="narrow", groups="joint", copies=4, sigma=0.5), images),
    "dropout, batch statistics": ExportCase(Normalised, Ratio(copies=4, groups="joint", credit="batch", chunk=2)),
    "feedback": _f32(small, Learned(copies=2, warmup=1, sigma=0.5)),
    "feedback, corrected, gaussian": ExportCase(
        small, Learned(noise="gaussian", copies=4, correction="full", warmup=0, chunk=2)
    ),
    "feedback, reach, every other step": ExportCase(mlp, Learned(copies=2, warmup=1, probe_every=2, reach=1)),
    "feedback, segments, when it teaches": ExportCase(mlp, Learned(copies=2, warmup=1, probe_every="auto", segments=2)),
    "feedback, reach beyond": ExportCase(small, Learned(copies=2, warmup=0, reach=9), loss=squares),
    "feedback, blocks": _f32(Convolutions, Learned(copies=4, warmup=0, blocks=2, sigma=0.5), images),
    "feedback, shared weights, trust apart": ExportCase(Recurrent, Learned(copies=2, warmup=0, trust=False)),
    "automatic": ExportCase(small, Ratio.auto(warmup=1)),
}


class Pair:
    """A program with its optimizer, and the fused step that was exported from it before its first step."""

    def __init__(self, case: ExportCase, make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD) -> None:
        torch.manual_seed(0)
        self.case, self.model = case, case.build().to(case.dtype)
        x, y = case.data(6, 0, case.dtype)
        self.program = onward.compile(self.model, x, loss=case.loss, estimator=case.estimator, seed=SEED)
        if case.estimator.sigma == "auto":
            self.program.sigmas[:] = self.program.measured_sigmas(x, y)
            self.program.next_calibration = 10**9
        more: dict[str, Any] = {"momentum": 0.9} if make is torch.optim.SGD else {}
        self.optimizer = make(self.model.parameters(), lr=LEARNING_RATE, weight_decay=1e-3, **more)
        self.tasks = self.make_tasks(x, y)
        self.onnx = fused(self.tasks, "a step")
        self.session = Session(self.onnx)
        self.state: dict[str, Any] = {key: value.detach().numpy().copy() for key, value in self.tasks.state.items()}

    def make_tasks(self, x: Any, y: Any) -> Tasks:
        known = described(self.optimizer)
        named = self.model.named_parameters()
        moments = {f"{n}.{k}": v for n, p in named for k, v in state_of(self.optimizer, p, known.update).items()}
        return make_tasks(self.program, x, y, known, moments)[0]

    def feeds(self, x: Any, y: Any) -> dict[str, Any]:
        lr = torch.tensor(LEARNING_RATE)
        step = torch.tensor(self.program.step_count)
        return {**self.state, "input:0": x, "target:0": y, "seed": torch.tensor(SEED), "step": step, "lr": lr}

    def step(self, samples: int, seed: int) -> tuple[dict[str, Any], Tensor]:
        """Both take a step: what the exported one returns, and the program's loss."""
        x, y = self.case.data(samples, seed, self.case.dtype)
        found = self.session(self.feeds(x, y))
        loss = self.program.step(x, y)
        update(self.program, self.optimizer)
        self.state = {key: found[f"new:{key}"] for key in self.state}
        return found, loss


@functools.cache
def pair_of(name: str) -> Pair:
    """The pair of a case, made once; whoever uses it takes it in the state that the last one left."""
    return Pair(CASES[name])
