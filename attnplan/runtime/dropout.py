"""Dropout whose mask is a function of (seed, batch, head, query row, key row), and so of no plan.

A counter-based generator: the coordinates are hashed to 32 random bits each. Any two plans for a spec drop the same
pairs, whatever they take apart, copy or launch.

References
----------
Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011, for the idea of hashing counters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnplan.ir import RowMap
from attnplan.runtime.masks import ORIGIN, element_indices

_BITS = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: neighbouring counters start far apart


def _scramble(x: Tensor) -> Tensor:
    """Return 32 bits that all depend on all 32 bits of ``x``, in an int64 tensor."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _BITS
    x = (x ^ (x >> 15)) * 0x046CA68B & _BITS
    return x ^ (x >> 16)


def keep_mask(seed: int | Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor, dropout: float) -> Tensor:
    """Return which pairs are kept: booleans of the shape to which the coordinates broadcast.

    Parameters
    ----------
    seed
        An int, or an int tensor ``[]``.
    batch, head, query, key
        Coordinates: int64 tensors that broadcast together.
    dropout
        Probability with which a pair is dropped.

    Examples
    --------
    >>> zero, rows = torch.tensor(0), torch.arange(1000)
    >>> kept = keep_mask(7, zero, zero, rows[:, None], rows, 0.25)
    >>> round(kept.float().mean().item(), 2)
    0.75
    """
    seed = torch.as_tensor(seed, dtype=torch.int64)
    bits = _scramble((seed & _BITS) ^ _scramble(seed >> 32 & _BITS)).to(batch.device)
    for coordinate in (batch, head, query, key):
        bits = _scramble(bits + coordinate * _GOLDEN & _BITS)
    return bits >= int(dropout * 2**32)


class DropoutMask(torch.nn.Module):
    """Builds the mask of kept pairs for one attend, shaped as a :class:`~attnplan.runtime.masks.MaskBuilder` does."""

    def __init__(self, dropout: float, q: RowMap, k: RowMap, *, follow: bool = False) -> None:
        super().__init__()
        self.dropout, self.q, self.k, self.follow = dropout, q, k, follow

    def forward(self, operands: Mapping[str, Any], q: Tensor, k: Tensor) -> Tensor:
        """Return booleans ``[B, *axes, R, C]`` for the call's whole q and k."""
        lengths = (q.shape[2], k.shape[2]) if self.follow else (self.q.length, self.k.length)
        head, query = element_indices(self.q, lengths[0], q.device, query=True)
        _, key = element_indices(self.k, lengths[1], q.device, query=False)
        batch = torch.arange(q.shape[0], device=q.device).reshape(-1, *(1,) * (query.dim() - 1))
        first, above, before = operands.get(ORIGIN, (0, 0, 0))
        places = (batch + first, head + above, query + before, key + before)
        return keep_mask(operands["dropout_seed"], *places, self.dropout)
