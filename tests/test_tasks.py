"""Tasks of many kinds trained forward-only, the losses that torch has none of, and losses that are none."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward import losses
from onward.compiler.driver import compile_model
from onward.compiler.program import CompiledModel
from onward.passes.errors import LossShapeError, NonFiniteLossError, OptionError

# --- training ---------------------------------------------------------------------------------------------------------

BARS = {  # epochs, and the score to reach; of seeds 0 to 4 the lowest and the mean score; backpropagation's (seed 0)
    "focal": (2, 0.66),  # 0.742, 0.818; 0.903
    "mean square": (2, 0.31),  # 0.362, 0.406; 0.513
    "triplet": (2, 0.85),  # 0.878, 0.897; 0.939
    "ctc": (2, 0.84),  # 0.873, 0.900; 0.921
    "detection": (4, 0.19),  # 0.251, 0.311; 0.449
    "segmentation": (2, 0.53),  # 0.602, 0.672; 0.764
    "0-1": (5, 0.59),  # 0.661, 0.729; 0.953 by cross-entropy
    "F1": (3, 0.67),  # 0.729, 0.786; 0.763 by binary cross-entropy
    "edit distance": (2, 0.28),  # 0.461, 0.644; 0.950 by cross-entropy
}
"""The bars lie as far below the lowest of five seeds as that is below their mean, or farther."""


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        yield importlib.import_module("tasks")


@pytest.mark.parametrize("name", BARS)
def test_a_task_is_learned_without_backpropagation(name: str, benchmark: Any) -> None:
    """Every operation its own gradient subgraph, and no reach: what there is of a derivative is the loss's own."""
    epochs, bar = BARS[name]
    found = benchmark.train(name, "op, reach 0", seed=0, epochs=epochs)
    assert found.before < bar - 0.05
    assert found.after > bar
    assert found.perturbed_forwards > 0


def test_every_task_is_tested(benchmark: Any) -> None:
    assert {*BARS, "cross-entropy"} == benchmark.TASKS.keys()  # that one is trained all over these tests


def test_the_benchmark_prints_and_writes(benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs.json"
    benchmark.main(
        ["--tasks", "focal", "0-1", "--rows", "bp", "--seeds", "0", "1", "--epochs", "1", "--json", str(file)]
    )
    shown = capsys.readouterr().out
    assert "bp of cross-entropy" in shown
    assert "2 seeds" in shown
    runs = json.loads(file.read_text())["runs"]
    assert [(run["task"], run["seed"]) for run in runs] == [("focal", 0), ("focal", 1), ("0-1", 0), ("0-1", 1)]
    assert all(run["after"] > run["before"] + 0.2 for run in runs)


# --- losses -----------------------------------------------------------------------------------------------------------


def scores(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("more", [(), (5,), (2, 3)])
def test_focal_and_zero_one_are_their_formulas(more: tuple[int, ...]) -> None:
    output, target = scores(4, 3, *more), torch.randint(0, 3, (4, *more), generator=torch.Generator().manual_seed(1))
    p = output.softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    for gamma in (0.0, 2.0):
        expected = (-((1 - p) ** gamma) * p.log()).reshape(4, -1).mean(1)
        torch.testing.assert_close(losses.focal(output, target, gamma=gamma), expected)
    wrong = (output.argmax(1) != target).double().reshape(4, -1).mean(1)
    torch.testing.assert_close(losses.zero_one(output, target).double(), wrong)


def test_f1_is_scikit_learns() -> None:
    from sklearn.metrics import f1_score

    output, target = scores(20, 4), (scores(4, 20).T > 0.5).float()
    output[0], target[0] = -1.0, 0.0  # nothing is there, and nothing found
    mean = f1_score(target, output > 0, average="samples", zero_division=1.0)
    assert float(losses.f1(output, target).mean()) == pytest.approx(1 - mean)
    assert float(losses.f1(output, target.bool())[0]) == 0


def levenshtein(a: list[int], b: list[int]) -> int:
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return levenshtein(a[1:], b[1:])
    return 1 + min(levenshtein(a[1:], b), levenshtein(a, b[1:]), levenshtein(a[1:], b[1:]))


@pytest.mark.parametrize("blank", [None, 0, 2])
@pytest.mark.parametrize("form", ["padded", "lists"])
def test_edit_distance_is_levenshteins(blank: int | None, form: str) -> None:
    output, random = scores(60, 5, 3), torch.Generator().manual_seed(3)
    right = [torch.randint(0, 3, (n % 5,), generator=random).tolist() for n in range(60)]
    padded = torch.tensor([row + [-1] * (4 - len(row)) for row in right])
    found = losses.edit_distance(output, padded if form == "padded" else right, blank=blank)
    for best, row, distance in zip(output.argmax(2).tolist(), right, found.tolist(), strict=True):
        kept = [c for n, c in enumerate(best) if blank is None or (c != blank and (n == 0 or c != best[n - 1]))]
        assert distance == pytest.approx(levenshtein(kept, row) / max(len(row), 1))


def test_ctc_is_torchs() -> None:
    output, target = scores(3, 6, 4), torch.tensor([[1, 2, 2], [3, -1, -1], [-1, -1, -1]])
    log, lengths = output.log_softmax(2).transpose(0, 1), torch.tensor([3, 1, 0])
    expected = F.ctc_loss(log, target.clamp(min=0), torch.full((3,), 6), lengths, reduction="none")
    torch.testing.assert_close(losses.ctc(output, target), expected / torch.tensor([3, 1, 1]))
    torch.testing.assert_close(losses.ctc(output, [[1, 2, 2], [3], []]), expected / torch.tensor([3, 1, 1]))
    assert losses.ctc(output[:, :3], target).tolist()[0] == 0  # 1 2 2 needs a blank between: four positions


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.f1(scores(4, 3), torch.zeros(4, dtype=torch.int64)), r"labels \(N, L\) of 0 and 1.*F.one_hot"),
        (lambda: losses.edit_distance(scores(4, 3), [[1]] * 4), r"edit_distance takes scores \(N, T, C\)"),
        (lambda: losses.ctc(scores(4, 3, 2), [[1]] * 3), "3 sequences"),
    ],
)
def test_losses_of_other_shapes(call: Any, message: str) -> None:
    with pytest.raises(LossShapeError, match=message):
        call()


# --- what is no loss of a dense prediction ----------------------------------------------------------------------------

PIXELS, INK = scores(4, 1, 3, 3), torch.arange(36).reshape(4, 3, 3) % 2


@functools.cache
def compiled_for(estimator: onward.LikelihoodRatio) -> CompiledModel:
    """The graphs hold no loss: one compilation serves them all."""
    return compile_model(nn.Conv2d(1, 2, 1), PIXELS, estimator)


def dense_program(loss: Any, estimator: onward.LikelihoodRatio) -> onward.Program:
    torch.manual_seed(0)
    return onward.Program(nn.Conv2d(1, 2, 1), compiled_for(estimator), loss, seed=0)


def masked(output: Tensor, target: Tensor) -> Tensor:
    there = target >= 0
    each = F.cross_entropy(output, target.clamp(min=0), reduction="none") * there
    return each.flatten(1).sum(1) / there.flatten(1).sum(1)


@pytest.mark.parametrize(
    "estimator", [onward.LikelihoodRatio.auto(), onward.LikelihoodRatio(copies=2)], ids=["auto", "plain"]
)
def test_losses_of_dense_predictions_that_cannot_work(estimator: Any) -> None:
    program = dense_program(lambda o, t: F.cross_entropy(o, t, reduction="none"), estimator)
    with pytest.raises(LossShapeError, match=r"shape \(4, 3, 3\) for 4 samples.*losses\.flatten\(1\)\.mean\(1\)"):
        program.step(PIXELS, INK)
    program = dense_program(
        lambda o, t: F.cross_entropy(o.flatten(2), t.flatten(1), reduction="none").flatten(), estimator
    )
    with pytest.raises(LossShapeError, match=r"shape \(36,\) for 4 samples.*looks like 9 numbers a sample"):
        program.step(PIXELS, INK)
    program = dense_program(F.cross_entropy, estimator)
    with pytest.raises(RuntimeError, match="size mismatch"):
        program.step(PIXELS, INK[:, :2])
    ignored = INK.clone()
    ignored[2] = -100
    program.step(PIXELS, ignored)  # a sample of which nothing counts has the loss 0
    program = dense_program(masked, estimator)
    with pytest.raises(
        NonFiniteLossError, match=r"loss of sample 2 is nan before any noise.*a mask that leaves a sample"
    ):
        program.step(PIXELS, ignored)


@pytest.mark.parametrize("loss", [nn.TripletMarginLoss(), F.triplet_margin_loss, nn.CTCLoss(), lambda output: output])
def test_losses_with_other_arguments(loss: Any) -> None:
    with pytest.raises(OptionError, match=r"cannot be called as loss\(output, target\).*Wrap it"):
        onward.compile(nn.Conv2d(1, 2, 1), PIXELS, loss=loss)
