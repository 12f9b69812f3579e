"""Rules of ONNX's operators: each against torch, at two batch sizes other than the one in the trace.

The operations are in `onnx_operator_cases`: traced with a free batch size, emitted, checked and run by ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from onnx_operator_cases import CASES, B, Case, X, case, ints, real
from onnx_session import exported
from torch import Tensor, fx

from onward.compiler.to_onnx.emit import RULES, operation
from onward.compiler.to_onnx.trace import Like, trace
from onward.passes.errors import ExportError

BATCHES = 2, 5
NAMED = {each.name: each for each in CASES}
ELSEWHERE = {
    "onward.perturb.default": "test_to_onnx_noise.py",
    "onward.weighted_noise.default": "test_to_onnx_noise.py",
    "onward.weighted_noise_sum.default": "test_to_onnx_noise.py",
    "onward.keyed_random.default": "test_to_onnx_noise.py",
    "onward.stochastic_sign.default": "test_to_onnx_noise.py",
}
"""Rules that no case reaches, and where they are tested: they need keys and copies."""


def flat(function: Callable[..., Any]) -> Callable[..., Sequence[Any]]:
    def run(*given: Any) -> Sequence[Any]:
        found = function(*given)
        return found if isinstance(found, (tuple, list)) else [found]

    return run


@cache
def traced(name: str) -> fx.GraphModule:
    """The graph of a case, traced once."""
    each = NAMED[name]
    return trace(flat(each.function), [Like(sample.shape, sample.dtype) for sample in each.given])


def test_names_are_different() -> None:
    assert len(NAMED) == len(CASES)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", NAMED)
def test_rule_is_torchs_operation(name: str) -> None:
    each = NAMED[name]
    run = exported(traced(name), [Like(sample.shape, sample.dtype) for sample in each.given])
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(batch)
        given = [sample.of(batch, generator) for sample in each.given]
        found = run({f"x{place}": value for place, value in enumerate(given)})
        expected = flat(each.function)(*given)
        for (place, mine), theirs in zip(found.items(), expected, strict=True):
            where = f"{place} of a batch of {batch}"
            assert mine.dtype == theirs.numpy().dtype, where
            assert mine.shape == tuple(theirs.shape), where
            close(mine, theirs.numpy(), each.tolerance, where)


def close(mine: Any, theirs: Any, tolerance: float, where: str) -> None:
    """Equal up to a tolerance of the largest finite number; whole numbers exactly."""
    if theirs.dtype.kind != "f":
        np.testing.assert_array_equal(mine, theirs, where)
        return
    finite = theirs[np.isfinite(theirs)]
    largest = float(np.abs(finite).max()) if finite.size else 0.0
    np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance * largest, err_msg=where)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_every_rule_is_reached() -> None:
    reached = {operation(node) for name in NAMED for node in traced(name).graph.nodes if node.op == "call_function"}
    assert set(RULES) - reached == set(ELSEWHERE)


REFUSED: list[tuple[Case, str]] = [
    (case("mask", lambda x: x[:, torch.tensor([True, False, True])] * 1, X), "mask|fixed|depends on values"),
    (case("whole axes between", lambda x, i: x[:, i, :, i], real(B, 3, 2, 4), ints(2, low=0, high=2)), "whole axes"),
    (case("scatter mean", lambda x, i, y: x.scatter_reduce(1, i, y, "mean"), X, ints(B, 3, low=0, high=2), X), "mean"),
    (case("pooling in windows of two sizes", lambda x: aten_pool(x, 2), real(B, 1, 5, 5)), "two sizes"),
    (case("no rule", lambda x: torch.special.i0(x), X), r"aten.i0.default has no rule .* comes from"),
    (case("a size that is no multiple", lambda x: x[1:], X), "no multiple of the batch size"),
    (case("a size of the batch alone", lambda x: torch.zeros(x.shape[0] + 1).sum() + x, X), "which no tensor"),
    (case("batch size fixed", lambda x: x.view(10, -1), X), "would have to be fixed"),
]


def aten_pool(x: Tensor, size: int) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(x, size)


@pytest.mark.parametrize(("each", "message"), REFUSED, ids=[each.name for each, _ in REFUSED])
def test_what_has_no_form_is_refused(each: Case, message: str) -> None:
    kinds = [Like(sample.shape, sample.dtype) for sample in each.given]
    with pytest.raises(ExportError, match=message):
        exported(trace(flat(each.function), kinds), kinds)
