"""``lattice``: segments, dilation and strides become dense attention over strided rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import pairwise
from math import lcm
from operator import and_
from typing import ClassVar

import attrs

from attnplan.ir import Attend, Axis, Builder, Graph, Merge, Node, RowMap, Take, rewrite
from attnplan.ir.probes import MAX_CUT
from attnplan.passes.base import Pass
from attnplan.patterns import Pattern, full
from attnplan.patterns.base import conjuncts
from attnplan.patterns.indicators import indicator
from attnplan.patterns.segments import Dilated
from attnplan.patterns.strides import Strided
from attnplan.patterns.sums import EVERYWHERE, Conjunction, Range


@attrs.frozen
class Lattice(Pass):
    """Replace a segment condition by cells: whole segments as one axis of a strided view, ragged ones by themselves.

    Row i of segment t of a head with offset s is row ``t*w + s + r*i``. Heads whose offsets form a progression stay
    together in one cell, with the head and the row moving along the same axis. A stride is the same without segments:
    its residues are one axis, and what remains of them at the end of q or k is a cell of its own.

    References
    ----------
    Ding et al., LongNet, arXiv 2307.02486, section 2.2: dilated attention as dense attention over gathered rows.
    """

    name: ClassVar[str] = "lattice"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite(graph, _visit)


@attrs.frozen
class Box:
    """A range of indices along each batch axis of q, and the dilation offset at each of them."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    offset: int
    steps: tuple[int, ...]

    def offsets(self) -> Range:
        """Return the least and the greatest offset inside the box."""
        moves = [(n - 1) * step for n, step in zip(self.sizes, self.steps, strict=True)]
        return self.offset + sum(m for m in moves if m < 0), self.offset + sum(m for m in moves if m > 0)

    def cut(self, axis: int, at: int) -> tuple[Box, Box]:
        """Return the parts before and from index ``at`` of ``axis``."""
        low = tuple(at if i == axis else n for i, n in enumerate(self.sizes))
        high = tuple(n - at if i == axis else n for i, n in enumerate(self.sizes))
        starts = tuple(s + at if i == axis else s for i, s in enumerate(self.starts))
        return attrs.evolve(self, sizes=low), Box(starts, high, self.offset + at * self.steps[axis], self.steps)


@attrs.frozen
class Region:
    """``count`` neighbouring segments from ``start`` on, and which positions of the first one q and k have."""

    start: int
    count: int
    queries: Range
    """First position of a query, and the position after the last."""
    keys: Range
    """First position of a key, and the position after the last."""

    def extent(self, offset: int, rate: int) -> tuple[Range, Range]:
        """Return how many rows of q are skipped and then taken, and the same of k, for one offset."""
        return self._rows(offset, rate, self.queries), self._rows(offset, rate, self.keys)

    def _rows(self, offset: int, rate: int, positions: Range) -> Range:
        low, high = positions
        first = self.start + offset
        skipped = max(0, -((first - low) // rate))
        return skipped, max(0, -((first + skipped * rate - high) // rate))


def _visit(builder: Builder, node: Node, args: tuple[int, ...]) -> int | None:
    op = node.op
    if not isinstance(op, Attend) or op.shift is None or op.at is not None:
        return None
    q, k = (builder.type(a).rows for a in args[:2])
    conjunction = Conjunction.of(op.where)
    strides = {c.stride for c in conjuncts(op.where) if isinstance(c, Strided)}
    if conjunction.heads or not (q.contiguous and k.contiguous):
        return None
    if len(conjunction.dilated) == 1:
        found = _segments(conjunction.dilated[0], op.shift, q, k)
    elif strides and not conjunction.dilated:
        found = _residues(lcm(*strides), op.shift, q, k)
    else:
        return None
    if found is None:
        return None
    taken = Dilated if conjunction.dilated else Strided
    rest = [c for c in conjuncts(op.where) if not isinstance(c, taken)]
    inner = attrs.evolve(op, where=reduce(and_, rest) if rest else full())
    if not _closed(inner.where, 1 if conjunction.dilated else lcm(*strides)):
        return None
    sources = [builder.source(a) for a in args]
    parts = []
    for rows_q, rows_k in found:
        takes = [builder.add(Take(r), s) for r, s in zip((rows_q, rows_k, rows_k), sources, strict=True)]
        parts.append(builder.add(inner, *takes))
    return builder.add(Merge(builder.type(sources[0]).rows), *parts) if parts else None


def _closed(where: Pattern, residues: int) -> bool:
    """Return whether what is left of a condition can be summed over rows that were taken apart.

    Segments inside a union cannot; ranges of rows or keys end inside every residue of a stride, which may be too many.
    """
    terms = [term for term, _ in indicator(where)]
    ranges = any((term.queries, term.keys) != (EVERYWHERE, EVERYWHERE) for term in terms)
    return not any(term.dilated for term in terms) and not (ranges and residues > MAX_CUT)


def _segments(part: Dilated, shift: int, q: RowMap, k: RowMap) -> Iterator[tuple[RowMap, RowMap]] | None:
    """Return the cells of a segment condition, or None if the offsets of the heads are not affine."""
    box = _offset_box(part, q, k)
    return None if box is None else _cells(part, box, shift, q, k)


def _residues(stride: int, shift: int, q: RowMap, k: RowMap) -> Iterator[tuple[RowMap, RowMap]]:
    """Iterate over the residues modulo a stride, those with as many rows of q and of k in one cell."""
    first = q.row + shift
    wrap = (k.row - first) % stride  # the residue of the first key: from there on keys begin anew
    ends = {0, stride, wrap, q.length % stride, (k.row + k.length - first) % stride}
    for start, stop in pairwise(sorted(ends)):
        skipped = (start - wrap) % stride
        rows, keys = -((start - q.length) // stride), -((skipped - k.length) // stride)
        if rows > 0 and keys > 0:
            repeat = (Axis(stop - start, row=1),) if stop - start > 1 else ()
            yield (
                RowMap(q.head, q.row + start, (*q.batch, *repeat, Axis(rows, row=stride))),
                RowMap(k.head, k.row + skipped, (*k.batch, *repeat, Axis(keys, row=stride))),
            )


def _offset_box(part: Dilated, q: RowMap, k: RowMap) -> Box | None:
    """Return the offsets of the heads of q as an affine function of the batch axes, or None if they are not one.

    Along an axis where k broadcasts they have to be equal: its rows cannot move.
    """
    origin = int(part.offset_of(q.head))
    steps = tuple(int(part.offset_of(q.head + a.head)) - origin if a.size > 1 else 0 for a in q.batch)
    for index, head in q.batch_heads():
        if part.offset_of(head) != origin + sum(i * s for i, s in zip(index, steps, strict=True)):
            return None
    if any(step and b.size == 1 for step, b in zip(steps, k.batch, strict=True)):
        return None
    return Box((0,) * len(steps), tuple(a.size for a in q.batch), origin, steps)


def _regions(length: int, queries: Range, keys: Range) -> Iterator[Region]:
    """Iterate over the segments that hold queries and keys: the whole ones together, ragged ones alone."""
    first, last = max(queries[0], keys[0]), min(queries[1], keys[1])
    whole, end = -(-first // length), last // length
    if whole < end:
        low, high = whole * length, (whole + 1) * length
        yield Region(low, end - whole, (low, high), (low, high))
    ragged = {t for t, cut in ((first // length, first % length), (last // length, last % length)) if cut}
    for t in sorted(ragged):
        low, high = t * length, (t + 1) * length
        inside = ((max(low, span[0]), min(high, span[1])) for span in (queries, keys))
        yield Region(low, 1, *inside)


def _uniform(box: Box, region: Region, rate: int) -> Iterator[Box]:
    """Cut a box until all its offsets have the same numbers of rows.

    As the offset grows fewer rows are skipped, and fewer are left while as many are skipped: what holds for the least
    and the greatest offset holds for all between them.
    """
    least, greatest = box.offsets()
    if region.extent(least, rate) == region.extent(greatest, rate):
        yield box
        return
    axis = next(i for i, (n, s) in enumerate(zip(box.sizes, box.steps, strict=True)) if n > 1 and s)
    along = [region.extent(box.offset + i * box.steps[axis], rate) for i in range(box.sizes[axis])]
    at = next((i for i, e in enumerate(along) if e != along[0]), box.sizes[axis] // 2)
    for half in box.cut(axis, at):
        yield from _uniform(half, region, rate)


def _cells(part: Dilated, box: Box, shift: int, q: RowMap, k: RowMap) -> Iterator[tuple[RowMap, RowMap]]:
    first = q.row + shift
    for region in _regions(part.length, (first, first + q.length), (k.row, k.row + k.length)):
        for piece in _uniform(box, region, part.rate):
            (q_skipped, q_rows), (k_skipped, k_rows) = region.extent(piece.offset, part.rate)
            if q_rows and k_rows:
                start = region.start + piece.offset
                repeat = (Axis(region.count, row=part.length),) if region.count > 1 else ()
                yield (
                    _view(q, piece, start + q_skipped * part.rate - shift, repeat, Axis(q_rows, row=part.rate)),
                    _view(k, piece, start + k_skipped * part.rate, repeat, Axis(k_rows, row=part.rate)),
                )


def _view(whole: RowMap, piece: Box, row: int, repeat: tuple[Axis, ...], rows: Axis) -> RowMap:
    """Return the rows of one tensor in a cell; an axis that the tensor broadcasts along stays of size 1."""
    head = whole.head
    axes = []
    for axis, start, size, step in zip(whole.batch, piece.starts, piece.sizes, piece.steps, strict=True):
        if axis.size == 1:
            axes.append(axis)
            continue
        head += start * axis.head
        axes.append(Axis(size, head=axis.head, row=step))
    return RowMap(head, row, (*axes, *repeat, rows))
