"""Block tables in the forms that kernels take: index lists, FlexAttention's ``BlockMask``, and block-sparse rows.

Every conversion has an inverse that reads the states of tiles back: 0 empty, 1 partial, 2 full.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from torch import Tensor

from attnplan.ir import Attend, RowMap
from attnplan.patterns import Shape
from attnplan.patterns.tiles import BlockTable, Grid, block_table
from attnplan.runtime.masks import runtime_tables

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_KEPT_LISTS = 4

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@attrs.frozen(eq=False)
class Lists:
    """Columns of the kept tiles of each row, in front; int32 ``[B or 1, H or 1, rows]`` and ``[..., rows, width]``.

    The lists are as wide as the fullest row, and places behind a count hold 0.
    """

    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor
    full_index: Tensor

    def states(self, columns: int) -> Tensor:
        """Return the state of every tile, int8 ``[B or 1, H or 1, rows, columns]``."""
        shape = (*self.partial_count.shape, columns + 1)
        found = torch.zeros(shape, dtype=torch.int8, device=self.partial_count.device)
        for state, count, index in ((1, self.partial_count, self.partial_index), (2, self.full_count, self.full_index)):
            there = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
            found.scatter_(-1, torch.where(there, index, columns).long(), state)
        return found[..., :columns]

    @property
    def whole(self) -> Lists:
        """The lists without partial tiles."""
        none = torch.zeros_like(self.partial_index[..., :1])
        return Lists(torch.zeros_like(self.partial_count), none, self.full_count, self.full_index)


@attrs.frozen(eq=False)
class TileMasks:
    """What a mask function looks up in partial tiles."""

    places: Tensor
    """The mask of each tile, int32 ``[rows, columns]``, or ``[H, rows, columns]`` where heads differ; 0 where the tile
    is whole or empty. There are two columns at least, so that its strides say which dimension is which."""
    masks: Tensor
    """Distinct masks, int32 ``[n, queries, keys]``: 1 where a pair meets."""


@attrs.frozen(eq=False)
class RowBounds:
    """What a mask function compares with, where a query row sees at most two ranges of keys in partial tiles."""

    bounds: Tensor
    """(first, behind the last) of both ranges, int32 ``[queries, 4]``, for heads that share their tiles. They say
    nothing of whole and empty tiles, in which no mask function is called."""


@attrs.frozen(eq=False)
class BlockLists:
    """The kept tiles of an attend, by tiles of queries for the forward and by tiles of keys for the backward."""

    tile: tuple[int, int]
    rows: Lists
    columns: Lists
    masks: TileMasks | RowBounds | None = None
    """What tells the pairs of partial tiles, for kernels that call a mask function."""


def lists(states: np.ndarray, device: torch.device | str = "cpu") -> Lists:
    """Return index lists of dense states ``[B, H, rows, columns]``; for tables of modest size.

    Examples
    --------
    >>> found = lists(np.array([[[[2, 0, 1], [0, 0, 0]]]], dtype=np.int8))
    >>> found.full_count.tolist(), found.full_index.tolist(), found.partial_index.tolist()
    ([[[1, 0]]], [[[[0], [0]]]], [[[[2], [0]]]])
    """
    made: list[Tensor] = []
    for state in (1, 2):
        kept = states == state
        count = kept.sum(-1)
        width = max(1, int(count.max(initial=0)))
        order = np.argsort(~kept, axis=-1, kind="stable")[..., :width]
        index = np.where(np.arange(order.shape[-1]) < count[..., None], order, 0)
        made += [torch.from_numpy(x.astype(np.int32)).to(device) for x in (count, index)]
    return Lists(*made)


def block_lists(table: BlockTable, device: torch.device | str = "cpu") -> BlockLists:
    """Return the index lists of a table in both directions, for every (batch element, head).

    Classes are expanded to heads; where all heads are of one class, their dimension has size 1 and broadcasts.
    """
    dense = np.stack([table.states(n) for n in range(int(table.classes.max()) + 1)])
    classes = table.classes
    if (classes == classes[:, :1]).all():
        classes = classes[:, :1]
    by_rows = lists(dense[classes], device)
    by_columns = lists(np.swapaxes(dense, 1, 2)[classes], device)
    return BlockLists(table.grid.tile, by_rows, by_columns)


def tables_by_shift(
    operands: Mapping[str, Any], shift: int | None, kv_len: int
) -> list[tuple[int, dict[str, np.ndarray]]]:
    """Return positions of query row 0 with the runtime tables for them: one, or one for each batch element.

    ``shift`` is the position where it is known; otherwise the operand ``q_offset`` has one for all, or one for each.

    Examples
    --------
    >>> operands = {"q_offset": torch.tensor([3, 1]), "documents": torch.tensor([0, 2, 4])}
    >>> tables_by_shift(operands, None, 4)
    [(3, {'documents': array([[0, 0, 1, 1]], dtype=int32)}), (1, {'documents': array([[0, 0, 1, 1]], dtype=int32)})]
    """
    tables = {name: t.cpu().numpy() for name, t in runtime_tables(operands, kv_len).items()}
    if shift is not None:
        return [(shift, tables)]
    shifts = torch.as_tensor(operands["q_offset"]).reshape(-1).tolist()
    if len(shifts) == 1:
        return [(shifts[0], tables)]
    return [(one, {n: t[min(b, len(t) - 1)][None] for n, t in tables.items()}) for b, one in enumerate(shifts)]


def to_block_mask(table: BlockTable, mask_mod: MaskFunction, device: torch.device | str = "cpu") -> BlockMask:
    """Return FlexAttention's ``BlockMask`` of a table, made from index lists and not from a dense mask.

    Parameters
    ----------
    table
        Its tile becomes ``BLOCK_SIZE``.
    mask_mod
        ``(batch, head, query row, key row) -> bool``, which FlexAttention evaluates in partial tiles.

    References
    ----------
    ``torch.nn.attention.flex_attention.BlockMask.from_kv_blocks``.
    """
    from torch.nn.attention.flex_attention import BlockMask

    made = block_lists(table, device).rows
    width = max(made.partial_index.shape[-1], made.full_index.shape[-1])

    def wide(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[-1]))

    return BlockMask.from_kv_blocks(
        made.partial_count,
        wide(made.partial_index),
        made.full_count,
        wide(made.full_index),
        BLOCK_SIZE=table.grid.tile,
        mask_mod=mask_mod,
        seq_lengths=(table.grid.queries, table.grid.keys),
        compute_q_blocks=False,
    )


def from_block_mask(mask: BlockMask) -> Tensor:
    """Return the states of the tiles of a ``BlockMask``, int8 ``[B, H, rows, columns]``."""
    full_count, full_index = mask.full_kv_num_blocks, mask.full_kv_indices
    if full_count is None or full_index is None:
        full_count, full_index = torch.zeros_like(mask.kv_num_blocks), mask.kv_indices
    found = Lists(mask.kv_num_blocks, mask.kv_indices, full_count, full_index)
    return found.states(-(-mask.seq_lengths[1] // mask.BLOCK_SIZE[1]))


def to_bsr(table: BlockTable, number: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return one class of a table as block-sparse rows: row pointers, columns, and which tiles are full.

    Int32 ``[rows + 1]``, int32 ``[kept]`` and bool ``[kept]``, as FlashInfer's block-sparse wrapper takes the first
    two.
    """
    first, last = number * table.grid.rows, (number + 1) * table.grid.rows
    pointers = table.row_ptr[first : last + 1]
    kept = slice(int(pointers[0]), int(pointers[-1]))
    return (
        torch.from_numpy((pointers - pointers[0]).astype(np.int32)),
        torch.from_numpy(table.column[kept].astype(np.int32)),
        torch.from_numpy(table.full[kept].copy()),
    )


def from_bsr(pointers: Tensor, columns: Tensor, full: Tensor, count: int) -> Tensor:
    """Return the states of block-sparse rows, int8 ``[rows, count]``."""
    found = torch.zeros((len(pointers) - 1, count), dtype=torch.int8)
    rows = torch.repeat_interleave(torch.arange(len(pointers) - 1), pointers.diff().long())
    found[rows, columns.long()] = torch.where(full, 2, 1).to(torch.int8)
    return found


class BlockListBuilder(torch.nn.Module):
    """Builds the index lists of one attend over whole inputs, once for each device; with ``look_up`` masks, too."""

    def __init__(
        self,
        op: Attend,
        q: RowMap,
        k: RowMap,
        shape: Shape,
        heads: list[int],
        look_up: Callable[[BlockTable, torch.device], TileMasks | RowBounds] | None = None,
    ) -> None:
        super().__init__()
        self.op, self.q, self.k, self.shape, self.heads, self.look_up = op, q, k, shape, heads, look_up
        self._kept: OrderedDict[torch.device, BlockLists] = OrderedDict()

    def forward(self, operands: Mapping[str, Any], q: Tensor, k: Tensor) -> BlockLists:
        """Return the lists on the device of ``q``."""
        kept = self._kept.get(q.device)
        if kept is None:
            assert self.op.tile is not None
            assert self.op.shift is not None
            grid = Grid(self.q.row + self.op.shift, self.q.length, self.k.row, self.k.length, self.op.tile)
            masks = self.look_up is not None
            table = block_table(self.op.where, self.shape, self.op.tile, grid=grid, heads=self.heads, masks=masks)
            kept = block_lists(table, q.device)
            kept = kept if self.look_up is None else attrs.evolve(kept, masks=self.look_up(table, q.device))
            self._kept[q.device] = kept
            if len(self._kept) > _KEPT_LISTS:
                self._kept.popitem(last=False)
        return kept
