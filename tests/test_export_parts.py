"""Parts of an exported step as functions of tensors: learning, trust, the interval of probes, the optimizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from executor_cases import Recurrent
from export_cases import CASES, Learned, Pair, small, vectors
from hypothesis import strategies as st
from torch import Tensor

import onward
from onward.passes.errors import ExportError
from onward.passes.find_sites import Site
from onward.passes.graph import Layout
from onward.runtime.export.learning import Counters, interval, learned
from onward.runtime.export.tasks import make_tasks
from onward.runtime.export.updates import UPDATES, described, state_of
from onward.runtime.feedback import FeedbackState, probe_interval
from onward.runtime.learning import learn
from onward.runtime.noise.rows import Probe

DOUBLE = torch.float64
OUTPUTS, NODES = 4, 2


def site(index: int, width: int, blocks: int) -> Site:
    name = f"site{index}"
    layout = Layout((1, width), 0)
    tied = tuple(blocks if extent > 1 else 1 for extent in layout.extents) if blocks > 1 else ()
    return Site(index, name, "linear", name, name, (), (), (), layout, "", blocks=tied)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    seed=st.integers(0, 999),
    steps=st.sampled_from([0, 1, 7, 400]),
    scale=st.sampled_from([0.0, 0.3, 60.0]),
    masked=st.booleans(),
    blocks=st.sampled_from([1, 2]),
    reaching=st.booleans(),
    noise=st.sampled_from(["rademacher", "gaussian", "laplace"]),
    every=st.sampled_from([3, "auto"]),
    silent=st.booleans(),
)
def test_learning_is_feedbacks(
    seed: int, steps: int, scale: float, masked: bool, blocks: int, reaching: bool, noise: str, every: Any, silent: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    widths = [2, 6, 4]
    samples, draws = (1, 3) if reaching else (4, 2)
    sites = [site(index, width, 1 if reaching else blocks) for index, width in enumerate(widths)]
    sigmas = [0.1, 0.5, 2.0]
    alive: dict[int, Tensor | None] = {each.index: None for each in sites}
    if masked:
        alive = {each.index: torch.rand(samples, each.layout.elements, generator=generator) > 0.4 for each in sites[:2]}
        alive[2] = None
    response = normal(draws, samples, OUTPUTS) * (0 if silent else 1)
    probe = Probe(response, normal(samples, OUTPUTS), alive, torch.arange(draws), torch.tensor([seed, steps]))
    # of node i of two the first or all rows reach it; a site without an entry reaches everything
    reached = {0: torch.tensor([[True, False], [True, True]]), 1: torch.rand(3, NODES, generator=generator) > 0.5}
    reach = reached if reaching else {}
    state = FeedbackState(
        {each.index: scale * normal(each.grid.elements, OUTPUTS) for each in sites},
        steps,
        {each.index: (float(normal(1)), float(normal(1).abs())) for each in sites[: 3 if steps else 0]},
        explained_mean=float(torch.rand(1, generator=generator, dtype=DOUBLE)) * 2 - 1,
    )
    expected, predicted = learn(state, probe, sites, sigmas, noise, reach)
    counters = Counters.of(state, 5)
    new, after, response_of_loss = learned(
        state.jacobians, counters, probe, sites, sigmas, noise, every, torch.tensor(steps + 1), reach
    )
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(response_of_loss, predicted, **close)
    for index, jacobian in expected.jacobians.items():
        torch.testing.assert_close(new[index], jacobian, **close)
    wanted = Counters.of(expected, steps + 1 + probe_interval(every, expected))
    for mine, theirs in zip(after.tensors(), wanted.tensors(), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, **close)
    if scale == 60.0 and not masked and not reaching:
        assert expected.overshoot < 1, "the branch that was to be tested"


@pytest.mark.parametrize("every", [1, 7, "auto"])
@pytest.mark.parametrize("explained", [-1.0, 0.0, 0.3, 0.5, 0.75, 0.93, 0.94, 0.99, 1.0])
def test_interval_is_feedbacks(every: Any, explained: float) -> None:
    state = FeedbackState({}, explained_mean=explained)
    found = interval(every, torch.tensor(explained, dtype=DOUBLE))
    assert (int(found), found.dtype, found.shape) == (probe_interval(every, state), torch.int64, ())


@pytest.mark.parametrize("build", [small, Recurrent])
def test_trust_is_the_programs(build: Callable[[], Any]) -> None:
    """By the task that the exported step has, over random states."""
    torch.manual_seed(0)
    model = build()
    x, y = vectors(4, 0, torch.float32)
    estimator = Learned(copies=2, warmup=0, segments=2 if build is small else "op")
    program = onward.compile(model, x, loss=torch.nn.functional.cross_entropy, estimator=estimator)
    optimizer = described(torch.optim.SGD(model.parameters(), lr=0.1))
    zeros = {f"{name}.momentum_buffer": torch.zeros_like(weight) for name, weight in model.named_parameters()}
    tasks, _ = make_tasks(program, x, y, optimizer, zeros)
    assert program.feedback is not None
    (task,) = (task for task in tasks.tasks if task.name == "T")
    assert task.graph is not None
    generator = torch.Generator().manual_seed(1)
    for number in range(12):
        pairs = torch.randn(len(program.feedback.jacobians), 2, generator=generator, dtype=DOUBLE)
        slopes = {index: (float(a), float(b) if number % 3 else abs(float(b)) * (number % 2))
                  for index, (a, b) in zip(program.feedback.jacobians, pairs, strict=True)}  # fmt: skip
        program.feedback = replace(program.feedback, slopes=slopes, overshoot=0.5 + number / 24)
        made = task.graph(torch.tensor(0.5), *Counters.of(program.feedback, 0).tensors())
        found = dict(zip(task.writes, made, strict=True))
        updates = [each for each in tasks.tasks if each.name.startswith("U:")]
        rates = {each.name.removeprefix("U:"): float(found[each.reads[1]]) for each in updates}
        assert rates == pytest.approx({weight: 0.5 * trust for weight, trust in program.trust().items()}, rel=1e-6)


# ------------------------------------------------------------------------------------------------------ the optimizers

OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    ("Adam", {}),
    ("Adam", {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}),
    ("AdamW", {}),
    ("AdamW", {"weight_decay": 0.3, "betas": (0.5, 0.9)}),
]


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
@pytest.mark.parametrize("taken", [0, 3])
def test_updates_are_torchs(name: str, options: dict[str, Any], taken: int) -> None:
    """Twenty steps, also from the state that an optimizer has after some; the learning rate changes on the way."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3, 2, generator=generator, dtype=DOUBLE))
    optimizer = getattr(torch.optim, name)([weight], lr=0.125, **options)
    for _ in range(taken):
        weight.grad = torch.randn(3, 2, generator=generator, dtype=DOUBLE)
        optimizer.step()
    known = described(optimizer)
    assert (UPDATES[known.name], known.steps) == (known.update, taken if name != "SGD" else 0)
    state, mine = state_of(optimizer, weight, known.update), weight.detach().clone()
    for number in range(20):
        rate = 0.125 / 2 ** (number // 8)
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.randn(3, 2, generator=generator, dtype=DOUBLE)
        count = torch.tensor(float(known.steps + number + 1), dtype=DOUBLE)
        mine, state = known.update.step(mine, weight.grad, state, torch.tensor(rate), count, known.options)
        optimizer.step()
        torch.testing.assert_close(mine, weight.detach(), rtol=1e-12, atol=1e-12)
    for key, value in state_of(optimizer, weight, known.update).items():
        torch.testing.assert_close(state[key], value, rtol=1e-12, atol=1e-12)


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]


REFUSED: list[tuple[Callable[[], torch.optim.Optimizer], str]] = [
    (lambda: torch.optim.RMSprop(parameters()), "RMSprop has no form .* torch.optim.SGD"),
    (lambda: torch.optim.SGD(parameters(), 0.1, momentum=0.9, nesterov=True), r"SGD\(nesterov=True\)"),
    (lambda: torch.optim.SGD(parameters(), 0.1, momentum=0.9, dampening=0.5), r"SGD\(dampening=0.5\)"),
    (lambda: torch.optim.Adam(parameters(), amsgrad=True), r"Adam\(amsgrad=True\)"),
    (lambda: torch.optim.AdamW(parameters(), maximize=True), r"AdamW\(maximize=True\)"),
    (
        lambda: torch.optim.SGD([{"params": p, "lr": 0.1 * n} for n, p in enumerate(parameters(), 1)], 0.1),
        "groups of parameters with several settings",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_optimizers_without_a_form_are_refused(make: Callable[[], torch.optim.Optimizer], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        described(make())


def test_updates_within_a_step() -> None:
    pair = Pair(CASES["feedback"], torch.optim.AdamW)
    for number in range(3):
        found, _ = pair.step(5, number)
    for name, parameter in pair.model.named_parameters():
        state = pair.optimizer.state[parameter]
        for key, value in (("parameter", parameter), *((each, state[each]) for each in ("exp_avg", "exp_avg_sq"))):
            place = f"new:parameter:{name}" if key == "parameter" else f"new:optimizer:{name}.{key}"
            torch.testing.assert_close(torch.from_numpy(found[place]), value.detach(), rtol=1e-4, atol=1e-6)
