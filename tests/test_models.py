"""The zoo: shapes, sizes, initialisation, export, compilation, learning, straight-through twins, and models by name."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import onward
from onward.models import (
    MODELS,
    TWINS,
    binarised_cnn,
    build,
    build_for,
    load,
    loaders,
    mlp,
    quantised_cnn,
    resnet5,
    resnet9,
    resnet18,
    spiking_cnn,
    twin_of,
    vgg8,
    vit,
)
from onward.models.layers import ACTIVATIONS, NORMS, Quantise, Sign
from onward.models.transformer import SelfAttention
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
    num_tokens: int = 0
    """Of inputs that are tokens."""

    def batch(self, size: int) -> torch.Tensor:
        """Random inputs."""
        if self.num_tokens:
            return torch.randint(0, self.num_tokens, (size, *self.input_shape))
        return torch.randn(size, *self.input_shape)


def conv(inputs: int, outputs: int, kernel: int = 3) -> int:
    return inputs * outputs * kernel**2 + outputs


def fc(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def block(width: int, hidden: int) -> int:
    return fc(width, 3 * width) + fc(width, width) + fc(width, hidden) + fc(hidden, width) + 4 * width


CASES = [
    Case("mlp", {}, (1, 8, 8), 10, 3, fc(64, 128) + fc(128, 64) + fc(64, 10)),
    Case("mlp", {"in_features": 5, "hidden": (), "num_classes": 3}, (5,), 3, 1, fc(5, 3)),
    Case("mlp", {"hidden": (7, 6), "depth": 5}, (64,), 10, 5, fc(64, 7) + fc(7, 6) + 2 * fc(6, 6) + fc(6, 10)),
    Case("sign_mlp", {}, (1, 8, 8), 10, 3, fc(64, 128) + fc(128, 64) + fc(64, 10)),
    Case("sign_mlp", {"in_features": 5, "hidden": (4,), "num_classes": 3}, (5,), 3, 2, fc(5, 4) + fc(4, 3)),
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
    Case("quantised_cnn", {}, (1, 8, 8), 10, 4, conv(1, 16) + conv(16, 32) + conv(32, 32) + fc(32, 10)),
    Case(
        "quantised_cnn",
        {"width": 2, "in_channels": 3, "num_classes": 4, "levels": 2},
        (3, 7, 9),
        4,
        4,
        conv(3, 2) + conv(2, 4) + conv(4, 4) + fc(4, 4),
    ),
    Case(
        "resnet18",
        {"width": 2, "in_channels": 1},
        (1, 9, 8),
        10,
        21,
        conv(1, 2)
        + 4 * conv(2, 2)
        + sum(conv(w, 2 * w) + 3 * conv(2 * w, 2 * w) + conv(w, 2 * w, 1) for w in (2, 4, 8))
        + fc(16, 10),
    ),
    Case("spiking_mlp", {"hidden": (7, 6), "steps": 2}, (1, 8, 8), 10, 3, fc(64, 7) + fc(7, 6) + fc(6, 10)),
    Case("spiking_cnn", {"width": 2, "steps": 2}, (1, 8, 8), 10, 3, conv(1, 2) + conv(2, 4) + 6 + fc(64, 10)),
    Case("binarised_mlp", {"hidden": (7, 6)}, (1, 8, 8), 10, 3, fc(64, 7) + fc(7, 6) + fc(6, 10)),
    Case("binarised_cnn", {"width": 2}, (1, 8, 8), 10, 3, conv(1, 2) + conv(2, 4) + 6 + fc(64, 10)),
    Case("integer_mlp", {"hidden": (7, 6)}, (1, 8, 8), 10, 3, fc(64, 7) + fc(7, 6) + fc(6, 10)),
    Case("integer_cnn", {"width": 2}, (1, 8, 8), 10, 3, conv(1, 2) + conv(2, 4) + fc(64, 10)),
    Case("vit", {}, (1, 8, 8), 10, 18, 4 * 64 + 16 * 64 + 4 * block(64, 128) + 2 * 64 + fc(64, 10)),
    Case(
        "vit",
        {"width": 8, "depth": 1, "heads": 2, "expansion": 3, "in_channels": 3, "image_size": 28, "num_classes": 3},
        (3, 28, 28),
        3,
        6,
        48 * 8 + 49 * 8 + block(8, 24) + 2 * 8 + fc(8, 3),
    ),
    Case("rnn_text", {"num_tokens": 9}, (5,), 10, 1, 9 * 32 + 2 * 32 * 32 + fc(32, 10), 9),
    *(
        Case(
            name,
            {"num_tokens": 9, "num_classes": 3, "width": 4, "hidden": 6, "layers": 2},
            (5,),
            3,
            1,
            9 * 4 + gates * (4 * 6 + 3 * 6 * 6) + fc(6, 3),
            9,
        )
        for name, gates in (("rnn_text", 1), ("gru_text", 3), ("lstm_text", 4))
    ),
    Case(
        "gpt",
        {"num_tokens": 9, "length": 5, "width": 8, "depth": 1},
        (5,),
        9,
        5,
        9 * 8 + 5 * 8 + block(8, 16) + 2 * 8 + fc(8, 9),
        9,
    ),
]
WEIGHT_LAYERS = (nn.Linear, nn.Conv2d)
with_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{len(case.options)}")

# Each network that has the option `norm` with each normalisation, and the others as they are.
with_case_and_norm = pytest.mark.parametrize(
    ("case", "norm"),
    [
        (case, norm)
        for case in CASES
        for norm in (NORMS if "norm" in inspect.signature(MODELS[case.name]).parameters else ["default"])
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.name}-{len(value.options)}",
)


def build_case(case: Case, norm: str) -> nn.Module:
    return build(case.name, **case.options, **({} if norm == "default" else {"norm": norm}))


@with_case_and_norm
def test_logits_have_one_row_a_sample(case: Case, norm: str) -> None:
    logits = build_case(case, norm)(case.batch(6))
    assert logits.shape == (6, *(case.input_shape if case.name == "gpt" else ()), case.num_classes)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


@with_case
def test_layers_and_parameters_are_counted(case: Case) -> None:
    model = build(case.name, **case.options)
    assert sum(isinstance(module, WEIGHT_LAYERS) for module in model.modules()) == case.num_weight_layers
    assert sum(parameter.numel() for parameter in model.parameters()) == case.num_parameters


@pytest.mark.parametrize("factory", [resnet5, resnet9, resnet18, vgg8, quantised_cnn, spiking_cnn, binarised_cnn])
def test_a_norm_follows_every_convolution(factory: Any) -> None:
    for norm, kind in {"batch": nn.BatchNorm2d, "group": nn.GroupNorm}.items():
        modules = list(factory(norm=norm, width=6).modules())
        convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
        assert sum(isinstance(module, kind) for module in modules) == len(convolutions)
        assert all(module.bias is None for module in convolutions)


@pytest.mark.filterwarnings("ignore:The tensor attributes self.recurrent._flat_weights")  # torch, of its own layers
@with_case_and_norm
@pytest.mark.parametrize("training", [False, True])
def test_exports_with_any_batch_size(case: Case, norm: str, training: bool) -> None:
    model = build_case(case, norm).train(training)
    batch = case.batch(5)
    program = torch.export.export(model, (batch[:4],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    exported = program.module()
    with torch.no_grad():
        for size in (2, 5):
            torch.testing.assert_close(exported(batch[:size]), model(batch[:size]))


@pytest.mark.parametrize("name", ["sign_mlp", "quantised_cnn", "vit", "spiking_cnn", "binarised_cnn", "integer_cnn"])
def test_compiles_and_steps_with_any_batch_size(name: str) -> None:
    """The compiler takes the models of the zoo that have what the others have not: no derivative, attention."""
    torch.manual_seed(0)
    options = {"sign_mlp": {"hidden": (8, 8)}, "vit": {"width": 8, "depth": 1}}
    model = build(name, **options.get(name, {"width": 4}))
    batch, targets = torch.randn(6, 1, 8, 8), torch.arange(6)
    estimator = onward.LikelihoodRatio.feedback_learned(copies=2, reach=1, warmup=1)
    program = onward.compile(model, (batch[:4],), loss=F.cross_entropy, estimator=estimator)
    for size in (4, 6, 3):
        model.zero_grad()
        assert torch.as_tensor(program.step(batch[:size], targets[:size])).isfinite().all()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert [name for name, gradient in gradients.items() if gradient is not None and not gradient.any()] == []


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gains_keep_the_second_moment(activation: str) -> None:
    factory, gain = ACTIVATIONS[activation]
    check_gain(factory(), gain)


@pytest.mark.parametrize("levels", [2, 3, 4, 16])
@pytest.mark.parametrize("scale", [0.5, 2.0, 3.0])
def test_a_quantisers_gain_keeps_the_second_moment(levels: int, scale: float) -> None:
    quantiser = Quantise(levels, scale)
    check_gain(quantiser, quantiser.gain)


def check_gain(module: nn.Module, gain: float) -> None:
    torch.manual_seed(0)
    second_moment = module(torch.randn(400_000)).square().mean().item()
    assert gain**2 * second_moment == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("mlp", {"hidden": (256,) * 8}, (64,)),
        ("mlp", {"hidden": (256,), "depth": 12}, (64,)),
        ("sign_mlp", {"hidden": (256,) * 8}, (64,)),
        ("quantised_cnn", {"levels": 3, "scale": 1.0}, (1, 8, 8)),
        ("resnet5", {}, (1, 8, 8)),
        ("resnet9", {"width": 16}, (3, 32, 32)),
        ("resnet18", {"width": 8}, (3, 32, 32)),
        ("spiking_mlp", {"hidden": (256,) * 4}, (64,)),
        ("binarised_mlp", {"hidden": (256,) * 8}, (64,)),
        ("integer_mlp", {"hidden": (256,) * 8}, (64,)),
        ("integer_cnn", {}, (1, 8, 8)),
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


@pytest.mark.parametrize(
    ("module", "bounds"),
    [(Sign, (-1.0, 1.0)), (Quantise, (0.0, 2.0)), (lambda **twin: Quantise(3, 0.7, **twin), (0.0, 0.7))],
    ids=["sign", "2 bits", "3 levels"],
)
def test_a_straight_through_twin_has_the_same_bits_and_a_clamps_derivative(module: Any, bounds: Any) -> None:
    torch.manual_seed(0)
    edges = [0.0, -0.0, 1.0, -1.0, 2.0, 0.7, 1e-40, -1e-40, 3e38, -3e38, torch.inf, -torch.inf]
    inputs = torch.cat([torch.tensor(edges), torch.randn(10_000) * 10.0 ** torch.randint(-9, 9, (10_000,))])
    twin_inputs = inputs.clone().requires_grad_()
    output = module(straight_through=True)(twin_inputs)
    torch.testing.assert_close(output.view(torch.int32), module()(inputs).view(torch.int32), atol=0, rtol=0)
    (gradient,) = torch.autograd.grad(output.sum(), twin_inputs)
    low, high = bounds
    assert torch.equal(gradient, ((inputs >= low) & (inputs <= high)).float())


@pytest.mark.parametrize(
    ("name", "options", "blocked"),
    [
        ("sign_mlp", {}, {"fc1", "fc2"}),
        ("sign_mlp", {"depth": 5}, {"fc1", "fc2", "fc3", "fc4"}),
        ("quantised_cnn", {}, {"conv1", "conv2"}),
        ("quantised_cnn", {"norm": "batch", "levels": 3, "scale": 1.0}, {"conv1", "conv2"}),
        ("spiking_mlp", {}, {"fc1", "fc2"}),
        ("spiking_cnn", {}, {"conv1", "conv2"}),
        ("binarised_mlp", {}, {"fc1", "fc2"}),
        ("binarised_cnn", {}, {"conv1", "norm1", "conv2", "norm2"}),
        ("integer_mlp", {}, {"fc1", "fc2"}),
        ("integer_cnn", {}, {"conv1", "conv2"}),
    ],
)
def test_only_the_twin_trains_what_lies_before_a_hard_operation(
    name: str, options: dict[str, Any], blocked: set[str]
) -> None:
    batch = torch.randn(16, 1, 8, 8)
    outputs, without_gradient = [], []
    for twin in (False, True):
        torch.manual_seed(0)
        model = build(name, **options, **(TWINS[name] if twin else {}))
        output = model(batch)
        torch.autograd.backward(output.square().sum())
        outputs.append(output)
        parts = {path.partition(".")[0]: False for path, _ in model.named_parameters()}
        for path, parameter in model.named_parameters():
            parts[path.partition(".")[0]] |= parameter.grad is not None and bool(parameter.grad.any())
        without_gradient.append({part for part, has_gradient in parts.items() if not has_gradient})
    assert torch.equal(*outputs)
    assert without_gradient == [blocked, set()]


def test_quantisers_round_to_even_steps() -> None:
    quantised = Quantise(4, 3.0)(torch.tensor([-1.0, 0.4, 0.5, 0.6, 1.5, 2.4, 2.5, 2.6, 9.0]))
    assert quantised.tolist() == [0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0]
    assert Quantise(2, 0.5)(torch.tensor([0.2, 0.3])).tolist() == [0.0, 0.5]
    for levels, scale in ((1, 2.0), (4, 0.0), (4, torch.inf)):
        with pytest.raises(OptionError, match="at least 2 and a positive scale"):
            Quantise(levels, scale)


def test_attention_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = SelfAttention(12, 3, gain=1.0), nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    tokens = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(tokens), theirs(tokens, tokens, tokens, need_weights=False)[0])


@pytest.mark.parametrize(("image_size", "patch"), [(4, 1), (8, 2), (24, 4), (28, 4), (32, 8), (64, 16)])
def test_a_vit_chooses_its_patch(image_size: int, patch: int) -> None:
    model = vit(image_size=image_size, width=4, depth=1, heads=1)
    assert model.embed.kernel_size == (patch, patch)
    assert model.position.shape == (1, (image_size // patch) ** 2, 4)


def test_a_vit_refuses_sizes_that_do_not_divide() -> None:
    for options, message in (
        ({"image_size": 11}, "give patch"),
        ({"patch": 3}, "patch=3 and image_size=8"),
        ({"patch": 0}, "patch=0 and image_size=8"),
        ({"heads": 3}, "heads=3 and width=64"),
    ):
        with pytest.raises(OptionError, match=message):
            build("vit", **options)
    assert build("vit", image_size=11, patch=11, depth=0)(torch.zeros(2, 1, 11, 11)).shape == (2, 10)


def test_a_vit_tells_places_apart_and_names_its_blocks() -> None:
    torch.manual_seed(0)
    model = vit(width=8, depth=2, heads=2)
    image = torch.randn(1, 1, 8, 8)
    assert not torch.allclose(model(image), model(image.flip(3)), atol=1e-3)
    # By whole patches: without positions the mean over the tokens would not notice.
    assert not torch.allclose(model(image), model(image.roll(2, dims=3)), atol=1e-3)
    assert {"blocks.0.attention.qkv", "blocks.1.fc2"} < dict(model.named_modules()).keys()


@pytest.mark.parametrize(
    ("hidden", "depth", "widths"),
    [
        ((5,), 4, [5, 5, 5]),
        ((7, 5), 4, [7, 5, 5]),
        ((7, 5), 2, [7]),
        ((7, 5), 1, []),
        ((), 1, []),
        ((7, 5), None, [7, 5]),
    ],
)
@pytest.mark.parametrize("name", ["mlp", "sign_mlp"])
def test_depth_repeats_or_cuts_the_hidden_widths(
    name: str, hidden: tuple[int, ...], depth: int | None, widths: list[int]
) -> None:
    layers = [module for module in build(name, hidden=hidden, depth=depth).modules() if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in layers] == [*widths, 10]


def test_depth_needs_a_layer_and_a_width() -> None:
    for hidden, depth in (((5,), 0), ((), 2)):
        with pytest.raises(OptionError, match=f"depth={depth} "):
            mlp(hidden=hidden, depth=depth)


@with_case
def test_initialisation_and_forward_are_deterministic(case: Case) -> None:
    def run() -> torch.Tensor:
        torch.manual_seed(3)
        model = build(case.name, **case.options)
        return model(batch)

    batch = case.batch(4)
    first = run()
    torch.rand(7)
    assert torch.equal(run(), first)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks as small as these are many times slower on several threads when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "options", "learning_rate", "epochs"),
    [
        ("mlp", {}, 3e-3, 3),
        ("mlp", {"depth": 12}, 1e-3, 5),
        ("sign_mlp", {"straight_through": True}, 3e-3, 4),
        ("resnet5", {}, 5e-3, 6),
        ("quantised_cnn", {"straight_through": True}, 5e-3, 6),
        ("vit", {}, 1e-3, 6),
        ("spiking_mlp", {"surrogate": True}, 3e-3, 4),
    ],
)
def test_learns_digits_by_backpropagation(
    name: str, options: dict[str, Any], learning_rate: float, epochs: int, one_thread: None
) -> None:
    """A looser bound in fewer epochs than the recipe, so that only a broken model or data set fails it."""
    dataset = load("digits")
    torch.manual_seed(0)
    model = build(name, **options)
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
    if "num_tokens" in inspect.signature(MODELS[name]).parameters:
        model, text = build_for(name, Info((7,), 3, num_tokens=5)), torch.randint(0, 5, (2, 7))
        assert model(text).shape == ((2, 7, 5) if name == "gpt" else (2, 3))
        return
    dataset = load("karate" if name in ("gcn", "gat") else "digits")
    model = build_for(name, dataset)
    inputs, target = dataset.batch(2)
    output = model(*inputs) if dataset.unbatched else model(inputs)
    assert output.shape == (len(target), dataset.num_classes)


@pytest.mark.parametrize("name", ["mlp", *TWINS])
def test_a_twin_has_the_models_weights_and_forward_and_leaves_random_numbers_alone(name: str) -> None:
    dataset, before = load("digits"), torch.get_rng_state()
    model = build_for(name, dataset)
    torch.set_rng_state(before)
    twin = twin_of(name, dataset, model)
    assert torch.equal(torch.get_rng_state(), before)
    inputs = dataset.test.tensors[0][:8]
    assert torch.equal(twin(inputs), model(inputs))
    torch.autograd.backward(twin(inputs).square().sum())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in twin.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@dataclass(frozen=True)
class Info:
    input_shape: tuple[int, ...]
    num_classes: int
    num_tokens: int = 0


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
    with pytest.raises(UnknownNameError, match=r"unknown option of model 'resnet5' 'widht'. Did you mean 'width'\?"):
        build("resnet5", widht=8)
    with pytest.raises(OptionError, match="image_size must be at least 8"):
        build("vgg8", image_size=4)
