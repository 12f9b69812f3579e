"""Pass: tie the noise of a noise point over blocks of positions (method.md 12).

All coordinates of a block get the same number (times their own alive mask), so that what is estimated or learned there
is one gradient a block, the mean over its alive coordinates: **biased** wherever the gradient varies inside a block,
with less variance, and a learned Jacobian smaller by the block's size.

The positions of a tensor are its per-sample axes (`Layout.extents`) but the channel axis, which is the second where the
value comes from a convolution, a pooling or a batch, group or instance normalisation, by way of pointwise operations
(``(N, C, H, W)``, ``(N, C, L)``), and the last everywhere else (``(N, T, C)``, ``(T, N, C)``). A block has the same
extent along every one of them; a size that does not divide an axis leaves a smaller last block.

Writes ``meta["site"]`` anew with `blocks`.

Declines: a tensor of channels alone (``(N, C)``), without a batch dimension, or whose channel axis holds the samples,
has no blocks.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from .graph import Kind, Layout, clone, finish

_aten = torch.ops.aten


def tie_blocks(module: fx.GraphModule, *, sizes: Mapping[int, int]) -> fx.GraphModule:
    """The graph whose sites have blocks of `sizes` positions along each axis, by site index; 1 where none is given."""
    module = clone(module)
    for node in module.graph.nodes:
        site = node.meta.get("site")
        if site is not None:
            node.meta["site"] = replace(site, blocks=blocks_of(node, sizes.get(site.index, 1)))
    return finish(module)


def blocks_of(node: fx.Node, size: int) -> tuple[int, ...]:
    """The extent of a block along each of ``layout.extents``; empty where every block is one coordinate."""
    layout: Layout = node.meta["layout"]
    channels = channel_axis(node)
    if not layout.batched or channels == layout.dim:
        return ()
    at = channels if channels < layout.dim else channels + 1  # the batch dimension holds two axes a sample
    blocks = tuple(1 if axis == at else min(size, extent) for axis, extent in enumerate(layout.extents))
    return blocks if any(block > 1 for block in blocks) else ()


def channel_axis(node: fx.Node) -> int:
    """The dimension of a node's value that holds its channels, by the operation that it comes from."""
    current: fx.Node | None = node
    while current is not None:
        if current.target in CHANNELS_SECOND:
            return 1
        current = _source(current)
    return len(node.meta["layout"].sizes) - 1


def _source(node: fx.Node) -> fx.Node | None:
    """The activation that a pointwise operation maps element by element, or whose result is taken from a tuple."""
    if node.target is operator.getitem:
        return node.all_input_nodes[0]
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.pointwise not in node.target.tags:
        return None
    like, found = node.meta["layout"], node.all_input_nodes
    return next((n for n in found if n.meta.get("kind") == Kind.ACTIVATION and n.meta.get("layout") == like), None)


CHANNELS_SECOND = {
    _aten.conv1d.default, _aten.conv1d.padding, _aten.conv2d.default, _aten.conv2d.padding, _aten.conv3d.default,
    _aten.conv3d.padding, _aten.convolution.default, _aten.conv_transpose1d.default, _aten.conv_transpose2d.input,
    _aten.conv_transpose3d.input, _aten.batch_norm.default, _aten._native_batch_norm_legit.default,
    _aten._native_batch_norm_legit_functional.default, _aten._native_batch_norm_legit_no_training.default,
    _aten._native_batch_norm_legit.no_stats, _aten.group_norm.default, _aten.native_group_norm.default,
    _aten.instance_norm.default, _aten.max_pool1d.default, _aten.max_pool2d.default, _aten.max_pool3d.default,
    _aten.max_pool2d_with_indices.default, _aten.avg_pool1d.default, _aten.avg_pool2d.default,
    _aten.avg_pool3d.default, _aten.adaptive_avg_pool1d.default, _aten.adaptive_avg_pool2d.default,
    _aten.adaptive_avg_pool3d.default, _aten.prelu.default, _aten._prelu_kernel.default,
}  # fmt: skip
"""Operations whose results have their channels in the second dimension."""


def grid(layout: Layout, blocks: tuple[int, ...]) -> Layout:
    """The layout of the tensor with one element for every block."""
    if not blocks:
        return layout
    counts = [-(-extent // block) for extent, block in zip(layout.extents, blocks, strict=True)]
    dim = layout.dim
    return Layout((*counts[:dim], counts[dim] * counts[dim + 1], *counts[dim + 2 :]), dim, counts[dim])


__all__ = ["blocks_of", "channel_axis", "grid", "tie_blocks"]
