"""The memory of a step: what is predicted is what is used, budgets hold, values go when they are read, nothing leaks.

Judges: torch's profiler, which sees every allocation of a tensor's memory, also inside kernels; tracemalloc for NumPy's
arrays; arithmetic on sizes.
"""

from __future__ import annotations

import functools
import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward.runtime.program  # registers the operators' kernels, which cases below call
from onward import LikelihoodRatio, models
from onward.compiler.driver import compile_model
from onward.compiler.program import CompiledModel
from onward.passes import ops
from onward.passes.errors import OptionError
from onward.runtime.execution.step import Step
from onward.runtime.memory.budget import parse_memory, total_bytes, with_chunk, within
from onward.runtime.memory.kernels import NOISE_ARRAYS, temporary
from onward.runtime.memory.live import LiveBytes
from onward.runtime.memory.rehearsal import COMMIT, MEASURE, rehearse
from onward.runtime.schedule.tasks import make_tasks

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")  # sums of several threads take buffers of their own


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> None:
    """Measuring collects garbage first, which takes seconds a time when earlier tests have left a million objects."""
    gc.collect()
    gc.freeze()


def peak_of_tensors(run: Callable[[], object]) -> int:
    """Bytes that torch's allocator gave out at most, beyond what was out before: exact, whatever runs beside."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def peak_of_arrays(run: Callable[[], object]) -> int:
    """The same of NumPy's arrays."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - before


def resnet(norm: str = "none") -> tuple[nn.Module, Tensor]:
    return models.resnet5(num_classes=10, in_channels=3, width=16, norm=norm), torch.randn(32, 3, 16, 16)


def mlp() -> tuple[nn.Module, Tensor]:
    return models.mlp(hidden=(256, 256)), torch.randn(64, 64)


def vit() -> tuple[nn.Module, Tensor]:
    return models.vit(width=32, depth=1), torch.randn(64, 1, 8, 8)


@functools.cache
def graphs_of(make: Callable[[], tuple[nn.Module, Tensor]], estimator: LikelihoodRatio) -> CompiledModel:
    """Compiled once: many tests look at the same program from different sides."""
    torch.manual_seed(0)
    model, inputs = make()
    return compile_model(model, inputs, estimator)


def compiled(
    make: Callable[[], tuple[nn.Module, Tensor]], estimator: LikelihoodRatio, **options: Any
) -> tuple[onward.Program, Tensor, Tensor]:
    graphs = None if options else graphs_of(make, estimator)
    torch.manual_seed(0)
    model, inputs = make()
    if graphs is None:
        program = onward.compile(model, inputs, loss=F.cross_entropy, estimator=estimator, seed=1, **options)
    else:
        program = onward.Program(model, graphs, F.cross_entropy, 1)
    return program, inputs, torch.randint(10, (len(inputs),))


def step(program: onward.Program, inputs: Tensor, target: Tensor) -> None:
    """One with everything in it: new gradients, a perturbed run, σ measured if the estimator does that."""
    for parameter in program.model.parameters():
        parameter.grad = None
    program.next_probe = program.next_calibration = 0
    program.step(inputs, target)


JOINT = LikelihoodRatio(groups="joint", copies=16, chunk=8)
LAYERWISE = LikelihoodRatio(copies=16, chunk=8)
ALIVE = LikelihoodRatio(groups="joint", copies=16, chunk=8, placement="alive")
LEARNED = LikelihoodRatio.feedback_learned(copies=4)
CASES = {
    "joint mlp": (mlp, JOINT),
    "joint resnet": (resnet, JOINT),
    "joint resnet, all at once": (resnet, replace(JOINT, chunk=None)),
    "layerwise resnet": (resnet, LAYERWISE),
    "one number a batch": (resnet, LikelihoodRatio(groups="joint", copies=16, credit="batch")),
    "batch statistics": (lambda: resnet("batch"), JOINT),
    "not antithetic": (resnet, LikelihoodRatio(groups="joint", copies=15, chunk=4, antithetic=False)),
    "alive resnet": (resnet, ALIVE),
    "weight noise": (resnet, LikelihoodRatio(groups="joint", copies=8, noise_on="sample")),
    "blocks": (resnet, LikelihoodRatio(groups="joint", copies=8, placement="alive", blocks=4)),
    "learned mlp": (mlp, LEARNED),
    "learned resnet": (resnet, LEARNED),
    "learned vit, of rank 4": (vit, replace(LEARNED, rank=4)),
    "part of the batch": (resnet, replace(LEARNED, probe=0.25)),
    "corrected": (resnet, replace(LEARNED, correction="full", reach=1)),
    "shrunk": (resnet, replace(LEARNED, correction="shrunk")),
    "auto resnet": (resnet, LikelihoodRatio.auto()),
}


@pytest.mark.parametrize("case", CASES)
def test_the_predicted_peak_is_the_measured_one(case: str) -> None:
    """Within 5 %, of tensors; most are equal to the byte but for what the loss is taken to need."""
    program, *batch = compiled(*CASES[case])
    predicted = rehearse(program.compiled)
    step(program, *batch)  # the first fills caches
    measured = peak_of_tensors(lambda: step(program, *batch))
    assert measured > 2**19
    assert 0.95 <= predicted.tensors / measured <= 1.05, (predicted.tensors, measured, predicted.at)


@pytest.mark.parametrize("capture", ["sign", "stochastic", "stochastic-4"])
def test_packed_captures_are_predicted(capture: str) -> None:
    """Signs are packed in NumPy's memory, so the judge is what is alive in a real step, operation by operation."""
    program, *batch = compiled(resnet, replace(JOINT, capture=capture))
    predicted = rehearse(program.compiled)
    step(program, *batch)
    given, *_ = program.bind(*batch)
    live = LiveBytes()
    live.ignore(*(value for value in given.environment.values() if isinstance(value, Tensor)))
    with torch.no_grad(), live:
        program.executor.run(given)
    assert predicted.tensors == pytest.approx(live.tensors, rel=0.01)
    assert capture in ops.LEVEL_BITS or peak_of_arrays(lambda: step(program, *batch)) > 2**16


@pytest.mark.parametrize("settings", [JOINT, LAYERWISE, LEARNED, LikelihoodRatio.auto()], ids=str)
def test_a_plan_adds_up(settings: LikelihoodRatio) -> None:
    program, inputs, _ = compiled(resnet, settings)
    plan = rehearse(program.compiled)
    largest = max(plan.actions, key=lambda action: action.peak)
    assert (largest.name, largest.peak) == (plan.at, plan.peak)
    assert sum(plan.parts.values()) == plan.peak
    assert plan.tensors <= plan.peak <= plan.tensors + NOISE_ARRAYS + 2**22
    names = [action.name for action in plan.actions]
    measures = [MEASURE] if settings.sigma == "auto" else []
    assert names == [*measures, *map(str, program.executor.fused(program.executor.plan)), COMMIT]
    assert plan.samples == len(inputs)
    parameters = sum(parameter.nbytes for parameter in program.model.parameters())
    assert plan.actions[-1].own == pytest.approx(parameters, abs=2**12)
    half = rehearse(program.compiled, len(inputs) // 2)
    assert 0.4 * plan.peak < half.peak < 0.75 * plan.peak


def test_nothing_is_computed() -> None:
    """A step of a million samples, in no time and without the memory."""
    program, *_ = compiled(mlp, JOINT)
    arrays = peak_of_arrays(lambda: rehearse(program.compiled, 10**6))
    plan = rehearse(program.compiled, 10**6)
    assert plan.peak > 8 * 10**6 * 256 * 4
    assert arrays < 2**24


def test_chunks_between_the_second_and_the_last_are_not_rehearsed() -> None:
    """They take what the second takes; their losses are counted all the same."""
    program, inputs, _ = compiled(mlp, LikelihoodRatio(groups="joint", copies=400, chunk=2))
    few = rehearse(with_chunk(program.compiled, 100))
    many = rehearse(program.compiled)
    assert len(many.actions) < 40 < len(program.executor.plan)
    assert many.actions[-2].after - few.actions[-2].after == 0
    held = 400 * len(inputs) * 4  # losses are kept until their gradients are done
    assert many.actions[-2].after >= held


# --- captures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("capture", "scale"), [("sign", 0), ("stochastic", 4)])
@pytest.mark.parametrize("copies", [2, 50, 200])
def test_packed_captures_take_a_twenty_eighth(copies: int, capture: str, scale: int) -> None:
    """By arithmetic: one bit an element behind a ReLU, two of the input; with ``"stochastic"`` a scale a sample."""
    make = lambda: (models.mlp(hidden=(1024, 1024)), torch.randn(4, 64))  # noqa: E731
    exact, packed = (
        rehearse(compiled(make, LikelihoodRatio(groups="joint", copies=copies, capture=kind))[0].compiled)
        for kind in ("exact", capture)
    )
    rows = 4 * copies
    assert exact.captures == rows * 4 * 2 * 1024  # the input is not the step's
    assert packed.captures <= rows * (2 * 1024 // 8 + 2 * 64 // 8 + 3 * scale)
    assert packed.captures <= exact.captures / 28


def test_captures_of_the_clean_run_do_not_grow_with_the_copies() -> None:
    plans = [
        rehearse(compiled(resnet, LikelihoodRatio(groups="joint", copies=copies, placement="alive"))[0].compiled)
        for copies in (50, 200, 1000)
    ]
    assert len({plan.captures for plan in plans}) == 1
    assert plans[0].peak < plans[1].peak < plans[2].peak  # the copies themselves do, unless they run in chunks


@pytest.mark.parametrize("settings", [{}, {"placement": "alive"}, {"capture": "sign"}], ids=str)
def test_in_chunks_the_peak_is_flat_in_the_copies(settings: dict[str, Any]) -> None:
    """But for the losses, four bytes a copy and sample, weights of the same size, and their differences."""
    plans = [
        rehearse(compiled(resnet, LikelihoodRatio(groups="joint", copies=copies, chunk=50, **settings))[0].compiled)
        for copies in (100, 1000)
    ]
    assert 0 <= plans[1].peak - plans[0].peak <= 4 * 900 * 32 * 4


def test_measured_captures_are_packed() -> None:
    """One point, measured: a chunk's captures, as a step holds them."""
    held = {}
    for capture in ("exact", "sign"):
        program, inputs, target = compiled(mlp, LikelihoodRatio(groups="joint", copies=64, capture=capture))
        given, *_ = program.bind(inputs, target)
        running = Step(program.executor, given)
        with torch.no_grad():
            for action in program.executor.plan[:-3]:  # all but the gradients
                program.executor.do(running, action, 0)
        chunk = running.perturbed[0, 0]
        captures = {key: value for key, value in chunk.items() if key.startswith("capture:")}
        storages = {value.untyped_storage()._cdata: value.untyped_storage().nbytes() for value in captures.values()}
        held[capture] = sum(storages.values())
        clean = [value for key, value in running.environment.items() if key.startswith("capture:")]
        assert rehearse(program.compiled).captures == held[capture] + sum(
            value.untyped_storage().nbytes() for value in clean if value is not inputs
        )
    assert held["sign"] <= held["exact"] / 28


# --- kernels ----------------------------------------------------------------------------------------------------------

KEY = torch.zeros(2, dtype=torch.int64)
PAIRS = torch.tensor([0, 1, ~0, ~1])
SIZES = [1, 16, 32, 32]
X = torch.randn(64, 16, 32, 32)
ALIVE_OF_X = X > 0
CONV = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}


def weight_noise(on: str, x_tiled: bool) -> tuple[Any, ...]:
    z, x = torch.randn(32, 16, 16, 16), torch.randn(32 * (4 if x_tiled else 1), 16, 16, 16)
    where = (KEY, torch.ones(1), 0, "rademacher", [1, 16, 16, 16], 0, 1, False, x, x_tiled)
    return (z, PAIRS, *where, on, "convolution", [16, 16, 3, 3], True, [1, 1], [1, 1], [1, 1], 1)


def convolution(channels: int) -> tuple[Any, ...]:
    return (torch.randn(64, channels, 16, 16), torch.randn(32, channels, 3, 3), None, *CONV.values(), False, [0, 0], 1)


def backward(mask: list[bool]) -> tuple[Any, ...]:
    x, weight = torch.randn(64, 16, 16, 16), torch.randn(32, 16, 3, 3)
    return (torch.randn(64, 32, 16, 16), x, weight, [32], *CONV.values(), False, [0, 0], 1, mask)


ONE_BIT = ops.pack_signs(X, "nonnegative", 0)
TWO_BITS = ops.pack_signs(X, "signed", 0)
PERTURB = (KEY, torch.ones(1), 0, "rademacher", SIZES, 0, 1, False)
KERNELS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "convolution": (torch.ops.aten.convolution.default, convolution(16)),
    "convolution of few channels": (torch.ops.aten.convolution.default, convolution(3)),
    "its weight's gradient": (torch.ops.aten.convolution_backward.default, backward([False, True, False])),
    "its input's gradient": (torch.ops.aten.convolution_backward.default, backward([True, False, False])),
    "noise": (ops.perturb, (X, PAIRS, *PERTURB)),
    "noise where alive": (ops.perturb, (X, PAIRS, *PERTURB, ALIVE_OF_X)),
    "noise tied over blocks": (ops.perturb, (X, PAIRS, *PERTURB, ALIVE_OF_X, [1, 1, 1, 4, 4])),
    "noise on a weight": (ops.perturb_weight, weight_noise("weight", False)),
    "noise on a weight, by sample": (ops.perturb_weight, weight_noise("sample", False)),
    "noise on a weight, tiled": (ops.perturb_weight, weight_noise("sample", True)),
    "weighted noise": (ops.weighted_noise, (torch.randn(4, 64), PAIRS, KEY, 0, "rademacher", "exact", SIZES, 0, 1)),
    "its sum": (ops.weighted_noise_sum, (torch.randn(4, 64), PAIRS, KEY, 0, "gaussian", "exact", SIZES, 0, 1)),
    "one bit": (ops.pack_signs, (X, "nonnegative", 0)),
    "a mask times numbers": (torch.ops.aten.mul.Tensor, (ALIVE_OF_X, X)),
    "two bits": (ops.pack_signs, (X, "signed", 0)),
    "two bits at random": (ops.pack_stochastic_signs, (X, torch.tensor(3.0), PAIRS[:1], KEY, 0, "signed", SIZES, 0, 1)),
    "one bit unpacked": (ops.unpack_signs, (ONE_BIT, "nonnegative", [64, *SIZES[1:]], 0, torch.float32)),
    "two bits unpacked": (ops.unpack_signs, (TWO_BITS, "signed", [64, *SIZES[1:]], 0, torch.float32)),
    "blocks counted": (
        ops.count_blocks,
        (torch.zeros(64, 16, 8, 8), ALIVE_OF_X, SIZES, 0, 1, [1, 1, 1, 4, 4]),
    ),
    "blocks spread": (ops.spread_blocks, (torch.randn(64, 16, 8, 8), SIZES, 0, 1, [1, 1, 1, 4, 4])),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_kernels_take_for_themselves(kernel: str) -> None:
    """Within a tenth of all they take, result included; of NumPy's arrays, the bound of small ones apart."""
    function, arguments = KERNELS[kernel]
    results: list[Any] = []
    run = lambda: results.append(function(*arguments))  # noqa: E731
    run()
    (result,) = results
    results.clear()
    tensors, arrays = peak_of_tensors(run), peak_of_arrays(run)
    made = [one for one in (result if isinstance(result, tuple) else (result,)) if isinstance(one, Tensor)]
    size = sum(one.nbytes for one in made)
    own = temporary(function, arguments, result)
    slack = NOISE_ARRAYS if own.arrays == NOISE_ARRAYS else 2**16
    assert own.tensors + own.arrays + size == pytest.approx(tensors + arrays, rel=0.1, abs=slack)


# --- values go when they are read -------------------------------------------------------------------------------------


def in_any_order(program: onward.Program, batch: list[Tensor], seed: int) -> Step:
    """A step whose tasks ran in a random order of those that their graph allows for two workers."""
    tasks = make_tasks(program.compiled, program.executor.plan, in_flight=2)
    chance = Random(seed)
    done: set[int] = set()
    running = Step(program.executor, program.bind(*batch)[0])
    while len(done) < len(tasks):
        at = chance.choice([at for at, task in enumerate(tasks) if at not in done and done.issuperset(task.after)])
        program.executor.do(running, tasks[at].action, 0)
        done.add(at)
    return running


@pytest.mark.parametrize("case", ["joint resnet", "layerwise resnet", "part of the batch", "corrected", "auto resnet"])
def test_values_go_when_the_last_reader_is_done(case: str) -> None:
    """In any order that the tasks allow, and no bit depends on it."""
    program, *batch = compiled(*CASES[case])
    executor = program.executor
    with torch.no_grad():
        expected = executor.run(program.bind(*batch)[0]).gradients
        for seed in range(3):
            running = in_any_order(program, batch, seed)
            assert not [key for key in running.environment if key.startswith(("value:", "capture:"))]
            assert not running.narrowed
            assert not running.perturbed
            assert all(torch.equal(expected[name], found) for name, found in running.result.gradients.items())


def test_a_step_without_a_perturbed_run_does_not_keep_what_only_that_reads() -> None:
    program, *batch = compiled(resnet, replace(LEARNED, warmup=0))
    kept: dict[bool, set[str]] = {}
    for perturbed in (True, False):
        given = replace(program.bind(*batch)[0], perturbed=perturbed)
        running = Step(program.executor, given)
        with torch.no_grad():
            for action in program.executor.clean_plan[: len(program.compiled.stages)]:
                program.executor.do(running, action, 0)
        kept[perturbed] = {key for key in running.environment if key.startswith("value:")}
    assert kept[False] < kept[True]


def test_values_are_freed_in_the_course_of_a_step() -> None:
    """By the plan: behind all gradients nothing is left but they, the outputs and the losses."""
    program, inputs, _ = compiled(resnet, LAYERWISE)
    plan = rehearse(program.compiled)
    parameters = sum(parameter.nbytes for parameter in program.model.parameters())
    losses = 4 * 16 * len(inputs) * len(program.compiled.runs)
    assert plan.actions[-2].after <= parameters + losses + 2**13
    assert max(action.after for action in plan.actions) > 4 * plan.actions[-2].after


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (1000, 1000), ("1000", 1000), ("1000 B", 1000), ("2KiB", 2048), ("2 kb", 2000), ("1.5MiB", 3 << 19),
        (np.int64(10**9), 10**9), (np.float32(0.5), total_bytes(CPU) // 2),
        ("2GiB", 2 << 30), ("3GB", 3 * 10**9), (0.5, total_bytes(CPU) // 2), ("0.5", total_bytes(CPU) // 2),
        (".25", total_bytes(CPU) // 4),
    ],
)  # fmt: skip
def test_memory_is_read(given: Any, count: int) -> None:
    assert parse_memory(given, CPU) == pytest.approx(count, abs=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("٢GiB", "expected a number"),
        ("2TiB", "expected a number with a unit"), ("GiB", "expected a number"), ("-1MiB", "expected a number"),
        (1.5, "between 0 and 1"), (0.0, "between 0 and 1"), ("1.5", "between 0 and 1"), (float("nan"), "between"),
        (0, "at least some bytes"), (-5, "at least some bytes"), (True, "number of bytes"), ([1], "number of bytes"),
    ],
)  # fmt: skip
def test_other_memory_is_refused(given: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_memory(given, CPU)


@pytest.mark.parametrize("settings", [replace(JOINT, chunk=None), replace(LAYERWISE, chunk=None), LEARNED], ids=str)
def test_a_budget_gets_the_largest_chunk_that_fits(settings: LikelihoodRatio) -> None:
    free, inputs, target = compiled(mlp, settings)
    most = settings.copies
    assert isinstance(most, int)
    peaks = {chunk: rehearse(with_chunk(free.compiled, chunk)).peak for chunk in range(2, most + 1, 2)}
    assert list(peaks.values()) == sorted(peaks.values())
    for budget in (peaks[2], peaks[2] + 1, peaks[most] - 1):
        chosen = within(free.compiled, budget).estimator.chunk
        assert chosen == max(one for one, peak in peaks.items() if peak <= budget)
    assert within(free.compiled, peaks[most]).estimator.chunk is None
    program, *_ = compiled(mlp, settings, memory=peaks[2])
    assert program.compiled.estimator.chunk == within(free.compiled, peaks[2]).estimator.chunk
    step(program, inputs, target)
    step(free, inputs, target)
    for mine, theirs in zip(program.model.parameters(), free.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)  # the same noise
    assert peak_of_tensors(lambda: step(program, inputs, target)) <= 1.05 * peaks[2]


def test_a_budget_below_the_smallest_chunk_says_what_that_takes() -> None:
    plan = rehearse(compiled(resnet, replace(JOINT, chunk=2))[0].compiled)
    with pytest.raises(OptionError) as caught:
        compiled(resnet, replace(JOINT, chunk=None), memory=plan.peak - 1)
    message = str(caught.value)
    assert f"a step of 32 samples takes {plan.peak / 2**20:.1f} MiB even with chunk=2, at {plan.at}: " in message
    assert all(part in message for part, size in plan.parts.items() if size > plan.peak / 50)
    with pytest.raises(OptionError, match="make the batch smaller"):  # copies go one at a time anyway
        compiled(lambda: resnet("batch"), LikelihoodRatio(groups="joint", copies=4, credit="batch"), memory=1000)


def test_a_chunk_and_a_budget_are_one_setting_too_many() -> None:
    with pytest.raises(OptionError, match="chunk=8 and memory= both say"):
        compiled(mlp, JOINT, memory="1GiB")


@pytest.mark.parametrize("case", ["joint resnet", "layerwise resnet", "learned resnet"])
def test_with_workers_the_prediction_is_a_bound(case: str) -> None:
    """Of what any order holds, here random ones with two runs begun, and for each more worker of the largest task."""
    program, *batch = compiled(*CASES[case])
    one, two, three = (rehearse(program.compiled, workers=workers) for workers in (1, 2, 3))
    assert three.peak - two.peak >= max(action.own for action in one.actions if action.name[0] in "PGL")
    assert two.peak >= one.peak + three.peak - two.peak
    for seed in range(3):
        with torch.no_grad():
            held = peak_of_tensors(lambda seed=seed: in_any_order(program, batch, seed))
        assert held <= two.tensors


# --- nothing leaks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def usual_collector():
    """Python's own thresholds, not those of the tests: with them garbage waits for less than the steps before."""
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


@pytest.mark.usefixtures("usual_collector")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's count of resident pages")
@pytest.mark.parametrize("estimator", [LikelihoodRatio(groups="joint", copies=4), LikelihoodRatio.auto()], ids=str)
def test_thousands_of_steps_leave_nothing_behind(estimator: LikelihoodRatio) -> None:
    make = lambda: (models.mlp(hidden=(8,)), torch.randn(4, 64))  # noqa: E731
    program, inputs, target = compiled(make, estimator)

    def state(steps: int) -> tuple[int, int]:
        for _ in range(steps):
            program.step(inputs, target)
        gc.collect()
        tensors = sum(issubclass(type(one), Tensor) for one in gc.get_objects())
        return tensors, int(Path("/proc/self/statm").read_text().split()[1])

    state(300)
    before, pages = state(20)
    after, grown = state(1000)
    assert after == before
    assert grown - pages < 128  # half a MiB: a tensor of 100 bytes a step would be there to see in their number already
