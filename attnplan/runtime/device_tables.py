"""Block tables that follow runtime operands on the device: no host synchronisation, no shape that depends on data.

What is static is found once, in numpy (:mod:`attnplan.patterns.tiles`). The tiles that it keeps are judged anew at each
call against the documents, the padding and the query offset that the call brings: by comparisons of what the first and
last row of a tile are, for every kept tile at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import and_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnplan.errors import SpecError
from attnplan.patterns import Pattern, Shape, full
from attnplan.patterns.bands import Band, Full
from attnplan.patterns.base import conjuncts
from attnplan.patterns.operands import Documents, Padding
from attnplan.patterns.tiles import Grid, block_table
from attnplan.runtime.masks import runtime_tables
from attnplan.runtime.scores import position

EMPTY, PARTIAL, FULL = 0, 1, 2


class TableTensors(NamedTuple):
    """Kept tiles as kernels take them: for each tile row the columns of the partial and of the full tiles, in front.

    All of them int32 of shape ``[B or 1, classes, rows]`` and ``[B or 1, classes, rows, width]``; places behind the
    count hold 0.
    """

    partial_count: Tensor
    partial_columns: Tensor
    full_count: Tensor
    full_columns: Tensor

    def by_columns(self, columns: int) -> TableTensors:
        """Return the same tiles by their columns, of which there are so many."""
        rows = self.partial_count.shape[-1]
        states = self.partial_count.new_zeros((*self.partial_count.shape, columns + 1), dtype=torch.int8)
        for state, count, index in (
            (PARTIAL, self.partial_count, self.partial_columns),
            (FULL, self.full_count, self.full_columns),
        ):
            there = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
            states = states.scatter(-1, torch.where(there, index, columns).long(), state)
        return compacted(torch.arange(rows, device=states.device), states[..., :columns].transpose(-1, -2))


class DeviceTable(torch.nn.Module):
    """The block table of an intersection, part of which arrives with the call. What is static lies on one device.

    A tile is called full only if every condition is full in it, and empty if any condition is empty in it; two partial
    conditions may have no pair in common, and the tile is partial then.

    Parameters
    ----------
    where
        An intersection: static patterns, ``documents()`` and ``padding()``. With ``q_offset`` its static part must be
        bands, whose tiles are judged on the device too.
    shape
        Sizes of the call.
    tile
        (queries, keys) of a tile.
    q_offset
        Whether the position of query row 0 arrives with the call.

    Raises
    ------
    SpecError
        If runtime operands stand inside a union or a complement, or positions that arrive with the call meet a
        condition that is no band.
    """

    def __init__(self, where: Pattern, shape: Shape, tile: tuple[int, int], q_offset: bool = False) -> None:
        super().__init__()
        terms = [t for t in conjuncts(where) if not isinstance(t, Full)]
        self.runtime = tuple(t for t in terms if t.operands)
        fixed = [t for t in terms if not t.operands]
        self.bands = tuple(t for t in fixed if isinstance(t, Band)) if q_offset else ()
        _check(self.runtime, fixed, q_offset)
        self.grid, self.q_offset, self.shape = Grid.of(shape, tile), q_offset, shape
        static = reduce(and_, fixed) if fixed and not q_offset else full()
        columns, states = _padded(static, shape, tile)
        self.columns: Tensor
        self.states: Tensor
        self.register_buffer("columns", torch.from_numpy(columns))
        self.register_buffer("states", torch.from_numpy(states))

    def forward(self, operands: Mapping[str, Tensor]) -> TableTensors:
        """Return the table for the operands of one call, on the device of this module."""
        shift = position(operands["q_offset"], self.columns.device) if self.q_offset else None
        return self.judged(runtime_tables(operands, self.shape.kv_len), shift)

    def judged(self, tables: Mapping[str, Tensor], first_row: Tensor | None) -> TableTensors:
        """Return the table for the tables of runtime operands ``[B or 1, kv_len]`` and positions of query row 0."""
        device, columns, states = self.columns.device, self.columns, self.states
        row = torch.arange(self.grid.rows, device=device).reshape(1, 1, -1, 1)
        first = row * self.grid.tile[0]
        last = (first + self.grid.tile[0]).clamp(max=self.grid.queries) - 1
        shift: Any = self.grid.q_start
        if first_row is not None:
            shift = first_row.reshape(-1, 1, 1, 1)
        queries = (first + shift, last + shift)
        start = columns * self.grid.tile[1]
        keys = (start, (start + self.grid.tile[1]).clamp(max=self.grid.keys) - 1)
        for term in (*self.bands, *self.runtime):
            found = _judge(term, tables, queries, keys)
            states = torch.where(states < found, states, found)  # the minimum; padding stays empty
        return compacted(columns, states)


def _check(runtime: tuple[Pattern, ...], fixed: list[Pattern], q_offset: bool) -> None:
    for term in runtime:
        if not isinstance(term, Documents | Padding):
            raise SpecError(
                f"{term!r} mixes data of the call into a union or complement: its tiles are found on the CPU"
            )
    other = [t for t in fixed if not isinstance(t, Band)]
    if q_offset and other:
        raise SpecError(
            f"with q_offset the tiles of {other[0]!r} are found on the CPU; bands only are judged on the device"
        )


def _padded(static: Pattern, shape: Shape, tile: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return columns and states ``[B or 1, classes, rows, width]`` of the static part, padded with empty tiles."""
    table = block_table(static, shape, tile)
    kept = table.kept
    width = max(1, int(kept.max()))
    place = np.arange(width)
    there = place < kept[..., None]
    index = np.where(there, table.row_ptr[:-1].reshape(kept.shape)[..., None] + place, 0)
    columns = np.where(there, table.column[index] if len(table.column) else 0, 0)
    states = np.where(there, np.where(table.full[index] if len(table.column) else False, FULL, PARTIAL), EMPTY)
    batch = len(table.classes)
    sizes = (batch, -1, *columns.shape[1:])
    return columns.reshape(sizes).astype(np.int32), states.reshape(sizes).astype(np.int8)


def _judge(
    term: Pattern, tables: Mapping[str, Tensor], queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the state of one condition in tiles with these first and last positions, int8."""
    (q0, q1), (k0, k1) = queries, keys
    if isinstance(term, Band):
        some, every = _band(term, q0, q1, k0, k1)
    elif isinstance(term, Documents):
        ids = tables["documents"]
        a, b, c, d = (_look(ids, x) for x in (q0, q1, k0, k1))
        some, every = (a <= d) & (c <= b), (a == b) & (a == c) & (c == d)
    else:
        real = torch.nn.functional.pad(tables["key_padding"].cumsum(1), (1, 0))
        count = _look(real, k1 + 1) - _look(real, k0)
        some, every = count > 0, count == k1 + 1 - k0
    return some.to(torch.int8) + (some & every).to(torch.int8)


def _band(term: Band, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
    some = every = (k0 <= k1) & (q0 <= q1)
    if term.left is not None:
        some, every = some & (k1 >= q0 - term.left), every & (k0 >= q1 - term.left)
    if term.right is not None:
        some, every = some & (k0 <= q1 + term.right), every & (k1 <= q0 + term.right)
    return some, every


def _look(table: Tensor, position: Tensor) -> Tensor:
    """Return ``table[b, position]`` for a table ``[B or 1, n]`` and positions with a batch dimension in front."""
    position = position.long()
    if table.shape[0] == 1:
        return table[0][position]
    batch = torch.arange(table.shape[0], device=table.device).reshape(-1, 1, 1, 1)
    return table[batch, position]


def compacted(columns: Tensor, states: Tensor) -> TableTensors:
    """Bring the columns of partial and of full tiles to the front of their rows, in order, zeros behind them.

    By their place in a running count, and not by sorting, which is slower and which compilers do not fuse.

    Examples
    --------
    >>> found = compacted(torch.tensor([[4, 5, 6]]), torch.tensor([[2, 0, 1]]))
    >>> found.partial_count.tolist(), found.partial_columns.tolist(), found.full_columns.tolist()
    ([1], [[6, 0, 0]], [[4, 0, 0]])
    """
    columns = columns.expand(states.shape).to(torch.int32)
    width = states.shape[-1]
    found = []
    for state in (PARTIAL, FULL):
        kept = states == state
        place = torch.where(kept, kept.cumsum(-1) - 1, width)  # what is not kept goes to one place behind the last
        front = columns.new_zeros((*states.shape[:-1], width + 1)).scatter(-1, place, columns)
        found += [kept.sum(-1, dtype=torch.int32), front[..., :width].contiguous()]
    return TableTensors(*found)
