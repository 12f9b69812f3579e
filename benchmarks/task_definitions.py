"""Small tasks of many kinds, each with data, model, loss and score: ``tasks.py`` measures, ``test_tasks.py`` trains.

All data are scikit-learn's digits, or are generated from them: pasted on canvases, put side by side, noised. Images of
the test split never meet those of the training split.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from onward import losses, models

Split = tuple[Any, Any]
"""Inputs and targets, each any structure of tensors with the samples first."""


@dataclass(frozen=True)
class Task:
    """One task."""

    about: str
    data: Callable[[], tuple[Split, Split]]
    """Training and test split."""
    model: Callable[[], nn.Module]
    loss: Callable[[Any, Any], Any]
    """``(output, target) -> (N,)``, or a torch loss."""
    score: Callable[[Any, Any], Tensor]
    """``(output, target) -> (N,)``; the higher the better."""
    scored: str
    """What the score is."""
    epochs: int = 8
    lr: float = 3e-3
    surrogate: Callable[[Any, Any], Any] | None = None
    """What backpropagation lowers where the loss has no derivative."""
    lowers: str = ""
    """Its name."""
    plain: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `LikelihoodRatio` that train it without feedback."""
    batch: int = 64


class Batches:
    """``(inputs, target)`` of any structure in batches, shuffled by `generator` if there is one."""

    def __init__(self, split: Split, size: int, generator: torch.Generator | None = None) -> None:
        self.split, self.size, self.generator = split, size, generator
        self.samples = len(pytree.tree_leaves(split)[0])

    def __len__(self) -> int:
        return -(-self.samples // self.size)

    def __iter__(self) -> Iterator[Split]:
        rows = torch.arange(self.samples)
        if self.generator is not None:
            rows = torch.randperm(self.samples, generator=self.generator)
        for part in rows.split(self.size):
            yield take(self.split, part)


def take(split: Split, rows: Tensor | slice) -> Split:
    """Some samples."""
    inputs, target = pytree.tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, split)
    return inputs, target


# --- data -------------------------------------------------------------------------------------------------------------


@functools.cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images ``(n, 8, 8)`` in [0, 1] and labels, of both splits."""
    data = models.load("digits")
    low, high = (float(getattr(data.train.tensors[0], name)()) for name in ("min", "max"))
    return tuple(((x[:, 0] - low) / (high - low), y) for x, y in (data.train.tensors, data.test.tensors))  # type: ignore[return-value]


def both(make: Callable[[Tensor, Tensor, torch.Generator], Split]) -> Callable[[], tuple[Split, Split]]:
    """`make` on both splits of the digits."""

    def made() -> tuple[Split, Split]:
        train, test = (make(*split, torch.Generator().manual_seed(n)) for n, split in enumerate(digits()))
        return train, test

    return functools.cache(made)


def labelled(images: Tensor, labels: Tensor, generator: torch.Generator) -> Split:
    """Standardised pixels and class numbers."""
    return standard(images), labels


def standard(images: Tensor) -> Tensor:
    return (images - 0.3) / 0.37


def noised(images: Tensor, labels: Tensor, generator: torch.Generator) -> Split:
    """Images with noise, and without."""
    return images + 0.5 * torch.randn(images.shape, generator=generator), images


def triplets(images: Tensor, labels: Tensor, generator: torch.Generator) -> Split:
    """An image, another of its class, and one of another class."""
    order = torch.randperm(len(labels), generator=generator)
    draws = torch.rand(len(labels), len(labels), generator=generator)
    same = labels[:, None] == labels[None, order]
    positive, negative = (order[(draws * mask).argmax(1)] for mask in (same, ~same))
    return tuple(standard(images[rows]) for rows in (slice(None), positive, negative)), None


def strips(count: int) -> Callable[[Tensor, Tensor, torch.Generator], Split]:
    """`count` images side by side, ``(n, 8 count, 8)``: a sequence of columns; and the sequence of labels."""

    def make(images: Tensor, labels: Tensor, generator: torch.Generator) -> Split:
        rows = torch.randint(len(labels), (2 * len(labels), count), generator=generator)
        return standard(images[rows].transpose(2, 3).flatten(1, 2)), labels[rows]

    return make


def canvases(size: int) -> Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor, Tensor]]:
    """Images somewhere on an empty canvas ``(n, size, size)``, with their places and labels."""

    def make(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.arange(2 * len(labels)) % len(labels)
        places = torch.randint(size - 7, (len(rows), 2), generator=generator)
        canvas = torch.zeros(len(rows), size, size)
        for n, (y, x) in enumerate(places.tolist()):
            canvas[n, y : y + 8, x : x + 8] = images[rows[n]]
        return canvas, places, labels[rows]

    return make


def detections(images: Tensor, labels: Tensor, generator: torch.Generator) -> Split:
    """A digit on a noisy canvas; its class and its box, (top, left, bottom, right) over the canvas' size."""
    canvas, _, classes = canvases(14)(images, labels, generator)
    ink = canvas > 0.1
    ends = []
    for axis in (2, 1):
        lit = ink.any(axis).float()
        ends.append((lit.argmax(1), 14 - lit.flip(1).argmax(1)))
    (top, bottom), (left, right) = ends
    box = torch.stack([top, left, bottom, right], 1) / 14
    noise = 0.1 * torch.randn(canvas.shape, generator=generator)
    return standard(canvas + noise)[:, None], {"class": classes, "box": box}


def segments(images: Tensor, labels: Tensor, generator: torch.Generator) -> Split:
    """A digit on a noisy canvas, and which pixels are its ink."""
    canvas, _, _ = canvases(12)(images, labels, generator)
    noise = 0.3 * torch.randn(canvas.shape, generator=generator)
    return standard(canvas + noise)[:, None], (canvas > 0.3).long()


def pairs(images: Tensor, labels: Tensor, generator: torch.Generator) -> Split:
    """Two images of different classes side by side; the labels that are there, ``(n, 10)`` of 0 and 1."""
    rows = torch.randint(len(labels), (2 * len(labels), 2), generator=generator)
    rows = rows[labels[rows[:, 0]] != labels[rows[:, 1]]]
    return standard(images[rows]), F.one_hot(labels[rows], 10).sum(1).float()


# --- models -----------------------------------------------------------------------------------------------------------


def mlp(inputs: int, *widths: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip((inputs, *widths), widths, strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Embedding(nn.Module):
    """Three images by the same net, each to a point."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(64, 32, 8)

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.net(anchor), self.net(positive), self.net(negative)


class Reader(nn.Module):
    """Class scores ``(N, T, C)`` of a sequence of columns ``(N, columns, 8)``, `stride` columns a position."""

    def __init__(self, classes: int, stride: int, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv1d(8, width, 8, stride=stride, padding=0 if stride == 8 else 2)
        self.second, self.head = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x.transpose(1, 2))).transpose(1, 2)
        scores: Tensor = self.head(F.relu(self.second(hidden)))
        return scores


class Detector(nn.Module):
    """Class scores and a box."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), mlp(8 * 25, 64), nn.ReLU())
        self.classes, self.box = nn.Linear(64, 10), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x)
        return {"class": self.classes(features), "box": self.box(features).sigmoid()}


def segmenter() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )


# --- losses and scores ------------------------------------------------------------------------------------------------


def square(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target.flatten(1), reduction="none").mean(1)


def triplet(output: tuple[Tensor, Tensor, Tensor], target: None) -> Tensor:
    return F.triplet_margin_loss(*output, reduction="none")


def class_and_box(output: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    named = F.cross_entropy(output["class"], target["class"], reduction="none")
    return named + 10 * F.smooth_l1_loss(output["box"], target["box"], beta=0.1, reduction="none").mean(1)


def right(output: Tensor, target: Tensor) -> Tensor:
    return 1 - losses.zero_one(output, target)


def cleaned(output: Tensor, target: Tensor) -> Tensor:
    """The share of the images' variance that is explained; of the whole of them, not of each."""
    return 1 - (output - target.flatten(1)).square().mean(1) / target.var()


def in_order(output: tuple[Tensor, Tensor, Tensor], target: None) -> Tensor:
    anchor, positive, negative = output
    return ((anchor - positive).norm(dim=1) < (anchor - negative).norm(dim=1)).float()


def found(output: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    """Right class, and a box whose intersection with the right one is more than half of their union (the measure of
    Everingham et al. 2010, Pascal VOC)."""
    one, other = output["box"], target["box"]
    sides = (torch.minimum(one[:, 2:], other[:, 2:]) - torch.maximum(one[:, :2], other[:, :2])).clamp(min=0)
    shared = sides.prod(1)
    areas = [(box[:, 2:] - box[:, :2]).clamp(min=0).prod(1) for box in (one, other)]
    overlap = shared / (areas[0] + areas[1] - shared)
    return ((overlap > 0.5) & (output["class"].argmax(1) == target["class"])).float()


def overlap(output: Tensor, target: Tensor) -> Tensor:
    """Intersection over union of the ink."""
    given, right = output.argmax(1) == 1, target == 1
    return (given & right).flatten(1).sum(1) / (given | right).flatten(1).sum(1).clamp(min=1)


def position_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of class scores ``(N, T, C)``."""
    return F.cross_entropy(output.transpose(1, 2), target)


_IMAGES = {"about": "digits", "data": both(labelled), "model": lambda: mlp(64, 32, 10)}
_ACCURACY = {"score": right, "scored": "accuracy"}
_PLAIN = {"noise": "gaussian", "sigma": 1.0, "copies": 32}

TASKS: dict[str, Task] = {
    "cross-entropy": Task(**_IMAGES, loss=F.cross_entropy, **_ACCURACY),
    "focal": Task(**_IMAGES, loss=losses.focal, **_ACCURACY),
    "mean square": Task(
        about="clean digits from noisy ones",
        data=both(noised),
        model=lambda: mlp(64, 32, 64),
        loss=square,
        score=cleaned,
        scored="variance explained",
    ),
    "triplet": Task(
        about="three inputs, three outputs: images of a class close together",
        data=both(triplets),
        model=Embedding,
        loss=triplet,
        score=in_order,
        scored="triplets in order",
    ),
    "ctc": Task(
        about="strips of two digits, read by columns",
        data=both(strips(2)),
        model=lambda: Reader(11, 4),
        loss=lambda output, target: losses.ctc(output, target + 1),
        score=lambda output, target: 1 - losses.edit_distance(output, target + 1, blank=0),
        scored="1 - edit distance",
        lr=5e-3,
    ),
    "detection": Task(
        about="a digit on a canvas: class and box, a dictionary",
        data=both(detections),
        model=Detector,
        loss=class_and_box,
        score=found,
        scored="found",
        lr=5e-3,
    ),
    "segmentation": Task(
        about="ink on a noisy canvas, pixel by pixel",
        data=both(segments),
        model=segmenter,
        loss=F.cross_entropy,
        score=overlap,
        scored="intersection over union",
        epochs=4,
        lr=1e-2,
    ),
    "0-1": Task(
        **_IMAGES,
        loss=losses.zero_one,
        **_ACCURACY,
        lr=5e-3,
        surrogate=F.cross_entropy,
        lowers="cross-entropy",
        plain=_PLAIN,
    ),
    "F1": Task(
        about="which two digits are on a strip",
        data=both(pairs),
        model=lambda: mlp(128, 64, 10),
        loss=losses.f1,
        score=lambda output, target: 1 - losses.f1(output, target),
        scored="F1",
        surrogate=F.binary_cross_entropy_with_logits,
        lowers="binary cross-entropy",
        plain=_PLAIN,
    ),
    "edit distance": Task(
        about="strips of three digits, one position each",
        data=both(strips(3)),
        model=lambda: Reader(10, 8),
        loss=losses.edit_distance,
        score=lambda output, target: 1 - losses.edit_distance(output, target),
        scored="1 - edit distance",
        lr=5e-3,
        surrogate=position_entropy,
        lowers="cross-entropy",
        plain=_PLAIN,
    ),
}
"""The tasks by name."""
