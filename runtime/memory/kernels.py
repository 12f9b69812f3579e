"""What operations allocate for themselves while they run, on a CPU: tensors, and the arrays of NumPy (`noise.source`).

One rule for each operation with any. Convolutions in float32 are oneDNN's, which works on copies of its operands in
blocks of channels; it was measured, on processors with AVX-512 (others have smaller blocks). Of a GPU's libraries
nothing is known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from ...passes import ops
from ...passes.graph import Layout
from ...passes.tie_blocks import grid
from ..noise import cpu_kernels
from ..noise.operators import TIED_ELEMENTS
from ..noise.source import NUMPY_DTYPES, copy_runs

NOISE_ARRAYS = 3 << 19
"""NumPy's buffers of an operator that makes random numbers: words, numbers, and their product with a mask. Measured: 1
to 1.9 MiB."""
NOISE_BYTES = 16
"""The same for a number, where they are few."""

CHANNEL_BLOCK = 16
"""Channels of a oneDNN block."""
FEW_CHANNELS = 3
"""A convolution reads so many as they lie."""


class Temporary(NamedTuple):
    """Bytes that are freed before the operation returns."""

    tensors: int = 0
    arrays: int = 0


def temporary(func: Any, args: Sequence[Any], result: Any) -> Temporary:
    """Of one call, with the arguments that it got (by position) and what it returned."""
    rule = _RULES.get(func)
    tensor = next((arg for arg in args if isinstance(arg, Tensor)), None)
    if rule is None or tensor is None or tensor.device.type != "cpu":
        return Temporary()
    return rule(args, result)


def _convolution(args: Sequence[Any], result: Tensor) -> Temporary:
    x, weight = args[:2]
    if x.dtype != torch.float32:
        return Temporary()
    blocked = _blocked(result)
    return Temporary(max(_operand(x) + weight.nbytes + blocked - result.nbytes, blocked))


def _convolution_backward(args: Sequence[Any], results: Sequence[Tensor | None]) -> Temporary:
    gradient, x, weight = args[:3]
    if x.dtype != torch.float32:
        return Temporary()
    for_input = max(_blocked(gradient) + weight.nbytes, x.nbytes) if args[-1][0] else 0
    for_weight = _blocked(gradient) + _operand(x) if args[-1][1] else 0
    return Temporary(max(for_input, for_weight))


def _operand(x: Tensor) -> int:
    return _blocked(x) if x.shape[1] > FEW_CHANNELS else 0


def _blocked(x: Tensor) -> int:
    """Bytes of a tensor with its channels in whole blocks."""
    channels = x.shape[1]
    return x.nbytes // channels * (-(-channels // CHANNEL_BLOCK) * CHANNEL_BLOCK)


def _mixed(args: Sequence[Any], result: Tensor) -> Temporary:
    """An operand of another dtype than both have in common (a mask) is converted as a whole first."""
    tensors = [arg for arg in args[:2] if isinstance(arg, Tensor) and arg.dim()]
    return Temporary(sum(one.numel() * result.element_size() for one in tensors if one.dtype != result.dtype))


def _numbers(count: int) -> Temporary:
    return Temporary(arrays=min(NOISE_ARRAYS, NOISE_BYTES * count))


def _compiled(like: Tensor) -> bool:
    """Whether noise of a tensor's dtype is made by what Numba compiled, where that is another rule."""
    return cpu_kernels.registered and like.dtype in NUMPY_DTYPES


def _perturb(args: Sequence[Any], result: Tensor) -> Temporary:
    """Noise tied over blocks is spread for whole draws, the next beside the last (`noise._tied_pieces`)."""
    z, copies = args[:2]
    sizes, dim, outer, tiled = args[6:10]
    alive, blocks = (*args[10:], None, None)[:2]
    draws = _num_draws(copies)
    elements = z.numel() // (copies.shape[0] if tiled else 1)
    if not blocks:
        return _numbers(draws * elements)
    layout = Layout(tuple(sizes), dim, outer)
    if _compiled(z):  # the numbers of a draw's blocks
        return Temporary(arrays=elements // layout.elements * grid(layout, tuple(blocks)).elements * z.element_size())
    together = min(draws, max(1, TIED_ELEMENTS // max(1, elements)))
    whole = together * elements * z.element_size()
    made = _spread(whole, layout, blocks) + (whole if together < draws else 0)
    return Temporary(made, NOISE_ARRAYS // 4 + (whole if alive is not None else 0))


def _spread(size: int, layout: Layout, blocks: Sequence[int]) -> int:
    """Bytes of `size` bytes spread over blocks, axis after axis, the numbers of the blocks included."""
    last = next(block for block in blocks if block > 1)  # the first axis is spread last
    return size + size // last + size * grid(layout, tuple(blocks)).elements // layout.elements


def _num_draws(copies: Tensor) -> int:
    """Distinct draws of copy ids; of fake ones, which tell nothing, pairs (as those that σ is measured with)."""
    if isinstance(copies, FakeTensor):
        return -(-int(copies.shape[0]) // 2)
    with unset_fake_temporarily():
        return len(copy_runs(tuple(copies.tolist()))[0])


def _perturb_weight(args: Sequence[Any], result: Tensor) -> Temporary:
    """Patches of a draw's copies beside those of the last, or of the clean activation, and a padded copy of that."""
    copies, x, x_tiled, on = args[1], args[10], args[11], args[12]
    operation, weight, padding, groups = args[13], args[14], args[17], args[19]
    held = copies.shape[0] if x_tiled else 1
    if operation == "convolution":
        channels = result.shape[1]
        positions = result.numel() // channels // copies.shape[0]
        patches = x.element_size() * positions * groups * math.prod(weight[1:])
        padded = x.nbytes // held if any(padding) else 0
    else:
        patches = padded = x.nbytes // held
    draws = _num_draws(copies)
    together = copies.shape[0] // draws * min(2, draws) if x_tiled else 1
    change = result.nbytes // copies.shape[0] if on == "weight" else 0
    return Temporary(together * patches + max(padded, change), NOISE_ARRAYS)


def _weighted_noise(args: Sequence[Any], result: Tensor) -> Temporary:
    weights, draws = args[:2]
    return _numbers(result.numel() * (1 if result.shape[0] != weights.shape[1] else _num_draws(draws)))


def _pack(args: Sequence[Any], result: Tensor) -> Temporary:
    planes = result.shape[0]
    return Temporary(planes * args[0].numel(), result.nbytes if planes > 1 else 0)


def _unpack(args: Sequence[Any], result: Tensor) -> Temporary:
    """The positions in a table, eight bytes for every byte; of two planes both beside their difference."""
    packed = args[0]
    elements = result.numel() // max(1, packed.shape[1])
    copied = result.nbytes if elements % 8 else 0
    return Temporary(copied, 2 * result.nbytes if packed.shape[0] > 1 else 8 * packed.nbytes)


def _pack_levels(args: Sequence[Any], result: Tensor) -> Temporary:
    """Codes of a byte; of signed levels beside their 16 bits."""
    x, domain, bits, _ = args
    return Temporary((3 if domain == "signed" else 1 if bits < 8 else 0) * x.numel() + result.nbytes * (bits < 8))


def _unpack_levels(args: Sequence[Any], result: Tensor) -> Temporary:
    """Codes of a byte."""
    return Temporary(result.numel() if args[2] < 8 else 0)


def _count_blocks(args: Sequence[Any], result: Tensor) -> Temporary:
    """The mask as numbers, summed axis after axis."""
    like, alive, blocks = args[0], args[1], args[5]
    first = next(block for block in blocks if block > 1)
    return Temporary() if alive is None or _compiled(like) else Temporary(4 * alive.numel() * (first + 1) // first)


def _spread_blocks(args: Sequence[Any], result: Tensor) -> Temporary:
    _, sizes, dim, outer, blocks = args
    return Temporary(_spread(result.nbytes, Layout(tuple(sizes), dim, outer), blocks) - result.nbytes)


def _any_noise(args: Sequence[Any], result: Tensor) -> Temporary:
    return _numbers(result.numel())


_RULES: dict[Any, Callable[[Sequence[Any], Any], Temporary]] = {
    torch.ops.aten.convolution.default: _convolution,
    torch.ops.aten.convolution_backward.default: _convolution_backward,
    torch.ops.aten.add.Tensor: _mixed,
    torch.ops.aten.sub.Tensor: _mixed,
    torch.ops.aten.mul.Tensor: _mixed,
    torch.ops.aten.div.Tensor: _mixed,
    ops.perturb: _perturb,
    ops.perturb_weight: _perturb_weight,
    ops.weighted_noise: _weighted_noise,
    ops.weighted_noise_sum: _weighted_noise,
    ops.weight_noise_sum: _weighted_noise,
    ops.keyed_random: _any_noise,
    ops.stochastic_sign: _any_noise,
    ops.pack_signs: _pack,
    ops.unpack_signs: _unpack,
    ops.pack_levels: _pack_levels,
    ops.unpack_levels: _unpack_levels,
    ops.count_blocks: _count_blocks,
    ops.spread_blocks: _spread_blocks,
}
