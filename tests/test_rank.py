"""Learned feedback along the errors' leading directions only (method.md 12): the basis, what is learned, its size.

Statistics: `BOUND` = 6 standard errors are exceeded by chance in 2e-9 of all comparisons.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import onward
from onward.compiler.feedback_size import jacobian_bytes
from onward.passes import ops
from onward.passes.errors import CheckpointError, OptionError
from onward.passes.find_sites import Site
from onward.passes.graph import Layout
from onward.runtime.basis import Basis, empty_basis
from onward.runtime.feedback import FeedbackState, initial_state
from onward.runtime.learning import learn
from onward.runtime.noise.rows import Probe

BOUND = 6.0
DOUBLE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)


# --- the basis --------------------------------------------------------------------------------------------------------


def projector(directions: Tensor) -> Tensor:
    return directions @ directions.T


def leading(error: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(error.T, full_matrices=False)[0][:, :rank]


def is_orthonormal(basis: Basis) -> bool:
    tracked = basis.directions.shape[1]
    identity = torch.eye(tracked, dtype=basis.directions.dtype)
    return torch.allclose(basis.directions.T @ basis.directions, identity, atol=1e-6)


def test_the_same_errors_give_their_leading_directions_for_good() -> None:
    error = normal(20, 9) * torch.linspace(1, 3, 9, dtype=DOUBLE)
    basis = empty_basis(9, 4, error)
    for _ in range(5):
        basis = basis.moved(error, 0.1)
        assert is_orthonormal(basis)
        torch.testing.assert_close(projector(basis.leading), projector(leading(error, 4)), rtol=0, atol=1e-10)
    first, again = empty_basis(9, 4, error).moved(error, 0.1), empty_basis(9, 4, error).moved(error, 0.1)
    assert torch.equal(first.directions, again.directions)
    moments = 20 * (1 - 0.9**5) * torch.linalg.svdvals(error)[:4] ** 2  # the mean's of errors times 20
    torch.testing.assert_close(basis.strengths[:4] ** 2, moments)


def test_the_basis_follows_the_errors() -> None:
    """Errors in three of the outputs, then in three others: the old ones' second moment decays by 0.9 a step,
    the new ones' grows to 1 - that, and is the larger one after log(1/2) / log(0.9) steps."""
    old, new = torch.zeros(12, 20, dtype=DOUBLE), torch.zeros(12, 20, dtype=DOUBLE)
    old[:, :3] = torch.linalg.qr(normal(12, 3))[0]
    new[:, 17:] = torch.linalg.qr(normal(12, 3, seed=1))[0]
    basis = empty_basis(20, 3, old)
    for _ in range(200):
        basis = basis.moved(old, 0.1)
    half = np.log(0.5) / np.log(0.9)
    for _ in range(int(half) - 1):
        basis = basis.moved(new, 0.1)
    assert float(basis.leading[:3].norm()) == pytest.approx(3**0.5)
    for _ in range(3):
        basis = basis.moved(new, 0.1)
    assert float(basis.leading[17:].norm()) == pytest.approx(3**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16], ids=str)
def test_a_basis_is_complete_whatever_the_errors(dtype: torch.dtype) -> None:
    for error in (torch.zeros(3, 6), torch.ones(1, 6), torch.zeros(1, 6), 1e-30 * torch.randn(4, 6), torch.eye(6)):
        basis = empty_basis(6, 4, torch.empty(0, dtype=dtype)).moved(error.to(dtype), 0.1)
        assert basis.directions.dtype == dtype
        wide = basis.leading.double()
        atol = 1e-6 if dtype != torch.bfloat16 else 0.02
        torch.testing.assert_close(wide.T @ wide, torch.eye(4, dtype=DOUBLE), rtol=0, atol=atol)
        for broken in (torch.nan, torch.inf):
            assert basis.moved(torch.full((2, 6), broken, dtype=dtype), 0.1) is basis


def test_jacobians_turn_with_the_basis() -> None:
    state = initial_state([site(0, 5)], 8, torch.empty(0, dtype=DOUBLE), rank=3)
    state = state.turned(normal(10, 8), 1.0)
    state = replace(state, jacobians={0: normal(5, 3, seed=3)})
    turned = state.turned(normal(10, 8, seed=4), 0.5)
    assert state.basis is not None
    assert turned.basis is not None
    before = state.jacobians[0] @ state.basis.leading.T
    torch.testing.assert_close(turned.jacobians[0], before @ turned.basis.leading)
    same = state.turned(torch.zeros(2, 8, dtype=DOUBLE), 0.5)  # spans the same
    assert same.basis is not None
    torch.testing.assert_close(same.jacobians[0] @ same.basis.leading.T, before)


# --- learning ---------------------------------------------------------------------------------------------------------


def site(index: int, elements: int) -> Site:
    name = f"site{index}"
    return Site(index, name, "linear", name, name, (), (), (), Layout((1, elements), 0), "")


def probe(jacobian: Tensor, error: Tensor, step: int, seed: int, sigma: float, draws: int = 1) -> Probe:
    width, samples = jacobian.shape[0], error.shape[0]
    key, ids = torch.tensor([seed, step]), torch.arange(draws)
    zeros = torch.zeros(samples, width, dtype=DOUBLE)
    noise = ops.perturb(zeros, ids, key, torch.tensor([sigma]), 0, "rademacher", [1, width], 0, 1, False)
    return Probe((noise @ jacobian).reshape(draws, samples, -1), error, {0: None}, ids, key)


def test_what_is_learned_is_the_projection_of_the_jacobian() -> None:
    jacobian, error = normal(6, 9), normal(12, 9, seed=1)
    state = initial_state([site(0, 6)], 9, error, rank=4)
    for step in range(300):  # μ ≥ 0.05 leaves less than 0.95 of the square error
        state, _ = learn(state, probe(jacobian, error, step, 0, 0.1), [site(0, 6)], [0.1], "rademacher")
    assert state.basis is not None
    assert float((state.jacobians[0] - jacobian @ state.basis.leading).norm()) < 10 * 0.95**150 * float(jacobian.norm())
    torch.testing.assert_close(projector(state.basis.leading), projector(leading(error, 4)), rtol=0, atol=1e-8)
    assert state.explained == pytest.approx(1.0)


def test_trust_is_measured_along_the_whole_error() -> None:
    """With the projected Jacobian known, own and predicted response along e are ``ε J e`` and ``ε J Q Qᵀ e``."""
    jacobian, error = normal(6, 9), normal(12, 9, seed=1)
    state = initial_state([site(0, 6)], 9, error, rank=2).turned(error, 1.0)
    assert state.basis is not None
    q = state.basis.leading
    state = replace(state, jacobians={0: jacobian @ q}, steps=1)
    shown = probe(jacobian, error, 3, 0, 0.1, draws=5)
    learned, response = learn(state, shown, [site(0, 6)], [0.1], "rademacher")
    own, predicted = (shown.response * error).sum(2), (shown.response @ q * (error @ q)).sum(2)
    torch.testing.assert_close(response, predicted)
    assert learned.slopes[0] == pytest.approx((float((own * predicted).sum()), float(predicted.square().sum())))


@hypothesis.settings(max_examples=20, deadline=None, phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate))
@hypothesis.given(
    width=st.integers(1, 40), samples=st.integers(1, 40), outputs=st.integers(2, 12), rank=st.integers(1, 8),
    scale=st.sampled_from([1e-4, 1.0, 1e4]), sigma=st.sampled_from([1e-3, 10.0]), moving=st.booleans(),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_learning_never_diverges(
    width: int, samples: int, outputs: int, rank: int, scale: float, sigma: float, moving: bool, seed: int
) -> None:
    """However the errors move the basis. A step never enlarges the expected error, and a rotation never the Jacobian:
    it adds at most the true Jacobian's norm."""
    hypothesis.assume(rank < outputs)
    jacobian = scale * normal(width, outputs, seed=seed)
    state = initial_state([site(0, width)], outputs, jacobian, rank=rank)
    for step in range(120):
        error = normal(samples, outputs, seed=step if moving else 0)
        state, _ = learn(state, probe(jacobian, error, step, seed, sigma), [site(0, width)], [sigma], "rademacher")
        assert float(state.jacobians[0].norm()) <= 1e3 * float(jacobian.norm())


# --- programs ---------------------------------------------------------------------------------------------------------


def mlp(*widths: int, dtype: torch.dtype = DOUBLE) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def program_for(
    model: nn.Module, x: Tensor, loss: Any = F.cross_entropy, seed: int = 0, **settings: Any
) -> onward.Program:
    estimator = onward.LikelihoodRatio.feedback_learned(**{"warmup": 0, **settings})
    return onward.compile(model, x, loss=loss, estimator=estimator, seed=seed)


def gradients(program: onward.Program, x: Tensor, y: Any) -> Tensor:
    program.model.zero_grad()
    program.step(x, y)
    return torch.cat([parameter.grad.flatten() for parameter in program.model.parameters()])


def test_a_linear_networks_gradients_become_those_of_the_projected_error() -> None:
    x, y = normal(24, 4), torch.arange(24) % 7
    model = nn.Sequential(*(layer for layer in mlp(4, 5, 7) if isinstance(layer, nn.Linear)))
    program = program_for(model, x, rank=3)
    for _ in range(250):
        found = gradients(program, x, y)
    output = model(x).detach().requires_grad_()
    (error,) = torch.autograd.grad(F.cross_entropy(output, y), output)
    cotangent = error @ projector(leading(error, 3)) @ model[1].weight.detach()  # type: ignore[operator]
    expected = torch.cat(
        [(cotangent.T @ x).flatten(), cotangent.sum(0), (error.T @ model[0](x)).flatten(), error.sum(0)]
    )
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=10 * 0.95**125)
    assert [tuple(j.shape) for j in program.feedback.jacobians.values()] == [(5, 3)]  # type: ignore[union-attr]


@pytest.mark.parametrize("correction", ["none", "full"])
def test_a_rank_of_all_outputs_is_the_full_form(correction: str) -> None:
    x, y = normal(6, 4), torch.arange(6) % 3
    programs = [program_for(mlp(4, 6, 5, 3), x, correction=correction, copies=4, rank=rank) for rank in (None, 3, 50)]
    assert {program.compiled.rank for program in programs} == {None}
    for _ in range(4):
        full, *others = [gradients(program, x, y) for program in programs]
        assert all(torch.equal(full, other) for other in others)
    for program in programs:
        assert program.feedback is not None
        assert program.feedback.basis is None
        for index, jacobian in program.feedback.jacobians.items():
            assert torch.equal(jacobian, programs[0].feedback.jacobians[index])  # type: ignore[union-attr]


@pytest.mark.parametrize("reach", [0, 1])
def test_the_full_correction_is_unbiased_with_any_jacobian_and_basis(reach: int) -> None:
    x, y = normal(6, 4), torch.arange(6) % 3
    model = mlp(4, 6, 5, 3)
    program = program_for(model, x, correction="full", copies=64, sigma=1e-3, rank=2, reach=reach)
    assert program.feedback is not None
    basis = Basis(torch.linalg.qr(normal(3, 3))[0], torch.ones(3, dtype=DOUBLE), 2)
    jacobians = {index: 0.5 * normal(*jacobian.shape, seed=7) for index, jacobian in program.feedback.jacobians.items()}
    wrong = replace(program.feedback, basis=basis, jacobians=jacobians, steps=1)
    rows = []
    for _ in range(80):
        program.feedback = wrong
        rows.append(gradients(program, x, y))
    found = torch.stack(rows)
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    expected, error = torch.cat([g.flatten() for g in grads]), found.std(0) / len(rows) ** 0.5
    assert bool(((found.mean(0) - expected).abs() <= BOUND * error + 1e-5).all())
    biased = program_for(model, x, rank=2, reach=reach)
    biased.feedback = wrong
    assert bool(((gradients(biased, x, y) - expected).abs() > 2 * BOUND * error + 1e-5)[:30].double().mean() > 0.3)


def black_box(output: Tensor, target: Tensor) -> np.ndarray:
    return np.asarray(((output.numpy() - F.one_hot(target, output.shape[1]).numpy()) ** 2).sum(1))


def test_a_black_box_loss_trains_with_a_rank() -> None:
    x, y = normal(48, 4), (normal(48, 4)[:, 0] > 0).long()
    program = program_for(mlp(4, 8, 4), x, black_box, rank=2)
    update = torch.optim.Adam(program.model.parameters(), lr=3e-2)
    before = float(black_box(program.model(x).detach(), y).mean())
    for _ in range(60):
        update.zero_grad()
        program.step(x, y)
        update.step()
    assert float(black_box(program.model(x).detach(), y).mean()) < before / 2


def test_a_thousand_outputs_train_with_sixteen_directions() -> None:
    from onward.models import load

    digits = load("digits")
    x, y = (tensor for tensor in digits.train.tensors)
    x, y = x.flatten(1), y * 97 + 5
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1000))
    program = program_for(model, x[:32], rank=16, warmup=20)
    assert jacobian_bytes(program.compiled) == {0: 64 * 16 * 4, 1: 64 * 16 * 4}
    assert program.feedback is not None
    assert sum(j.numel() * j.element_size() for j in program.feedback.jacobians.values()) == 2 * 64 * 16 * 4
    before = [layer.weight.detach().clone() for layer in (model[0], model[2])]  # type: ignore[union-attr, operator]
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, 32, shuffle=True, generator=generator())
    onward.Trainer(program, torch.optim.Adam(model.parameters(), lr=2e-3), progress=False).fit(loader, epochs=4)
    held_x, held_y = digits.test.tensors
    accuracy = float((model(held_x.flatten(1)).argmax(1) == held_y * 97 + 5).float().mean())
    assert accuracy > 0.85
    moved = [
        float((layer.weight.detach() - was).norm()) for layer, was in zip((model[0], model[2]), before, strict=True)
    ]  # type: ignore[union-attr, operator]
    assert min(moved) > 1
    assert min(program.trust().values()) > 0.3


@pytest.mark.parametrize("settings", [{"rank": 2}, {"rank": 2, "correction": "full"}])
def test_a_program_resumes_bit_for_bit(settings: dict[str, Any]) -> None:
    def conv() -> onward.Program:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 4)).double()
        return program_for(model, x, blocks=2, **settings)

    x, y = normal(8, 1, 5, 5), torch.arange(8) % 4
    one = conv()
    for _ in range(4):
        gradients(one, x, y)
    resumed = conv()
    resumed.load_state_dict(one.state_dict())
    for _ in range(2):
        assert torch.equal(gradients(resumed, x, y), gradients(one, x, y))
        for key, value in one.state_dict().items():
            other = resumed.state_dict()[key]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other
    assert {"feedback.directions", "feedback.strengths"} <= one.state_dict().keys()


def test_feedback_of_another_form_is_refused() -> None:
    x = normal(8, 4)
    saved = program_for(mlp(4, 6, 5), x, rank=2)
    gradients(saved, x, torch.arange(8) % 5)
    state = saved.state_dict()
    for settings in ({"rank": 3}, {"rank": None}, {"rank": 2, "blocks": 2}):
        with pytest.raises(CheckpointError, match="another estimator"):
            program_for(mlp(4, 6, 5), x, **settings).load_state_dict(state)  # type: ignore[arg-type]
    program_for(mlp(4, 6, 5), x, rank=2, feedback_memory=100).load_state_dict(state)
    wider = program_for(mlp(4, 6, 7), x, rank=2)
    before = wider.feedback
    with pytest.raises(
        CheckpointError, match=r"basis was learned for \(5, 5\) \(outputs, directions\); this model has \(7, 7\)"
    ):
        wider.load_state_dict(state)
    assert wider.feedback is before
    with pytest.raises(
        CheckpointError, match=r"site 0 was learned for \(6, 2\).*cannot move to a changed model, to other"
    ):
        program_for(mlp(4, 8, 5), x, rank=2).load_state_dict(state)
    del state["feedback.strengths"]
    with pytest.raises(CheckpointError, match="lacks"):
        saved.load_state_dict(state)


# --- memory -----------------------------------------------------------------------------------------------------------


def compiled_for(hidden: int, outputs: int, **settings: Any) -> onward.Program:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    return program_for(model.to_empty(device="cpu"), torch.zeros(2, 4), **settings)


def test_what_does_not_fit_gets_the_largest_rank_that_does() -> None:
    assert compiled_for(4096, 64, feedback_memory=1).compiled.rank is None  # 1 MiB exactly
    reduced = compiled_for(4096, 65, feedback_memory=1)
    assert 4 * (4096 * 62 + 65 * 65) <= 2**20 < 4 * (4096 * 63 + 65 * 65)
    assert reduced.compiled.rank == 62
    assert jacobian_bytes(reduced.compiled) == {0: 4096 * 62 * 4}
    assert [tuple(j.shape) for j in reduced.feedback.jacobians.values()] == [(4096, 62)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("hidden", "outputs", "settings", "message"),
    [
        (300_000, 10, {}, r"300,000 coordinates at 1 noise point\(s\) and 10 outputs take 11.4 MiB, 1.1 MiB at rank 1; "
                          r"feedback_memory=1 MiB.*blocks=2.*feedback_memory=2\."),
        (300_000, 10, {"rank": 2}, r"2.3 MiB at rank 2; .*feedback_memory=3\."),
        (300_000, 10, {"rank": 10}, r"take 11.4 MiB; .*feedback_memory=12\."),
    ],
)  # fmt: skip
def test_what_does_not_fit_at_all_is_refused(hidden: int, outputs: int, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        compiled_for(hidden, outputs, feedback_memory=1, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0: at least one"),
        ({"rank": 1.5}, "rank=1.5: it has to be an integer"),
        ({"rank": True}, "rank=True: it has to be"),
        ({"feedback_memory": 0}, "feedback_memory=0: at least 1 MiB"),
        ({"feedback_memory": 0.5}, "feedback_memory=0.5: it has to be an integer"),
        ({"rank": 2, "feedback": "none"}, 'rank=2 is an option of feedback="learned"'),
        ({"feedback_memory": 2, "feedback": "none"}, 'feedback_memory=2 is an option of feedback="learned"'),
    ],
)
def test_options_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        onward.LikelihoodRatio.feedback_learned(**settings)


def test_states_without_a_rank_have_no_basis() -> None:
    state: FeedbackState = initial_state([site(0, 5)], 8, torch.empty(0, dtype=DOUBLE))
    values = normal(2, 8)
    assert state.basis is None
    assert state.projected(values) is values
    assert state.turned(values, 0.1) is state
    assert "feedback.directions" not in state.state_dict()
