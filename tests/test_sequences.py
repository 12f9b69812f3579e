"""Learned feedback of sequences, of an output at every position, and of very many outputs (DESIGN.md 12)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from feedback_cases import DOUBLE, assert_unbiased, exact, normal, program_for
from torch import Tensor, nn

import onward
from onward.compiler.report import examine
from onward.runtime.basis import FRESH, Basis, empty_basis
from onward.runtime.feedback import FeedbackState

# --- sequences --------------------------------------------------------------------------------------------------------


class Cell(nn.Module):
    """A hand-written cell over the steps of ``(N, T, inputs)``, or of ``(N, T)`` tokens."""

    def __init__(self, inputs: int, hidden: int, classes: int, gated: bool = False, tokens: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(tokens, inputs) if tokens else nn.Identity()
        width = 3 * hidden if gated else hidden
        self.read, self.keep, self.head = nn.Linear(inputs, width), nn.Linear(hidden, width), nn.Linear(hidden, classes)
        self.hidden, self.gated = hidden, gated

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        h = x.new_zeros(x.shape[0], self.hidden)
        for step in range(x.shape[1]):
            a, b = self.read(x[:, step]), self.keep(h)
            if self.gated:
                (r, z, n), (u, v, w) = a.chunk(3, 1), b.chunk(3, 1)
                gate = torch.sigmoid(z + v)
                h = gate * h + (1 - gate) * torch.tanh(n + torch.sigmoid(r + u) * w)
            else:
                h = torch.tanh(a + b)
        logits: Tensor = self.head(h)
        return logits


class Library(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.cell, self.head = nn.Embedding(5, 4), nn.RNN(4, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.cell(self.tokens(x))[0][:, -1])
        return logits


SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "tokens": lambda: Cell(4, 6, 2, tokens=5),
    "gated": lambda: Cell(4, 5, 2, gated=True, tokens=5),
    "nn.RNN": Library,
}


@pytest.mark.parametrize("reach", [0, 1])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_weights_shared_over_time_have_unbiased_gradients(kind: str, reach: int) -> None:
    model = SEQUENCES[kind]().double()
    x, y = torch.randint(0, 5, (8, 6), generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    program = program_for(model, x, correction="full", copies=128, sigma=1e-3, reach=reach)
    assert_unbiased(program, x, y, exact(model, x, y), steps=40, scale=0.03)
    if kind == "tokens":  # two branches of a sum are one site
        names = [site.name for site in program.compiled.sites]
        assert names == ["tokens", *[f"read+keep{'' if t == 0 else f'@{t + 1}'}" for t in range(6)], "head"]
        assert len(program.compiled.runs[0].sites) == 7 - reach


def fit(program: onward.Program, x: Tensor, y: Tensor, epochs: int, rate: float) -> None:
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, 32, shuffle=True, generator=torch.Generator().manual_seed(0))
    update = torch.optim.Adam(program.model.parameters(), lr=rate)
    onward.Trainer(program, update, progress=False).fit(loader, epochs=epochs)


def test_a_recurrent_net_reads_digits_row_by_row() -> None:
    from onward.models import load

    digits = load("digits")
    (x, y), (held_x, held_y) = digits.train.tensors, digits.test.tensors
    model = Cell(8, 32, 10)
    program = program_for(model, x[:8].reshape(-1, 8, 8), reach=1, warmup=20)
    fit(program, x.reshape(-1, 8, 8), y, epochs=12, rate=4e-3)
    assert float((model(held_x.reshape(-1, 8, 8)).argmax(1) == held_y).float().mean()) >= 0.9


def test_a_shared_weight_is_trusted_as_its_sites_together() -> None:
    state = FeedbackState({}, slopes={0: (1.0, 1.0), 1: (-0.1, 0.1), 2: (1.0, 4.0)})
    assert state.trust(1) == 0.0
    assert state.trust(0, 1) == pytest.approx(0.9 / 1.1)
    assert state.trust(0, 2) == pytest.approx(2.0 / 5.0)
    assert state.trust() == state.trust(7) == 1.0
    program = program_for(Cell(4, 6, 2).double(), normal(8, 3, 4))
    assert program.feedback is not None
    program.feedback = replace(program.feedback, slopes={0: (1.0, 1.0), 1: (-0.1, 0.1)})
    assert program.trust()["keep.weight"] == pytest.approx(0.9 / 1.1)


# --- an output at every position --------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.mix, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.between, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(self.before(x)).chunk(3, 2)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        answer: Tensor = x + self.down(F.relu(self.up(self.between(x))))
        return answer


def language_model(words: int, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(words, width), Block(width), Block(width), nn.Linear(width, words))


def token_loss(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(output.transpose(1, 2), target, reduction=reduction)


def text(samples: int, words: int = 50, length: int = 8) -> tuple[Tensor, Tensor]:
    """Every word is followed by its own next one, but for one in ten."""
    generator = torch.Generator().manual_seed(0)
    follows, tokens = torch.randperm(words, generator=generator), torch.empty(samples, 0, dtype=torch.int64)
    tokens = torch.randint(0, words, (samples, 1), generator=generator)
    for _ in range(length):
        other = torch.randint(0, words, (samples, 1), generator=generator)
        changes = torch.rand(samples, 1, generator=generator) < 0.1
        tokens = torch.cat([tokens, torch.where(changes, other, follows[tokens[:, -1:]])], 1)
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize(("rank", "below"), [(None, 1.3), (32, 3.3)])
def test_a_language_model_learns(rank: int | None, below: float) -> None:
    """Guessing is 3.9, knowing all but the changes 0.7."""
    x, y = text(1024)
    model = language_model(50)
    program = program_for(model, x[:8], token_loss, reach=1, rank=rank, warmup=20)
    report = examine(program.compiled, name="lm")
    assert {(j.columns, j.form) for j in report.jacobians} == {(400, "full") if rank is None else (32, "rank 32")}
    fit(program, x, y, epochs=4, rate=1e-2)
    with torch.no_grad():
        assert float(token_loss(model(x), y)) < below


def test_a_wide_vocabulary_lowers_the_rank_and_says_so() -> None:
    x, y = text(4, words=1000)
    program = program_for(language_model(1000), x, token_loss, feedback_memory=4)
    report = examine(program.compiled, name="lm")
    assert program.compiled.rank == 56 < 1000 * 8
    (note,) = [note for note in report.notes if "directions of" in note]
    assert "keeps 56 directions of the 8,000 outputs" in note
    assert "feedback_memory=4 MiB" in note
    assert "bias" in note
    assert sum(jacobian.bytes for jacobian in report.jacobians) < 4 * 2**20
    program.step(x, y)
    asked = examine(program_for(language_model(50), text(4)[0], token_loss, rank=3).compiled, name="lm")
    assert not [note for note in asked.notes if "directions of" in note]


# --- the basis of many outputs ----------------------------------------------------------------------------------------


def by_svd(basis: Basis, error: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    old = (1 - weight) ** 0.5 * basis.directions * basis.strengths
    fresh = error[: max(FRESH, basis.rank)]
    new = (weight / len(fresh)) ** 0.5 * len(error) * fresh.T
    vectors, values, _ = torch.linalg.svd(torch.cat([old, new], 1), full_matrices=False)
    return vectors[:, : basis.rank], values[: basis.strengths.shape[0]]


@pytest.mark.parametrize("spread", [0.0, 3.0, 12.0], ids=["alike", "a thousand apart", "a million million apart"])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_basis_by_inner_products_is_that_of_a_singular_value_decomposition(spread: float, scale: float) -> None:
    basis = empty_basis(300, 6, normal(1))
    factors = scale * 10 ** -torch.linspace(0, spread, 24, dtype=DOUBLE)
    for step in range(6):
        error = normal(40, 24, seed=step) * factors @ torch.linalg.qr(normal(300, 24))[0].T
        moved = basis.moved(error, 0.2)
        directions, strengths = by_svd(basis, error, 0.2)
        basis = moved
        seen = strengths > 1e-5 * strengths[0]
        torch.testing.assert_close(basis.strengths[seen], strengths[seen], rtol=1e-5, atol=0)
        torch.testing.assert_close(
            basis.directions.T @ basis.directions, torch.eye(14, dtype=DOUBLE), rtol=0, atol=1e-5
        )
        if spread:  # alike, the last direction of the basis and the next are not told apart
            cosines = torch.linalg.svdvals(basis.leading.T @ directions)
            assert float(cosines[: int(seen[:6].sum())].min()) > 1 - 1e-6


@pytest.mark.parametrize(("rank", "interval"), [(8, 1), (16, 1), (64, 4)])
def test_a_large_basis_moves_less_often(rank: int, interval: int) -> None:
    assert empty_basis(1000, rank, normal(1)).interval == interval
