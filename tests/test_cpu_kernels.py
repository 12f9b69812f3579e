"""The compiled operators of noise give the definitions' bits, for any call, with any cache, in any thread."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from onward.passes import ops
from onward.passes.errors import OptionError, UnknownNameError
from onward.passes.graph import Layout
from onward.passes.tie_blocks import grid
from onward.runtime.noise import operators as definitions
from onward.runtime.noise import source as noise_source
from onward.runtime.noise.distributions import NOISES
from onward.runtime.noise.source import Limits

if importlib.util.find_spec("numba") is None:
    pytest.skip("Numba is not installed", allow_module_level=True)

from onward.runtime.noise.cpu_kernels import compiled, table
from onward.runtime.noise.cpu_kernels.table import KERNELS, CompiledOperator, same_bits

KEY = torch.tensor([2**40 + 17, 5])
DTYPES = (torch.float32, torch.float64)
CPU = torch.device("cpu")


def agrees(name: str, *args: Any) -> None:
    """The compiled way takes the call, and gives the definition's bits."""
    row = KERNELS[name]
    assert row.kind_of(*args) is not None
    result = row.launch(*args)
    assert result.is_contiguous()
    assert same_bits(row.definition(*args), result)


def normal(shape: list[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    numbers.view(-1)[::5] = -0.0
    return numbers


def scaled(sizes: list[int], dim: int, count: int) -> list[int]:
    return [extent * count if axis == dim else extent for axis, extent in enumerate(sizes)]


class Calls:
    """What a hypothesis drew: a layout of up to a few thousand elements, copies, a key."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.dim = draw(st.sampled_from([-1, 0, 1, 2]))
        self.outer = draw(st.sampled_from([1, 1, 2, 3])) if self.dim >= 0 else 1
        small = [draw(st.integers(1, 4)) for _ in range(3)]
        small[draw(st.integers(0, 2))] = draw(st.sampled_from([1, 5, 64, 131, 900]))
        self.sizes = [extent * self.outer if axis == self.dim else extent for axis, extent in enumerate(small)]
        self.batch = draw(st.sampled_from([1, 2, 3, 17])) if self.dim >= 0 else 1
        ids = st.integers(-(2**33), 2**33) | st.sampled_from([0, 1, 2, -1, -2, -3])
        self.copies = draw(st.lists(ids, min_size=1, max_size=6 if self.dim >= 0 else 1))
        # seed and step are words of any size: what counts are 64 and 32 bits
        self.key = torch.tensor([draw(st.integers(-(2**63), 2**63 - 1)), draw(st.integers(-(2**40), 2**40))])
        self.site = draw(st.integers(0, 2**24 - 1))
        self.dtype = draw(st.sampled_from(DTYPES))

    @property
    def layout(self) -> tuple[list[int], int, int]:
        return self.sizes, self.dim, self.outer

    def shape(self, copies: int = 1) -> list[int]:
        return scaled(self.sizes, self.dim, self.batch * copies)


calls = st.composite(lambda draw: Calls(draw))()
noises = st.sampled_from([*NOISES])

# ------------------------------------------------------------------------------------------------- equal bits


@settings(deadline=None, max_examples=80)
@given(calls, noises, st.booleans(), st.booleans(), st.sampled_from([0.3, 1.0, 0.0, 1e-30, -2.5]))
def test_perturb(call: Calls, noise: str, tiled: bool, masked: bool, scale: float) -> None:
    z = normal(call.shape(len(call.copies) if tiled else 1), call.dtype)
    alive = normal(call.shape(), call.dtype, 1) > 0 if masked else None
    sigmas = torch.tensor([7.0, scale], dtype=torch.float64)
    if call.dtype == torch.float32:
        sigmas = sigmas.float()
    row = (z, torch.tensor(call.copies), call.key, sigmas)
    agrees("perturb", *row, 1, noise, *call.layout, tiled, alive)


@settings(deadline=None, max_examples=60)
@given(
    calls.filter(lambda call: call.dim >= 0),
    noises,
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.3, 0.0]),
    st.data(),
)
def test_blocks(call: Calls, noise: str, tiled: bool, masked: bool, scale: float, data: st.DataObject) -> None:
    sizes, dim, outer = call.layout
    layout = Layout(tuple(sizes), dim, outer)
    blocks = [
        data.draw(st.sampled_from([1, 2, 3, 7]).map(lambda block, e=extent: min(block, e))) for extent in layout.extents
    ]
    assume(any(block > 1 for block in blocks))
    z = normal(call.shape(len(call.copies) if tiled else 1), call.dtype)
    alive = normal(call.shape(), call.dtype, 1) > 0
    row = (z, torch.tensor(call.copies), call.key, torch.tensor([7.0, scale], dtype=torch.float64), 1, noise)
    agrees("perturb", *row, *call.layout, tiled, alive if masked else None, blocks)
    like = torch.empty(scaled(list(grid(layout, tuple(blocks)).sizes), dim, call.batch), dtype=call.dtype)
    agrees("count_blocks", like, alive, *call.layout, blocks)


@settings(deadline=None, max_examples=80)
@given(calls, noises, st.sampled_from(["exact", "sign"]), st.sampled_from(["weighted_noise", "weighted_noise_sum"]))
def test_weighted_noise(call: Calls, noise: str, score: str, operator: str) -> None:
    weights = normal([len(call.copies), call.batch], call.dtype)
    agrees(operator, weights, torch.tensor(call.copies), call.key, call.site, noise, score, *call.layout)


@settings(deadline=None, max_examples=40)
@given(calls, st.sampled_from(["whole", "sample", "last", "full"]))
def test_stochastic_sign(call: Calls, scale: str) -> None:
    x = normal(call.shape(len(call.copies)), call.dtype)
    others = [axis for axis in range(3) if axis != call.dim]
    scales = {"whole": x.abs().amax(), "sample": x.abs().amax(others, True), "last": x.abs().amax(-1, True)}
    values = scales.get(scale, x.abs() * 1.5)
    agrees("stochastic_sign", x, values, torch.tensor(call.copies), call.key, call.site, *call.layout)


@settings(deadline=None, max_examples=40)
@given(calls, st.sampled_from(["uniform", "normal"]), st.lists(st.integers(0, 90), max_size=2))
def test_keyed_random(call: Calls, distribution: str, size: list[int]) -> None:
    agrees("keyed_random", call.key, call.site, distribution, size, call.dtype, CPU)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("elements", [compiled.CHUNK - 1, compiled.CHUNK, compiled.CHUNK + 1, 3 * compiled.CHUNK + 77])
def test_a_tensor_of_several_chunks(noise: str, elements: int) -> None:
    """Every seam, for elements in one row and for rows that end inside a chunk."""
    copies = torch.tensor([2, -3, -1])
    weights = normal([3, 5], torch.float32)
    for sizes, dim, outer in [([1, elements], 0, 1), ([elements], -1, 1), ([elements, 1], 1, 1), ([1, 1], 0, 1)]:
        ids = copies if dim >= 0 else copies[:1]
        z = normal(scaled(sizes, dim, 5 if dim == 0 else 1), torch.float32)
        weighted = weights[: len(ids), : 5 if dim == 0 else 1]
        agrees("perturb", z, ids, KEY, torch.tensor([0.3]), 0, noise, sizes, dim, outer, False)
        for operator in ("weighted_noise", "weighted_noise_sum"):
            agrees(operator, weighted, ids, KEY, 0, noise, "exact", sizes, dim, outer)


def test_the_last_of_all_blocks_is_followed_by_the_first() -> None:
    """A block's number is a 32-bit word: counting goes around, as in the definition."""
    words = np.empty(compiled.CHUNK, np.uint32)
    first, count = 2**32 - 3, 8
    compiled._make_words(words, first, count, *(np.uint32(word) for word in (7, 8, 9, 10, 11)))
    lanes = noise_source.philox_lanes_numpy([7], first, count, noise_source.Key(10 | 11 << 32, 9, 8, 0))  # type: ignore[arg-type]
    assert words[: 4 * count].reshape(count, 4).T.tolist() == [lane[0].tolist() for lane in lanes]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_need_not_be_contiguous_or_without_gradient(dtype: torch.dtype) -> None:
    z = normal([6, 40, 3], dtype).transpose(0, 1).requires_grad_()
    alive = (normal([3, 6, 40], dtype) > 0).permute(2, 1, 0)
    ids = torch.tensor([0, -1, 9])[::2]
    weights = normal([40, 2], dtype).T
    agrees("perturb", z, ids, KEY, torch.tensor([0.5], dtype=dtype), 0, "gaussian", [1, 6, 3], 0, 1, False, alive)
    agrees("weighted_noise_sum", weights, ids, KEY, 0, "laplace", "sign", [1, 6], 0, 1)


def test_numbers_that_are_none() -> None:
    """Infinity and NaN come out where they do in the definition."""
    z = torch.tensor([[0.0, math.inf, -math.inf, math.nan, -0.0, 3.0]])
    scales = torch.tensor([math.inf])
    for row, args in [
        ("perturb", (z, torch.tensor([0, -1]), KEY, scales, 0, "gaussian", [1, 6], 0, 1, False, z > 0)),
        ("weighted_noise_sum", (z.T[:, :1], torch.arange(6), KEY, 0, "laplace", "exact", [1, 4], 0, 1)),
        ("stochastic_sign", (z, torch.tensor(3.0), torch.tensor([0]), KEY, 0, [1, 6], 0, 1)),
    ]:
        with np.errstate(invalid="ignore"):
            expected, actual = KERNELS[row].definition(*args), KERNELS[row].launch(*args)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_a_sum_of_draws_is_in_their_order_whatever_is_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain loop, one rounding a product and one a sum, is what both ways compute."""
    weights, draws = normal([9, 4], torch.float32), torch.arange(9)
    args = (weights, draws, KEY, 0, "gaussian", "exact", [1, 600], 0, 1)
    ones = torch.ones(9, 4)
    numbers = definitions.weighted_noise(ones, draws, KEY, 0, "gaussian", "exact", [1, 600], 0, 1).view(9, 4, 600)
    total = torch.zeros(4, 600)
    for each, factor in zip(numbers, weights, strict=True):
        total += each * factor[:, None]
    assert torch.equal(ops.weighted_noise_sum(*args), total)
    for limits in [Limits(64, 32, 64), Limits(1 << 15, 400, 1 << 17)]:  # one draw at a time, some draws
        monkeypatch.setattr(noise_source, "CPU_LIMITS", limits)
        assert torch.equal(definitions.weighted_noise_sum(*args), total)


# ------------------------------------------------------------------------------------------------- which way


class Counted:
    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: object) -> Tensor:
        self.calls += 1
        return self.function(*args)


def row_with(launch: Callable[..., Tensor]) -> tuple[CompiledOperator, Counted, Counted]:
    definition, launched = Counted(definitions.keyed_random), Counted(launch)
    return replace(KERNELS["keyed_random"], definition=definition, launch=launched, verdicts={}), definition, launched


UNIFORM = (KEY, 3, "uniform", [7], torch.float32, CPU)


def test_a_kind_of_call_is_tried_once() -> None:
    row, definition, launched = row_with(KERNELS["keyed_random"].launch)
    for _ in range(3):
        assert torch.equal(row(*UNIFORM), definitions.keyed_random(*UNIFORM))
    assert (definition.calls, launched.calls) == (1, 4)
    row(KEY, 3, "uniform", [7], torch.float64, CPU)
    assert (definition.calls, launched.calls) == (2, 6)


@pytest.mark.parametrize("failing", [False, True])
def test_a_compiled_operator_that_fails_its_trial_is_named_and_left_out(failing: bool) -> None:
    def launch(*args: Any) -> Tensor:
        if failing:
            raise RuntimeError("no compiler")
        return definitions.keyed_random(*args).nextafter(torch.tensor(1.0))

    row, definition, launched = row_with(launch)
    words = "RuntimeError: no compiler" if failing else "gives other numbers"
    with pytest.warns(UserWarning, match=rf"'keyed_random' \(uniform, float32\).*{words}.*ONWARD_KERNELS=0"):
        assert torch.equal(row(*UNIFORM), definitions.keyed_random(*UNIFORM))
    assert torch.equal(row(*UNIFORM), definitions.keyed_random(*UNIFORM))
    assert (definition.calls, launched.calls) == (3, 1)


def test_a_zero_of_the_other_sign_is_another_number() -> None:
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([-0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2, 3), torch.zeros(3, 2).T)


def test_what_is_not_compiled_goes_by_the_definition() -> None:
    z, ids, sigmas = torch.ones(2, 4, 6, 6), torch.tensor([0, -1]), torch.tensor([0.5])
    half = z.bfloat16()
    perturbed = KERNELS["perturb"]
    assert perturbed.kind_of(half, ids, KEY, sigmas, 0, "gaussian", [1, 4, 6, 6], 0, 1, False) is None
    assert KERNELS["count_blocks"].kind_of(z, None, [1, 4, 6, 6], 0, 1, [1, 1, 3, 3]) is None
    assert perturbed.kind_of(z, ids, KEY, sigmas, 0, "gaussian", [2, 4, 6, 6], -1, 1, False) is None
    with pytest.raises(UnknownNameError, match="noise"):
        ops.perturb(z, ids, KEY, sigmas, 0, "pink", [1, 4, 6, 6], 0, 1, False)
    with pytest.raises(UnknownNameError, match="score"):
        ops.weighted_noise(torch.ones(2, 2), ids, KEY, 0, "gaussian", "rank", [1, 4], 0, 1)
    with pytest.raises(OptionError, match="2 copies"):
        ops.perturb(z, ids, KEY, sigmas, 0, "gaussian", [2, 4, 6, 6], -1, 1, False)
    with pytest.raises(UnknownNameError, match="distribution"):
        torch.ops.onward.keyed_random(KEY, 0, "cauchy", [3], torch.float32, CPU)


def test_every_kind_of_call_passes_its_trial() -> None:
    """Whatever stood in Numba's cache. A trial that shows nothing would not be one."""
    for dtype in DTYPES:
        kinds: dict[str, list[Any]] = {"stochastic_sign": [(dtype,)]}
        kinds["perturb"] = [(noise, dtype, tied) for noise in NOISES for tied in (False, True)]
        kinds["count_blocks"] = [(dtype,)]
        kinds["weighted_noise"] = [(noise, score, dtype) for noise in NOISES for score in NOISES[noise].scores]
        kinds["weighted_noise_sum"] = kinds["weighted_noise"]
        kinds["keyed_random"] = [(name, dtype) for name in ("uniform", "normal")]
        assert kinds.keys() == table.KERNELS.keys()
        for name, each in kinds.items():
            for kind in each:
                args = KERNELS[name].trial(*kind)
                assert KERNELS[name].kind_of(*args) == kind
                result = KERNELS[name].launch(*args)
                assert same_bits(KERNELS[name].definition(*args), result)
                assert result.unique().numel() > 2
                assert max(x.numel() for x in (*args, result) if isinstance(x, Tensor)) > compiled.CHUNK


# ------------------------------------------------------------------------------------------------- processes


def script(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TRAINING = """
import sys
if {hidden}:
    sys.modules["numba"] = None
import torch
import torch.nn.functional as F
import onward.runtime.program
has = lambda: torch._C._dispatch_has_kernel_for_dispatch_key("onward::perturb", "CPU")
print(has(), "llvmlite" in sys.modules)
print("---")
estimators = [
    onward.LikelihoodRatio(copies=4, noise="gaussian", score="sign", capture="stochastic", groups="joint"),
    onward.LikelihoodRatio.feedback_learned(copies=4, correction="full"),
]
x, y = torch.linspace(-1, 1, 5 * 64).view(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4])
for estimator in estimators:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 40), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(40, 5)
    )
    program = onward.compile(model, (x,), loss=F.cross_entropy, estimator=estimator, seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        program.step(x, y)
        optimizer.step()
        optimizer.zero_grad()
    for parameter in model.parameters():
        print(parameter.detach().view(torch.int32).flatten().tolist())
"""


def test_training_without_numba_gives_the_same_bits() -> None:
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda hidden: script(TRAINING.format(hidden=hidden)), [False, True]))
    (compiled_head, compiled_bits), (plain_head, plain_bits) = (output.split("---") for output in outputs)
    assert compiled_head.split() == ["True", "False"]  # registered, and not imported before the first noise
    assert plain_head.split() == ["False", "False"]
    assert len(compiled_bits) > 10000
    assert compiled_bits == plain_bits


def test_the_environment_leaves_them_out() -> None:
    code = """
import torch
from onward.runtime.noise import operators
print(torch._C._dispatch_has_kernel_for_dispatch_key("onward::perturb", "CPU"))
"""
    assert script(code, ONWARD_KERNELS="0").split() == ["False"]


@pytest.mark.parametrize("writable", [True, False], ids=["user's cache", "no cache"])
def test_a_folder_that_cannot_be_written(writable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba's cache goes to the user's folder; where that cannot be written either, there is none."""
    (tmp_path / "__pycache__").write_text("a file in the way, which stops root too")
    (tmp_path / "home").write_text("and another") if not writable else (tmp_path / "home").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    source = tmp_path / "installed.py"
    source.write_text("def twice(x):\n    return 2 * x\n")
    spec = importlib.util.spec_from_file_location("installed", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert compiled._compiled(module.twice)(21) == 42
    assert bool(list((tmp_path / "home").rglob("installed.twice*"))) == writable


# ------------------------------------------------------------------------------------------------- threads


def test_threads_that_call_at_once_get_the_same_bits() -> None:
    """First calls too: nothing has passed its trial when they begin."""
    z, sigmas = normal([40, 300], torch.float32), torch.tensor([0.3])
    row = replace(KERNELS["perturb"], verdicts={})

    def run(number: int) -> Tensor:
        return row(z, torch.tensor([number, ~number]), KEY, sigmas, 0, "gaussian", [1, 300], 0, 1, False)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, [n % 5 for n in range(40)]))
    for number, result in enumerate(results):
        expected = KERNELS["perturb"].definition(
            z, torch.tensor([number % 5, ~(number % 5)]), KEY, sigmas, 0, "gaussian", [1, 300], 0, 1, False
        )
        assert same_bits(result, expected)
    assert list(row.verdicts.values()) == [True]


def test_other_threads_run_meanwhile() -> None:
    """What another thread writes down in the middle half of a call shows that the call does not hold Python's lock."""
    moments: list[float] = []
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            moments.append(time.perf_counter())
            time.sleep(1e-4)

    z, sigmas = torch.zeros(256, 4096), torch.tensor([0.3])
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            begun = time.perf_counter()
            KERNELS["perturb"].launch(z, torch.tensor([0]), KEY, sigmas, 0, "gaussian", [1, 4096], 0, 1, False)
            took = time.perf_counter() - begun
            if any(begun + took / 4 < moment < begun + 3 * took / 4 for moment in moments[-1000:]):
                return
    finally:
        ended.set()
        writer.join()
    raise AssertionError("no other thread ran while noise was made")
