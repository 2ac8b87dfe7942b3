"""Closed forms: sums of ``x^query * y^key`` over the pairs of a pattern, in O(log n) per segment class.

A :class:`Point` says where to evaluate. At x = y = 1 over the integers the sum is the exact number of pairs; at a
random point modulo the prime 2^61 - 1 it is a fingerprint of the set (or multiset) of pairs: two different ones agree
with probability at most degree / prime, by the Schwartz-Zippel lemma.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from math import gcd

import attrs

from attnplan.errors import SpecError
from attnplan.patterns.bands import Band, Full
from attnplan.patterns.base import Pattern, conjuncts
from attnplan.patterns.segments import Dilated, Heads

PRIME = 2**61 - 1
MAX_CELLS = 1 << 20

Span = tuple[int | None, int | None]
"""Positions from the first up to, not including, the second; None is no limit."""
EVERYWHERE: Span = (None, None)
Range = tuple[int, int]
"""A span with both ends."""


def overlap(a: Span, b: Span) -> Span:
    """Return the positions that lie in both spans."""
    starts, stops = [n for n in (a[0], b[0]) if n is not None], [n for n in (a[1], b[1]) if n is not None]
    return max(starts, default=None), min(stops, default=None)


def clipped(span: Span, low: int, high: int) -> Range:
    """Return the part of ``span`` from ``low`` to ``high``; where there is none it ends where it begins or before."""
    return low if span[0] is None else max(low, span[0]), high if span[1] is None else min(high, span[1])


@attrs.frozen(cache_hash=True)
class Conjunction:
    """A pattern as an intersection, split into the part with a closed form and the rest."""

    left: int | None
    right: int | None
    dilated: tuple[Dilated, ...]
    heads: tuple[Heads, ...]
    opaque: frozenset[Pattern]
    """Conjuncts without a closed form; a proof carries them along unread."""
    queries: Span = EVERYWHERE
    """Positions of the queries."""
    keys: Span = EVERYWHERE
    """Positions of the keys."""
    period: int = 1
    """Query and key lie a multiple of it apart."""

    @classmethod
    def of(cls, pattern: Pattern) -> Conjunction:
        """Split ``pattern`` into its conjuncts."""
        return _split(pattern)

    @property
    def banded(self) -> bool:
        """Whether the distance between query and key is limited."""
        return self.left is not None or self.right is not None

    def admits(self, head: int) -> bool:
        """Return whether head ``head`` has any pairs at all."""
        return all(part.start <= head < part.stop for part in self.heads)

    def offsets(self, head: int) -> tuple[int, ...]:
        """Return the dilation offset of ``head`` for each of :attr:`dilated`."""
        return tuple(part.offset_of(head) for part in self.dilated)


@lru_cache(maxsize=512)
def _split(pattern: Pattern) -> Conjunction:
    """Return :meth:`Conjunction.of`, remembered: rules, passes and prices ask for the same few again and again."""
    bands = [c for c in conjuncts(pattern) if isinstance(c, Band)]
    lefts = [b.left for b in bands if b.left is not None]
    rights = [b.right for b in bands if b.right is not None]
    known = (Full, Band, Dilated, Heads)
    return Conjunction(
        left=min(lefts, default=None),
        right=min(rights, default=None),
        dilated=tuple(dict.fromkeys(c for c in conjuncts(pattern) if isinstance(c, Dilated))),
        heads=tuple(dict.fromkeys(c for c in conjuncts(pattern) if isinstance(c, Heads))),
        opaque=frozenset(c for c in conjuncts(pattern) if not isinstance(c, known)),
    )


@attrs.frozen(cache_hash=True)
class Point:
    """Where a generating function is evaluated; ``prime=None`` with x = y = 1 counts."""

    x: int = 1
    y: int = 1
    prime: int | None = None

    def power(self, base: int, exponent: int) -> int:
        """Return ``base ** exponent`` in the ring of this point."""
        return 1 if base == 1 else int(pow(base, exponent, self.prime))

    def inverse(self, value: int) -> int:
        """Return the number that times ``value`` is 1; only modulo the prime."""
        return int(pow(value, -1, self.prime))

    def reduce(self, value: int) -> int:
        """Bring ``value`` back into the ring."""
        return value if self.prime is None else value % self.prime

    def geometric(self, base: int, count: int) -> int:
        """Return the sum of ``base ** i`` for i < count."""
        if count <= 0:
            return 0
        if base == 1:
            return self.reduce(count)
        return self.reduce((self.power(base, count) - 1) * self.inverse(base - 1))

    def rectangle(self, x: int, y: int, rows: int, columns: int) -> int:
        """Return the sum of ``x^i y^j`` over all i < rows, j < columns."""
        return self.reduce(self.geometric(x, rows) * self.geometric(y, columns))

    def below(self, x: int, y: int, rows: int, columns: int, c: int) -> int:
        """Return the sum of ``x^i y^j`` over i < rows, 0 <= j < min(i + c, columns)."""
        ramp = max(0, -c)  # the first row that may have a column
        flat = min(max(columns - c, ramp), rows)  # the first row that has all of them
        ramp = min(ramp, rows)
        full = self.power(x, flat) * self.geometric(x, rows - flat) * self.geometric(y, columns)
        steps = flat - ramp
        if steps <= 0:
            return self.reduce(full)
        if y == 1:  # only at the counting point, where x is 1 too
            return self.reduce(full + steps * (ramp + c) + steps * (steps - 1) // 2)
        rising = self.power(y, ramp + c) * self.geometric(self.reduce(x * y), steps) - self.geometric(x, steps)
        return self.reduce(full + self.power(x, ramp) * rising * self.inverse(y - 1))

    def banded(self, x: int, y: int, rows: int, columns: int, low: int | None, high: int | None) -> int:
        """Return the sum of ``x^i y^j`` over the pairs with ``low <= i - j <= high``; None is no limit."""
        if low is not None and high is not None and low > high:
            return 0
        upper = self.rectangle(x, y, rows, columns) if low is None else self.below(x, y, rows, columns, 1 - low)
        lower = 0 if high is None else self.below(x, y, rows, columns, -high)
        return self.reduce(upper - lower)


@attrs.frozen
class Cell:
    """A block of query and key progressions with one stride, repeated along the diagonal, twice over.

    Repetition (t, u) with t < count, u < residues has queries ``q + t*step + u*unit + i*stride`` for i < rows, and keys
    likewise.
    """

    q: int
    k: int
    rows: int
    columns: int
    stride: int = 1
    step: int = 0
    count: int = 1
    unit: int = 0
    residues: int = 1

    def sum(self, point: Point, left: int | None, right: int | None, shift: int) -> int:
        """Return the sum over the pairs inside the band, with exponents query position - shift and key position."""
        if min(self.rows, self.columns, self.count, self.residues) <= 0:
            return 0
        ahead = self.q - self.k
        low = None if right is None else -((right + ahead) // self.stride)
        high = None if left is None else (left - ahead) // self.stride
        x, y = point.power(point.x, self.stride), point.power(point.y, self.stride)
        inner = _inner(point, x, y, self.rows, self.columns, low, high)
        start = point.power(point.x, self.q - shift) * point.power(point.y, self.k)
        repeat = 1
        for step, count in ((self.step, self.count), (self.unit, self.residues)):
            if count > 1:
                both = point.reduce(point.x * point.y)
                repeat *= point.geometric(point.power(both, step), count)
        return point.reduce(point.reduce(start * repeat) * inner)

    def congruent(self, period: int) -> Iterator[Cell]:
        """Iterate over the cells of the pairs that lie a multiple of ``period`` apart.

        Slot i meets slot j where ``i - j`` is ``ahead`` modulo some m. Residues of i whose progressions have equal
        lengths follow one another, between the places where one of q or k has a slot fewer or j starts over.
        """
        common = gcd(self.stride, period)
        if (self.k - self.q) % common or period == 1:
            yield from () if period > 1 else (self,)
            return
        m = period // common
        ahead = (self.k - self.q) // common * pow(self.stride // common, -1, m) % m
        ends = {0, m, ahead, self.rows % m, (self.columns + ahead) % m}
        for t, stop in pairwise(sorted(ends)):
            j = (t - ahead) % m
            yield attrs.evolve(
                self,
                q=self.q + t * self.stride,
                k=self.k + j * self.stride,
                rows=-((t - self.rows) // m),
                columns=-((j - self.columns) // m),
                stride=self.stride * m,
                unit=self.stride,
                residues=stop - t,
            )


@lru_cache(maxsize=4096)
def _inner(point: Point, x: int, y: int, rows: int, columns: int, low: int | None, high: int | None) -> int:
    """Return ``point.banded``, remembered: the offsets of a branch share it."""
    return point.banded(x, y, rows, columns, low, high)


def _progression(first: int, residue: int, stride: int, stop: int) -> tuple[int, int]:
    """Return the first position >= ``first`` congruent to ``residue``, and how many lie below ``stop``."""
    start = first + (residue - first) % stride
    return start, max(0, -(-(stop - start) // stride))


def _piece(low: int, high: int, residue: int, stride: int, queries: Range, keys: Range) -> Cell:
    """Return the cell of the segment [low, high), cut to the positions that exist."""
    q, rows = _progression(max(low, queries[0]), residue, stride, min(high, queries[1]))
    k, columns = _progression(max(low, keys[0]), residue, stride, min(high, keys[1]))
    return Cell(q, k, rows, columns, stride)


def cells(dilated: Sequence[Dilated], offsets: Sequence[int], queries: Range, keys: Range) -> Iterator[Cell]:
    """Iterate over the cells of an intersection of segment patterns, for one head.

    Parameters
    ----------
    dilated, offsets
        The segment patterns and the head's offset in each.
    queries, keys
        First position of the queries and of the keys, and the position after the last. Keys are at 0 or after it.
    """
    if not dilated:
        yield Cell(queries[0], keys[0], queries[1] - queries[0], keys[1] - keys[0])
        return
    if len(dilated) > 1:
        yield from _irregular_cells(dilated, offsets, queries, keys)
        return
    (part,), (offset,) = dilated, offsets
    length, rate = part.length, part.rate
    # A segment between the two holds no query or no key beyond them; whole ones lie inside, ragged ones hold an end.
    first, last = max(queries[0], keys[0]), min(queries[1], keys[1])
    whole, end = -(-first // length), last // length
    if end > whole:
        start, rows = _progression(whole * length, whole * length + offset, rate, (whole + 1) * length)
        yield Cell(start, start, rows, rows, rate, length, end - whole)
    ragged = {first // length} if first % length else set()
    if last % length:
        ragged.add(last // length)
    for t in sorted(ragged):
        yield _piece(t * length, (t + 1) * length, t * length + offset, rate, queries, keys)


def _irregular_cells(dilated: Sequence[Dilated], offsets: Sequence[int], queries: Range, keys: Range) -> Iterator[Cell]:
    """Walk over the pieces between segment boundaries of any of several patterns."""
    first, last = max(queries[0], keys[0]), min(queries[1], keys[1])
    if sum((last - first) // part.length + 2 for part in dilated) > MAX_CELLS:
        raise SpecError(
            f"{' & '.join(map(repr, dilated))} cuts {last - first} positions into over {MAX_CELLS} irregular pieces; "
            "use segment lengths that divide each other"
        )
    low = min(first // part.length * part.length for part in dilated)
    while low < last:
        high = min((low // part.length + 1) * part.length for part in dilated)
        merged = _intersect(
            [(low // part.length * part.length + o, part.rate) for part, o in zip(dilated, offsets, strict=True)]
        )
        if merged is not None and high > first:
            yield _piece(low, high, *merged, queries, keys)
        low = high


def _intersect(progressions: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the (residue, stride) common to all progressions, or None (Chinese remainder theorem)."""
    residue, stride = 0, 1
    for other, modulus in progressions:
        common = gcd(stride, modulus)
        if (other - residue) % common:
            return None
        steps = (other - residue) // common * pow(stride // common, -1, modulus // common)
        residue, stride = residue + stride * (steps % (modulus // common)), stride * (modulus // common)
    return residue, stride


def head_sum(conjunction: Conjunction, head: int, point: Point, shift: int, seq_len: int, kv_len: int) -> int:
    """Return the sum of ``x^row y^key`` over the pairs of one head, its opaque conjuncts left aside."""
    return range_sum(conjunction, head, point, (shift, shift + seq_len), (0, kv_len), shift)


def range_sum(conjunction: Conjunction, head: int, point: Point, queries: Range, keys: Range, shift: int) -> int:
    """Return the sum of ``x^row y^key`` over the pairs of one head whose positions lie in two ranges.

    Parameters
    ----------
    conjunction
        The pairs; its opaque conjuncts are left aside.
    queries, keys
        First position, and the position after the last.
    shift
        Position of query row 0.
    """
    if not conjunction.admits(head):
        return 0
    return _offset_sum(conjunction, conjunction.offsets(head), point, queries, keys, shift)


@lru_cache(maxsize=8192)
def _offset_sum(
    conjunction: Conjunction, offsets: tuple[int, ...], point: Point, queries: Range, keys: Range, shift: int
) -> int:
    """Return the sum for one head; heads with one offset share it."""
    pieces = cells(
        conjunction.dilated, offsets, clipped(conjunction.queries, *queries), clipped(conjunction.keys, *keys)
    )
    return point.reduce(
        sum(
            cell.sum(point, conjunction.left, conjunction.right, shift)
            for piece in pieces
            for cell in piece.congruent(conjunction.period)
        )
    )
