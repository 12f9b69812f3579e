"""Steps inside ``torch.autocast``: forwards in 16 bits, gradients and feedback in float32, close to the wide ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executor_cases import CASES, compiled_for, data_of, mlp, model_for, same
from torch import Tensor, nn

import onward
from onward.runtime.execution.precision import outside_autocast
from onward.runtime.execution.streams import StreamedExecutor


def gradient(program: onward.Program, case: str, dtype: torch.dtype | None) -> Tensor:
    """That of some steps, with the weights as they are."""
    x, y = data_of(case)
    program.model.zero_grad()
    for _ in range(4):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = program.step(x, y)
        assert loss.dtype == torch.float32
    found = [parameter.grad for parameter in program.model.parameters() if parameter.grad is not None]
    assert {each.dtype for each in found} == {torch.float32}
    return torch.cat([each.flatten() for each in found])


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_float32_but_for_rounding(case: str) -> None:
    seen = []

    def loss(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        seen.append(output.dtype)
        return F.cross_entropy(output, target, reduction=reduction)

    narrow = onward.Program(model_for(case), compiled_for(case), loss, 3)
    wide = onward.Program(model_for(case), narrow.compiled, F.cross_entropy, 3)
    expected, found = gradient(wide, case, None), gradient(narrow, case, torch.bfloat16)
    assert set(seen) == {torch.bfloat16}
    assert expected.norm() > 0
    assert not torch.equal(expected, found)
    assert F.cosine_similarity(expected, found, dim=0) > 0.99
    assert 0.95 < found.norm() / expected.norm() < 1.05
    if narrow.feedback is not None:
        assert {jacobian.dtype for jacobian in narrow.feedback.jacobians.values()} == {torch.float32}


def test_no_bit_depends_on_the_streams_inside_autocast_either() -> None:
    case = "shrunk"
    torch.manual_seed(0)
    model = mlp()
    serial = onward.compile(model, data_of(case)[0], loss=F.cross_entropy, estimator=CASES[case][1], seed=3)
    streamed = onward.Program(copy.deepcopy(model), serial.compiled, F.cross_entropy, 3)
    streamed.executor = StreamedExecutor(serial.compiled, streamed.sigmas, 3)
    assert same([gradient(serial, case, torch.bfloat16)], [gradient(streamed, case, torch.bfloat16)])


def test_products_outside_autocast_are_exact() -> None:
    """Only inside autocast are arguments widened, and autocast is off then; it is on again behind."""
    one = torch.full((2, 2), 1 + 2.0**-10)

    def product(first: Tensor, second: Tensor, other: Any) -> tuple[Tensor, torch.dtype, Any]:
        return first @ second, second.dtype, other

    assert outside_autocast(product)(one, one.bfloat16().float(), "same")[1] == torch.float32
    assert outside_autocast(lambda value: value.dtype)(one.bfloat16()) == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, dtype, other = outside_autocast(product)(one, one.bfloat16(), "same")
        assert (found.dtype, dtype, other) == (torch.float32, torch.float32, "same")
        assert torch.equal(found, torch.full((2, 2), 2 + 2.0**-9))
        assert nn.functional.linear(one, one).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
