"""What an attend's condition means in terms of its own rows: slot i of the queries against slot j of the keys."""

from __future__ import annotations

from typing import Literal

from attnplan.ir.ops import Attend
from attnplan.ir.rows import RowMap
from attnplan.patterns.sums import Conjunction

Condition = Literal["full", "causal", "mask"]


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
    stride = q.axes[-1].row
    same_steps = all(
        a.row == (b.row if b.size > 1 else 0) or a.size == 1 for a, b in zip(q.batch, k.batch, strict=True)
    )
    if op.shift is None or not same_steps or (stride != k.axes[-1].row and max(q.length, k.length) > 1):
        return "mask"
    stride = max(stride, 1)
    ahead = q.row + op.shift - k.row  # slots i and j are ahead + stride * (i - j) apart
    low = None if known.right is None else -((known.right + ahead) // stride)
    high = None if known.left is None else (known.left - ahead) // stride
    limits_above = low is not None and low > 1 - k.length
    limits_below = high is not None and high < q.length - 1
    if limits_below:
        return "mask"
    if not limits_above:
        return "full"
    return "causal" if low == 0 and q.length == k.length else "mask"
