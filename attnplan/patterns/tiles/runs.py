"""Runs: the state of every tile of some rows, as the places where it changes. Patterns combine on them like numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

EMPTY, MAYBE, FULL = 0, 1, 2
"""No pair of the tile meets; not known from the outside; every pair meets."""


@attrs.frozen(eq=False)
class Runs:
    """Runs of equal tiles, in order of row and column; every row begins with one at column 0.

    ``&`` is the minimum of two states, ``|`` the maximum, ``~`` exchanges empty and full. Combining is exact about
    what it claims: a tile said to be empty or full is.
    """

    rows: int
    columns: int
    key: Ints
    """``row * columns + first column`` of each run, rising."""
    state: np.ndarray[Any, np.dtype[np.int8]]

    @classmethod
    def constant(cls, rows: int, columns: int, state: int) -> Runs:
        """Return one state for every tile."""
        return cls(rows, columns, np.arange(rows) * columns, np.full(rows, state, dtype=np.int8))

    @classmethod
    def between(cls, rows: int, columns: int, breaks: Sequence[Any], states: Sequence[int]) -> Runs:
        """Return, for each row, ``states[i]`` from ``breaks[i - 1]`` up to ``breaks[i]``.

        Parameters
        ----------
        rows, columns
            Number of tiles.
        breaks
            Columns ``[rows]``, or scalars. They are brought into range and into rising order.
        states
            One more than breaks.
        """
        edges = np.empty((rows, len(breaks) + 1), dtype=np.int64)
        edges[:, 0] = 0
        for place, edge in enumerate(breaks, start=1):
            edges[:, place] = np.clip(edge, 0, columns)
        np.maximum.accumulate(edges, axis=1, out=edges)
        stops = np.append(edges[:, 1:], np.full((rows, 1), columns), axis=1)
        kept = edges < stops
        keys = (edges + np.arange(rows)[:, None] * columns)[kept]
        return cls(rows, columns, keys, np.broadcast_to(np.array(states, dtype=np.int8), kept.shape)[kept])._joined()

    @classmethod
    def dense(cls, states: Any) -> Runs:
        """Return the runs of a table of states ``[rows, columns]``."""
        rows, columns = states.shape
        return cls(rows, columns, np.arange(rows * columns), states.reshape(-1).astype(np.int8))._joined()

    @classmethod
    def maybe(cls, rows: int, columns: int, row: Any, first: Any, stop: Any) -> Runs:
        """Return runs that are unknown inside any of many ranges [first, stop) of columns, and empty elsewhere.

        Ranges may overlap; each names its row.
        """
        some = stop > first
        start, end = (row * columns + first)[some], (row * columns + stop)[some]
        order = np.argsort(start, kind="stable")
        start, end = start[order], np.maximum.accumulate(end[order])
        opens = np.ones(len(start), dtype=bool)  # ranges that touch become one, unless a new row begins
        opens[1:] = (start[1:] > end[:-1]) | (start[1:] // columns != start[:-1] // columns)
        closes = np.append(opens[1:], opens[:1])  # the last range of all closes, if there is any
        start, end = start[opens], end[closes]
        begins = np.arange(rows) * columns
        key = np.concatenate([begins, end, start])
        state = np.concatenate([begins * 0, end * 0, start * 0 + MAYBE]).astype(np.int8)
        order = np.argsort(key, kind="stable")  # of equal keys the last one counts: an opening range wins
        return cls(rows, columns, key[order], state[order])._last_of_equal()._joined()

    def tiled(self, times: int) -> Runs:
        """Return a single row repeated ``times`` times."""
        key = (self.key + np.arange(times)[:, None] * self.columns).reshape(-1)
        return Runs(times, self.columns, key, np.tile(self.state, times))

    def _last_of_equal(self) -> Runs:
        last = np.append(self.key[1:] > self.key[:-1], True) & (self.key < self.rows * self.columns)
        return Runs(self.rows, self.columns, self.key[last], self.state[last])

    def _joined(self) -> Runs:
        """Join neighbouring runs of one state in one row."""
        change = np.ones(len(self.key), dtype=bool)
        change[1:] = (self.state[1:] != self.state[:-1]) | (self.key[1:] % self.columns == 0)
        return Runs(self.rows, self.columns, self.key[change], self.state[change])

    def __invert__(self) -> Runs:
        return attrs.evolve(self, state=FULL - self.state)

    def __and__(self, other: Runs) -> Runs:
        return self._with(other, minimum=True)

    def __or__(self, other: Runs) -> Runs:
        return self._with(other, minimum=False)

    def _with(self, other: Runs, minimum: bool) -> Runs:
        key = np.concatenate([self.key, other.key])
        order = np.argsort(key, kind="stable")
        mine = order < len(self.key)
        # the run of each side that is open at every key: the number of its keys so far
        left = self.state[np.maximum(np.cumsum(mine) - 1, 0)]
        right = other.state[np.maximum(np.cumsum(~mine) - 1, 0)]
        state = np.minimum(left, right) if minimum else np.maximum(left, right)
        return Runs(self.rows, self.columns, key[order], state)._last_of_equal()._joined()

    def lengths(self) -> Ints:
        """Return the number of tiles of each run."""
        stop = np.append(self.key[1:], self.rows * self.columns)
        return stop - self.key  # rows begin with a run, so none reaches into the next row

    def kept(self) -> int:
        """Return the number of tiles that are not known to be empty."""
        return int(self.lengths()[self.state > EMPTY].sum())

    def tiles(self) -> tuple[Ints, Ints, Any]:
        """Return (row, column, state) of every tile that is not known to be empty, in order."""
        some = self.state > EMPTY
        counts = self.lengths()[some]
        row, start = np.divmod(self.key[some], self.columns)
        before = np.cumsum(counts) - counts
        column = np.arange(int(counts.sum())) + np.repeat(start - before, counts)
        return np.repeat(row, counts), column, np.repeat(self.state[some], counts)
