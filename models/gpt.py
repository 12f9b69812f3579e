"""A small GPT: a transformer that predicts each text's next token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..passes.errors import BatchError, OptionError
from .layers import check_tokens, linear
from .transformer import Block, check_heads, residual_gain


class GPT(nn.Module):
    """What `gpt` builds. The gain of what blocks add is that of `residual_gain`."""

    def __init__(self, *, num_tokens: int, length: int, width: int, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_tokens, width)
        self.position = nn.Parameter(torch.empty(1, length, width).normal_(std=0.3))
        gain = residual_gain(depth)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, gain=gain, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = linear(width, num_tokens, gain=1.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """From int64 ``(batch, T)``, T at most `length`, to the next token's logits, ``(batch, T, num_tokens)``.

        Raises:
            BatchError: `tokens` are not whole numbers of that shape, or T is 0 or more than `length`.
        """
        check_tokens("gpt", tokens)
        length = self.position.shape[1]
        if tokens.shape[1] > length:
            raise BatchError(f"gpt: a text of {tokens.shape[1]} tokens; this one is for up to {length}.")
        embedded = self.embed(tokens) + self.position[:, : tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(embedded)))
        return logits


def gpt(
    num_tokens: int = 64,
    length: int = 16,
    width: int = 32,
    depth: int = 2,
    heads: int = 2,
    expansion: int = 2,
) -> GPT:
    """A decoder-only transformer (Radford et al. 2019, GPT-2) for short texts, without dropout.

    Each token's vector gets a learned position added, pre-norm blocks follow whose attention sees what came before, and
    a linear layer, not tied to the embedding, predicts at every position what comes next.

    Args:
        num_tokens: Size of the vocabulary: inputs and outputs.
        length: Tokens of a text, at most.
        width: Features of a token.
        depth: Blocks, named ``blocks.0``, ``blocks.1`` and so on.
        heads: Attention heads.
        expansion: Hidden features of a block's perceptron, as a multiple of `width`.

    Returns:
        A module from int64 ``(batch, T)``, T at most `length`, to logits ``(batch, T, num_tokens)``; those at a
        position depend on the tokens up to it.

    Raises:
        OptionError: `num_tokens` or `length` is below 1, or `heads` does not divide `width`.
    """
    if min(num_tokens, length) < 1:
        raise OptionError(f"gpt: num_tokens and length must be at least 1, not {num_tokens} and {length}.")
    check_heads("gpt", width, heads)
    return GPT(num_tokens=num_tokens, length=length, width=width, depth=depth, heads=heads, hidden=expansion * width)
