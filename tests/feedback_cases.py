"""Programs with learned feedback and what their gradients are held against.

Statistics: `BOUND` = 6 standard errors are exceeded by chance in 2e-9 of all comparisons.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward.runtime.feedback import FeedbackState

BOUND = 6.0
DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def program_for(model: nn.Module, x: Tensor, loss: Any = F.cross_entropy, **settings: Any) -> onward.Program:
    estimator = onward.LikelihoodRatio.feedback_learned(**{"warmup": 0, **settings})
    return onward.compile(model, x, loss=loss, estimator=estimator)


def gradients(program: onward.Program, x: Tensor, y: Any) -> Tensor:
    program.model.zero_grad()
    program.step(x, y)
    return torch.cat([p.grad.flatten() for p in program.model.parameters()])  # type: ignore[union-attr]


def exact(model: nn.Module, x: Tensor, y: Any, loss: Any = F.cross_entropy) -> Tensor:
    found = torch.autograd.grad(loss(model(x), y).mean(), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in found])


def random_jacobians(program: onward.Program, scale: float = 0.5) -> FeedbackState:
    assert program.feedback is not None
    jacobians = {i: scale * normal(*j.shape, seed=5 + i).to(j.dtype) for i, j in program.feedback.jacobians.items()}
    return replace(program.feedback, jacobians=jacobians)


def assert_unbiased(
    program: onward.Program, x: Tensor, y: Any, expected: Tensor, steps: int = 60, scale: float = 0.5
) -> None:
    """With random Jacobians, the same each step; what is left of σ² is below the rounding allowed. Without any noise
    point the gradient is backpropagation's."""
    wrong = random_jacobians(program, scale)
    rows = []
    for _ in range(steps if wrong.jacobians else 1):
        program.feedback = wrong
        rows.append(gradients(program, x, y))
    error = torch.stack(rows).std(0) / len(rows) ** 0.5 if wrong.jacobians else torch.zeros(())
    assert bool(((torch.stack(rows).mean(0) - expected).abs() <= BOUND * error + 1e-5).all())
    assert float(error.max()) < 0.1 * float(expected.abs().max()), "too noisy to notice anything"
