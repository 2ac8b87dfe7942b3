"""``decompose``: a set union becomes disjoint parts, each run by what suits it, and merged by LSE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from itertools import groupby, pairwise
from operator import and_, or_
from typing import ClassVar

import attrs

from attnplan.ir import Attend, Builder, Graph, Merge, Node, RowMap, Take, rewrite
from attnplan.passes.base import Pass
from attnplan.patterns import Pattern, band, full
from attnplan.patterns.bands import Band, Full
from attnplan.patterns.base import And, Not, Or, conjuncts
from attnplan.patterns.indicators import boxes, runs, unread
from attnplan.patterns.keys import GlobalTokens, Sinks
from attnplan.patterns.operands import Documents
from attnplan.patterns.segments import Dilated, Heads
from attnplan.patterns.strides import Columns, Strided
from attnplan.patterns.sums import Range

MAX_CUTS = 16
"""Most cuts of an axis; a condition that has more is left as it is."""

Folded = Pattern | bool
"""What is left of a condition: everything, nothing, or a condition."""


@attrs.frozen
class Decompose(Pass):
    """Cut rows, keys and distances where the terms of a union begin and end, and attend over each piece by itself.

    Sinks, global tokens and known documents are ranges of rows and keys: inside a rectangle between their ends they
    hold everything or nothing. A band is a range of the distance from query to key, and what is left of a union inside
    and outside a band is a window, and segments beside it. Pieces that touch and have one condition are joined.

    References
    ----------
    Beltagy et al., Longformer, arXiv 2004.05150; Zaheer et al., Big Bird, arXiv 2007.14062; Xiao et al., StreamingLLM,
    arXiv 2309.17453.
    """

    name: ClassVar[str] = "decompose"
    full_rows: bool = False
    """Whether only rows that see every key are cut off, such as those of global tokens: as one row of tiles among many
    they would be the longest by far, and a launch of all of them would wait for it."""

    def __call__(self, graph: Graph) -> Graph:
        return rewrite(graph, partial(_visit, _full_rows if self.full_rows else _parts))


@attrs.frozen
class Box:
    """Ranges of heads, of query and key positions, and of the distance from query to key."""

    heads: Range
    queries: Range
    keys: Range
    distances: Range

    @classmethod
    def of(cls, heads: Range, queries: Range, keys: Range) -> Box:
        """Return the box that holds every distance between its queries and keys."""
        return cls(heads, queries, keys, (keys[0] - queries[1] + 1, keys[1] - queries[0]))

    def narrowed(self) -> Box:
        """Return the box without the queries and the keys that have no pair at its distances."""
        low, high = self.distances
        queries = max(self.queries[0], self.keys[0] - high + 1), min(self.queries[1], self.keys[1] - low)
        keys = max(self.keys[0], queries[0] + low), min(self.keys[1], queries[1] + high - 1)
        return attrs.evolve(self, queries=queries, keys=keys)

    def band(self) -> Pattern:
        """Return the band that limits the pairs of these queries and keys to the distances."""
        low, high = Box.of(self.heads, self.queries, self.keys).distances
        first, stop = self.distances
        return band(None if first <= low else -first, None if stop >= high else stop - 1)


@attrs.frozen
class Part:
    """A piece of one softmax: rows of q and k, and the condition between them."""

    where: Pattern
    q: RowMap
    k: RowMap


Cut = Callable[[Pattern, int, RowMap, RowMap], Iterable[Part]]
"""Cuts a condition, with its shift, between rows of q and of k whose heads it treats alike."""


def _visit(cut: Cut, builder: Builder, node: Node, args: tuple[int, ...]) -> int | None:
    op = node.op
    if not isinstance(op, Attend) or op.shift is None or op.at is not None:
        return None
    q, k = (builder.type(a).rows for a in args[:2])
    if not (q.contiguous and k.contiguous) or not is_union(op.where) or unread(op.where):
        return None
    parts = [part for heads in _head_parts(op.where, q, k) for part in cut(op.where, op.shift, *heads)]
    if not parts or parts == [Part(op.where, q, k)] or any(unread(part.where) for part in parts):
        return None  # nothing to gain, or spelled in a way that the proof does not read
    made = [
        builder.add(
            attrs.evolve(op, where=part.where),
            *(_take(builder, a, rows) for a, rows in zip(args, (part.q, part.k, part.k), strict=True)),
        )
        for part in parts
    ]
    whole = len(made) == 1 and builder.type(made[0]).rows == q
    return made[0] if whole else builder.add(Merge(_whole(builder, args[0])), *made)


def is_union(where: Pattern) -> bool:
    """Return whether a condition has terms that cutting makes simpler."""
    return any(isinstance(p, Or | Not | Sinks | Columns | GlobalTokens | Documents) for p in where.walk())


def _whole(builder: Builder, q: int) -> RowMap:
    return builder.type(builder.source(q)).rows


def _take(builder: Builder, arg: int, rows: RowMap) -> int:
    return arg if builder.type(arg).rows == rows else builder.add(Take(rows), builder.source(arg))


def _head_parts(where: Pattern, q: RowMap, k: RowMap) -> list[tuple[RowMap, RowMap]]:
    """Cut the first axis where ranges of heads begin and end, if no range ends inside a step of it."""
    lead, shared = q.axes[0], k.axes[0].size == 1
    inner = q.last_head - q.head - (lead.size - 1) * lead.head
    ends = {end - q.head for p in where.walk() if isinstance(p, Heads) for end in (p.start, p.stop)}
    ends = {end for end in ends if 0 < end <= q.last_head - q.head}
    if lead.head <= inner or any(end % lead.head for end in ends):
        return [(q, k)]
    edges = [0, *sorted(end // lead.head for end in ends), lead.size]
    return [(_steps(q, a, b), k if shared else _steps(k, a, b)) for a, b in pairwise(edges)]


def _steps(rows: RowMap, start: int, stop: int) -> RowMap:
    """Return some steps of the first axis."""
    lead = rows.axes[0]
    return RowMap(rows.head + start * lead.head, rows.row, (attrs.evolve(lead, size=stop - start), *rows.axes[1:]))


def _parts(where: Pattern, shift: int, q: RowMap, k: RowMap) -> Iterator[Part]:
    first = q.row + shift
    whole = Box.of((q.head, q.last_head + 1), (first, first + q.length), (k.row, k.row + k.length))
    for box, left in rectangles(where, whole):
        for piece, condition in pieces(left, box):
            queries, keys = piece.queries, piece.keys
            yield Part(condition, _rows(q, queries[0] - shift, queries), _rows(k, keys[0], keys))


def _full_rows(where: Pattern, shift: int, q: RowMap, k: RowMap) -> Iterator[Part]:
    """Cut rows that see every key off those that do not."""
    first = q.row + shift
    heads, queries, keys = (q.head, q.last_head + 1), (first, first + q.length), (k.row, k.row + k.length)
    cells = [(rows, fold(where, Box.of(heads, rows, keys)) is True) for rows in _between(set(_ends(where)), queries)]
    for sees_all, run in groupby(cells, key=lambda cell: cell[1]):
        spans = [rows for rows, _ in run]
        start, stop = spans[0][0], spans[-1][1]
        yield Part(full() if sees_all else where, _rows(q, start - shift, (start, stop)), k)


def _rows(rows: RowMap, first: int, positions: Range) -> RowMap:
    last = attrs.evolve(rows.axes[-1], size=positions[1] - positions[0])
    return RowMap(rows.head, first, (*rows.batch, last))


def rectangles(where: Pattern, box: Box) -> Iterator[tuple[Box, Folded]]:
    """Cut rows and keys where ranges end, fold the condition in each cell, and join cells that have the same one left.

    Cells join along the rows first, then along the keys; cells in which nothing meets are left out.
    """
    ends = set(_ends(where))
    queries, keys = _between(ends, box.queries), _between(ends, box.keys)
    columns: list[list[tuple[Range, Range, Folded]]] = []
    for column in keys:
        cells = [(rows, fold(where, Box.of(box.heads, rows, column))) for rows in queries]
        joined = [(left, [rows for rows, _ in run]) for left, run in groupby(cells, key=lambda cell: cell[1])]
        columns.append([((run[0][0], run[-1][1]), column, left) for left, run in joined if left is not False])
    found: list[tuple[Range, Range, Folded]] = []
    for cell in (c for column in columns for c in column):
        rows, column, left = cell
        at = next((i for i, f in enumerate(found) if (f[0], f[1][1], f[2]) == (rows, column[0], left)), None)
        if at is None:
            found.append(cell)
        else:
            found[at] = rows, (found[at][1][0], column[1]), left
    return ((Box.of(box.heads, rows, column), left) for rows, column, left in found)


def _ends(where: Pattern) -> Iterator[int]:
    """Iterate over the positions at which a range of queries or keys begins or ends."""
    for term in where.walk():
        if isinstance(term, Sinks):
            yield term.count
        elif isinstance(term, GlobalTokens) or (isinstance(term, Columns) and term.every is None):
            yield from (end for run in runs(term.indices) for end in run)
        elif isinstance(term, Documents):  # those that arrive with the call have no ends yet
            yield from (end for box in boxes(term.lengths or ()) for end in box)


def _between(ends: set[int], span: Range) -> list[Range]:
    """Cut a range at the ends inside it, or nowhere if there are too many."""
    inside = sorted(end for end in ends if span[0] < end < span[1])
    return list(pairwise((span[0], *(inside if len(inside) <= MAX_CUTS else ()), span[1])))


def pieces(where: Folded, box: Box) -> list[tuple[Box, Pattern]]:
    """Cut what is left of a condition in a rectangle at the ends of its bands, where that makes it simpler.

    Distances at which the same is left make one piece. Two ranges of them with a gap between are one piece too, with
    the gap as a complement, so that segments are attended over once beside a window.
    """
    if isinstance(where, bool):
        return [(box, full())]
    bands = [p for p in where.walk() if isinstance(p, Band)]
    ends = {-b.left for b in bands if b.left is not None} | {b.right + 1 for b in bands if b.right is not None}
    inside = sorted(end for end in ends if box.distances[0] < end < box.distances[1])
    slices = [attrs.evolve(box, distances=d) for d in pairwise((box.distances[0], *inside, box.distances[1]))]
    cells = [(piece, fold(where, piece)) for piece in slices]
    runs_of = [(left, [piece for piece, _ in run]) for left, run in groupby(cells, key=lambda cell: cell[1])]
    found = [(_spanning(run), left) for left, run in runs_of if left is not False]
    if len(found) > 1 and not _suits([left for _, left in found]):
        return [(box, where)]
    return [part for piece, left, gap in _with_gaps(found) if (part := _piece(piece, left, gap)) is not None]


def _piece(box: Box, left: Folded, gap: Range | None) -> tuple[Box, Pattern] | None:
    """Return the rows and keys of a piece and its condition; segments keep all rows, so that fewer of them are cut."""
    if _strided(left):
        return box, _condition(box, left, gap)
    box = box.narrowed()
    left = left if isinstance(left, bool) else fold(left, box)  # there may be less in it now
    return None if left is False else (box, _condition(box, left))


def _spanning(run: Sequence[Box]) -> Box:
    """Return the box of neighbouring ranges of distances."""
    return attrs.evolve(run[0], distances=(run[0].distances[0], run[-1].distances[1]))


def _condition(piece: Box, left: Folded, gap: Range | None = None) -> Pattern:
    terms = [] if isinstance(left, bool) else list(conjuncts(left))
    limits = piece.band()
    terms += [] if isinstance(limits, Full) else [limits]
    terms += [] if gap is None else [~band(-gap[0], gap[1] - 1)]
    return reduce(and_, terms) if terms else full()


def _with_gaps(found: Sequence[tuple[Box, Folded]]) -> Iterator[tuple[Box, Folded, Range | None]]:
    """Join two strided pieces with the same condition around a gap of distances."""
    taken: set[int] = set()
    for i, (piece, left) in enumerate(found):
        if i in taken:
            continue
        beyond = next((j for j in range(i + 1, len(found)) if found[j][1] == left and _strided(left)), None)
        if beyond is None:
            yield piece, left, None
        else:
            taken.add(beyond)
            low, high = piece.distances, found[beyond][0].distances
            yield attrs.evolve(piece, distances=(low[0], high[1])), left, (low[1], high[0])


def _suits(left: Sequence[Folded]) -> bool:
    """Return whether each condition, beside what all of them share, is everything or segments of a strided view."""
    terms = [set() if isinstance(condition, bool) else set(conjuncts(condition)) for condition in left]
    common = set.intersection(*terms)
    return all(all(isinstance(t, Dilated | Strided) for t in condition - common) for condition in terms)


def _strided(left: Folded) -> bool:
    return not isinstance(left, bool) and any(isinstance(t, Dilated | Strided) for t in conjuncts(left))


def fold(where: Pattern, box: Box, wanted: bool = True) -> Folded:
    """Return what is left of a condition inside a box, or of its complement if it is not ``wanted``.

    Examples
    --------
    >>> from attnplan.patterns import causal, global_tokens, sinks, window
    >>> box = Box.of((0, 1), (8, 20), (8, 20))
    >>> fold((window(3) | sinks(8)) & causal(), box), fold(global_tokens(9), box), fold(~sinks(4), box)
    (window(3) & causal(), global_tokens(9), True)
    """
    if isinstance(where, Not):
        return fold(where.term, box, not wanted)
    if isinstance(where, And | Or):
        terms = [fold(term, box, wanted) for term in where.terms]
        return _all(terms) if isinstance(where, And) == wanted else _any(terms)
    found = _status(where, box)
    if found is not None:
        return found == wanted
    return where if wanted else ~where


def _all(terms: Sequence[Folded]) -> Folded:
    kept = list(dict.fromkeys(c for t in terms if not isinstance(t, bool) for c in conjuncts(t)))
    if False in terms or any(~t in kept for t in kept):
        return False
    return reduce(and_, kept) if kept else True


def _any(terms: Sequence[Folded]) -> Folded:
    kept = list(dict.fromkeys(t for t in terms if not isinstance(t, bool)))
    if True in terms or any(~t in kept for t in kept):
        return True
    least = [t for t in kept if not any(set(conjuncts(u)) < set(conjuncts(t)) for u in kept)]
    return reduce(or_, least) if least else False


def _status(atom: Pattern, box: Box) -> bool | None:
    """Return whether an atom holds every pair of a box, or none of them; None if some, or if nothing is known."""
    match atom:
        case Full():
            return True
        case Band(left, right):
            return _inside(box.distances, (None if left is None else -left, None if right is None else right + 1))
        case Heads(start, stop):
            return _inside(box.heads, (start, stop))
        case Sinks(count):
            return _inside(box.keys, (0, count))
        case Columns(indices, every) if every is None:
            statuses = [_inside(box.keys, run) for run in runs(indices)]
            return True if True in statuses else None if None in statuses else False
        case GlobalTokens():
            statuses = [_inside(span, run) for run in runs(atom.indices) for span in (box.queries, box.keys)]
            return True if True in statuses else None if None in statuses else False
        case Documents(lengths) if lengths is not None:
            return _in_one_of(boxes(lengths), box)
        case Dilated(length, rate):
            first, last = ([n // length for n in (span[0], span[1] - 1)] for span in (box.queries, box.keys))
            too_far = box.distances[0] >= length or box.distances[1] <= 1 - length
            if first[1] < last[0] or last[1] < first[0] or too_far:
                return False
            return True if rate == 1 and first[0] == first[1] == last[0] == last[1] else None
    return None


def _inside(span: Range, limits: tuple[int | None, int | None]) -> bool | None:
    """Return whether a range lies inside limits: True, False if it lies outside, None if an end falls inside it."""
    low, high = limits
    if (low is not None and span[1] <= low) or (high is not None and span[0] >= high):
        return False
    return True if (low is None or low <= span[0]) and (high is None or span[1] <= high) else None


def _in_one_of(documents: Iterable[Range], box: Box) -> bool | None:
    statuses = [(_inside(box.queries, d), _inside(box.keys, d)) for d in documents]
    if (True, True) in statuses:
        return True
    return False if all(False in pair for pair in statuses) else None
