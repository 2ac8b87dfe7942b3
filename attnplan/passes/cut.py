"""Row maps cut to a box of heads and rows: affine pieces, as few as the steps of the axes allow."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from attnplan.ir import Axis, RowMap


def cut(q: RowMap, k: RowMap, heads: tuple[int, int], rows: tuple[int, int]) -> Iterator[tuple[RowMap, RowMap]]:
    """Iterate over the rows of ``q`` that lie in a box, as row maps, each with the same batch indices of ``k``.

    Both ranges leave out their end.

    Examples
    --------
    Segments of 4 rows; rows 2 to 9 hold half of the first and all of the second:

    >>> q = RowMap(0, 0, (Axis(3, row=4), Axis(4, row=1)))
    >>> for some, _ in cut(q, q, (0, 1), (2, 8)):
    ...     print(some.row, some.sizes)
    2 (1, 2)
    4 (1, 4)
    """
    if q.head >= heads[0] and q.last_head < heads[1] and q.row >= rows[0] and q.last_row < rows[1]:
        yield q, k
        return
    if q.head >= heads[1] or q.last_head < heads[0] or q.row >= rows[1] or q.last_row < rows[0]:
        return
    spans = [_span(q, axis, heads, rows) for axis in range(len(q.axes))]
    useful = [i for i, a in enumerate(q.axes) if a.size > 1 and spans[i][1:3] != (0, a.size) and (a.head or a.row)]
    axis = min(
        useful, key=lambda i: (spans[i][1] - spans[i][0] + spans[i][3] - spans[i][2], i)
    )  # fewest indices half inside
    low, start, stop, high = spans[axis]
    for first, last in (
        *((i, i + 1) for i in range(low, start)),
        (start, stop),
        *((i, i + 1) for i in range(stop, high)),
    ):
        if first < last:
            yield from cut(_slice(q, axis, first, last), _slice_keys(q, k, axis, first, last), heads, rows)


def _span(q: RowMap, axis: int, heads: tuple[int, int], rows: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return (low, start, stop, high): along an axis, only low..high reach into the box; start..stop lie inside."""
    one = q.axes[axis]
    low, start, stop, high = 0, 0, one.size, one.size
    for step, first, last, (begin, end) in (
        (one.head, q.head, q.last_head, heads),
        (one.row, q.row, q.last_row, rows),
    ):
        rest = last - first - (one.size - 1) * step  # how far the other axes reach
        if step == 0:
            if first < begin or first + rest >= end:
                start, stop = one.size, 0  # no index is inside by this axis alone
            continue
        low, high = max(low, ceil((begin - rest - first) / step)), min(high, -((first - end) // step))
        start, stop = max(start, ceil((begin - first) / step)), min(stop, -((first + rest - end) // step))
    start, stop = max(start, low), min(stop, high)
    return (low, start, stop, high) if start < stop else (low, low, low, high)


def _slice(rows: RowMap, axis: int, first: int, last: int) -> RowMap:
    one = rows.axes[axis]
    axes = tuple(Axis(last - first, a.head, a.row) if i == axis else a for i, a in enumerate(rows.axes))
    return RowMap(rows.head + first * one.head, rows.row + first * one.row, axes)


def _slice_keys(q: RowMap, k: RowMap, axis: int, first: int, last: int) -> RowMap:
    """Return the keys of some indices of an axis of ``q``; those along which they broadcast, and the last, stay."""
    if axis == len(q.axes) - 1 or k.axes[axis].size == 1:
        return k
    return _slice(k, axis, first, last)
