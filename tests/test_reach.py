"""Gradients read some noise points on and pulled back inside a site's own subgraph (DESIGN.md 13, 14).

In a linear network the Jacobian at a noise point is the same for every sample, so with the exact one in the program's
feedback *every* reach has to give autograd's gradient, up to rounding: float64 and some ten operations in a row, each
with sums of fewer than 1000 terms, leave less than ``10 * 1000 * 1.1e-16 = 1e-12`` of the largest intermediate value;
`TOLERANCE` allows that those are 1000 times the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import onward
from onward.compiler.program_checks import noise_points
from onward.compiler.verify import verify, verify_history
from onward.passes.graph import Role, outputs, placeholders

TOLERANCE = 1e-9
ALL = 1000
"""A reach beyond every network here."""


def program_for(model: nn.Module, x: Any, loss: Any = F.mse_loss, **settings: Any) -> onward.Program:
    estimator = onward.LikelihoodRatio.feedback_learned(**{"warmup": 0, **settings})
    return onward.compile(model, x, loss=loss, estimator=estimator)


class Shifted(fx.Interpreter):
    """The one-copy graph without noise, with `delta` added at the noise point of `site`."""

    def __init__(self, module: fx.GraphModule, site: int, delta: Tensor) -> None:
        super().__init__(module)
        self.site, self.delta = site, delta

    def run_node(self, n: fx.Node) -> Any:
        if "noise_of" not in n.meta:
            return super().run_node(n)
        value = self.fetch_args_kwargs_from_env(n)[0][0]
        return value + self.delta if n.meta["noise_of"] == self.site else value


def exact_jacobians(program: onward.Program, x: Tensor) -> dict[int, Tensor]:
    """∂output/∂noise point of the first sample; of all, if the model is linear."""
    graph = program.compiled.graph
    model, integer = program.model, torch.zeros(2, dtype=torch.int64)
    values = {"copies": integer[:1], "key": integer, "sigmas": torch.zeros(len(program.compiled.sites))}
    read = {
        Role.PARAMETER: lambda name: model.get_parameter(name).detach(),
        Role.BUFFER: lambda name: model.get_buffer(name),
        Role.INPUT: lambda number: x[:1],
        Role.RUNTIME: lambda name: values[name],
    }
    arguments = [read[node.meta["role"]](node.meta["target"]) for node in placeholders(graph)]
    number = next(place for place, (output, _) in enumerate(outputs(graph)) if output.kind == "output")
    points = {node.meta["noise_of"]: node for node in graph.graph.nodes if "noise_of" in node.meta}
    found = {}
    for site in noise_points(program.compiled):
        sizes = program.compiled.sites[site].layout.sizes
        assert points[site].meta["noise_of"] == site

        def output(delta: Tensor, site: int = site) -> Tensor:
            return Shifted(graph, site, delta).run(*arguments)[number].flatten()

        jacobian = torch.func.jacrev(output)(torch.zeros(sizes, dtype=x.dtype))
        found[site] = jacobian.flatten(1).T.contiguous()
    return found


def with_exact_feedback(program: onward.Program, x: Tensor) -> onward.Program:
    assert program.feedback is not None
    program.feedback = replace(program.feedback, jacobians=exact_jacobians(program, x))
    return program


def autograd(model: nn.Module, x: Any, y: Any, loss: Any = F.mse_loss) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss(model(x), y), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def step(program: onward.Program, x: Any, y: Any) -> dict[str, Tensor]:
    program.model.zero_grad()
    program.step(x, y)
    return {name: p.grad.clone() for name, p in program.model.named_parameters() if p.grad is not None}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor], names: Any = None) -> None:
    for name in names or expected:
        error, size = float((found[name] - expected[name]).abs().max()), float(expected[name].abs().max())
        assert error <= TOLERANCE * size, f"{name}: {error / size}"
        assert size > 0


# --- linear networks of any shape -------------------------------------------------------------------------------------

WIDTH = 3


@dataclass(frozen=True)
class Node:
    """One operation of a random network; `sources` count backwards from the newest value."""

    operation: str
    sources: tuple[int, int]
    weight: int


OPERATIONS = ("linear", "linear", "add", "cat", "scaled_add", "reuse", "roll")


@st.composite
def recipes(draw: st.DrawFn) -> tuple[Node, ...]:
    place = st.integers(0, 3)
    node = st.builds(Node, st.sampled_from(OPERATIONS), st.tuples(place, place), st.integers(0, 3))
    return tuple(draw(st.lists(node, min_size=2, max_size=8)))


class Random(nn.Module):
    """Linear in its input; all values that nothing reads meet in the head."""

    def __init__(self, recipe: tuple[Node, ...], sequence: int = 0) -> None:
        super().__init__()
        self.recipe, self.sequence = recipe, sequence
        self.first = nn.Linear(WIDTH, WIDTH)
        self.linears = nn.ModuleList(
            nn.Linear(2 * WIDTH if node.operation == "cat" else WIDTH, WIDTH)
            for node in recipe
            if node.operation in ("linear", "cat")
        )
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.sequence:  # samples in dimension 1
            x = x.unflatten(1, (self.sequence, WIDTH)).transpose(0, 1)
        values, read, linears = [self.first(x)], set(), iter(self.linears)
        values.append(self.shared(values[0] * 0.5))
        for node in self.recipe:
            first, second = (max(0, len(values) - 1 - back) for back in node.sources)
            a, b = values[first], values[second]
            read |= {first, second} if node.operation in ("add", "cat", "scaled_add") else {first}
            match node.operation:
                case "linear":
                    value = next(linears)(a)
                case "add":
                    value = a + b
                case "scaled_add":
                    value = torch.add(a, b, alpha=-0.5)
                case "cat":
                    value = next(linears)(torch.cat([a, b], -1))
                case "reuse":
                    value = self.shared(a)
                case _:
                    value = 2 * a.roll(node.weight, -1)
            values.append(value)
        total = sum(value for place, value in enumerate(values) if place not in read)
        assert isinstance(total, Tensor)
        return self.head(total.mean(0) if self.sequence else total)


@hypothesis.settings(
    max_examples=8, phases=(hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate)
)
@hypothesis.given(recipe=recipes(), reach=st.sampled_from([0, 1, 2, 3, 4, ALL]), seed=st.integers(0, 99))
def test_with_exact_jacobians_every_reach_is_autograd(recipe: tuple[Node, ...], reach: int, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Random(recipe).double()
        x, y = torch.randn(4, WIDTH, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    program = with_exact_feedback(program_for(model, x, reach=reach), x)
    check_equal(step(program, x, y), autograd(model, x, y))


# what hypothesis found, or might miss: ways that part and meet again in front of, at and behind the frontier
KNOWN = {
    "chain": [Node("linear", (0, 0), 0)] * 4,
    "frontier reads another": [Node("linear", (0, 0), 0), Node("cat", (0, 1), 0), Node("cat", (0, 1), 0)],
    "skips": [Node("linear", (0, 0), 0), Node("scaled_add", (0, 1), 0), Node("linear", (0, 0), 0)] * 2,
    "long skip": [Node("linear", (0, 0), 0)] * 3 + [Node("scaled_add", (0, 3), 0), Node("linear", (0, 0), 0)],
    "reused": [Node("reuse", (0, 0), 0), Node("roll", (0, 0), 1), Node("reuse", (0, 0), 0), Node("cat", (0, 2), 0)],
}


@pytest.mark.parametrize(
    ("name", "reach"),
    [("chain", 1), ("frontier reads another", 1), ("frontier reads another", 2), ("skips", 1), ("skips", 2),
     ("long skip", 1), ("long skip", 2), ("reused", 0), ("reused", 1)],
)  # fmt: skip
def test_no_way_is_counted_twice(name: str, reach: int) -> None:
    torch.manual_seed(0)
    model = Random(tuple(KNOWN[name])).double()
    x, y = torch.randn(4, WIDTH, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    program = with_exact_feedback(program_for(model, x, reach=reach), x)
    check_equal(step(program, x, y), autograd(model, x, y))
    verify_history(program.compiled)


@pytest.mark.parametrize("reach", [0, 1])
def test_samples_in_another_dimension(reach: int) -> None:
    torch.manual_seed(0)
    model = Random((Node("linear", (0, 0), 0), Node("scaled_add", (0, 1), 0)), sequence=3).double()
    x, y = torch.randn(4, 3 * WIDTH, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    program = with_exact_feedback(program_for(model, x, reach=reach), x)
    assert program.compiled.sites[0].layout.dim == 1
    check_equal(step(program, x, y), autograd(model, x, y))


@pytest.mark.parametrize("reach", [0, 1])
def test_what_feedback_leaves_unexplained_is_weighted_by_each_noise_points_own_sigma(reach: int) -> None:
    """With exact Jacobians a quadratic loss leaves its curvature only, which antithetic pairs cancel: the correction is
    zero for any σ. With Jacobians of zero it is plain likelihood ratio, off by more than 10 % if a σ were exchanged."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2)).double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    sigma = {"0": 0.3, "1": 0.01, "*": 0.1}
    program = program_for(model, x, reach=reach, correction="full", sigma=sigma, copies=256)
    nothing = program.feedback
    with_exact_feedback(program, x)
    check_equal(step(program, x, y), autograd(model, x, y))
    rows = []
    for _ in range(60):
        program.feedback = nothing
        rows.append(torch.cat([gradient.flatten() for gradient in step(program, x, y).values()]))
    found = torch.stack(rows)
    expected = torch.cat([gradient.flatten() for gradient in autograd(model, x, y).values()])
    error = found.std(0) / 60**0.5
    assert bool(((found.mean(0) - expected).abs() <= 6 * error + TOLERANCE).all())
    assert float((6 * error).norm()) < 0.8 * float(expected.norm())


# --- a reach beyond the last site is backpropagation ------------------------------------------------------------------


class Attention(nn.Module):
    """A transformer block, the token dimension averaged in front of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.qkv, self.project = nn.Linear(4, 12), nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        h = torch.tanh(self.inner(h) + h)
        return self.head(torch.tanh(F.linear(h, self.inner.weight.t())))


def images(channels: int) -> Tensor:
    return torch.randn(4, channels, 6, 6)


NETWORKS: dict[str, Any] = {
    "mlp": (lambda: onward.models.mlp(6, hidden=(5, 4), num_classes=3), lambda: torch.randn(4, 6)),
    "resnet5": (lambda: onward.models.resnet5(3, width=2), lambda: images(1)),
    "resnet5-group": (lambda: onward.models.resnet5(3, width=2, norm="group"), lambda: images(1)),
    "resnet5-batch": (lambda: onward.models.resnet5(3, width=2, norm="batch"), lambda: images(1)),
    "normalised-input": (
        lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)),
        lambda: torch.randn(4, 6),
    ),
    "transformer": (Attention, lambda: torch.randn(4, 3, 4)),
    "lstm": (Recurrent, lambda: torch.randn(4, 3, 3)),
    "tied": (Tied, lambda: torch.randn(4, 4)),
}


@pytest.mark.filterwarnings("ignore:.*LSTM.*batch:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_reach_beyond_the_last_site_is_backpropagation(name: str) -> None:
    torch.manual_seed(0)
    build, inputs = NETWORKS[name]
    model, x, y = build().double(), inputs().double(), torch.tensor([0, 2, 1, 1])
    program = program_for(model, x, F.cross_entropy, reach=ALL, warmup=80)
    assert program.compiled.runs == ()
    verify(program.compiled)
    expected = autograd(model, x, y, F.cross_entropy)
    check_equal(step(program, x, y), expected)  # nothing to learn, hence no warm-up
    assert program.forwards == 0
    assert set(program.trust().values()) == {1.0}


@pytest.mark.filterwarnings("ignore:.*LSTM.*batch:UserWarning")
@pytest.mark.parametrize(("name", "reach"), [("resnet5-batch", 1), ("normalised-input", 1), ("lstm", 0), ("lstm", 1),
                                             ("transformer", 2), ("tied", 1)])  # fmt: skip
def test_a_short_reach_compiles_and_its_last_site_is_exact(name: str, reach: int) -> None:
    torch.manual_seed(0)
    build, inputs = NETWORKS[name]
    model, x, y = build().double(), inputs().double(), torch.tensor([0, 2, 1, 1])
    program = program_for(model, x, F.cross_entropy, reach=reach)
    verify_history(program.compiled)
    expected = autograd(model, x, y, F.cross_entropy)
    head = [name for name in expected if name.startswith(("head", "4"))]
    assert head
    check_equal(step(program, x, y), expected, head)
    program.step(torch.cat([x, x, x]), y.repeat(3))  # another batch size


# --- operations without derivative ------------------------------------------------------------------------------------

ISLANDS = {
    "sign": torch.sign,
    "round": torch.round,
    "comparison": lambda z: (z > 0).to(z.dtype),
    "argmax": lambda z: F.one_hot(z.argmax(1), 5).to(z.dtype),
    "straight-through": lambda z: z + (torch.sign(z) - z).detach(),
}


class Island(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for place, layer in enumerate(self.layers):
            x = layer(x)
            x = ISLANDS[self.name](x) if place == 1 else torch.tanh(x) if place < 3 else x
        return x


@pytest.mark.parametrize("name", ISLANDS)
def test_the_reach_ends_at_an_operation_without_derivative(name: str) -> None:
    torch.manual_seed(0)
    model, x, y = Island(name).double(), torch.randn(8, 5).double(), torch.randn(8, 5).double()
    program = program_for(model, x, reach=ALL)
    first, second, third, last = program.compiled.sites
    assert first.ends == second.ends == (second.output,)
    assert last.output in third.ends
    assert last.output in last.ends
    assert noise_points(program.compiled) == [1]
    verify_history(program.compiled)

    expected = autograd(model, x, y) if name == "straight-through" else _behind(model, x, y)
    behind = [key for key in expected if key.startswith(("layers.2", "layers.3"))]
    assert len(behind) == 4
    check_equal(step(program, x, y), expected, behind)

    # in front: what the feedback says at the second site's output, pulled back exactly
    assert program.feedback is not None
    jacobian = torch.randn(5, 5, dtype=torch.float64)
    program.feedback = replace(program.feedback, jacobians={1: jacobian})
    found = step(program, x, y)
    h = torch.tanh(model.layers[0](x))
    z = model.layers[1](h)
    out = model(x).detach().requires_grad_()
    (error,) = torch.autograd.grad(F.mse_loss(out, y), out)
    front = {key: p for key, p in model.named_parameters() if key.startswith(("layers.0", "layers.1"))}
    gradients = torch.autograd.grad(z, list(front.values()), error @ jacobian.T)
    check_equal(found, dict(zip(front, gradients, strict=True)))


def _behind(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    parameters = {key: p for key, p in model.named_parameters() if key.startswith(("layers.2", "layers.3"))}
    gradients = torch.autograd.grad(F.mse_loss(model(x), y), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def test_each_hop_widens_the_subgraph() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    frontiers = []
    for reach in range(3):
        program = program_for(onward.models.mlp(5, hidden=(5, 5), num_classes=3), x, F.cross_entropy, reach=reach)
        places = {site.output: site.index for site in program.compiled.sites}
        frontiers.append([places[end] for site in program.compiled.sites for end in site.ends])
    assert frontiers == [[0, 1, 2], [1, 2, 2], [2, 2, 2]]
