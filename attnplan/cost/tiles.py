"""How many tiles an attend over tiles runs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import attrs

from attnplan.ir import Attend, RowMap
from attnplan.patterns import Pattern, Shape, documents, full
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
    from attnplan.patterns.tiles import kept_tiles  # numpy is needed only here

    assert op.tile is not None
    if op.boxes is not None:
        from attnplan.patterns.tiles.boxes import kept_boxes

        assert isinstance(op.where, Neighborhood)
        return kept_boxes(op.where, *op.boxes) * (q.elements_count // q.length)
    return kept_tiles(*_tiled(op, q, k, spec))


@attrs.frozen
class Rows:
    """What the rows of tiles of an attend may hold."""

    fullest: int
    """Tiles that one of them keeps at most."""
    partial: int = 0
    """Tiles that are compared pair by pair, in all heads of one batch element."""
    most_partial: int = 0
    """The same in one row at most."""


@lru_cache(maxsize=1024)
def tile_rows(op: Attend, q: RowMap, k: RowMap, spec: AttentionSpec) -> Rows:
    """Return what rows of tiles may hold: all tiles, and none that is known to be partial, where only calls say."""
    from attnplan.patterns.tiles.table import row_counts

    assert op.tile is not None
    if op.boxes is not None or op.shift is None:
        return Rows(-(-k.length // op.tile[1]))
    return Rows(*row_counts(*_tiled(op, q, k, spec)))


def _tiled(op: Attend, q: RowMap, k: RowMap, spec: AttentionSpec) -> tuple[Pattern, Shape, Any, list[int]]:
    """Return the pattern of an attend as a price takes it, one batch element's shape, the grid of tiles, the heads."""
    from attnplan.patterns.tiles import Grid

    assert op.tile is not None
    shape = spec.shape
    where = static_part(op.where) if op.shift is not None else full()
    if "documents" in op.where.operands:
        where = where & _equal_documents(shape.kv_len)
    grid = Grid(q.row + (shape.shift if op.shift is None else op.shift), q.length, k.row, k.length, op.tile)
    return where, attrs.evolve(shape, batch=1), grid, [head for _, head in q.batch_heads()]


_GATHERED = 1 << 22
"""Keys x features of all heads that one batch of tiles gathers, as in ``runtime/tiles.py``."""
_OPERATORS, _OF_WHOLE = 20, 11
"""Operators that one batch of tiles takes, and one of whole tiles, for which no mask is made."""


def launches_of_tiles(rows: int, kept: float, heads: int, tile: tuple[int, int], *, whole: bool = False) -> int:
    """Return the operators for tiles that are gathered, a batch of tile rows at a time; ``whole`` ones have no mask."""
    tile_rows = max(1, -(-rows // tile[0]))
    width = max(1.0, kept / heads / tile_rows)
    at_once = max(1, int(_GATHERED / (width * tile[1] * 64 * heads)))
    return (_OF_WHOLE if whole else _OPERATORS) * (1 + -(-tile_rows // at_once))
