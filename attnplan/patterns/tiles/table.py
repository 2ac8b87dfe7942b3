"""Block tables: which tiles of the mask are full, which partial, and how many pairs each has.

Cost: the kept tiles, plus one evaluation of ``pairs`` for every distinct tile that is neither full nor empty by rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import attrs
import numpy as np

from attnplan.errors import SpecError
from attnplan.patterns.base import Pattern, Shape
from attnplan.patterns.tiles.grid import Grid
from attnplan.patterns.tiles.runs import EMPTY, FULL, MAYBE, Runs
from attnplan.patterns.tiles.signatures import classes, signature
from attnplan.patterns.tiles.states import few_runs, runs
from attnplan.units import format_bytes

MAX_BYTES = 256 * 2**20
MAX_PAIRS_ASKED = 2**32
_ROWS_AT_ONCE = 1 << 13
_RULED_AT_ONCE = 1 << 22
_TILES_AT_ONCE = 1 << 16
_PAIRS_AT_ONCE = 1 << 20
_BYTES_PER_TILE = 13


@attrs.frozen(eq=False)
class BlockTable:
    """The kept tiles of a pattern, in compressed rows: one list of columns for each class of heads and tile row.

    Attributes
    ----------
    grid
        Where the tiles lie.
    classes
        Class of each (batch element, head), ``[B or 1, H]``: those of one class have the same tiles.
    row_ptr
        Where the tiles of (class, tile row) begin, ``[classes * rows + 1]``.
    column
        Tile column of each kept tile, rising in every row, int32.
    kind
        0 for a full tile; else 1 + the place of its mask in :attr:`masks`, int32.
    pairs
        Number of pairs in each tile, int32.
    masks
        The distinct partial tiles, bool ``[n, queries, keys]``, False outside the sequence; None if not asked for.
    asked
        Number of pairs that were evaluated one by one to find this out.
    """

    grid: Grid
    classes: np.ndarray
    row_ptr: np.ndarray
    column: np.ndarray
    kind: np.ndarray
    pairs: np.ndarray
    masks: np.ndarray | None
    asked: int

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (self.classes, self.row_ptr, self.column, self.kind, self.pairs, self.masks)
        return sum(a.nbytes for a in arrays if a is not None)

    @property
    def full(self) -> np.ndarray:
        """Whether each kept tile is full."""
        full: np.ndarray = self.kind == 0
        return full

    @property
    def kept(self) -> np.ndarray:
        """Number of kept tiles in each row, ``[classes, rows]``."""
        return np.diff(self.row_ptr).reshape(-1, self.grid.rows)

    def row(self, number: int, row: int) -> slice:
        """Return where the tiles of a class and a tile row are."""
        at = number * self.grid.rows + row
        return slice(int(self.row_ptr[at]), int(self.row_ptr[at + 1]))

    def count_pairs(self) -> int:
        """Return the number of pairs of all heads and batch elements together."""
        ends = self.row_ptr[:: self.grid.rows]
        of_class = np.array([self.pairs[a:b].sum(dtype=np.int64) for a, b in pairwise(ends)])
        return int(of_class[self.classes].sum())

    def states(self, number: int = 0) -> np.ndarray:
        """Return every tile of one class, int8 ``[rows, columns]``: 0 empty, 1 partial, 2 full. For small tables."""
        states = np.zeros((self.grid.rows, self.grid.columns), dtype=np.int8)
        for r in range(self.grid.rows):
            here = self.row(number, r)
            states[r, self.column[here]] = np.where(self.full[here], 2, 1)
        return states

    def __repr__(self) -> str:
        size = "x".join(map(str, self.grid.tile))
        partial = int((self.kind > 0).sum())
        of = int(self.classes.max() + 1) * self.grid.rows * self.grid.columns
        return f"<BlockTable {len(self.column)} of {of} tiles of {size}, {partial} partial>"


def block_table(
    pattern: Pattern,
    shape: Shape,
    tile: tuple[int, int] = (128, 128),
    operands: Mapping[str, Any] | None = None,
    *,
    grid: Grid | None = None,
    heads: Sequence[int] | None = None,
    masks: bool = False,
    max_bytes: int = MAX_BYTES,
) -> BlockTable:
    """Return the exact block table of a pattern.

    Parameters
    ----------
    pattern
        Any pattern of the algebra. A ``mask(fn)`` is evaluated pair by pair; :attr:`BlockTable.asked` says how much.
    shape
        Sizes of the attention.
    tile
        (queries, keys) of a tile.
    operands
        Tables that runtime operands stand for, each ``[B or 1, kv_len]`` by position: ``documents`` the number of the
        document, ``key_padding`` above 0 where the key is real.
    grid
        The rows and keys to look at, if not all of them.
    heads
        The heads to look at, if not all of them.
    masks
        Whether to keep the masks of the partial tiles.
    max_bytes
        Refuse a larger table.

    Raises
    ------
    SpecError
        If the table would be larger than ``max_bytes``, if too many pairs would have to be evaluated one by one, or if
        the pattern needs an operand that is not given.

    Examples
    --------
    >>> from attnplan.patterns import causal, window
    >>> table = block_table(causal() & window(256), Shape(seq_len=1024, kv_len=1024, heads=2))
    >>> table
    <BlockTable 21 of 64 tiles of 128x128, 14 partial>
    >>> table.count_pairs()
    460544
    """
    grid = grid or Grid.of(shape, tile)
    given = dict(operands or {})
    missing = sorted(pattern.operands - set(given))
    if missing:
        raise SpecError(f"the tiles of {pattern!r} depend on what arrives with the call ({', '.join(missing)})")
    raw = {**pattern.tables(shape), **given}
    heads = range(shape.heads) if heads is None else heads
    numbers: dict[tuple[int, object], int] = {}
    batch = max((t.shape[0] for t in raw.values()), default=1)
    of = [[numbers.setdefault((b, pattern.head_key(h)), len(numbers)) for h in heads] for b in range(batch)]
    builder = _Builder(pattern, grid, masks, max_bytes, len(numbers))
    for number, (b, _) in enumerate(numbers):
        tables = {name: t[min(b, t.shape[0] - 1)] for name, t in raw.items()}
        head = heads[of[b].index(number)]
        if number == 0 and len(numbers) > 1:
            builder.check_all(head, tables)
        builder.add(head, tables)
    return builder.table(of)


def kept_tiles(pattern: Pattern, shape: Shape, grid: Grid, heads: Sequence[int]) -> int:
    """Return how many tiles a table would keep at most, all ``heads`` together, without asking any pair.

    Examples
    --------
    >>> from attnplan.patterns import causal
    >>> shape = Shape(seq_len=1024, kv_len=1024, heads=2)
    >>> kept_tiles(causal(), shape, Grid.of(shape, (128, 128)), range(2))
    72
    """
    return sum(alike * found.kept() for alike, found in _of_heads(pattern, shape, grid, heads))


def row_counts(pattern: Pattern, shape: Shape, grid: Grid, heads: Sequence[int]) -> tuple[int, int, int]:
    """Return what rows of a table would hold at most, without asking any pair.

    Returns
    -------
    tuple
        The kept tiles of the fullest row; how many may be partial, all ``heads`` together; and those of the row with
        the most of them.

    Examples
    --------
    >>> from attnplan.patterns import causal, global_tokens
    >>> shape = Shape(seq_len=1024, kv_len=1024, heads=2)
    >>> row_counts(causal(), shape, Grid.of(shape, (128, 128)), range(2))
    (8, 16, 1)
    >>> row_counts(global_tokens(16), shape, Grid.of(shape, (128, 128)), range(2))
    (8, 30, 8)
    """
    fullest = total = most = 0
    for alike, found in _of_heads(pattern, shape, grid, heads):
        row, lengths = found.key // found.columns, found.lengths()
        kept, partial = (
            np.bincount(row, weights=np.where(wanted, lengths, 0), minlength=found.rows).astype(np.int64)
            for wanted in (found.state != EMPTY, found.state == MAYBE)
        )
        total += alike * int(partial.sum())
        fullest, most = max(fullest, int(kept.max(initial=0))), max(most, int(partial.max(initial=0)))
    return fullest, total, most


def _of_heads(pattern: Pattern, shape: Shape, grid: Grid, heads: Sequence[int]) -> Iterator[tuple[int, Runs]]:
    """Iterate over blocks of tile rows of each batch element and class of heads: how many heads have them, and runs."""
    raw = pattern.tables(shape)
    keys = [pattern.head_key(h) for h in heads]
    for b in range(max((t.shape[0] for t in raw.values()), default=1)):
        tables = {name: t[min(b, t.shape[0] - 1)] for name, t in raw.items()}
        for key in dict.fromkeys(keys):
            for _, found in _row_blocks(pattern, grid, heads[keys.index(key)], tables):
                yield keys.count(key), found


def _row_blocks(pattern: Pattern, grid: Grid, head: int, tables: Mapping[str, Any]) -> Iterator[tuple[Any, Runs]]:
    """Iterate over blocks of tile rows with their runs, so that memory stays small."""
    at_once = _ROWS_AT_ONCE
    if not few_runs(pattern):  # a rule may need a byte for every tile
        at_once = max(1, min(at_once, _RULED_AT_ONCE // grid.columns))
    for start in range(0, grid.rows, at_once):
        row = np.arange(start, min(start + at_once, grid.rows))
        yield row, runs(pattern, grid, row, head, tables)


class _Builder:
    """Collects the tiles of one class after the other."""

    def __init__(self, pattern: Pattern, grid: Grid, masks: bool, max_bytes: int, count: int) -> None:
        self.pattern, self.grid, self.max_bytes, self.count = pattern, grid, max_bytes, count
        self.masks: list[Any] | None = [] if masks else None
        self.distinct = self.asked = self.kept = 0
        self.parts: list[tuple[Any, Any, Any, Any]] = []
        """(tiles in each row, column, kind, pairs) of one block of rows each"""

    def add(self, head: int, tables: Mapping[str, Any]) -> None:
        """Add the tiles of one head."""
        for row, found in _row_blocks(self.pattern, self.grid, head, tables):
            self.kept += found.kept()
            self._check_size(self.kept)
            for block in _split(found):
                self.parts.append(self._block(row, block, head, tables))

    def check_all(self, head: int, tables: Mapping[str, Any]) -> None:
        """Refuse before any work if one class is like the others and all of them together are too many."""
        self._check_size(self.count * sum(r.kept() for _, r in _row_blocks(self.pattern, self.grid, head, tables)))

    def _check_size(self, tiles: int) -> None:
        need = tiles * _BYTES_PER_TILE
        if need > self.max_bytes:
            size = "x".join(map(str, self.grid.tile))
            raise SpecError(
                f"the block table of {self.pattern!r} at tile {size} needs {tiles} tiles in {self.count} class(es) of "
                f"heads, {format_bytes(need)}; the limit is {format_bytes(self.max_bytes)}: take larger tiles, or "
                "strategy='lattice' for dilation"
            )

    def _block(self, row: Any, found: tuple[int, Runs], head: int, tables: Mapping[str, Any]) -> Any:
        first, part = found
        grid, row = self.grid, row[first : first + part.rows]
        place, column, state = part.tiles()
        kind = np.zeros(len(column), dtype=np.int32)
        pairs = grid.area(row[place], column)
        asked = np.flatnonzero(state < FULL)
        if len(asked):
            below, right = row[place[asked]], column[asked]
            corners, extents = (grid.first_query(below), grid.first_key(right)), (grid.height(below), grid.width(right))
            pairs[asked], kind[asked] = self._ask(corners, extents, head, tables)
            if not pairs.all():
                kept = pairs > 0
                place, column, kind, pairs = place[kept], column[kept], kind[kept], pairs[kept]
        return np.bincount(place, minlength=len(row)), column.astype(np.int32), kind, pairs

    def _ask(self, corners: Any, extents: Any, head: int, tables: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the number of pairs of some tiles, and their kinds: 0 if full, 1 + place of the mask otherwise."""
        numbers = [*signature(self.pattern, self.grid, corners[0], corners[1], head, tables), *extents]
        example, which = classes(numbers, len(corners[0]))
        tile = self.grid.tile
        self.asked += len(example) * tile[0] * tile[1]
        if self.asked > MAX_PAIRS_ASKED:
            raise SpecError(
                f"the block table of {self.pattern!r} asks over {MAX_PAIRS_ASKED} pairs one by one; use the built-in "
                "patterns, whose tiles are known by rule, or a shorter sequence"
            )
        found, full = np.empty(len(example), dtype=np.int64), np.empty(len(example), dtype=bool)
        kinds = np.zeros(len(example), dtype=np.int32)
        step = max(1, _PAIRS_AT_ONCE // (tile[0] * tile[1]))
        for at in range(0, len(example), step):
            here = slice(at, at + step)
            some = example[here]
            met = self._met(corners, extents, some, head, tables)
            found[here] = met.sum(axis=(1, 2))
            full[here] = found[here] == extents[0][some] * extents[1][some]
            partial = ~full[here] & (found[here] > 0)
            kinds[here][partial] = 1 + self.distinct + np.arange(partial.sum())
            self.distinct += int(partial.sum())
            if self.masks is not None:
                self.masks.append(met[partial])
        return found[which], kinds[which]

    def _met(self, corners: Any, extents: Any, some: Any, head: int, tables: Mapping[str, Any]) -> np.ndarray:
        q, k, height, width = (x[some] for x in (*corners, *extents))
        return tile_pairs(self.pattern, self.grid.tile, q, k, height, width, head, tables)

    def table(self, of: Sequence[Sequence[int]]) -> BlockTable:
        """Return the table."""
        counts, column, kind, pairs = (np.concatenate(x) for x in zip(*self.parts, strict=True))
        masks = None
        if self.masks is not None:
            masks = np.concatenate([np.zeros((0, *self.grid.tile), dtype=bool), *self.masks])
        return BlockTable(
            self.grid, np.array(of), np.append(0, np.cumsum(counts)), column, kind, pairs, masks, self.asked
        )


def _split(found: Runs) -> Iterator[tuple[int, Runs]]:
    """Iterate over (first row, its part) of runs, each part with not too many tiles."""
    lengths = np.where(found.state > 0, found.lengths(), 0)
    row_of_run = found.key // found.columns
    before = np.append(0, np.cumsum(np.bincount(row_of_run, weights=lengths, minlength=found.rows)))
    start = 0
    while start < found.rows:
        stop = max(start + 1, int(np.searchsorted(before, before[start] + _TILES_AT_ONCE, side="right")) - 1)
        inside = slice(*np.searchsorted(row_of_run, [start, stop]))
        yield start, Runs(stop - start, found.columns, found.key[inside] - start * found.columns, found.state[inside])
        start = stop


def tile_pairs(
    pattern: Pattern,
    tile: tuple[int, int],
    q: np.ndarray,
    k: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    head: int,
    tables: Mapping[str, Any],
) -> np.ndarray:
    """Return which pairs meet in some tiles, bool ``[n, *tile]``; False outside their ``height`` and ``width``."""
    i, j = np.arange(tile[0])[None, :, None], np.arange(tile[1])[None, None, :]
    height, width = height[:, None, None], width[:, None, None]
    rows = q[:, None, None] + np.minimum(i, height - 1)
    keys = k[:, None, None] + np.minimum(j, width - 1)
    met = pattern.pairs(tables, np.array(head), rows, keys)
    inside: np.ndarray = np.broadcast_to(met, (len(q), *tile)) & (i < height) & (j < width)
    return inside
