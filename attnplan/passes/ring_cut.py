"""Cutting an attend by rows: the queries that a rank holds, and the keys that arrive in one hop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import gcd, lcm

import attrs

from attnplan.errors import PassError
from attnplan.ir import Attend, Axis, Graph, RowMap
from attnplan.ir.progressions import Progression
from attnplan.patterns.sums import Conjunction

MAX_LANES = 4096
"""Most steps of an axis that are cut one by one."""


@attrs.frozen(cache_hash=True)
class Part:
    """An attend, with the rows of the whole sequence that its queries and keys are."""

    op: Attend
    q: RowMap
    k: RowMap


def parts_of(graph: Graph) -> tuple[Part, ...]:
    """Return every attend of a graph over whole inputs.

    Raises
    ------
    PassError
        If positions of queries arrive with the call: no rank then knows which keys its rows meet.
    """
    found = []
    for node, op in graph.of(Attend):
        if op.shift is None:
            raise PassError("the position of query row 0 arrives with the call, so no rank knows which keys it needs")
        q, k = op.positions(*(n.type.rows for n in graph.args(node)[:2]))
        found.append(Part(op, q, k))
    return tuple(found)


def of_heads(part: Part, start: int, stop: int) -> Iterator[Part]:
    """Iterate over the pieces of a part that hold its query heads from ``start`` up to ``stop``, each once."""
    if start <= part.q.head and part.q.last_head < stop:
        yield part
        return
    for lows, sizes in _head_boxes(part.q.batch, part.q.head, start, stop):
        yield Part(part.op, _box(part.q, lows, sizes), _box(part.k, lows, sizes))


def _head_boxes(
    axes: Sequence[Axis], head: int, start: int, stop: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    if not axes:
        return [((), ())] if start <= head < stop else []
    first, rest = axes[0], axes[1:]
    if not first.head or first.size == 1:
        return [((0, *lows), (first.size, *sizes)) for lows, sizes in _head_boxes(rest, head, start, stop)]
    each = [_head_boxes(rest, head + i * first.head, start, stop) for i in range(first.size)]
    found = []
    for boxes, run in groupby(range(first.size), key=lambda i: each[i]):
        places = list(run)
        found += [((places[0], *lows), (len(places), *sizes)) for lows, sizes in boxes]
    return found


def _box(rows: RowMap, lows: Sequence[int], sizes: Sequence[int]) -> RowMap:
    head, row, axes = rows.head, rows.row, []
    for axis, low, size in zip(rows.batch, lows, sizes, strict=True):
        if axis.size == 1:
            axes.append(axis)
            continue
        head, row = head + low * axis.head, row + low * axis.row
        axes.append(attrs.evolve(axis, size=size))
    return RowMap(head, row, (*axes, rows.axes[-1]))


def cut(part: Part, mine: Progression, theirs: Progression) -> Iterator[Part]:
    """Iterate over the pieces of a part whose queries are in ``mine`` and whose keys are in ``theirs``, each pair once.

    Bands leave out queries and keys that meet nothing. Steps of a batch axis that are cut alike stay one axis.

    Raises
    ------
    PassError
        If the rows of a batch axis are cut in too many different ways.

    Examples
    --------
    The second of two ranks holds rows 8 to 15 and needs three keys of the first:

    >>> from attnplan.patterns import window
    >>> whole = RowMap.whole(1, 16)
    >>> for piece in cut(Part(Attend(where=window(3, 0)), whole, whole), Progression(8, 1, 8), Progression(0, 1, 8)):
    ...     print(piece.q.row, piece.q.sizes, piece.k.row, piece.k.sizes)
    8 (1, 3) 5 (1, 3)
    """
    moving = [i for i, (a, b) in enumerate(zip(part.q.batch, part.k.batch, strict=True)) if a.size > 1 and _moves(a, b)]
    cutter = _Cutter(part, mine, theirs, Conjunction.of(part.op.where))
    axes = [_Lanes(part.q.axes[i].size, part.q.axes[i].row, _step(part.k.axes[i])) for i in moving]
    order = sorted(range(len(axes)), key=lambda n: -max(axes[n].q, axes[n].k))  # long steps first
    for found in cutter.solve([axes[n] for n in order], part.q.row, part.k.row):
        taken = {moving[n]: found.lanes[place] for place, n in enumerate(order)}
        yield Part(part.op, _taken(part.q, taken, found.queries), _taken(part.k, taken, found.keys))


def _moves(q: Axis, k: Axis) -> bool:
    return bool(q.row or _step(k))


def _step(axis: Axis) -> int:
    return axis.row if axis.size > 1 else 0


def _taken(rows: RowMap, lanes: dict[int, Progression], inner: Progression) -> RowMap:
    """Return some steps of each axis; ``inner`` counts steps of the last one."""
    head, row, axes = rows.head, rows.row, list(rows.axes)
    for i, lane in {**lanes, len(axes) - 1: inner}.items():
        axis = axes[i]
        if axis.size == 1 and i < len(rows.axes) - 1:
            continue
        head, row = head + lane.start * axis.head, row + lane.start * axis.row
        axes[i] = Axis(lane.count, axis.head * lane.step, axis.row * lane.step)
    return RowMap(head, row, tuple(axes))


@attrs.frozen
class _Lanes:
    """A batch axis along which rows move: its size, and how far queries and keys move per step."""

    size: int
    q: int
    k: int


@attrs.frozen
class _Found:
    """Steps of each moving axis, and of the rows of queries and keys."""

    lanes: tuple[Progression, ...]
    queries: Progression
    keys: Progression


@attrs.frozen
class _Cutter:
    part: Part
    mine: Progression
    theirs: Progression
    known: Conjunction

    def solve(self, axes: Sequence[_Lanes], q: int, k: int) -> list[_Found]:
        """Return the pieces from first rows ``q`` and ``k`` on."""
        if not axes:
            return self._rows(q, k)
        axis, rest = axes[0], axes[1:]
        reach_q = sum((a.size - 1) * a.q for a in rest) + self._extent(self.part.q)
        reach_k = sum((a.size - 1) * a.k for a in rest) + self._extent(self.part.k)
        sides = ((q, axis.q, reach_q, self.mine), (k, axis.k, reach_k, self.theirs))
        touched, inside = (0, axis.size), (0, axis.size)
        for first, step, reach, held in sides:
            touched = _meet(touched, _steps(first, step, reach, held, axis.size, whole=False))
            inside = _meet(inside, _steps(first, step, reach, held, axis.size, whole=True))
        if self.known.banded and axis.q != axis.k:
            inside = (touched[0], touched[0])
        inside = inside if inside[0] < inside[1] else (touched[1], touched[1])
        period = lcm(*(_period(step, held.step) for _, step, _, held in sides))
        length = max(0, inside[1] - inside[0])
        single = [*range(touched[0], min(inside[0], touched[1])), *range(max(inside[1], touched[0]), touched[1])]
        if len(single) + min(period, length) > MAX_LANES:
            raise PassError(
                f"attend where {self.part.op.where!r}: the ranks' rows cut an axis of {axis.size} in more than "
                f"{MAX_LANES} ways"
            )
        return self._single(single, axis, rest, q, k) + self._periodic(inside[0], length, period, axis, rest, q, k)

    def _single(self, places: Sequence[int], axis: _Lanes, rest: Sequence[_Lanes], q: int, k: int) -> list[_Found]:
        each = [(t, self.solve(rest, q + t * axis.q, k + t * axis.k)) for t in places]
        found = []
        for start, alike in _runs(each):
            for one in each[start][1]:
                found.append(attrs.evolve(one, lanes=(Progression(places[start], 1, alike), *one.lanes)))
        return found

    def _periodic(
        self, first: int, length: int, period: int, axis: _Lanes, rest: Sequence[_Lanes], q: int, k: int
    ) -> list[_Found]:
        each = [self.solve(rest, q + t * axis.q, k + t * axis.k) for t in range(first, first + min(period, length))]
        if each and all(one == each[0] for one in each):
            each, period = each[:1], 1
        return [
            attrs.evolve(one, lanes=(Progression(first + c, period, -(-(length - c) // period)), *one.lanes))
            for c, alike in enumerate(each)
            for one in alike
        ]

    def _extent(self, rows: RowMap) -> int:
        return (rows.length - 1) * rows.axes[-1].row

    def _rows(self, q: int, k: int) -> list[_Found]:
        queries = _inner(q, self.part.q.axes[-1], self.mine)
        keys = _inner(k, self.part.k.axes[-1], self.theirs)
        if self.known.banded and queries.count and keys.count:
            left, right, shift = self.known.left, self.known.right, self.part.op.shift or 0
            for _ in range(2):  # what is left of the keys may leave out queries, and those again keys
                keys = keys.clipped(
                    None if left is None else queries.start + shift - left,
                    None if right is None else queries.last + shift + right + 1,
                )
                queries = queries.clipped(
                    None if right is None or not keys.count else keys.start - right - shift,
                    None if left is None or not keys.count else keys.last + left - shift + 1,
                )
        if not queries.count or not keys.count:
            return []
        return [_Found((), _index(queries, q, self.part.q.axes[-1]), _index(keys, k, self.part.k.axes[-1]))]


def _runs(each: Sequence[tuple[int, list[_Found]]]) -> Iterator[tuple[int, int]]:
    """Iterate over (place, length) of runs of neighbouring steps that are cut alike."""
    place = 0
    keyed = [(i, t - i, found) for i, (t, found) in enumerate(each)]
    while place < len(keyed):
        stop = place + 1
        while stop < len(keyed) and keyed[stop][1:] == keyed[place][1:]:
            stop += 1
        yield place, stop - place
        place = stop


def _meet(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return max(a[0], b[0]), min(a[1], b[1])


def _steps(first: int, step: int, reach: int, held: Progression, size: int, *, whole: bool) -> tuple[int, int]:
    """Return the steps of an axis whose rows lie between the ends of ``held``: all of them, or some."""
    if not step:
        touches = first <= held.last and first + reach >= held.start
        return (0, size) if touches else (0, 0)
    low, high = held.start - first, held.last - first
    if whole:
        return -(-low // step), (high - reach) // step + 1
    return -(-(low - reach) // step), high // step + 1


def _period(step: int, held: int) -> int:
    return held // gcd(step, held) if step else 1


def _inner(first: int, axis: Axis, held: Progression) -> Progression:
    return Progression(first, max(axis.row, 1), axis.size).common(held)


def _index(rows: Progression, first: int, axis: Axis) -> Progression:
    step = max(axis.row, 1)
    return Progression((rows.start - first) // step, max(rows.step // step, 1), rows.count)
