"""Fine-tuning: what is frozen by name, what a frozen prefix costs, and models of transformers and peft."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import onward
from onward.evidence.baselines.backpropagation import Backpropagation
from onward.passes.errors import OptionError, UnknownNameError

FORWARD_ONLY = onward.LikelihoodRatio.auto(segments="op", reach=0)

# --- freeze -----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 4)
        self.head.weight = self.stem.weight


@pytest.mark.parametrize(
    ("patterns", "keep", "frozen"),
    [
        (("stem.bias",), (), "stem.bias"),
        (("blocks.1",), (), "blocks.1.weight blocks.1.bias"),
        (("stem*",), (), "stem.weight stem.bias"),
        (("head",), (), "stem.weight head.bias"),  # the weight has two names
        (("*",), "blocks.[12]", "stem.weight stem.bias blocks.0.weight blocks.0.bias head.bias"),
        (("*",), ("blocks", "head.weight"), "stem.bias head.bias"),
        (("*.bias", "blocks.[01]"), (), "stem.bias blocks.0.weight blocks.0.bias blocks.1.weight blocks.1.bias "
         "blocks.2.bias head.bias"),
        ((), (), ""),
    ],
)  # fmt: skip
def test_names_and_patterns(patterns: tuple[str, ...], keep: Any, frozen: str) -> None:
    model = Tied()
    assert onward.freeze(model, *patterns, keep=keep) == tuple(frozen.split())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == frozen.split()
    more = onward.freeze(model, "blocks.0")  # on top of what is frozen
    assert {*more} == {*frozen.split(), "blocks.0.weight", "blocks.0.bias"}


@pytest.mark.parametrize(
    ("patterns", "keep", "error", "message"),
    [
        (("stem", "block.1"), (), UnknownNameError, r"parameter or module 'block\.1'\. Did you mean 'blocks\.1'\?"),
        (("*",), "heads", UnknownNameError, r"'heads'\. Did you mean 'head'"),
        (
            ("stem", "blocks", "head"),
            (),
            OptionError,
            "'stem', 'blocks', 'head' leaves the model no trainable parameter",
        ),
        (("*",), (), OptionError, "nothing to train"),
    ],
)
def test_mistakes_freeze_nothing(patterns: tuple[str, ...], keep: Any, error: Any, message: str) -> None:
    model = Tied()
    with pytest.raises(error, match=message):
        onward.freeze(model, *patterns, keep=keep)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_twin_that_backpropagation_trains_is_frozen_too() -> None:
    data = onward.models.load("digits")
    model = onward.models.build_for("sign_mlp", data)
    names = onward.freeze(model, "fc1")
    twin = onward.models.twin_of("sign_mlp", data, model)
    assert [name for name, parameter in twin.named_parameters() if not parameter.requires_grad] == [*names]


# --- what it costs ----------------------------------------------------------------------------------------------------


def vit(*patterns: str) -> nn.Module:
    torch.manual_seed(0)
    model = onward.models.build("vit", depth=2, width=16)
    onward.freeze(model, *patterns)
    return model


IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def one_step(model: nn.Module, copies: int) -> tuple[onward.Program, int]:
    """The program after a step, and the FLOPs that were done in it."""
    settings = onward.LikelihoodRatio(groups="joint", placement="alive", copies=copies)
    program = onward.compile(model, IMAGES, loss=F.cross_entropy, estimator=settings)
    with FlopCounterMode(display=False) as step:
        program.step(IMAGES, torch.arange(8))
    return program, step.get_total_flops()


def test_a_frozen_prefix_is_run_once_for_all_copies() -> None:
    """By the program's own count, and by FLOPs counted while it runs: a copy more costs a suffix more."""
    with FlopCounterMode(display=False) as whole:
        vit()(IMAGES)
    full, _ = one_step(vit(), 2)
    lower = ("embed", "position", "blocks.0")
    (program, few), (_, many) = one_step(vit(*lower), 2), one_step(vit(*lower), 6)
    each, suffix = (one.forwards / len(IMAGES) / 2 for one in (full, program))
    assert each > 0.98
    assert suffix == pytest.approx(1 / 2, abs=0.03)  # one block of two
    assert (many - few) / 4 == pytest.approx(suffix * whole.get_total_flops(), rel=0.02)
    trained = {name for name, parameter in program.model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in program.model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(lower) for name in trained)


def test_of_two_equal_layers_one_may_have_a_frozen_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight.requires_grad_(False)
    x = torch.randn(3, 4)
    onward.compile(model, x, loss=F.cross_entropy).step(x, torch.arange(3))
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == ["2.weight"]


# --- what it learns ---------------------------------------------------------------------------------------------------


def halves() -> list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """The digits 0 to 4, and 5 to 9 as classes 0 to 4: each a training and a test split."""
    data = onward.models.load("digits")
    splits = [split.tensors for split in (data.train, data.test)]
    return [
        tuple((x[y // 5 == half], y[y // 5 == half] % 5) for x, y in splits)  # type: ignore[misc]
        for half in (0, 1)
    ]


def fit(program: Any, split: tuple[Tensor, Tensor]) -> None:
    trained = [parameter for parameter in program.model.parameters() if parameter.requires_grad]
    loader = DataLoader(TensorDataset(*split), 32, shuffle=True, generator=torch.Generator())
    onward.Trainer(program, torch.optim.Adam(trained, lr=3e-3), progress=False).fit(loader, epochs=5)


def accuracy(model: nn.Module, split: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((model(split[0]).argmax(1) == split[1]).float().mean())


def test_new_classes_on_frozen_layers() -> None:
    """Seeds 0 to 2: 0.883, 0.939, 0.850, where backpropagation of the same layers ends at 0.894, 0.933, 0.850."""
    (before, _), (train, test) = halves()
    torch.manual_seed(0)
    model = onward.models.build("mlp", num_classes=5, depth=4)
    fit(Backpropagation(model, F.cross_entropy, 0), before)
    assert accuracy(model, test) < 0.3
    names = onward.freeze(model, "fc[12]")
    twin = copy.deepcopy(model)
    fit(onward.compile(model, train[0][:32], loss=F.cross_entropy, estimator=FORWARD_ONLY), train)
    fit(Backpropagation(twin, F.cross_entropy, 0), train)
    assert accuracy(model, test) > accuracy(twin, test) - 0.05 > 0.75
    for name in names:
        assert torch.equal(model.get_parameter(name), twin.get_parameter(name))


def test_the_page_runs() -> None:
    """The code of docs/fine-tuning.md, one block after the other."""
    text = (Path(__file__).parent.parent / "docs" / "fine-tuning.md").read_text()
    blocks = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) >= 2
    found: dict[str, Any] = {}
    for block in blocks:
        if "transformers" not in block:
            exec(block, found)
    assert found["after"] > 0.8 > 0.3 > found["before"]


# --- models of transformers and peft ----------------------------------------------------------------------------------


def bert(layers: int) -> Any:
    """A small one from a configuration, without dropout."""
    try:
        from transformers import BertConfig, BertForSequenceClassification
    except ImportError as error:
        pytest.skip(f"transformers: {error}")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def tokens() -> tuple[dict[str, Tensor], Tensor]:
    """Sequences of 3 to 6 tokens, padded; the class is whether most of them are below 25."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 7, (256, 1), generator=generator)
    mask = (torch.arange(6) < lengths).long()
    drawn = torch.randint(1, 50, (256, 6), generator=generator) * mask
    low = ((drawn < 25) * mask).sum(1)
    return {"input_ids": drawn, "attention_mask": mask}, (2 * low > mask.sum(1)).long()


def of_logits(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, target, reduction="none")


def fine_tuned(model: Any) -> tuple[onward.Program, float, float]:
    """Six epochs; the loss before and after."""
    inputs, target = tokens()

    def loss() -> float:
        with torch.no_grad():
            return float(of_logits(model(**inputs), target).mean())

    before = loss()
    example = {name: value[:32] for name, value in inputs.items()}
    program = onward.compile(model, example, loss=of_logits, estimator=FORWARD_ONLY)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        for rows in torch.randperm(256, generator=generator).split(32):
            program.step({name: value[rows] for name, value in inputs.items()}, target[rows])
            optimizer.step()
            optimizer.zero_grad()
    return program, before, loss()


def test_a_transformer_of_transformers_trains() -> None:
    program, before, after = fine_tuned(bert(layers=1))
    assert program.compiled.forwards > 3.9  # four copies of nearly everything
    assert after < before - 0.15


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's, of transformers
def test_adapters_of_peft_train_and_nothing_else_does() -> None:
    """Of the last of two layers: the copies share the embeddings and the first."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], layers_to_transform=[1])
    model = peft.get_peft_model(bert(layers=2), config)
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    program, before, after = fine_tuned(model)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])}
    parts = [
        f"layer.1.attention.self.{what}.lora_{side}.default.weight" for what in ("query", "value") for side in "AB"
    ]
    expected = [*parts, "classifier.modules_to_save.default.weight", "classifier.modules_to_save.default.bias"]
    assert len(moved) == 6
    assert all(any(name.endswith(part) for name in moved) for part in expected)
    assert after < before - 0.03
    assert 0.25 < program.compiled.forwards / 4 < 0.4
