"""Signatures: small numbers that decide which pairs of a tile meet, so that equal tiles are asked once.

One rule per kind of pattern. Two tiles of one size with equal signatures have the same pairs meeting, place by place. A
pattern without a rule has its tile's own position for a signature, so that every tile is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import numpy as np

from attnplan.patterns.bands import Band, Full
from attnplan.patterns.base import And, Not, Or, Pattern
from attnplan.patterns.keys import GlobalTokens, Sinks
from attnplan.patterns.operands import Documents, Padding
from attnplan.patterns.segments import Dilated, Heads
from attnplan.patterns.tiles.grid import Grid
from attnplan.patterns.tiles.states import Tables

Signature = list[Any]
"""Integer arrays with one number per tile."""


@singledispatch
def signature(pattern: Pattern, grid: Grid, q: np.ndarray, k: np.ndarray, head: int, tables: Tables) -> Signature:
    """Return the signature of tiles whose first query and key have the positions ``q`` and ``k``."""
    return [q, k]


@signature.register(Full)
@signature.register(Heads)  # one head is looked at
def _constant(pattern: Pattern, grid: Grid, q: np.ndarray, k: np.ndarray, head: int, tables: Tables) -> Signature:
    return []


@signature.register(And)
@signature.register(Or)
def _compound(pattern: And | Or, grid: Grid, q: np.ndarray, k: np.ndarray, head: int, tables: Tables) -> Signature:
    return [number for term in pattern.terms for number in signature(term, grid, q, k, head, tables)]


@signature.register
def _not(pattern: Not, grid: Grid, q: np.ndarray, k: np.ndarray, head: int, tables: Tables) -> Signature:
    return signature(pattern.term, grid, q, k, head, tables)


@signature.register
def _band(pattern: Band, grid: Grid, q: np.ndarray, k: np.ndarray, head: int, tables: Tables) -> Signature:
    """Return the distance between the corners, as far as an end of the band can lie inside the tile."""
    ahead, (height, width) = k - q, grid.tile
    ends = []
    if pattern.left is not None:  # key j of query i meets from j - i >= -left - ahead on
        ends.append(np.clip(-pattern.left - ahead, -height, width))
    if pattern.right is not None:
        ends.append(np.clip(pattern.right - ahead, -height, width))
    return ends


@signature.register
def _sinks(pattern: Sinks, grid: Grid, q: np.ndarray, k: np.ndarray, head: int, tables: Tables) -> Signature:
    return [np.clip(pattern.count - k, 0, grid.tile[1])]


@signature.register
def _global(pattern: GlobalTokens, grid: Grid, q: np.ndarray, k: np.ndarray, head: int, tables: Tables) -> Signature:
    count = len(pattern.indices)
    if pattern.indices[-1] == count - 1:  # the first tokens
        height, width = grid.tile
        before = np.clip(q, -height, 0)  # with more queries than keys, the first positions are negative and not global
        return [before, np.clip(count - q, 0, height), np.clip(count - k, 0, width)]
    indices = np.asarray(pattern.indices)
    return [slices(indices, q, grid.tile[0]), slices(indices, k, grid.tile[1])]


def slices(indices: np.ndarray, start: np.ndarray, size: int) -> np.ndarray:
    """Return a number for each start that is equal for two starts exactly if the same places after them are listed."""
    starts, inverse = np.unique(start, return_inverse=True)
    low, high = np.searchsorted(indices, starts), np.searchsorted(indices, starts + size)
    known: dict[bytes, int] = {}
    numbers = [
        known.setdefault((indices[a:b] - s).tobytes(), len(known)) for a, b, s in zip(low, high, starts, strict=True)
    ]
    return np.asarray(numbers)[inverse]


@signature.register
def _documents(pattern: Documents, grid: Grid, q: np.ndarray, k: np.ndarray, head: int, tables: Tables) -> Signature:
    """Return where documents begin inside the tile, and how many begin between its corners."""
    ids = tables[pattern._table]
    begins = np.flatnonzero(ids[1:] != ids[:-1]) + 1
    reach = max(grid.tile)  # ids rise by at least one at every beginning
    inside_q, inside_k = (slices(begins, x + 1, size - 1) for x, size in ((q, grid.tile[0]), (k, grid.tile[1])))
    return [np.clip(_rank(begins, k) - _rank(begins, q), -reach, reach), inside_q, inside_k]


def _rank(begins: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Return how many documents begin at or before a position, the first one left aside."""
    return np.searchsorted(begins, position, side="right")


@signature.register
def _padding(pattern: Padding, grid: Grid, q: np.ndarray, k: np.ndarray, head: int, tables: Tables) -> Signature:
    return [slices(np.flatnonzero(tables[pattern._table] > 0), k, grid.tile[1])]


@signature.register
def _dilated(pattern: Dilated, grid: Grid, q: np.ndarray, k: np.ndarray, head: int, tables: Tables) -> Signature:
    """Return the phase in the rate, the distance to the segment's end, and how many segments apart the corners are."""
    length, rate = pattern.length, pattern.rate
    numbers = []
    for position, size in ((q, grid.tile[0]), (k, grid.tile[1])):
        inside = position % length
        numbers += [np.minimum(length - inside, size)]
        if rate > 1:
            numbers += [inside % rate]
    reach = max(grid.tile) // length + 2
    return [*numbers, np.clip(k // length - q // length, -reach, reach)]


def classes(numbers: Sequence[Any], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (an example of each distinct signature, the signature of each tile), for ``count`` tiles."""
    key = np.zeros(count, dtype=np.int64)
    spread = 1
    for number in numbers:
        low, high = (int(number.min()), int(number.max())) if count else (0, 0)
        size = high - low + 1
        if spread * size >= 2**62:
            key = np.unique(key, return_inverse=True)[1].astype(np.int64)
            spread = int(key.max()) + 1
        key = key * size + (number - low)
        spread *= size
    _, example, which = np.unique(key, return_index=True, return_inverse=True)
    return example, which
