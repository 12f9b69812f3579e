"""The zoo: shapes, sizes, initialisation, export, learning, and models by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onward.models import MODELS, build, build_for, load, loaders, mlp, resnet5, resnet9, vgg8
from onward.models.layers import ACTIVATIONS, NORMS
from onward.passes.errors import OptionError, UnknownNameError


@dataclass(frozen=True)
class Case:
    """One network, a small instance of it, and what is known of that."""

    name: str
    options: dict[str, Any]
    input_shape: tuple[int, ...]
    num_classes: int
    num_weight_layers: int
    num_parameters: int


def conv(inputs: int, outputs: int, kernel: int = 3) -> int:
    return inputs * outputs * kernel**2 + outputs


def fc(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


CASES = [
    Case("mlp", {}, (1, 8, 8), 10, 3, fc(64, 128) + fc(128, 64) + fc(64, 10)),
    Case("mlp", {"in_features": 5, "hidden": (), "num_classes": 3}, (5,), 3, 1, fc(5, 3)),
    Case("resnet5", {}, (1, 8, 8), 10, 5, conv(1, 16) + conv(16, 32) + conv(32, 32) + conv(16, 32, 1) + fc(32, 10)),
    Case(
        "resnet9",
        {"width": 4, "num_classes": 7},
        (3, 16, 16),
        7,
        9,
        conv(3, 4) + conv(4, 8) + 2 * conv(8, 8) + conv(8, 16) + conv(16, 32) + 2 * conv(32, 32) + fc(32, 7),
    ),
    Case(
        "vgg8",
        {"width": 4, "in_channels": 1, "image_size": 16},
        (1, 16, 16),
        10,
        8,
        conv(1, 4) + conv(4, 4) + conv(4, 8) + conv(8, 8) + conv(8, 16) + conv(16, 16) + fc(64, 32) + fc(32, 10),
    ),
]
WEIGHT_LAYERS = (nn.Linear, nn.Conv2d)
with_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{len(case.options)}")

# Each network of images with each normalisation, and the others as they are.
with_case_and_norm = pytest.mark.parametrize(
    ("case", "norm"),
    [(case, norm) for case in CASES for norm in (["default"] if case.name == "mlp" else NORMS)],
    ids=lambda value: value if isinstance(value, str) else f"{value.name}-{len(value.options)}",
)


def build_case(case: Case, norm: str) -> nn.Module:
    return build(case.name, **case.options, **({} if norm == "default" else {"norm": norm}))


@with_case_and_norm
def test_logits_have_one_row_a_sample(case: Case, norm: str) -> None:
    logits = build_case(case, norm)(torch.randn(6, *case.input_shape))
    assert logits.shape == (6, case.num_classes)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


@with_case
def test_layers_and_parameters_are_counted(case: Case) -> None:
    model = build(case.name, **case.options)
    assert sum(isinstance(module, WEIGHT_LAYERS) for module in model.modules()) == case.num_weight_layers
    assert sum(parameter.numel() for parameter in model.parameters()) == case.num_parameters


@pytest.mark.parametrize("factory", [resnet5, resnet9, vgg8])
def test_a_norm_follows_every_convolution(factory: Any) -> None:
    for norm, kind in {"batch": nn.BatchNorm2d, "group": nn.GroupNorm}.items():
        modules = list(factory(norm=norm, width=6).modules())
        convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
        assert sum(isinstance(module, kind) for module in modules) == len(convolutions)
        assert all(module.bias is None for module in convolutions)


@with_case_and_norm
@pytest.mark.parametrize("training", [False, True])
def test_exports_with_any_batch_size(case: Case, norm: str, training: bool) -> None:
    model = build_case(case, norm).train(training)
    batch = torch.randn(5, *case.input_shape)
    program = torch.export.export(model, (batch[:4],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    exported = program.module()
    with torch.no_grad():
        for size in (2, 5):
            torch.testing.assert_close(exported(batch[:size]), model(batch[:size]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gains_keep_the_second_moment(activation: str) -> None:
    torch.manual_seed(0)
    factory, gain = ACTIVATIONS[activation]
    second_moment = factory()(torch.randn(400_000)).square().mean().item()
    assert gain**2 * second_moment == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("mlp", {"hidden": (256,) * 8}, (64,)),
        ("mlp", {"hidden": (256,) * 8, "activation": "sign"}, (64,)),
        ("resnet5", {}, (1, 8, 8)),
        ("resnet9", {"width": 16}, (3, 32, 32)),
        ("vgg8", {"width": 16}, (3, 32, 32)),
    ],
)
def test_signals_keep_their_size_without_normalisation(
    name: str, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = build(name, **options)
    sizes = []
    for module in model.modules():
        if isinstance(module, WEIGHT_LAYERS):
            module.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.std().item()))
    with torch.no_grad():
        model(torch.randn(32, *shape))
    assert min(sizes) > 0.3
    assert max(sizes) < 3.0


@pytest.mark.parametrize(("activation", "values"), [("sign", [-1.0, 0.0, 1.0]), ("step", [0.0, 0.0, 1.0])])
def test_activations_without_derivative(activation: str, values: list[float]) -> None:
    factory, _ = ACTIVATIONS[activation]
    assert factory()(torch.tensor([-2.0, 0.0, 3.0])).tolist() == values
    model = mlp(4, (5,), 3, activation=activation)
    torch.autograd.backward(model(torch.randn(7, 4)).sum())
    gradient = model.get_parameter("fc1.weight").grad
    assert gradient is None or not gradient.any()


def test_initialisation_follows_the_global_seed() -> None:
    def first_weight() -> torch.Tensor:
        torch.manual_seed(3)
        return next(resnet5().parameters()).detach()

    assert torch.equal(first_weight(), first_weight())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks as small as these are many times slower on several threads when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("factory", "learning_rate", "epochs"), [(mlp, 3e-3, 3), (resnet5, 5e-3, 6)], ids=["mlp", "resnet5"]
)
def test_learns_digits_by_backpropagation(factory: Any, learning_rate: float, epochs: int, one_thread: None) -> None:
    """A looser bound in fewer epochs than the recipe, so that only a broken model or data set fails it."""
    dataset = load("digits")
    torch.manual_seed(0)
    model = factory()
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    train, _ = loaders(dataset, batch_size=32, seed=0)
    for _ in range(epochs):
        for inputs, targets in train:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    inputs, targets = dataset.test.tensors
    with torch.no_grad():
        accuracy = (model(inputs).argmax(dim=1) == targets).float().mean().item()
    assert accuracy > 0.9


@pytest.mark.parametrize("name", MODELS)
def test_build_for_fits_the_data_set(name: str) -> None:
    dataset = load("digits")
    model = build_for(name, dataset)
    assert model(dataset.test.tensors[0][:2]).shape == (2, 10)


@dataclass(frozen=True)
class Info:
    input_shape: tuple[int, ...]
    num_classes: int


def test_build_for_passes_only_what_the_factory_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factories_of_mine.py").write_text(
        "from torch import nn\n"
        "def fixed(): return nn.Linear(4, 2)\n"
        "def fitted(num_classes, bias=True): return nn.Linear(4, num_classes, bias=bias)\n"
        "def broken(): return 3\n"
        "number = 3\n"
    )
    (tmp_path / "factories_that_fail.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    info = Info((4,), 9)
    assert build_for("factories_of_mine:fixed", info)(torch.zeros(1, 4)).shape == (1, 2)
    assert build_for("factories_of_mine:fitted", info)(torch.zeros(1, 4)).shape == (1, 9)
    assert build_for("factories_of_mine:fitted", info, num_classes=5, bias=False)(torch.zeros(1, 4)).shape == (1, 5)
    with pytest.raises(OptionError, match=r"returned a int, not a torch\.nn\.Module"):
        build("factories_of_mine:broken")
    with pytest.raises(OptionError, match="cannot be called"):
        build("factories_of_mine:number")
    with pytest.raises(UnknownNameError, match="Did you mean 'fitted'"):
        build("factories_of_mine:fited")
    with pytest.raises(OptionError, match=r"cannot be imported: .*no_such_module_at_all"):
        build("factories_that_fail:model")
    sys.modules.pop("factories_of_mine")


def test_build_for_needs_square_images_only_where_a_size_is_asked_for() -> None:
    assert build_for("resnet5", Info((1, 8, 12), 4))(torch.zeros(2, 1, 8, 12)).shape == (2, 4)
    with pytest.raises(OptionError, match="square images"):
        build_for("vgg8", Info((1, 8, 12), 4))


def test_unknown_names_show_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown model 'resnet_5'. Did you mean 'resnet5'\?"):
        build("resnet_5")
    with pytest.raises(UnknownNameError, match=r"unknown norm 'bach'. Did you mean 'batch'\?"):
        resnet5(norm="bach")
    with pytest.raises(UnknownNameError, match=r"unknown activation 'sing'. Did you mean 'sign'\?"):
        mlp(activation="sing")
    with pytest.raises(OptionError, match=r"package\.module:factory"):
        build(":factory")


def test_unknown_options_show_what_the_factory_takes() -> None:
    with pytest.raises(OptionError, match=r"unexpected keyword argument 'widht'. It takes \(num_classes"):
        build("resnet5", widht=8)
    with pytest.raises(OptionError, match="image_size must be at least 8"):
        build("vgg8", image_size=4)
