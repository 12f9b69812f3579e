"""Random small models for property tests, each built from a description that prints as the code that rebuilds it.

A `Recipe` lists steps ``(operation, first, second)``; a step reads the values numbered ``first`` and ``second`` (modulo
what there is: the inputs, then the steps' results). Whatever nothing reads goes into the head, so that every parameter
reaches the output::

    model, inputs, target = build(Recipe(inputs="tuple", steps=(("linear", 0, 0), ("add", 1, 2)), outputs=2))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

SAMPLES = 3
WORDS = 7


@dataclass(frozen=True)
class Recipe:
    """What a random model is made of."""

    inputs: str = "tensor"
    """``"tensor"`` (a map), ``"tuple"`` (a map and a vector) or ``"dict"`` (a map, and word ids)."""
    steps: tuple[tuple[str, int, int], ...] = ()
    outputs: int = 1
    training: bool = False
    seed: int = 0

    @property
    def has(self) -> frozenset[str]:
        """The operations it uses."""
        return frozenset(operation for operation, _, _ in self.steps)


class Block(nn.Module):
    """One step: a function of one or two values, and the modules and parameters it owns or shares."""

    def __init__(self, function: Callable[..., Tensor], **owned: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in owned.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(self, x, y)


class Assembled(nn.Module):
    """The model of a recipe."""

    def __init__(self, recipe: Recipe, examples: list[Tensor]) -> None:
        super().__init__()
        self.recipe = recipe
        self.blocks = nn.ModuleList()
        self.register_buffer("unused_buffer", torch.zeros(2))
        self.words = nn.Embedding(WORDS, 4) if recipe.inputs == "dict" else None
        linears: list[nn.Linear] = []
        values = self._values(examples)
        used = set()
        for operation, first, second in recipe.steps:
            x, y = values[first % len(values)], values[second % len(values)]
            used |= {index % len(values) for index in ((first, second) if operation in BINARY else (first,))}
            block = OPERATIONS[operation](x, y, linears)
            self.blocks.append(block)
            values.append(block(x, y))
        self.leaves = [number for number in range(len(values)) if number not in used]
        width = sum(values[number][0].numel() for number in self.leaves)
        self.heads = nn.ModuleList(nn.Linear(width, 3) for _ in range(recipe.outputs))

    def _values(self, inputs: list[Tensor]) -> list[Tensor]:
        if self.words is None:
            return list(inputs)
        return [inputs[0], self.words(inputs[1])]

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        values = self._values([x] if other is None else [x, other])
        for block, (_, first, second) in zip(self.blocks, self.recipe.steps, strict=True):
            values.append(block(values[first % len(values)], values[second % len(values)]))
        features = torch.cat([values[number].flatten(1) for number in self.leaves], 1)
        results = tuple(head(features) for head in self.heads)
        return results[0] if len(results) == 1 else results


def fit(x: Tensor, width: int) -> Tensor:
    """`x` as ``(N, width)``, cut or padded with zeros."""
    flat = x.flatten(1)
    return flat[:, :width] if flat.shape[1] >= width else F.pad(flat, (0, width - flat.shape[1]))


def as_map(x: Tensor) -> Tensor:
    """`x` as ``(N, 2, 4, 4)``."""
    return fit(x, 32).reshape(-1, 2, 4, 4)


def _linear(x: Tensor, y: Tensor, linears: list[nn.Linear]) -> Block:
    linears.append(nn.Linear(x[0].numel(), 4))
    return Block(lambda self, x, y: self.linear(x.flatten(1)), linear=linears[-1])


def _rows(x: Tensor, y: Tensor, linears: list[nn.Linear]) -> Block:
    """A linear layer on the last dimension, whatever the others are."""
    return Block(lambda self, x, y: self.linear(x), linear=nn.Linear(x.shape[-1], 3, bias=False))


def _tied(x: Tensor, y: Tensor, linears: list[nn.Linear]) -> Block:
    if not linears:
        return _linear(x, y, linears)
    return Block(lambda self, x, y: self.linear(fit(x, self.linear.in_features)), linear=linears[0])


def _transposed(x: Tensor, y: Tensor, linears: list[nn.Linear]) -> Block:
    if not linears:
        return _linear(x, y, linears)
    return Block(
        lambda self, x, y: F.linear(fit(x, self.linear.out_features), self.linear.weight.t()), linear=linears[-1]
    )


def _weight_norm(x: Tensor, y: Tensor, linears: list[nn.Linear]) -> Block:
    def apply(self: Any, x: Tensor, y: Tensor) -> Tensor:
        weight = self.gain[:, None] * self.direction / self.direction.norm(dim=1, keepdim=True)
        return F.linear(x.flatten(1), weight, self.bias.exp())

    return Block(apply, direction=_parameter(4, x[0].numel()), gain=_parameter(4), bias=_parameter(4))


def _conv(x: Tensor, y: Tensor, linears: list[nn.Linear]) -> Block:
    return Block(lambda self, x, y: self.conv(as_map(x)), conv=nn.Conv2d(2, 2, 3, padding=1))


def _strided_conv(x: Tensor, y: Tensor, linears: list[nn.Linear]) -> Block:
    return Block(lambda self, x, y: self.conv(as_map(x)), conv=nn.Conv2d(2, 4, 2, stride=2, groups=2, bias=False))


def _conv_rows(x: Tensor, y: Tensor, linears: list[nn.Linear]) -> Block:
    return Block(lambda self, x, y: self.conv(fit(x, 8).reshape(-1, 2, 4)), conv=nn.Conv1d(2, 3, 2, dilation=2))


def _conv_transposed(x: Tensor, y: Tensor, linears: list[nn.Linear]) -> Block:
    return Block(
        lambda self, x, y: self.conv(fit(x, 8).reshape(-1, 2, 2, 2)), conv=nn.ConvTranspose2d(2, 2, 2, stride=2)
    )


def _position(x: Tensor, y: Tensor, linears: list[nn.Linear]) -> Block:
    return Block(lambda self, x, y: x + self.position, position=_parameter(*x.shape[1:]))


def _frozen(x: Tensor, y: Tensor, linears: list[nn.Linear]) -> Block:
    frozen = nn.Linear(x[0].numel(), 4)
    frozen.requires_grad_(False)
    return Block(lambda self, x, y: self.frozen(x.flatten(1)), frozen=frozen)


def _half_frozen(x: Tensor, y: Tensor, linears: list[nn.Linear]) -> Block:
    linear = nn.Linear(x[0].numel(), 4)
    linear.weight.requires_grad_(False)
    return Block(lambda self, x, y: self.linear(x.flatten(1)), linear=linear)


def _layer_norm(x: Tensor, y: Tensor, linears: list[nn.Linear]) -> Block:
    return Block(lambda self, x, y: self.norm(x), norm=nn.LayerNorm(x.shape[-1]))


def _group_norm(x: Tensor, y: Tensor, linears: list[nn.Linear]) -> Block:
    return Block(lambda self, x, y: self.norm(as_map(x)), norm=nn.GroupNorm(1, 2))


def _batch_norm(x: Tensor, y: Tensor, linears: list[nn.Linear]) -> Block:
    return Block(lambda self, x, y: self.norm(self.conv(as_map(x))), conv=nn.Conv2d(2, 2, 1), norm=nn.BatchNorm2d(2))


def _attention(x: Tensor, y: Tensor, linears: list[nn.Linear]) -> Block:
    def apply(self: Any, x: Tensor, y: Tensor) -> Tensor:
        queries, keys, values = self.mix(fit(x, 12).reshape(-1, 3, 4)).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(queries, keys, values)

    return Block(apply, mix=nn.Linear(4, 12))


def _buffer(x: Tensor, y: Tensor, linears: list[nn.Linear]) -> Block:
    block = Block(lambda self, x, y: x * self.scale)
    block.register_buffer("scale", torch.tensor(0.5))
    return block


def _function(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Block]:
    return lambda x, y, linears: Block(lambda self, x, y: function(x, y))


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(shape) + 0.5)


OPERATIONS: dict[str, Callable[[Tensor, Tensor, list[nn.Linear]], Block]] = {
    "linear": _linear,
    "rows": _rows,
    "tied": _tied,
    "transposed": _transposed,
    "weight_norm": _weight_norm,
    "conv": _conv,
    "strided_conv": _strided_conv,
    "conv_rows": _conv_rows,
    "conv_transposed": _conv_transposed,
    "position": _position,
    "frozen": _frozen,
    "half_frozen": _half_frozen,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "attention": _attention,
    "buffer": _buffer,
    "relu": _function(lambda x, y: x.relu()),
    "tanh": _function(lambda x, y: x.tanh()),
    "gelu": _function(lambda x, y: F.gelu(x)),
    "softmax": _function(lambda x, y: x.softmax(-1)),
    "sign": _function(lambda x, y: x.sign()),
    "step": _function(lambda x, y: (x > 0).to(x.dtype)),
    "argmax": _function(lambda x, y: F.one_hot(fit(x, 4).argmax(1), 4).to(x.dtype)),
    "max_pool": _function(lambda x, y: F.max_pool2d(as_map(x), 2)),
    "avg_pool": _function(lambda x, y: F.adaptive_avg_pool2d(as_map(x), 1)),
    "mean": _function(lambda x, y: x.flatten(1).mean(1, keepdim=True)),
    "transpose": _function(lambda x, y: as_map(x).transpose(0, 1).flatten(2).permute(1, 2, 0)),
    "add": _function(lambda x, y: x + fit(y, x.flatten(1).shape[1]).reshape(x.shape)),
    "gate": _function(lambda x, y: x * fit(y, x.flatten(1).shape[1]).reshape(x.shape).sigmoid()),
    "concatenate": _function(lambda x, y: torch.cat([x.flatten(1), y.flatten(1)], 1)),
    "where": _function(lambda x, y: torch.where(x > 0, x, fit(y, x.flatten(1).shape[1]).reshape(x.shape))),
    "rows_in_batch": _function(lambda x, y: fit(x, 8).reshape(-1, 4).tanh().reshape(-1, 2, 4)),
    "dropout": lambda x, y, linears: Block(lambda self, x, y: self.dropout(x), dropout=nn.Dropout(0.25)),
}  # fmt: skip

BINARY = ("add", "gate", "concatenate", "where")
"""The operations that read their second value; the others ignore it."""


def build(recipe: Recipe) -> tuple[nn.Module, Any, Tensor]:
    """The model of `recipe`, in double precision, with example inputs and a target for `loss`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        image = torch.randn(SAMPLES, 2, 4, 4)
        other = torch.randn(SAMPLES, 5) if recipe.inputs == "tuple" else torch.randint(0, WORDS, (SAMPLES, 2))
        examples = [image] if recipe.inputs == "tensor" else [image, other]
        with torch.no_grad():
            model = Assembled(recipe, examples).double().train(recipe.training)
        # forwards during construction moved the running statistics; the numbers do not matter
        target = torch.randn(SAMPLES, 3).double()
    examples = [example.double() if example.is_floating_point() else example for example in examples]
    inputs: Any = {
        "tensor": lambda: examples[0],
        "tuple": lambda: tuple(examples),
        "dict": lambda: dict(zip(("x", "other"), examples, strict=True)),
    }[recipe.inputs]()
    return model, inputs, target


def loss(output: Any, target: Tensor) -> Tensor:
    """One number a sample, of one output or a tuple of two."""
    outputs = output if isinstance(output, tuple) else (output,)
    return torch.stack([(one - target).square().mean(1) for one in outputs]).sum(0)


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's own forward."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def recipes(*, without: tuple[str, ...] = (), training: bool | None = None) -> st.SearchStrategy[Recipe]:
    """Recipes of one to seven steps, none of the operations in `without`."""
    operations = [name for name in OPERATIONS if name not in without]
    step = st.tuples(st.sampled_from(operations), st.integers(0, 5), st.integers(0, 5))
    return st.builds(
        Recipe,
        inputs=st.sampled_from(["tensor", "tuple", "dict"]),
        steps=st.lists(step, min_size=1, max_size=7).map(tuple),
        outputs=st.integers(1, 2),
        training=st.booleans() if training is None else st.just(training),
        seed=st.integers(0, 3),
    )
