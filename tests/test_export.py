"""Exported training steps against the programs that they are of: losses, gradients, feedback and all that is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from export_cases import CASES, Pair

BATCHES = (6, 4, 9)
"""Of the three steps: the traced size, a smaller and a larger one."""


def distance(mine: Any, theirs: Any) -> float:
    """The largest difference, of the largest entry."""
    theirs = np.asarray(theirs)
    assert mine.shape == theirs.shape
    return float(np.abs(mine - theirs).max(initial=0)) / (float(np.abs(theirs).max(initial=0)) + 1e-30)


@pytest.mark.parametrize("name", CASES)
def test_step_is_the_programs(name: str) -> None:
    case, pair = CASES[name], Pair(CASES[name])
    for number, samples in enumerate(BATCHES):
        found, loss = pair.step(samples, number)
        assert bool(found["finite"])
        assert float(found["loss"]) == pytest.approx(float(loss), rel=1e-6)
        assert int(found["new:optimizer:steps"]) == number + 1
        for weight, parameter in pair.model.named_parameters():
            moment = pair.optimizer.state[parameter]["momentum_buffer"].numpy()
            where = f"{weight} in step {number}"
            assert distance(found[f"new:optimizer:{weight}.momentum_buffer"], moment) < case.tolerance, where
            assert distance(found[f"new:parameter:{weight}"], parameter.detach().numpy()) < case.tolerance, where
        for key, buffer in pair.model.named_buffers():
            if f"new:buffer:{key}" in found:
                assert distance(found[f"new:buffer:{key}"], buffer.numpy()) < case.tolerance, key
        feedback = pair.program.feedback
        if feedback is not None and feedback.jacobians:
            for site, jacobian in feedback.jacobians.items():
                assert distance(found[f"new:runtime:feedback.{site}"], jacobian.numpy()) < case.tolerance, site
            assert int(found["new:feedback:steps"]) == feedback.steps
            assert int(found["new:feedback:next_probe"]) == pair.program.next_probe
            assert float(found["new:feedback:overshoot"]) == pytest.approx(feedback.overshoot, rel=1e-5)
            assert float(found["new:feedback:explained_mean"]) == pytest.approx(feedback.explained_mean, rel=1e-4)
            slopes = [feedback.slopes.get(site, (0.0, 0.0)) for site in feedback.jacobians]
            assert distance(found["new:feedback:slopes"], slopes) < 1e-4
