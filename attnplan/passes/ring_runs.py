"""Joining the attends of a hop whose rows lie side by side in the rank's tensors: fewer and larger kernel calls.

A zigzag shard is two runs of the sequence. Cut by them, its own hop is two causal attends and a full one, and the other
hops are two full attends each. In the rank's tensors the runs are neighbours: slot by slot the own hop is one causal
attend, and each other hop one full attend of all queries or of all keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import attrs

from attnplan.ir import Attend, RowMap
from attnplan.ir.buffers import Buffer
from attnplan.ir.slots import slot_condition
from attnplan.passes.ring_cut import Part


@attrs.frozen
class Piece:
    """One attend of a hop: runs of rows of the whole sequence, and where they lie in the rank's tensors."""

    op: Attend
    queries: tuple[RowMap, ...]
    keys: tuple[RowMap, ...]
    q: RowMap | None
    """Where the queries lie; None if they do not lie in one piece."""
    k: RowMap | None


def in_runs(parts: Sequence[Part], queries: Buffer, store: Buffer) -> list[Piece]:
    """Return the attends over some parts, neighbouring ones joined where a kernel needs no mask for the whole.

    Examples
    --------
    The own hop of the first of two zigzag ranks, rows 0 to 3 and 12 to 15:

    >>> from attnplan.ir import Axis
    >>> from attnplan.patterns import causal
    >>> low, high = (RowMap(0, row, (Axis(1), Axis(4, row=1))) for row in (0, 12))
    >>> parts = [Part(Attend(where=causal()), *pair) for pair in ((low, low), (high, low), (high, high))]
    >>> (one,) = in_runs(parts, Buffer((low, high)), Buffer((low, high)))
    >>> one.q.sizes, slot_condition(attrs.evolve(one.op, at=(one.queries, one.keys)), one.q, one.k)
    ((1, 8), 'causal')
    """
    found = [Piece(p.op, (p.q,), (p.k,), queries.address(p.q), store.address(p.k)) for p in parts]
    groups: dict[object, list[Piece]] = {}
    for i, one in enumerate(found):
        groups.setdefault(_alike(one) or i, []).append(one)
    return [piece for group in groups.values() for piece in _fewest(group)]


def _alike(one: Piece) -> object:
    """Return what pieces have in common that may be joined; None if this one may not be."""
    op = one.op
    if one.q is None or one.k is None or op.dropout or op.biases or op.tile or op.shift is None or op.where.operands:
        return None
    return op, *((m.head, m.batch) for m in (*one.queries, *one.keys)), *map(_lane, (one.q, one.k))


def _lane(rows: RowMap) -> object:
    return rows.head, rows.batch, rows.axes[-1].row


def _fewest(group: Sequence[Piece]) -> list[Piece]:
    """Return the pieces of a group joined into as few as there is a way to."""
    if len(group) == 1:
        return list(group)
    ways: tuple[Callable[[Piece], object], ...] = (lambda one: None, lambda one: one.queries, lambda one: one.keys)
    return min(([*group], *([*_by(group, way)] for way in ways)), key=len)


def _by(group: Sequence[Piece], way: Callable[[Piece], object]) -> Iterator[Piece]:
    sets: dict[object, list[Piece]] = {}
    for one in group:
        sets.setdefault(way(one), []).append(one)
    for some in sets.values():
        joined = _joined(some) if len(some) > 1 else None
        yield from some if joined is None else (joined,)


def _joined(some: Sequence[Piece]) -> Piece | None:
    """Return one attend over all pieces, None if it would need a mask or its rows do not lie side by side."""
    asking, giving = (_side_by_side({rows[i]: runs[i] for rows, runs in _both(some)}) for i in (0, 1))
    if asking is None or giving is None:
        return None
    (q, queries), (k, keys) = asking, giving
    condition = slot_condition(attrs.evolve(some[0].op, at=(queries, keys)), q, k)
    met = {(one.queries[0], one.keys[0]) for one in some}
    wanted = {(a, b) for i, a in enumerate(queries) for j, b in enumerate(keys) if condition == "full" or j <= i}
    if condition == "mask" or met != wanted or len(met) != len(some):
        return None
    return Piece(some[0].op, queries, keys, q, k)


def _both(some: Sequence[Piece]) -> Iterator[tuple[tuple[RowMap, RowMap], tuple[RowMap, RowMap]]]:
    for one in some:
        assert one.q is not None
        assert one.k is not None
        yield (one.q, one.k), (one.queries[0], one.keys[0])


def _side_by_side(runs: dict[RowMap, RowMap]) -> tuple[RowMap, tuple[RowMap, ...]] | None:
    """Return the address of runs that follow one another, and what they are; None if they do not."""
    first, *rest = ordered = sorted(runs, key=lambda rows: rows.row)
    last = first.axes[-1]
    length = last.size
    for one in rest:
        if one.row != first.row + length * last.row:
            return None
        length += one.length
    whole = attrs.evolve(first, axes=(*first.batch, attrs.evolve(last, size=length)))
    return whole, tuple(runs[one] for one in ordered)
