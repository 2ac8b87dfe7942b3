"""Sharding tensors over the ranks of a ring, and putting them together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnplan.errors import RingError, SpecError
from attnplan.ir import RowMap
from attnplan.runtime.ring.rows import Span

WHOLE = ("documents", "key_padding")
"""Entries of a batch that describe the whole sequence, and stay whole on every rank."""


def spans(maps: Sequence[RowMap]) -> tuple[Span, ...]:
    """Return the rows that a rank holds as progressions.

    Raises
    ------
    RingError
        If they are none.
    """
    found = [Span.of(m) for m in maps]
    if any(s is None for s in found):
        raise RingError(f"the rows {maps} of a shard are no progressions")
    return tuple(s for s in found if s is not None)


def positions(held: Sequence[Span]) -> Tensor:
    """Return the positions in the whole sequence of a shard's rows, int64 ``[n]``.

    Examples
    --------
    >>> positions([Span(0, 1, 0, 1, 2), Span(0, 1, 6, 1, 2)])
    tensor([0, 1, 6, 7])
    """
    each = [torch.arange(s.start, s.start + s.step * s.count, s.step) for s in held]
    return torch.cat(each) if each else torch.zeros(0, dtype=torch.int64)


def cut(x: Tensor, dim: int, held: Sequence[Span]) -> Tensor:
    """Return a rank's rows of a whole tensor: a view where they are one progression. Differentiable."""
    parts = [
        x.narrow(dim, s.start, (s.count - 1) * s.step + 1)[(slice(None),) * dim + (slice(None, None, s.step),)]
        for s in held
    ]
    if not parts:
        return x.narrow(dim, 0, 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def join(parts: Sequence[Tensor], dim: int, held: Sequence[Sequence[Span]]) -> Tensor:
    """Return the whole tensor of which ``parts`` are the ranks' rows."""
    shape = list(parts[0].shape)
    shape[dim] = sum(p.shape[dim] for p in parts)
    whole = parts[0].new_empty(shape)
    for part, rows in zip(parts, held, strict=True):
        start = 0
        for s in rows:
            index = (slice(None),) * dim + (slice(s.start, s.start + (s.count - 1) * s.step + 1, s.step),)
            whole[index] = part.narrow(dim, start, s.count)
            start += s.count
    return whole


def gather(part: Tensor, dim: int, held: Sequence[Sequence[Span]], group: Any) -> Tensor:
    """Return the whole tensor on every rank of a group, from each rank's rows. Not differentiable.

    Raises
    ------
    RingError
        If this rank's part has another number of rows than its shard.
    """
    rank, lengths = dist.get_rank(group), [sum(s.count for s in rows) for rows in held]
    if part.shape[dim] != lengths[rank]:
        raise RingError(f"rank {rank} holds {lengths[rank]} rows, got {part.shape[dim]} along dimension {dim}")
    line = part.detach().movedim(dim, 0).contiguous()
    padded = line.new_zeros((max(lengths), *line.shape[1:]))
    padded[: len(line)] = line
    received = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(received, padded, group=group)
    parts = [x[:n].movedim(0, dim) for x, n in zip(received, lengths, strict=True)]
    return join(parts, dim, held)


def cut_batch(batch: Mapping[str, Any], length: int, held: Sequence[Span]) -> dict[str, Any]:
    """Return a rank's part of a batch: its rows of every tensor ``[B, S, ...]`` or ``[S]``, and their ``positions``.

    Raises
    ------
    SpecError
        If a tensor has no dimension of the sequence.
    """
    found: dict[str, Any] = {}
    for name, x in batch.items():
        if name in WHOLE or not isinstance(x, Tensor):
            found[name] = x
        elif x.dim() >= 2 and x.shape[1] == length:
            found[name] = cut(x, 1, held)
        elif x.dim() == 1 and x.shape[0] == length:
            found[name] = cut(x, 0, held)
        else:
            raise SpecError(
                f"{name} has shape {list(x.shape)}: shard_batch needs [B, {length}, ...] or [{length}]; what describes "
                f"the whole sequence is called {' or '.join(WHOLE)}, anything else is not sharded"
            )
    if "positions" not in found:
        device = next((x.device for x in batch.values() if isinstance(x, Tensor)), None)
        found["positions"] = positions(held).to(device) if device is not None else positions(held)
    return found
