"""Exact numbers of pairs, without memory proportional to queries times keys."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from attnplan.errors import SpecError
from attnplan.patterns.base import Array, Pattern, Shape
from attnplan.patterns.indicators import indicator
from attnplan.patterns.sums import Point, head_sum

if TYPE_CHECKING:
    import numpy as np

_BLOCK_ELEMENTS = 1 << 20


class Table:
    """A table ``[batch or 1, length]`` that is indexed by position and keeps its batch dimension in front."""

    def __init__(self, data: Array) -> None:
        self.data = data

    def __getitem__(self, position: Array) -> Array:
        return self.data[:, position]


def count_pairs(pattern: Pattern, shape: Shape) -> int:
    """Return the exact number of (batch, head, query, key) pairs that a pattern without runtime operands contains.

    Bands, segments, dilations, ranges of heads, sinks, global tokens and known documents have closed forms, and so have
    their combinations. For anything else each query row is cut where membership may change, in O(rows) memory;
    ``mask(fn)`` is asked key by key and takes O(n^2) time.

    Raises
    ------
    SpecError
        If the pattern depends on data that arrives with the call.

    Examples
    --------
    >>> from attnplan.patterns import causal, sinks, window
    >>> count_pairs(causal(), Shape(seq_len=4, kv_len=4, heads=2))
    20
    >>> count_pairs(window(1) | sinks(1), Shape(seq_len=4, kv_len=4, heads=1))
    12
    """
    if pattern.operands:
        names = ", ".join(sorted(pattern.operands))
        raise SpecError(f"the number of pairs of {pattern!r} depends on what arrives with the call ({names})")
    monomials = indicator(pattern)
    closed = not any(condition.opaque for condition, _ in monomials)
    count = _count_closed if closed else _count_rows
    return sum(count(pattern, head, shape) * heads for head, heads in _head_classes(pattern, shape.heads))


def _count_closed(pattern: Pattern, head: int, shape: Shape) -> int:
    sizes = (shape.shift, shape.seq_len, shape.kv_len)
    return shape.batch * sum(c * head_sum(part, head, Point(), *sizes) for part, c in indicator(pattern))


def _head_classes(pattern: Pattern, heads: int) -> list[tuple[int, int]]:
    """Return (a head, how many heads the pattern treats like it)."""
    keys = [pattern.head_key(h) for h in range(heads)]
    return [(keys.index(key), count) for key, count in Counter(keys).items()]


def _count_rows(pattern: Pattern, head: int, shape: Shape) -> int:
    import numpy as np

    raw = pattern.tables(shape)
    per_batch = any(t.shape[0] > 1 for t in raw.values())
    total = 0
    for b in range(shape.batch if per_batch else 1):
        tables = {name: t[min(b, t.shape[0] - 1)] for name, t in raw.items()}
        rows, start = max(1, _BLOCK_ELEMENTS // 64), 0
        while start < shape.seq_len:
            q = np.arange(start, min(start + rows, shape.seq_len)) + shape.shift
            total += _count_block(pattern, tables, head, q, shape.kv_len)
            start += rows
    return total if per_batch else total * shape.batch


def _count_block(pattern: Pattern, tables: Mapping[str, np.ndarray], head: int, q: np.ndarray, kv_len: int) -> int:
    import numpy as np

    breaks = pattern.breaks(tables, q, kv_len)
    if breaks is None:
        step = max(1, _BLOCK_ELEMENTS // kv_len)
        k = np.arange(kv_len)
        return sum(
            int(np.broadcast_to(pattern.pairs(tables, np.array(head), rows[:, None], k), (len(rows), kv_len)).sum())
            for rows in (q[i : i + step] for i in range(0, len(q), step))
        )
    period = math.lcm(*(p.period for p in pattern.walk()))
    edges = np.stack([q * 0, *(np.clip(b, 0, kv_len) for b in breaks), q * 0 + kv_len], axis=1)
    edges.sort(axis=1)
    low, high = edges[:, :-1], edges[:, 1:]
    total = 0
    for residue in range(period):
        first = low + (residue - low) % period
        count = np.maximum(0, -(-(high - first) // period))
        inside = pattern.pairs(tables, np.array(head), q[:, None], np.minimum(first, kv_len - 1))
        total += int((count * np.broadcast_to(inside, count.shape)).sum())
    return total
