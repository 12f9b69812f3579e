"""What transformers are made of: multi-head self-attention, and the pre-norm block around it."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ..passes.errors import OptionError
from .layers import ACTIVATIONS, linear


class SelfAttention(nn.Module):
    """Multi-head self-attention over the tokens of a sample (Vaswani et al. 2017, arXiv 1706.03762).

    The output projection has `gain`. A `causal` one lets a token attend to itself and to those before it only.
    """

    def __init__(self, width: int, heads: int, *, gain: float, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = linear(width, 3 * width, gain=1.0)
        self.out = linear(width, width, gain=gain)

    def forward(self, tokens: Tensor) -> Tensor:
        """From and to ``(batch, tokens, width)``."""
        split = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)  # each (batch, heads, tokens, width / heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        output: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return output


class Block(nn.Module):
    """A pre-norm block: ``x + attention(norm1(x))``, then ``x + fc2(gelu(fc1(norm2(x))))``.

    What both sums add has `gain`; `causal` is that of the attention.
    """

    def __init__(self, width: int, heads: int, hidden: int, *, gain: float, causal: bool = False) -> None:
        super().__init__()
        _, gelu_gain = ACTIVATIONS["gelu"]
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, gain=gain, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = linear(width, hidden, gain=1.0)
        self.act = nn.GELU()
        self.fc2 = linear(hidden, width, gain=gelu_gain * gain)

    def forward(self, tokens: Tensor) -> Tensor:
        """From and to ``(batch, tokens, width)``."""
        tokens = tokens + self.attention(self.norm1(tokens))
        branch: Tensor = self.fc2(self.act(self.fc1(self.norm2(tokens))))
        return tokens + branch


def residual_gain(depth: int) -> float:
    """The gain of what each of `depth` blocks adds to the tokens: ``1 / sqrt(2 * depth)`` (Radford et al. 2019, GPT-2).

    Each adds two terms; all of them together then add about as much variance as the embedding has.
    """
    return 1 / math.sqrt(2 * max(depth, 1))


def check_heads(model: str, width: int, heads: int) -> None:
    """Raises OptionError unless `heads` attention heads share the `width` features of `model`'s tokens equally."""
    if heads < 1 or width % heads:
        raise OptionError(f"{model}: heads must divide width, but heads={heads} and width={width}.")
