"""Graphs compiled by torch's inductor: the numbers of plain FX to rounding, and plain FX where they are not."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import command_line
import graph_tape
import pytest
import torch
import torch.nn.functional as F
from executor_cases import CASES, batch, compiled_for, data_of, descend, mlp, model_for, same, train
from torch import Tensor, fx, nn
from torch._inductor import config
from torch.utils.flop_counter import FlopCounterMode

import onward
from onward.passes.errors import NonFiniteLossError, OptionError
from onward.passes.graph import Output, Role, set_outputs
from onward.runtime.execution import graphs, inductor
from onward.runtime.execution.bindings import BINDINGS
from onward.runtime.execution.graphs import GraphedExecutor
from onward.runtime.execution.inductor import MOST_KINDS, Inductor, InductorGraph, kind_of, tolerance
from onward.runtime.execution.streams import StreamedExecutor
from onward.runtime.execution.threads import ThreadedExecutor

pytestmark = pytest.mark.usefixtures("one_thread")


class Compiler:
    """In inductor's place: the graph as it is, so that the bits are those of plain FX, and what was asked for."""

    def __init__(self, change: Callable[[Tensor], Tensor] | None = None) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.calls = 0
        self.change = change

    def __call__(self, module: fx.GraphModule, tensors: Sequence[Tensor]) -> Callable[..., Any]:
        self.graphs.append(module)

        def run(*arguments: Tensor) -> Any:
            self.calls += 1
            found = module.forward(*arguments)
            return found if self.change is None else (self.change(found[0]), *found[1:])

        return run


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(inductor, "compile_graph", made)
    return made


@pytest.fixture
def real(pytestconfig: pytest.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inductor itself, with kernels of its own; the first run builds them, which takes twenty seconds."""
    folder = tmp_path if pytestconfig.cache is None else pytestconfig.cache.mkdir("inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    with config.patch(compile_threads=1):
        yield


def programs(case: str = "auto", **options: Any) -> tuple[onward.Program, onward.Program, Inductor]:
    """Twice the same program, the second with inductor."""
    plain = onward.Program(model_for(case), compiled_for(case), F.cross_entropy, 3)
    own = onward.Program(model_for(case), plain.compiled, F.cross_entropy, 3, inductor=True, **options)
    assert own.executor.inductor is not None
    return plain, own, own.executor.inductor


def steps(program: onward.Program, sizes: Sequence[int]) -> list[Tensor]:
    """Losses and weights of steps on so many samples each."""
    losses = []
    for number, size in enumerate(sizes):
        x = torch.randn(size, 6, generator=torch.Generator().manual_seed(number))
        program.model.zero_grad()
        losses.append(program.step(x, (torch.arange(size) + number) % 3))
        with torch.no_grad():
            for parameter in program.model.parameters():
                parameter.sub_(0.1 * parameter.grad)  # type: ignore[operator]
    return [*losses, *program.model.state_dict().values()]


# ------------------------------------------------------------------------------------------------------ inductor itself


def tiny(**options: Any) -> onward.Program:
    """Few kernels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    estimator = onward.LikelihoodRatio.feedback_learned(copies=2, warmup=1)
    return onward.compile(model, batch()[0], loss=F.cross_entropy, estimator=estimator, **options)


@pytest.mark.usefixtures("real")
def test_steps_are_those_of_plain_fx_to_rounding_and_repeat_to_the_bit() -> None:
    sizes = [6] * 3 + [4] * 2 + [6]
    plain, own, again = tiny(), tiny(inductor=True), tiny(inductor=True)
    expected, mine = steps(plain, sizes), steps(own, sizes)
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, other)
    found = own.executor.inductor
    assert found is not None
    assert found.refused == {}
    assert found.compiled == 6  # forward, perturbed run and gradients, for two sizes
    assert found.seconds > 0
    assert same(mine, steps(again, sizes))


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_compiled_step_that_is_not_finite_fails_and_leaves_everything(bad: float) -> None:
    own = tiny(inductor=True)
    steps(own, [6])
    before = [value.clone() for value in own.model.state_dict().values()]
    x, y = batch()
    x[3] = bad
    own.model.zero_grad()
    with pytest.raises(NonFiniteLossError, match="sample 3"):
        own.step(x, y)
    assert own.executor.inductor is not None
    assert own.executor.inductor.refused == {}
    assert own.step_count == 1
    assert same(before, list(own.model.state_dict().values()))
    assert all(parameter.grad is None for parameter in own.model.parameters())


# ------------------------------------------------------------------------------------------- what is given to inductor


@pytest.mark.parametrize(
    "case",
    [
        "auto",
        "layerwise in chunks",
        "the paper's",
        "stochastic",
        "levels",
        "one copy at a time",
        "shrunk",
        "batch statistics",
        "a part of the batch, in chunks",
        "weight noise",
    ],
)
def test_every_graph_can_be_given_to_inductor(case: str, compiler: Compiler) -> None:
    plain, own, found = programs(case)
    assert same(train(plain, case, 2), train(own, case, 2))
    assert found.refused == {}
    assert found.compiled == len(compiler.graphs) > 0
    for graph in compiler.graphs:
        called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        assert not set(BINDINGS.values()).intersection(
            called
        )  # noise past the dispatcher, which inductor would not see


@pytest.mark.parametrize(("make", "many"), [(ThreadedExecutor, 3), (StreamedExecutor, 2)])
@pytest.mark.parametrize("case", ["auto", "shrunk", "one copy at a time"])
def test_other_executors_have_the_serial_bits(
    case: str, make: Callable[..., Any], many: int, compiler: Compiler
) -> None:
    plain, own, _ = programs(case)
    executor = make(own.compiled, own.sigmas, many)
    executor.use_inductor()
    executor.concurrent = executor.chases = True
    own.executor = executor
    assert same(train(plain, case, 3), train(own, case, 3))
    assert executor.inductor.compiled == len(compiler.graphs) > 0


@pytest.mark.usefixtures("compiler")
def test_captured_steps_go_on_with_compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "capture", graph_tape.capture)
    plain, own, found = programs()
    executor = GraphedExecutor(own.compiled, own.sigmas)
    executor.use_inductor()
    own.executor = executor
    train(plain, "auto", 1), train(own, "auto", 1)
    plain.next_probe = own.next_probe = 1000
    assert same(train(plain, "auto", 6), train(own, "auto", 6))
    assert (executor.captured, executor.replayed) == (1, 3)
    assert found.refused == {}


@torch.no_grad()
@pytest.mark.usefixtures("compiler")
def test_a_proof_without_room_for_both_is_put_off() -> None:
    graph, x = one(), torch.ones(3)
    graph(x)
    plain = graph.plain

    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    graph.plain = full
    expected = plain(x)
    for _ in range(3):  # the second call is proved, and the fourth
        assert same([*graph(x)], [*expected])
    assert not graph.inductor.refused


def test_threads_compile_a_graph_once(compiler: Compiler) -> None:
    graph, x = one(), torch.ones(3)
    found: list[Tensor] = []

    @torch.no_grad()
    def work() -> None:
        found.extend(graph(x)[0] for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiler.graphs) == 1
    assert len(found) == 80
    assert all(torch.equal(value, x + 1) for value in found)


def one(plain: Callable[..., Any] | None = None) -> InductorGraph:
    """``x + 1``."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta = {"role": Role.INPUT, "target": "0"}
    more = graph.call_function(torch.ops.aten.add.Tensor, (x, 1))
    graph.output(())
    module = fx.GraphModule({}, graph)
    set_outputs(module, [(Output("value", "more"), more)])
    module.recompile()
    return InductorGraph(Inductor(torch.device("cpu")), "F7", module, plain or module.forward)


# ----------------------------------------------------------------------------------------------- which calls it answers


@torch.no_grad()
def test_of_a_graph_so_many_kinds_are_compiled(compiler: Compiler) -> None:
    graph = one()
    for _ in range(2):
        for size in range(1, MOST_KINDS + 3):
            assert torch.equal(graph(torch.ones(size))[0], torch.full((size,), 2.0))
    assert len(compiler.graphs) == graph.inductor.compiled == MOST_KINDS


@torch.no_grad()
def test_a_kind_is_all_that_a_compiled_graph_depends_on() -> None:
    x = torch.ones(2, 3)
    like = kind_of([x, 3])
    assert like == kind_of([x + 1, 3])
    others = [[x.double(), 3], [x.t(), 3], [torch.ones(3, 2).t(), 3], [x, 4], [x, 3.0], [x, True]]
    assert like not in [kind_of(other) for other in others]
    assert kind_of([torch.ones(3, 2).t(), 3]) != kind_of([torch.ones(2, 3), 3])
    with torch.autocast("cpu", torch.bfloat16):
        assert kind_of([x, 3]) != like
    torch.set_num_threads(2)  # of which a kernel's number is its own
    assert kind_of([x, 3]) != like
    torch.set_num_threads(1)
    assert [kind_of([other]) for other in (None, "x", nn.Parameter(x), x.to_sparse(), x.cfloat().conj())] == [None] * 5


def test_calls_that_have_to_see_the_operations_go_the_plain_way(compiler: Compiler) -> None:
    graph, x = one(), torch.ones(3)
    graph(x)  # with gradients
    with torch.no_grad():
        with FlopCounterMode(display=False):
            graph(x)
        torch.func.vmap(lambda row: graph(row)[0])(torch.ones(2, 3))
        graph(nn.Parameter(x))
        assert not compiler.graphs
        graph(x)
    assert len(compiler.graphs) == 1


def test_sigma_is_measured_without() -> None:
    plain, own, found = programs()
    assert plain.measured_sigmas(*batch()) == own.measured_sigmas(*batch())
    assert found.compiled == 0
    assert not found.paused


@torch.no_grad()
def test_nothing_waits_while_a_graph_is_captured(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    count: list[Tensor] = []
    graph, x = one(lambda x: count.append(x) or (x + 1,)), torch.ones(3)
    monkeypatch.setattr(inductor, "_waits_forbidden", lambda: True)
    graph(x)
    assert (len(count), len(compiler.graphs)) == (1, 0)
    monkeypatch.undo()
    monkeypatch.setattr(inductor, "compile_graph", compiler)
    graph(x)
    monkeypatch.setattr(inductor, "_waits_forbidden", lambda: True)
    for _ in range(20):
        graph(x)
    assert (len(count), compiler.calls) == (2, 21)


# ------------------------------------------------------------------------------------------------------------ the proof


@torch.no_grad()
def test_it_is_compared_at_every_power_of_two(compiler: Compiler) -> None:
    count: list[Tensor] = []
    graph = one(lambda x: count.append(x) or (x + 1,))
    compared = []
    for number in range(1, 20):
        before = len(count)
        graph(torch.ones(3))
        compared += [number] * (len(count) - before)
    assert compared == [1, 2, 4, 8, 16]


@torch.no_grad()
def test_a_graph_that_turns_out_wrong_later_is_plain_from_then_on(compiler: Compiler) -> None:
    graph = one()
    compiler.change = lambda found: found * (found < 10)  # as where much was zero at first
    for _ in range(2):
        graph(torch.ones(3))
    graph(torch.full((3,), 20.0))
    with pytest.warns(UserWarning, match="F7 gives other numbers than plain FX for value:more"):
        wrong = graph(torch.full((3,), 20.0))[0]
    assert torch.equal(wrong, torch.full((3,), 21.0))
    calls = compiler.calls
    assert torch.equal(graph(torch.ones(3))[0], torch.full((3,), 2.0))
    assert torch.equal(graph(torch.ones(4))[0], torch.full((4,), 2.0))
    assert compiler.calls == calls


def fails(*_: Any) -> Any:
    raise RuntimeError("no such instruction\nand more")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (fails, r"could not be compiled \(RuntimeError: no such instruction\)"),
        (lambda *_: fails, r"could not be run once compiled \(RuntimeError: no such instruction\)"),
        (Compiler(lambda found: found + 0.01), "gives other numbers than plain FX for"),
        (Compiler(lambda found: found.double()), "gives other numbers than plain FX for"),
        (Compiler(lambda found: found.new_zeros(())), "gives other numbers than plain FX for"),
    ],
    ids=["not compiled", "not run", "wrong numbers", "wrong dtype", "wrong shape"],
)
def test_graphs_that_inductor_gets_wrong_are_plain_fx(
    broken: Any, said: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(inductor, "compile_graph", broken)
    plain, own, found = programs()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert same(train(plain, "auto", 5), train(own, "auto", 5))
    warned = [str(each.message) for each in recwarn]
    assert len(warned) == len(found.refused) > 2  # each graph once
    assert re.search(rf"^inductor: F0…F2, perturbed {said}.*It runs in plain FX from now on\.$", warned[0])


def test_how_far_rounding_goes() -> None:
    x, y = torch.ones(3), torch.ones(3, dtype=torch.bfloat16)
    assert tolerance([x, 3]) == pytest.approx(2**-11.5)
    assert tolerance([x.double()]) == 2**-26
    assert tolerance([x, y]) == pytest.approx(2**-3.5)
    assert tolerance([torch.arange(3)]) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert tolerance([x]) == tolerance([y])
    bits = torch.zeros(5000, dtype=torch.bool)
    few, many = bits.clone(), bits.clone()
    few[:5], many[:6] = True, True
    nothing, large = torch.full((3,), 1e-7), torch.full((9,), -2.0)
    unknown = torch.tensor([torch.nan, torch.inf, 1.0])
    for found, expected, outputs, like in (
        (few, bits, [], True),
        (many, bits, [], False),
        (3, 3, [], True),
        (None, 3, [], False),
        (x * 1.0003, x, [x], True),
        (x * 1.001, x, [x], False),
        (-nothing, nothing, [nothing, 3], False),
        (-nothing, nothing, [nothing, 3, large], True),  # a sum that cancels, beside what was added
        (-nothing * 1000, nothing, [nothing, large], False),
        (unknown, unknown, [unknown], True),
        (unknown * 2, unknown, [unknown], False),
        (x, unknown, [unknown, large], False),
    ):
        assert inductor._same(found, expected, outputs, tolerance([x])) is like, (found, expected)


# -------------------------------------------------------------------------------------------------------------- options


def test_options() -> None:
    x = batch()[0]
    with pytest.raises(OptionError, match="inductor=1: it is True or False"):
        onward.compile(mlp(), x, loss=F.cross_entropy, inductor=1)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="what compiled graphs do"):
        onward.compile(mlp(), x, loss=F.cross_entropy, inductor=True, memory="1GiB")
    with (
        config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(OptionError, match=r"needs a C\+\+ compiler, and there is none .*no-such-compiler.*CXX"),
    ):
        onward.compile(mlp(), x, loss=F.cross_entropy, inductor=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU's compiler")
def test_a_gpu_needs_triton() -> None:
    with pytest.raises(OptionError, match="needs Triton"):
        Inductor(torch.device("cuda"))


def test_the_command_line_has_it(compiler: Compiler) -> None:
    tiny = ("--model", "mlp", "--model-option", "hidden=(16,)", "--batch-size", 64, "--epochs", 1)
    command_line.call("train", *tiny, "--inductor", "-q")
    assert compiler.graphs
    result = command_line.call("train", *tiny, "--inductor", "--memory", "1GiB", code=2)
    assert "with inductor=True" in result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [name for name in CASES if name != "shrunk"])
@pytest.mark.parametrize("options", [{}, {"streams": 4}, {"cuda_graphs": True}], ids=["serial", "streams", "graphs"])
def test_on_a_gpu(case: str, options: dict[str, Any]) -> None:
    steps = 27 if options.get("cuda_graphs") else 8  # feedback's first 19, and some
    x, y = (value.cuda() for value in data_of(case))
    found = []
    for chosen in ({}, {**options, "inductor": True}):
        program = onward.compile(
            model_for(case).cuda(), x, loss=F.cross_entropy, estimator=CASES[case][1], seed=3, **chosen
        )
        found.append([*descend(program, x, y, steps), *program.model.state_dict().values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert not isinstance(program.executor, GraphedExecutor) or program.executor.replayed > 0
    assert program.executor.inductor is not None
    assert program.executor.inductor.refused == {}
