"""Networks over the nodes of one graph: a graph convolutional network and a graph attention network.

A graph is its nodes' features and its edges, ``edge_index`` int64 ``(2, edges)``: a column (from, to) is an edge along
which the first node's features reach the second; an undirected edge is two columns. The networks add an edge from every
node to itself.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..passes.errors import OptionError
from .layers import RELU_GAIN, linear


def with_self_loops(edge_index: Tensor, nodes: int) -> Tensor:
    """`edge_index` and an edge from each of the nodes to itself, ``(2, edges + nodes)``."""
    loops = torch.arange(nodes, device=edge_index.device)
    return torch.cat([edge_index, loops.expand(2, -1)], 1)


class GraphConvolution(nn.Module):
    """``Â x W + b`` (Kipf & Welling 2017, arXiv 1609.02907), Â being ``D^-1/2 (A + I) D^-1/2``.

    Neighbours are summed before the linear layer, so that nothing lies between its result and the activation: what a
    forward-only trainer perturbs there is one edge nearer to the output than ``x W`` would be. The weights are normal
    with standard deviation ``gain / sqrt(in_features)``, the bias zero.
    """

    def __init__(self, in_features: int, out_features: int, *, gain: float) -> None:
        super().__init__()
        self.lin = linear(in_features, out_features, gain=gain)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """From ``(nodes, in_features)`` to ``(nodes, out_features)``."""
        source, target = with_self_loops(edge_index, x.shape[0])
        degree = x.new_zeros(x.shape[0]).index_add(0, target, torch.ones_like(target, dtype=x.dtype))
        messages = x.index_select(0, source) * (degree[source] * degree[target]).rsqrt()[:, None]
        sums: Tensor = self.lin(torch.zeros_like(x).index_add(0, target, messages))
        return sums


class GraphAttention(nn.Module):
    """Attention over the neighbours (Velickovic et al. 2018, arXiv 1710.10903): several heads, one beside the other.

    A node takes the mean of its neighbours' ``W x``, weighted by the softmax over them of
    ``leaky_relu(a · [W x_target, W x_source])``.
    """

    def __init__(self, in_features: int, out_features: int, heads: int, *, gain: float) -> None:
        super().__init__()
        self.heads = heads
        self.lin = nn.Linear(in_features, heads * out_features, bias=False)
        self.attend_source = nn.Parameter(torch.empty(heads, out_features).normal_(std=1 / math.sqrt(out_features)))
        self.attend_target = nn.Parameter(torch.empty(heads, out_features).normal_(std=1 / math.sqrt(out_features)))
        self.bias = nn.Parameter(torch.zeros(heads * out_features))
        nn.init.normal_(self.lin.weight, std=gain / math.sqrt(in_features))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """From ``(nodes, in_features)`` to ``(nodes, heads * out_features)``."""
        nodes = x.shape[0]
        source, target = with_self_loops(edge_index, nodes)
        values = self.lin(x).unflatten(1, (self.heads, -1))  # (nodes, heads, out_features)
        scores = torch.einsum("nhf,hf->nh", values, self.attend_source).index_select(0, source)
        scores = scores + torch.einsum("nhf,hf->nh", values, self.attend_target).index_select(0, target)
        weights = edge_softmax(F.leaky_relu(scores, 0.2), target, nodes)
        messages = values.index_select(0, source) * weights[:, :, None]
        sums: Tensor = messages.new_zeros(nodes, *messages.shape[1:]).index_add(0, target, messages)
        return sums.flatten(1) + self.bias


def edge_softmax(scores: Tensor, target: Tensor, nodes: int) -> Tensor:
    """The softmax of ``(edges, heads)`` over the edges that lead to the same of the `nodes`."""
    index = target[:, None].expand_as(scores)
    largest = scores.new_zeros(nodes, scores.shape[1]).scatter_reduce(0, index, scores, "amax", include_self=False)
    powers = (scores - largest.index_select(0, target)).exp()  # of the shift the result has no derivative
    sums = powers.new_zeros(nodes, scores.shape[1]).index_add(0, target, powers)
    weights: Tensor = powers / sums.index_select(0, target)
    return weights


class GraphNetwork(nn.Module):
    """Layers that take node features and edges, with dropout before each and an activation between two."""

    def __init__(self, layers: list[nn.Module], activation: nn.Module, dropout: float) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise OptionError(f"a graph network needs a dropout in [0, 1), not {dropout}.")
        self.layers = nn.ModuleList(layers)
        self.activation = activation
        self.dropout = dropout

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """From float ``(nodes, in_features)`` and int64 ``(2, edges)`` to logits ``(nodes, num_classes)``."""
        for number, layer in enumerate(self.layers):
            x = self.activation(x) if number else x
            x = layer(F.dropout(x, self.dropout, self.training), edge_index)
        return x


def gcn(
    num_classes: int = 2, in_features: int = 34, hidden: int = 16, depth: int = 2, dropout: float = 0.5
) -> GraphNetwork:
    """A graph convolutional network (Kipf & Welling 2017, arXiv 1609.02907) with ReLU.

    Args:
        num_classes: Outputs a node.
        in_features: Features of a node.
        hidden: Features between layers.
        depth: Layers; as far as so many edges a node sees.
        dropout: Share of the features that each layer's input loses in training.

    Returns:
        A module from float ``(nodes, in_features)`` and int64 ``(2, edges)`` to logits ``(nodes, num_classes)``.

    Raises:
        OptionError: `depth` is below 1, or `dropout` is not in [0, 1).
    """
    if depth < 1:
        raise OptionError(f"gcn: depth must be at least 1, not {depth}.")
    widths = list(pairwise([in_features, *[hidden] * (depth - 1), num_classes]))
    layers = [GraphConvolution(a, b, gain=RELU_GAIN if number else 1.0) for number, (a, b) in enumerate(widths)]
    return GraphNetwork([*layers], nn.ReLU(), dropout)


def gat(
    num_classes: int = 2,
    in_features: int = 34,
    hidden: int = 8,
    heads: int = 8,
    depth: int = 2,
    dropout: float = 0.6,
) -> GraphNetwork:
    """A graph attention network (Velickovic et al. 2018, arXiv 1710.10903) with ELU, without dropout of attention.

    The last layer has one head, all others `heads` of them.

    Args:
        num_classes: Outputs a node.
        in_features: Features of a node.
        hidden: Features of a head between layers.
        heads: Attention heads between layers.
        depth: Layers; as far as so many edges a node sees.
        dropout: Share of the features that each layer's input loses in training.

    Returns:
        A module from float ``(nodes, in_features)`` and int64 ``(2, edges)`` to logits ``(nodes, num_classes)``.

    Raises:
        OptionError: `depth` or `heads` is below 1, or `dropout` is not in [0, 1).
    """
    if depth < 1 or heads < 1:
        raise OptionError(f"gat: depth and heads must be at least 1, not {depth} and {heads}.")
    layers: list[nn.Module] = []
    width = in_features
    for number in range(depth - 1):
        layers.append(GraphAttention(width, hidden, heads, gain=RELU_GAIN if number else 1.0))
        width = hidden * heads
    layers.append(GraphAttention(width, num_classes, 1, gain=RELU_GAIN if depth > 1 else 1.0))
    return GraphNetwork(layers, nn.ELU(), dropout)
