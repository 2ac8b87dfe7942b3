"""What the tiles of a grid are, as far as an atom can say without asking pair by pair.

One rule per kind of pattern. A rule may answer "maybe" where it does not know; it must be right where it says empty or
full. A pattern without a rule is maybe everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce, singledispatch
from operator import and_, or_
from typing import Any

import numpy as np

from attnplan.patterns.bands import Band, Full
from attnplan.patterns.base import And, Not, Or, Pattern
from attnplan.patterns.blocks import BlockWindow
from attnplan.patterns.keys import GlobalTokens, Sinks
from attnplan.patterns.operands import Documents, Padding
from attnplan.patterns.segments import Dilated, Heads
from attnplan.patterns.tiles.grid import Grid
from attnplan.patterns.tiles.runs import EMPTY, FULL, MAYBE, Runs

Tables = Mapping[str, Any]
"""One-dimensional tables of one batch element, indexed by position."""


_FEW_RUNS = (And, Or, Not, Full, Heads, Band, Sinks, Documents, Dilated, BlockWindow)


def few_runs(pattern: Pattern) -> bool:
    """Return whether the rules of a pattern find a handful of runs in a row of tiles, however long it is."""
    return all(
        isinstance(p, _FEW_RUNS) or (isinstance(p, GlobalTokens) and p.indices[-1] == len(p.indices) - 1)
        for p in pattern.walk()
    )


@singledispatch
def runs(pattern: Pattern, grid: Grid, row: np.ndarray, head: int, tables: Tables) -> Runs:
    """Return the states of the tiles of some tile rows.

    Parameters
    ----------
    pattern
        The pattern.
    grid
        Where the tiles lie.
    row
        Indices of the tile rows, rising.
    head
        The head that is looked at.
    tables
        Static tables and operands of one batch element.
    """
    return Runs.constant(len(row), grid.columns, MAYBE)


@runs.register
def _full(pattern: Full, grid: Grid, row: np.ndarray, head: int, tables: Tables) -> Runs:
    return Runs.constant(len(row), grid.columns, FULL)


@runs.register
def _heads(pattern: Heads, grid: Grid, row: np.ndarray, head: int, tables: Tables) -> Runs:
    return Runs.constant(len(row), grid.columns, FULL if pattern.start <= head < pattern.stop else EMPTY)


@runs.register
def _and(pattern: And, grid: Grid, row: np.ndarray, head: int, tables: Tables) -> Runs:
    return reduce(and_, (runs(t, grid, row, head, tables) for t in pattern.terms))


@runs.register
def _or(pattern: Or, grid: Grid, row: np.ndarray, head: int, tables: Tables) -> Runs:
    return reduce(or_, (runs(t, grid, row, head, tables) for t in pattern.terms))


@runs.register
def _not(pattern: Not, grid: Grid, row: np.ndarray, head: int, tables: Tables) -> Runs:
    return ~runs(pattern.term, grid, row, head, tables)


@runs.register
def _band(pattern: Band, grid: Grid, row: np.ndarray, head: int, tables: Tables) -> Runs:
    first, last = grid.first_query(row), grid.last_query(row)
    low = first * 0 + grid.k_start if pattern.left is None else first - pattern.left
    low_all = low if pattern.left is None else last - pattern.left
    high = first * 0 + grid.k_stop if pattern.right is None else last + pattern.right + 1
    high_all = high if pattern.right is None else first + pattern.right + 1
    return nested(grid, len(row), (low, high), (low_all, high_all))


def nested(grid: Grid, rows: int, some: tuple[Any, Any], all_: tuple[Any, Any]) -> Runs:
    """Return the states of rows in which a query may meet keys of ``some`` and every query meets those of ``all_``.

    Both are ranges of positions, the second inside the first.
    """
    a, d = grid.touched(*some)
    b, c = grid.inside(*all_)
    b, c = _within(a, b, c)
    return Runs.between(rows, grid.columns, (a, b, c, d), (EMPTY, MAYBE, FULL, MAYBE, EMPTY))


def _within(a: Any, b: Any, c: Any) -> tuple[Any, Any]:
    """Return [b, c) moved to ``a`` where it is empty, so that the four edges rise."""
    return np.where(c > b, b, a), np.where(c > b, c, a)


@runs.register
def _sinks(pattern: Sinks, grid: Grid, row: np.ndarray, head: int, tables: Tables) -> Runs:
    return _first_keys(grid, pattern.count).tiled(len(row))


def _first_keys(grid: Grid, count: int) -> Runs:
    """Return the states of one row in which exactly the keys below ``count`` are met."""
    low, high = np.array([grid.k_start]), np.array([count])
    return nested(grid, 1, (low, high), (low, high))


@runs.register
def _global(pattern: GlobalTokens, grid: Grid, row: np.ndarray, head: int, tables: Tables) -> Runs:
    """Return full for a tile all of whose keys, or all of whose queries, are global."""
    indices = np.asarray(pattern.indices)
    columns = np.arange(grid.columns)
    keys = membership(indices, grid.first_key(columns), grid.width(columns))
    queries = membership(indices, grid.first_query(row), grid.height(row))
    by_row = Runs(len(row), grid.columns, np.arange(len(row)) * grid.columns, queries)
    return by_row | Runs.dense(keys[None]).tiled(len(row))


def membership(indices: np.ndarray, start: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return whether none, some or all of the ``size`` positions from each ``start`` on are among rising indices."""
    found = np.searchsorted(indices, start + size) - np.searchsorted(indices, start)
    return np.where(found == size, FULL, np.where(found > 0, MAYBE, EMPTY)).astype(np.int8)


@runs.register
def _documents(pattern: Documents, grid: Grid, row: np.ndarray, head: int, tables: Tables) -> Runs:
    ids = tables[pattern._table]
    first, last = ids[grid.first_query(row)], ids[grid.last_query(row)]
    some = np.searchsorted(ids, first, side="left"), np.searchsorted(ids, last, side="right")
    one = first == last
    return nested(grid, len(row), some, (some[0], np.where(one, some[1], some[0])))


@runs.register
def _padding(pattern: Padding, grid: Grid, row: np.ndarray, head: int, tables: Tables) -> Runs:
    before = np.append(0, np.cumsum(tables[pattern._table][grid.k_start : grid.k_stop] > 0))
    columns = np.arange(grid.columns)
    width = grid.width(columns)
    start = columns * grid.tile[1]
    found = before[start + width] - before[start]
    states = np.where(found == width, FULL, np.where(found > 0, MAYBE, EMPTY))
    return Runs.dense(states[None]).tiled(len(row))


@runs.register
def _dilated(pattern: Dilated, grid: Grid, row: np.ndarray, head: int, tables: Tables) -> Runs:
    first, last = grid.first_query(row) // pattern.length, grid.last_query(row) // pattern.length
    some = first * pattern.length, (last + 1) * pattern.length
    every = (first == last) & (pattern.rate == 1)
    return nested(grid, len(row), some, (some[0], np.where(every, some[1], some[0])))
