"""Noise tied over blocks of positions (method.md 12): its definition, what is estimated with it, what is learned.

Statistics are z-scores: `BOUND` = 6 is exceeded by chance in 2e-9 of all coordinates; every comparison holds fewer than
1000. Where a bound on a random maximum is needed it is Doob's: a non-negative process whose expectation never grows
exceeds ``c`` times its start with probability at most ``1 / c``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import onward
from onward.compiler.feedback_size import jacobian_bytes, jacobian_shapes
from onward.compiler.report import examine
from onward.compiler.report_text import text
from onward.compiler.verify import verify
from onward.passes import complete_gradients, ops
from onward.passes.errors import OptionError, UnknownNameError, VerificationError
from onward.passes.find_sites import Site
from onward.passes.graph import Layout
from onward.passes.tie_blocks import grid
from onward.runtime.feedback import FeedbackState, initial_state
from onward.runtime.learning import learn
from onward.runtime.noise import operators as noise_module
from onward.runtime.noise import source as noise_source
from onward.runtime.noise.rows import Probe

BOUND = 6.0
DOUBLE = torch.float64
KEY = torch.tensor([2**40 + 17, 5])
SIGMAS = torch.tensor([0.0, 1.0, 0.25])
PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate)

# --- the definition ---------------------------------------------------------------------------------------------------

TIED: dict[str, tuple[list[int], int, int, tuple[int, ...]]] = {
    "image": ([1, 3, 6, 4], 0, 1, (1, 1, 1, 2, 2)),
    "image-with-rest": ([1, 2, 5, 7], 0, 1, (1, 1, 1, 2, 3)),
    "tokens": ([1, 7, 3], 0, 1, (1, 1, 3, 1)),
    "tokens-first": ([7, 1, 3], 1, 1, (2, 1, 1, 1)),
    "rows-of-tokens": ([5, 3], 0, 1, (1, 2, 1)),
    "outer-rows": ([12, 3], 0, 4, (3, 2, 1)),
    "whole": ([1, 2, 3, 3], 0, 1, (1, 1, 1, 3, 3)),
}
"""Name to sizes, dim, outer and blocks over the axes of a sample."""


def clean_shape(sizes: list[int], dim: int, batch: int) -> list[int]:
    return [size * batch if axis == dim else size for axis, size in enumerate(sizes)]


def block_index(sizes: list[int], dim: int, outer: int, blocks: tuple[int, ...], batch: int) -> np.ndarray:
    """For every element of the clean tensor its element in the clean tensor of blocks, one after the other."""
    coarse = grid(Layout(tuple(sizes), dim, outer), blocks)
    places = np.arange(math.prod(clean_shape(list(coarse.sizes), dim, batch)))
    places = places.reshape(clean_shape(list(coarse.sizes), dim, batch))
    shape = clean_shape(sizes, dim, batch)
    inner, coarse_inner = sizes[dim] // outer, coarse.sizes[dim] // coarse.outer
    result = np.empty(shape, np.int64)
    for index in itertools.product(*map(range, shape)):
        at = [position // block for position, block in zip(index, (*blocks[:dim], 1, *blocks[dim + 2 :]), strict=True)]
        o, sample, i = index[dim] // (batch * inner), index[dim] // inner % batch, index[dim] % inner
        at[dim] = (o // blocks[dim] * batch + sample) * coarse_inner + i // blocks[dim + 1]
        result[index] = places[tuple(at)]
    return result


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TIED)
def test_every_coordinate_has_its_blocks_number(
    name: str, dtype: torch.dtype, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, dim, outer, blocks = TIED[name]
    coarse, batch = grid(Layout(tuple(sizes), dim, outer), blocks), 3
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(clean_shape(sizes, dim, batch), generator=generator).to(dtype)
    alive = torch.rand(z.shape, generator=generator) < 0.6
    ids = torch.tensor([0, 3, -1, -4])
    index = torch.from_numpy(block_index(sizes, dim, outer, blocks, batch))
    numbers = [
        ops.perturb(torch.zeros(clean_shape(list(coarse.sizes), dim, batch), dtype=dtype), torch.tensor([copy]), KEY,
                    SIGMAS, 2, noise, list(coarse.sizes), dim, coarse.outer, False).flatten()[index]
        for copy in ids.tolist()
    ]  # fmt: skip
    expected = torch.stack([ops.tile(z + number * alive, torch.tensor([0]), dim, outer) for number in numbers])
    arguments = (KEY, SIGMAS, 2, noise, sizes, dim, outer)
    whole = ops.perturb(z, ids, *arguments, False, alive, list(blocks))
    apart = [ops.perturb(z, ids[k : k + 1], *arguments, False, alive, list(blocks)) for k in range(4)]
    assert torch.equal(torch.stack(apart), expected)
    parts = whole.reshape(*clean_shape(sizes, dim, 1)[:dim], outer, 4, -1, *sizes[dim + 1 :]).movedim(dim + 1, 0)
    assert torch.equal(parts.reshape(expected.shape), expected)
    again = ops.perturb(ops.tile(z, ids, dim, outer), ids, *arguments, True, alive, list(blocks))
    assert torch.equal(again, whole)
    monkeypatch.setattr(noise_module, "TIED_ELEMENTS", 1)  # one draw at a time
    assert torch.equal(ops.perturb(z, ids, *arguments, False, alive, list(blocks)), whole)
    monkeypatch.setattr(noise_source, "on_host", lambda device: False)  # what runs on a GPU
    assert torch.equal(ops.perturb(z, ids, *arguments, False, alive, list(blocks)), whole)


@pytest.mark.parametrize("name", TIED)
def test_the_way_from_blocks_to_coordinates_and_back(name: str) -> None:
    sizes, dim, outer, blocks = TIED[name]
    where, batch = (sizes, dim, outer, list(blocks)), 2
    coarse = grid(Layout(tuple(sizes), dim, outer), blocks)
    index = block_index(sizes, dim, outer, blocks, batch)
    x = torch.randn(clean_shape(list(coarse.sizes), dim, batch))
    assert np.array_equal(ops.spread_blocks(x, *where).numpy(), x.flatten().numpy()[index])
    alive = torch.rand(clean_shape(sizes, dim, batch)) < 0.5
    for mask in (alive, None):
        weights = None if mask is None else mask.numpy().ravel()
        counted = np.bincount(index.ravel(), weights, x.numel()).reshape(x.shape)
        for dtype in (torch.float32, torch.bfloat16):
            found = ops.count_blocks(x.to(dtype), mask, *where)
            assert found.dtype == dtype
            assert np.array_equal(found.float().numpy(), counted)
            torch.library.opcheck(
                ops.count_blocks, (x.to(dtype), mask, *where), test_utils=("test_schema", "test_faketensor")
            )
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.spread_blocks, (x, *where)),
        (ops.perturb, (alive.float(), torch.tensor([0, -1]), KEY, SIGMAS, 2, "gaussian", sizes, dim, outer, False,
                       alive, list(blocks))),
    ]  # fmt: skip
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_sigma_zero_changes_no_bit() -> None:
    z = torch.tensor([-0.0, 0.0, 1.0, -torch.inf]).reshape(1, 1, 2, 2)
    found = ops.perturb(z, torch.tensor([0, -1]), KEY, SIGMAS, 0, "gaussian", [1, 1, 2, 2], 0, 1, False, None,
                        [1, 1, 1, 2, 2])  # fmt: skip
    assert torch.equal(found.view(torch.int32), z.repeat(2, 1, 1, 1).view(torch.int32))


def test_counts_beyond_what_a_narrow_type_counts_one_by_one() -> None:
    alive = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    like = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)
    assert float(ops.count_blocks(like, alive, [1, 1, 32, 32], 0, 1, [1, 1, 1, 32, 32])) == 1024


# --- where the positions are ------------------------------------------------------------------------------------------


class Image(nn.Module):
    """Convolution, scale a channel, residual sum, batch norm, pooling, attention-like tokens, one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.gamma = nn.Parameter(torch.ones(4, 1, 1))
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.tokens = nn.Linear(4, 5)
        self.position = nn.Parameter(torch.zeros(1, 9, 5))
        self.layer_norm = nn.LayerNorm(5)
        self.line = nn.Conv1d(5, 3, 3, padding=1)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.tanh(x * self.gamma + x)
        x = F.max_pool2d(torch.relu(self.norm(self.second(x))), 2)
        x = self.tokens(x.flatten(2).transpose(1, 2)) + self.position
        x = self.line(torch.tanh(self.layer_norm(x)).transpose(1, 2))
        return self.head(x.mean(2))


def compiled(model: nn.Module, x: Any, blocks: Any = 2, **settings: Any) -> onward.Program:
    estimator = onward.LikelihoodRatio(placement="alive", blocks=blocks, copies=2, **settings)
    return onward.compile(model, x, loss=lambda o, t: o.flatten(1).sum(1), estimator=estimator)


IMAGE, TOKENS, LINE = (1, 1, 1, 2, 2), (1, 1, 2, 1), (1, 1, 1, 2)


@pytest.mark.parametrize("training", [False, True])
def test_positions_are_the_axes_beside_the_channels(training: bool) -> None:
    program = compiled(Image().train(training), torch.randn(2, 1, 6, 6))
    tied = {site.name: (site.blocks, site.grid.sizes) for site in program.compiled.sites}
    norm = {} if training else {"norm": (IMAGE, (1, 4, 3, 3))}
    assert tied == norm | {
        "stem": (IMAGE, (1, 4, 3, 3)),
        "model:mul": (IMAGE, (1, 4, 3, 3)),
        "second": (IMAGE, (1, 4, 3, 3)),
        "tokens": (TOKENS, (1, 5, 5)),
        "model:add": (TOKENS, (1, 5, 5)),
        "line": (LINE, (1, 3, 5)),
        "head": ((), (1, 2)),
    }
    program.step(torch.randn(3, 1, 6, 6), torch.zeros(3))


class TokensFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.rows(x.transpose(0, 1))).mean(0))


def test_tokens_may_stand_before_the_samples() -> None:
    program = compiled(TokensFirst(), torch.randn(2, 5, 3))
    assert [site.blocks for site in program.compiled.sites] == [(2, 1, 1, 1), ()]
    assert program.compiled.sites[0].grid == Layout((3, 1, 4), 1)
    program.step(torch.randn(3, 5, 3), torch.zeros(3))


def test_a_block_is_no_larger_than_the_tensor_and_vectors_have_none() -> None:
    program = compiled(Image(), torch.randn(2, 1, 6, 6), blocks=100)
    assert program.compiled.sites[0].blocks == (1, 1, 1, 6, 6)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    x = torch.randn(5, 4)
    results = []
    for blocks in (1, 3):
        model.zero_grad()
        compiled(model, x, blocks).step(x, torch.zeros(5))
        results.append([parameter.grad.clone() for parameter in model.parameters()])  # type: ignore[union-attr]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# --- the option -------------------------------------------------------------------------------------------------------


def test_sites_choose_their_blocks_by_name() -> None:
    x = torch.randn(2, 1, 6, 6)
    program = compiled(Image(), x, {"s*": 3, "stem": 2, "line": 4})
    chosen = {site.name: site.blocks for site in program.compiled.sites if site.blocks}
    assert chosen == {"stem": (1, 1, 1, 3, 3), "second": (1, 1, 1, 3, 3), "line": (1, 1, 1, 4)}
    with pytest.raises(UnknownNameError, match=r"unknown site 'sten'. Did you mean 'stem'"):
        compiled(Image(), x, {"sten": 2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 0}, "blocks=0: the positions"),
        ({"blocks": 1.5}, "blocks=1.5: the positions"),
        ({"blocks": True}, "blocks=True: the positions"),
        ({"blocks": {"*": -1}}, "blocks=-1: the positions"),
        ({"blocks": 2, "placement": "operation"}, "blocks=2: noise tied over blocks needs"),
        ({"blocks": {"*": 2}, "placement": "operation"}, "needs placement='alive' or 'narrow', .* not 'operation'"),
    ],
)
def test_blocks_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        onward.LikelihoodRatio(**{"placement": "alive", **settings})


def test_the_report_shows_what_is_kept() -> None:
    x = torch.randn(2, 1, 6, 6)
    estimator = onward.LikelihoodRatio.feedback_learned(blocks={"stem": 2}, rank=1)
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(1, 3, 3, padding=1))
    model.add_module("more", nn.Sequential(nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 4)))
    program = onward.compile(model, x, loss=F.cross_entropy, estimator=estimator)
    assert jacobian_shapes(program.compiled) == {0: (27, 1), 1: (32, 1)}
    assert jacobian_bytes(program.compiled) == {0: 108, 1: 128}
    report = examine(program.compiled, name="m")
    forms = [(one.site, one.form, one.bytes) for one in report.jacobians]
    assert forms == [("stem", "tied over 2×2, rank 1", 108), ("more.1", "rank 1", 128)]
    assert [site.perturbation_dimension for site in report.sites] == [27, 32, 4]
    shown = text(report)
    assert "236 B in 2 Jacobians" in shown
    assert "tied over blocks of stem=2" in " ".join(shown.split())
    assert "27×1  tied over 2×2, rank 1   108 B" in shown
    assert program.feedback is not None
    stored = {index: j.numel() * j.element_size() for index, j in program.feedback.jacobians.items()}
    assert stored == jacobian_bytes(program.compiled)


def test_the_verifier_sees_noise_of_other_blocks() -> None:
    program = compiled(Image(), torch.randn(2, 1, 6, 6))
    (node, *_) = [n for n in program.compiled.runs[0].module.graph.nodes if n.target == ops.perturb]
    node.kwargs = {**node.kwargs, "blocks": [1, 1, 1, 3, 3]}
    with pytest.raises(VerificationError, match="blocks are not those of site 'stem'"):
        verify(program.compiled)


# --- what is estimated ------------------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """Two convolutions (5 x 5, then 3 x 3 positions) and a linear layer; all linear without an activation."""

    def __init__(self, activation: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 3, 3)
        self.head, self.activation = nn.Linear(27, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = layer(x) if self.activation is None else self.activation(layer(x))
        return self.head(x.flatten(1))


def images(samples: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 1, 5, 5, generator=generator, dtype=DOUBLE), torch.arange(samples) % 3


def network(activation: Callable[[Tensor], Tensor] | None = None) -> Convolutions:
    torch.manual_seed(0)
    return Convolutions(activation).double()


def block_means(values: Tensor, alive: Tensor, size: int) -> Tensor:
    """Every alive coordinate's mean over those of its block, ``(N, C, H, W)``; plain loops."""
    result = torch.zeros_like(values)
    height, width = values.shape[-2:]
    for top, left in itertools.product(range(0, height, size), range(0, width, size)):
        part = (..., slice(top, top + size), slice(left, left + size))
        count = alive[part].sum((-2, -1), keepdim=True).clamp_min(1)
        result[part] = alive[part] * (values * alive)[part].sum((-2, -1), keepdim=True) / count
    return result


def tied_gradient(model: Convolutions, x: Tensor, y: Tensor, size: int, reach: int = 0) -> Tensor:
    """What noise tied over blocks estimates: the gradient at every noise point in means over its blocks, pulled back
    through one operation; with reach 1 from the next noise point."""
    act = model.activation or (lambda value: value)
    first = model.first(x)
    second = model.second(act(first))
    loss = F.cross_entropy(model.head(act(second).flatten(1)), y)
    at = torch.autograd.grad(loss, [first, second], retain_graph=True)
    alive = [torch.ones_like(z) if model.activation is None else (z > 0).to(z) for z in (first, second)]
    means = [block_means(gradient, mask, size) for gradient, mask in zip(at, alive, strict=True)]
    head = torch.autograd.grad(loss, list(model.head.parameters()), retain_graph=True)
    weights = [list(model.first.parameters()), list(model.second.parameters())]
    if reach:
        found = [torch.autograd.grad(second, weights[0], means[1], retain_graph=True),
                 torch.autograd.grad(loss, weights[1])]  # fmt: skip
    else:
        found = [torch.autograd.grad(z, own, mean, retain_graph=True)
                 for z, own, mean in zip((first, second), weights, means, strict=True)]  # fmt: skip
    return torch.cat([gradient.flatten() for group in (*found, head) for gradient in group])


def gradients(program: onward.Program, x: Any, y: Any) -> Tensor:
    program.model.zero_grad()
    program.step(x, y)
    return torch.cat([parameter.grad.flatten() for parameter in program.model.parameters()])


def program_for(model: nn.Module, settings: dict[str, Any], x: Tensor | None = None) -> onward.Program:
    estimator = onward.LikelihoodRatio(
        **{"placement": "alive", "groups": "joint", "copies": 64, "sigma": 1e-4, **settings}
    )
    return onward.compile(model, images()[0] if x is None else x, loss=F.cross_entropy, estimator=estimator)


def check_mean(rows: list[Tensor], expected: Tensor, other: Tensor) -> None:
    """All z-scores within `BOUND`; `other` would be found out."""
    found = torch.stack(rows)
    error = found.std(0) / len(rows) ** 0.5
    rounding = 1e-6 * expected.abs().max()  # what σ² and a coordinate without noise leave
    assert bool(((found.mean(0) - expected).abs() <= BOUND * error + rounding).all())
    assert bool(((found.mean(0) - other).abs() > BOUND * error + rounding).any())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("groups", ["joint", "layerwise"])
@pytest.mark.parametrize("activation", [None, torch.relu])
def test_the_estimate_is_the_mean_gradient_over_each_block(
    activation: Callable[[Tensor], Tensor] | None, groups: str, size: int
) -> None:
    x, y = images()
    model = network(activation)
    program = program_for(model, {"groups": groups, "blocks": size})
    rows = [gradients(program, x, y) for _ in range(80)]
    check_mean(rows, tied_gradient(model, x, y, size), tied_gradient(model, x, y, 1))


def test_the_full_correction_is_unbiased_for_the_block_means_whatever_was_learned() -> None:
    x, y = images()
    model = network(torch.relu)
    program = program_for(model, {"feedback": "learned", "correction": "full", "blocks": 2, "warmup": 0, "rank": 2})
    assert program.feedback is not None
    generator = torch.Generator().manual_seed(5)
    program.step(x, y)  # the basis of the outputs
    wrong = {index: 0.3 * torch.randn(jacobian.shape, generator=generator, dtype=DOUBLE)
             for index, jacobian in program.feedback.jacobians.items()}  # fmt: skip
    wrong_state = replace(program.feedback, jacobians=wrong)
    rows = []
    for _ in range(80):
        program.feedback = wrong_state
        rows.append(gradients(program, x, y))
    check_mean(rows, tied_gradient(model, x, y, 2), tied_gradient(model, x, y, 1))


def test_chunks_and_copies_one_at_a_time_change_nothing_but_the_rounding() -> None:
    x, y = images()
    model = network(torch.relu)
    for correction in ("none", "full"):
        settings = {"feedback": "learned", "correction": correction, "blocks": 2, "copies": 8, "warmup": 0}
        programs = [program_for(model, {**settings, "chunk": chunk}) for chunk in (None, 2)]
        for _ in range(3):
            torch.testing.assert_close(*(gradients(program, x, y) for program in programs), rtol=1e-8, atol=1e-10)


# --- what is learned --------------------------------------------------------------------------------------------------


def exact_block_jacobians(model: Convolutions, x: Tensor, size: int) -> list[Tensor]:
    """Of a linear network, at both convolutions: the mean over each block of ∂output/∂coordinate, (blocks, outputs)."""
    first = model.first(x[:1])
    second = model.second(first)
    output = model.head(second.flatten(1))
    found = []
    for z in (first, second):
        columns = []
        for o in range(3):
            (gradient,) = torch.autograd.grad(output[0, o], z, retain_graph=True)
            means = block_means(gradient, torch.ones_like(gradient), size)
            columns.append(means[..., ::size, ::size].flatten())
        found.append(torch.stack(columns, 1))
    return found


@pytest.mark.parametrize("reach", [0, 1])
@pytest.mark.parametrize("size", [2, 3])
def test_the_tied_jacobian_is_the_mean_over_each_block(size: int, reach: int) -> None:
    x, y = images(32)
    model = network()
    settings = {"feedback": "learned", "blocks": size, "copies": 4, "warmup": 0, "sigma": 0.1, "reach": reach}
    program = program_for(model, settings, x)
    for _ in range(300):  # each leaves less than 0.95 of the square error (test_feedback)
        found = gradients(program, x, y)
    assert program.feedback is not None
    jacobians = exact_block_jacobians(model, x, size)
    assert sorted(program.feedback.jacobians) == list(range(reach, 2))
    for index, learned in program.feedback.jacobians.items():
        assert float((learned - jacobians[index]).norm()) < 10 * 0.95**150 * float(jacobians[index].norm())
    expected = tied_gradient(model, x, y, size, reach)
    assert torch.allclose(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert not torch.allclose(tied_gradient(model, x, y, 1), expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert program.feedback.explained > 1 - 1e-3
    assert min(program.trust().values()) > 0.99


def tied_site(index: int, channels: int, extent: int, size: int) -> Site:
    layout, name = Layout((1, channels, extent, extent), 0), f"site{index}"
    blocks = (1, 1, 1, min(size, extent), min(size, extent)) if size > 1 and extent > 1 else ()
    return Site(index, name, "conv2d", name, name, (), (), (), layout, "", blocks=blocks)


class TiedProblem:
    """Noise points tied over blocks behind which the outputs are linear. `within` is how much the Jacobian varies
    inside a block; with none of it the learner's model is exact."""

    def __init__(
        self, shapes: list[tuple[int, int]], size: int, samples: int, draws: int, share: float, outliers: int,
        scale: float, within: float, sigma: float, seed: int,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self.sites = [tied_site(index, *shape, size) for index, shape in enumerate(shapes)]
        self.samples, self.draws, self.seed = samples, torch.arange(draws), seed
        self.sigmas = [sigma * (1 + index) for index in range(len(shapes))]
        self.alive: dict[int, Tensor | None] = {}
        self.blocks, self.jacobians, self.counts = [], [], []
        for site in self.sites:
            mask = torch.rand(samples, *site.layout.sizes[1:], generator=generator) < share
            mask[:outliers] = True
            self.alive[site.index] = mask
            each = scale * torch.randn(site.grid.elements, 2, generator=generator, dtype=DOUBLE)
            where = (list(site.layout.sizes), 0, 1, list(site.blocks or (1,) * 5))
            spread = torch.stack([ops.spread_blocks(each[:, o].reshape(site.grid.sizes), *where) for o in range(2)], -1)
            fine = spread.reshape(-1, 2)
            fine = fine + within * scale * torch.randn(fine.shape, generator=generator, dtype=DOUBLE)
            like = torch.zeros(samples, *site.grid.sizes[1:], dtype=DOUBLE)
            self.counts.append(ops.count_blocks(like, mask, *where).flatten(1))
            self.blocks.append(each)
            self.jacobians.append(fine)
        self.start = initial_state(self.sites, 2, torch.empty(0, dtype=DOUBLE))

    def learn(self, state: FeedbackState, step: int) -> FeedbackState:
        key, sigmas = torch.tensor([self.seed, step]), torch.tensor(self.sigmas)
        response = torch.zeros(len(self.draws), self.samples, 2, dtype=DOUBLE)
        for site, jacobian in zip(self.sites, self.jacobians, strict=True):
            zeros = torch.zeros(self.samples, *site.layout.sizes[1:], dtype=DOUBLE)
            where = (list(site.layout.sizes), 0, 1, False, self.alive[site.index], list(site.blocks))
            noise = ops.perturb(zeros, self.draws, key, sigmas, site.index, "rademacher", *where)
            response += noise.reshape(len(self.draws), self.samples, -1) @ jacobian
        probe = Probe(response, torch.ones(self.samples, 2, dtype=DOUBLE), self.alive, self.draws, key)
        return learn(state, probe, self.sites, self.sigmas, "rademacher")[0]

    def square_error(self, state: FeedbackState) -> float:
        """``Σ σ² mean(n²) ‖J − J*‖²``, which `learn` says never grows in expectation."""
        return sum(
            self.sigmas[i] ** 2 * float((self.counts[i].square().mean(0)[:, None]
                                         * (self.blocks[i] - state.jacobians[i]).square()).sum())
            for i in range(len(self.sites))
        )  # fmt: skip

    def irreducible(self) -> float:
        """The expected square of what block means cannot explain."""
        total = 0.0
        for i, site in enumerate(self.sites):
            mask = self.alive[i]
            assert mask is not None
            where = (list(site.layout.sizes), 0, 1, list(site.blocks or (1,) * 5))
            each = torch.stack(
                [ops.spread_blocks(self.blocks[i][:, o].reshape(site.grid.sizes), *where).flatten() for o in range(2)],
                1,
            )
            difference = (self.jacobians[i] - each)[None] * mask.flatten(1)[..., None]  # (samples, elements, outputs)
            for o in range(2):
                summed = TiedProblem._sums(difference[..., o].reshape(mask.shape), site)
                total += self.sigmas[i] ** 2 * float(summed.square().sum(1).mean())
        return total

    @staticmethod
    def _sums(values: Tensor, site: Site) -> Tensor:
        if not site.blocks:
            return values.flatten(1)
        size = site.blocks[-1]
        return F.avg_pool2d(values, size, ceil_mode=True, divisor_override=1).flatten(1)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_error_shrinks_as_derived(size: int) -> None:
    """Without masks and with blocks of one extent the same product as untied (test_feedback), d being the blocks:
    ``E[(1 - μ A)²] = 1 - 2 μ + μ² (N + d - 1) / N``. Smaller last blocks change the units, not the matrix."""
    steps, samples, draws = 6, 12, 1
    expected, shrunk = 1.0, []
    d = 2 * math.ceil(5 / size) ** 2
    for step in range(1, steps + 1):
        rate = min(max(0.05, 1 / step), samples / (samples + d))
        expected *= 1 - 2 * rate + rate**2 * (samples + d - 1) / samples
    for seed in range(70):
        problem = TiedProblem([(2, 5)], size, samples, draws, 2.0, 0, 1.0, 0.0, 0.1, seed)
        state = problem.start
        for step in range(steps):
            state = problem.learn(state, step)
        shrunk.append(problem.square_error(state) / problem.square_error(problem.start))
    error = np.std(shrunk, ddof=1) / len(shrunk) ** 0.5
    assert abs(np.mean(shrunk) - expected) < BOUND * error
    assert BOUND * error < expected, "an error of a factor of two would be found"


@hypothesis.settings(max_examples=15, phases=PHASES, deadline=None)
@hypothesis.given(
    shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=3),
    size=st.integers(1, 7),
    samples=st.integers(1, 40),
    draws=st.integers(1, 3),
    share=st.sampled_from([0.0, 0.03, 0.3, 2.0]),
    outliers=st.integers(0, 3),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    within=st.sampled_from([0.0, 1.0]),
    sigma=st.sampled_from([1e-3, 0.1, 10.0]),
    seed=st.integers(0, 1000),
)
def test_learning_never_diverges(**settings: Any) -> None:
    """The expected square error never grows (`learn`), so by Doob it stays below a million times its start but with
    probability 1e-6; what block means leave unexplained adds at most its own size a step."""
    problem = TiedProblem(**settings)
    state = problem.start
    allowed = problem.square_error(state) + 150 * problem.irreducible()
    for step in range(150):
        state = problem.learn(state, step)
        assert problem.square_error(state) <= 1e6 * allowed


class Flat(nn.Module):
    """Reads a map as it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(F.relu(self.first(x)).reshape(len(x), 48))
        return result


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("blocks", [2, 4])
def test_views_spread_blocks_as_the_operator_does(
    memory_format: torch.memory_format, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and as contiguous as the derivative behind was traced for."""

    def by_operator(graph: fx.Graph, value: fx.Node, point: Site) -> fx.Node:
        return graph.call_function(ops.spread_blocks, (value, *complete_gradients._of_blocks(point)))

    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)
    found = []
    for spread in (complete_gradients._spread, by_operator):
        torch.manual_seed(0)
        model = Flat().to(memory_format=memory_format)
        monkeypatch.setattr(complete_gradients, "_spread", spread)
        estimator = onward.LikelihoodRatio.feedback_learned(warmup=0, blocks=blocks)
        program = onward.compile(model, x, loss=F.cross_entropy, estimator=estimator)
        targets = {node.target for g in program.compiled.gradients for node in g.module.graph.nodes}
        assert (torch.ops.onward.spread_blocks.default in targets) == (spread is by_operator)
        for _ in range(3):
            program.step(x, torch.tensor([0, 1, 2]))
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
