"""Rules for neighbourhoods on a line, a grid or a volume."""

from __future__ import annotations

from math import prod

import numpy as np

from attnplan.patterns.grids import Neighborhood
from attnplan.patterns.tiles.grid import Grid
from attnplan.patterns.tiles.runs import Runs
from attnplan.patterns.tiles.signatures import Signature, signature
from attnplan.patterns.tiles.states import Tables, runs

_QUERIES_AT_ONCE = 1 << 17


@runs.register
def _runs(pattern: Neighborhood, grid: Grid, row: np.ndarray, head: int, tables: Tables) -> Runs:
    """Return maybe where any query of a row has a run of neighbours, run by run."""
    kv_len = _kv_len(pattern, tables)
    found: list[np.ndarray] = []
    at_once = max(1, _QUERIES_AT_ONCE // grid.tile[0])
    for at in range(0, len(row), at_once):
        some = np.arange(at, min(at + at_once, len(row)))
        height = grid.height(row[some])
        q = (
            np.repeat(grid.first_query(row[some]), height)
            + np.arange(height.sum())
            - np.repeat(np.cumsum(height) - height, height)
        )
        place = np.repeat(some, height)
        for start, stop in pattern.runs(q, kv_len):
            first, end = grid.touched(start, stop)
            ranges = np.stack([place, first, end])
            new = np.append(True, (ranges[:, 1:] != ranges[:, :-1]).any(axis=0))  # neighbours mostly touch the same
            found.append(ranges[:, new])
    place, first, end = np.concatenate(found, axis=1)
    return Runs.maybe(len(row), grid.columns, place, first, end)


def _kv_len(pattern: Neighborhood, tables: Tables) -> int:
    return prod(pattern.shape) if pattern.shape is not None else int(tables["neighborhood:length"][0])


@signature.register
def _signature(pattern: Neighborhood, grid: Grid, q: np.ndarray, k: np.ndarray, head: int, tables: Tables) -> Signature:
    """Return the places inside a slice of the outermost dimension, and how its slices lie to each other and the ends.

    Away from the ends only the distance between slices counts: a tile reaches over few of them.
    """
    sizes = pattern.sizes(_kv_len(pattern, tables))
    inner = prod(sizes[1:])
    border = pattern.kernel[0] * pattern.dilation[0] + max(grid.tile) // inner + 2
    x, y = q // inner, k // inner
    near = [np.minimum(x, border), np.minimum(sizes[0] - 1 - x, border)]
    return [q % inner, k % inner, *near, np.clip(y - x, -2 * border, 2 * border)]
