"""The Triton kernels give the definitions' numbers; one that does not is noticed, named and left out.

The calls are in `kernel_cases`. Without a GPU Triton interprets the kernels, and compiles them for one, each in a
process of its own, since both change Triton as a whole.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import kernel_cases
import pytest
import torch
from torch import Tensor

from onward.runtime.noise import kernels
from onward.runtime.noise.kernels import proof
from onward.runtime.noise.kernels.proof import Kernel, proved

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def script(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def failures(mode: str, **environment: str) -> dict[str, str]:
    outcomes = json.loads(script(str(Path(kernel_cases.__file__)), mode, **environment))
    assert len(outcomes) > 10
    return {name: outcome for name, outcome in outcomes.items() if outcome}


# ---------------------------------------------------------------------------------------------- the kernels


@needs_triton
def test_interpreted_kernels_equal_their_definitions() -> None:
    """Calls of every kernel, and training steps that take them."""
    wrong = failures("interpret", TRITON_INTERPRET="1", ONWARD_KERNELS="0")  # the CPU's own left out
    assert not wrong, "\n".join(f"{name}: {outcome}" for name, outcome in wrong.items())


@needs_triton
def test_kernels_compile_for_a_gpu_without_fused_or_approximate_arithmetic(tmp_path: Path) -> None:
    wrong = failures("compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert not wrong, "\n".join(f"{name}: {outcome}" for name, outcome in wrong.items())


@pytest.mark.gpu
@needs_triton
def test_kernels_on_a_gpu_equal_their_definitions() -> None:
    device = torch.device("cuda")
    for case in kernel_cases.all_cases():
        kernel_cases.check(case, device)
    for _, check in kernel_cases.other_checks():
        check(device)
    for _, estimator, used in kernel_cases.steps():
        kernel_cases.check_step(estimator, used, device)


@needs_triton
@pytest.mark.parametrize(("setting", "registered"), [("1", True), ("0", False)])
def test_kernels_are_registered_and_not_loaded_before_they_are_called(setting: str, registered: bool) -> None:
    """A torch that was built for CUDA is pretended; on the CPU it goes by the definitions."""
    code = """
import sys, torch
torch.backends.cuda.is_built = lambda: True
from onward.passes import ops
from onward.runtime.noise import kernels, packing
ops.pack_signs(torch.ones(2, 3), "binary", 0)
has = torch._C._dispatch_has_kernel_for_dispatch_key("onward::perturb", "CUDA")
print(kernels.serves(torch.device("cuda")), has, "onward.runtime.noise.kernels.table" in sys.modules)
"""
    assert script("-c", code, ONWARD_KERNELS=setting).split() == [str(registered), str(registered), "False"]


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="needs a torch that was built without CUDA")
def test_a_torch_without_cuda_gets_no_kernels() -> None:
    assert not kernels.serves(torch.device("cuda"))
    assert not kernels.serves(torch.device("cpu"))


# ---------------------------------------------------------------------------------------------- the proof


@pytest.fixture(autouse=True)
def _no_verdicts() -> Iterator[None]:
    before = dict(proof._verdicts)
    proof._verdicts.clear()
    yield
    proof._verdicts.clear()
    proof._verdicts.update(before)


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *args: object) -> Tensor:
        self.calls += 1
        return self.function(*args)


def kernel_of(launch: Callable[..., Tensor]) -> tuple[Kernel, Counted, Counted]:
    """A kernel that should double a tensor."""
    definition, launched = Counted(lambda x, *_: 2 * x), Counted(launch)
    return Kernel("double", definition, launched, lambda x, *_: x.dim() == 1), definition, launched


def test_a_kernel_that_agrees_is_used_alone_from_then_on() -> None:
    kernel, definition, launched = kernel_of(lambda x, *_: x + x)
    x = torch.tensor([1.0, torch.nan, -torch.inf])
    for _ in range(3):
        torch.testing.assert_close(proved(kernel, x), 2 * x, equal_nan=True)
    assert (definition.calls, launched.calls) == (1, 3)


def test_a_kernel_is_not_asked_for_what_it_does_not_cover() -> None:
    kernel, definition, launched = kernel_of(lambda x, *_: x + x)
    assert torch.equal(proved(kernel, torch.ones(1, 1)), torch.full((1, 1), 2.0))
    assert (definition.calls, launched.calls) == (1, 0)


def unfinished(x: Tensor, *_: object) -> Tensor:
    raise RuntimeError("no shared memory left")


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        (lambda x, *_: 2 * x + torch.tensor([0.0, 0.5, 0.0]), "differs in 1 of 3 numbers, by up to 0.5"),
        (lambda x, *_: x * torch.nan, "differs in 3 of 3 numbers"),
        (lambda x, *_: 2 * x[:2], r"gave torch.float32 \(2,\) for torch.float32 \(3,\)"),
        (lambda x, *_: (2 * x).double(), r"gave torch.float64 \(3,\)"),
        (unfinished, "could not be run: RuntimeError: no shared memory left"),
    ],
)
def test_a_wrong_kernel_is_named_once_and_replaced(launch: Callable[..., Tensor], said: str) -> None:
    kernel, _, launched = kernel_of(launch)
    x = torch.tensor([1.0, 2.0, 3.0])
    with pytest.warns(UserWarning, match=rf"'double' on cpu \(float32, gaussian\) {said}"):
        assert torch.equal(proved(kernel, x, "gaussian"), 2 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(proved(kernel, x, "gaussian"), 2 * x)
    assert launched.calls == 1
    with pytest.warns(UserWarning, match="laplace"):  # another kind of call is another proof
        proved(kernel, x, "laplace")


def test_a_kernel_without_memory_is_no_wrong_kernel() -> None:
    def launch(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    kernel, _, _ = kernel_of(launch)
    with pytest.raises(torch.OutOfMemoryError):
        proved(kernel, torch.ones(3))
    assert not proof._verdicts


def test_a_result_of_zeros_proves_nothing() -> None:
    kernel, _, launched = kernel_of(lambda x, *_: 3 * x)
    assert torch.equal(proved(kernel, torch.zeros(3)), torch.zeros(3))
    assert launched.calls == 0
    with pytest.warns(UserWarning, match="differs in 3 of 3"):
        proved(kernel, torch.ones(3))


@pytest.mark.parametrize("right", [True, False])
def test_a_kernel_may_be_proved_by_a_smaller_call(right: bool) -> None:
    kernel, definition, launched = kernel_of(lambda x, *_: x + x if right else 3 * x)
    kernel = replace(kernel, excerpt=lambda x: (x[:1],))
    x = torch.tensor([1.0, 2.0, 3.0])
    with contextlib.nullcontext() if right else pytest.warns(UserWarning, match="differs in 1 of 1 numbers"):
        assert torch.equal(proved(kernel, x), 2 * x)
    assert (definition.calls, launched.calls) == ((1, 2) if right else (2, 1))
    assert torch.equal(proved(kernel, x), 2 * x)
    proof._verdicts.clear()
    assert torch.equal(proved(kernel, torch.tensor([0.0, 2.0])), torch.tensor([0.0, 4.0]))  # this shows nothing
    assert not proof._verdicts


@pytest.mark.parametrize(("error", "trusted"), [(0.9, True), (1.1, False)])
def test_a_sum_may_be_rounded_in_another_order_within_its_bound(error: float, trusted: bool) -> None:
    kernel, _, _ = kernel_of(lambda x, *_: 2 * x + error)
    kernel = replace(kernel, reference=lambda x: (2 * x.double(), torch.ones(3)))
    x = torch.tensor([1.0, 2.0, 3.0])
    if trusted:
        assert torch.equal(proved(kernel, x), 2 * x + error)
        return
    with pytest.warns(UserWarning, match=r"by up to 1\.1"):
        assert torch.equal(proved(kernel, x), 2 * x)


def test_the_bounds_of_sums_are_tight_enough_to_see_a_wrong_number() -> None:
    """One draw missing, or one sign of a product flipped, is far outside."""
    pytest.importorskip("triton")
    from onward.runtime.noise.kernels.table import KERNELS

    cases = [*kernel_cases.noise_cases(), *kernel_cases.gradient_cases(), *kernel_cases.product_cases()]
    summing = [case for case in cases if KERNELS[case.kernel].reference is not None]
    assert len(summing) > 100
    for case in summing:
        kernel = KERNELS[case.kernel]
        assert kernel.reference is not None
        expected, bound = kernel.reference(*case.args)
        definition = kernel.definition(*case.args)
        coarse = case.kernel.startswith("packed") and definition.dtype != torch.float32  # torch's products of 16 bits
        assert coarse or bool(((definition.double() - expected).abs() <= bound).all())
        scale = math.sqrt(float(expected.square().mean()))
        assert float(bound.max()) < (0.05 if definition.dtype == torch.bfloat16 else 0.01) * scale
