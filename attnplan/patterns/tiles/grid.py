"""Where tiles lie: a range of query positions and one of key positions, cut into tiles of one size."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np

from attnplan.patterns.base import Shape, require, require_int

Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@attrs.frozen
class Grid:
    """Tiles of ``tile`` = (queries, keys) over neighbouring positions; the last tile of a side may be ragged."""

    q_start: int
    """Position of the first query; negative where there are more queries than keys."""
    queries: int
    k_start: int
    keys: int
    tile: tuple[int, int]

    def __attrs_post_init__(self) -> None:
        require(len(self.tile) == 2, f"a tile has two sizes, (queries, keys); got {self.tile!r}")
        for size, what in zip(self.tile, ("query rows", "keys"), strict=True):
            require_int(size, f"number of {what} of a tile", 1)

    @classmethod
    def of(cls, shape: Shape, tile: tuple[int, int]) -> Grid:
        """Return the grid over all queries and keys of a shape."""
        return cls(shape.shift, shape.seq_len, 0, shape.kv_len, tile)

    @property
    def rows(self) -> int:
        """Number of tiles along the queries."""
        return -(-self.queries // self.tile[0])

    @property
    def columns(self) -> int:
        """Number of tiles along the keys."""
        return -(-self.keys // self.tile[1])

    @property
    def k_stop(self) -> int:
        """The position after the last key."""
        return self.k_start + self.keys

    def first_query(self, row: Ints) -> Ints:
        """Return the position of the first query of tile rows."""
        return self.q_start + row * self.tile[0]

    def last_query(self, row: Ints) -> Ints:
        """Return the position of the last query of tile rows."""
        return self.first_query(row) + self.height(row) - 1

    def height(self, row: Ints) -> Ints:
        """Return the number of queries in tile rows."""
        return np.minimum(self.tile[0], self.queries - row * self.tile[0])

    def first_key(self, column: Ints) -> Ints:
        """Return the position of the first key of tile columns."""
        return self.k_start + column * self.tile[1]

    def width(self, column: Ints) -> Ints:
        """Return the number of keys in tile columns."""
        return np.minimum(self.tile[1], self.keys - column * self.tile[1])

    def area(self, row: Ints, column: Ints) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Return the number of pairs in tiles."""
        area = np.full(len(row), self.tile[0] * self.tile[1], dtype=np.int32)
        if self.queries % self.tile[0] or self.keys % self.tile[1]:
            edge = np.flatnonzero((row == self.rows - 1) | (column == self.columns - 1))  # all others are whole
            area[edge] = self.height(row[edge]) * self.width(column[edge])
        return area

    def touched(self, low: Ints, high: Ints) -> tuple[Ints, Ints]:
        """Return the columns [first, stop) that hold any key of the positions [low, high)."""
        size = self.tile[1]
        low, high = np.maximum(low, self.k_start) - self.k_start, np.minimum(high, self.k_stop) - self.k_start
        first, stop = low // size, -(-high // size)
        return np.where(high > low, first, 0), np.where(high > low, stop, 0)

    def inside(self, low: Ints, high: Ints) -> tuple[Ints, Ints]:
        """Return the columns [first, stop) all of whose keys lie in the positions [low, high)."""
        size = self.tile[1]
        low, high = np.maximum(low, self.k_start) - self.k_start, np.minimum(high, self.k_stop) - self.k_start
        first = -(-low // size)
        stop = np.where(high == self.keys, self.columns, high // size)
        return np.where(stop > first, first, 0), np.where(stop > first, stop, 0)
