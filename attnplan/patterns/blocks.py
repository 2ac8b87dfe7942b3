"""Patterns made of blocks of positions: explicit layouts, windows of blocks and random blocks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from attnplan.errors import SpecError
from attnplan.patterns.base import Array, Pattern, Shape, digest, require, require_int

if TYPE_CHECKING:
    import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _positions_for_queries(shape: Shape, what: str) -> None:
    require(
        shape.seq_len <= shape.kv_len,
        f"{what} need a position for every query: seq_len={shape.seq_len} exceeds kv_len={shape.kv_len}",
    )


def _bit(table: Array, index: Array) -> Array:
    """Return bit ``index`` of packed bytes, as booleans."""
    return (table[index >> 3] >> (index & 7)) & 1 > 0


def _shell(row: Array, column: Array) -> Array:
    """Return the number of a block, counted shell by shell around block (0, 0): it does not depend on the width."""
    ahead = column - row
    largest = row + ahead * (ahead > 0)
    return largest * largest + largest - ahead


def _edges(rows: np.ndarray, size: int, stop: int) -> np.ndarray:
    """Return where each row of a layout changes, ``[rows, width]`` key positions, padded with ``stop``."""
    import numpy as np

    changes = np.diff(rows, axis=1, prepend=False, append=False)
    row, column = np.nonzero(changes)
    count = changes.sum(axis=1)
    edges = np.full((len(rows), count.max(initial=0)), stop, dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(count)[:-1]])
    edges[row, np.arange(len(row)) - first[row]] = column * size
    return edges


@attrs.frozen(cache_hash=True, repr=False)
class Blocks(Pattern):
    """The pairs of the blocks that a layout keeps. Equal to another if the layouts are equal bit by bit."""

    bits: bytes
    """Of each head, the layout row by row, eight blocks per byte, the first in the lowest bit."""
    shape: tuple[int, ...]
    """``(rows, columns)``, or ``(heads, rows, columns)``."""
    block: tuple[int, int]
    """Positions per block of queries and of keys."""
    _name: str = attrs.field(init=False, eq=False)
    _classes: tuple[int, ...] = attrs.field(init=False, eq=False)
    """For each head, the first head with the same layout."""

    def __attrs_post_init__(self) -> None:
        head_bytes = self._head_bytes
        parts = [self.bits[i : i + head_bytes] for i in range(0, len(self.bits), head_bytes)]
        first: dict[bytes, int] = {}
        classes = tuple(first.setdefault(part, h) for h, part in enumerate(parts))
        name = hashlib.blake2b(self.bits, digest_size=6).hexdigest()
        object.__setattr__(self, "_classes", classes)
        object.__setattr__(self, "_name", f"blocks:{name}:{digest((self.shape, self.block))}")

    @property
    def rows(self) -> int:
        """Number of query blocks."""
        return self.shape[-2]

    @property
    def columns(self) -> int:
        """Number of key blocks."""
        return self.shape[-1]

    @property
    def _head_bytes(self) -> int:
        return _ceil(self.rows * self.columns, 8)

    def layout(self) -> np.ndarray:
        """Return the layout as booleans ``[heads or 1, rows, columns]``."""
        import numpy as np

        packed = np.frombuffer(self.bits, dtype=np.uint8).reshape(-1, self._head_bytes)
        flat = np.unpackbits(packed, axis=1, count=self.rows * self.columns, bitorder="little")
        return flat.reshape(-1, self.rows, self.columns) > 0

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        inside = (q >= 0) & (q < self.rows * self.block[0])
        index = q * inside // self.block[0] * self.columns + k // self.block[1]
        if len(self.shape) == 3:
            index = index + h * (8 * self._head_bytes)
        return _bit(tables[self._name], index) & inside

    def tables(self, shape: Shape) -> dict[str, np.ndarray]:
        import numpy as np

        return {self._name: np.frombuffer(self.bits, dtype=np.uint8)[None].copy()}  # torch wants it writable

    def check(self, shape: Shape) -> None:
        _positions_for_queries(shape, "blocks")
        need = tuple(_ceil(shape.kv_len, size) for size in self.block)
        require(
            self.shape[-2:] == need,
            f"blocks has a layout of {self.rows} x {self.columns} blocks; blocks of {self.block[0]} x {self.block[1]} "
            f"over kv_len={shape.kv_len} positions need {need[0]} x {need[1]}. Rows stand for positions, not for query "
            "rows: query row i has position i + kv_len - seq_len",
        )
        require(
            self.shape[:-2] in ((), (shape.heads,)),
            f"blocks has a layout for {self.shape[0]} heads, the spec has heads={shape.heads}; give one per head, or "
            "one for all",
        )

    def head_key(self, h: int) -> tuple[object, ...]:
        return (self._classes[h],) if len(self.shape) == 3 else ()

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        import numpy as np

        block, where = np.unique(q // self.block[0], return_inverse=True)
        rows = self.layout()[:, np.clip(block, 0, self.rows - 1)]
        edges = np.concatenate([_edges(head, self.block[1], kv_len) for head in rows], axis=1)
        return list(edges[where].T)

    def __repr__(self) -> str:
        return f'blocks("{self._text()}", {self.block[0] if len(set(self.block)) == 1 else list(self.block)})'

    def _text(self) -> str:
        import numpy as np

        cells = np.full((*self.layout().shape[:2], self.columns + 1), ord("/"), dtype=np.uint8)
        cells[..., :-1] = self.layout() + ord("0")
        return "|".join(head.tobytes()[:-1].decode() for head in cells)


@attrs.frozen(cache_hash=True, repr=False)
class BlockWindow(Pattern):
    """Keys from ``left`` blocks before the query's block to ``right`` blocks after it, both included."""

    block_size: int
    left: int
    right: int

    def __attrs_post_init__(self) -> None:
        require_int(self.block_size, "block size", 1)
        require_int(self.left, "block_window left", 0)
        require_int(self.right, "block_window right", 0)

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        row, column = q // self.block_size, k // self.block_size
        return (column >= row - self.left) & (column <= row + self.right)

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        row = q // self.block_size
        return [(row - self.left) * self.block_size, (row + self.right + 1) * self.block_size]

    def __repr__(self) -> str:
        right = "" if self.left == self.right else f", {self.right}"
        return f"block_window({self.block_size}, {self.left}{right})"


@attrs.frozen(cache_hash=True, repr=False)
class RandomBlocks(Pattern):
    """Key blocks chosen at random for each query block, the same for every head."""

    keep: float | None
    block_size: int
    seed: int
    count: int | None = None

    def __attrs_post_init__(self) -> None:
        require_int(self.block_size, "block size", 1)
        require_int(self.seed, "seed of random_blocks", 0)
        require(self.seed <= _MASK, f"seed of random_blocks must be below 2**64, got {self.seed}")
        if (self.keep is None) == (self.count is None):
            raise SpecError("random_blocks needs either keep, a share of the key blocks, or count, a number of them")
        if self.count is not None:
            require_int(self.count, "count of random_blocks", 1)
        elif not (isinstance(self.keep, float) and 0 < self.keep <= 1):
            raise SpecError(f"random_blocks keep must be above 0 and at most 1, got {self.keep!r}")

    @property
    def _table(self) -> str:
        return f"random_blocks:{digest((self.keep, self.block_size, self.seed, self.count))}"

    def kept_count(self, kv_len: int) -> int:
        """Return the number of key blocks that each query block keeps."""
        total = _ceil(kv_len, self.block_size)
        wanted = math.floor((self.keep or 0) * total + 0.5) if self.count is None else self.count
        return min(max(wanted, 1), total)

    def kept(self, rows: np.ndarray, kv_len: int) -> np.ndarray:
        """Return the kept key blocks of each query block in ``rows``, ``[rows, kept_count]``, in increasing order."""
        import numpy as np

        total = _ceil(kv_len, self.block_size)
        count = self.kept_count(kv_len)
        if count == total:
            return np.broadcast_to(np.arange(total), (len(rows), total))
        seed = _mix(np.array([(self.seed + _GOLDEN) & _MASK], dtype=np.uint64))
        keys = _mix(seed + _steps(rows))
        result = np.empty((len(rows), count), dtype=np.int64)
        step = max(1, (1 << 20) // total)
        for i in range(0, len(rows), step):
            order = _mix(keys[i : i + step, None] + _steps(np.arange(total)))
            result[i : i + step] = np.argpartition(order, count - 1, axis=1)[:, :count]
        result.sort(axis=1)
        return result

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        inside = q >= 0
        index = _shell(q * inside // self.block_size, k // self.block_size)
        return _bit(tables[self._table], index) & inside

    def tables(self, shape: Shape) -> dict[str, np.ndarray]:
        import numpy as np

        total = _ceil(shape.kv_len, self.block_size)
        packed = np.zeros((1, _ceil(total * total, 8)), dtype=np.uint8)
        step = max(1, (1 << 20) // total)
        for start in range(0, total, step):
            rows = np.arange(start, min(start + step, total))
            index = _shell(rows[:, None], self.kept(rows, shape.kv_len)).reshape(-1)
            np.bitwise_or.at(packed[0], index >> 3, (1 << (index & 7)).astype(np.uint8))
        columns = np.full((1, 1), total, dtype=np.int64)  # block tables read it; membership does not
        return {self._table: packed, f"{self._table}:columns": columns}

    def check(self, shape: Shape) -> None:
        _positions_for_queries(shape, "random_blocks")

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        import numpy as np

        block, where = np.unique(q // self.block_size, return_inverse=True)
        starts = (self.kept(block, kv_len) * self.block_size)[where].T
        return [edge for start in starts for edge in (start, start + self.block_size)]

    def __repr__(self) -> str:
        share = f"count={self.count}" if self.keep is None else repr(self.keep)
        size = "" if self.block_size == 64 else f", block_size={self.block_size}"
        seed = "" if self.seed == 0 else f", seed={self.seed}"
        return f"random_blocks({share}{size}{seed})"


def _steps(index: np.ndarray) -> np.ndarray:
    """Return ``(index + 1) * golden`` modulo 2^64: the states of a SplitMix64 stream."""
    import numpy as np

    return (np.asarray(index).astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)


def _mix(state: np.ndarray) -> np.ndarray:
    """Return SplitMix64's output for each state, uint64; a bijection, so that no two are equal."""
    import numpy as np

    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = state ^ (state >> np.uint64(31))
    return mixed


def _as_layout(layout: Any) -> np.ndarray:
    """Return a layout given in any form as booleans, 2-D or 3-D."""
    import numpy as np

    if isinstance(layout, str):
        heads = [head.split("/") for head in layout.split("|")]
        require(set(layout) <= set("01/|"), 'a layout in text is rows of 0 and 1 separated by "/", heads by "|"')
        sizes = {(len(head), len(row)) for head in heads for row in head}
        require(len(sizes) == 1, f"the rows and heads of a layout must be equally long, got {sorted(sizes)}")
        cells = np.frombuffer("".join(map("".join, heads)).encode(), dtype=np.uint8) == ord("1")
        array = cells.reshape(len(heads), *sizes.pop())
    else:
        try:
            array = np.asarray(layout.detach().cpu() if hasattr(layout, "detach") else layout)
        except (TypeError, ValueError) as error:
            raise SpecError(f"blocks needs a layout of equally long rows of booleans: {error}") from None
    require(
        array.ndim in (2, 3) and array.size > 0,
        f"blocks needs a layout [query blocks, key blocks] or [heads, query blocks, key blocks], got {array.shape}",
    )
    require(
        array.dtype == bool or (array.dtype.kind in "iu" and bool(((array == 0) | (array == 1)).all())),
        f"a layout says True or False (or 1 or 0) for each block, got values of {array.dtype}",
    )
    result: np.ndarray = array.astype(bool)
    return result[0] if result.shape[0] == 1 and result.ndim == 3 else result


def blocks(layout: Any, block_size: int | Sequence[int]) -> Pattern:
    """Keep whole blocks of pairs, as a layout says.

    Parameters
    ----------
    layout
        Booleans ``[query blocks, key blocks]`` for all heads, or ``[heads, query blocks, key blocks]``: lists, an
        array, a tensor, or text with one character per block, rows separated by ``/`` and heads by ``|``. It is copied.
        One head in front stands for all.
    block_size
        Positions per block, or a pair: of queries and of keys. The last blocks may be shorter.

    Raises
    ------
    SpecError
        If the layout is no table of booleans; in a spec, if it is not ``ceil(kv_len / size)`` blocks high and wide,
        or not one for each head.

    Notes
    -----
    Blocks are counted by position from 0, of queries as of keys. Query row i has position ``i + kv_len - seq_len``, so
    with fewer queries than keys the layout still has a row for every ``block_size`` positions, and the first of them
    are not used.

    Examples
    --------
    >>> blocks([[1, 0], [1, 1]], 64)
    blocks("10/11", 64)
    >>> blocks("10/01|11/11", [64, 128])
    blocks("10/01|11/11", [64, 128])

    References
    ----------
    Gray et al., GPU Kernels for Block-Sparse Weights, 2017; Zaheer et al., Big Bird, arXiv 2007.14062.
    """
    import numpy as np

    array = _as_layout(layout)
    sizes = (block_size,) * 2 if isinstance(block_size, int) else block_size
    if not isinstance(sizes, list | tuple) or len(sizes) != 2:
        raise SpecError(f"blocks block_size must be an int or a pair, of queries and of keys; got {block_size!r}")
    for size in sizes:
        require_int(size, "block size", 1)
    flat = array.reshape(-1, array.shape[-2] * array.shape[-1])
    return Blocks(np.packbits(flat, axis=1, bitorder="little").tobytes(), array.shape, (sizes[0], sizes[1]))


def block_window(block_size: int, left: int, right: int | None = None) -> Pattern:
    """Let a query meet the blocks of keys from ``left`` before its own to ``right`` after it, both included.

    Parameters
    ----------
    block_size
        Positions per block.
    left, right
        Number of blocks before and after the query's own; ``right`` defaults to ``left``.

    Raises
    ------
    SpecError
        If a number is negative, or the block size is not positive.

    Examples
    --------
    >>> block_window(64, 1), block_window(64, 2, 0)
    (block_window(64, 1), block_window(64, 2, 0))

    References
    ----------
    Zaheer et al., Big Bird: Transformers for Longer Sequences, arXiv 2007.14062, appendix D.
    """
    require_int(left, "block_window left", 0)
    return BlockWindow(block_size, left, left if right is None else right)


def random_blocks(
    keep: float | None = None, block_size: int = 64, seed: int = 0, *, count: int | None = None
) -> Pattern:
    """Keep blocks of keys at random, equally many for each block of queries.

    Parameters
    ----------
    keep
        Share of the key blocks to keep, above 0 and at most 1: of K blocks each row keeps ``floor(keep * K + 1/2)``,
        at least one.
    block_size
        Positions per block, of queries as of keys.
    seed
        An int below 2^64. Other seeds give other blocks; all heads have the same ones.
    count
        Instead of ``keep``: the number of key blocks to keep, all of them where there are fewer.

    Raises
    ------
    SpecError
        If ``keep`` is out of range, or both or neither of ``keep`` and ``count`` are given.

    Notes
    -----
    The choice is a function of seed and positions, the same on every machine and in every version. With SplitMix64's
    output function m and step g = 0x9E3779B97F4A7C15, modulo 2^64, row i orders the key blocks j by
    ``m(m(m(seed + g) + (i + 1) * g) + (j + 1) * g)`` and keeps the first ones. It knows nothing of causality: with
    ``causal()`` those of the kept blocks remain that are at or below the diagonal.

    Examples
    --------
    >>> random_blocks(0.1), random_blocks(count=3, block_size=32, seed=7)
    (random_blocks(0.1), random_blocks(count=3, block_size=32, seed=7))

    References
    ----------
    Zaheer et al., Big Bird, arXiv 2007.14062; Steele et al., Fast Splittable Pseudorandom Number Generators, 2014.
    """
    if keep is not None:
        if isinstance(keep, bool) or not isinstance(keep, int | float):
            raise SpecError(f"random_blocks keep must be a number above 0 and at most 1, got {keep!r}")
        keep = float(keep)
    return RandomBlocks(keep, block_size, seed, count)
