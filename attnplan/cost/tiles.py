"""How many tiles an attend over tiles runs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import attrs

from attnplan.ir import Attend, RowMap
from attnplan.patterns import Pattern, documents, full
from attnplan.patterns.grids import Neighborhood
from attnplan.patterns.operands import static_part
from attnplan.spec import AttentionSpec

DOCUMENTS = 8


def _equal_documents(length: int) -> Pattern:
    count = min(DOCUMENTS, length)
    return documents([length // count + (i < length % count) for i in range(count)])


@lru_cache(maxsize=1024)
def attend_tiles(op: Attend, q: RowMap, k: RowMap, spec: AttentionSpec) -> int:
    """Return the number of tiles that an attend runs, in all heads of one batch element.

    What calls will bring is not known when a plan is priced: ``documents()`` counts as :data:`DOCUMENTS` of equal
    length, padding and query offsets leave out nothing.
    """
    from attnplan.patterns.tiles import Grid, kept_tiles  # numpy is needed only here

    assert op.tile is not None
    if op.boxes is not None:
        from attnplan.patterns.tiles.boxes import kept_boxes

        assert isinstance(op.where, Neighborhood)
        return kept_boxes(op.where, *op.boxes) * (q.elements_count // q.length)
    shape = spec.shape
    grid = Grid(q.row + (shape.shift if op.shift is None else op.shift), q.length, k.row, k.length, op.tile)
    where = static_part(op.where) if op.shift is not None else full()
    if "documents" in op.where.operands:
        where = where & _equal_documents(shape.kv_len)
    return kept_tiles(where, attrs.evolve(shape, batch=1), grid, [head for _, head in q.batch_heads()])


@lru_cache(maxsize=1024)
def fullest_row(op: Attend, q: RowMap, k: RowMap, spec: AttentionSpec) -> int:
    """Return the most tiles that one row of tiles of an attend may keep."""
    from attnplan.patterns.tiles.table import row_counts

    assert op.tile is not None
    known = _known(op, q, k, spec)
    return -(-k.length // op.tile[1]) if known is None else row_counts(*known)


@lru_cache(maxsize=1024)
def partial_tiles(op: Attend, q: RowMap, k: RowMap, spec: AttentionSpec) -> tuple[int, int]:
    """Return how many tiles an attend compares pair by pair: in all heads of one batch element, and in one row at most.

    None are counted where calls say where the tiles lie.
    """
    from attnplan.patterns.tiles import table

    known = _known(op, q, k, spec)
    return (0, 0) if known is None else table.partial_tiles(*known)


def _known(op: Attend, q: RowMap, k: RowMap, spec: AttentionSpec) -> tuple[Pattern, Any, Any, list[int]] | None:
    """Return the pattern of an attend, the shape of one batch element, its grid of tiles and its heads, if known."""
    from attnplan.patterns.tiles import Grid

    if op.boxes is not None or op.shift is None:
        return None
    assert op.tile is not None
    where = static_part(op.where)
    if "documents" in op.where.operands:
        where = where & _equal_documents(spec.shape.kv_len)
    grid = Grid(q.row + op.shift, q.length, k.row, k.length, op.tile)
    return where, attrs.evolve(spec.shape, batch=1), grid, [head for _, head in q.batch_heads()]


_GATHERED = 1 << 22
"""Keys x features of all heads that one batch of tiles gathers, as in ``runtime/tiles.py``."""
_OPERATORS = 20
"""Operators that one batch of tiles takes."""


def launches_of_tiles(rows: int, kept: float, heads: int, tile: tuple[int, int]) -> int:
    """Return the operators for tiles that are gathered, a batch of tile rows at a time."""
    tile_rows = max(1, -(-rows // tile[0]))
    width = max(1.0, kept / heads / tile_rows)
    at_once = max(1, int(_GATHERED / (width * tile[1] * 64 * heads)))
    return _OPERATORS * (1 + -(-tile_rows // at_once))
