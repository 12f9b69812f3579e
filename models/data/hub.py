"""Data sets of images from the Hugging Face hub, with its library `datasets`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...passes.errors import DataError
from .dataset import Dataset, make_dataset
from .images import images_to_tensor


@dataclass(frozen=True)
class HubSource:
    """Where on the Hugging Face hub a data set of images lies.

    Attributes:
        path: Name on the hub, or a local folder of Parquet files.
        image: Column of the images.
        label: Column of the class numbers.
        num_classes: Number of classes.
        about: What the data are, for `Dataset.source`.
        mode: Pillow's mode that all images are brought into: "RGB" or "L".
        test: The split to test on; that for training is "train".
    """

    path: str
    image: str
    label: str
    num_classes: int
    about: str
    mode: str = "RGB"
    test: str = "test"


HUB_SOURCES: dict[str, HubSource] = {
    "fashion-mnist": HubSource(
        "zalando-datasets/fashion_mnist",
        "image",
        "label",
        10,
        "Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747)",
        mode="L",
    ),
    "cifar10": HubSource("uoft-cs/cifar10", "img", "label", 10, "CIFAR-10 (Krizhevsky 2009)"),
    "cifar100": HubSource("uoft-cs/cifar100", "img", "fine_label", 100, "CIFAR-100, fine labels (Krizhevsky 2009)"),
    # Some of its images are gray; the labels of its own test split have never been published.
    "tiny-imagenet": HubSource(
        "zh-plus/tiny-imagenet", "image", "label", 200, "Tiny-ImageNet, 64×64 (Stanford CS231n, 2015)", test="valid"
    ),
}


def split_to_tensors(split: Any, image: str, label: str, mode: str = "RGB") -> tuple[Tensor, Tensor]:
    """Convert a split of a `datasets.Dataset` to (images as `images_to_tensor` has them, class numbers as int64).

    Images of another Pillow mode than `mode` are converted.

    Raises:
        DataError: The column `image` or `label` is missing, or the images are not as `images_to_tensor` needs them.
    """
    check_columns(split, image, label)
    images = images_to_tensor(picture.convert(mode) for picture in split[image])
    return images, torch.tensor(list(split[label]), dtype=torch.int64)


def load_splits(name: str, path: str, root: Path | None, *, twin: str) -> Any:
    """The splits of the hub's data set at `path`, with the library `datasets`, cached under `root` if that is given.

    Args:
        name: Its name in `DATASETS`, for errors.
        path: Name on the hub, or a local folder of Parquet files.
        root: Folder of the cache.
        twin: The data set that errors name, which needs no network.

    Raises:
        DataError: The library cannot be imported, or the data set not be loaded.
    """
    try:
        import PIL  # noqa: F401  # The library decodes images with Pillow but does not require it.
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"data set {name!r} needs the libraries 'datasets' and 'pillow', which cannot be imported ({error}). "
            f"Install them with: pip install 'onward[data]'. The data set {twin!r} does not need them."
        ) from error
    try:
        return load_dataset(path, cache_dir=None if root is None else str(root))
    except Exception as error:  # The library lets through those of its HTTP client, of the file system and its own.
        raise DataError(
            f"data set {name!r} ({path}) could not be loaded: {type(error).__name__}: {error}. Without a "
            "network it must be in the cache: load it once where there is one, point HF_HOME to that cache (or give "
            f"its folder as root), and set HF_DATASETS_OFFLINE=1. The data set {twin!r} needs no network."
        ) from error


def check_columns(split: Any, *columns: str) -> None:
    """Raises DataError unless a split of a `datasets.Dataset` has these columns."""
    for column in columns:
        if column not in split.column_names:
            raise DataError(f"the data set has no column {column!r}; it has {', '.join(split.column_names)}.")


def load_hub(name: str, source: HubSource, root: Path | None) -> Dataset:
    """Load `source` with the library `datasets`, cached under `root` if that is given."""
    splits = load_splits(name, source.path, root, twin="digits")
    for split in ("train", source.test):
        if split not in splits:
            raise DataError(f"data set {name!r} ({source.path}) has no split {split!r}; it has {', '.join(splits)}.")
    return make_dataset(
        name,
        split_to_tensors(splits["train"], source.image, source.label, source.mode),
        split_to_tensors(splits[source.test], source.image, source.label, source.mode),
        num_classes=source.num_classes,
        source=f"{source.about}, from the Hugging Face hub ({source.path}), trained on its split 'train' and tested on "
        f"its split {source.test!r}.",
    )


def hub_loader(name: str) -> Callable[[int, Path | None], Dataset]:
    """The loader of the hub's data set `name`. It has splits of its own, so the seed is not used."""
    return lambda seed, root: load_hub(name, HUB_SOURCES[name], root)
