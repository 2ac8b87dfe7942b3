"""The generating function of one attend: its pairs under one condition, summed at a random point in closed form.

Rows that follow one another are summed head by head, with any condition that has a closed form. Over other affine rows
each axis is a geometric factor; where a condition ends inside an axis, the axis is cut there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

import attrs

from attnplan.errors import PassError
from attnplan.ir.ops import Attend
from attnplan.ir.rows import RowMap
from attnplan.patterns.sums import EVERYWHERE, PRIME, Cell, Conjunction, Point, Span, clipped, range_sum

MAX_CUT = 4096
"""Most steps of an axis that are summed one by one, because a condition ends inside each of them."""


@attrs.frozen(cache_hash=True)
class Probe:
    """One random point for all five variables."""

    branch: int
    head: int
    kv_head: int
    pairs: Point

    @classmethod
    def draw(cls, source: random.Random) -> Probe:
        """Draw the five values."""
        values = [source.randrange(2, PRIME - 1) for _ in range(5)]
        return cls(values[0], values[1], values[2], Point(values[3], values[4], PRIME))

    def weight(self, branch: int, head: int, kv_head: int) -> int:
        """Return the factor that every pair of a branch and a head has."""
        return _power(self.branch, branch) * _power(self.head, head) * _power(self.kv_head, kv_head) % PRIME


@lru_cache(maxsize=4096)
def _power(base: int, exponent: int) -> int:
    return pow(base, exponent, PRIME)


_SOURCE = random.Random(0x61747470)  # fixed, so that a graph has the same fingerprint everywhere
PROBES = (Probe.draw(_SOURCE), Probe.draw(_SOURCE))


def attend_sum(probe: Probe, op: Attend, condition: Conjunction, q: RowMap, k: RowMap) -> int:
    """Return the sum over the pairs of an attend that one intersection admits, its opaque conjuncts left aside.

    Raises
    ------
    PassError
        If the condition has no closed form over these rows.
    """
    if q.contiguous and k.contiguous:
        return _by_head(probe, op, condition, q, k)
    if condition.dilated:
        raise PassError(f"attend where {op.where!r} keeps a segment condition over rows that were taken apart")
    axes = [
        _Axis(a.size, (a.head, a.row, b.row if b.size > 1 else 0), b.head if b.size > 1 else 0)
        for a, b in zip(q.batch, k.batch, strict=True)
    ]
    axes.sort(key=lambda a: -max(a.steps[1:]))  # long steps first: an end then falls inside few of them
    heads = _head_span(condition)
    start = (q.head, q.row + (op.shift or 0), k.row)
    return _Affine(probe, op, condition, q, k).sum(axes, start, k.head, (heads, condition.queries, condition.keys))


def _head_span(condition: Conjunction) -> Span:
    if not condition.heads:
        return EVERYWHERE
    return max(part.start for part in condition.heads), min(part.stop for part in condition.heads)


def _by_head(probe: Probe, op: Attend, condition: Conjunction, q: RowMap, k: RowMap) -> int:
    """Sum head by head over consecutive rows, with the pattern's own closed form; heads with one offset share it."""
    shift, total = op.shift or 0, 0
    queries, keys = (q.row + shift, q.row + shift + q.length), (k.row, k.row + k.length)
    for heads in _heads_alike(condition, q, k):
        weight = sum([probe.weight(op.branch, *pair) for pair in heads]) % PRIME
        total += weight * range_sum(condition, heads[0][0], probe.pairs, queries, keys, shift)
    return total % PRIME


@lru_cache(maxsize=512)
def _heads_alike(condition: Conjunction, q: RowMap, k: RowMap) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Return the (head, key/value head) pairs of an attend, together where a condition is the same for them."""
    found: dict[tuple[object, ...], list[tuple[int, int]]] = {}
    for index, head in q.batch_heads():
        found.setdefault((condition.admits(head), condition.offsets(head)), []).append((head, k.head_at(index)))
    return tuple(map(tuple, found.values()))


@attrs.frozen
class _Axis:
    """A batch axis: its size, how far head, query and key move per step, and the key/value head."""

    size: int
    steps: tuple[int, int, int]
    kv_head: int


Place = tuple[int, int, int]
"""A head, the position of a query, and the position of a key."""
Spans = tuple[Span, Span, Span]
"""Which heads, queries and keys a condition admits."""
_UNLIMITED: Spans = (EVERYWHERE, EVERYWHERE, EVERYWHERE)


@attrs.frozen
class _Affine:
    """Sums over affine rows under a band, a period, and spans of heads, queries and keys."""

    probe: Probe
    op: Attend
    condition: Conjunction
    q: RowMap
    k: RowMap

    def sum(self, axes: Sequence[_Axis], start: Place, kv_head: int, spans: Spans) -> int:
        """Return the sum over the axes left and the rows that attention runs over, from ``start`` on."""
        last = [s + e for s, e in zip(start, self._extents(axes), strict=True)]
        ranges = [clipped(span, s, e + 1) for span, s, e in zip(spans, start, last, strict=True)]
        if any(low >= high for low, high in ranges):
            return 0
        cut = [r != (s, e + 1) for r, s, e in zip(ranges, start, last, strict=True)]
        left: Spans = tuple(span if c else EVERYWHERE for span, c in zip(spans, cut, strict=True))  # type: ignore[assignment]
        if left == _UNLIMITED:
            return self._whole(axes, start, kv_head)
        if not axes:
            return self._block(start, kv_head, left)
        return self._along(axes[0], axes[1:], start, kv_head, left)

    def _whole(self, axes: Sequence[_Axis], start: Place, kv_head: int) -> int:
        """Return the sum where no end of the condition falls inside an axis: each is a factor."""
        total = self._block(start, kv_head, _UNLIMITED)
        for axis in axes:
            self._check_drift(axis)
            if axis.size > 1:
                total = total * self.probe.pairs.geometric(self._ratio(axis), axis.size) % PRIME
        return total

    def _check_drift(self, axis: _Axis) -> None:
        drift = axis.steps[1] - axis.steps[2]
        if axis.size > 1 and ((self.condition.banded and drift) or drift % self.condition.period):
            raise PassError(f"attend where {self.op.where!r}: queries and keys drift apart along a batch axis")

    def _extents(self, axes: Sequence[_Axis]) -> Place:
        """Return how far the last head, query and key lie beyond the first."""
        head, query, key = (sum((a.size - 1) * a.steps[i] for a in axes) for i in range(3))
        rows, keys = self.q.axes[-1], self.k.axes[-1]
        return head, query + (rows.size - 1) * rows.row, key + (keys.size - 1) * keys.row

    def _along(self, axis: _Axis, rest: Sequence[_Axis], start: Place, kv_head: int, spans: Spans) -> int:
        """Sum along one axis: steps that lie in the spans together, those that cross an end one by one."""
        self._check_drift(axis)
        reach = self._extents(rest)
        inside, touched = (0, axis.size), (0, axis.size)
        free = list(spans)
        for i, (span, step) in enumerate(zip(spans, axis.steps, strict=True)):
            if span != EVERYWHERE and step:
                low = 0 if span[0] is None else span[0] - start[i]
                high = axis.size * step + reach[i] if span[1] is None else span[1] - start[i]
                within = -(-low // step), (high - 1 - reach[i]) // step + 1
                touching = -(-(low - reach[i]) // step), -(-high // step)
                inside = max(inside[0], within[0]), min(inside[1], within[1])
                touched = max(touched[0], touching[0]), min(touched[1], touching[1])
                free[i] = EVERYWHERE
        inside = inside if inside[0] < inside[1] else (touched[1], touched[1])
        single = [*range(touched[0], inside[0]), *range(inside[1], touched[1])]
        if len(single) > MAX_CUT:
            raise PassError(f"attend where {self.op.where!r} ends inside {len(single)} rows of a batch axis")
        total = sum(self.sum(rest, _moved(start, axis, t), kv_head + t * axis.kv_head, spans) for t in single)
        if inside[0] < inside[1]:
            t, count = inside[0], inside[1] - inside[0]
            block = self.sum(rest, _moved(start, axis, t), kv_head + t * axis.kv_head, (free[0], free[1], free[2]))
            total += self.probe.pairs.geometric(self._ratio(axis), count) * block
        return total % PRIME

    def _ratio(self, axis: _Axis) -> int:
        """Return the factor by which one step along an axis multiplies every pair."""
        point, (head, query, key) = self.probe.pairs, axis.steps
        heads = pow(self.probe.head, head, PRIME) * pow(self.probe.kv_head, axis.kv_head, PRIME)
        return heads * pow(point.x, query, PRIME) * pow(point.y, key, PRIME) % PRIME

    def _block(self, start: Place, kv_head: int, spans: Spans) -> int:
        rows, keys, shift = self.q.axes[-1], self.k.axes[-1], self.op.shift or 0
        point, condition = self.probe.pairs, self.condition
        weight = self.probe.weight(self.op.branch, start[0], kv_head)
        diagonal = condition.banded or condition.period > 1
        if diagonal and not rows.row == keys.row > 0:
            raise PassError(f"attend where {self.op.where!r}: query rows step by {rows.row}, keys by {keys.row}")
        query, n = _slots(spans[1], start[1], rows.row, rows.size)
        key, m = _slots(spans[2], start[2], keys.row, keys.size)
        if diagonal:
            cells = Cell(query, key, n, m, rows.row).congruent(condition.period)
            return weight * sum(c.sum(point, condition.left, condition.right, shift) for c in cells) % PRIME
        x, y = point.power(point.x, rows.row), point.power(point.y, keys.row)
        first = point.power(point.x, query - shift) * point.power(point.y, key)
        return weight * first * point.rectangle(x, y, n, m) % PRIME


def _moved(start: Place, axis: _Axis, t: int) -> Place:
    head, query, key = (s + t * step for s, step in zip(start, axis.steps, strict=True))
    return head, query, key


def _slots(span: Span, first: int, step: int, size: int) -> tuple[int, int]:
    """Return the first position inside ``span`` of a progression, and how many there are."""
    if span == EVERYWHERE:
        return first, size
    low = 0 if span[0] is None else max(0, -((first - span[0]) // step))
    high = size if span[1] is None else min(size, -((first - span[1]) // step))
    return first + low * step, max(0, high - low)
