"""Losses that torch has none of, as plain functions ``(output, target) -> (N,)``, one number a sample.

`focal` has a derivative. `zero_one`, `f1` and `edit_distance` have none: they are what one wants to be small, and
backpropagation could only lower something else in their place. `onward.compile` takes them like any other loss. `ctc`
is torch's, with the arguments of a loss. Options are bound by ``functools.partial(losses.focal, gamma=1.0)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .passes.errors import LossShapeError


def focal(output: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """``(1 - p)^gamma (-log p)``, p being the probability of the right class (Lin et al. 2017, arXiv 1708.02002, of a
    softmax): cross-entropy that cares less for what is right already.

    Class scores ``(N, C, …)`` and class numbers ``(N, …)``; the mean over the positions of a sample.
    """
    loss = F.cross_entropy(output, target, reduction="none")
    return _a_sample((1 - torch.exp(-loss)) ** gamma * loss)


def zero_one(output: Tensor, target: Tensor) -> Tensor:
    """1 where the largest score is not that of the right class, else 0.

    Class scores ``(N, C, …)`` and class numbers ``(N, …)``; the mean over the positions of a sample.
    """
    return _a_sample((output.argmax(1) != target).to(torch.float32))


def f1(output: Tensor, target: Tensor, threshold: float = 0.0) -> Tensor:
    """``1 - F1`` of the labels that each sample is given, ``F1 = 2 both / (given + right)`` (0 where there is neither).

    Scores ``(N, L)``, a label being given where its score is above `threshold`, and ``(N, L)`` of 0 and 1, or of bools.

    Raises:
        LossShapeError: the two have other shapes.
    """
    if output.shape != target.shape or output.dim() != 2:
        raise LossShapeError(
            f"f1 compares scores (N, L) with labels (N, L) of 0 and 1, not {list(output.shape)} with "
            f"{list(target.shape)}. A class number y is F.one_hot(y, L)."
        )
    given, right = output > threshold, target > 0.5
    total = given.sum(1) + right.sum(1)
    return torch.where(total > 0, 1 - 2 * (given & right).sum(1) / total.clamp(min=1), 0.0)


def edit_distance(output: Tensor, target: Tensor | Sequence[Sequence[int]], blank: int | None = None) -> Tensor:
    """The least number of insertions, deletions and replacements (Levenshtein 1966) that make of the decoded sequence
    the right one, divided by the length of the right one (by 1 if that is empty).

    Class scores ``(N, T, C)`` are decoded greedily: the best class of every position; with a `blank`, repetitions merge
    and blanks go, as of `ctc`. The target is ``(N, S)`` of class numbers, negative ones at the end filling up, or a
    list of sequences of any lengths.

    Raises:
        LossShapeError: the scores have other dimensions, or the target has another number of sequences.
    """
    right, lengths = _padded(output, target, "edit_distance")
    best = output.argmax(2)
    keep = torch.ones_like(best, dtype=torch.bool)
    if blank is not None:
        keep = best != blank
        keep[:, 1:] &= best[:, 1:] != best[:, :-1]
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)  # what is kept moves to the front
    decoded, kept = best.gather(1, order), keep.sum(1)
    row = torch.arange(right.shape[1] + 1, device=best.device).repeat(len(best), 1)  # from the empty sequence
    rows = [row]
    for position in range(best.shape[1]):
        replaced = row[:, :-1] + (decoded[:, position, None] != right)
        entries = [row[:, 0] + 1]
        for column in range(right.shape[1]):
            least = torch.minimum(row[:, column + 1], entries[-1]) + 1
            entries.append(torch.minimum(least, replaced[:, column]))
        row = torch.stack(entries, 1)
        rows.append(row)
    table = torch.stack(rows, 1)  # (N, T + 1, S + 1): of the first so many of both
    samples = torch.arange(len(best), device=best.device)
    return table[samples, kept, lengths] / lengths.clamp(min=1)


def ctc(output: Tensor, target: Tensor | Sequence[Sequence[int]], blank: int = 0) -> Tensor:
    """``-log`` of the probability of the right sequence, summed over its alignments (Graves et al. 2006): torch's
    ``F.ctc_loss``, divided by the length of the right one as its ``reduction="mean"`` does.

    Class scores ``(N, T, C)``, not normalised, and a target as of `edit_distance`. A sequence that does not fit into T
    positions (one more for each repetition) has the loss 0, where torch's is infinite.

    Raises:
        LossShapeError: the scores have other dimensions, or the target has another number of sequences.
    """
    right, lengths = _padded(output, target, "ctc")
    steps = torch.full_like(lengths, output.shape[1])
    scores = output.log_softmax(2).transpose(0, 1)
    found = F.ctc_loss(scores, right.clamp(min=0), steps, lengths, blank, reduction="none", zero_infinity=True)
    return found / lengths.clamp(min=1)


def _a_sample(losses: Tensor) -> Tensor:
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def _padded(output: Tensor, target: Tensor | Sequence[Sequence[int]], name: str) -> tuple[Tensor, Tensor]:
    """The target as ``(N, S)``, -1 where there is nothing, and its lengths ``(N,)``."""
    if output.dim() != 3 or len(output) != len(target):
        raise LossShapeError(
            f"{name} takes scores (N, T, C) and N sequences of class numbers, not {list(output.shape)} and "
            f"{len(target)} sequences."
        )
    if not isinstance(target, Tensor):
        rows = [torch.as_tensor(row, dtype=torch.int64).reshape(-1) for row in target]
        target = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(output.device)
    present = target >= 0
    return target, present.sum(1)
