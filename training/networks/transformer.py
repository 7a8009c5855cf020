"""A small transformer for texts: token ids to logits. Padding has no influence on the answer."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from models_store.manifest import PADDING
from training.errors import NetworkError


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each after layer norm and around a shortcut (pre-norm)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_layers = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """(batch, length, width), (batch, length) -> (batch, length, width)."""
        batch, length, width = states.shape
        parts = self.attention(self.before_attention(states)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(query, key, value, is_token[:, None, None, :])
        states = states + self.dropout(self.out(found.transpose(1, 2).reshape(batch, length, width)))
        return states + self.dropout(self.layers(self.before_layers(states)))


class Transformer(nn.Module):
    """Embedded tokens and positions, blocks, and the mean over the tokens of a text."""

    def __init__(self, classes: int, vocabulary: int, longest: int, width: int, depth: int, heads: int, dropout: float):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        self.positions = nn.Parameter(0.02 * torch.randn(longest, width))
        self.blocks = nn.ModuleList([Block(width, heads, dropout) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, length) -> (batch, classes)."""
        is_token = ids != PADDING
        states = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            states = block(states, is_token)
        counted = is_token[:, :, None].to(states.dtype)
        mean = (self.norm(states) * counted).sum(dim=1) / counted.sum(dim=1)
        return self.head(mean)

    def reset_parameters(self) -> None:
        """Give the positions new initial values; the layers have their own."""
        nn.init.normal_(self.positions, std=0.02)


def make(
    num_classes: int, input_shape: tuple[int, ...], *, vocabulary: int | None = None, width: int = 64, depth: int = 2, heads: int = 4,
    dropout: float = 0.1,
) -> nn.Module:  # fmt: skip
    """A transformer for texts of at most `input_shape[0]` tokens.

    Raises:
        NetworkError: the data set has no tokens.
    """
    if vocabulary is None:
        raise NetworkError(
            "transformer takes token ids; the data set has none. For a table use mlp, for signals cnn1d or lstm."
        )
    return Transformer(num_classes, vocabulary, input_shape[0], width, depth, heads, dropout)
