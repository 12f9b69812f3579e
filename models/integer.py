"""Networks of 8-bit integers: what is multiplied are int8 numbers, and their sums are int32, exact to the last bit.

A layer reads activations ``s_x q_x`` and a weight ``s_w q_w``, q the integers in [-127, 127] and s a scale, and
returns ``s_x s_w (q_x q_w + q_b)`` with the bias as an integer, too: the arithmetic that int8 hardware does (Jacob et
al. 2018, arXiv 1712.05877). `integer_linear` and `integer_convolution` do the products. They are operators of their own
because torch has no derivative through integers. As a function of its operands a product of integers *is* that of real
numbers where both are whole, and that derivative they have: it is exact.

Two roundings have none. The weight's is declared to have the derivative 1, like the sign in `models.binarised`, for
forward-only training and backpropagation alike: the float weight is the parameter, and it is quantised in forward. For
``round(w + u)``, u uniform in [-1/2, 1/2], 1 is the derivative of the mean; beside the loss smoothed by such noise it
is **biased** where the loss is not linear in the weights within a step. The activations' rounding declares nothing
unless ``straight_through=True`` asks for the twin.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ..passes.errors import OptionError
from .layers import RELU_GAIN, pass_through

LARGEST = 127
"""The largest int8 that has a negative."""


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """``rows @ columns.T`` of int8 (m, k) and (n, k) as int32 (m, n), exact while ``k * 127²`` fits int32."""
    if rows.is_cuda:  # there the sizes are multiples of 8, and the rows more than 16
        m, n, k = rows.shape[0], columns.shape[0], rows.shape[1]
        rows = F.pad(rows, (0, -k % 8, 0, max(24 - m, -m % 8)))
        columns = F.pad(columns, (0, -k % 8, 0, -n % 8))
        return torch._int_mm(rows, columns.t())[:m, :n]
    return torch._int_mm(rows.contiguous(), columns.contiguous().t())


@torch.library.custom_op("onward_models::integer_linear", mutates_args=())
def integer_linear(inputs: Tensor, weight: Tensor, bias: Tensor, step: Tensor) -> Tensor:
    """``(inputs @ weight.T + bias) * step`` of whole numbers that floats hold, computed in int8 and int32.

    Args:
        inputs: ``(batch, in_features)`` in [-127, 127].
        weight: ``(out_features, in_features)`` in [-127, 127].
        bias: ``(out_features,)`` in the range of int32.
        step: ``()``, what a sum of 1 stands for. It has no gradient.

    Returns:
        ``(batch, out_features)``, of the inputs' dtype: float32 holds sums below 2²⁴ exactly, and rounds larger.
    """
    sums = _product(inputs.to(torch.int8), weight.to(torch.int8))
    return (sums + bias.to(torch.int32)).to(inputs.dtype) * step


@integer_linear.register_fake
def _(inputs: Tensor, weight: Tensor, bias: Tensor, step: Tensor) -> Tensor:
    return inputs.new_empty(inputs.shape[0], weight.shape[0])


@torch.library.custom_op("onward_models::integer_convolution", mutates_args=())
def integer_convolution(
    inputs: Tensor, weight: Tensor, bias: Tensor, step: Tensor, stride: int, padding: int
) -> Tensor:
    """The convolution of whole numbers that floats hold, computed in int8 and int32, times `step`.

    Args:
        inputs: ``(batch, in_channels, height, width)`` in [-127, 127].
        weight: ``(out_channels, in_channels, side, side)`` in [-127, 127].
        bias: ``(out_channels,)`` in the range of int32.
        step: ``()``, what a sum of 1 stands for. It has no gradient.
        stride: Of both axes.
        padding: Zeros on every side.

    Returns:
        ``(batch, out_channels, ...)``, of the inputs' dtype: float32 holds sums below 2²⁴ exactly, and rounds larger.
    """
    channels, _, side, _ = weight.shape
    padded = F.pad(inputs.to(torch.int8), [padding] * 4)
    windows = padded.unfold(2, side, stride).unfold(3, side, stride)  # (batch, in_channels, h, w, side, side)
    batch, _, height, width = windows.shape[:4]
    rows = windows.permute(0, 2, 3, 1, 4, 5).reshape(batch * height * width, -1)
    sums = _product(rows, weight.to(torch.int8).flatten(1)) + bias.to(torch.int32)
    return sums.reshape(batch, height, width, channels).permute(0, 3, 1, 2).to(inputs.dtype).contiguous() * step


@integer_convolution.register_fake
def _(inputs: Tensor, weight: Tensor, bias: Tensor, step: Tensor, stride: int, padding: int) -> Tensor:
    height, width = ((extent + 2 * padding - weight.shape[2]) // stride + 1 for extent in inputs.shape[2:])
    return inputs.new_empty(inputs.shape[0], weight.shape[0], height, width)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], inputs[3])
    ctx.arguments = inputs[4:]


def _linear_gradients(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    inputs, weight, step = ctx.saved_tensors
    by_sums = cotangent * step
    return by_sums @ weight, by_sums.t() @ inputs, by_sums.sum(0), None


def _convolution_gradients(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    inputs, weight, step = ctx.saved_tensors
    stride, padding = ([each] * 2 for each in ctx.arguments)
    by_inputs, by_weight, by_bias = torch.ops.aten.convolution_backward.default(
        cotangent * step, inputs, weight, [len(weight)], stride, padding, [1, 1], False, [0, 0], 1, [True] * 3
    )
    return by_inputs, by_weight, by_bias, None, None, None


integer_linear.register_autograd(_linear_gradients, setup_context=_keep)
integer_convolution.register_autograd(_convolution_gradients, setup_context=_keep)


@register_flop_formula(torch.ops.onward_models.integer_linear)
def _linear_flops(inputs: Any, weight: Any, *rest: Any, out_shape: Any, **named: Any) -> int:
    return int(2 * math.prod(out_shape) * weight[1])


@register_flop_formula(torch.ops.onward_models.integer_convolution)
def _convolution_flops(inputs: Any, weight: Any, *rest: Any, out_shape: Any, **named: Any) -> int:
    return int(2 * math.prod(out_shape) * math.prod(weight[1:]))


class Whole(nn.Module):
    """Floats as the int8 numbers that stand for them: ``round(x / step)``, step ``range / 127``; halves go to even.

    What is beyond the range is clamped. The derivative is zero wherever it exists.

    Args:
        range: The largest number that has one, positive.
        straight_through: Whether the derivative is that of ``x / step`` instead wherever the input is within the range,
            so that backpropagation can train the same network.
    """

    def __init__(self, range: float, *, straight_through: bool = False) -> None:
        super().__init__()
        if not 0 < range < math.inf:
            raise OptionError(f"range={range}: the largest activation that an int8 stands for is positive and finite.")
        self.step, self.straight_through = range / LARGEST, straight_through

    def forward(self, inputs: Tensor) -> Tensor:
        """From float of any shape to whole numbers in [-127, 127] of the same shape and dtype."""
        scaled = (inputs / self.step).clamp(-LARGEST, LARGEST)
        whole = torch.round(scaled)
        return pass_through(whole, scaled) if self.straight_through else whole


def quantise(weight: Tensor, bias: Tensor, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """A weight and a bias as whole numbers, with the derivative of what is rounded, and the step of their sums.

    The weight's step takes its largest entry to 127; that of the bias and the sums is the product of the weight's and
    the activations', `step`. Steps pass no gradient on.
    """
    weight_step = weight.detach().abs().amax().clamp_min(torch.finfo(weight.dtype).tiny * LARGEST) / LARGEST
    sum_step = weight_step * step
    scaled, offset = weight / weight_step, bias / sum_step
    return pass_through(torch.round(scaled), scaled), pass_through(torch.round(offset), offset), sum_step


class IntegerLinear(nn.Linear):
    """A linear layer in integers, between activations of `Whole` and floats.

    Args:
        in_features: Whole numbers in one sample.
        out_features: Floats that come out.
        step: The step of the activations.
        gain: The weights are normal with standard deviation ``gain / sqrt(in_features)``; biases are zero.
    """

    def __init__(self, in_features: int, out_features: int, *, step: float, gain: float) -> None:
        super().__init__(in_features, out_features)
        self.step = step
        nn.init.normal_(self.weight, std=gain / math.sqrt(in_features))
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias, step = quantise(self.weight, self.bias, self.step)
        outputs: Tensor = integer_linear(input, weight, bias, step)
        return outputs


class IntegerConv2d(nn.Conv2d):
    """A padded 3×3 convolution in integers, between activations of `Whole` and floats."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, step: float, gain: float) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding=1)
        self.step = step
        nn.init.normal_(self.weight, std=gain / math.sqrt(9 * in_channels))
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        assert self.bias is not None
        weight, bias, step = quantise(self.weight, self.bias, self.step)
        outputs: Tensor = integer_convolution(input, weight, bias, step, self.stride[0], 1)
        return outputs


def integer_mlp(
    in_features: int = 64,
    hidden: Sequence[int] = (128, 64),
    num_classes: int = 10,
    range: float = 4.0,
    straight_through: bool = False,
) -> nn.Sequential:
    """`mlp` in 8-bit integers: every product of its layers, and the ReLUs' results between them.

    Args:
        in_features: Numbers in one sample.
        hidden: Width of each hidden layer.
        num_classes: Outputs.
        range: The largest activation that an int8 stands for, in standard deviations of the initial pre-activation and
            of standardised inputs.
        straight_through: Build the twin that backpropagation can train: same initial weights and forward, bit for bit,
            and the derivative of a clamp where activations are rounded. It is there for comparison only.

    Returns:
        A module from float ``(batch, ...)``, flattened to ``(batch, in_features)``, to logits ``(batch, num_classes)``.

    Raises:
        OptionError: `range` is not positive.
    """
    modules: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    width, gain = in_features, 1.0
    for number, out_features in enumerate(hidden, start=1):
        modules[f"whole{number}"] = whole = Whole(range, straight_through=straight_through)
        modules[f"fc{number}"] = IntegerLinear(width, out_features, step=whole.step, gain=gain)
        modules[f"relu{number}"] = nn.ReLU()
        width, gain = out_features, RELU_GAIN
    modules["whole"] = whole = Whole(range, straight_through=straight_through)
    modules["head"] = IntegerLinear(width, num_classes, step=whole.step, gain=1.0)
    return nn.Sequential(OrderedDict(modules))


def integer_cnn(
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: int = 8,
    width: int = 16,
    range: float = 4.0,
    straight_through: bool = False,
) -> nn.Sequential:
    """Two convolutions and a linear layer in 8-bit integers, and the ReLUs' results between them.

    The convolutions have `width` and 2 times `width` channels, the second a stride of 2. The linear layer reads every
    position.

    Args:
        num_classes: Outputs.
        in_channels: Channels of the images.
        image_size: Height and width of the images.
        width: Channels of the first convolution.
        range: As for `integer_mlp`.
        straight_through: Build the twin that backpropagation can train, as for `integer_mlp`.

    Returns:
        A module from float ``(batch, in_channels, image_size, image_size)`` to logits ``(batch, num_classes)``.

    Raises:
        OptionError: `range` is not positive.
    """
    modules: dict[str, nn.Module] = {}
    channels, gain = in_channels, 1.0
    for number, (out_channels, stride) in enumerate(((width, 1), (2 * width, 2)), start=1):
        modules[f"whole{number}"] = whole = Whole(range, straight_through=straight_through)
        modules[f"conv{number}"] = IntegerConv2d(channels, out_channels, stride=stride, step=whole.step, gain=gain)
        modules[f"relu{number}"] = nn.ReLU()
        channels, gain = out_channels, RELU_GAIN
    modules["flatten"] = nn.Flatten()
    modules["whole"] = whole = Whole(range, straight_through=straight_through)
    features = channels * ((image_size + 1) // 2) ** 2
    modules["head"] = IntegerLinear(features, num_classes, step=whole.step, gain=1.0)
    return nn.Sequential(OrderedDict(modules))
