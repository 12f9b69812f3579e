"""Sites joined to segments (DESIGN.md 13), read some noise points on (14): their gradients, and where the cuts are.

All is float64; some hundred operations of fewer than 1000 terms each leave less than ``TOLERANCE`` of the gradient.
"""

from __future__ import annotations

import ast
import functools
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import random_models
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from random_models import Recipe, build, call
from segment_reference import Cuts, graph_after, graph_of_sites, reference
from torch import Tensor, fx, nn
from typer.testing import CliRunner

import onward
from onward.cli import app
from onward.cli.inspect import render
from onward.compiler import segments as resolving
from onward.compiler.save import read_manifest, save_program
from onward.compiler.segments import resolve_reach, resolve_segments
from onward.compiler.verify import verify, verify_history
from onward.passes.errors import OptionError, UnknownNameError
from onward.passes.find_sites import sites
from onward.passes.graph import Role
from onward.passes.join_segments import join_segments

TOLERANCE = 1e-8
PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate)
STEPS = ("sign", "step", "argmax", "where")
"""What `random_models` has of operations without derivative; ``where`` reads a comparison."""


def program_for(model: nn.Module, x: Any, loss: Any = F.cross_entropy, **settings: Any) -> onward.Program:
    estimator = onward.LikelihoodRatio.feedback_learned(**{"warmup": 0, **settings})
    return onward.compile(model, x, loss=loss, estimator=estimator)


def with_random_jacobians(program: onward.Program) -> onward.Program:
    assert program.feedback is not None
    generator = torch.Generator().manual_seed(5)
    known = program.feedback.jacobians.items()
    jacobians = {index: torch.randn(j.shape, generator=generator, dtype=j.dtype) for index, j in known}
    program.feedback = replace(program.feedback, jacobians=jacobians)
    return program


def step(program: onward.Program, x: Any, y: Any) -> dict[str, Tensor]:
    program.model.zero_grad()
    program.step(x, y)
    return {name: p.grad.clone() for name, p in program.model.named_parameters() if p.grad is not None}


def autograd(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: n + m)


def check_program(program: onward.Program, x: Any, y: Any) -> None:
    """Gradients as `reference` has them, and what holds whatever the segments are."""
    compiled = program.compiled
    verify(compiled)
    verify_history(compiled)
    joined = graph_after(program, "join_segments")
    ended = {n.name for n in joined.graph.nodes if "site" in n.meta and n.meta["site"].ends == (n.name,)}
    cuts = Cuts(graph_of_sites(program), ended)
    assert len(cuts.segments) == len(compiled.sites)
    names = [site.name for site in compiled.sites]
    assert len(set(names)) == len(names)
    # every read of a parameter is in exactly one segment
    read = [n for n in compiled.captured.module.graph.nodes if any(_is_trained(s) for s in n.all_input_nodes)]
    regions = Counter(name for site in compiled.sites for name in site.region)
    assert all(regions[node.name] == 1 for node in read if node.name in regions and not _only_weights(node))
    given = Counter(name for site in compiled.sites for name in site.parameters)
    assert given.keys() == {name for name, p in program.model.named_parameters() if p.requires_grad}
    expected = reference(with_random_jacobians(program), x, y, ended, compiled.reach)
    check_equal(step(program, x, y), expected)


def _is_trained(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.meta["role"] == Role.PARAMETER and bool(node.meta["trainable"])


def _only_weights(node: fx.Node) -> bool:
    """Whether the node is an expression of parameters alone, which each segment that reads it recomputes."""
    return all(source.op == "placeholder" and source.meta["role"] == Role.PARAMETER for source in node.all_input_nodes)


# --- random graphs ----------------------------------------------------------------------------------------------------


def recipes(**settings: Any) -> st.SearchStrategy[Recipe]:
    return random_models.recipes(**settings).map(lambda recipe: replace(recipe, outputs=1))


@hypothesis.settings(max_examples=3, phases=PHASES)
@hypothesis.given(recipe=recipes(without=(*STEPS, "dropout")))
def test_one_segment_is_backpropagation(recipe: Recipe) -> None:
    model, x, y = build(recipe)
    program = program_for(model, x, random_models.loss, segments=1)
    assert len(program.compiled.sites) == 1
    assert program.compiled.runs == ()
    verify(program.compiled)
    statistics = {name: value.clone() for name, value in model.state_dict().items()}
    found = step(program, x, y)
    model.load_state_dict(statistics)
    check_equal(found, autograd(model, random_models.loss(call(model, x), y).mean()))


@hypothesis.settings(max_examples=7, phases=PHASES)
@hypothesis.given(
    recipe=recipes(),
    choice=st.one_of(st.sampled_from([1, "auto"]), st.sets(st.integers(0, 6), min_size=1)),
    reach=st.integers(0, 3),
    placement=st.sampled_from(["alive", "narrow"]),
)
def test_random_cuts_give_what_autograd_gives_with_the_gradient_at_the_cuts_replaced(
    recipe: Recipe, choice: Any, reach: int, placement: str
) -> None:
    model, x, y = build(recipe)
    segments = choice if not isinstance(choice, set) else sorted(f"blocks.{number}" for number in choice)
    if isinstance(segments, list):  # blocks without parameters are no places to cut
        holding = {name for name, block in model.blocks.named_children() if any(True for _ in block.parameters())}  # type: ignore[union-attr, operator]
        segments = [name for name in segments if name.removeprefix("blocks.") in holding] or 1
    try:
        program = program_for(model, x, random_models.loss, segments=segments, reach=reach, placement=placement)
    except UnknownNameError:  # a block whose result the model throws away, or that is frozen
        hypothesis.reject()
    check_program(program, x, y)


KNOWN: dict[str, tuple[Recipe, Any]] = {
    "chain": (Recipe(steps=(("linear", 0, 0), ("tanh", 1, 0), ("linear", 2, 0), ("relu", 3, 0), ("linear", 4, 0))), 2),
    "skip around a cut": (Recipe(steps=(("linear", 0, 0), ("tanh", 1, 0), ("linear", 2, 0), ("add", 3, 1))), [2]),
    "another segment in the middle of one": (
        Recipe(steps=(("linear", 0, 0), ("linear", 0, 0), ("linear", 1, 0), ("concatenate", 3, 2), ("linear", 4, 0),
                      ("concatenate", 1, 2), ("linear", 6, 0))),
        [4, 6],
    ),
    "a cut that reads a cut": (
        Recipe(steps=(("linear", 0, 0), ("tanh", 1, 0), ("linear", 2, 0), ("concatenate", 2, 3), ("linear", 4, 0))),
        [2, 4],
    ),
    "tied": (
        Recipe(steps=(("linear", 0, 0), ("tanh", 1, 0), ("tied", 2, 0), ("tanh", 3, 0), ("transposed", 4, 0))), [2]
    ),
    "batch norm": (
        Recipe(steps=(("batch_norm", 0, 0), ("tanh", 1, 0), ("batch_norm", 2, 0), ("relu", 3, 0)), training=True), [0]
    ),
    "dropout": (
        Recipe(steps=(("linear", 0, 0), ("dropout", 1, 0), ("linear", 2, 0), ("dropout", 3, 0)), training=True), [2]
    ),
    "sign in the middle": (
        Recipe(steps=(("linear", 0, 0), ("tanh", 1, 0), ("linear", 2, 0), ("sign", 3, 0), ("linear", 4, 0),
                      ("tanh", 5, 0), ("linear", 6, 0))),
        1,
    ),
    "sign beside": (
        Recipe(steps=(("linear", 0, 0), ("linear", 1, 0), ("sign", 2, 0), ("gate", 1, 3), ("linear", 4, 0))), 1
    ),
    "attention": (Recipe(steps=(("linear", 0, 0), ("attention", 1, 0), ("layer_norm", 2, 0)), inputs="tuple"), [1]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "reach"),
    [*((name, 0) for name in KNOWN), ("skip around a cut", 1), ("another segment in the middle of one", 1),
     ("a cut that reads a cut", 1), ("tied", 1), ("sign in the middle", 1)],
)  # fmt: skip
def test_known_cases(name: str, reach: int) -> None:
    recipe, cuts = KNOWN[name]
    segments = [f"blocks.{number}" for number in cuts] if isinstance(cuts, list) else cuts
    model, x, y = build(recipe)
    program = program_for(model, x, random_models.loss, segments=segments, reach=reach)
    assert program.compiled.runs or reach, "feedback is read nowhere"
    check_program(program, x, y)


# --- by hand ----------------------------------------------------------------------------------------------------------


def points(samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 4, generator=generator, dtype=torch.float64), torch.arange(samples) % 3


def layered(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(4, 4)]
    for module in between:
        layers += [module, nn.Linear(4, 4)]
    return nn.Sequential(*layers).double()


def test_before_the_cut_the_prediction_is_pulled_back_and_behind_it_all_is_exact() -> None:
    model, (x, y) = layered(nn.Tanh(), nn.ReLU(), nn.Tanh()), points()
    program = with_random_jacobians(program_for(model, x, segments=["2"]))
    assert [site.name for site in program.compiled.sites] == ["0…2", "4…6"]
    assert program.feedback is not None
    (jacobian,) = program.feedback.jacobians.values()  # before the step learns more
    found, exact = step(program, x, y), autograd(model, F.cross_entropy(model(x), y))
    output = model(x).detach().requires_grad_()
    (error,) = torch.autograd.grad(F.cross_entropy(output, y), output)
    z = model[:3](x)
    predicted = autograd(model, (z * ((z > 0) * (error @ jacobian.T)).detach()).sum())
    check_equal(found, {n: predicted[n] if n.startswith(("0", "2")) else exact[n] for n in exact})


class Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sign(x)


class Round(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.round(2 * x)


@pytest.mark.parametrize(
    ("quantiser", "segments", "reach"), [(Sign, 1, 0), (Sign, ["0"], 9), (Round, 1, 9)]
)  # fmt: skip
def test_an_operation_without_derivative_is_cut_whatever_is_asked_for(
    quantiser: type[nn.Module], segments: Any, reach: int
) -> None:
    model, (x, y) = layered(nn.Tanh(), quantiser(), nn.Tanh()), points()
    program = with_random_jacobians(program_for(model, x, segments=segments, reach=reach))
    assert program.compiled.sites[-1].name == "4…6"
    assert len(program.compiled.sites) == (2 if segments == 1 else 3)
    found, exact = step(program, x, y), autograd(model, F.cross_entropy(model(x), y))
    check_equal({n: g for n, g in found.items() if n > "4"}, {n: g for n, g in exact.items() if n > "4"})
    assert not bool(exact["0.weight"].any())
    assert bool(found["0.weight"].any())


class Padded(nn.Module):
    """Pads forward, and backward by a negative pad; torch's own reads sizes as integers."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(F.pad(x, (1, -2), value=3.0), (0, 1))


def test_padding_inside_a_segment_leaves_the_batch_size_free() -> None:
    model, (x, y) = layered(Padded(), nn.Tanh()), points()
    program = program_for(model, x, segments=1)
    check_equal(step(program, x, y), autograd(model, F.cross_entropy(model(x), y)))
    check_equal(step(program, x[:5], y[:5]), autograd(model, F.cross_entropy(model(x[:5]), y[:5])))


# --- where it cuts ----------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Residual gated units in front of a head."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.units = nn.ModuleList(nn.ModuleDict({n: nn.Linear(4, 4) for n in "abo"}) for _ in range(depth))
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for unit in self.units:
            x = x + unit["o"](unit["a"](x) * torch.sigmoid(unit["b"](x)))  # type: ignore[index, operator]
        return self.head(x)


@functools.cache
def graph_of(depth: int | None = None) -> fx.GraphModule:
    """The sites of `Gated`, or of six layers in a row."""
    model = layered(*[nn.Tanh() for _ in range(5)]) if depth is None else Gated(depth).double()
    return graph_after(program_for(model, points()[0]), "find_sites")


def names(module: fx.GraphModule, segments: Any) -> list[str]:
    """The names of the segments, in order."""
    return [site.name for site in sites(join_segments(module, cuts=resolve_segments(segments, module)))]


def test_auto_joins_around_products(monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(graph_of(3), "auto") == ["stem…units.0.o", "units.1", "units.2.a…head"]
    assert resolve_reach("auto", graph_of(3)) == 2
    monkeypatch.setattr(resolving, "MAX_JOINED", 2)  # stretches of three sites are then left as they are
    assert len(names(graph_of(3), "auto")) == 11
    assert resolve_reach("auto", graph_of(3)) == 1


def test_auto_leaves_a_network_without_products_as_it_is() -> None:
    x = torch.randn(4, 1, 8, 8)
    program = program_for(onward.models.resnet5(width=4), x, segments="auto", reach="auto")
    found = sites(graph_after(program, "find_sites"))
    assert [site.name for site in program.compiled.sites] == [site.name for site in found]
    assert program.compiled.reach == 1
    program.step(x, torch.arange(4))


def test_auto_on_a_vision_transformer() -> None:
    torch.manual_seed(0)
    model, x = onward.models.vit(width=8, depth=2, heads=2).double(), torch.randn(4, 1, 8, 8).double()
    program = program_for(model, x, segments="auto", reach=1)
    assert [site.name for site in program.compiled.sites] == ["embed…blocks.0.fc2", "blocks.1.norm1…head"]
    check_program(program, x, torch.arange(4))


def test_a_number_of_segments_balances_them() -> None:
    assert names(graph_of(), 1) == ["0…10"]
    assert names(graph_of(), 2) == ["0…4", "6…10"]
    assert names(graph_of(), 3) == ["0…2", "4…6", "8…10"]
    assert names(graph_of(), 6) == ["0", "2", "4", "6", "8", "10"]


def test_module_names_cut_behind_the_outermost_that_match() -> None:
    assert names(graph_of(2), ["units.*"]) == ["stem…units.0.o", "units.1", "head"]
    assert names(graph_of(2), ["units.0"]) == ["stem…units.0.o", "units.1.a…head"]
    assert names(graph_of(2), ["stem", "head"]) == ["stem", "units.0.a…head"]


def test_names_stay_unique_where_a_module_is_called_in_two_segments() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
            self.mid, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(torch.tanh(self.mid(self.block(x)))))

    program = program_for(Twice().double(), points()[0], segments=["mid"])
    assert len(program.compiled.sites) == 2
    check_program(program, *points())


# --- what shows them --------------------------------------------------------------------------------------------------


def test_reports_drawings_and_files(tmp_path: Path) -> None:
    compiled = program_for(Gated().double(), points()[0], segments=["units.*"]).compiled
    text = render(compiled, "gated", "text", None)
    for word in ("join_segments", "extend_reach", "stem…units.0.o"):
        assert word in text
    for pass_ in (None, "join_segments", "complete_gradients"):
        ast.parse(render(compiled, "gated", "python", pass_))
        assert render(compiled, "gated", "dot", pass_).startswith("digraph")
        assert ElementTree.fromstring(render(compiled, "gated", "svg", pass_)).tag.endswith("svg")
    assert "units.1" in render(compiled, "gated", "json", None)
    save_program(compiled, tmp_path / "gated")
    manifest = read_manifest(tmp_path / "gated")
    assert [site["name"] for site in manifest["sites"]] == ["stem…units.0.o", "units.1", "head"]
    assert manifest["estimator"]["segments"] == ["units.*"]
    for gradient in manifest["gradients"]:
        ast.parse((tmp_path / "gated" / gradient["file"]).read_text(encoding="utf-8"))


def test_on_the_command_line(tmp_path: Path) -> None:
    options = ["mlp", "--model-option", "hidden=(8, 8)", "--segments", "2", "--reach", "0"]
    shown = CliRunner().invoke(app, ["inspect", *options, "--pass", "complete_gradients"])
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("def gradient_") == 2
    written = CliRunner().invoke(app, ["compile", *options, "-o", str(tmp_path / "mlp")])
    assert "2 gradients" in written.output
    refused = CliRunner().invoke(app, ["compile", *options[:3], "--segments", "fc9,head", "-o", str(tmp_path / "no")])
    assert refused.exit_code == 2
    assert "unknown module (segments) 'fc9'. Did you mean 'fc" in refused.stderr


# --- what cannot work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (["unit.*"], r"unknown module \(segments\) 'unit\.\*'\. Did you mean 'units"),
        (["units.0.x"], r"unknown module \(segments\) 'units\.0\.x'\. Did you mean 'units\.0"),
        (["units.*", "tail"], "unknown module .* 'tail'"),
        (5, "segments=5: the model has 3 place.s. to cut .* at most 4 segments"),
    ],
)
def test_cuts_that_the_model_does_not_have(segments: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        names(graph_of(2), segments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segments": 0}, "segments=0: the number"),
        ({"segments": -2}, "segments=-2: the number"),
        ({"segments": True}, "segments=True: the number"),
        ({"segments": 2.5}, "segments=2.5: it has to be"),
        ({"segments": None}, "segments=None: it has to be"),
        ({"segments": []}, r"segments=\[\]: it has to be"),
        ({"segments": [1]}, r"segments=\[1\]: it has to be"),
        ({"segments": "atuo"}, "unknown segmentation 'atuo'. Did you mean 'auto'"),
        ({"reach": "atuo"}, "unknown reach 'atuo'. Did you mean 'auto'"),
        ({"reach": True}, "reach=True"),
        ({"reach": 1.0}, "reach=1.0"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        onward.LikelihoodRatio.feedback_learned(**settings)


@pytest.mark.parametrize("settings", [{"segments": 2}, {"segments": "auto"}, {"reach": "auto"}])
def test_segments_are_of_feedback_alone(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match='is an option of feedback="learned"'):
        onward.LikelihoodRatio(**settings)
