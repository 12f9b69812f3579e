"""Recurrent layers, a time step after the other: their gates written out, as the compiler does with torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .node import Node, operator, refuse
from .values import Array, integers

Activation = Callable[[Tensor], Tensor]

_ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "Sigmoid": lambda x, a, b: torch.sigmoid(x),
    "Tanh": lambda x, a, b: torch.tanh(x),
    "Relu": lambda x, a, b: F.relu(x),
    "LeakyRelu": lambda x, a, b: F.leaky_relu(x, a),
    "Elu": lambda x, a, b: F.elu(x, a),
    "HardSigmoid": lambda x, a, b: torch.clamp(a * x + b, 0.0, 1.0),
    "ScaledTanh": lambda x, a, b: a * torch.tanh(b * x),
    "Affine": lambda x, a, b: a * x + b,
    "ThresholdedRelu": lambda x, a, b: torch.where(x > a, x, torch.zeros_like(x)),
    "Softsign": lambda x, a, b: F.softsign(x),
    "Softplus": lambda x, a, b: F.softplus(x),
}
_DEFAULTS = {"LeakyRelu": (0.01, 0.0), "Elu": (1.0, 0.0), "HardSigmoid": (0.2, 0.5), "ThresholdedRelu": (1.0, 0.0)}


def _activations(node: Node, directions: int, default: list[str]) -> list[list[Activation]]:
    """Those of each direction."""
    names = node.get("activations") or default * directions
    alphas, betas = list(node.get("activation_alpha", [])), list(node.get("activation_beta", []))
    clip = node.get("clip")
    made: list[Activation] = []
    each = len(default)
    for name in names:
        known = {each.lower(): each for each in _ACTIVATIONS}
        if name.lower() not in known:
            raise refuse(node, f"activation {name!r}")
        name = known[name.lower()]
        a, b = _DEFAULTS.get(name, (1.0, 0.0))
        a = alphas.pop(0) if alphas and name in ("LeakyRelu", "Elu", "HardSigmoid", "ScaledTanh", "Affine") else a
        b = betas.pop(0) if betas and name in ("HardSigmoid", "ScaledTanh", "Affine") else b
        of_cell = len(made) % each == 2  # onnxruntime does not bound the cell that an LSTM's output squashes
        made.append(_clipped(_ACTIVATIONS[name], a, b, None if of_cell else clip))
    return [made[start : start + each] for start in range(0, len(made), each)]


def _clipped(compute: Callable[[Tensor, float, float], Tensor], a: float, b: float, clip: float | None) -> Activation:
    if clip is None:
        return lambda x: compute(x, a, b)
    return lambda x: compute(x.clamp(-clip, clip), a, b)


def _unrolled(
    node: Node, value: Tensor, lengths: Array | None, states: list[Tensor | None],
    directions: int, hidden: int, step: Callable[[int, Tensor, list[Tensor]], list[Tensor]],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Run `step` (direction, input, states) over time: all outputs and the last of each state.

    Outputs are ``(time, directions, batch, hidden)``, states ``(directions, batch, hidden)``; with ``layout=1`` the
    batch comes first in all of them.
    """
    if node.get("layout", 0):
        value = value.transpose(0, 1)
        states = [None if each is None else each.transpose(0, 1) for each in states]
    time, batch = value.shape[0], value.shape[1]
    if lengths is not None and any(each != time for each in integers(lengths)):
        raise refuse(node, "sequences of different lengths")
    outputs, lasts = [], []
    for direction in range(directions):
        backwards = node.get("direction", "forward") == "reverse" or direction == 1
        zeros = value.new_zeros(batch, hidden)
        now = [zeros if each is None else each[direction].expand(batch, hidden) for each in states]
        made = []
        for moment in reversed(range(time)) if backwards else range(time):
            now = step(direction, value[moment], now)
            made.append(now[0])
        outputs.append(torch.stack(made[::-1] if backwards else made))
        lasts.append(now)
    all_outputs = torch.stack(outputs, 1)
    ends = [torch.stack(one) for one in zip(*lasts, strict=True)]
    if node.get("layout", 0):
        return all_outputs.permute(2, 0, 1, 3), *(each.transpose(0, 1) for each in ends)
    return all_outputs, *ends


def _per_direction(bias: Tensor | None, directions: int) -> list[tuple[Tensor | None, Tensor | None]]:
    if bias is None:
        return [(None, None)] * directions
    return [tuple(bias[direction].chunk(2)) for direction in range(directions)]  # type: ignore[misc]


_LIMITS = "all sequences as long as the input"


@operator("LSTM", static=(4,), trains=(1, 2, 3, 7), limits=_LIMITS)
def lstm(
    node: Node, value: Tensor, weight: Tensor, recurrence: Tensor, bias: Tensor | None = None,
    lengths: Array | None = None, hidden: Tensor | None = None, cell: Tensor | None = None,
    peepholes: Tensor | None = None,
) -> Any:  # fmt: skip
    directions, size = recurrence.shape[0], recurrence.shape[2]
    functions = _activations(node, directions, ["Sigmoid", "Tanh", "Tanh"])
    biases = _per_direction(bias, directions)
    weights, recurrences = [weight[d] for d in range(directions)], [recurrence[d] for d in range(directions)]
    peeps = [None if peepholes is None else peepholes[d].chunk(3) for d in range(directions)]

    def step(direction: int, x: Tensor, states: list[Tensor]) -> list[Tensor]:
        sigmoid, tanh, squash = functions[direction]
        h, c = states
        gates = F.linear(x, weights[direction], biases[direction][0])
        gates = gates + F.linear(h, recurrences[direction], biases[direction][1])
        i, o, f, g = gates.chunk(4, -1)
        peep = peeps[direction]
        if peep is not None:
            i, f = i + peep[0] * c, f + peep[2] * c
        i = sigmoid(i)
        f = 1 - i if node.get("input_forget", 0) else sigmoid(f)
        c = f * c + i * tanh(g)
        o = sigmoid(o if peep is None else o + peep[1] * c)
        return [o * squash(c), c]

    return _unrolled(node, value, lengths, [hidden, cell], directions, size, step)


@operator("GRU", static=(4,), trains=(1, 2, 3), limits=_LIMITS)
def gru(
    node: Node, value: Tensor, weight: Tensor, recurrence: Tensor, bias: Tensor | None = None,
    lengths: Array | None = None, hidden: Tensor | None = None,
) -> Any:  # fmt: skip
    directions, size = recurrence.shape[0], recurrence.shape[2]
    functions = _activations(node, directions, ["Sigmoid", "Tanh"])
    biases = _per_direction(bias, directions)
    weights, recurrences = [weight[d] for d in range(directions)], [recurrence[d] for d in range(directions)]

    def step(direction: int, x: Tensor, states: list[Tensor]) -> list[Tensor]:
        sigmoid, tanh = functions[direction]
        (h,), (bias_x, bias_h) = states, biases[direction]
        z_x, r_x, n_x = F.linear(x, weights[direction], bias_x).chunk(3, -1)
        if node.get("linear_before_reset", 0):
            z_h, r_h, n_h = F.linear(h, recurrences[direction], bias_h).chunk(3, -1)
            z, r = sigmoid(z_x + z_h), sigmoid(r_x + r_h)
            n = tanh(n_x + r * n_h)
        else:
            outer, inner = recurrences[direction].split([2 * size, size])
            outer_bias, inner_bias = (None, None) if bias_h is None else bias_h.split([2 * size, size])
            z_h, r_h = F.linear(h, outer, outer_bias).chunk(2, -1)
            z, r = sigmoid(z_x + z_h), sigmoid(r_x + r_h)
            n = tanh(n_x + F.linear(r * h, inner, inner_bias))
        return [n + z * (h - n)]

    return _unrolled(node, value, lengths, [hidden], directions, size, step)


@operator("RNN", static=(4,), trains=(1, 2, 3), limits=_LIMITS)
def rnn(
    node: Node, value: Tensor, weight: Tensor, recurrence: Tensor, bias: Tensor | None = None,
    lengths: Array | None = None, hidden: Tensor | None = None,
) -> Any:  # fmt: skip
    directions, size = recurrence.shape[0], recurrence.shape[2]
    functions = _activations(node, directions, ["Tanh"])
    biases = _per_direction(bias, directions)
    weights, recurrences = [weight[d] for d in range(directions)], [recurrence[d] for d in range(directions)]

    def step(direction: int, x: Tensor, states: list[Tensor]) -> list[Tensor]:
        of_input = F.linear(x, weights[direction], biases[direction][0])
        return [functions[direction][0](of_input + F.linear(states[0], recurrences[direction], biases[direction][1]))]

    return _unrolled(node, value, lengths, [hidden], directions, size, step)
