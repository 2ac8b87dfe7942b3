"""Rows in arithmetic progression: what a rank holds, and what of it a row map shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from math import gcd
from operator import attrgetter

import attrs


@attrs.frozen(cache_hash=True)
class Progression:
    """Rows ``start, start + step, ...``, ``count`` of them.

    Examples
    --------
    >>> list(Progression(3, 4, 3))
    [3, 7, 11]
    """

    start: int
    step: int
    count: int

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.start + self.step * self.count, self.step))

    @property
    def last(self) -> int:
        """The largest row; before :attr:`start` if there is none."""
        return self.start + self.step * (self.count - 1)

    def clipped(self, low: int | None, high: int | None) -> Progression:
        """Return the rows from ``low`` up to, not including, ``high``; None is no limit.

        Examples
        --------
        >>> Progression(3, 4, 3).clipped(4, 12)
        Progression(start=7, step=4, count=2)
        """
        skipped = 0 if low is None else max(0, -((self.start - low) // self.step))
        stop = self.count if high is None else min(self.count, -((self.start - high) // self.step))
        return Progression(self.start + skipped * self.step, self.step, max(0, stop - skipped))

    def common(self, other: Progression) -> Progression:
        """Return the rows that lie in both (Chinese remainder theorem).

        Examples
        --------
        >>> Progression(0, 4, 10).common(Progression(2, 6, 10))
        Progression(start=8, step=12, count=3)
        """
        low, high = max(self.start, other.start), min(self.last, other.last) + 1
        shared = gcd(self.step, other.step)
        if (other.start - self.start) % shared or low >= high or not (self.count and other.count):
            return Progression(low, 1, 0)
        modulus = other.step // shared
        steps = (other.start - self.start) // shared * pow(self.step // shared, -1, modulus) % modulus
        step = self.step * modulus
        first = low + (self.start + steps * self.step - low) % step
        return Progression(first, step, max(0, -(-(high - first) // step)))

    def holds(self, other: Progression) -> bool:
        """Return whether every row of ``other`` is in here."""
        return other.count == 0 or self.common(other).count == other.count

    def without(self, other: Progression) -> Iterator[Progression]:
        """Iterate over progressions that make up the rows of this one that are not in ``other``.

        Examples
        --------
        >>> [list(p) for p in Progression(0, 1, 10).without(Progression(2, 3, 2))]
        [[0, 1], [3], [4], [6, 7, 8, 9]]
        """
        both = self.common(other)
        if not both.count:
            yield self
            return
        apart = both.step // self.step
        inside = self.clipped(both.start, both.last + 1)
        pieces = [self.clipped(None, both.start), self.clipped(both.last + 1, None)]
        middle = [
            Progression(inside.start + r * self.step, both.step, -(-(inside.count - r) // apart))
            for r in range(1, apart)
        ]
        yield from (p for p in (pieces[0], *middle, pieces[1]) if p.count > 0)


def union(progressions: Iterable[Progression]) -> list[Progression]:
    """Return disjoint progressions with the rows of all given ones, the longest and densest kept whole.

    Examples
    --------
    >>> union([Progression(0, 4, 4), Progression(0, 2, 4)])
    [Progression(start=0, step=2, count=4), Progression(start=8, step=4, count=2)]
    """
    kept: list[Progression] = []
    for step, alike in groupby(sorted(set(progressions), key=attrgetter("step")), key=attrgetter("step")):
        others = kept[:]  # of another step: those of one step are disjoint once they are joined
        for one in sorted(_of_one_step(alike, step), key=lambda p: (-p.count, p.start)):
            kept += without(one, others)
    return kept


def _of_one_step(progressions: Iterable[Progression], step: int) -> list[Progression]:
    """Return disjoint progressions with the rows of some of one step."""
    found: list[Progression] = []
    for one in sorted((p for p in progressions if p.count), key=lambda p: (p.start % step, p.start)):
        before = found[-1] if found else None
        if before is not None and before.start % step == one.start % step and one.start <= before.last + step:
            last = max(before.last, one.last)
            found[-1] = Progression(before.start, step, (last - before.start) // step + 1)
        else:
            found.append(one)
    return found


def without(rows: Progression, others: Iterable[Progression]) -> list[Progression]:
    """Return progressions with the rows of one that are in none of the others.

    Examples
    --------
    >>> without(Progression(0, 1, 10), [Progression(2, 1, 3), Progression(8, 1, 4)])
    [Progression(start=0, step=1, count=2), Progression(start=5, step=1, count=3)]
    """
    left = [rows] if rows.count else []
    for other in others:
        left = [piece for one in left for piece in one.without(other)]
    return left


def joined(progressions: Sequence[Progression]) -> list[Progression]:
    """Return progressions with those that continue one another joined, in rising order.

    Examples
    --------
    >>> joined([Progression(4, 1, 4), Progression(0, 1, 4), Progression(16, 1, 2)])
    [Progression(start=0, step=1, count=8), Progression(start=16, step=1, count=2)]
    """
    found: list[Progression] = []
    for one in sorted((p for p in progressions if p.count), key=lambda p: p.start):
        before = found[-1] if found else None
        if before is not None and before.step == one.step == 1 and one.start <= before.last + 1:
            found[-1] = attrs.evolve(before, count=max(before.last, one.last) - before.start + 1)
        elif before is not None and before.step == one.step and before.last + one.step == one.start:
            found[-1] = attrs.evolve(before, count=before.count + one.count)
        else:
            found.append(one)
    return found
