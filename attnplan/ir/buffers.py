"""Rows of the sequence as they lie in one tensor: where in it the elements of a row map are."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from attnplan.ir.rows import Axis, RowMap


def kept_heads(maps: Sequence[RowMap]) -> int | None:
    """Return how many heads a tensor of these maps keeps, None if it is flat (one head).

    A tensor keeps its heads where every map shows the same consecutive heads along its first axis, and the same rows
    of each.

    Examples
    --------
    >>> kept_heads([RowMap(0, 4, (Axis(2, head=1), Axis(4, row=1)))])
    2
    >>> kept_heads([RowMap(0, 4, (Axis(2, head=1, row=1), Axis(4, row=2)))]) is None
    True
    """
    leads = {(m.head, m.axes[0]) for m in maps}
    if len(leads) != 1:
        return None
    ((_, lead),) = leads
    plain = lead.row == 0 and (lead.head == 1 or lead.size == 1) and not any(a.head for m in maps for a in m.axes[1:])
    return lead.size if plain and all(len(m.axes) > 1 for m in maps) else None


@attrs.frozen(cache_hash=True)
class Buffer:
    """A tensor ``[B, heads, rows, D]`` of some maps: heads kept, or all elements in flat order under one head."""

    maps: tuple[RowMap, ...]

    @property
    def heads(self) -> int:
        """Heads of the tensor."""
        return kept_heads(self.maps) or 1

    @property
    def rows(self) -> int:
        """Rows of each head of the tensor."""
        return sum(m.elements_count for m in self.maps) // self.heads

    def address(self, wanted: RowMap) -> RowMap | None:
        """Return which (head, row) of the tensor the elements of ``wanted`` are, None unless one map holds them all.

        Examples
        --------
        >>> buffer = Buffer((RowMap(0, 8, (Axis(2, head=1), Axis(8, row=2))),))
        >>> buffer.address(RowMap(0, 10, (Axis(2, head=1), Axis(3, row=4))))
        RowMap(head=0, row=1, axes=(Axis(size=2, head=1, row=0), Axis(size=3, head=0, row=2)))
        """
        heads, start = self.heads, 0
        for one in self.maps:
            found = _inside(one, wanted, start, kept=heads > 1)
            if found is not None:
                return found
            start += one.elements_count // heads
        return None


def _inside(held: RowMap, wanted: RowMap, start: int, *, kept: bool) -> RowMap | None:
    """Return the addresses of ``wanted`` in a tensor in which ``held`` begins at row ``start``."""
    last = held.row <= wanted.row and wanted.last_row <= held.last_row
    if not (last and held.head <= wanted.head and wanted.last_head <= held.last_head):
        return None
    first = _digits(held, wanted.head - held.head, wanted.row - held.row)
    steps = [_digits(held, a.head, a.row) if a.size > 1 else [0] * len(held.axes) for a in wanted.axes]
    if first is None or any(s is None for s in steps):
        return None
    known = [s for s in steps if s is not None]
    for i, axis in enumerate(held.axes):
        if first[i] + sum((a.size - 1) * s[i] for a, s in zip(wanted.axes, known, strict=True)) >= axis.size:
            return None
    flat = _flat_steps(held, kept=kept)
    places = [
        tuple(sum(d * step[side] for d, step in zip(digits, flat, strict=True)) for side in (0, 1))
        for digits in (first, *known)
    ]
    axes = tuple(Axis(a.size, head, row) for a, (head, row) in zip(wanted.axes, places[1:], strict=True))
    return RowMap(places[0][0], start + places[0][1], axes)


def _digits(held: RowMap, head: int, row: int) -> list[int] | None:
    """Return how many steps of each axis of ``held`` lead on by so many heads and rows, the longest steps first."""
    digits = [0] * len(held.axes)
    order = sorted(range(len(held.axes)), key=lambda i: (-held.axes[i].head, -held.axes[i].row))
    for i in order:
        axis = held.axes[i]
        if axis.size == 1 or axis.repeats:
            continue
        if axis.head:
            digits[i] = min(head // axis.head, axis.size - 1)
        else:
            digits[i] = min(row // axis.row, axis.size - 1) if row > 0 else 0
        head, row = head - digits[i] * axis.head, row - digits[i] * axis.row
    return digits if head == 0 and row == 0 else None


def _flat_steps(held: RowMap, *, kept: bool) -> list[tuple[int, int]]:
    """Return (head, row) that one step of each axis moves by in the tensor."""
    steps, row = [], 1
    for i in range(len(held.axes) - 1, -1, -1):
        if kept and i == 0:
            steps.append((1, 0))
        else:
            steps.append((0, row))
            row *= held.axes[i].size
    return steps[::-1]
