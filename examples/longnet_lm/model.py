"""A byte-level language model: rotary positions, pre-norm blocks, attention by attnplan."""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnplan import patterns as P
from attnplan.nn import PlannedAttention


@attrs.frozen
class Settings:
    """Sizes of a model and of its training."""

    length: int
    batch: int
    steps: int
    layers: int
    heads: int = 4
    dim: int = 128
    learning_rate: float = 3e-3


class Attention(nn.Module):
    """Attention by attnplan, with rotary positions."""

    def __init__(self, dim: int, heads: int, pattern: P.Pattern | P.Mixture) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attend = PlannedAttention(pattern, causal=True, layout="bshd")

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)  # [B, S, H, D] each
        return self.out(self.attend(rotate(q, turns), rotate(k, turns), v).flatten(2))


class Block(nn.Module):
    """Attention, then a feed-forward layer, each on a normalised copy of what it adds to."""

    def __init__(self, dim: int, heads: int, pattern: P.Pattern | P.Mixture) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, pattern)
        self.feed = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), turns)
        return x + self.feed(self.norm2(x))


class ByteLM(nn.Module):
    """Bytes ``[B, S]`` to logits ``[B, S, 256]`` of the next byte."""

    def __init__(self, settings: Settings, pattern: P.Pattern | P.Mixture, checkpointing: bool = False) -> None:
        super().__init__()
        dim, heads = settings.dim, settings.heads
        self.checkpointing = checkpointing
        self.embed = nn.Embedding(256, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, pattern) for _ in range(settings.layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256, bias=False)
        self.register_buffer("turns", rotary(settings.length, dim // heads), persistent=False)
        for weight in (w for w in self.parameters() if w.ndim == 2):
            nn.init.normal_(weight, std=0.02)
        for block in self.blocks:  # the residual sum starts near the embedding, however many layers add to it
            for last in (block.attention.out, block.feed[2]):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * settings.layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x, turns = self.embed(tokens), self.turns[:, : tokens.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, turns, use_reentrant=False) if self.checkpointing else block(x, turns)
        return self.head(self.norm(x))


def rotary(length: int, head_dim: int) -> Tensor:
    """Return cosines and sines ``[2, S, 1, D / 2]`` of the angles by which positions turn pairs of features."""
    rates = 10_000 ** -torch.arange(0, 1, 2 / head_dim)
    angles = torch.arange(length)[:, None, None] * rates
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs (i, i + D / 2) of features of x ``[B, S, H, D]`` by the angles of their positions."""
    (a, b), (cos, sin) = x.chunk(2, dim=3), turns
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=3)
