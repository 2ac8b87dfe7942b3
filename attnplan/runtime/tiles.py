"""Attention over the kept tiles of a block table: keys gathered tile by tile, rows of like counts in one call.

A tile row attends to a list of tiles of keys. Rows with about as many tiles are padded to one count and run as one
batch; a mask is added where a tile is partial, ragged, or padding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnplan.ir import Attend, RowMap
from attnplan.patterns import Shape
from attnplan.patterns.grids import Neighborhood
from attnplan.patterns.tiles import BlockTable, Grid, block_table
from attnplan.patterns.tiles.boxes import boxed_table, visiting_order
from attnplan.runtime.kernels import KERNELS, Request
from attnplan.runtime.tables import tables_by_shift
from attnplan.runtime.views import accumulator

_KEPT_TABLES = 4
_SHARE = 0.8  # rows of one batch have at least this share of the tiles of the fullest
_ELEMENTS = 1 << 22
"""Keys x features of all heads that one batch gathers: what fits a cache."""


@attrs.frozen(eq=False)
class Batch:
    """Tile rows that run as one call."""

    rows: Tensor
    """Tile rows ``[G]``."""
    columns: Tensor
    """Tile columns of each row ``[G, W]``; padding repeats column 0."""
    kinds: Tensor | None
    """Mask of each tile ``[G, W]``: 0 for none, else 1 + its place among :attr:`masks`; None where every pair meets."""
    masks: Tensor
    """Distinct masks ``[n, queries, keys]``, shared by all batches."""

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return 0 where a pair meets and -inf elsewhere, ``[G, 1, queries, W * keys]``; it is large, and not kept."""
        if self.kinds is None:
            return None
        made = self._added(self.kinds, dtype)
        return made.transpose(1, 2).flatten(2, 3).unsqueeze(1)

    def _added(self, kinds: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what is added to each tile, ``[G, W, queries, keys]``."""
        made = torch.zeros((*kinds.shape, *self.masks.shape[1:]), dtype=dtype, device=self.masks.device)
        some = kinds.nonzero(as_tuple=True)
        places, masks = kinds[some] - 1, self.masks
        few = len(places) < len(masks)  # a function has a mask for every tile, of which one batch shows some
        shown = masks[places] if few else masks
        partial = torch.zeros(shown.shape, dtype=dtype, device=shown.device).masked_fill_(~shown, -torch.inf)
        made[some] = partial if few else partial[places]
        return made

    def empty(self) -> Tensor | None:
        """Return which query rows see no key at all, ``[G, 1, queries]``; None if there is none."""
        if self.kinds is None:
            return None
        some = torch.cat([self.masks.new_ones((1, self.masks.shape[1])), self.masks.any(-1)])
        empty = ~some[self.kinds].any(1)
        return empty.unsqueeze(1) if bool(empty.any()) else None


@attrs.frozen(eq=False)
class Heads:
    """Heads that keep the same tiles, and whose K/V heads are equally often used."""

    batch: int | None
    """Batch element; None is all of them."""
    queries: list[int]
    """Query heads, those of one K/V head side by side."""
    keys: list[int]
    """Their K/V heads, each once."""
    batches: tuple[Batch, ...]


@attrs.frozen(eq=False)
class Tiles:
    """What an attend over tiles needs beside its tensors."""

    tile: tuple[int, int]
    heads: tuple[Heads, ...]
    order: tuple[Tensor, Tensor] | None = None
    """Rows of q and of k in the order in which tiles are cut; None is their own."""


class TileBuilder(torch.nn.Module):
    """Builds the tiles of one attend: once where the pattern is static, at each call where operands decide.

    Parameters
    ----------
    op
        The attend, with its tile.
    q, k
        Row maps of queries and keys: neighbouring rows, any heads.
    shape
        Sizes for which static tables are built.
    group
        Query heads per K/V head where q and k are whole inputs ``[B, H, S, D]``; 0 where their axes correspond.
    """

    def __init__(self, op: Attend, q: RowMap, k: RowMap, shape: Shape, group: int) -> None:
        super().__init__()
        self.op, self.q, self.k, self.shape, self.group = op, q, k, shape, group
        self._static = not op.where.operands and op.shift is not None
        self._kept: OrderedDict[torch.device, Tiles] = OrderedDict()
        self.built = 0
        """Number of tables built so far."""

    def forward(self, operands: Mapping[str, Any], q: Tensor, k: Tensor) -> Tiles:
        """Return the tiles for the call's whole q and k, ``[B, H, S, D]`` and ``[B, H_kv, C, D]``."""
        kept = self._kept.get(q.device)
        if kept is not None:
            return kept
        tiles = self._build(operands, k.shape[2], q.shape[0], q.device)
        if self._static:
            self._kept[q.device] = tiles
            if len(self._kept) > _KEPT_TABLES:
                self._kept.popitem(last=False)
        return tiles

    def _build(self, operands: Mapping[str, Any], kv_len: int, batch: int, device: torch.device) -> Tiles:
        self.built += 1
        found: list[Heads] = []
        each = tables_by_shift(operands, self.op.shift, kv_len)
        for b, (shift, tables) in enumerate(each):
            found += self._heads(tables, shift, b if len(each) > 1 else None, device)
        assert self.op.tile is not None
        return Tiles(self.op.tile, tuple(found), self._order(device))

    def _order(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        if self.op.boxes is None:
            return None
        assert isinstance(self.op.where, Neighborhood)
        assert self.op.where.shape is not None
        q, k = (torch.from_numpy(visiting_order(self.op.where.shape, box)).to(device) for box in self.op.boxes)
        return q, k

    def _table(self, tables: Mapping[str, np.ndarray], shift: int, heads: list[int]) -> BlockTable:
        q, k, tile = self.q, self.k, self.op.tile
        assert tile is not None
        if self.op.boxes is None:
            grid = Grid(q.row + shift, q.length, k.row, k.length, tile)
            return block_table(self.op.where, self.shape, tile, tables, grid=grid, heads=heads, masks=True)
        assert isinstance(self.op.where, Neighborhood)
        table = boxed_table(self.op.where, *self.op.boxes)
        return attrs.evolve(table, classes=np.zeros((1, len(heads)), dtype=np.int64))

    def _heads(
        self, tables: Mapping[str, np.ndarray], shift: int, one: int | None, device: torch.device
    ) -> Iterator[Heads]:
        heads = [head for _, head in self.q.batch_heads()]
        table = self._table(tables, shift, heads)
        keys = self._key_heads()
        ready: dict[int, tuple[Batch, ...]] = {}
        for b, classes in enumerate(table.classes):
            batch = one if len(table.classes) == 1 else b
            for number in dict.fromkeys(int(c) for c in classes):
                if number not in ready:
                    ready[number] = tuple(_batches(table, number, len(heads), device))
                members = [h for h, c in enumerate(classes) if c == number]
                for queries, kv_heads in _even_groups(members, keys):
                    yield Heads(batch, queries, kv_heads, ready[number])

    def _key_heads(self) -> list[int]:
        """Return the K/V head, counted over the axes of k, of each query head, counted over those of q."""
        if self.group:
            return [h // self.group for h in range(self.q.elements_count // self.q.length)]
        sizes, shown = [a.size for a in self.q.batch], [a.size for a in self.k.batch]
        places = np.arange(int(np.prod(shown))).reshape(shown)
        return [int(x) for x in np.broadcast_to(places, sizes).reshape(-1)]


def _even_groups(members: Sequence[int], keys: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Split heads by how many of them share a K/V head, so that a kernel's grouped heads can express it."""
    of_key: dict[int, list[int]] = {}
    for h in members:
        of_key.setdefault(keys[h], []).append(h)
    for size in sorted({len(found) for found in of_key.values()}):
        alike = {key: found for key, found in of_key.items() if len(found) == size}
        yield [h for found in alike.values() for h in found], list(alike)


def _batches(table: BlockTable, number: int, heads: int, device: torch.device) -> Iterator[Batch]:
    """Cut the rows of one class into batches, the fullest rows first; rows without a tile are in none."""
    counts = table.kept[number]
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    kinds = _Kinds(table, device)
    start = 0
    while start < len(order):
        width = int(counts[order[start]])
        most = max(1, _ELEMENTS // (width * table.grid.tile[1] * 64 * heads))
        like = np.searchsorted(-counts[order], -_SHARE * width, side="right")
        stop = min(int(like), start + most)
        rows = np.sort(order[start:stop])
        yield kinds.batch(rows, number, width)
        start = stop


class _Kinds:
    """The masks of a table's tiles on a device: full, each partial one, full but ragged, and padding."""

    def __init__(self, table: BlockTable, device: torch.device) -> None:
        assert table.masks is not None
        self.table, self.device = table, device
        queries, keys = table.grid.tile
        ragged = np.broadcast_to(np.arange(keys) < table.grid.width(np.array(table.grid.columns - 1)), (queries, keys))
        extra = np.stack([ragged, np.zeros((queries, keys), dtype=bool)])
        self.ragged, self.padding = len(table.masks) + 1, len(table.masks) + 2
        self.masks = torch.from_numpy(np.concatenate([table.masks, extra])).to(device)

    def batch(self, rows: np.ndarray, number: int, width: int) -> Batch:
        table, keys = self.table, self.table.grid.tile[1]
        starts = table.row_ptr[number * table.grid.rows + rows]
        counts = table.kept[number][rows]
        place = np.arange(width)
        there = place < counts[:, None]
        index = np.where(there, starts[:, None] + place, 0)
        columns = np.where(there, table.column[index], 0)
        kinds = np.where(there, table.kind[index], self.padding)
        if table.grid.keys % keys:
            kinds[(kinds == 0) & (columns == table.grid.columns - 1)] = self.ragged
        made = [torch.from_numpy(x.astype(np.int64)).to(self.device) for x in (rows, columns, kinds)]
        return Batch(made[0], made[1], made[2] if kinds.any() else None, self.masks)


def _unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


class _Tiled:
    """A tensor ``[B, *axes, R, D]`` cut into tiles of rows; heads are counted over all axes."""

    def __init__(self, x: Tensor, tile: int, fill: float = 0.0) -> None:
        flat = x.flatten(1, -3) if x.dim() > 4 else x
        missing = -flat.shape[2] % tile
        whole = F.pad(flat, (0, 0, 0, missing), value=fill) if missing else flat
        self.x = _unflatten(whole, 2, (whole.shape[2] // tile, tile))

    def take(self, batch: int, heads: Sequence[int], tiles: Tensor) -> Tensor:
        """Return some tiles of some heads, ``[G, heads, W * tile, D]`` for tiles ``[G, W]``."""
        some = self.x[batch] if _all_in_order(heads, self.x.shape[1]) else self.x[batch, list(heads)]
        found = _unflatten(some.index_select(1, tiles.reshape(-1)), 1, tiles.shape)
        return found.flatten(2, 3).transpose(0, 1)


def _each(tiles: Tiles, batch: int) -> Iterator[tuple[int, Heads, Batch]]:
    for heads in tiles.heads:
        for b in range(batch) if heads.batch is None else (heads.batch,):
            for part in heads.batches:
                yield b, heads, part


def attend_tiles(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, kernel: str, scale: float) -> tuple[Tensor, Tensor]:
    """Return (output ``[B, *axes, R, Dv]``, LSE ``[B, *axes, R]``) of attention over kept tiles."""
    if tiles.order is not None:
        (by_q, by_k), plain = tiles.order, attrs.evolve(tiles, order=None)
        q, k, v = q.index_select(-2, by_q), k.index_select(-2, by_k), v.index_select(-2, by_k)
        out, lse = attend_tiles(q, k, v, plain, kernel, scale)
        back = by_q.argsort()
        return out.index_select(-2, back), lse.index_select(-1, back)
    tall, wide = tiles.tile
    cut_q, cut_k, cut_v = _Tiled(q, tall), _Tiled(k, wide), _Tiled(v, wide)
    b, h, r = cut_q.x.shape[:3]
    wider = accumulator(q.dtype)
    out = q.new_zeros((b, h, r, tall, v.shape[-1]))
    lse = q.new_full((b, h, r, tall), -torch.inf, dtype=wider)
    for at, heads, part in _each(tiles, b):
        found = KERNELS[kernel].forward(
            cut_q.take(at, heads.queries, part.rows.unsqueeze(1)),
            cut_k.take(at, heads.keys, part.columns),
            cut_v.take(at, heads.keys, part.columns),
            Request(scale, mask=part.bias(q.dtype)),
        )
        empty = part.empty()
        if empty is not None:
            found = (found[0].masked_fill(empty.unsqueeze(-1), 0), found[1].masked_fill(empty, -torch.inf))
        index = torch.tensor(heads.queries, device=q.device).unsqueeze(1), part.rows
        out[at][index] = found[0].transpose(0, 1)
        lse[at][index] = found[1].transpose(0, 1)
    sizes = q.shape[1:-2]
    rows = q.shape[-2]
    return _unflatten(out.flatten(2, 3)[:, :, :rows], 1, sizes), _unflatten(lse.flatten(2, 3)[:, :, :rows], 1, sizes)


def attend_tiles_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tiles, kernel: str, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v from the merged output and LSE of the rows, in the shapes of q, k and v."""
    if tiles.order is not None:
        (by_q, by_k), plain = tiles.order, attrs.evolve(tiles, order=None)
        grad, q, out = (x.index_select(-2, by_q) for x in (grad, q, out))
        k, v, lse = k.index_select(-2, by_k), v.index_select(-2, by_k), lse.index_select(-1, by_q)
        dq, dk, dv = attend_tiles_backward(grad, q, k, v, out, lse, plain, kernel, scale)
        back_q, back_k = by_q.argsort(), by_k.argsort()
        return dq.index_select(-2, back_q), dk.index_select(-2, back_k), dv.index_select(-2, back_k)
    tall, wide = tiles.tile
    cut_k, cut_v = _Tiled(k, wide), _Tiled(v, wide)
    cut = [_Tiled(x, tall) for x in (grad, q, out)]
    cut_lse = _Tiled(lse.unsqueeze(-1), tall, torch.inf)  # rows that do not exist get weights of 0
    wider = accumulator(q.dtype)
    totals = [torch.zeros(x.x.shape, dtype=wider, device=q.device) for x in (cut[1], cut_k, cut_v)]

    def add(at: int, heads: Heads, part: Batch) -> None:  # a function, so that nothing of one batch outlives it
        rows = part.rows.unsqueeze(1)
        some_grad, some_q, some_out = (x.take(at, heads.queries, rows) for x in cut)
        gradients = KERNELS[kernel].backward(
            some_grad,
            some_q,
            cut_k.take(at, heads.keys, part.columns),
            cut_v.take(at, heads.keys, part.columns),
            some_out,
            cut_lse.take(at, heads.queries, rows).squeeze(-1),
            Request(scale, mask=part.bias(q.dtype)),
        )
        for total, found, members, places in zip(
            totals, gradients, (heads.queries, heads.keys, heads.keys), (rows, part.columns, part.columns), strict=True
        ):
            _add_tiles(total[at], found, members, places)

    for at, heads, part in _each(tiles, q.shape[0]):
        add(at, heads, part)
    dq, dk, dv = (
        _unflatten(t.flatten(2, 3)[:, :, : x.shape[-2]], 1, x.shape[1:-2])
        for t, x in zip(totals, (q, k, v), strict=True)
    )
    return dq, dk, dv


def _all_in_order(heads: Sequence[int], count: int) -> bool:
    return list(heads) == list(range(count))


def _add_tiles(total: Tensor, found: Tensor, members: Sequence[int], places: Tensor) -> None:
    """Add gradients ``[G, heads, W * tile, D]`` to the tiles of ``total`` ``[H, tiles, tile, D]`` that they are of."""
    tiles = _unflatten(found.transpose(0, 1), 2, (places.shape[1], total.shape[2])).flatten(1, 2).to(total.dtype)
    if _all_in_order(members, total.shape[0]):
        total.index_add_(1, places.reshape(-1), tiles)
        return
    for head, one in zip(members, tiles, strict=True):
        total[head].index_add_(0, places.reshape(-1), one)
