"""What makes a step cheap and must not change it: fused graphs, operators' bindings, tests for NaN, a traced loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import executor_cases as cases
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import onward
from onward.passes import ops
from onward.passes.graph import Output, outputs, set_outputs
from onward.passes.merge_equal import merge_equal
from onward.runtime.execution.bindings import BINDINGS, with_bindings
from onward.runtime.execution.executor import SerialExecutor
from onward.runtime.execution.fusion import Fused
from onward.runtime.finite import all_finite
from onward.runtime.loss import SampleLoss
from onward.runtime.output_gradient import CHECK_EVERY, OutputGradient
from onward.runtime.traced_loss import LossInputs, trace_loss

# --- fused graphs -----------------------------------------------------------------------------------------------------


def program_for(case: str) -> onward.Program:
    return onward.Program(cases.model_for(case), cases.compiled_for(case), F.cross_entropy, seed=3)


@pytest.mark.parametrize("case", cases.CASES)
def test_fused_steps_have_the_bits_of_steps_action_by_action(case: str) -> None:
    fused, apart = program_for(case), program_for(case)
    done: list[str] = []
    apart.executor.record = lambda action, worker, start, end: done.append(action)
    assert cases.same(cases.train(fused, case, 4), cases.train(apart, case, 4))
    assert not any("…" in action for action in done)
    assert isinstance(fused.executor, SerialExecutor)
    plans = fused.executor._fused_plans.values()
    assert any(isinstance(action, Fused) for plan in plans for action in plan)


@pytest.mark.parametrize("case", cases.CASES)
def test_a_fused_plan_is_the_plan(case: str) -> None:
    program = program_for(case)
    for plan in (program.executor.plan, program.executor.clean_plan):
        undone = [a.actions if isinstance(a, Fused) else (a,) for a in program.executor.fused(plan)]
        assert tuple(action for actions in undone for action in actions) == tuple(plan)


def test_a_step_without_copies_does_not_return_what_only_they_would_read() -> None:
    program = program_for("auto")
    for plan in (program.executor.plan, program.executor.clean_plan):
        program.executor.fused(plan)
    returned = {
        perturbed: {output for (p, action), each in program.executor.together.items() if p == perturbed
                    for output in each.outputs if str(action).startswith("F")}
        for perturbed in (True, False)
    }  # fmt: skip
    read_by_runs = {key for run in program.executor.runs for key in run.inputs if key.startswith("value:")}
    assert read_by_runs <= returned[True]
    assert returned[False] < returned[True]


# --- equal operations -------------------------------------------------------------------------------------------------


def merged(compute: Callable[..., Any], *given: Tensor) -> tuple[list[str], Any, Any]:
    """The operations of a traced function after `merge_equal`, and what both graphs return."""
    module = make_fx(compute)(*given)
    set_outputs(
        module, [(Output("value", str(at)), node) for at, node in enumerate(module.graph.output_node().args[0])]
    )
    before = [node.target for node in module.graph.nodes]
    less = merge_equal(module)
    assert [node.target for node in module.graph.nodes] == before  # what a pass was given stays
    return [node.name for node in less.graph.nodes if node.op == "call_function"], module(*given), less(*given)


def test_what_a_graph_computes_twice_it_computes_once() -> None:
    operations, before, after = merged(lambda x, y: (x.exp().mul(y).sum(0), x.exp().mul(y).sum(1), y.exp()), X, Y)
    assert operations == ["exp", "mul", "sum_1", "sum_2", "exp_2"]
    assert all(map(torch.equal, before, after))


def test_equal_numbers_are_not_equal_arguments() -> None:
    operations, before, after = merged(lambda x: (x * 1, x * 1.0, x * True, x + 0.0, x - 0.0, x.sum(0), x.sum(1)), X)
    assert len(operations) == 7
    assert all(map(torch.equal, before, after))
    whole = torch.ones(2, dtype=torch.int64)
    _, before, after = merged(lambda x: (x * 1, x * 1.0, x * True), whole)
    assert [x.dtype for x in before] == [x.dtype for x in after] == [torch.int64, torch.float32, torch.int64]


def test_two_noises_stay_two() -> None:
    operations, _, (one, other) = merged(lambda x: (torch.rand_like(x), torch.rand_like(x)), X)
    assert len(operations) == 2
    assert not torch.equal(one, other)


def test_a_graph_that_writes_in_place_stays_as_it_is() -> None:
    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        held = x.clone()
        first = held.exp()
        held.add_(1)
        return first, held.exp()

    operations, before, after = merged(compute, X)
    assert operations.count("exp") + operations.count("exp_1") == 2
    assert all(map(torch.equal, before, after))


# --- bindings ---------------------------------------------------------------------------------------------------------

X, Y = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(4, 4) * 0.3
IMAGE, KERNEL = torch.arange(32.0).reshape(1, 2, 4, 4), torch.ones(3, 2, 3, 3)
ATEN = torch.ops.aten
SAMPLES: dict[Any, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    ATEN.add.Tensor: [((X, Y), {}), ((X, Y), {"alpha": 2}), ((X, 1.5), {})],
    ATEN.addmm.default: [((X[0], X, Y), {}), ((X[0], X, Y), {"beta": 2, "alpha": 0.5})],
    ATEN.bmm.default: [((X[None], Y[None]), {})],
    ATEN.cat.default: [(([X, Y],), {}), (([X, Y], 1), {})],
    ATEN.contiguous.default: [((X.t(),), {}), ((IMAGE,), {"memory_format": torch.channels_last})],
    ATEN.conv2d.default: [
        ((IMAGE, KERNEL), {}),
        ((IMAGE, KERNEL, torch.ones(3), [1, 1], [1, 1], [1, 1], 1), {}),
        ((IMAGE, KERNEL, None, [2, 2]), {}),
    ],
    ATEN.div.Scalar: [((X, 3), {}), ((X, 0.7), {})],
    ATEN.div.Tensor: [((X, Y), {})],
    ATEN.exp.default: [((X,), {})],
    ATEN.expand.default: [((X[:1], [4, 4]), {}), ((X[:1], [3, -1, 4]), {"implicit": False})],
    ATEN.gt.Scalar: [((X, 0), {}), ((X, 0.5), {})],
    ATEN.linear.default: [((X, Y), {}), ((X, Y, X[0]), {})],
    ATEN.mm.default: [((X, Y), {})],
    ATEN.mul.Scalar: [((X, 3), {})],
    ATEN.mul.Tensor: [((X, Y), {}), ((X, 2.5), {})],
    ATEN.neg.default: [((X,), {})],
    ATEN.permute.default: [((IMAGE, [0, 2, 3, 1]), {})],
    ATEN.relu.default: [((X,), {})],
    ATEN.reshape.default: [((X.t(), [2, 8]), {}), ((X, [-1]), {})],
    ATEN.sub.Tensor: [((X, Y), {}), ((X, Y), {"alpha": 3})],
    ATEN.sum.dim_IntList: [((X, [0]), {}), ((X, [0, 1], True), {}), ((X, [1]), {"dtype": torch.float64})],
    ATEN.t.default: [((X,), {})],
    ATEN.transpose.int: [((IMAGE, 1, -1), {})],
    ATEN.unsqueeze.default: [((X, 1), {})],
    ATEN.view.default: [((X, [2, 8]), {}), ((X, [-1, 2]), {})],
}
WEIGHTS, IDS, SEED = X[:, :2], torch.tensor([0, 1, -1, -2]), torch.tensor([7, 3])
SAMPLES |= {
    ops.perturb: [
        ((X, IDS, SEED, X[0].exp(), 2, "rademacher", [1, 4], 0, 1, False), {}),
        ((X, IDS, SEED, X[0].exp(), 2, "gaussian", [1, 4], 0, 1, False, Y > X, [1, 1, 2]), {}),
        ((X.half(), IDS, SEED, X[0].exp(), 2, "rademacher", [1, 4], 0, 1, False), {}),
    ],
    ops.weighted_noise: [((WEIGHTS, IDS, SEED, 2, "gaussian", "sign", [1, 4], 0, 1), {})],
    ops.weighted_noise_sum: [((WEIGHTS, IDS, SEED, 2, "gaussian", "sign", [1, 4], 0, 1), {})],
    ops.stochastic_sign: [((X, X.abs().max(), IDS[:2], SEED, 2, [1, 4], 0, 1), {})],
    ops.keyed_random: [((SEED, 2, "uniform", [3, 4], torch.float32, torch.device("cpu")), {})],
    ops.count_blocks: [
        ((X[:, :2], Y > X, [1, 4], 0, 1, [1, 1, 2]), {}),
        ((X[:, :2], None, [1, 4], 0, 1, [1, 1, 2]), {}),
    ],
}


@pytest.mark.parametrize("operator", BINDINGS, ids=str)
def test_a_binding_is_its_operator(operator: Any) -> None:
    assert SAMPLES[operator]
    for args, kwargs in SAMPLES[operator]:
        expected, found = operator(*args, **kwargs), BINDINGS[operator](*args, **kwargs)
        assert torch.equal(expected, found)
        assert (expected.dtype, expected.stride()) == (found.dtype, found.stride())


def test_what_is_printed_and_checked_keeps_its_operators() -> None:
    program = program_for("auto")
    module = program.compiled.gradients[0].module
    before = [node.target for node in module.graph.nodes]
    bound = [node.target for node in with_bindings(module).graph.nodes]
    assert [node.target for node in module.graph.nodes] == before
    assert [BINDINGS.get(target, target) for target in before] == bound != before
    assert outputs(module)


# --- NaN and infinities -----------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=0, max_size=6),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_all_finite(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    expected = bool(tensor.isfinite().all())
    assert all_finite(tensor) == expected
    assert all_finite(torch.zeros(3), tensor, torch.ones(2, 2)) == expected


def test_finite_numbers_whose_sum_is_not() -> None:
    assert all_finite(torch.full((8,), 3e38))
    assert all_finite(torch.full((8,), 1e308, dtype=torch.float64))
    assert not all_finite(torch.tensor([torch.inf, -torch.inf]))
    assert all_finite()
    assert all_finite(torch.empty(0))
    assert all_finite(torch.tensor([1, 2]))
    assert not all_finite(torch.tensor([complex(0, torch.nan)]))
    assert all_finite(torch.tensor([1 + 2j]))
    sparse = torch.eye(3).to_sparse()
    assert all_finite(sparse)
    assert not all_finite(sparse * torch.nan)


# --- the loss ---------------------------------------------------------------------------------------------------------

KEY = torch.tensor([0, 0])


class Counted:
    """A loss that counts the calls of its code."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.loss, self.calls = loss, 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return self.loss(output, target)


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(1)


def test_a_traced_loss_gives_losses_and_error_without_its_code() -> None:
    loss = Counted(squares)
    function = OutputGradient(SampleLoss(loss))
    function(torch.randn(5, 3), torch.randn(5, 3), KEY)
    traced = loss.calls
    for _ in range(10):
        output, target = torch.randn(5, 3), torch.randn(5, 3)
        losses, error = function(output, target, KEY)
        assert torch.equal(losses, squares(output, target))
        assert torch.equal(error, 2 * (output - target) / 5)
    assert loss.calls == traced
    for number in range(2, 6):  # another number of samples: asked once, to see that it gives as many numbers
        output, target = torch.randn(number, 3), torch.randn(number, 3)
        losses, error = function(output, target, KEY)
        assert torch.equal(losses, squares(output, target))
        assert torch.equal(error, 2 * (output - target) / number)


def test_a_loss_that_has_changed_is_noticed_and_traced_anew() -> None:
    scale = [1.0]
    function = OutputGradient(SampleLoss(lambda o, t: scale[0] * squares(o, t)))
    output, target = torch.randn(5, 3), torch.randn(5, 3)
    for _ in range(3 * CHECK_EVERY):
        assert torch.equal(function(output, target, KEY)[0], squares(output, target))
    scale[0] = 3.0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = [function(output, target, KEY) for _ in range(CHECK_EVERY)]
    assert len(seen) == 1
    assert "reads something that has changed" in str(seen[0].message)
    losses, error = found[-1]
    torch.testing.assert_close(losses, 3 * squares(output, target))
    torch.testing.assert_close(error, 6 * (output - target) / 5)


def test_a_tensor_that_the_loss_reads_may_change() -> None:
    scale = torch.ones(())
    function = OutputGradient(SampleLoss(lambda o, t: scale * squares(o, t)))
    output, target = torch.randn(5, 3), torch.randn(5, 3)
    function(output, target, KEY)
    scale.fill_(3.0)
    for _ in range(2 * CHECK_EVERY):  # and no warning
        losses, error = function(output, target, KEY)
    torch.testing.assert_close(losses, 3 * squares(output, target))
    torch.testing.assert_close(error, 6 * (output - target) / 5)


def test_a_random_loss_is_consistent_and_draws_once_a_step() -> None:
    """Losses and error are of the same draw, and the global generator moves as far in every step, the first included,
    so that a resumed run draws the same."""

    def noisy(output: Tensor, target: Tensor) -> Tensor:
        return (output * torch.rand(3)).sum(1)

    torch.manual_seed(0)
    function, output = OutputGradient(SampleLoss(noisy)), torch.randn(5, 3)
    torch.manual_seed(1)
    expected = [torch.rand(3) for _ in range(2 * CHECK_EVERY + 2)]
    torch.manual_seed(1)
    for scale in expected:
        losses, error = function(output, torch.zeros(5), KEY)
        torch.testing.assert_close(losses, (output * scale).sum(1))
        torch.testing.assert_close(error, scale.expand(5, 3) / 5)


def test_a_loss_that_writes_into_its_arguments_is_checked_on_copies() -> None:
    def writes(output: Tensor, target: Tensor) -> Tensor:
        result = squares(output, target)
        if not isinstance(target, torch._subclasses.FakeTensor):
            target.zero_()
        return result

    function, output = OutputGradient(SampleLoss(writes)), torch.randn(5, 3)
    function(output, torch.ones(5, 3), KEY)
    target = torch.ones(5, 3)
    for _ in range(CHECK_EVERY):
        function(output, target, KEY)
    assert torch.equal(target, torch.ones(5, 3))


def test_a_loss_with_tensors_of_its_own_has_a_derivative() -> None:
    """Class weights, for one: not a black box, whose error would be an estimate."""
    weight = torch.tensor([1.0, 2.0, 0.5])
    function = OutputGradient(SampleLoss(torch.nn.CrossEntropyLoss(weight=weight)))
    output, target = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 2, 1, 0])
    expected = F.cross_entropy(output, target, weight=weight, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum() / 5, output)
    losses, error = function(output.detach(), target, KEY)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(error, gradient)


class Annealed:
    """A loss with a number of its own that changes at every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * squares(output, target)


def test_a_loss_that_keeps_changing_is_not_traced_any_more() -> None:
    """Its own state moves on at every call again, and the losses are those that it gives."""
    loss = Annealed()
    function = OutputGradient(SampleLoss(loss))
    output, target = torch.randn(5, 3), torch.randn(5, 3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3 * CHECK_EVERY):
            function(output, target, KEY)
    assert ["anew" in str(each.message) for each in seen] == [True, False]
    assert "called in every step" in str(seen[1].message)
    before = loss.calls
    losses, error = function(output, target, KEY)
    torch.testing.assert_close(losses, (before + 1) * squares(output, target))
    torch.testing.assert_close(error, 2 * (before + 1) * (output - target) / 5)


def test_a_gradient_that_changes_is_noticed_where_the_loss_does_not() -> None:
    scale = [1.0]

    def surrogate(output: Tensor, target: Tensor) -> Tensor:
        return squares(output, target) + scale[0] * (output - output.detach()).sum(1)

    function = OutputGradient(SampleLoss(surrogate))
    output, target = torch.randn(5, 3), torch.randn(5, 3)
    function(output, target, KEY)
    scale[0] = 2.0
    with pytest.warns(UserWarning, match="reads something that has changed"):
        found = [function(output, target, KEY) for _ in range(CHECK_EVERY)]
    torch.testing.assert_close(found[-1][1], (2 * (output - target) + 2) / 5)


def test_a_change_is_taken_over_also_where_warnings_are_errors() -> None:
    scale = [1.0]
    function = OutputGradient(SampleLoss(lambda o, t: scale[0] * squares(o, t)))
    output, target = torch.randn(5, 3), torch.randn(5, 3)
    function(output, target, KEY)
    scale[0] = 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="has changed"):  # noqa: PT012
            for _ in range(CHECK_EVERY):
                function(output, target, KEY)
    torch.testing.assert_close(function(output, target, KEY)[0], 2 * squares(output, target))


@pytest.mark.parametrize("what", ["target", "output"])
def test_a_loss_that_writes_into_what_it_is_given(what: str) -> None:
    """Every call, the first, those that compare and all others, sees the values as they were given."""

    def writes(output: Tensor, target: Tensor) -> Tensor:
        if what == "target":
            target.mul_(2).sub_(1)
        else:
            output.detach().mul_(2)
        return squares(output, target)

    expected_output, expected_target = torch.randn(5, 3), torch.randn(5, 3)
    function = OutputGradient(SampleLoss(writes))
    for _ in range(2 * CHECK_EVERY + 2):
        output, target = expected_output.clone(), expected_target.clone()
        losses, _ = function(output, target, KEY)
        assert torch.equal(losses, writes(expected_output.clone(), expected_target.clone()))


class MovingAverage(torch.nn.Module):
    """Keeps a mean of what it has seen, in place or as a new tensor."""

    seen: Tensor

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        if self.in_place:
            self.seen.mul_(0.9).add_(0.1 * output.detach().mean(0))
        else:
            self.seen = 0.9 * self.seen + 0.1 * output.detach().mean(0)
        return squares(output - self.seen, target)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_loss_with_memory_remembers_every_batch_once(in_place: bool) -> None:
    module, reference = MovingAverage(in_place), MovingAverage(in_place)
    function = OutputGradient(SampleLoss(module))
    generator = torch.Generator().manual_seed(0)
    for _ in range(CHECK_EVERY + 3):
        output, target = torch.randn(5, 3, generator=generator), torch.zeros(5, 3)
        losses, _ = function(output, target, KEY)
        if in_place:
            torch.testing.assert_close(losses, reference(output, target))
            assert torch.equal(module.seen, reference.seen)
        assert type(module.seen) is Tensor


def test_autocast_has_graphs_of_its_own() -> None:
    weight = torch.randn(3, 3)
    function = OutputGradient(SampleLoss(lambda o, t: squares((o @ weight).float(), t)))
    output, target = torch.randn(5, 3), torch.randn(5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow, _ = function(output, target, KEY)
    wide, _ = function(output, target, KEY)
    assert torch.equal(wide, squares(output @ weight, target))
    assert not torch.equal(wide, narrow)


def test_targets_of_changing_kinds() -> None:
    """Something that is no tensor may come and go."""
    function = OutputGradient(SampleLoss(lambda o, t: squares(o, t["y"])))
    output, target = torch.randn(5, 3), torch.randn(5, 3)
    for mask in (None, torch.zeros(5).numpy(), None, "all", None):
        losses, _ = function(output, {"y": target, "mask": mask}, KEY)
        assert torch.equal(losses, squares(output, target))


def test_what_a_loss_writes_into_is_found_through_views_and_lists() -> None:
    own = torch.zeros(3)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        own[:2].add_(output.detach()[:, :2].mean(0))
        torch._foreach_mul_([target[:, 0], target[:, 1]], 2.0)
        return squares(output, target)

    output, target = torch.randn(5, 3), torch.randn(5, 3)
    given = LossInputs([output], pytree.tree_structure(output), target, 5, [0])
    traced = trace_loss(SampleLoss(loss), given, free=False)
    assert traced is not None
    assert (traced.writes, traced.remembers, traced.draws) == (True, True, False)
    kept = target.clone()
    losses, _ = traced([output, target])
    doubled = kept * torch.tensor([2.0, 2.0, 1.0])
    torch.testing.assert_close(losses, squares(output, doubled))
    assert torch.equal(target, kept)

    plain = trace_loss(SampleLoss(lambda o, t: squares(o.clone().mul_(2), t)), given, free=False)
    assert plain is not None
    assert (plain.writes, plain.remembers, plain.draws) == (False, False, False)
