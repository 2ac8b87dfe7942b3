"""What an attend's condition means in terms of its own rows: slot i of the queries against slot j of the keys."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import attrs

from attnplan.ir.ops import Attend
from attnplan.ir.rows import Axis, RowMap
from attnplan.patterns.sums import Conjunction

Condition = Literal["full", "causal", "mask"]


@lru_cache(maxsize=4096)
def slot_condition(op: Attend, q: RowMap, k: RowMap) -> Condition:
    """Return whether every slot sees every slot, slot i sees j <= i of as many keys, or a mask is needed.

    Examples
    --------
    >>> from attnplan.patterns import causal, window
    >>> whole = RowMap.whole(1, 8)
    >>> slot_condition(Attend(where=causal()), whole, whole), slot_condition(Attend(where=window(2)), whole, whole)
    ('causal', 'mask')
    """
    known = Conjunction.of(op.where)
    if known.opaque or known.dilated or known.heads:
        return "mask"
    if not known.banded:
        return "full"
    runs = op.runs(q, k)
    if max(map(len, runs)) > 1:
        return _runs_condition(op, *runs)
    q, k = op.positions(q, k)
    limits = _band(op, q, k)
    if limits is None:
        return "mask"
    low, high = limits
    if high is not None and high < q.length - 1:
        return "mask"
    if low is None or low <= 1 - k.length:
        return "full"
    return "causal" if low == 0 and q.length == k.length else "mask"


def _runs_condition(op: Attend, queries: tuple[RowMap, ...], keys: tuple[RowMap, ...]) -> Condition:
    """Return what the condition means where runs of queries, one after the other, meet runs of keys."""
    each = [[_run_condition(op, q, k) for k in keys] for q in queries]
    if all(one == "full" for row in each for one in row):
        return "full"
    triangle = [["full"] * i + ["causal"] + ["empty"] * (len(keys) - 1 - i) for i in range(len(keys))]
    return "causal" if each == triangle else "mask"


def _run_condition(op: Attend, q: RowMap, k: RowMap) -> Condition | Literal["empty"]:
    limits = _band(op, q, k)
    if limits is not None and limits[0] is not None and limits[0] > q.length - 1:
        return "empty"  # every key of the run lies too far ahead
    return slot_condition(attrs.evolve(op, at=(q, k)), q, k)


def slot_band(op: Attend, q: RowMap, k: RowMap) -> tuple[int | None, int | None] | None:
    """Return the limits of i - j, both included, that the band conditions leave for query slot i and key slot j.

    None if they differ along the batch axes, or if slots of q and k lie apart by different steps.

    Examples
    --------
    >>> from attnplan.patterns import window
    >>> whole = RowMap.whole(1, 8)
    >>> slot_band(Attend(where=window(3, 1)), whole, whole)
    (-1, 3)
    """
    if max(map(len, op.runs(q, k))) > 1:
        condition = slot_condition(op, q, k)
        return None if condition == "mask" else (0 if condition == "causal" else None, None)
    return _band(op, *op.positions(q, k))


def _band(op: Attend, q: RowMap, k: RowMap) -> tuple[int | None, int | None] | None:
    stride = q.axes[-1].row
    if op.shift is None or not _same_steps(q, k) or (stride != k.axes[-1].row and max(q.length, k.length) > 1):
        return None
    known = Conjunction.of(op.where)
    stride = max(stride, 1)
    ahead = q.row + op.shift - k.row  # slots i and j are ahead + stride * (i - j) apart
    low = None if known.right is None else -((known.right + ahead) // stride)
    high = None if known.left is None else (known.left - ahead) // stride
    return low, high


def _same_steps(q: RowMap, k: RowMap) -> bool:
    """Return whether queries and keys move by equal numbers of rows along every batch axis."""
    return all(a.row == (b.row if b.size > 1 else 0) or a.size == 1 for a, b in zip(q.batch, k.batch, strict=True))


def mask_rows(op: Attend, q: RowMap, k: RowMap) -> tuple[RowMap, RowMap]:
    """Return the maps over which a mask has to be built: one place stands for a batch axis along which it is the same.

    They are positions in the whole sequence.

    A band is the same wherever queries and keys move together.

    Examples
    --------
    >>> from attnplan.patterns import window
    >>> chunks = RowMap(0, 0, (Axis(100, row=4), Axis(4, row=1)))
    >>> mask_rows(Attend(where=window(2)), chunks, chunks)[0].sizes
    (1, 4)
    """
    q, k = op.positions(q, k)
    known = Conjunction.of(op.where)
    if known.opaque or known.dilated or known.heads or not _same_steps(q, k):
        return q, k
    return _first_of_each_axis(q), _first_of_each_axis(k)


def _first_of_each_axis(rows: RowMap) -> RowMap:
    return attrs.evolve(rows, axes=(*(Axis(1) for _ in rows.batch), rows.axes[-1]))
