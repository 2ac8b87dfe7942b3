"""Rules for patterns that repeat along the sequence."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnplan.patterns.strides import Columns, Strided
from attnplan.patterns.tiles.grid import Grid
from attnplan.patterns.tiles.runs import EMPTY, FULL, MAYBE, Runs
from attnplan.patterns.tiles.signatures import Signature, signature, slices
from attnplan.patterns.tiles.states import Tables, runs


@runs.register
def _columns_runs(pattern: Columns, grid: Grid, row: np.ndarray, head: int, tables: Tables) -> Runs:
    column = np.arange(grid.columns)
    start, width = grid.first_key(column), grid.width(column)
    found = _listed_below(pattern, start + width) - _listed_below(pattern, start)
    states = np.where(found == width, FULL, np.where(found > 0, MAYBE, EMPTY))
    return Runs.dense(states[None]).tiled(len(row))


def _listed_below(pattern: Columns, position: np.ndarray) -> Any:
    """Return how many listed keys lie before each position."""
    indices = np.asarray(pattern.indices)
    if pattern.every is None:
        return np.searchsorted(indices, position)
    whole, rest = np.divmod(position, pattern.every)
    return whole * len(indices) + np.searchsorted(indices, rest)


@signature.register
def _columns(pattern: Columns, grid: Grid, q: np.ndarray, k: np.ndarray, head: int, tables: Tables) -> Signature:
    if pattern.every is not None:
        return [k % pattern.every]
    return [slices(np.asarray(pattern.indices), k, grid.tile[1])]


@signature.register
def _strided(pattern: Strided, grid: Grid, q: np.ndarray, k: np.ndarray, head: int, tables: Tables) -> Signature:
    return [(k - q) % pattern.stride]
