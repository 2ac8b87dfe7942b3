"""``block-sparse``: an attend under a mask runs only the parts of the mask that hold pairs."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import ClassVar

import attrs

from attnplan.ir import Attend, Axis, Builder, Graph, Merge, Node, RowMap, Take, rewrite
from attnplan.ir.native import native_window, split_documents
from attnplan.ir.slots import slot_band, slot_condition
from attnplan.passes.base import Pass
from attnplan.patterns import Shape
from attnplan.patterns.grids import Neighborhood
from attnplan.patterns.sums import Conjunction


@attrs.frozen
class BlockSparse(Pass):
    """Run a band as overlapping chunks of keys, and any other mask as tiles, the empty ones left out.

    A chunk of queries sees its keys and those within the window around them, so that neighbouring chunks overlap in
    their keys: one strided view, no copy. The proof counts their pairs. For any other condition the pass only sets the
    tile; which tiles are empty is exact knowledge of the pattern (:mod:`attnplan.patterns.tiles`). The rows of a
    neighbourhood on a grid are visited box by box where that leaves fewer tiles.

    References
    ----------
    Beltagy et al., Longformer, arXiv 2004.05150, appendix A, for overlapping chunks; Gray et al., GPU Kernels for
    Block-Sparse Weights, 2017.
    """

    name: ClassVar[str] = "block-sparse"
    tile: tuple[int, int] = (128, 128)
    """(queries, keys) of the backend's tiles."""
    chunk: int | None = 128
    """Queries of a chunk; None leaves bands, and documents that arrive with the call, to kernels that know them."""

    def __call__(self, graph: Graph) -> Graph:
        masked = any(
            slot_condition(op, *(n.type.rows for n in graph.args(node)[:2])) == "mask" for node, op in graph.of(Attend)
        )
        return rewrite(graph, self._visit) if masked else graph

    def _visit(self, builder: Builder, node: Node, args: tuple[int, ...]) -> int | None:
        op = node.op
        if not isinstance(op, Attend) or op.tile is not None or op.at is not None:
            return None
        q, k = (builder.type(a).rows for a in args[:2])
        if slot_condition(op, q, k) != "mask":
            return None
        if self.chunk is None and native_window(attrs.evolve(op, where=split_documents(op.where)[0]), q, k) is not None:
            return None
        chunked = self._chunked(builder, op, args, q, k) if is_band(op, q, k) else None
        if chunked is not None:
            return chunked
        apart = Conjunction.of(op.where)
        taken_apart = apart.dilated or apart.heads  # by the passes for segments and heads, which leave denser rows
        if not taken_apart and q.contiguous and k.contiguous and min(q.length, k.length) > 1:
            return builder.add(self._tiled(op, q, k), *args)
        return None

    def _tiled(self, op: Attend, q: RowMap, k: RowMap) -> Attend:
        """Return the attend over tiles of rows, or over boxes where those run fewer pairs by a tenth."""
        plain = attrs.evolve(op, tile=self.tile)
        if not isinstance(op.where, Neighborhood) or op.shift != 0 or not (q.keeps_rows and k.keeps_rows):
            return plain
        from attnplan.patterns.tiles import Grid, kept_tiles  # numpy is needed only here
        from attnplan.patterns.tiles.boxes import best_boxes

        found = best_boxes(op.where, self.tile) if q.length == k.length else None
        if found is None:
            return plain
        queries, keys, kept = found
        boxed = attrs.evolve(op, tile=(prod(queries), prod(keys)), boxes=(queries, keys))
        rows = kept_tiles(op.where, Shape(q.length, k.length, 1), Grid(0, q.length, 0, k.length, self.tile), [0])
        return boxed if 10 * kept * prod(queries) * prod(keys) < 9 * rows * prod(self.tile) else plain

    def _chunked(self, builder: Builder, op: Attend, args: tuple[int, ...], q: RowMap, k: RowMap) -> int | None:
        limits = slot_band(op, q, k)
        if limits is None or self.chunk is None:
            return None
        low, high = limits
        pieces = list(chunks(q.length, k.length, low, high, self.chunk))
        if not pieces:
            return None
        sources = [builder.source(a) for a in args]
        parts = []
        for piece in pieces:
            rows_q, rows_k = piece.queries(q), piece.keys(k)
            takes = [builder.add(Take(r), s) for r, s in zip((rows_q, rows_k, rows_k), sources, strict=True)]
            parts.append(builder.add(op, *takes))
        return builder.add(Merge(builder.type(sources[0]).rows), *parts)


def is_band(op: Attend, q: RowMap, k: RowMap) -> bool:
    """Return whether the distance of query and key slots is all that the condition reads."""
    known = Conjunction.of(op.where)
    more = known.opaque or known.dilated or known.heads
    return known.banded and not more and slot_band(op, q, k) is not None


@attrs.frozen
class Piece:
    """``count`` chunks of ``rows`` query slots, each with ``columns`` key slots that move on by as many."""

    count: int
    row: int
    rows: int
    column: int
    columns: int

    def queries(self, q: RowMap) -> RowMap:
        """Return the query rows of the chunks."""
        return self._taken(q, self.row, self.rows)

    def keys(self, k: RowMap) -> RowMap:
        """Return the key rows of the chunks, which overlap."""
        return self._taken(k, self.column, self.columns)

    def _taken(self, rows: RowMap, first: int, length: int) -> RowMap:
        step = rows.axes[-1].row
        repeat = (Axis(self.count, row=self.rows * step),) if self.count > 1 else ()
        axes = (*rows.batch, *repeat, attrs.evolve(rows.axes[-1], size=length))
        return attrs.evolve(rows, row=rows.row + first * step, axes=axes)


def chunks(rows: int, columns: int, low: int | None, high: int | None, size: int) -> Iterator[Piece]:
    """Iterate over chunks that cover the band ``low <= i - j <= high`` of ``rows`` x ``columns`` slots.

    Whole chunks whose keys all exist are one piece; the rows before and after them are one piece each. Nothing is
    yielded where chunks would not leave out a quarter of the keys.

    Examples
    --------
    >>> for piece in chunks(32, 32, 0, 3, 4):
    ...     print(piece)
    Piece(count=1, row=0, rows=4, column=0, columns=4)
    Piece(count=7, row=4, rows=4, column=1, columns=7)
    """
    low = 1 - columns if low is None else max(low, 1 - columns)
    high = rows - 1 if high is None else min(high, rows - 1)
    width = size + high - low
    if high < low or 4 * width > 3 * columns:
        return
    first = max(0, -(-high // size))  # chunk t sees the key slots from t * size - high on
    last = min((columns + high - width) // size + 1, rows // size)
    if last - first < 2:
        return
    yield from _edge(0, first * size, low, high, columns)
    yield Piece(last - first, first * size, size, first * size - high, width)
    yield from _edge(last * size, rows, low, high, columns)


def _edge(start: int, stop: int, low: int, high: int, columns: int) -> Iterator[Piece]:
    """Yield the rows from ``start`` to ``stop`` with every key slot that any of them sees, if there is one."""
    column, end = max(0, start - high), min(columns, stop - low)
    if start < stop and column < end:
        yield Piece(1, start, stop - start, column, end - column)
