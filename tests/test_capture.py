"""What models can be captured: each compiles, and its gradient points where backpropagation's does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import onward
from onward.passes.errors import BatchError, CaptureError, UnsupportedModelError

N = 4
LABELS = torch.arange(N) % 3


def normal(*shape: int) -> Tensor:
    return torch.randn(N, *shape, dtype=torch.float64)


class Net(nn.Module):
    """A forward written as a function of the module, and its parts."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


@dataclass(frozen=True)
class Case:
    """A model, its inputs and its loss."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    loss: Callable[[Any, Tensor], Any] = F.cross_entropy
    settings: dict[str, Any] = field(default_factory=dict)
    sequential: bool = False
    """Whether copies have to run one at a time."""

    def __str__(self) -> str:
        return self.name


def case(name: str, function: Callable[..., Any], *inputs: Callable[[], Tensor], **parts: Callable[[], Any]) -> Case:
    return Case(
        name,
        lambda: Net(function, **{part: build() for part, build in parts.items()}),
        lambda: tuple(build() for build in inputs),
    )


def linear(width: int, out: int = 3, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(width, out, bias=bias)


def recurrent(cls: Any, **options: Any) -> Case:
    name = f"{cls.__name__}{''.join(f'-{key}={value}' for key, value in options.items())}"
    batch_first = options.setdefault("batch_first", True)
    width = options.get("proj_size", 5) * (2 if options.get("bidirectional") else 1)

    def function(net: Any, x: Tensor) -> Any:
        return net.head(net.layer(x)[0][:, -1] if batch_first else net.layer(x.transpose(0, 1))[0][-1])

    return case(name, function, lambda: normal(2, 4), layer=lambda: cls(4, 5, **options), head=linear(width))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Any:
        return self.head(self.b(self.a(x).tanh()).tanh())


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(5, 5), torch.randn(5, 3)])
        self.more = nn.ParameterDict({"bias": torch.zeros(3)})

    def forward(self, x: Tensor) -> Any:
        for weight in self.weights:
            x = (x @ weight).tanh()
        return x + self.more["bias"]


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.register_buffer("scale", torch.randn(5))
        self.register_buffer("shift", torch.randn(3), persistent=False)
        self.register_buffer("calls", torch.zeros(()))
        self.plain = torch.full((5,), 2.0, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        self.get_buffer("calls").add_(1)
        made = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=x.dtype)
        return self.head(x * self.get_buffer("scale") * self.plain + made) + self.get_buffer("shift")


class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 3, 4))
        self.value, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head((torch.softmax(x @ x.transpose(1, 2), -1) @ self.value(x))[:, 0])


class Experts(nn.Module):
    """Each sample goes to the expert that its router prefers."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(5, 2), nn.Linear(6, 3)
        self.experts = nn.Parameter(torch.randn(2, 5, 6))

    def forward(self, x: Tensor) -> Any:
        gates = self.router(x).softmax(-1)
        chosen = gates.argmax(-1)
        return self.head(torch.einsum("bi,bio->bo", x, self.experts[chosen]) * gates.gather(1, chosen[:, None]))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class WritesInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.first(x).clone()
        h[:, 0] = h[:, 0] * 2
        h[:, 1:3] += 1
        h.mul_(2).relu_()
        self.last = h
        return self.head(h)


class Pair(NamedTuple):
    logits: Tensor
    code: Tensor


def pair_loss(output: Any, target: Tensor) -> Any:
    logits, code = output.values() if isinstance(output, dict) else output[:2]
    return F.cross_entropy(logits, target, reduction="none") + code.square().sum(1)


def ints() -> Tensor:
    return torch.randint(0, 7, (N, 3))


CASES = [
    # inputs
    case("two inputs", lambda m, a, b: m.head(a * b), lambda: normal(5), lambda: normal(5), head=linear(5)),
    case(
        "an input without samples",
        lambda m, x, table: m.head(x @ table),
        lambda: normal(6),
        lambda: torch.randn(6, 5, dtype=torch.float64),
        head=linear(5),
    ),
    case("integers", lambda m, i: m.head(m.table(i).mean(1)), ints, table=lambda: nn.Embedding(7, 4), head=linear(4)),
    case("EmbeddingBag", lambda m, i: m.head(m.bag(i)), ints, bag=lambda: nn.EmbeddingBag(7, 4), head=linear(4)),
    # parameters
    case(
        "weight norm",
        lambda m, x: m.head(m.first(x).relu()),
        lambda: normal(5),
        first=lambda: parametrizations.weight_norm(nn.Linear(5, 4)),
        head=linear(4),
    ),
    Case("tied weights", Tied, lambda: normal(5)),
    Case("parameter list", Listed, lambda: normal(5)),
    Case("buffers and constants", Buffers, lambda: normal(5)),
    Case("class token", ClassToken, lambda: normal(2, 4), settings={"copies": 4096}),
    case(
        "bilinear",
        lambda m, a, b: m.head(a, b),
        lambda: normal(4),
        lambda: normal(3),
        head=lambda: nn.Bilinear(4, 3, 3),
    ),
    # recurrence
    recurrent(nn.LSTM),
    recurrent(nn.GRU, bidirectional=True),
    recurrent(nn.RNN, num_layers=2),
    recurrent(nn.LSTM, batch_first=False, bidirectional=True),
    recurrent(nn.LSTM, proj_size=3),
    case(
        "LSTMCell",
        lambda m, x: m.head(m.cell(x[:, 1], m.cell(x[:, 0]))[0]),
        lambda: normal(2, 4),
        cell=lambda: nn.LSTMCell(4, 5),
        head=linear(5),
    ),
    # attention
    case(
        "MultiheadAttention",
        lambda m, x: m.head(m.mix(x, x, x)[0].mean(1)),
        lambda: normal(3, 4),
        mix=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        head=linear(4),
    ),
    case(
        "MultiheadAttention, positions first",
        lambda m, x: m.head(
            m.mix(x.mT.permute(2, 0, 1), x.transpose(0, 1), x.transpose(0, 1), need_weights=False)[0].mean(0)
        ),
        lambda: normal(3, 4),
        mix=lambda: nn.MultiheadAttention(4, 2),
        head=linear(4),
    ),
    case(
        "TransformerEncoderLayer",
        lambda m, x: m.head(m.block(x).mean(1)),
        lambda: normal(3, 4),
        block=lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0, batch_first=True),
        head=linear(4),
    ),
    # layers
    case(
        "Conv1d",
        lambda m, x: m.head(m.conv(x).relu().mean(-1)),
        lambda: normal(2, 6),
        conv=lambda: nn.Conv1d(2, 4, 3, padding="same"),
        head=linear(4),
    ),
    case(
        "ConvTranspose1d",
        lambda m, x: m.head(m.conv(x).relu().mean(-1)),
        lambda: normal(2, 4),
        conv=lambda: nn.ConvTranspose1d(2, 4, 3, stride=2, output_padding=1, padding=1),
        head=linear(4),
    ),
    case(
        "GroupNorm",
        lambda m, x: m.head(m.norm(m.conv(x)).relu().mean((2, 3))),
        lambda: normal(2, 3, 3),
        conv=lambda: nn.Conv2d(2, 4, 2),
        norm=lambda: nn.GroupNorm(2, 4),
        head=linear(4),
    ),
    case(
        "InstanceNorm",
        lambda m, x: m.head(m.norm(m.conv(x)).relu().mean((2, 3))),
        lambda: normal(2, 4, 4),
        conv=lambda: nn.Conv2d(2, 4, 2),
        norm=lambda: nn.InstanceNorm2d(4, affine=True),
        head=linear(4),
    ),
    case(
        "PReLU",
        lambda m, x: m.head(m.act(m.first(x))),
        lambda: normal(4),
        first=linear(4, 5),
        act=lambda: nn.PReLU(5),
        head=linear(5),
    ),
    # shapes
    case(
        "shape of the input",
        lambda m, x: m.head(m.first(x).view(x.shape[0], -1)),
        lambda: normal(2, 4),
        first=linear(4, 5),
        head=linear(10),
    ),
    case(
        "batch size as a number",
        lambda m, x: m.head(m.first(x) / x.shape[0] + x.shape[0] ** 0.5),
        lambda: normal(4),
        first=linear(4, 5),
        head=linear(5),
    ),
    case(
        "merged, samples first",
        lambda m, x: m.head(m.first(x.flatten(0, 1)).relu().unflatten(0, (x.shape[0], 3)).mean(1)),
        lambda: normal(3, 4),
        first=linear(4, 5),
        head=linear(5),
    ),
    case(
        "merged, samples last",
        lambda m, x: m.head(m.first(x.transpose(0, 1).flatten(0, 1)).relu().view(3, -1, 5).mean(0)),
        lambda: normal(3, 4),
        first=linear(4, 5),
        head=linear(5),
    ),
    case(
        "merged, samples in the middle",
        lambda m, x: m.head(
            m.first(x.expand(2, *x.shape).transpose(1, 2).flatten(1, 2)).relu().view(2, 3, -1, 5).mean((0, 1))
        ),
        lambda: normal(3, 4),
        first=linear(4, 5),
        head=linear(5),
    ),
    # operations
    case(
        "torch.where",
        lambda m, x: m.head(torch.where(x > 0, m.a(x), m.b(x))),
        lambda: normal(5),
        a=linear(5, 5),
        b=linear(5, 5),
        head=linear(5),
    ),
    Case("routing by argmax", Experts, lambda: normal(5)),
    case(
        "autograd.Function",
        lambda m, x: m.head(Cube.apply(m.first(x))),
        lambda: normal(5),
        first=linear(5, 5),
        head=linear(5),
    ),
    case(
        "checkpointing",
        lambda m, x: m.head(checkpoint(m.first, x, use_reentrant=False)),
        lambda: normal(5),
        first=linear(5, 5),
        head=linear(5),
    ),
    Case("in-place writes and attributes", WritesInside, lambda: normal(5)),
    # outputs
    Case(
        "tuple",
        lambda: Net(lambda m, x: (m.a(x), m.b(x), None, 3), a=nn.Linear(5, 3), b=nn.Linear(5, 2)),
        lambda: normal(5),
        pair_loss,
    ),
    Case(
        "dict",
        lambda: Net(lambda m, x: {"p": m.a(x), "q": m.b(x)}, a=nn.Linear(5, 3), b=nn.Linear(5, 2)),
        lambda: normal(5),
        pair_loss,
    ),
    Case(
        "namedtuple",
        lambda: Net(lambda m, x: Pair(m.a(x), m.b(x)), a=nn.Linear(5, 3), b=nn.Linear(5, 2)),
        lambda: normal(5),
        pair_loss,
    ),
    Case(
        "a hidden value as output",
        lambda: Net(lambda m, x: (m.a(x), m.b(m.a(x))), a=nn.Linear(5, 3), b=nn.Linear(3, 2)),
        lambda: normal(5),
        pair_loss,
    ),
    # copies one at a time
    dataclasses.replace(
        case(
            "row numbers",
            lambda m, x: m.head(m.first(x).tanh()[torch.arange(x.shape[0]), x[:, 0, 0].abs().long() % 3]),
            lambda: normal(3, 5),
            first=linear(5, 5),
            head=linear(5),
        ),
        sequential=True,
    ),
    Case(
        "samples mixed",
        lambda: Net(lambda m, x: m.head(m.first(x).softmax(0)), first=nn.Linear(5, 3), head=nn.Linear(3, 3)),
        lambda: normal(5),
        settings={"credit": "batch", "copies": 4096},
        sequential=True,
    ),
    Case(
        "a matrix over samples",
        lambda: Net(lambda m, x: (lambda z: z @ z.T)(m.first(x)), first=nn.Linear(5, 3)),
        lambda: normal(5),
        lambda o, y: F.cross_entropy(o, torch.arange(N)),
        settings={"credit": "batch", "copies": 4096},
        sequential=True,
    ),
    Case(
        "a site without samples",
        lambda: Net(lambda m, x, t: m.a(x) + m.b(t), a=nn.Linear(6, 3), b=nn.Linear(5, 3)),
        lambda: (normal(6), torch.randn(5, dtype=torch.float64)),
        settings={"credit": "batch", "copies": 2048},
        sequential=True,
    ),
    # batch credit with copies side by side, samples not in the first dimension
    Case(
        "positions first in the output",
        lambda: Net(lambda m, x: m.a(x).transpose(0, 1).flatten(0, 1), a=nn.Linear(5, 3)),
        lambda: normal(3, 5),
        lambda o, y: (o.view(3, -1, 3).mean(0) - 0.3).square().sum(1).mean(),
        settings={"credit": "batch", "copies": 2048},
    ),
]


def compare(case: Case) -> tuple[float, float, onward.Program]:
    """Cosine and length ratio of the estimated gradient to backpropagation's."""
    torch.manual_seed(0)
    model, inputs = case.model().double(), case.inputs()
    settings = {"copies": 1024, "sigma": 1e-3, **case.settings}
    loss: Any = case.loss
    if settings.get("credit") == "batch" and loss is F.cross_entropy:
        loss = lambda output, target: F.cross_entropy(output, target)  # noqa: E731 - without reduction: one number
    program = onward.compile(model, inputs, loss=loss, estimator=onward.LikelihoodRatio(**settings), seed=1)
    program.step(inputs, LABELS)
    estimated = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    loss(model(*inputs) if isinstance(inputs, tuple) else model(inputs), LABELS).mean().backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert estimated.shape == exact.shape
    cosine = float(F.cosine_similarity(estimated, exact, dim=0))
    return cosine, float(estimated.norm() / exact.norm()), program


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_is_backpropagations(case: Case) -> None:
    cosine, ratio, program = compare(case)
    assert cosine > 0.95
    assert 0.8 < ratio < 1.25
    assert program.compiled.sequential == case.sequential


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Any:
        return self.head(a - 2 * b) * scale


def test_keyword_inputs_in_any_order() -> None:
    torch.manual_seed(0)
    model, a, b = Scaled(), torch.randn(N, 5), torch.randn(N, 5)
    gradients = []
    for example in ({"a": a, "b": b, "scale": 2.0}, {"b": b, "scale": 2.0, "a": a}):
        program = onward.compile(model, example, loss=F.cross_entropy, estimator=onward.LikelihoodRatio(copies=8))
        for inputs in (example, dict(reversed(example.items()))):
            program.step_count = 0
            program.step(inputs, LABELS)
            gradients.append(model.head.weight.grad.clone() if model.head.weight.grad is not None else torch.empty(0))
            model.head.weight.grad = model.head.bias.grad = None
    for other in gradients[1:]:
        assert torch.equal(gradients[0], other)
    with pytest.raises(BatchError, match=r"input 1 is 3\.0; the program was compiled for 2\.0"):
        program.step({"a": a, "b": b, "scale": 3.0}, LABELS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    x = torch.randn(N, 5, dtype=dtype)
    program = onward.compile(model, x, loss=F.cross_entropy, estimator=onward.LikelihoodRatio(copies=1024))
    program.step(x, LABELS)
    estimated = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert estimated.dtype == dtype
    model.zero_grad()
    F.cross_entropy(model(x), LABELS).backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert float(F.cosine_similarity(estimated.double(), exact.double(), dim=0)) > 0.95


def test_an_example_of_one_sample() -> None:
    """Any batch size may follow, and the layout of merged dimensions is found all the same."""
    torch.manual_seed(0)
    merged = next(c for c in CASES if c.name == "merged, samples last")
    model, (x,) = merged.model().double(), merged.inputs()
    gradients = []
    for example in (x[:1], x):
        program = onward.compile(model, (example,), loss=F.cross_entropy, estimator=onward.LikelihoodRatio(copies=8))
        model.zero_grad()
        program.step((x,), LABELS)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    mixing = Net(lambda m, x: m.a(x).softmax(0), a=nn.Linear(5, 3))
    with pytest.raises(UnsupportedModelError, match="softmax"):
        onward.compile(mixing, torch.randn(1, 5), loss=F.cross_entropy)


def test_model_is_as_before_and_attributes_are_real() -> None:
    """Tracing leaves no trace: weights, buffers, mode, generator and attributes set in forward are the user's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    program = onward.compile(model, torch.randn(N, 5, generator=torch.Generator().manual_seed(0)), loss=F.cross_entropy)
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in model] == [True, True, False, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    program.step(torch.randn(N, 5), LABELS)
    assert int(model.get_buffer("1.num_batches_tracked")) == 1


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("dropout", lambda: nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.3), nn.Linear(4, 3))),
        ("channels", lambda: nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Dropout1d(0.3), nn.Flatten(), nn.Linear(5, 3))),
        (
            "attention",
            lambda: nn.Sequential(
                nn.Unflatten(1, (5, 1)),
                nn.Linear(1, 4),
                nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True),
                nn.Flatten(),
                nn.Linear(20, 3),
            ),
        ),
        ("noise layer", lambda: Net(lambda m, x: m.a(x + torch.randn_like(x)), a=nn.Linear(5, 3))),
    ],
)
def test_random_operations_are_the_same_for_all_copies(name: str, build: Callable[[], nn.Module]) -> None:
    """With almost no noise the copies' losses hardly differ, as they would with dropout masks of their own."""
    torch.manual_seed(0)
    losses: list[Tensor] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        losses.append(F.cross_entropy(output, target, reduction="none"))
        return losses[-1]

    estimator = onward.LikelihoodRatio(copies=4, sigma=1e-6, groups="joint")
    program = onward.compile(build(), torch.randn(N, 5), loss=loss, estimator=estimator)
    means = [
        float(program.step(torch.randn(N, 5, generator=torch.Generator().manual_seed(0)), LABELS)) for _ in range(2)
    ]
    assert means[0] != means[1]
    for clean, perturbed in zip(losses[::2], losses[1::2], strict=True):
        torch.testing.assert_close(perturbed.reshape(4, N), clean.expand(4, N), rtol=1e-3, atol=1e-3)


def test_attention_with_dropout_equals_its_formula() -> None:
    """With (almost) nothing dropped, it is attention: causal mask, float mask and scale included."""
    torch.manual_seed(0)
    mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)

    def build(p: float) -> nn.Module:
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(4, 2, 8, dropout=p, batch_first=True)
        return Net(lambda m, x: m.head(m.block(x, src_mask=mask).mean(1)), block=block, head=nn.Linear(4, 3)).double()

    x, losses = normal(3, 4), []
    for p in (0.0, 1e-12):
        program = onward.compile(build(p), (x,), loss=F.cross_entropy, estimator=onward.LikelihoodRatio(copies=2))
        losses.append(float(program.step((x,), LABELS)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_a_dataclass_output_says_how_to_register_it() -> None:
    @dataclass
    class Result:
        logits: Tensor

    with pytest.raises(CaptureError, match="register"):
        onward.compile(Net(lambda m, x: Result(m.a(x)), a=nn.Linear(5, 3)), torch.randn(N, 5), loss=F.cross_entropy)


class RefusesExport(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError("not under torch.export")
        return self.head(self.first(x).relu())


def test_what_export_refuses_falls_back_to_symbolic_trace() -> None:
    cosine, _, program = compare(Case("fallback", RefusesExport, lambda: normal(5)))
    assert cosine > 0.95
    assert program.compiled.captured.how == "symbolic_trace"
    assert [site.name for site in program.compiled.sites] == ["first", "head"]
