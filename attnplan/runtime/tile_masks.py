"""Partial tiles for kernels that skip tiles and call a mask function in those that are not whole.

Forward, the mask function looks up in tables which pairs of a tile meet. Backward, no mask function is trusted: whole
tiles go to the kernel's own backward, partial ones are gathered and masked by another kernel. Both get the merged
output and LSE of their rows, so that their sum is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from attnplan.ir import Attend, RowMap
from attnplan.patterns import Shape
from attnplan.patterns.tiles import BlockTable
from attnplan.runtime.row_bounds import row_bounds
from attnplan.runtime.tables import BlockListBuilder, BlockLists, RowBounds, TileMasks
from attnplan.runtime.tiles import TileBuilder, Tiles

BACKWARD = "efficient"
"""The kernel that differentiates partial tiles."""


@attrs.frozen(eq=False)
class SplitTiles:
    """The kept tiles of an attend, whole and partial ones apart."""

    whole: BlockLists
    partial: Tiles


class SplitBuilder(torch.nn.Module):
    """Builds the kept tiles of one attend over whole inputs for its backward.

    Parameters
    ----------
    op, q, k, shape, heads
        As :class:`~attnplan.runtime.tables.BlockListBuilder` takes them.
    group
        Query heads per K/V head.
    """

    def __init__(self, op: Attend, q: RowMap, k: RowMap, shape: Shape, heads: list[int], group: int) -> None:
        super().__init__()
        self.whole = BlockListBuilder(op, q, k, shape, heads)
        self.partial = _PartialTiles(op, q, k, shape, group)
        self._cut: dict[torch.device, tuple[BlockLists, BlockLists]] = {}

    def forward(self, operands: Mapping[str, Any], q: Tensor, k: Tensor) -> SplitTiles:
        """Return the tiles on the device of ``q``; its whole ones are the same tensors in each call."""
        found = self.whole(operands, q, k)
        kept = self._cut.get(q.device)
        if kept is None or kept[0] is not found:
            kept = found, attrs.evolve(found, rows=found.rows.whole, columns=found.columns.whole)
            self._cut[q.device] = kept
        return SplitTiles(kept[1], self.partial(operands, q, k))


class _PartialTiles(TileBuilder):
    def _table(self, tables: Mapping[str, np.ndarray], shift: int, heads: list[int]) -> BlockTable:
        return partial_only(super()._table(tables, shift, heads))


def partial_only(table: BlockTable) -> BlockTable:
    """Return a table without its whole tiles.

    Examples
    --------
    >>> from attnplan.patterns import causal
    >>> from attnplan.patterns.tiles import block_table
    >>> table = block_table(causal(), Shape(8, 8, 1, 1), (4, 4), masks=True)
    >>> table.column.tolist(), partial_only(table).column.tolist(), partial_only(table).row_ptr.tolist()
    ([0, 0, 1], [0, 1], [0, 1, 2])
    """
    some = ~table.full
    before = np.append(0, np.cumsum(some))
    return attrs.evolve(
        table, row_ptr=before[table.row_ptr], column=table.column[some], kind=table.kind[some], pairs=table.pairs[some]
    )


def lookup_tables(table: BlockTable, device: torch.device | str = "cpu") -> TileMasks | RowBounds:
    """Return what a mask function looks up: bounds of rows where two ranges hold all that a row sees, or masks.

    Where heads have tiles of their own it is masks: flash-attn 4's compiler ends in an internal error for bounds that
    depend on the head.

    Examples
    --------
    >>> from attnplan.patterns import causal
    >>> from attnplan.patterns.tiles import block_table
    >>> shape = Shape(4, 4, 1, 1)
    >>> lookup_tables(block_table(causal(), shape, (2, 2), masks=True)).bounds.tolist()
    [[0, 1, 0, 0], [0, 2, 0, 0], [2, 3, 0, 0], [2, 4, 0, 0]]
    """
    assert len(table.classes) == 1, "what depends on the batch element is known with the call only"
    bounds = row_bounds(table) if table.classes.max() == 0 else None
    return _masks(table, device) if bounds is None else RowBounds(torch.from_numpy(bounds[0]).to(device))


def _masks(table: BlockTable, device: torch.device | str) -> TileMasks:
    """Return the mask of every tile, and the masks."""
    assert table.masks is not None
    grid, numbers = table.grid, int(table.classes.max()) + 1
    rows = np.repeat(np.arange(numbers * grid.rows), np.diff(table.row_ptr))
    places = np.zeros((numbers * grid.rows, max(2, grid.columns)), dtype=np.int32)
    places[rows, table.column] = np.maximum(table.kind - 1, 0)
    each = places.reshape(numbers, grid.rows, -1)[table.classes[0]]
    each = each[0] if numbers == 1 else each
    masks = table.masks.astype(np.int32) if len(table.masks) else np.zeros((1, *grid.tile), dtype=np.int32)
    return TileMasks(torch.from_numpy(each).to(device), torch.from_numpy(masks).to(device))


def builder(
    op: Attend, q: RowMap, k: RowMap, shape: Shape, group: int, native: frozenset[str], *, backward: bool
) -> BlockListBuilder | SplitBuilder:
    """Return what builds the lists of tiles for a kernel that skips them: with masks if it calls a mask function."""
    heads = [head for _, head in q.batch_heads()]
    if "tile-masks" not in native:
        return BlockListBuilder(op, q, k, shape, heads)
    return (
        SplitBuilder(op, q, k, shape, heads, group)
        if backward
        else BlockListBuilder(op, q, k, shape, heads, lookup_tables)
    )
