"""Rules for patterns made of blocks: tiles of any size over blocks of any other."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnplan.patterns.blocks import Blocks, BlockWindow, RandomBlocks
from attnplan.patterns.tiles.grid import Grid
from attnplan.patterns.tiles.runs import EMPTY, FULL, MAYBE, Runs
from attnplan.patterns.tiles.signatures import Signature, signature
from attnplan.patterns.tiles.states import Tables, nested, runs

_WORD = 60


def _sizes(pattern: Blocks | RandomBlocks) -> tuple[int, int]:
    return pattern.block if isinstance(pattern, Blocks) else (pattern.block_size, pattern.block_size)


def _layout(pattern: Blocks | RandomBlocks, rows: np.ndarray, head: int, tables: Tables) -> Any:
    """Return some rows of the layout as booleans ``[rows, key blocks]``; a row that does not exist keeps nothing."""
    if isinstance(pattern, Blocks):
        layout = pattern.layout()
        kept = layout[head if len(layout) > 1 else 0][np.clip(rows, 0, pattern.rows - 1)]
        return kept & ((rows >= 0) & (rows < pattern.rows))[:, None]
    columns = int(tables[f"{pattern._table}:columns"][0])
    dense = np.zeros((len(rows), columns), dtype=bool)
    np.put_along_axis(dense, pattern.kept(rows, columns * pattern.block_size), True, axis=1)
    return dense


@runs.register(Blocks)
@runs.register(RandomBlocks)
def _layout_runs(pattern: Blocks | RandomBlocks, grid: Grid, row: np.ndarray, head: int, tables: Tables) -> Runs:
    high, wide = _sizes(pattern)
    first, last = grid.first_query(row) // high, grid.last_query(row) // high
    base = int(first[0])
    layout = _layout(pattern, np.arange(base, int(last[-1]) + 1), head, tables)
    below = np.cumsum(layout, axis=0, dtype=np.int32)
    before = np.concatenate([np.zeros((1, layout.shape[1]), dtype=np.int32), below])
    found = before[last - base + 1] - before[first - base]
    some, every = found > 0, found == (last - first + 1)[:, None]
    column = np.arange(grid.columns)
    start, stop = grid.first_key(column), grid.first_key(column) + grid.width(column) - 1
    left, right = start // wide, stop // wide
    any_block = _count_between(some, left, right) > 0
    all_blocks = _count_between(every, left, right) == right - left + 1
    return Runs.dense(np.where(all_blocks, FULL, np.where(any_block, MAYBE, EMPTY)))


def _count_between(kept: np.ndarray, left: np.ndarray, right: np.ndarray) -> Any:
    before = np.cumsum(np.concatenate([np.zeros((len(kept), 1), dtype=np.int32), kept], axis=1, dtype=np.int32), axis=1)
    return before[:, right + 1] - before[:, left]


@signature.register(Blocks)
@signature.register(RandomBlocks)
def _layout_signature(
    pattern: Blocks | RandomBlocks, grid: Grid, q: np.ndarray, k: np.ndarray, head: int, tables: Tables
) -> Signature:
    """Return where block borders lie in the tile, and the bits of the blocks that it touches."""
    high, wide = _sizes(pattern)
    tall, broad = (grid.tile[0] - 1) // high + 2, (grid.tile[1] - 1) // wide + 2
    block, where = np.unique(q // high, return_inverse=True)
    rows = block[:, None] + np.arange(tall)
    distinct, place = np.unique(rows, return_inverse=True)
    layout = np.pad(_layout(pattern, distinct, head, tables), ((0, 0), (0, broad)))
    here = place.reshape(rows.shape)[where]
    bits = layout[here[:, :, None], (k // wide)[:, None, None] + np.arange(broad)].reshape(len(q), -1)
    words = [
        bits[:, i : i + _WORD] @ (1 << np.arange(min(_WORD, bits.shape[1] - i))) for i in range(0, bits.shape[1], _WORD)
    ]
    return [q % high, k % wide, *words]


@runs.register
def _window_runs(pattern: BlockWindow, grid: Grid, row: np.ndarray, head: int, tables: Tables) -> Runs:
    size = pattern.block_size
    first, last = grid.first_query(row) // size, grid.last_query(row) // size
    some = (first - pattern.left) * size, (last + pattern.right + 1) * size
    every = (last - pattern.left) * size, (first + pattern.right + 1) * size
    return nested(grid, len(row), some, every)


@signature.register
def _window_signature(
    pattern: BlockWindow, grid: Grid, q: np.ndarray, k: np.ndarray, head: int, tables: Tables
) -> Signature:
    size = pattern.block_size
    reach = pattern.left + pattern.right + max(grid.tile) // size + 2
    return [q % size, k % size, np.clip(k // size - q // size, -reach, reach)]
