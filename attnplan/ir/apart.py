"""Which parts of a join share no row: those that kernels may write to their places themselves."""

from __future__ import annotations

from functools import lru_cache

from attnplan.ir.rows import RowMap


@lru_cache(maxsize=256)
def apart(maps: tuple[RowMap, ...]) -> tuple[int, ...]:
    """Return the indices of maps of which no two share a (head, row): the largest, and then each that may join.

    Maps whose row ranges interleave count as sharing rows.

    Examples
    --------
    Heads 0 and 1, all heads, and head 2:

    >>> whole, pair, one = RowMap.whole(3, 8), RowMap.whole(2, 8), RowMap(2, 0, RowMap.whole(1, 8).axes)
    >>> apart((pair, whole, one)), apart((one, pair))
    ((1,), (1, 0))
    """
    taken: dict[int, list[tuple[int, int]]] = {}
    chosen = []
    for i in sorted(range(len(maps)), key=lambda i: -maps[i].elements_count):
        extents = maps[i].head_extents()
        if all(b < first or last < a for h, (first, last) in extents.items() for a, b in taken.get(h, ())):
            chosen.append(i)
            for head, extent in extents.items():
                taken.setdefault(head, []).append(extent)
    return tuple(chosen)
