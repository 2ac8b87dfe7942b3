"""Which keys some queries need, exactly where a pattern says where its membership changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import lcm, prod
from typing import TYPE_CHECKING, Any

import attrs

from attnplan.ir import Axis, RowMap
from attnplan.ir.progressions import Progression, without
from attnplan.passes.ring_cut import Part, of_heads
from attnplan.patterns import Pattern, Shape
from attnplan.patterns.bands import Band, Full
from attnplan.patterns.base import conjuncts
from attnplan.patterns.operands import static_part
from attnplan.patterns.sums import Conjunction

if TYPE_CHECKING:
    import numpy as np

MAX_WORK = 1 << 26
"""Most pairs, or ends of runs of keys, that are looked at to find out which keys are needed."""
MAX_PIECES = 64
"""Most pieces into which the needed keys of one part are cut; the smallest gaps between them are sent too."""
_MAX_LANES = 64
_MAX_PERIOD = 64


@attrs.frozen
class Narrowed:
    """A part without the keys that none of its queries needs."""

    parts: tuple[Part, ...]
    why: str = ""
    """Why more keys are left than are needed; empty if there are none."""
    empty: tuple[Part, ...] = ()
    """What was left out for holding no pair, where a proof does not see that by its sums."""


def narrowed(part: Part, shape: Shape) -> Narrowed:
    """Leave out the keys of a part that no query of it meets.

    Examples
    --------
    >>> from attnplan.ir import Attend
    >>> from attnplan.patterns import documents
    >>> q, k = RowMap(0, 8, (Axis(1), Axis(4, row=1))), RowMap(0, 0, (Axis(1), Axis(8, row=1)))
    >>> found = narrowed(Part(Attend(where=documents([3, 2, 7])), q, k), Shape(12, 12, 1))
    >>> [(p.k.row, p.k.length) for p in found.parts], found.why
    ([(5, 3)], '')
    """
    where = part.op.where
    fixed = static_part(where)
    why = "" if fixed == where else f"which keys {_open(where)!r} holds arrives with the call"
    if _bands_suffice(part, fixed):
        return Narrowed((part,), why)
    heads = {fixed.head_key(h) for _, h in part.q.batch_heads()}
    if len(heads) > 1:
        singly = [p for h in range(part.q.head, part.q.last_head + 1) for p in of_heads(part, h, h + 1)]
        return _all(singly, shape, why)
    axes = enumerate(zip(part.q.batch, part.k.batch, strict=True))
    moving = [i for i, (a, b) in axes if (a.row and a.size > 1) or (b.row and b.size > 1)]
    banded = all(isinstance(c, Band | Full) for c in conjuncts(fixed))
    alike = all(part.q.axes[i].row == part.k.axes[i].row for i in moving)
    if moving and not (banded and alike):
        if prod(part.q.axes[i].size for i in moving) > _MAX_LANES:
            return Narrowed((part,), f"{where!r} over rows that were taken apart is not asked row by row")
        return _all(list(_lanes(part, moving)), shape, why)
    needed = _needed(fixed, part, shape)
    if needed is None:
        return Narrowed((part,), why or f"{where!r} has too many pairs here to be asked one by one")
    pieces, gaps = _pieces(needed)
    taken, empty = (
        tuple(attrs.evolve(part, k=_columns(part.k, one)) for one in each)
        for each in (pieces, without(Progression(0, 1, part.k.length), pieces))
    )
    crowded = "needed keys lie in too many pieces: the smallest gaps are sent too" if gaps else ""
    return Narrowed(taken, why or crowded, () if banded else empty)


def _open(where: Pattern) -> Pattern:
    return next((c for c in conjuncts(where) if c.operands), where)


def _all(parts: Sequence[Part], shape: Shape, why: str) -> Narrowed:
    found = [narrowed(p, shape) for p in parts]
    return Narrowed(
        parts=tuple(p for f in found for p in f.parts),
        why=why or next((f.why for f in found if f.why), ""),
        empty=tuple(p for f in found for p in f.empty),
    )


def _bands_suffice(part: Part, where: Pattern) -> bool:
    """Return whether the keys between the first and the last that a band leaves are all needed."""
    if not all(isinstance(c, Band | Full) for c in conjuncts(where)):
        return False
    known = Conjunction.of(where)
    if known.left is None or known.right is None or part.q.length == 1:
        return True
    return known.left + known.right + 1 >= part.q.axes[-1].row


def _lanes(part: Part, moving: Sequence[int]) -> Iterator[Part]:
    """Iterate over the steps of batch axes along which rows move, one part each."""
    if not moving:
        yield part
        return
    first, *rest = moving
    for t in range(part.q.axes[first].size):
        yield from _lanes(attrs.evolve(part, q=_step(part.q, first, t), k=_step(part.k, first, t)), rest)


def _step(rows: RowMap, i: int, t: int) -> RowMap:
    axis = rows.axes[i]
    if axis.size == 1:
        return rows
    axes = (*rows.axes[:i], Axis(1), *rows.axes[i + 1 :])
    return RowMap(rows.head + t * axis.head, rows.row + t * axis.row, axes)


def _columns(rows: RowMap, keys: Progression) -> RowMap:
    last = rows.axes[-1]
    return RowMap(rows.head, rows.row + keys.start * last.row, (*rows.batch, Axis(keys.count, 0, last.row * keys.step)))


def _needed(where: Pattern, part: Part, shape: Shape) -> np.ndarray | None:
    """Return whether each key slot is met by any query, None if that is too much work to find out."""
    import numpy as np

    q, k = part.q, part.k
    rows = q.row + (part.op.shift or 0) + np.arange(q.length) * q.axes[-1].row
    keys = k.row + np.arange(k.length) * k.axes[-1].row
    tables = where.tables(shape)
    needed = np.zeros(k.length, dtype=bool)
    for b in range(max((len(t) for t in tables.values()), default=1)):
        here = {name: t[min(b, len(t) - 1)] for name, t in tables.items()}
        found = _asked(where, here, q.head, rows, keys, shape.kv_len)
        if found is None:
            return None
        needed |= found
    return needed


def _asked(
    where: Pattern, tables: Mapping[str, Any], head: int, rows: np.ndarray, keys: np.ndarray, kv_len: int
) -> Any:
    import numpy as np

    period = lcm(*(p.period for p in where.walk()))
    some = where.breaks(tables, rows[:1], kv_len)
    by_runs = some is not None and period <= _MAX_PERIOD
    work = len(rows) * ((len(some or ()) + 1) * period if by_runs else len(keys))
    if work > MAX_WORK:
        return None
    needed = np.zeros(len(keys), dtype=bool)
    size = max(1, (1 << 20) // max(1, work // len(rows)))
    for start in range(0, len(rows), size):
        q = rows[start : start + size]
        if by_runs:
            met = _met_in_runs(where, tables, head, q, (int(keys[0]), int(keys[-1]) + 1), period, kv_len)
            needed |= met[keys - keys[0]]
        else:
            inside = where.pairs(tables, np.array(head), q[:, None], keys)
            needed |= np.broadcast_to(inside, (len(q), len(keys))).any(0)
    return needed


def _met_in_runs(
    where: Pattern,
    tables: Mapping[str, Any],
    head: int,
    q: np.ndarray,
    span: tuple[int, int],
    period: int,
    kv_len: int,
) -> np.ndarray:
    """Return whether each key of a span is met, from the ends between which membership is constant.

    The ends are those of the whole sequence: which blocks are chosen at random depends on how many there are.
    """
    import numpy as np

    breaks = where.breaks(tables, q, kv_len)
    assert breaks is not None
    edges = np.stack([q * 0 + span[0], *(np.clip(b, *span) for b in breaks), q * 0 + span[1]], axis=1)
    edges.sort(axis=1)
    low, high = edges[:, :-1], edges[:, 1:]
    met = np.zeros(span[1] - span[0], dtype=bool)
    for residue in range(period):
        first = low + (residue - low) % period
        inside = where.pairs(tables, np.array(head), q[:, None], np.minimum(first, span[1] - 1))
        chosen = np.broadcast_to(inside, first.shape) & (first < high)
        at = (first[chosen] - span[0]) // period
        stop = at + -(-(high[chosen] - first[chosen]) // period)
        change = np.zeros(-(-len(met) // period) + 2, dtype=np.int64)
        np.add.at(change, at, 1)
        np.add.at(change, stop, -1)
        place = (residue - span[0]) % period
        met[place::period] = (change.cumsum() > 0)[: len(met[place::period])]
    return met


def _pieces(needed: np.ndarray) -> tuple[list[Progression], bool]:
    """Cut needed slots into progressions; returns whether gaps were filled to keep them few."""
    import numpy as np

    places = np.flatnonzero(needed)
    if not len(places):
        return [], False
    steps = np.diff(places)
    if len(places) > 2 and (steps == steps[0]).all():
        return [Progression(int(places[0]), int(steps[0]), len(places))], False
    gaps = np.flatnonzero(steps > 1)
    filled = len(gaps) >= MAX_PIECES
    if filled:
        gaps = np.sort(gaps[np.argsort(-steps[gaps], kind="stable")[: MAX_PIECES - 1]])
    starts = [0, *(gaps + 1)]
    stops = [*(gaps + 1), len(places)]
    return [
        Progression(int(places[a]), 1, int(places[b - 1] - places[a] + 1)) for a, b in zip(starts, stops, strict=True)
    ], filled
