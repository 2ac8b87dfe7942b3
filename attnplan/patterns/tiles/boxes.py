"""Tiles that are boxes of a grid: a neighbourhood visited box by box instead of row by row.

Row by row, a tile of queries spans a strip of the grid, and its neighbours are strips that are mostly of no use. As
boxes, both are near. A neighbourhood is a product of conditions on each dimension, and so are boxes: the table is the
product of small tables, exact, and no pair has to be asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any

import attrs
import numpy as np

from attnplan.patterns.grids import Neighborhood, neighbors
from attnplan.patterns.tiles.grid import Grid
from attnplan.patterns.tiles.table import BlockTable

Box = tuple[int, ...]

_WIDEST = 4096


def visiting_order(sizes: Box, box: Box) -> np.ndarray:
    """Return the positions of a grid in the order in which its boxes are visited, each box row by row.

    Examples
    --------
    >>> visiting_order((2, 4), (2, 2)).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    cut = [n for size, b in zip(sizes, box, strict=True) for n in (size // b, b)]
    axes = (*range(0, len(cut), 2), *range(1, len(cut), 2))
    return np.arange(prod(sizes)).reshape(cut).transpose(axes).reshape(-1)


@attrs.frozen(eq=False)
class _Line:
    """The tiles of one dimension."""

    states: np.ndarray
    """Kind of each tile ``[rows, columns]``: -1 empty, 0 full, else 1 + the place of its mask."""
    pairs: np.ndarray
    masks: np.ndarray
    """``[n, queries, keys]``, the first of them full."""


def _line(pattern: Neighborhood, d: int, size: int, queries: int, keys: int) -> _Line:
    x = np.arange(size)
    first, last = neighbors(x, size, pattern.kernel[d], pattern.dilation[d], pattern.causal[d])
    met = (x >= first[:, None]) & (x <= last[:, None]) & ((x - x[:, None]) % pattern.dilation[d] == 0)
    tiles = met.reshape(size // queries, queries, size // keys, keys).swapaxes(1, 2)
    pairs = tiles.sum(axis=(2, 3))
    full = np.ones((1, queries, keys), dtype=bool)
    partial = (pairs > 0) & (pairs < queries * keys)
    found, which = np.unique(tiles[partial].reshape(-1, queries * keys), axis=0, return_inverse=True)
    states = np.where(pairs == 0, -1, 0)
    states[partial] = 1 + which.reshape(-1)
    return _Line(states, pairs, np.concatenate([full, found.reshape(-1, queries, keys)]))


def boxed_table(pattern: Neighborhood, queries: Box, keys: Box) -> BlockTable:
    """Return the exact block table, masks included, of a neighbourhood visited by boxes of queries and of keys.

    Examples
    --------
    >>> from attnplan.patterns import neighborhood
    >>> boxed_table(neighborhood(3, shape=[8, 8]), (4, 4), (2, 2))
    <BlockTable 36 of 64 tiles of 16x4, 36 partial>
    """
    sizes = pattern.shape
    assert sizes is not None
    lines = [_line(pattern, d, *each) for d, each in enumerate(zip(sizes, queries, keys, strict=True))]
    rows, columns = [line.states.shape[0] for line in lines], [line.states.shape[1] for line in lines]
    row = column = np.zeros(1, dtype=np.int64)
    pairs, kind = np.ones(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    for line in lines:  # every kept tile of the dimensions so far, with every kept tile of this one
        a, b = np.nonzero(line.states >= 0)
        row = (row[:, None] * line.states.shape[0] + a).reshape(-1)
        column = (column[:, None] * line.states.shape[1] + b).reshape(-1)
        pairs = (pairs[:, None] * line.pairs[a, b]).reshape(-1)
        kind = (kind[:, None] * len(line.masks) + line.states[a, b]).reshape(-1)
    order = np.lexsort((column, row))
    distinct, which = np.unique(kind, return_inverse=True)
    masks = np.stack([_product(lines, int(k)) for k in distinct])
    partial = ~masks.all(axis=(1, 2))
    number = np.where(partial, np.cumsum(partial), 0)[which.reshape(-1)]
    n = prod(sizes)
    grid = Grid(0, n, 0, n, (prod(queries), prod(keys)))
    counts = np.bincount(row, minlength=prod(rows))
    assert grid.columns == prod(columns)
    return BlockTable(
        grid,
        np.zeros((1, 1), dtype=np.int64),
        np.append(0, np.cumsum(counts)),
        column[order].astype(np.int32),
        number[order].astype(np.int32),
        pairs[order].astype(np.int32),
        masks[partial],
        0,
    )


def _product(lines: list[_Line], kind: int) -> Any:
    mask = np.ones((1, 1), dtype=bool)
    for line in reversed(lines):
        kind, own = divmod(kind, len(line.masks))
        mask = np.kron(line.masks[own], mask)
    return mask


def kept_boxes(pattern: Neighborhood, queries: Box, keys: Box) -> int:
    """Return the number of tiles that :func:`boxed_table` keeps."""
    assert pattern.shape is not None
    kept = 1
    for d, each in enumerate(zip(pattern.shape, queries, keys, strict=True)):
        kept *= int((_line(pattern, d, *each).states >= 0).sum())
    return kept


def best_boxes(pattern: Neighborhood, tile: tuple[int, int]) -> tuple[Box, Box, int] | None:
    """Return boxes of queries and of keys of at most ``tile`` cells, and their tiles, that run the fewest pairs.

    None if the pattern has one dimension, a dimension is too long, or no box of at least half a tile divides the grid.
    """
    if pattern.shape is None or len(pattern.shape) < 2 or max(pattern.shape) > _WIDEST:
        return None
    best: tuple[float, Box, Box, int] | None = None
    for queries, keys in product(_boxes(pattern.shape, tile[0]), _boxes(pattern.shape, tile[1])):
        kept = kept_boxes(pattern, queries, keys)
        visited = kept * prod(queries) * prod(keys)
        if best is None or visited < best[0]:
            best = visited, queries, keys, kept
    return None if best is None else best[1:]


def _boxes(sizes: Box, cells: int) -> Iterator[Box]:
    """Iterate over boxes that divide a grid, with more than half of ``cells`` and at most all of them; cubes first."""
    divisors = [[b for b in range(1, size + 1) if size % b == 0 and b <= cells] for size in sizes]
    found = [box for box in product(*divisors) if cells < 2 * prod(box) <= 2 * cells]
    found.sort(key=lambda box: max(box) / min(box) / prod(box))
    yield from found[:4]
