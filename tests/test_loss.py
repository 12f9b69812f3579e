"""The user's loss: what it may return, what targets it may take, and what the copies of a batch get."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onward
from onward.compiler.driver import compile_model
from onward.compiler.program import CompiledModel
from onward.passes.errors import BatchError, LossShapeError
from onward.runtime.loss import BatchLoss, SampleLoss

N, CLASSES = 4, 3
LABELS = torch.tensor([0, 2, 1, 2])


def make_output(*more: int) -> Tensor:
    return torch.randn(N, CLASSES, *more, generator=torch.Generator().manual_seed(0))


WEIGHT = torch.tensor([1.0, 2.0, 0.5])


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        (F.cross_entropy, lambda o: F.cross_entropy(o, LABELS, reduction="none")),
        (nn.CrossEntropyLoss(), lambda o: F.cross_entropy(o, LABELS, reduction="none")),
        (nn.CrossEntropyLoss(reduction="sum"), lambda o: F.cross_entropy(o, LABELS, reduction="none")),
        (
            nn.CrossEntropyLoss(label_smoothing=0.1),
            lambda o: F.cross_entropy(o, LABELS, reduction="none", label_smoothing=0.1),
        ),
        (nn.CrossEntropyLoss(weight=WEIGHT), lambda o: WEIGHT[LABELS] * F.cross_entropy(o, LABELS, reduction="none")),
        (nn.CrossEntropyLoss(ignore_index=2), lambda o: (LABELS != 2) * F.cross_entropy(o, LABELS, reduction="none")),
        (
            functools.partial(F.cross_entropy, label_smoothing=0.2),
            lambda o: F.cross_entropy(o, LABELS, reduction="none", label_smoothing=0.2),
        ),
        (lambda o, y: o.argmax(1) != y, lambda o: (o.argmax(1) != LABELS).float()),
        (lambda o, y: (o.argmax(1) != y).int(), lambda o: (o.argmax(1) != LABELS).float()),
        (lambda o, y: o.numpy().argmax(1) != y.numpy(), lambda o: (o.argmax(1) != LABELS).float()),
        (lambda o, y: o.sum(1).tolist(), lambda o: o.sum(1)),
        (lambda o, y: tuple(float(row.sum()) for row in o), lambda o: o.sum(1)),
        (lambda o, y: [row.sum() for row in o], lambda o: o.sum(1)),
        (lambda o, y: o.sum(1).half(), lambda o: o.sum(1).half().float()),
        (lambda o, y: o.sum(1).bfloat16(), lambda o: o.sum(1).bfloat16().float()),
        (lambda o, y: o.sum(1).double(), lambda o: o.sum(1).double()),
    ],
)
def test_one_number_a_sample(loss: Any, formula: Callable[[Tensor], Tensor]) -> None:
    output = make_output()
    result = SampleLoss(loss)(output, LABELS, N)
    torch.testing.assert_close(result, formula(output), rtol=1e-6, atol=1e-6)
    assert result.dtype in (torch.float32, torch.float64)
    assert not result.requires_grad


@pytest.mark.parametrize(
    ("loss", "shape", "formula"),
    [
        (F.cross_entropy, (5,), lambda o, y: F.cross_entropy(o, y, reduction="none").mean(1)),
        (nn.CrossEntropyLoss(), (2, 3), lambda o, y: F.cross_entropy(o, y, reduction="none").flatten(1).mean(1)),
        (
            nn.CrossEntropyLoss(reduction="sum"),
            (2, 3),
            lambda o, y: F.cross_entropy(o, y, reduction="none").flatten(1).sum(1),
        ),
        (nn.CrossEntropyLoss(reduction="none"), (5,), lambda o, y: F.cross_entropy(o, y, reduction="none").mean(1)),
    ],
)
def test_positions_and_pixels(loss: Any, shape: tuple[int, ...], formula: Callable[[Tensor, Tensor], Tensor]) -> None:
    output = make_output(*shape)
    target = torch.randint(0, CLASSES, (N, *shape))
    torch.testing.assert_close(SampleLoss(loss)(output, target, N), formula(output, target))


def test_reductions_keep_their_meaning_beyond_the_samples() -> None:
    """A sample's loss averaged over the batch is what the loss returns by itself, for mean and batchmean."""
    output, target = make_output(), torch.rand(N, CLASSES)
    for loss in (
        nn.MSELoss(),
        nn.SmoothL1Loss(),
        nn.KLDivLoss(reduction="batchmean"),
        nn.BCEWithLogitsLoss(),
        F.l1_loss,
        functools.partial(F.kl_div, reduction="batchmean"),
    ):
        torch.testing.assert_close(SampleLoss(loss)(output, target, N).mean(), loss(output, target))
    module = nn.MSELoss(reduction="sum")
    SampleLoss(module)
    assert module.reduction == "sum"  # the user's own is not written to


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda o, y: o.sum(), r"returned shape \(\) for 4 samples.*shape \(4,\).*credit=\"batch\""),
        (lambda o, y: o, r"returned shape \(4, 3\) for 4 samples"),
        (lambda o, y: o.sum(0), r"returned shape \(3,\) for 4 samples"),
        (lambda o, y: o.sum(1)[:3], r"returned shape \(3,\) for 4 samples"),
        (lambda o, y: None, "returned NoneType, which is no number"),
        (lambda o, y: "abcd", "returned str, which is no number"),
        (lambda o, y: {"loss": o.sum(1)}, "returned dict, which is no number"),
        (lambda o, y: o.sum(1).to(torch.complex64), "complex"),
    ],
)
def test_what_is_no_loss(loss: Any, message: str) -> None:
    with pytest.raises(LossShapeError, match=message):
        SampleLoss(loss)(make_output(), LABELS, N)


def test_batch_loss() -> None:
    output = make_output()
    for loss in (
        lambda o, y: o.sum(),
        lambda o, y: o.sum().reshape(1, 1),
        lambda o, y: float(o.sum()),
        lambda o, y: o.numpy().sum(),
        lambda o, y: [o.sum()],
    ):
        result = BatchLoss(loss)(output, LABELS, N)
        assert result.shape == ()
        torch.testing.assert_close(result, output.sum())
    with pytest.raises(LossShapeError, match=r"returned shape \(4,\); with credit=\"batch\""):
        BatchLoss(lambda o, y: o.sum(1))(output, LABELS, N)


# ---- in a step


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES))


@functools.cache
def compiled_for(estimator: onward.LikelihoodRatio) -> CompiledModel:
    """The graphs hold no loss: one compilation serves every loss here."""
    return compile_model(make_model(), torch.zeros(N, 5), estimator)


def make_program(loss: Any, **settings: Any) -> onward.Program:
    estimator = onward.LikelihoodRatio(**{"copies": 8, **settings})
    return onward.Program(make_model(), compiled_for(estimator), loss, seed=0)


def gradients(program: onward.Program, target: Any = LABELS) -> Tensor:
    program.step(torch.randn(N, 5, generator=torch.Generator().manual_seed(1)), target)
    result = torch.cat([p.grad.flatten() for p in program.model.parameters() if p.grad is not None])
    program.model.zero_grad()
    return result


def rows_of(target: Any) -> Tensor:
    return torch.as_tensor(np.asarray(target, dtype=np.int64))


@pytest.mark.parametrize(
    ("target", "labels"),
    [
        (LABELS, lambda t: t),
        (LABELS.numpy(), rows_of),
        (LABELS.tolist(), rows_of),
        ({"labels": LABELS, "names": ["a", "b", "c", "d"], "scale": 1.0}, lambda t: t["labels"]),
        ((LABELS, {"array": LABELS.numpy()}), lambda t: rows_of(t[1]["array"])),
        ([LABELS, LABELS], lambda t: t[1]),
        ([{"label": label} for label in LABELS], lambda t: torch.stack([entry["label"] for entry in t])),
        (
            [torch.full((count + 1,), int(label)) for count, label in enumerate(LABELS)],
            lambda t: torch.stack([e[0] for e in t]),
        ),
        ({"labels": LABELS, "nothing": None, "temperature": torch.tensor(1.0)}, lambda t: t["labels"]),
    ],
    ids=["tensor", "array", "list", "dict", "nested", "list of tensors", "list of dicts", "ragged", "scalars"],
)
@pytest.mark.parametrize("chunk", [None, 4])
def test_targets_are_repeated_for_the_copies(target: Any, labels: Callable[[Any], Tensor], chunk: int | None) -> None:
    """The same gradient whatever the form of the target: every copy's loss gets its own sample's labels."""
    expected = gradients(make_program(lambda o, y: F.cross_entropy(o, y, reduction="none"), chunk=chunk))
    found = gradients(make_program(lambda o, t: F.cross_entropy(o, labels(t), reduction="none"), chunk=chunk), target)
    assert torch.equal(expected, found)


def test_names_are_repeated_with_their_samples() -> None:
    names = ["a", "b", "c", "d"]
    seen: list[Any] = []

    def loss(output: Tensor, target: Any) -> Tensor:
        seen.append(target["names"])
        return output.sum(1)

    gradients(make_program(loss, groups="joint"), {"names": names, "labels": LABELS})
    assert seen == [names, names * 8]


def test_antithetic_halves_pair_the_same_sample() -> None:
    """Hazard 11: the batch is tiled, so copy d and its twin at d + K/2 hold each sample at the same place."""
    outputs: list[Tensor] = []
    targets: list[Tensor] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        outputs.append(output.clone())
        targets.append(target)
        return output.sum(1)

    program = make_program(loss, groups="joint", sigma=1e-3)
    gradients(program)
    clean, perturbed = outputs
    assert torch.equal(targets[1], LABELS.repeat(8))
    copies = perturbed.reshape(8, N, CLASSES)
    plus, minus = copies[:4], copies[4:]
    assert (plus - clean).abs().min() > 0
    # to first order in σ the twins lie on opposite sides of the clean run
    torch.testing.assert_close(plus + minus - 2 * clean, torch.zeros_like(plus), rtol=0, atol=1e-5)


def test_batch_credit_gets_the_target_as_it_is() -> None:
    target = {"labels": LABELS.tolist(), "anything": object()}
    seen: list[Any] = []

    def loss(output: Tensor, given: Any) -> float:
        seen.append(given)
        assert output.shape == (N, CLASSES)
        return float(F.cross_entropy(output, torch.tensor(given["labels"])))

    gradients(make_program(loss, credit="batch", groups="joint"), target)
    assert len(seen) == 9
    assert all(given is target for given in seen)


def test_targets_of_another_length() -> None:
    program = make_program(F.cross_entropy)
    for target in (LABELS[:3], LABELS[:3].numpy(), LABELS[:3].tolist(), {"a": LABELS, "b": LABELS[:3]}):
        with pytest.raises(BatchError, match="the target's first dimension is 3 but the batch has 4 samples"):
            gradients(program, target)


# ---- what a black box may do


def test_half_precision_losses_do_not_underflow() -> None:
    """The losses' weights carry 1 / (σ K N): in float16 they would lose their digits."""
    exact = gradients(make_program(lambda o, y: F.cross_entropy(o, y, reduction="none").half().float(), sigma=0.5))
    half = gradients(make_program(lambda o, y: F.cross_entropy(o, y, reduction="none").half(), sigma=0.5))
    assert torch.equal(exact, half)


def test_a_loss_may_reuse_its_memory() -> None:
    """Returned as a view of one buffer that every call overwrites."""
    buffer = np.zeros(8 * N, dtype=np.float32)

    def loss(output: Tensor, target: Tensor) -> np.ndarray:
        result = buffer[: len(output)]
        result[:] = F.cross_entropy(output, target, reduction="none").numpy()
        return result

    for chunk in (None, 2):
        expected = gradients(make_program(F.cross_entropy, chunk=chunk))
        assert torch.equal(expected, gradients(make_program(loss, chunk=chunk)))


@pytest.mark.parametrize("settings", [{}, {"groups": "joint"}, {"credit": "batch"}], ids=str)
def test_a_loss_may_write_into_the_output(settings: dict[str, Any]) -> None:
    """Noise is added to the output's clean value later: the loss must not reach it."""

    def loss(output: Tensor, target: Tensor, write: bool) -> Tensor:
        result = F.cross_entropy(output, target, reduction="mean" if "credit" in settings else "none")
        if write:
            output.fill_(7.0)
        return result

    expected = gradients(make_program(functools.partial(loss, write=False), **settings))
    assert torch.equal(expected, gradients(make_program(functools.partial(loss, write=True), **settings)))


def test_a_loss_may_use_autograd_and_random_numbers() -> None:
    """Gradients that the loss takes inside are its own business."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = output.clone().requires_grad_()
            (inner,) = torch.autograd.grad(leaf.square().sum(), leaf)
        return inner.sum(1) + 0 * torch.rand(len(output))

    expected = gradients(make_program(lambda o, y: 2 * o.sum(1)))
    torch.testing.assert_close(expected, gradients(make_program(loss)))


def test_per_sample_loss_needs_no_tensor_target() -> None:
    program = make_program(lambda o, t: F.cross_entropy(o, rows_of(t), reduction="none"))
    output = make_output()
    found = program.per_sample_loss(output, LABELS.tolist())
    torch.testing.assert_close(found, F.cross_entropy(output, LABELS, reduction="none"))
