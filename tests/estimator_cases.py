"""What every operation's gradient has to be, declared once: the estimator's tests are generated from these records.

An `OperationCase` puts one operation between a trained gain and a trained head (`Sandwich`), so that in joint groups
the activation that reaches it differs from copy to copy. Beside the module it holds, written by hand without Onward,

- the forward, with `At` called where a site is: there the reference adds its noise and writes down what was captured,
- for every site the gradient of its parameters from (captured activation, cotangent), in NumPy.

A new operation needs one more record in `CASES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Array = Any
"""A float64 NumPy array."""
Parameters = dict[str, Tensor]
Gradients = dict[str, Array]
SiteGradient = Callable[[Array, Array, dict[str, Array]], Gradients]
"""``(captured activation, cotangent, parameters) -> gradients``."""


class Point(nn.Module):
    """``z`` for every sample, as a parameter row of its own: a step is one independent estimate a row."""

    def __init__(self, samples: int, z: list[float]) -> None:
        super().__init__()
        self.rows = nn.Embedding(samples, len(z), dtype=torch.float64)
        with torch.no_grad():
            self.rows.weight.copy_(torch.tensor(z, dtype=torch.float64).expand(samples, -1))

    def forward(self, index: Tensor) -> Any:
        return self.rows(index)


class At(Protocol):
    """The hand-written forward's hook at a site."""

    def __call__(
        self, site: str, z: Tensor, captured: Tensor | None = None, *, encoded: bool = True, dim: int = 0
    ) -> Tensor:
        """`z` with the noise of `site`; `captured` is what its gradient reads, `encoded` whether as signs if asked for,
        `dim` the batch dimension of both."""
        ...

    def clean(self, name: str, value: Tensor) -> Tensor:
        """`value` in the clean run; in a perturbed one what it was in the clean run."""
        ...


Forward = Callable[[Parameters, Tensor, At], Tensor]


@dataclass(frozen=True)
class OperationCase:
    """One operation, the hand-written truth about it, and how exactly it has to be met."""

    name: str
    build: Callable[[], nn.Module]
    """The operation, as a user writes it."""
    inputs: Callable[[int, torch.Generator], Tensor]
    """A batch of inputs of the operation for a number of samples."""
    forward: Forward
    gradients: dict[str, SiteGradient]
    """Onward's name of every site of the operation, in order, and its gradient by NumPy. Parameter names are the
    model's."""
    training: bool = True
    float32_tolerance: float = 2e-5
    """Allowed error of a gradient in float32, of its largest element; see `test_estimator_algebra.py`."""
    float64_tolerance: float = 1e-10
    statistics_of: str = ""
    """The site whose gradient goes through batch statistics: it reads the clean run, whatever the groups."""
    batch_dims: dict[str, int] = field(default_factory=dict)
    """The batch dimension of a site's result and capture where it is not the first."""


class Sandwich(nn.Module):
    """``head(flatten(tanh(op(tanh(gain * x)))))``; integer inputs have no gain."""

    def __init__(self, op: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.floating = example.is_floating_point()
        if self.floating:
            self.gain = nn.Parameter(torch.linspace(0.5, 1.5, example[0].numel()).reshape(example[0].shape))
        self.op = op
        with torch.no_grad():
            features = op.eval()(example.float() if self.floating else example).flatten(1).shape[1]
        self.head = nn.Linear(features, 3)
        op.train()

    def forward(self, x: Tensor) -> Any:
        if self.floating:
            x = torch.tanh(x * self.gain)
        return self.head(torch.tanh(self.op(x)).flatten(1))


def build_model(case: OperationCase, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The case's model with random parameters, the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Sandwich(case.build(), case.inputs(2, torch.Generator().manual_seed(0)))
        with torch.no_grad():
            for parameter in model.parameters():  # no zeros and ones, which would hide errors
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.train(case.training)
    return model.to(dtype)


def batch(case: OperationCase, samples: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(1)
    x = case.inputs(samples, generator)
    return x.to(dtype) if x.is_floating_point() else x, torch.randn(samples, 3, generator=generator).to(dtype)


def forward(case: OperationCase, parameters: Parameters, x: Tensor, at: At) -> Tensor:
    """The whole model by hand."""
    if "gain" in parameters:
        x = torch.tanh(at("model:mul", x * parameters["gain"], x))
    y = torch.tanh(case.forward(parameters, x, at)).flatten(1)
    return at("head", y @ parameters["head.weight"].T + parameters["head.bias"], y)


def site_gradients(case: OperationCase) -> dict[str, SiteGradient]:
    """Every site of the case's model in order of the forward."""
    floating = case.inputs(1, torch.Generator()).is_floating_point()
    gain: dict[str, SiteGradient] = {"model:mul": lambda x, g, p: {"gain": (x * g).sum(0)}} if floating else {}
    return {**gain, **case.gradients, "head": linear_gradient("head")}


# --- gradients by NumPy -----------------------------------------------------------------------------------------------


def linear_gradient(module: str, weight: str = "weight", bias: str | None = "bias") -> SiteGradient:
    """``z = x Wᵀ + b`` over the last dimension."""

    def gradient(x: Array, g: Array, p: dict[str, Array]) -> Gradients:
        rows = g.reshape(-1, g.shape[-1])
        found = {f"{module}.{weight}": rows.T @ x.reshape(-1, x.shape[-1])}
        return found if bias is None else {**found, f"{module}.{bias}": rows.sum(0)}

    return gradient


def _offsets(kernel: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return product(*(range(extent) for extent in kernel))


def _patch(
    x: Array, offset: Sequence[int], out: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Array:
    """For every output position the element of the padded `x` that the kernel's `offset` meets there."""
    index = [slice(o * d, o * d + (n - 1) * s + 1, s) for o, n, s, d in zip(offset, out, stride, dilation, strict=True)]
    return x[(slice(None), slice(None), *index)]


@dataclass(frozen=True)
class Convolution:
    """A convolution's geometry; gradients by one shifted product a kernel element."""

    dims: int
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = True
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def _full(self) -> dict[str, Any]:
        ones, zeros = (1,) * self.dims, (0,) * self.dims
        full = {
            "stride": self.stride or ones,
            "padding": self.padding or zeros,
            "dilation": self.dilation or ones,
            "groups": self.groups,
        }
        return full | ({"output_padding": self.output_padding or zeros} if self.transposed else {})

    def build(self) -> nn.Module:
        kind = getattr(nn, f"Conv{'Transpose' if self.transposed else ''}{self.dims}d")
        module: nn.Module = kind(
            self.in_channels, self.out_channels, self.kernel, bias=self.bias, **{**self._full(), **self.options}
        )
        return module

    def forward(self, p: Parameters, x: Tensor, at: At, name: str = "op") -> Tensor:
        function = getattr(F, f"conv{'_transpose' if self.transposed else ''}{self.dims}d")
        return at(name, function(x, p[f"{name}.weight"], p.get(f"{name}.bias"), **self._full()), x)

    def gradient(self, x: Array, g: Array, p: dict[str, Array], name: str = "op") -> Gradients:
        return self._weight(x, g, f"{name}.weight") | ({f"{name}.bias": self._sum(g)} if self.bias else {})

    def _sum(self, g: Array) -> Array:
        return g.sum((0, *range(2, 2 + self.dims)))

    def _weight(self, x: Array, g: Array, name: str) -> Gradients:
        full = self._full()
        stride, dilation, padding = full["stride"], full["dilation"], full["padding"]
        # a transposed convolution is the transpose: input and cotangent exchange their parts
        image, signal = (g, x) if self.transposed else (x, g)
        reach = [
            (n - 1) * s + d * (k - 1) + 1
            for n, s, d, k in zip(signal.shape[2:], stride, dilation, self.kernel, strict=True)
        ]
        widths = [
            (pad, max(pad, r - pad - n)) for pad, r, n in zip(padding, reach, image.shape[2:], strict=True)
        ]  # output_padding adds positions that meet nothing
        image = np.pad(image, [(0, 0), (0, 0), *widths])
        n_out, n_in = signal.shape[1] // self.groups, image.shape[1] // self.groups
        weight = np.zeros((signal.shape[1], n_in, *self.kernel))
        axes = (0, *range(2, 2 + self.dims))
        for offset in _offsets(self.kernel):
            patch = _patch(image, offset, signal.shape[2:], stride, dilation)
            for group in range(self.groups):
                rows = slice(group * n_out, (group + 1) * n_out)
                columns = slice(group * n_in, (group + 1) * n_in)
                place: Any = (rows, slice(None), *offset)
                weight[place] = np.tensordot(signal[:, rows], patch[:, columns], (axes, axes))
        return {name: weight}


def _convolution_case(name: str, size: tuple[int, ...], convolution: Convolution) -> OperationCase:
    return OperationCase(
        name,
        convolution.build,
        floats(convolution.in_channels, *size),
        convolution.forward,
        {"op": convolution.gradient},
    )


def floats(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    """Normal inputs of a shape a sample."""
    return lambda samples, generator: torch.randn(samples, *shape, generator=generator)


def _affine_gradient(channels_last: bool, bias: bool = True, name: str = "op") -> SiteGradient:
    """``z = x̂ γ + β`` from the normalised activation."""

    def gradient(x: Array, g: Array, p: dict[str, Array]) -> Gradients:
        axes = tuple(range(g.ndim - 1)) if channels_last else (0, *range(2, g.ndim))
        found = {f"{name}.weight": (x * g).sum(axes)}
        return found | {f"{name}.bias": g.sum(axes)} if bias else found

    return gradient


def _channels(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(1, -1, *(1,) * (like.dim() - 2))


def _normalized(x: Tensor, mean: Tensor, variance: Tensor, eps: float = 1e-5) -> Tensor:
    return (x - mean) / (variance + eps).sqrt()


# --- operations that are no torch layer -------------------------------------------------------------------------------


class BiasAdd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Any:
        return x + self.bias


class Positional(nn.Module):
    """A learned position for every token, subtracted so that the site is no addition."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 3, 2))

    def forward(self, x: Tensor) -> Any:
        return x.flatten(2) - self.position


class Tied(nn.Module):
    """One linear layer used twice: a parameter at two sites."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        return self.linear(torch.tanh(self.linear(x)))


class TiedTranspose(nn.Module):
    """A weight and its transpose, as in an autoencoder or a language model's output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Any:
        return F.linear(torch.tanh(self.encode(x)), self.encode.weight.T)


class TwoNames(nn.Module):
    """Two layers that hold the same parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Any:
        return self.second(torch.tanh(self.first(x)))


class WeightNorm(nn.Module):
    """``W = g v / |v|`` row by row: an expression of parameters in front of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.direction = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Any:
        weight = self.gain[:, None] * self.direction / self.direction.norm(dim=1, keepdim=True)
        return F.linear(x, weight)


class Recurrent(nn.Module):
    """The outputs of a recurrent layer, batch first; export unrolls it to its cells."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layer = kind(2, 3, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)[0]


class Cells(nn.Module):
    """A recurrent cell in the user's own loop."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell = kind(2, 3)

    def forward(self, x: Tensor) -> Any:
        state: Any = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return state[0] if isinstance(state, tuple) else state


class SquareBilinear(nn.Module):
    """Two activations multiplied: their captures must not be encoded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(3, 3, 2)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, x.square())


# --- forwards and gradients by hand -----------------------------------------------------------------------------------


def _linear(p: Parameters, x: Tensor, at: At) -> Tensor:
    z = x @ p["op.weight"].T
    return at("op", z + p["op.bias"] if "op.bias" in p else z, x)


def _embedding_gradient(x: Array, g: Array, p: dict[str, Array]) -> Gradients:
    weight = np.zeros((7, g.shape[-1]))
    np.add.at(weight, x.astype(int), g)
    weight[2] = 0  # padding_idx
    return {"op.weight": weight}


def _layer_norm(p: Parameters, x: Tensor, at: At) -> Tensor:
    dims = tuple(range(x.dim() - p["op.weight"].dim(), x.dim()))
    normalized = _normalized(x, x.mean(dims, keepdim=True), x.var(dims, unbiased=False, keepdim=True))
    z = normalized * p["op.weight"]
    return at("op", z + p["op.bias"] if "op.bias" in p else z, normalized)


def _group_norm(p: Parameters, x: Tensor, at: At) -> Tensor:
    grouped = x.reshape(x.shape[0], 2, -1)
    mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, unbiased=False, keepdim=True)
    normalized = _normalized(grouped, mean, variance).reshape(x.shape)
    return at("op", normalized * _channels(p["op.weight"], x) + _channels(p["op.bias"], x), normalized)


def _batch_norm(p: Parameters, x: Tensor, at: At) -> Tensor:
    """Copies are normalised by the clean run's statistics, and x̂ is so normalised too."""
    dims = (0, *range(2, x.dim()))
    mean = at.clean("mean", x.mean(dims, keepdim=True))
    variance = at.clean("variance", x.var(dims, unbiased=False, keepdim=True))
    normalized = _normalized(x, mean, variance)
    return at("op", normalized * _channels(p["op.weight"], x) + _channels(p["op.bias"], x), normalized)


def _batch_norm_evaluated(p: Parameters, x: Tensor, at: At) -> Tensor:
    normalized = _normalized(x, x.new_zeros(()), x.new_ones(()))
    z = normalized * _channels(p["op.weight"], x) + _channels(p["op.bias"], x)
    return at("op", z, normalized, encoded=False)


_JOINED = Convolution(2, 2, 3, (2, 2), padding=(1, 0))


def _joined(p: Parameters, x: Tensor, at: At) -> Tensor:
    z = F.conv2d(x, p["op.0.weight"], p["op.0.bias"], padding=(1, 0))
    mean, variance = at.clean("mean", z.mean((0, 2, 3))), at.clean("variance", z.var((0, 2, 3), unbiased=False))
    normalized = _normalized(z, _channels(mean, z), _channels(variance, z))
    z = normalized * _channels(p["op.1.weight"], z) + _channels(p["op.1.bias"], z)
    return at("op.0", z, x, encoded=False)


def _joined_gradient(x: Array, g: Array, p: dict[str, Array]) -> Gradients:
    """Through the normalisation, statistics included, to the convolution: Ioffe & Szegedy 2015, section 3."""
    weight, bias = torch.from_numpy(p["op.0.weight"]), torch.from_numpy(p["op.0.bias"])
    z = F.conv2d(torch.from_numpy(x), weight, bias, padding=(1, 0)).numpy()
    axes = (0, 2, 3)
    deviation = np.sqrt(z.var(axes, keepdims=True) + 1e-5)
    normalized = (z - z.mean(axes, keepdims=True)) / deviation
    own = g * p["op.1.weight"].reshape(1, -1, 1, 1)
    centred = own - own.mean(axes, keepdims=True) - normalized * (own * normalized).mean(axes, keepdims=True)
    affine = {"op.1.weight": (g * normalized).sum(axes), "op.1.bias": g.sum(axes)}
    return _JOINED.gradient(x, centred / deviation, p, "op.0") | affine


def _tied(p: Parameters, x: Tensor, at: At) -> Tensor:
    weight, bias = p["op.linear.weight"], p["op.linear.bias"]
    y = torch.tanh(at("op.linear", x @ weight.T + bias, x))
    return at("op.linear@2", y @ weight.T + bias, y)


def _tied_transpose(p: Parameters, x: Tensor, at: At) -> Tensor:
    y = torch.tanh(at("op.encode", x @ p["op.encode.weight"].T, x))
    return at("op:linear", y @ p["op.encode.weight"], y)


def _two_names(p: Parameters, x: Tensor, at: At) -> Tensor:
    y = torch.tanh(at("op.first", x @ p["op.first.weight"].T, x))
    return at("op.second", y @ p["op.first.weight"].T + p["op.second.bias"], y)


def _weight_norm(p: Parameters, x: Tensor, at: At) -> Tensor:
    direction = p["op.direction"]
    weight = p["op.gain"][:, None] * direction / direction.norm(dim=1, keepdim=True)
    return at("op:linear", x @ weight.T, x)


def _weight_norm_gradient(x: Array, g: Array, p: dict[str, Array]) -> Gradients:
    """Salimans & Kingma 2016, equation 3."""
    total = g.T @ x
    length = np.linalg.norm(p["op.direction"], axis=1, keepdims=True)
    unit = p["op.direction"] / length
    along = (total * unit).sum(1)
    return {
        "op.gain": along,
        "op.direction": p["op.gain"][:, None] / length * (total - along[:, None] * unit),
    }


@dataclass
class Recurrence:
    """A recurrent layer (its inputs projected at once, time first) or its cells called one by one, from a zero state.

    At the first step the recurrent product is of parameters alone, so that it is no site of its own.
    """

    kind: str
    module: str
    layer: bool

    @property
    def suffix(self) -> str:
        return "_l0" if self.layer else ""

    @property
    def gates(self) -> int:
        return {"rnn": 1, "lstm": 4, "gru": 3}[self.kind]

    def forward(self, p: Parameters, x: Tensor, at: At) -> Tensor:
        names = iter(self.gradients())
        w_ih, w_hh, b_ih, b_hh = (
            p[f"{self.module}.{part}{self.suffix}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        dim = 1 if self.layer else 0
        if self.layer:
            sequence = x.transpose(0, 1)
            projected = at(next(names), sequence @ w_ih.T + b_ih, sequence, dim=1).split(1)
        state = cell = x.new_zeros((1,) * dim + (x.shape[0], 3))
        states = []
        for step in range(2):
            z = projected[step] if self.layer else at(next(names), x[:, step] @ w_ih.T + b_ih, x[:, step])
            if step == 0:
                z, z_h = self._first(z, b_hh, at, names, dim)
            else:
                z_h = at(next(names), state @ w_hh.T + b_hh, state, dim=dim)
            state, cell = self._step(z, z_h, state, cell)
            states.append(state)
        return torch.cat(states).transpose(0, 1) if self.layer else state

    def _first(self, z: Tensor, bias: Tensor, at: At, names: Iterator[str], dim: int) -> tuple[Tensor, Tensor]:
        """The two summands of the first step's gates, the noise of what reads the recurrent parameters in the first."""
        nothing = torch.zeros_like(z)
        if self.kind != "gru":
            return at(next(names), z + bias, nothing, encoded=False, dim=dim), nothing
        parts = [one + b for one, b in zip(z.chunk(3, -1), bias.chunk(3), strict=True)]
        for gate in (0, 1) if self.layer else (1, 0):
            parts[gate] = at(next(names), parts[gate], torch.zeros_like(parts[gate]), encoded=False, dim=dim)
        reset = parts[0].sigmoid()
        hidden = at(next(names), reset * bias.chunk(3)[2], reset, dim=dim)
        parts[2] = z.chunk(3, -1)[2]
        empty = torch.zeros_like(hidden)
        return torch.cat(parts, -1), torch.cat([empty, empty, hidden / reset], -1)

    def _step(self, z: Tensor, z_h: Tensor, state: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "rnn":
            return torch.tanh(z + z_h), cell
        if self.kind == "lstm":
            i, f, g, o = (z + z_h).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            return o.sigmoid() * cell.tanh(), cell
        (r, u, n), (r_h, u_h, n_h) = z.chunk(3, -1), z_h.chunk(3, -1)
        update = (u + u_h).sigmoid()
        return (1 - update) * (n + (r + r_h).sigmoid() * n_h).tanh() + update * state, cell

    def gradients(self) -> dict[str, SiteGradient]:
        project = linear_gradient(self.module, f"weight_ih{self.suffix}", f"bias_ih{self.suffix}")
        recur = linear_gradient(self.module, f"weight_hh{self.suffix}", f"bias_hh{self.suffix}")
        order = (None,) if self.kind != "gru" else (0, 1, 2) if self.layer else (1, 0, 2)
        formulas = [project, *(self._hidden_bias(position) for position in order)]
        formulas += [recur] if self.layer else [project, recur]
        return {self.module if n == 1 else f"{self.module}@{n}": one for n, one in enumerate(formulas, 1)}

    def _hidden_bias(self, gate: int | None) -> SiteGradient:
        """The first step: the zero state leaves the weight no gradient; of the bias one gate's part has one, or all."""

        def gradient(x: Array, g: Array, p: dict[str, Array]) -> Gradients:
            bias = np.zeros(3 * self.gates)
            used = slice(None) if gate is None else slice(3 * gate, 3 * gate + 3)
            bias[used] = (g * x if gate == 2 else g).reshape(-1, g.shape[-1]).sum(0)
            return {
                f"{self.module}.bias_hh{self.suffix}": bias,
                f"{self.module}.weight_hh{self.suffix}": np.zeros((3 * self.gates, 3)),
            }

        return gradient


def _recurrent_case(kind: str, layer: bool) -> OperationCase:
    modules = {"rnn": (nn.RNN, nn.RNNCell), "lstm": (nn.LSTM, nn.LSTMCell), "gru": (nn.GRU, nn.GRUCell)}
    recurrence = Recurrence(kind, "op.layer" if layer else "op.cell", layer)
    wrapped: Any = Recurrent if layer else Cells
    return OperationCase(
        kind if layer else f"{kind}_cell",
        lambda: wrapped(modules[kind][0 if layer else 1]),
        floats(2, 2),
        recurrence.forward,
        recurrence.gradients(),
        batch_dims=dict.fromkeys(recurrence.gradients(), 1) if layer else {},
    )


def _bilinear(p: Parameters, x: Tensor, at: At) -> Tensor:
    squared = x.square()
    product = torch.einsum("ni,oij,nj->no", x, p["op.layer.weight"], squared)
    product = at("op.layer", product, torch.cat([x, squared], 1), encoded=False)
    return at("op.layer@2", product + p["op.layer.bias"], torch.zeros_like(product), encoded=False)


CASES = [
    OperationCase("linear", lambda: nn.Linear(4, 3), floats(4), _linear, {"op": linear_gradient("op")}),
    OperationCase(
        "linear_without_bias",
        lambda: nn.Linear(4, 3, bias=False),
        floats(4),
        _linear,
        {"op": linear_gradient("op", bias=None)},
    ),
    OperationCase("linear_on_tokens", lambda: nn.Linear(3, 2), floats(4, 3), _linear, {"op": linear_gradient("op")}),
    _convolution_case("conv1d", (7,), Convolution(1, 2, 4, (3,), stride=(2,), padding=(2,), dilation=(2,), groups=2)),
    _convolution_case("conv1d_same", (5,), Convolution(1, 2, 3, (3,), padding=(1,), options={"padding": "same"})),
    _convolution_case("conv2d", (4, 5), Convolution(2, 2, 3, (3, 2), bias=False)),
    _convolution_case("conv2d_stride", (5, 6), Convolution(2, 2, 3, (3, 2), stride=(2, 3), padding=(1, 0))),
    _convolution_case("conv2d_groups", (4, 4), Convolution(2, 4, 6, (2, 3), padding=(0, 2), groups=2)),
    _convolution_case("conv2d_depthwise", (4, 4), Convolution(2, 3, 3, (3, 3), padding=(1, 1), groups=3)),
    _convolution_case("conv2d_dilation", (6, 5), Convolution(2, 2, 2, (2, 3), padding=(1, 1), dilation=(3, 2))),
    _convolution_case("conv3d", (3, 3, 2), Convolution(3, 2, 2, (2, 2, 1), padding=(0, 1, 0))),
    _convolution_case(
        "conv_transpose1d",
        (4,),
        Convolution(1, 2, 3, (3,), stride=(2,), padding=(1,), output_padding=(1,), transposed=True),
    ),
    _convolution_case(
        "conv_transpose2d",
        (3, 2),
        Convolution(
            2,
            4,
            4,
            (2, 3),
            stride=(2, 1),
            padding=(1, 0),
            dilation=(1, 2),
            groups=2,
            output_padding=(1, 0),
            transposed=True,
        ),
    ),
    OperationCase(
        "embedding",
        lambda: nn.Embedding(7, 3, padding_idx=2),
        lambda samples, generator: torch.randint(0, 7, (samples, 4), generator=generator),
        lambda p, x, at: at("op", p["op.weight"][x], x, encoded=False),
        {"op": _embedding_gradient},
    ),
    OperationCase(
        "layer_norm",
        lambda: nn.LayerNorm((3, 4)),
        floats(2, 3, 4),
        _layer_norm,
        {"op": lambda x, g, p: {"op.weight": (x * g).sum((0, 1)), "op.bias": g.sum((0, 1))}},
    ),
    OperationCase(
        "layer_norm_without_bias",
        lambda: nn.LayerNorm(4, bias=False),
        floats(4),
        _layer_norm,
        {"op": _affine_gradient(True, bias=False)},
    ),
    OperationCase("group_norm", lambda: nn.GroupNorm(2, 4), floats(4, 3), _group_norm, {"op": _affine_gradient(False)}),
    OperationCase(
        "batch_norm", lambda: nn.BatchNorm2d(2), floats(2, 2, 3), _batch_norm, {"op": _affine_gradient(False)}
    ),
    OperationCase(
        "batch_norm_without_running_statistics",
        lambda: nn.BatchNorm1d(3, track_running_stats=False),
        floats(3),
        _batch_norm,
        {"op": _affine_gradient(False)},
    ),
    OperationCase(
        "batch_norm_evaluated",
        lambda: nn.BatchNorm1d(3),
        floats(3),
        _batch_norm_evaluated,
        {"op": _affine_gradient(False)},
        training=False,
    ),
    OperationCase(
        "convolution_and_batch_norm",
        lambda: nn.Sequential(_JOINED.build(), nn.BatchNorm2d(3)),
        floats(2, 3, 4),
        _joined,
        {"op.0": _joined_gradient},
        statistics_of="op.0",
    ),
    OperationCase(
        "bias_add",
        BiasAdd,
        floats(3, 4),
        lambda p, x, at: at("op:add", x + p["op.bias"], torch.zeros_like(x), encoded=False),
        {"op:add": lambda x, g, p: {"op.bias": g.sum((0, 1))}},
    ),
    OperationCase(
        "positional",
        Positional,
        floats(3, 2),
        lambda p, x, at: at("op:sub", x - p["op.position"], torch.zeros_like(x), encoded=False),
        {"op:sub": lambda x, g, p: {"op.position": -g.sum(0, keepdims=True)}},
    ),
    OperationCase(
        "tied",
        Tied,
        floats(3),
        _tied,
        {"op.linear": linear_gradient("op.linear"), "op.linear@2": linear_gradient("op.linear")},
    ),
    OperationCase(
        "tied_transpose",
        TiedTranspose,
        floats(4),
        _tied_transpose,
        {
            "op.encode": linear_gradient("op.encode", bias=None),
            "op:linear": lambda x, g, p: {"op.encode.weight": x.T @ g},
        },
    ),
    OperationCase(
        "two_names",
        TwoNames,
        floats(3),
        _two_names,
        {
            "op.first": linear_gradient("op.first", bias=None),
            "op.second": lambda x, g, p: {"op.first.weight": g.T @ x, "op.second.bias": g.sum(0)},
        },
    ),
    OperationCase("weight_norm", WeightNorm, floats(3), _weight_norm, {"op:linear": _weight_norm_gradient}),
    OperationCase(
        "bilinear",
        SquareBilinear,
        floats(3),
        _bilinear,
        {
            "op.layer": lambda x, g, p: {"op.layer.weight": np.einsum("no,ni,nj->oij", g, x[:, :3], x[:, 3:])},
            "op.layer@2": lambda x, g, p: {"op.layer.bias": g.sum(0)},
        },
    ),
    *(_recurrent_case(kind, layer) for layer in (True, False) for kind in ("rnn", "lstm", "gru")),
]
"""Every operation, as the issue lists them."""

SCORE_CONSTANTS = {
    ("gaussian", "sign"): math.sqrt(math.pi / 2),
    ("laplace", "exact"): math.sqrt(2),
    ("laplace", "sign"): math.sqrt(2),
}


def score(noise: str, name: str, values: Array) -> Array:
    """DESIGN (2): the score of unit-variance noise, or its sign with ``E[score · noise] = 1``."""
    constant = SCORE_CONSTANTS.get((noise, name))
    return values if constant is None else constant * np.sign(values)
