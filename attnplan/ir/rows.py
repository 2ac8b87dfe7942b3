"""Row maps: which (head, row) of an input each element of a value is.

A row map is affine, so a value is always a strided view of its tensor, and coverage over it is a product of geometric
sums. Its last axis is the one that attention runs over; the others are batch axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import attrs


@attrs.frozen(cache_hash=True)
class Axis:
    """One dimension of a view: its size, and how far the head and the row move per step."""

    size: int
    head: int = 0
    row: int = 0

    @property
    def repeats(self) -> bool:
        """Whether every step of this axis shows the same elements again."""
        return self.size > 1 and self.head == 0 and self.row == 0


@attrs.frozen(cache_hash=True)
class RowMap:
    """Element (i, j, ...) is head ``head + i*axes[0].head + ...`` and row ``row + i*axes[0].row + ...``.

    Examples
    --------
    Every second row of heads 1 and 3:

    >>> rows = RowMap(head=1, row=0, axes=(Axis(2, head=2), Axis(3, row=2)))
    >>> list(rows.elements())
    [(1, 0), (1, 2), (1, 4), (3, 0), (3, 2), (3, 4)]
    """

    head: int
    row: int
    axes: tuple[Axis, ...]

    @classmethod
    def whole(cls, heads: int, length: int, group: int | None = None) -> RowMap:
        """Return the map of a whole tensor, in row order.

        With ``group`` the heads are spread over two axes: the key/value head, and the query head inside its group.
        """
        lead = (Axis(heads, head=1),) if group is None else (Axis(heads // group, head=group), Axis(group, head=1))
        return cls(0, 0, (*lead, Axis(length, row=1)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(a.size for a in self.axes)

    @property
    def batch(self) -> tuple[Axis, ...]:
        """The axes before the last."""
        return self.axes[:-1]

    @property
    def length(self) -> int:
        """Number of rows that one attention runs over."""
        return self.axes[-1].size

    @property
    def elements_count(self) -> int:
        """Number of rows in the value, all heads together."""
        count = 1
        for axis in self.axes:
            count *= axis.size
        return count

    @property
    def keeps_rows(self) -> bool:
        """Whether each head shows its rows 0, 1, 2, ... in order."""
        return self.row == 0 and self.axes[-1].row == 1 and not any(a.row for a in self.batch)

    @property
    def contiguous(self) -> bool:
        """Whether each head shows consecutive rows, the same ones in every head."""
        return self.axes[-1].row == 1 and not any(a.row for a in self.batch)

    @property
    def shows_rows_once(self) -> bool:
        """Whether no (head, row) shows up twice, as far as the steps of the axes tell.

        Examples
        --------
        >>> RowMap(0, 0, (Axis(3, row=4), Axis(4, row=1))).shows_rows_once
        True
        >>> RowMap(0, 0, (Axis(3, row=4), Axis(5, row=1))).shows_rows_once
        False
        """
        heads = [(a.head, a.size) for a in self.axes if a.head and a.size > 1]
        rows = [(a.row, a.size) for a in self.axes if not a.head and a.size > 1]
        return _steps_over(heads) and _steps_over(rows)

    @property
    def last_head(self) -> int:
        """The largest head in the map."""
        return self.head + sum((a.size - 1) * a.head for a in self.axes)

    @property
    def last_row(self) -> int:
        """The largest row in the map."""
        return self.row + sum((a.size - 1) * a.row for a in self.axes)

    def batch_heads(self) -> Iterator[tuple[tuple[int, ...], int]]:
        """Iterate over (index along the batch axes, head)."""
        for index in product(*(range(a.size) for a in self.batch)):
            yield index, self.head_at(index)

    def head_at(self, index: tuple[int, ...]) -> int:
        """Return the head at an index along the batch axes; axes of size 1 broadcast."""
        return self.head + sum(a.head * i for a, i in zip(self.batch, index, strict=True) if a.size > 1)

    def elements(self) -> Iterator[tuple[int, int]]:
        """Iterate over all (head, row) in order; for small maps."""
        for index in product(*(range(a.size) for a in self.axes)):
            yield (
                self.head + sum(a.head * i for a, i in zip(self.axes, index, strict=True)),
                self.row + sum(a.row * i for a, i in zip(self.axes, index, strict=True)),
            )

    def head_extents(self) -> dict[int, tuple[int, int]]:
        """Return, for each head, its first and last row in this map."""
        extents: dict[int, tuple[int, int]] = {}
        moving = [a for a in self.batch if a.head]
        still = sum((a.size - 1) * a.row for a in self.axes if not a.head)
        for index in product(*(range(a.size) for a in moving)):
            head = self.head + sum(a.head * i for a, i in zip(moving, index, strict=True))
            first = self.row + sum(a.row * i for a, i in zip(moving, index, strict=True))
            low, high = extents.get(head, (first, first))
            extents[head] = (min(low, first), max(high, first + still))
        return extents


def _steps_over(steps: list[tuple[int, int]]) -> bool:
    """Return whether every (step, count) steps over all that the smaller ones reach."""
    reach = 0
    for step, count in sorted(steps):
        if step <= reach:
            return False
        reach += step * (count - 1)
    return True
