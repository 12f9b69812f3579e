"""A data set as tensors in memory, split and standardised, and its batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from ...passes.errors import OptionError, unknown_name
from ..augment import AUGMENTATIONS
from ..batches import TensorBatches


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, split, and standardised where its inputs are numbers that can be.

    Attributes:
        name: Its name in `DATASETS`.
        train: Inputs ``(n, *input_shape)``, float32, or int64 for tokens, and targets: of a classification int64
            ``(n,)`` in ``0 … num_classes - 1``.
        test: The same, of samples that `train` does not have.
        input_shape: Shape of one input; of an image ``(channels, height, width)``, of a text ``(length,)``.
        num_classes: Number of classes.
        source: One sentence: where the data are from, and how they were split.
        num_tokens: Size of the vocabulary of integer inputs; 0 where inputs are not tokens.
        mean: What was subtracted from both splits, float32, shaped to broadcast over a batch: one number a channel;
            None where nothing was.
        std: What both were then divided by, of the same shape.
        loss: What is trained: ``(output, target)`` to one loss a sample.
        edge_index: Of one whole graph its edges, int64 ``(2, edges)``; None where samples are independent. Both splits
            then hold all nodes, and a node's target is -100 outside the split.
    """

    name: str
    train: TensorDataset
    test: TensorDataset
    input_shape: tuple[int, ...]
    num_classes: int
    source: str
    num_tokens: int = 0
    mean: Tensor | None = None
    std: Tensor | None = None
    loss: Callable[[Any, Any], Any] = F.cross_entropy
    edge_index: Tensor | None = None

    @property
    def unbatched(self) -> bool:
        """Whether it is one sample without a batch dimension: a whole graph."""
        return self.edge_index is not None

    def batch(self, size: int) -> tuple[Any, Tensor]:
        """Inputs and target of the first training samples, of a graph the whole of it."""
        if self.edge_index is None:
            inputs, target = (tensor[:size] for tensor in self.train.tensors)
            return inputs, target
        x, target = self.train.tensors
        return (x, self.edge_index), target

    @property
    def num_features(self) -> int:
        """Numbers in one input."""
        return math.prod(self.input_shape)


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shift and scale both splits so that each channel of `train` has mean 0 and standard deviation 1.

    The statistics are those of `train` alone, over samples and positions. A channel that is constant in `train` is only
    shifted.

    Args:
        train: Float ``(n, channels, ...)``.
        test: Float ``(m, channels, ...)``.

    Returns:
        Both splits anew, then mean and standard deviation, each ``(1, channels, 1, ...)``.
    """
    dims = [dim for dim in range(train.ndim) if dim != 1]
    std, mean = torch.std_mean(train, dim=dims, correction=0, keepdim=True)
    # A constant channel's deviation is zero up to the rounding of its mean.
    std = torch.where(std > 1e-6 * mean.abs(), std, torch.ones_like(std))
    return train.sub(mean).div_(std), test.sub(mean).div_(std), mean, std


def make_dataset(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    num_classes: int,
    source: str,
) -> Dataset:
    """A `Dataset` from raw splits, each (inputs, float32 ``(n, channels, ...)``; targets, int64 ``(n,)``)."""
    train_inputs, test_inputs, mean, std = standardise(train[0], test[0])
    return Dataset(
        name=name,
        train=TensorDataset(train_inputs, train[1]),
        test=TensorDataset(test_inputs, test[1]),
        input_shape=tuple(train_inputs.shape[1:]),
        num_classes=num_classes,
        mean=mean,
        std=std,
        source=source,
    )


def split_by_class(name: str, inputs: Tensor, targets: Tensor, seed: int, *, num_classes: int, about: str) -> Dataset:
    """A `Dataset` of a fifth of each class for testing, drawn by `seed`, and the rest for training.

    Args:
        name: Its name in `DATASETS`.
        inputs: float32 ``(n, channels, ...)``.
        targets: int64 ``(n,)``.
        seed: Of the split.
        num_classes: Number of classes.
        about: What the data are, for `Dataset.source`.
    """
    train, test = stratified_rows(targets, seed)
    return make_dataset(
        name,
        (inputs[train], targets[train]),
        (inputs[test], targets[test]),
        num_classes=num_classes,
        source=f"{about}, split 80/20 within each class with seed {seed}.",
    )


def stratified_rows(targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The numbers of the samples for training, and of the fifth of each class for testing, drawn by `seed`.

    Args:
        targets: int64 ``(n,)``.
        seed: Of the split.

    Returns:
        Both int64, together ``0 … n - 1``, in random order.
    """
    # Imported here: scikit-learn takes a second to import, and nothing else needs it.
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(targets))
    train, test = train_test_split(rows, test_size=0.2, stratify=targets.numpy(), random_state=seed)
    return torch.from_numpy(train), torch.from_numpy(test)


Batches = TensorBatches | list[list[Tensor]]


def loaders(dataset: Dataset, batch_size: int, seed: int, augment: str = "none") -> tuple[Batches, Batches]:
    """Training batches, shuffled by a generator of their own that starts at `seed`, and test batches in fixed order.

    Of a whole graph both have one batch, ``[x, edge_index, target]``, whatever the other arguments.

    Args:
        dataset: Where they are from.
        batch_size: Samples in a batch; the last ones may have fewer.
        seed: Of the order and the augmentation.
        augment: What changes the training batches: a name in `onward.models.augment.AUGMENTATIONS`, or "none".

    Raises:
        UnknownNameError: No augmentation has this name.
        OptionError: `batch_size` is below 1, or what is to be augmented are no images.
    """
    if augment != "none" and augment not in AUGMENTATIONS:
        raise unknown_name("augmentation", augment, ("none", *AUGMENTATIONS))
    if augment != "none" and len(dataset.input_shape) != 3:
        raise OptionError(
            f"augmentation {augment!r} is of images; an input of {dataset.name!r} has the shape {dataset.input_shape}."
        )
    if (edges := dataset.edge_index) is not None:
        x, known = dataset.train.tensors
        return [[x, edges, known]], [[x, edges, dataset.test.tensors[1]]]
    generator = torch.Generator().manual_seed(seed)
    return (
        TensorBatches(dataset.train, batch_size, shuffle=True, generator=generator, augment=AUGMENTATIONS.get(augment)),
        TensorBatches(dataset.test, batch_size),
    )
