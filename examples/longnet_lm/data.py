"""What the models learn from: the standard library's source, and sequences to copy."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

COPIED, SYMBOLS, DELIMITER = 64, 64, 255
HELD_OUT_WINDOWS = 512
Batches = Iterator[tuple[Tensor, Tensor]]


def read_text() -> tuple[Tensor, Tensor]:
    """Return bytes to train on and bytes held out: every tenth module of the standard library."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))  # none of the generated _sysconfigdata files
    held, kept = paths[::10], [path for i, path in enumerate(paths) if i % 10]
    train, test = (
        torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in part)), dtype=torch.uint8) for part in (kept, held)
    )
    return train, test


def text_batches(text: Tensor, batch: int, length: int, seed: int) -> Batches:
    """Yield random windows ``[batch, length]`` and the same windows one byte on."""
    random = torch.Generator().manual_seed(seed)
    reach = torch.arange(length + 1)
    while True:
        starts = torch.randint(len(text) - length, (batch, 1), generator=random)
        windows = text[starts + reach].long()
        yield windows[:, :-1], windows[:, 1:]


def held_out_windows(text: Tensor, length: int) -> Tensor:
    """Return ``[N, S + 1]`` windows, spread evenly over the text without overlap."""
    windows = text[: len(text) // (length + 1) * (length + 1)].view(-1, length + 1)
    return windows[:: -(-len(windows) // HELD_OUT_WINDOWS)].long()


def copy_batches(batch: int, seed: int) -> Batches:
    """Yield random symbols, a delimiter and the symbols again; targets before the delimiter are -100, ignored."""
    random = torch.Generator().manual_seed(seed)
    while True:
        symbols = torch.randint(SYMBOLS, (batch, COPIED), generator=random)
        delimiter = torch.full((batch, 1), DELIMITER)
        tokens = torch.cat([symbols, delimiter, symbols[:, :-1]], dim=1)
        yield tokens, torch.cat([torch.full_like(symbols, -100), symbols], dim=1)


def bigram_entropies(train: Tensor, windows: Tensor) -> tuple[float, float]:
    """Return bits per held-out byte, given the one before, over the pairs that the language models predict too.

    The first is the cross-entropy of a bigram model counted on the training text, with add-one smoothing. The second
    is the empirical conditional entropy of the held-out pairs themselves: no bigram model can be better on them.
    """
    fitted = (count_pairs(train[:-1].long(), train[1:].long()) + 1).double()
    held = count_pairs(windows[:, :-1].flatten(), windows[:, 1:].flatten()).double()
    return bigram_bits(held, fitted), bigram_bits(held, held)


def bigram_bits(counts: Tensor, model: Tensor) -> float:
    """Return the mean bits of counted pairs ``[256, 256]`` under the conditional probabilities of other counts."""
    seen = counts > 0
    bits = -(model / model.sum(1, keepdim=True))[seen].log2()
    return float((counts[seen] * bits).sum() / counts.sum())


def count_pairs(before: Tensor, after: Tensor) -> Tensor:
    return torch.bincount(before * 256 + after, minlength=65_536).view(256, 256)
