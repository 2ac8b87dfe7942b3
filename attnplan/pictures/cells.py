"""What a picture of a mask shows: the state of every tile of a grid that is coarse enough to be looked at."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import TYPE_CHECKING, Any

import attrs

from attnplan.errors import SpecError
from attnplan.patterns import Pattern, Shape
from attnplan.patterns.operands import static_part

if TYPE_CHECKING:
    import numpy as np

    from attnplan.patterns.tiles import Grid

MAX_CELLS = 512
"""Most tiles along one side of a picture."""
MAX_ASKED = 2**27
"""Most pairs that are asked one by one for one branch: about a second."""
_MAX_TILE_PAIRS = 2**24  # a tile is asked at once, in memory that grows with it
_LEAST_LINES, _MOST_LINES = 8, 1024
EMPTY, PARTIAL, FULL, UNDECIDED = 0, 1, 2, 3
"""No pair meets; some do; all do; no sampled pair does."""


@attrs.frozen(eq=False)
class Cells:
    """The tiles of one branch and head.

    Attributes
    ----------
    grid
        Where they lie.
    state
        int8 ``[rows, columns]``: :data:`EMPTY`, :data:`PARTIAL`, :data:`FULL` or :data:`UNDECIDED`.
    share
        Share of the pairs of each tile that meet, ``[rows, columns]``; of sampled tiles, of the sampled pairs.
    sampled
        Number of tiles whose pairs were sampled; 0 if every state is exact.
    """

    grid: Grid
    state: np.ndarray
    share: np.ndarray
    sampled: int = 0

    def count(self, state: int) -> int:
        """Return the number of tiles in a state."""
        return int((self.state == state).sum())


def tile_size(queries: int, keys: int, cells: int = MAX_CELLS) -> int:
    """Return the smallest power of two at which no side has more than ``cells`` tiles.

    Segments and dilation rates are mostly powers of two, too, and few tiles then differ from one another.

    Examples
    --------
    >>> tile_size(1_000_000, 1_000_000), tile_size(300, 512)
    (2048, 1)
    """
    need = -(-max(queries, keys) // cells)
    return 1 << (need - 1).bit_length()


def region_grid(
    shape: Shape, rows: tuple[int, int] | None = None, keys: tuple[int, int] | None = None, tile: int | None = None
) -> Grid:
    """Return the tiles of a region of the mask.

    Parameters
    ----------
    shape
        Sizes of the attention.
    rows, keys
        First query row and key, and those after the last; all by default.
    tile
        Queries and keys of a tile; by default what :func:`tile_size` gives.

    Raises
    ------
    SpecError
        If the region is empty or not inside the mask, or would have more than 2 * ``MAX_CELLS`` tiles along a side.

    Examples
    --------
    >>> grid = region_grid(Shape(seq_len=1000, kv_len=1024, heads=1), rows=(0, 100), keys=(24, 224))
    >>> grid.q_start, grid.rows, grid.columns
    (24, 100, 200)
    """
    from attnplan.patterns.tiles import Grid

    q, k = rows or (0, shape.seq_len), keys or (0, shape.kv_len)
    for (start, stop), length, what in ((q, shape.seq_len, "rows"), (k, shape.kv_len, "keys")):
        if not 0 <= start < stop <= length:
            raise SpecError(f"{what} {start}:{stop} is no range inside 0:{length}")
    size = tile_size(q[1] - q[0], k[1] - k[0]) if tile is None else tile
    grid = Grid(q[0] + shape.shift, q[1] - q[0], k[0], k[1] - k[0], (size, size))
    if max(grid.rows, grid.columns) > 2 * MAX_CELLS:
        smallest = -(-max(grid.queries, grid.keys) // (2 * MAX_CELLS))
        raise SpecError(
            f"tiles of {size} make {grid.rows} x {grid.columns} cells, more than a picture can show; take tiles of at "
            f"least {smallest}, or a smaller region"
        )
    return grid


def branch_cells(pattern: Pattern, shape: Shape, grid: Grid, head: int) -> Cells:
    """Return the tiles of one branch and head, of batch element 0.

    Conditions on data that arrives with a call count as met. The states are those of the exact block table, unless
    more than :data:`MAX_ASKED` pairs would have to be asked: then tiles that no rule decides are sampled.

    Examples
    --------
    >>> from attnplan.patterns import causal, window
    >>> shape = Shape(seq_len=1024, kv_len=1024, heads=2)
    >>> cells = branch_cells(causal() & window(256), shape, region_grid(shape, tile=128), head=0)
    >>> cells.count(FULL), cells.count(PARTIAL), cells.count(EMPTY)
    (7, 14, 43)
    """
    import numpy as np

    from attnplan.patterns.tiles import block_table

    known = static_part(pattern)
    first = {name: table[:1] for name, table in known.tables(shape).items()}
    rest = _undecided(known, grid, head, {name: table[0] for name, table in first.items()})
    pairs = grid.tile[0] * grid.tile[1]
    if len(rest.example) and (pairs > _MAX_TILE_PAIRS or pairs * len(rest.example) > MAX_ASKED):
        return _sampled(known, grid, head, rest)
    table = block_table(known, shape, grid=grid, heads=[head], operands=first)
    state = np.zeros((grid.rows, grid.columns), dtype=np.int8)
    share = np.zeros((grid.rows, grid.columns), dtype=np.float32)
    row = np.repeat(np.arange(grid.rows), table.kept[0])
    size = grid.height(row) * grid.width(table.column.astype(np.int64))
    state[row, table.column] = np.where(table.full, FULL, PARTIAL)
    share[row, table.column] = np.where(table.full, 1.0, table.pairs / size)
    return Cells(grid, state, share)


@attrs.frozen(eq=False)
class _Undecided:
    """The tiles by rule, and which of those that no rule decides have the same pairs."""

    row: Any
    column: Any
    state: Any
    example: Any
    """Of each kind of undecided tile, the place of one among them."""
    which: Any
    """The kind of each undecided tile."""
    tables: Mapping[str, Any]


def _undecided(pattern: Pattern, grid: Grid, head: int, tables: Mapping[str, Any]) -> _Undecided:
    import numpy as np

    from attnplan.patterns.tiles.runs import FULL as BY_RULE
    from attnplan.patterns.tiles.signatures import classes, signature
    from attnplan.patterns.tiles.states import runs

    row, column, state = runs(pattern, grid, np.arange(grid.rows), head, tables).tiles()
    maybe = state < BY_RULE
    q, k = grid.first_query(row[maybe]), grid.first_key(column[maybe])
    sizes = grid.height(row[maybe]), grid.width(column[maybe])
    example, which = classes([*signature(pattern, grid, q, k, head, tables), *sizes], len(q))
    return _Undecided(row, column, state, example, which, tables)


def _sampled(pattern: Pattern, grid: Grid, head: int, rest: _Undecided) -> Cells:
    import numpy as np

    from attnplan.patterns.tiles.runs import FULL as BY_RULE

    maybe = rest.state < BY_RULE
    lines = min(max(isqrt(MAX_ASKED // len(rest.example)), _LEAST_LINES), _MOST_LINES)
    found = np.empty(len(rest.example))
    at_once = max(1, 2**20 // lines**2)
    row, column = rest.row[maybe][rest.example], rest.column[maybe][rest.example]
    for start in range(0, len(found), at_once):
        here = slice(start, start + at_once)
        q = grid.first_query(row[here])[:, None] + _lines(grid.height(row[here]), lines)
        k = grid.first_key(column[here])[:, None] + _lines(grid.width(column[here]), lines)
        met = pattern.pairs(rest.tables, np.array(head), q[:, :, None], k[:, None, :])
        found[here] = np.broadcast_to(met, (*q.shape, k.shape[1])).mean(axis=(1, 2))
    share = np.zeros((grid.rows, grid.columns), dtype=np.float32)
    state = np.zeros((grid.rows, grid.columns), dtype=np.int8)
    each = np.ones(len(rest.row))
    each[maybe] = found[rest.which]
    share[rest.row, rest.column] = each
    state[rest.row, rest.column] = np.where(maybe, np.where(each > 0, PARTIAL, UNDECIDED), FULL)
    return Cells(grid, state, share, sampled=int(maybe.sum()))


def _lines(size: Any, count: int) -> Any:
    """Return places inside tiles of some sizes: half of them neighbours, to meet dilation, and half spread out."""
    import numpy as np

    near = np.arange(count - count // 2)[None]
    spread = (np.arange(count // 2) + 0.5)[None] * size[:, None] / max(1, count // 2)
    return np.minimum(np.concatenate([near + 0 * size[:, None], spread.astype(np.int64)], axis=1), size[:, None] - 1)


def looks(branches: tuple[Pattern, ...], shape: Shape) -> dict[int, list[int]]:
    """Return the heads by what they look like from afar: the first head of each kind, and all that are like it.

    Examples
    --------
    >>> from attnplan.patterns import heads, window
    >>> looks((heads(0, 2) & window(9) | heads(2, 3),), Shape(seq_len=64, kv_len=64, heads=3))
    {0: [0, 1], 2: [2]}
    """
    import numpy as np

    from attnplan.patterns.tiles import Grid
    from attnplan.patterns.tiles.states import runs

    coarse = tile_size(shape.seq_len, shape.kv_len, cells=64)
    grid = Grid.of(shape, (coarse, coarse))
    known = [static_part(b) for b in branches]
    tables = [{name: t[0] for name, t in b.tables(shape).items()} for b in known]
    first: dict[object, int] = {}
    found: dict[int, list[int]] = {}
    kinds: dict[object, object] = {}
    for head in range(shape.heads):
        key = tuple(b.head_key(head) for b in known)
        if key not in kinds:
            seen = [runs(b, grid, np.arange(grid.rows), head, t) for b, t in zip(known, tables, strict=True)]
            kinds[key] = tuple((r.key.tobytes(), r.state.tobytes()) for r in seen)
        found.setdefault(first.setdefault(kinds[key], head), []).append(head)
    return found
