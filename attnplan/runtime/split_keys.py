"""Few queries over many keys: the keys are cut into pieces, which run side by side and are merged.

A kernel that has one block of threads for 128 queries of a head leaves most of a device idle where there are few of
them. Its packed form takes the pieces as documents: each has a copy of the queries, and a share of the keys.

References
----------
Dao et al., Flash-Decoding, 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from attnplan.runtime.fused.maps import Packing, Source
from attnplan.runtime.fused.pull import PullMerge

TILE = 128
LEAST = 1024
"""Keys of a piece, at least."""
_UNITS = 128
"""Multiprocessors of a device that does not say how many it has."""

Packed = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
"""(q ``[T, H, D]``, k, v, cumulative lengths of q and of k, longest of q and of k) -> output and LSE ``[H, T]``."""


def pieces_of(q: Tensor, k: Tensor) -> int:
    """Return the number of pieces into which the keys ``[1, C, H, D]`` of queries ``[1, R, H, D]`` are cut.

    Examples
    --------
    >>> pieces_of(torch.empty(1, 128, 16, 8), torch.empty(1, 65408, 16, 8))
    8
    >>> pieces_of(torch.empty(1, 4096, 16, 8), torch.empty(1, 65408, 16, 8))
    1
    """
    if q.shape[0] != 1:
        return 1
    blocks = q.shape[2] * -(-q.shape[1] // TILE)
    return max(1, min(_units(q.device) // blocks, k.shape[1] // LEAST))


@lru_cache(maxsize=16)
def _units(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _UNITS


@lru_cache(maxsize=64)
def _boundaries(rows: int, keys: int, pieces: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Return cumulative lengths of the queries and keys of the pieces, and the keys of the longest."""
    ends = [i * keys // pieces // TILE * TILE for i in range(pieces)] + [
        keys
    ]  # a piece has several tiles: none is empty
    made = [torch.tensor(x, dtype=torch.int32, device=device) for x in (range(0, (pieces + 1) * rows, rows), ends)]
    return made[0], made[1], max(b - a for a, b in pairwise(ends))


def split_attention(packed: Packed, q: Tensor, k: Tensor, v: Tensor, pieces: int) -> tuple[Tensor, Tensor]:
    """Return output ``[1, R, H, Dv]`` and LSE ``[1, H, R]`` of whole attention over pieces of the keys.

    Parameters
    ----------
    packed
        A kernel over packed documents.
    q, k, v
        ``[1, R, H, D]``, ``[1, C, H_kv, D]``, ``[1, C, H_kv, Dv]``.
    pieces
        See :func:`pieces_of`.
    """
    _, rows, heads, _ = q.shape
    cu_q, cu_k, longest = _boundaries(rows, k.shape[1], pieces, q.device)
    copies = q.expand(pieces, -1, -1, -1).flatten(0, 1)
    out, lse = packed(copies, k[0], v[0], cu_q, cu_k, rows, longest)
    by_piece = out.view(pieces, rows, heads, -1).transpose(1, 2), lse.view(heads, pieces, rows).transpose(0, 1)
    merged, total = _join(heads, rows, pieces)(q.transpose(1, 2), by_piece[:1], by_piece[1:])
    assert total is not None
    return merged.transpose(1, 2), total


@lru_cache(maxsize=64)
def _join(heads: int, rows: int, pieces: int) -> PullMerge:
    """Return what joins outputs ``[pieces, H, R, Dv]`` of the same rows: parts of one softmax, as those of a union."""
    place = 0, 0, ((heads, 1, 0), (rows, 0, 1))
    packing = Packing((place,) * pieces, ((),) * pieces, ((0,),) * pieces)
    return PullMerge([Source(0, place, packing, part) for part in range(pieces)], disjoint=False)
