"""Clean steps replayed from a graph: the bits of steps that are not, on a tape in the place of CUDA's graphs."""

from __future__ import annotations

import gc
import itertools
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import graph_tape
import pytest
import torch
import torch.nn.functional as F
from executor_cases import CASES, Ratio, batch, compiled_for, data_of, descend, mlp, model_for, same, train
from torch import Tensor, nn

import onward
from onward.compiler.driver import compile_model
from onward.compiler.program import CompiledModel
from onward.passes.errors import NonFiniteLossError, OptionError
from onward.runtime import learning
from onward.runtime import program as program_module
from onward.runtime.basis import Basis
from onward.runtime.execution import graphs
from onward.runtime.execution import step as step_module
from onward.runtime.execution import streams as streams_module
from onward.runtime.execution.captured import NotReadyError, difference
from onward.runtime.execution.executors import make_executor
from onward.runtime.execution.graphs import MOST_CAPTURES, MOST_GRAPHS, Graphed, GraphedExecutor, GraphedStreams
from onward.runtime.execution.step import Step, StepResult
from onward.runtime.execution.watched_loss import WatchedLoss
from onward.runtime.noise import source as noise_source
from onward.runtime.noise.words import holding, words_on
from onward.runtime.output_gradient import CHECK_EVERY
from onward.runtime.plan import Forward
from onward.runtime.traced_loss import TracedLoss

SOME = Ratio.auto(reach=0, warmup=1, probe_every=5)
"""One step of five is perturbed."""

SELDOM = Ratio.auto(reach=0, warmup=1, probe_every=10**6)


@pytest.fixture(autouse=True)
def tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of a CPU, noise as for a device whose numbers the host does not know, and feedback that soon settles."""
    monkeypatch.setattr(learning, "SLOW_STEP", 0.5)
    monkeypatch.setattr(graphs, "capture", graph_tape.capture)
    monkeypatch.setattr(noise_source, "on_host", lambda device: False)


def graphed(program: onward.Program, streams: int = 1) -> Graphed:
    """The program with its executor in place of its own."""
    compiled, sigmas = program.compiled, program.sigmas
    executor = GraphedExecutor(compiled, sigmas) if streams == 1 else GraphedStreams(compiled, sigmas, streams)
    program.executor = executor
    return executor


def programs(
    estimator: Ratio = SOME, model: Callable[[], nn.Module] = mlp, loss: Any = F.cross_entropy
) -> tuple[onward.Program, onward.Program, Graphed]:
    """Twice the same program, the second with graphs."""
    plain, own = (program_of(estimator, model, loss) for _ in range(2))
    return plain, own, graphed(own)


def program_of(estimator: Ratio, model: Callable[[], nn.Module], loss: Any) -> onward.Program:
    key = (model, str(estimator))
    if key not in COMPILED:
        COMPILED[key] = compile_model(model(), batch()[0], estimator)
    torch.manual_seed(0)
    return onward.Program(model(), COMPILED[key], loss, seed=3)


COMPILED: dict[Any, CompiledModel] = {}
"""Graphs are data, which programs share, each with a model of its own."""


def train_on(program: onward.Program, sizes: list[int], target: Callable[[Tensor], Any] = lambda t: t) -> list[Tensor]:
    """A step on so many samples each, other samples every time."""
    found = []
    for number, size in enumerate(sizes):
        x = torch.randn(size, 6, generator=torch.Generator().manual_seed(number))
        found += descend(program, x, target((torch.arange(size) + number) % 3), 1)
        found += [parameter.detach().clone() for parameter in program.model.parameters()]
        found += [buffer.clone() for buffer in program.model.buffers()]
    return found


STEPS = 7
"""Feedback's first learning step, three to warm up, capture and prove, and three."""


BRANCHED = ("auto", "layerwise in chunks", "joint, a copy's own captures, in chunks", "corrected", "batch statistics")


@pytest.mark.parametrize(
    ("case", "streams"), [(name, 1) for name in CASES if name != "shrunk"] + [(name, 3) for name in BRANCHED]
)
def test_steps_have_the_bits_of_steps_without_graphs(case: str, streams: int) -> None:
    """Perturbed steps of every kind: each has noise of its own, and feedback learns."""
    plain, own = (onward.Program(model_for(case), compiled_for(case), F.cross_entropy, seed=3) for _ in range(2))
    executor = graphed(own, streams)
    steps = STEPS * (1 + ("convolutions" in case))  # every other of which is perturbed
    assert same(train(plain, case, steps), train(own, case, steps))
    assert executor.replayed >= 3, executor.reason
    assert (plain.forwards, plain.next_probe) == (own.forwards, own.next_probe)
    if plain.feedback is not None and own.feedback is not None:
        assert same(plain.feedback.tensors(), own.feedback.tensors())
        assert plain.feedback.slopes == own.feedback.slopes


@pytest.mark.parametrize("case", ["auto, convolutions", "shared weights", "low rank"])
def test_steps_without_a_perturbed_run_have_graphs_of_their_own(case: str) -> None:
    _, estimator = CASES[case]
    compiled = compile_model(model_for(case), data_of(case)[0], replace(estimator, probe_every=4))
    plain, own = (onward.Program(model_for(case), compiled, F.cross_entropy, seed=3) for _ in range(2))
    executor = graphed(own)
    assert same(train(plain, case, 11), train(own, case, 11))
    assert executor.replayed > 3


@pytest.mark.parametrize("sizes", [[6] * 14, [6, 6, 4, 6, 6, 4, 6, 6, 4, 6, 6, 4, 4, 6], [*range(2, 12)] * 4])
def test_other_batches_are_copied_to_where_the_graph_reads_them(sizes: list[int]) -> None:
    plain, own, executor = programs()
    assert same(train_on(plain, sizes), train_on(own, sizes))
    assert not executor.reason
    assert executor.replayed > 0
    assert 0 < executor.captured <= min(MOST_GRAPHS, 2 * len({*sizes}))  # with and without a perturbed run
    assert same([*plain.feedback.jacobians.values()], [*own.feedback.jacobians.values()])  # type: ignore[union-attr]


PERTURBED = Ratio.feedback_learned(copies=2, warmup=0)
LOSSES = Ratio(copies=4, groups="joint")


def test_feedback_that_is_broken_is_scaled_down_as_without_graphs() -> None:
    plain, own, executor = programs(PERTURBED)
    for program in (plain, own):
        train_on(program, [6] * STEPS)
        assert program.feedback is not None
        jacobians = {site: jacobian * 50 for site, jacobian in program.feedback.jacobians.items()}
        program.feedback = replace(program.feedback, jacobians=jacobians)
    replayed = executor.replayed
    assert same(train_on(plain, [6]), train_on(own, [6]))
    assert executor.replayed == replayed > 0
    assert own.feedback is not None
    assert own.feedback.overshoot < 1
    assert same(train_on(plain, [6] * 3), train_on(own, [6] * 3))
    assert executor.replayed == replayed + 3


def far(output: Tensor, target: Any) -> Tensor:
    """A loss that is only finite where the output is the target's, if the target says so."""
    wanted, bound = target
    distance = (output - wanted).square().sum(1)
    return torch.where(distance > bound, torch.inf, distance)


def test_a_replay_whose_perturbed_runs_fail_says_what_the_step_itself_says() -> None:
    found = []
    plain, own, executor = programs(LOSSES, loss=far)
    for program in (plain, own):
        x = batch()[0]
        wanted = program.model(x).detach()
        for number in range(6):
            bound = torch.full((6,), 0.0 if number == 4 else torch.inf)
            if number == 4:
                before = weights_and_gradients(program)
                with pytest.raises(NonFiniteLossError) as raised:
                    program.step(x, (wanted, bound))
                assert same(before, weights_and_gradients(program))
                found.append(str(raised.value))
            else:
                program.step(x, (wanted, bound))
    assert executor.replayed == 2, executor.reason
    assert found[0] == found[1]
    assert "with noise at" in found[0]


def test_other_standard_deviations_have_other_graphs() -> None:
    plain, own, executor = programs(LOSSES)
    for number in range(MOST_CAPTURES + 2):
        for program in (plain, own):
            program.sigmas[0] = 0.1 + 0.01 * number
        assert same(train_on(plain, [6] * 4), train_on(own, [6] * 4))
    assert executor.captured == executor.replayed == MOST_CAPTURES + 2


def test_a_graph_is_compared_again_however_seldom_its_steps_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CHECK_EVERY", 4)
    _, own, executor = programs(LOSSES)
    proofs, prove = [], executor._prove
    monkeypatch.setattr(executor, "_prove", lambda *given: (proofs.append(own.step_count), prove(*given)))
    train_on(own, [6] * 11)
    assert proofs == [1, 2, 6, 10]
    assert executor.replayed == 11 - 5


class Weighted(nn.Module):
    """A loss that reads a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([1.0, 2.0, 0.5]))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, weight=self.weight, reduction="none")


def test_a_loss_without_a_derivative_and_one_with_tensors_of_its_own_are_replayed() -> None:
    for loss in (black_box, Weighted()):
        plain, own, executor = programs(LOSSES, loss=loss)
        assert same(train_on(plain, [6] * 8), train_on(own, [6] * 8))
        assert executor.replayed == 5


def looks(output: Tensor, target: Tensor) -> Tensor:
    return squares(output, target) * (2.0 if float(output.detach().sum()) > 0 else 1.0)


def elsewhere(output: Tensor, target: Tensor) -> Tensor:
    return squares(output, target) + torch.empty((), device="meta").new_ones((), device="cpu")


def kept(output: Tensor, target: Tensor) -> Tensor:
    return squares(output, target) + output[target.bool()].sum()


def picks(output: Tensor, target: Tensor) -> Tensor:
    chosen = output.gather(1, target[:, None])[:, 0].masked_fill(target == 1, 0.0)
    ignored = F.cross_entropy(output, target, ignore_index=2, label_smoothing=0.1, reduction="none")
    return chosen + ignored - output.log_softmax(1)[torch.arange(len(output)), target]


def sparse(output: Tensor, target: Tensor) -> Tensor:
    return squares(output, target) + torch.sparse.mm(torch.eye(3).to_sparse(), output.T).sum(0)


def unwatched(output: Tensor, target: Tensor) -> Tensor:
    """As what a compiler makes that takes no mode."""
    if torch._C._len_torch_dispatch_stack():
        raise RuntimeError("there is a mode")
    return squares(output, target)


class Following(nn.Module):
    """A loss in units of its average, which it follows by another tensor every time."""

    def __init__(self) -> None:
        super().__init__()
        self.average: Tensor | None = None

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        losses = squares(output, target)
        mean = losses.detach().mean()
        self.average = mean if self.average is None else 0.9 * self.average + 0.1 * mean
        return losses / self.average


def test_a_loss_that_keeps_what_it_has_made_is_not_captured() -> None:
    plain, own = (program_of(LOSSES, mlp, Following()) for _ in range(2))
    executor = graphed(own)
    expected = train_on(plain, [6] * 6)
    with pytest.warns(UserWarning, match="the loss reads another tensor of its own in every step. Such steps go on"):
        assert same(expected, train_on(own, [6] * 6))
    assert executor.captured == 0


def test_a_loss_that_counts_by_itself_is_found_by_the_second_step() -> None:
    calls = itertools.count(1)
    own = program_of(LOSSES, mlp, lambda output, target: squares(output, target) / next(calls))
    executor = graphed(own)
    with pytest.warns(UserWarning, match="gives other numbers for the losses"):
        train_on(own, [6] * 6)
    assert (executor.captured, executor.replayed) == (1, 0)


def test_a_loss_that_is_called_and_has_changed_is_captured_anew_once() -> None:
    scale = [1.0]
    _, own, executor = programs(LOSSES, loss=lambda output, target: scale[0] * squares(output, target))
    train_on(own, [6] * 5)
    scale[0] = 0.5
    with pytest.warns(UserWarning, match="noticed every 50 steps only. It is captured anew"):
        train_on(own, [6] * (CHECK_EVERY + 5))
    assert executor.captured == 2
    plain = program_of(LOSSES, mlp, lambda output, target: 0.5 * squares(output, target))
    plain.model.load_state_dict(own.model.state_dict())
    plain.step_count = own.step_count
    replayed = executor.replayed
    assert same(train_on(plain, [6] * 3), train_on(own, [6] * 3))
    assert executor.replayed == replayed + 3


@pytest.mark.parametrize("estimator", [LOSSES, PERTURBED, Ratio.feedback_learned(copies=4, rank=2, warmup=0)], ids=str)
def test_within_autocast_the_bits_are_those_of_steps(estimator: Ratio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a loss with a weight of its own, too, whose cast autocast keeps between its calls."""
    monkeypatch.setattr(Basis, "interval", property(lambda basis: 3))  # so that a basis does not move in every step
    loss = Projected()
    plain, own, executor = programs(estimator, loss=loss)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert same(train_on(plain, [6] * STEPS), train_on(own, [6] * STEPS))
        with torch.no_grad():
            loss.head.weight.mul_(0.5)  # of both
    assert executor.replayed > 3, executor.reason
    if own.feedback is not None:
        assert all(value.dtype == torch.float32 for value in own.feedback.tensors())


class Projected(nn.Module):
    """A loss with weights that nothing has frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 2)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.head(output).square().sum(1) + F.cross_entropy(output, target, reduction="none")


def test_a_replayed_step_that_fails_leaves_what_was_learned() -> None:
    _, own, executor = programs(PERTURBED)
    train_on(own, [6] * STEPS)
    assert executor.replayed > 0
    held = own.feedback
    assert held is not None
    before = [value.clone() for value in held.tensors()]
    with pytest.raises(NonFiniteLossError):
        own.step(torch.full((6, 6), torch.nan), batch()[1])
    assert own.feedback is held
    assert same(before, held.tensors())
    train_on(own, [6])
    assert same(before, held.tensors())


def test_a_step_that_runs_out_of_memory_is_done_again_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, own, executor = programs(LOSSES)
    expected = train_on(plain, [6] * 7)
    found = train_on(own, [6] * 5)
    assert executor.replayed == 2
    real, full = Step.forward, [True]

    def forward(self: Step, action: Any) -> None:
        if full.pop() if full else False:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, action)

    monkeypatch.setitem(step_module.HANDLERS, Forward, forward)
    monkeypatch.setattr(executor, "_answers", lambda *given: False)  # a comparison is due
    executor.together.clear(), executor._fused_plans.clear()
    monkeypatch.setattr(executor, "fused", lambda plan: plan)
    with pytest.warns(UserWarning, match="holds memory that a step needs"):
        found += train_on(own, [6] * 2)[: len(expected) - len(found)]
    assert not full
    assert not executor._graphs


def test_a_program_with_graphs_is_gone_when_nobody_has_it() -> None:
    own = program_of(LOSSES, mlp, F.cross_entropy)
    graphed(own)
    train_on(own, [6] * 5)
    gone = weakref.ref(own.model)
    gc.disable()
    try:
        del own
        assert gone() is None
    finally:
        gc.enable()


def test_targets_with_parts_that_are_no_tensors() -> None:
    """What can be a constant is one; of anything else the program says why nothing is captured."""

    def loss(output: Tensor, target: Any) -> Tensor:
        return squares(output, target["classes"]) * (2.0 if target["twice"] else 1.0)

    for twice, replayed in ((True, 3), (None, 3), (object(), 0)):
        plain, own, executor = programs(LOSSES, loss=loss)
        target = lambda classes, twice=twice: {"classes": classes, "twice": twice}  # noqa: E731
        expected = train_on(plain, [6] * 6, target)
        with nullcontext() if replayed else pytest.warns(UserWarning, match="neither tensors nor numbers"):
            assert same(expected, train_on(own, [6] * 6, target))
        assert executor.replayed == replayed


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5])], ids=["plain", "class weights"])
def test_one_whole_graph(weight: Tensor | None) -> None:
    """Each node's row is a sample of its own; class weights are looked up by the target."""
    estimator = Ratio.feedback_learned(copies=4, warmup=0)
    x, programs = batch()[0], []
    for _ in range(2):
        torch.manual_seed(0)
        loss = nn.CrossEntropyLoss(weight=weight)
        program = onward.compile(mlp(), x, loss=loss, estimator=estimator, unbatched=True, seed=3)
        programs.append(program)
    plain, own = programs
    executor = graphed(own)
    assert same(train_on(plain, [6] * STEPS), train_on(own, [6] * STEPS))
    assert executor.replayed == 3, (executor.reason, executor.refused)


def test_constants_of_a_target_that_are_equal_but_not_the_same_have_graphs_of_their_own() -> None:
    def loss(output: Tensor, target: Any) -> Tensor:
        return squares(output, target["classes"]) * (3.0 if target["twice"] is True else 1.0)

    plain, own, executor = programs(LOSSES, loss=loss)
    for twice in (1, True, 1.0):
        target = lambda classes, twice=twice: {"classes": classes, "twice": twice}  # noqa: E731
        assert same(train_on(plain, [6] * 5, target), train_on(own, [6] * 5, target))
    assert executor.captured == 3


def test_a_loss_is_watched_again_before_its_steps_are_captured_again() -> None:
    class Later(Remembering):
        begun = False

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return super().forward(output, target) if self.begun else squares(output, target)

    losses = [Later(), Later()]
    plain, own = (program_of(LOSSES, mlp, loss) for loss in losses)
    executor = graphed(own)
    assert same(train_on(plain, [6] * 5), train_on(own, [6] * 5))
    for program, loss in zip((plain, own), losses, strict=True):
        loss.begun = True
        for parameter in program.model.parameters():
            parameter.data = parameter.data.clone()
    expected = train_on(plain, [6] * 5)
    with pytest.warns(UserWarning, match="writes into tensors that it has not made"):
        assert same(expected, train_on(own, [6] * 5))
    assert executor.captured == 1


def test_what_changed_once_is_captured_anew_for_all_kinds_of_steps() -> None:
    loss = Weighted()
    _, own, executor = programs(LOSSES, loss=loss)
    train_on(own, [6, 4] * 5)
    assert executor.captured == 2
    loss.weight = torch.tensor([0.5, 1.0, 3.0])
    with pytest.warns(UserWarning, match="It is captured anew"):
        train_on(own, [6, 4] * (CHECK_EVERY + 5))
    assert not executor.reason
    assert not executor.refused
    assert executor.captured == 4
    plain = program_of(LOSSES, mlp, loss)
    plain.model.load_state_dict(own.model.state_dict())
    plain.step_count = own.step_count
    assert same(train_on(plain, [6, 4] * 3), train_on(own, [6, 4] * 3))


def test_a_loss_may_prepare_itself_in_its_first_step() -> None:
    class Drawn(nn.Module):
        weight: Tensor | None = None

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            if self.weight is None:
                self.weight = torch.rand(3)
            return (squares(output, target)[:, None] * self.weight).sum(1)

    found = []
    for graph in (False, True):
        torch.manual_seed(0)
        program = program_of(LOSSES, mlp, Drawn())
        executor = graphed(program) if graph else None
        found.append(train_on(program, [6] * 7))
    assert executor is not None
    assert executor.replayed > 0
    assert same(*found)


@pytest.mark.parametrize("times", [2, 3])
def test_captures_that_fail_before_anything_is_captured(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = [True] * times

    def capture(function: Callable[[], Any], device: torch.device) -> Any:
        if fails:
            fails.pop()
            raise NotReadyError("RuntimeError: a wait")
        return graph_tape.capture(function, device)

    monkeypatch.setattr(graphs, "capture", capture)
    _, own, executor = programs(LOSSES)
    with pytest.warns(UserWarning, match="a wait") if times == 3 else nullcontext():
        train_on(own, [6] * 9)
    assert bool(executor.reason) == (times == 3)
    assert bool(executor.replayed) == (times == 2)


def test_with_warnings_as_errors_the_step_after_a_refusal_goes_on() -> None:
    _, own, executor = programs(LOSSES, loss=noisy)
    train_on(own, [6] * 2)
    with pytest.raises(UserWarning, match="draws random numbers"):
        train_on(own, [6])
    train_on(own, [6] * 3)
    assert executor.captured == 0


def test_sigma_is_measured_without_graphs_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    _, own, executor = programs(Ratio(copies=4, groups="joint", sigma="auto"))
    train_on(own, [6] * 5)
    assert executor.replayed > 0
    held: list[int] = []
    measure = program_module.measure
    monkeypatch.setattr(
        program_module, "measure", lambda *given: (held.append(len(executor._graphs)), measure(*given))[1]
    )
    own.next_calibration = own.step_count
    train_on(own, [6] * 5)
    assert held == [0]


def test_words_of_captures_within_each_other_and_in_two_threads_are_kept_apart() -> None:
    device = torch.device("cpu")
    with holding() as outer:
        with holding() as inner:
            word = words_on([5], device)
        other = threading.Thread(target=lambda: words_on([6], device))
        other.start(), other.join()
        words_on([7], device)
    assert [*inner.values()] == [word]
    assert [key[0] for key in outer] == [(5,), (7,)]


def test_words_of_a_capture_are_made_once_and_held() -> None:
    device = torch.device("cpu")
    with holding() as words:
        first = [words_on([number], device) for number in range(300)]
        again = [words_on([number], device) for number in range(300)]
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert len(words) == 300
    assert words_on([0], device) is not first[0]


class Normalised(nn.Module):
    """Batch normalisation, whose buffers a step moves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(F.relu(self.norm(self.first(x))))
        return result


@pytest.mark.parametrize("estimator", [SOME, Ratio.auto(warmup=1, probe_every=5, rank=2)], ids=["all", "rank"])
def test_buffers_and_a_basis(estimator: Ratio) -> None:
    plain, own, executor = programs(estimator, Normalised)
    assert same(train_on(plain, [6] * 14), train_on(own, [6] * 14))
    assert executor.replayed > 5


def test_targets_of_several_tensors() -> None:
    def loss(output: Tensor, target: Any) -> Tensor:
        classes, (weights,) = target["classes"], target["more"]
        return F.cross_entropy(output, classes, reduction="none") * weights

    def target(classes: Tensor) -> Any:
        return {"classes": classes, "more": (classes.float() + 0.5,)}

    plain, own, executor = programs(loss=loss)
    assert same(train_on(plain, [6] * 14, target), train_on(own, [6] * 14, target))
    assert executor.replayed > 5


def weights_and_gradients(program: onward.Program) -> list[Tensor]:
    parameters = [*program.model.parameters()]
    return [*parameters, *(parameter.grad for parameter in parameters if parameter.grad is not None)]


def test_a_replayed_step_that_fails_leaves_everything_and_the_next_goes_on() -> None:
    plain, own, executor = programs()
    broken = torch.full((6, 6), torch.nan)
    for program in (plain, own):
        train_on(program, [6] * 5)
        before = [
            value.clone() for value in (*program.model.parameters(), *(p.grad for p in program.model.parameters()))
        ]
        count = program.step_count
        with pytest.raises(NonFiniteLossError, match="before any noise was added"):
            program.step(broken, batch()[1])
        assert program.step_count == count
        assert same(before, weights_and_gradients(program))
    assert executor.replayed > 0
    assert same(train_on(plain, [6] * 4), train_on(own, [6] * 4))


def test_parameters_that_move_are_captured_again_until_it_is_too_much() -> None:
    plain, own, executor = programs(Ratio.auto(reach=0, warmup=1, probe_every=1000))
    train_on(plain, [6] * 4), train_on(own, [6] * 4)
    assert executor.captured == 1
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number in range(2 * MOST_CAPTURES + 3):
            for parameter in own.model.parameters():
                parameter.data = parameter.data.clone()
            assert same(train_on(plain, [6]), train_on(own, [6])), number
    assert executor.captured == MOST_CAPTURES
    assert ["keep moving" in str(one.message) for one in told] == [True]


@pytest.mark.parametrize("sizes", [[6], [6, 4]])
def test_a_loss_that_has_changed_is_noticed_in_time(sizes: list[int]) -> None:
    """And what was captured of the old one is not replayed any more."""
    found = []
    for graphs_too in (False, True):
        scale = [1.0]
        program = program_of(SELDOM, mlp, lambda output, target, scale=scale: scale[0] * squares(output, target))
        executor = graphed(program) if graphs_too else None
        train_on(program, sizes * 6)
        scale[0] = 0.5
        with pytest.warns(UserWarning, match="gives other numbers than when it was traced"):
            found.append(train_on(program, sizes * (CHECK_EVERY + 10)))
    assert executor is not None
    assert same(*found)
    assert executor.replayed >= CHECK_EVERY
    assert executor.captured == 2 * len(sizes)


def test_a_replay_that_does_nothing_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a graph is, captured on another device than the kernels ran on: what it left is right, once."""
    monkeypatch.setattr(graphs, "capture", lambda function, device: (function(), lambda: None))
    plain, own, executor = programs()
    expected = train_on(plain, [6] * 9)
    with pytest.warns(UserWarning, match="gives other numbers for the losses"):
        assert same(expected, train_on(own, [6] * 9))
    assert executor.replayed == 0


def test_a_replay_that_comes_to_differ_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [False]

    def capture(function: Callable[[], Any], device: torch.device) -> Any:
        result, replay = graph_tape.capture(function, device)
        return result, lambda: (replay(), result.gradients["0.weight"].mul_(2.0 if broken[0] else 1.0))

    monkeypatch.setattr(graphs, "capture", capture)
    _, own, executor = programs(SELDOM)
    train_on(own, [6] * 8)
    assert executor.replayed > 0
    broken[0] = True
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train_on(own, [6] * 3 * CHECK_EVERY)
    assert ["come to give" in str(one.message) for one in told] == [True, False]
    assert all("other numbers for the gradient of 0.weight" in str(one.message) for one in told)
    assert executor.captured == 2
    assert executor.reason


def test_a_loss_with_a_number_on_another_device_is_not_captured() -> None:
    """A GPU's kernel takes a number of the CPU's as a constant; here the other device is one without data."""
    away = torch.ones((), device="meta")
    loss = TracedLoss(lambda *tensors: list(tensors), False, False, False, (away,))
    _, own, executor = programs()
    train_on(own, [6])
    gradient = own._output_gradient
    assert gradient is not None
    (known,) = gradient._known.values()
    known[:] = [(described, replace(loss, forward=traced.forward)) for described, traced in known]
    with pytest.warns(UserWarning, match="the loss computes on another device than cpu"):
        train_on(own, [6] * 9)
    assert (executor.captured, executor.replayed) == (0, 0)


def test_running_out_of_memory_for_a_graph_fails_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs, "own_input", out_of_memory)
    plain, own, _ = programs()
    expected = train_on(plain, [6] * 6)
    with pytest.warns(UserWarning, match=r"could not be captured \(OutOfMemoryError"):
        assert same(expected, train_on(own, [6] * 6))


def test_what_is_compared() -> None:
    """Infinities do not hide a difference, and are none; nor are numbers that are no floating-point ones."""

    def result(gradient: list[float], moved: Tensor) -> StepResult:
        return StepResult([], torch.ones(2), {"w": torch.tensor(gradient)}, {"b": moved})

    yes, no = torch.tensor([True]), torch.tensor([False])
    assert difference(result([torch.inf, 1.0, torch.nan], yes), result([torch.inf, 1.0, torch.nan], yes)) == ""
    assert difference(result([torch.inf, 1000.0], yes), result([torch.inf, 1.0], yes)) == "gradient of w"
    assert difference(result([1.0], no), result([1.0], yes)) == "buffer b"


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target[:, None]).square().sum(1)


class Remembering(nn.Module):
    """A loss that anneals itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return squares(output, target) / self.calls


def noisy(output: Tensor, target: Tensor) -> Tensor:
    return squares(output, target) * torch.rand(len(output)).add(0.5)


def black_box(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) != target).float() + 0 * output.detach().sum(1)


def watched(loss: Any) -> str:
    target = torch.arange(6) % 3
    watch = WatchedLoss(lambda leaves, copies, samples: loss(leaves[0], target), torch.device("cpu"), target)
    for _ in range(2):
        watch([torch.randn(6, 3)], 1, 6)
    return watch.objection


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda: noisy, "draws random numbers"),
        (lambda: looks, "looks at numbers"),
        (lambda: kept, "looks at numbers"),
        (lambda: elsewhere, "computes on another device"),
        (Remembering, "writes into tensors that it has not made"),
        (lambda: sparse, "sparse"),
        (lambda: unwatched, "cannot be watched (RuntimeError)"),
        (lambda: squares, ""),
        (lambda: black_box, ""),
        (lambda: picks, ""),
        (Weighted, ""),
    ],
)
def test_a_loss_that_does_more_than_compute_is_not_captured(loss: Callable[[], Any], said: str) -> None:
    assert said in watched(loss())
    assert bool(said) == bool(watched(loss()))
    plain, own = (program_of(LOSSES, mlp, loss()) for _ in range(2))
    executor, found = graphed(own), []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for program in (plain, own):
            torch.manual_seed(1)
            found.append(train_on(program, [6] * 5))
    assert same(*found)
    assert (executor.captured, executor.replayed) == ((0, 0) if said else (1, 2))
    assert [said in str(one.message) for one in told if "cuda_graphs" in str(one.message)] == ([True] if said else [])


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (Remembering, "writes into tensors"),
        (lambda: noisy, "draws random numbers"),
        (lambda: black_box, "called in every step"),
    ],
)
def test_a_loss_that_is_more_than_its_graph_is_not_replayed(loss: Callable[[], Any], said: str) -> None:
    found = []
    for make in (False, True):
        program = program_of(SOME, mlp, loss())
        executor = graphed(program) if make else None
        torch.manual_seed(1)
        with pytest.warns(UserWarning, match=said) if make else nullcontext():
            found.append(train_on(program, [6] * 10))
    assert executor is not None
    assert (executor.captured, executor.replayed) == (0, 0)
    assert same(*found)


@pytest.mark.parametrize("reason", ["not captured", "other numbers"])
def test_a_graph_that_cannot_be_trusted_is_not_used(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Callable[[], Any], device: torch.device) -> Any:
        if reason == "not captured":
            raise RuntimeError("out of graphs")
        result, replay = graph_tape.capture(function, device)

        def wrong() -> None:
            replay()
            next(iter(result.gradients.values())).add_(1.0)

        return result, wrong

    monkeypatch.setattr(graphs, "capture", broken)
    plain, own, executor = programs()
    expected = train_on(plain, [6] * 12)
    said = "could not be captured" if reason == "not captured" else "gives other numbers for the gradient of 0.weight"
    with pytest.warns(UserWarning, match=said):
        found = train_on(own, [6] * 12)
    assert same(expected, found)
    assert (executor.captured, executor.replayed) == (reason == "other numbers", 0)
    assert said in executor.reason


def test_what_a_capture_must_not_do_is_refused_by_the_tape() -> None:
    """So that the tests above would fail if a clean step read a number."""
    with pytest.raises(RuntimeError, match="capturing"):
        graph_tape.capture(lambda: float(torch.ones(2).sum()), torch.device("cpu"))


@pytest.mark.parametrize(
    ("estimator", "said"), [(CASES["shrunk"][1], "shrunk"), (Ratio(copies=4, sampling="error"), "another number")]
)
def test_why_no_step_is_replayed(estimator: Ratio, said: str) -> None:
    _, own, executor = programs(estimator)
    assert said in executor.reason
    train_on(own, [6] * 4)
    assert (executor.captured, executor.replayed) == (0, 0)


def test_options() -> None:
    x = batch()[0]
    with pytest.raises(OptionError, match="graphs are a GPU's"):
        onward.compile(mlp(), x, loss=F.cross_entropy, estimator="auto", cuda_graphs=True)
    with pytest.raises(OptionError, match="True or False"):
        onward.compile(mlp(), x, loss=F.cross_entropy, cuda_graphs=1)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="does not count what graphs keep"):
        onward.compile(mlp(), x, loss=F.cross_entropy, cuda_graphs=True, memory="1GiB")


def test_on_a_gpu_graphs_are_chosen_and_have_branches() -> None:
    found = program_of(SOME, mlp, F.cross_entropy).compiled
    leaves = [(leaf[0], leaf[1], torch.device("cuda"), leaf[3]) for leaf in found.captured.signature.leaves]
    signature = replace(found.captured.signature, leaves=leaves)
    moved = replace(found, captured=replace(found.captured, signature=signature), reached={})
    assert isinstance(make_executor(moved, [0.1] * 3, workers=1, streams=1, cuda_graphs=True), GraphedExecutor)
    branched = make_executor(moved, [0.1] * 3, workers=1, streams=2, cuda_graphs=True)
    assert isinstance(branched, GraphedStreams)
    assert branched.streams == 2
    assert branched.waits(perturbed=True)
    assert not branched.measures(perturbed=True)
    other = replace(moved, estimator=Ratio(copies=4, sampling="error"))
    with pytest.raises(OptionError, match="no step of this program would be replayed, since sampling="):
        make_executor(other, [0.1] * 3, workers=1, streams=1, cuda_graphs=True)


def test_the_branches_of_a_graph_end_where_they_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA refuses a capture in which a stream waits for what comes after; steps that are issued do it."""
    joined: list[bool] = []
    join = streams_module._joined
    monkeypatch.setattr(
        streams_module,
        "_joined",
        lambda *given, both_ways: (joined.append(both_ways), join(*given, both_ways=both_ways))[1],
    )
    own = program_of(LOSSES, mlp, F.cross_entropy)
    executor = graphed(own, streams=3)
    train_on(own, [6] * 4)
    assert joined == [True, True, False, False, True]  # the second of three steps is captured, with a run before
    assert executor.replayed == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("case", [name for name in CASES if name != "shrunk"])
def test_cuda_graphs(case: str, streams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x, y = (value.cuda() for value in data_of(case))
    found = []
    for graph in (False, True):
        program = onward.compile(
            model_for(case).cuda(), x, loss=F.cross_entropy, estimator=CASES[case][1], seed=3, streams=streams,
            cuda_graphs=graph,
        )  # fmt: skip
        losses = descend(program, x, y, 27)  # feedback's first 19, and some
        found.append([*losses, *program.model.state_dict().values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    executor = program.executor
    assert isinstance(executor, Graphed)
    assert executor.replayed > 0, (executor.reason, executor.refused)
