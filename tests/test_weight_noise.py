"""Noise on the weights (method.md 6, 11): its operators and whole steps against their definition, what is estimated,
which sites can have it, what is said of it.

The definition is the loss of a model whose parameters have moved: in float64 the two agree to rounding. Statistics are
z-scores: `BOUND` = 6 is exceeded by chance in 2e-9 of all coordinates; every comparison holds fewer than 1000.
"""

from __future__ import annotations

import itertools
import math
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from estimator_cases import score
from torch import Tensor, nn
from torch.func import functional_call
from weight_noise_cases import CASES, DOUBLE, KEY, applied, compiled, drawn, net_and_batch, noise_of, rows_of

import onward
from onward.cli.common import make_estimator
from onward.cli.options import Common
from onward.compiler import dot, svg
from onward.compiler.listing import graphs_after, pass_names
from onward.compiler.report import examine
from onward.compiler.report_text import text
from onward.compiler.verify import verify, verify_history
from onward.passes import ops
from onward.passes.errors import OptionError, UnknownNameError, VerificationError
from onward.passes.perturb_weights import WeightNoise
from onward.runtime.noise import source as noise_source
from onward.runtime.program import Program

BOUND = 6.0
SIGMAS = torch.tensor([0.0, 1.0, 0.25], dtype=DOUBLE)
KINDS = ("weight", "sample", "rank-one")
Numbers = dict[str, Tensor]

# --- the operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_operators_against_their_definition(name: str, on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    noises = ("rademacher",) if on == "rank-one" else ("gaussian", "rademacher")
    for bias, noise in itertools.product((True, False), noises):
        at, (_, _, x_sizes, dim, outer, _) = noise_of(name, on, bias), CASES[name]
        samples, ids = 3, torch.tensor([4, -1, 0, ~4])
        shape = [size * samples if axis == dim else size for axis, size in enumerate(x_sizes)]
        x = torch.randn(shape, dtype=DOUBLE, generator=generator)
        many = [size * 4 if axis == dim else size for axis, size in enumerate(shape)]
        x_tiled = torch.randn(many, dtype=DOUBLE, generator=generator)
        z = torch.randn_like(applied(at, x, torch.ones(at.shape, dtype=DOUBLE), None))
        sizes = [size // samples if axis == dim else size for axis, size in enumerate(z.shape)]
        head = (ids, KEY, SIGMAS, 2, noise, sizes, dim, outer)
        for activation, copied in ((x, False), (x_tiled, True)):
            given = {"x": activation, "x_tiled": copied, **at.arguments}
            found = ops.perturb_weight(z, *head, False, **given)
            assert torch.equal(ops.perturb_weight(ops.tile(z, ids, dim, outer), *head, True, **given), found)
            for k, copy in enumerate(ids.tolist()):
                one, own = rows_of(found, dim, outer, 4, k), rows_of(x_tiled, dim, outer, 4, k) if copied else x
                alone = {**given, "x": own}
                assert torch.equal(ops.perturb_weight(z, ids[k : k + 1], *head[1:], False, **alone), one)
                weights, biases = drawn(at, 2, noise, copy, samples)
                for n in range(samples):
                    x_n, z_n, found_n = (rows_of(tensor, dim, outer, samples, n) for tensor in (own, z, one))
                    change = applied(at, x_n, weights[n], biases[n] if bias else None)
                    torch.testing.assert_close(found_n, z_n + (0.25 if copy >= 0 else -0.25) * change)
            with monkeypatch.context() as patched:
                patched.setattr(noise_source, "on_host", lambda device: False)  # what runs on a GPU
                torch.testing.assert_close(ops.perturb_weight(z, *head, False, **given), found)
        weights = torch.randn(4, samples, dtype=DOUBLE, generator=generator)
        arguments = (2, noise, "exact", at.on, at.operation, list(at.shape), bias, at.groups)
        total = ops.weight_noise_sum(weights, ids, KEY, *arguments)
        expected = torch.zeros_like(total)
        for k, copy in enumerate(ids.tolist()):
            entries = torch.cat([part.flatten(1) for part in drawn(at, 2, noise, copy, samples)], 1)
            expected += (1 if copy >= 0 else -1) * weights[k] @ entries
        torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("on", KINDS)
def test_many_weights_and_narrow_types(on: str) -> None:
    """More numbers a sample than are made at once; half precision; what the dispatcher wants of an operator."""
    at = WeightNoise(on, "linear", 0, "w", (190, 200), "b")
    x, z, ids = torch.randn(3, 200), torch.randn(3, 190), torch.tensor([1, -2])
    head = (ids, KEY, SIGMAS, 1, "rademacher", [1, 190], 0, 1, False)
    found = ops.perturb_weight(z, *head, x=x, x_tiled=False, **at.arguments)
    weights, biases = (part.float() for part in drawn(at, 1, "rademacher", 1, 3))
    change = torch.einsum("noi,ni->no", weights, x) + biases
    torch.testing.assert_close(found, torch.cat([z + change, z - change]), rtol=1e-4, atol=1e-4)
    half = ops.perturb_weight(z.bfloat16(), *head, x=x.bfloat16(), x_tiled=False, **at.arguments)
    torch.testing.assert_close(half.float(), found, rtol=0.05, atol=1.0)  # sums of 200 terms of 8 bits
    loss_weights = torch.randn(2, 3)
    arguments = (1, "rademacher", "exact", at.on, at.operation, list(at.shape), True, at.groups)
    total = ops.weight_noise_sum(loss_weights, ids, KEY, *arguments)
    rows = torch.cat([weights.flatten(1), biases], 1)
    torch.testing.assert_close(total, (loss_weights[0] - loss_weights[1]) @ rows, rtol=1e-4, atol=1e-5)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.weight_noise_sum, (loss_weights, ids, KEY, *arguments), test_utils=checks)
    torch.library.opcheck(ops.perturb_weight, (z, *head), {"x": x, "x_tiled": False, **at.arguments}, test_utils=checks)


@pytest.mark.parametrize("on", KINDS)
@pytest.mark.parametrize("host", [True, False])
def test_sigma_zero_changes_no_bit(on: str, host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_source, "on_host", lambda device: host)
    z = torch.tensor([[-0.0, 0.0, 1.0, -torch.inf]])
    given = WeightNoise(on, "linear", 0, "w", (4, 2), "b").arguments
    found = ops.perturb_weight(z, torch.tensor([0, -1]), KEY, SIGMAS, 0, "rademacher", [1, 4], 0, 1, False,
                               x=torch.ones(1, 2), x_tiled=False, **given)  # fmt: skip
    assert torch.equal(found.view(torch.int32), z.repeat(2, 1).view(torch.int32))


# --- whole steps ------------------------------------------------------------------------------------------------------


def gradients(program: Program, x: Tensor, target: Tensor) -> Numbers:
    program.model.zero_grad()
    program.step(x, target)
    return {name: p.grad.clone() for name, p in program.model.named_parameters() if p.grad is not None}


def defined(program: Program, x: Tensor, target: Tensor) -> Numbers:
    """The estimate by its definition: every sample's loss with its own moved parameters."""
    estimator, model, samples = program.compiled.estimator, program.model, len(x)
    step, parameters = torch.tensor([program.seed, program.step_count]), dict(model.named_parameters())
    draws = estimator.draws(estimator.copies)  # type: ignore[arg-type]
    result = {name: torch.zeros_like(p) for name, p in parameters.items() if p.requires_grad}
    whole = estimator.credit == "batch"

    @torch.no_grad()
    def losses(moved: list[Numbers]) -> Tensor:
        rows = [functional_call(model, {**parameters, **moved[n]}, (x[n : n + 1],)) for n in range(samples)]
        if whole:
            return batch_loss(torch.cat(rows), target).expand(samples)
        return F.cross_entropy(torch.cat(rows), target, reduction="none")

    for run, draw in itertools.product(program.compiled.runs, range(draws)):
        noise: list[Numbers] = [{} for _ in range(samples)]
        for index in run.sites:
            at = program.compiled.sites[index].weight_noise
            assert at is not None
            weights, biases = drawn(at, index, estimator.noise, draw, samples, step)
            for n in range(samples):
                noise[n] |= {at.weight: weights[n], **({at.bias: biases[n]} if at.bias else {})}
        plus, minus = (
            losses([{name: parameters[name] + sign * 0.5 * e for name, e in own.items()} for own in noise])
            for sign in (1, -1 if estimator.antithetic else 0)
        )
        difference = (plus - minus) / (2 if estimator.antithetic else 1)
        shared = program.compiled.sites[run.sites[0]].weight_noise.on == "weight"  # type: ignore[union-attr]
        for n, own in enumerate(noise):
            share = 1 / samples if not whole or shared else 1.0
            for name, e in own.items():
                scored = torch.from_numpy(score(estimator.noise, estimator.score, e.numpy()))
                result[name] += share * difference[n] / (0.5 * draws) * scored
    return result


def batch_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target) ** 2


SETTINGS: list[dict[str, Any]] = [
    {"groups": "joint"},
    {"groups": "layerwise", "chunk": 2},
    {"groups": [["stem", "head"], ["second", "tokens", "model:*"]], "placement": "alive"},
    {"groups": "joint", "credit": "batch", "chunk": 2},
    {"groups": "layerwise", "antithetic": False, "copies": 3, "noise": "laplace"},
    {"groups": "joint", "noise": "gaussian", "score": "sign"},
]


@pytest.mark.parametrize(
    ("on", "settings"),
    [(on, one) for on, one in itertools.product(KINDS, SETTINGS) if on != "rank-one" or "noise" not in one],
    ids=str,
)
def test_a_step_is_its_definition(on: str, settings: dict[str, Any]) -> None:
    model, x, target = net_and_batch()
    loss = batch_loss if settings.get("credit") == "batch" else F.cross_entropy
    program = compiled(model, x, on, loss, **settings)
    assert [site.weight_noise is None for site in program.compiled.sites] == [False] * 5
    verify_history(program.compiled)
    gradients(program, x, target)  # the second step's noise is another
    expected = defined(program, x, target)
    found = gradients(program, x, target)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("on", KINDS)
def test_chunks_change_no_bit(on: str) -> None:
    """In single precision, with nothing behind the site that sums over the copies."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten())
    x, target = torch.randn(5, 2, 6, 6), torch.zeros(5)
    programs = [
        compiled(model, x, on, lambda o, t: o.abs().amax(1) + o[:, 0], chunk=chunk, copies=8) for chunk in (None, 2, 6)
    ]
    first, *others = [gradients(program, x, target) for program in programs]
    assert all(torch.equal(one[name], first[name]) for one in others for name in first)


@pytest.mark.parametrize(
    ("on", "settings"),
    [*((on, {"groups": "joint"}) for on in KINDS), ("auto", {"groups": "layerwise", "placement": "alive"})],
)
def test_the_estimate_is_unbiased(on: str, settings: dict[str, Any]) -> None:
    """100 estimates of 16 pairs, σ = 1e-3: a bias of order 1e-6. A wrong factor of 1.4 would be seen along the gradient
    as a whole, whose slope is known to 0.06."""
    model, x, target = net_and_batch()
    F.cross_entropy(model(x), target).backward()
    true = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    program = compiled(model, x, on, copies=32, sigma=1e-3, **settings)
    found = torch.stack([
        torch.cat([value.flatten() for value in gradients(program, x, target).values()]) for _ in range(100)
    ])  # fmt: skip
    slopes = found @ true / true.square().sum()
    for values, expected in ((found, true), (slopes, torch.ones(()))):
        error = values.std(0) / math.sqrt(len(values))
        assert float(((values.mean(0) - expected).abs() / error).max()) < BOUND
    assert float(slopes.std()) / 10 < 0.06


def test_tied_weights_add_up() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.tanh(self.linear(x)))

    torch.manual_seed(0)
    model, x, target = Tied().double(), torch.randn(4, 3, dtype=DOUBLE), torch.tensor([0, 1, 2, 0])
    F.cross_entropy(model(x), target).backward()
    true = model.linear.weight.grad.clone()  # type: ignore[union-attr]
    program = compiled(model, x, "sample", copies=4096, sigma=1e-3, chunk=512)
    assert len(program.compiled.sites) == 2
    assert (
        float(F.cosine_similarity(gradients(program, x, target)["linear.weight"].flatten(), true.flatten(), 0)) > 0.99
    )


def test_sigma_and_copies_are_measured_there_too() -> None:
    model, x, target = net_and_batch()
    program = compiled(model, x, "sample", sigma="auto", copies=2)
    program.step(x, target)
    assert all(math.isfinite(sigma) and sigma != 0.1 for sigma in program.sigmas)
    calibration = program.calibrate(x, target, budget=12)
    scale = float(model.stem.weight.detach().square().mean().sqrt())
    assert calibration.sites[0].scale == pytest.approx(scale)
    assert [site.elements for site in calibration.sites] == [76, 76, 15, 9, 36]
    assert calibration.compile(model, x).sites[0].weight_noise is not None


# --- which sites, and what is said of it ------------------------------------------------------------------------------


def places(program: Program) -> dict[str, str]:
    found = {site.name: site.weight_noise for site in program.compiled.sites}
    return {name: "output" if at is None else at.on for name, at in found.items()}


def test_sites_choose_by_name() -> None:
    model, x, _ = net_and_batch()
    mapped = compiled(model, x, {"s*": "sample", "second": "weight", "head": "rank-one", "tokens": "auto"})
    by_name = {"stem": "sample", "second": "sample", "tokens": "output", "model:matmul": "output", "head": "rank-one"}
    assert places(mapped) == by_name
    # fan-ins 18, 18, 4, 3 and 12 against 25, 4, 4, 4 and 1 positions
    assert places(compiled(model, x, "auto")) == by_name | {
        "second": "output", "model:matmul": "sample", "head": "output"
    }  # fmt: skip


class Others(nn.Module):
    """One site of every kind that has no noise on its weight, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Conv1d(2, 2, 2, padding="same")
        self.up = nn.ConvTranspose1d(2, 2, 3)
        self.first, self.norm = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)
        self.scale = nn.Parameter(torch.ones(2, 1))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.frozen = nn.Linear(6, 6)
        self.frozen.weight.requires_grad_(False)
        self.layer_norm = nn.LayerNorm(6)
        self.residual, self.plain = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(torch.tanh(self.up(torch.tanh(self.even(x)))))))
        x = torch.tanh(self.frozen(torch.tanh(self.normed(torch.tanh(x * self.scale)))))
        x = self.layer_norm(x)
        return self.plain(torch.tanh(self.residual(x) + x)).mean(1)


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        ("even", r"the site 'even' \(aten.conv1d\) cannot have noise on its weight: it pads one side more than the"),
        ("up", r"'up' \(aten.conv_transpose1d\) .*: it is neither a linear layer nor a convolution"),
        ("first", r"'first' \(aten.conv1d\+.*batch_norm.*\) .*: its noise is behind a normalisation or at a sum"),
        ("model:mul", r"'model:mul' \(aten.mul\) .*: it is neither"),
        ("normed:linear", r"'normed:linear' \(aten.linear\) .*: its weight is not read directly from a"),
        ("frozen", r"'frozen' \(aten.linear\) .*: its weight is not read directly from a trainable parameter"),
        ("layer_norm", r"'layer_norm' \(aten.layer_norm\) .*: it is neither"),
        ("residual", r"'residual' \(aten.linear\) .*: its noise is behind a normalisation or at a sum"),
        ("[en]*n*", r"noise_on='sample': the site 'even' \(aten.conv1d\)"),
    ],
)
def test_sites_that_cannot_have_it(site: str, reason: str) -> None:
    model, x = Others(), torch.randn(3, 2, 4)
    settings: dict[str, Any] = {"placement": "alive", "credit": "batch", "loss": lambda o, t: o.square().mean()}
    with pytest.raises(OptionError, match=reason):
        compiled(model, x, {site: "sample"}, **settings)


def test_everything_else_keeps_its_noise_at_the_output() -> None:
    model, x = Others(), torch.randn(3, 2, 4)
    program = compiled(model, x, "sample", placement="alive", blocks=2, copies=2)
    assert [name for name, place in places(program).items() if place == "sample"] == ["plain"]
    assert {site.name: site.blocks for site in program.compiled.sites}["plain"] == ()
    program.step(x, torch.tensor([0, 1, 2]))
    chosen = {"up": "auto", "first": "output"}
    assert set(places(compiled(model, x, chosen, placement="alive", copies=2)).values()) == {"output"}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"noise_on": "weights"}, UnknownNameError, "unknown place of the noise 'weights'. Did you mean 'weight'"),
        ({"noise_on": {"*": "rank"}}, UnknownNameError, "unknown place of the noise 'rank'"),
        ({"noise_on": {"a": "rank-one"}, "noise": "gaussian"}, OptionError, "multiplies signs.*not 'gaussian'"),
        ({"noise_on": "auto", "feedback": "learned", "placement": "alive", "groups": "joint"}, OptionError,
         "feedback=\"learned\" needs noise_on='output', not 'auto'"),
    ],
)  # fmt: skip
def test_options_that_cannot_work(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        onward.LikelihoodRatio(**settings)


def test_a_pattern_without_a_site_names_the_nearest() -> None:
    model, x, _ = net_and_batch()
    with pytest.raises(UnknownNameError, match=r"unknown site 'sten'\. Did you mean 'stem'"):
        compiled(model, x, {"sten": "sample"})


def test_the_command_line_has_it() -> None:
    chosen = make_estimator(Common(noise_on=["stem=sample", "output"]))
    assert isinstance(chosen, onward.LikelihoodRatio)
    assert (chosen.noise_on, chosen.feedback) == ({"stem": "sample", "*": "output"}, "none")
    assert make_estimator(Common(noise_on=["auto"])).noise_on == "auto"  # type: ignore[union-attr]


def test_what_is_shown() -> None:
    model, x, _ = net_and_batch()
    chosen = {"stem": "sample", "second": "weight", "head": "rank-one"}
    program = compiled(model, x, chosen)
    report = examine(program.compiled, name="net")
    rows = [(site.noise_on, site.perturbation_dimension, site.exact_bytes > 0) for site in report.sites]
    # rank one: 3 channels and 12 of the fan-in; the bias is frozen
    assert rows == [("sample", 76, False), ("weight", 76, False), ("output", 12, True), ("output", 12, True),
                    ("rank-one", 15, False)]  # fmt: skip
    assert [bool(one.captures) for one in report.subgraphs] == [False, False, True, True, False]
    shown = " ".join(text(report).split())
    assert "noise on stem=sample second=weight head=rank-one" in shown
    assert "76 sample" in shown
    assert "noise without a word is on the output" in shown
    # the noise costs one more convolution; of the head's run one projection, a third of its product
    whole = report.forward_flops
    assert [run.flops for run in report.runs][:1] == [whole]
    assert report.runs[4].flops == 2 * 12
    for name in pass_names(program.compiled):
        graphs = graphs_after(program.compiled, name)
        ElementTree.fromstring(svg.to_svg(graphs, title=name))
        assert dot.to_dot(graphs, title=name).startswith("digraph")


def test_the_verifier_sees_other_noise() -> None:
    model, x, _ = net_and_batch()
    program = compiled(model, x, "sample")
    (node,) = [n for n in program.compiled.runs[0].module.graph.nodes if n.target == ops.perturb_weight]
    node.kwargs = {**node.kwargs, "on": "weight"}
    with pytest.raises(VerificationError, match="is not that of site 'stem'"):
        verify(program.compiled)
    program = compiled(model, x, "sample")
    (made,) = [n for n in program.compiled.gradients[1].module.graph.nodes if n.target == ops.weight_noise_sum]
    made.args = (*made.args[:6], "weight", *made.args[7:])
    with pytest.raises(VerificationError, match="its cotangent"):
        verify(program.compiled)
