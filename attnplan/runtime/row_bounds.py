"""The keys that rows see in partial tiles, as ranges, which a mask function compares with."""

from __future__ import annotations

import numpy as np

from attnplan.patterns.tiles import BlockTable

RANGES = 2
"""Most ranges of a row: a mask function reads and compares all of them for every pair."""


def row_bounds(table: BlockTable) -> np.ndarray | None:
    """Return the ranges of keys that each query row sees in the partial tiles of a table.

    Whole and empty tiles between two partial ones do not end a range: in them no mask function is called.

    Parameters
    ----------
    table
        The kept tiles, with their masks.

    Returns
    -------
    numpy.ndarray or None
        (first, behind the last) of two ranges, int32 ``[classes, queries, 4]``, where queries and keys count from the
        first of the grid and unused ranges are empty; None where some row sees more ranges.

    Examples
    --------
    >>> from attnplan.patterns import Shape, window
    >>> from attnplan.patterns.tiles import block_table
    >>> row_bounds(block_table(window(5, 0), Shape(8, 8, 1, 1), (2, 2), masks=True))[0, 6:].tolist()
    [[1, 7, 0, 0], [6, 8, 0, 0]]
    """
    assert table.masks is not None
    tall, wide = table.grid.tile
    lines = (int(table.classes.max()) + 1) * table.grid.rows
    runs = _runs(table.masks)
    if runs is None:
        return None
    bounds = np.zeros((lines, tall, RANGES, 2), dtype=np.int32)
    count = np.zeros((lines, tall), dtype=np.int64)
    reached = np.full(lines, -1, dtype=np.int64)
    for line, column, kind in _turns(table):
        start = column[:, None].astype(np.int64) * wide
        for slot in range(RANGES):
            first, behind = (runs[kind, :, slot, i] + start for i in (0, 1))
            if not _add(bounds, count, line, first, behind, first == start, reached):
                return None
        reached[line] = start[:, 0] + wide
    return bounds.reshape(-1, table.grid.rows * tall, 2 * RANGES)


def _add(
    bounds: np.ndarray,
    count: np.ndarray,
    line: np.ndarray,
    first: np.ndarray,
    behind: np.ndarray,
    opens: np.ndarray,
    reached: np.ndarray,
) -> bool:
    """Add one range to the rows of some lines, where it is not empty; return False where a row has no room for it."""
    last = np.maximum(count[line] - 1, 0)
    row = np.broadcast_to(np.arange(count.shape[1]), last.shape)
    at = (np.broadcast_to(line[:, None], last.shape), row)
    holds = behind > first
    grows = holds & opens & (count[line] > 0) & (bounds[(*at, last, 1)] == reached[line][:, None])
    begins = holds & ~grows
    if (begins & (count[line] == bounds.shape[2])).any():
        return False
    place = np.where(grows, last, np.minimum(count[line], bounds.shape[2] - 1))
    bounds[(*(x[begins] for x in at), place[begins], 0)] = first[begins]
    bounds[(*(x[holds] for x in at), place[holds], 1)] = behind[holds]
    count[line] += begins
    return True


def _turns(table: BlockTable) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return (line, tile column, mask) of the first partial tile of every line, then of the second ..."""
    some = ~table.full
    line = np.repeat(np.arange(len(table.row_ptr) - 1), np.diff(table.row_ptr))[some]
    column, mask = table.column[some], table.kind[some] - 1
    each = np.bincount(line, minlength=len(table.row_ptr) - 1)
    place = np.arange(len(line)) - np.repeat(np.cumsum(each) - each, each)
    order = np.argsort(place, kind="stable")
    ends = np.cumsum(np.bincount(place)) if len(place) else np.zeros(0, dtype=np.int64)
    return [(line[i], column[i], mask[i]) for i in np.split(order, ends[:-1]) if len(i)]


def _runs(masks: np.ndarray) -> np.ndarray | None:
    """Return (first, behind the last) of the runs of each row of each mask, ``[n, queries, 2, 2]``; None if more."""
    count, tall, _ = masks.shape
    edges = np.diff(np.pad(masks.astype(np.int8), ((0, 0), (0, 0), (1, 1))), axis=-1)
    made = np.zeros((count, tall, RANGES, 2), dtype=np.int64)
    for side, sign in enumerate((1, -1)):
        n, row, key = np.nonzero(edges == sign)
        line = n * tall + row
        place = np.arange(len(line)) - np.searchsorted(line, line)
        if (place >= RANGES).any():
            return None
        made[n, row, place, side] = key
    return made
