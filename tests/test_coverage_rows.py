"""Sums over affine rows against sums pair by pair."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnplan import patterns as P
from attnplan.errors import PassError
from attnplan.ir import Attend, Axis, RowMap
from attnplan.ir import probes as affine
from attnplan.ir.probes import PROBES, attend_sum
from attnplan.patterns.segments import Heads
from attnplan.patterns.sums import PRIME, Conjunction

spans = st.one_of(
    st.just((None, None)),
    st.tuples(st.one_of(st.none(), st.integers(-2, 14)), st.one_of(st.none(), st.integers(0, 30))),
)
steps = st.integers(0, 4)


@st.composite
def pairs_of_maps(draw, band):
    """Two maps that broadcast; under a band their rows move together."""
    q, k = [], []
    for _ in range(draw(st.integers(1, 3))):
        size, broadcast, row = draw(st.integers(1, 4)), draw(st.booleans()), draw(st.integers(0, 9))
        q.append(Axis(size, head=draw(steps), row=0 if broadcast and band else row))
        k.append(Axis(1) if broadcast else Axis(size, head=draw(steps), row=row if band else draw(steps)))
    stride = draw(st.integers(1, 3))
    q.append(Axis(draw(st.integers(1, 5)), row=stride))
    k.append(Axis(draw(st.integers(1, 5)), row=stride if band else draw(st.integers(1, 3))))
    start = st.integers(0, 3)
    return RowMap(draw(start), draw(start), tuple(q)), RowMap(draw(start), draw(start), tuple(k))


@st.composite
def conditions(draw, band):
    left = draw(st.one_of(st.none(), st.integers(-6, 12))) if band else None
    right = draw(st.one_of(st.none(), st.integers(-6, 12))) if band else None
    first = draw(st.integers(0, 6))
    heads = draw(st.sampled_from([(), (Heads(first, first + 3),), (Heads(0, 7), Heads(first, 12))]))
    period = draw(st.sampled_from([1, 1, 2, 3, 4, 6])) if band else 1
    return Conjunction(left, right, (), heads, frozenset(), draw(spans), draw(spans), period)


def within(span, value):
    return (span[0] is None or value >= span[0]) and (span[1] is None or value < span[1])


def by_hand(probe, op, condition, q, k):
    total = 0
    for index in product(*map(range, q.sizes[:-1])):
        at = tuple(i if n > 1 else 0 for i, n in zip(index, k.sizes[:-1], strict=True))
        for i, j in product(range(q.length), range(k.length)):
            head, row = q.head + dot(q, index, "head"), q.row + dot(q, index, "row") + i * q.axes[-1].row
            kv_head, key = k.head + dot(k, at, "head"), k.row + dot(k, at, "row") + j * k.axes[-1].row
            position = row + op.shift
            inside = all(p.start <= head < p.stop for p in condition.heads)
            inside = inside and within(condition.queries, position) and within(condition.keys, key)
            inside = inside and (position - key) % condition.period == 0
            inside = inside and (condition.left is None or key >= position - condition.left)
            if inside and (condition.right is None or key <= position + condition.right):
                weight = probe.weight(op.branch, head, kv_head)
                total += weight * pow(probe.pairs.x, row, PRIME) * pow(probe.pairs.y, key, PRIME)
    return total % PRIME


def dot(rows, index, name):
    return sum(i * getattr(a, name) for i, a in zip(index, rows.axes, strict=False))


@pytest.mark.parametrize("band", [False, True])
@given(data=st.data())
def test_a_sum_over_affine_rows_is_the_sum_over_their_pairs(band, data):
    q, k = data.draw(pairs_of_maps(band))
    condition = data.draw(conditions(band))
    op = Attend(branch=2, shift=data.draw(st.integers(-3, 3)))
    assert attend_sum(PROBES[0], op, condition, q, k) == by_hand(PROBES[0], op, condition, q, k)


@given(st.data())
def test_a_sum_over_consecutive_rows_is_the_sum_over_their_pairs(data):
    q = RowMap(1, data.draw(st.integers(0, 9)), (Axis(2, head=2), Axis(3, head=1), Axis(data.draw(steps) + 1, row=1)))
    k = RowMap(0, data.draw(st.integers(0, 9)), (Axis(2, head=1), Axis(1), Axis(data.draw(steps) + 1, row=1)))
    op = Attend(shift=data.draw(st.integers(-3, 3)))
    condition = data.draw(conditions(True))
    assert attend_sum(PROBES[1], op, condition, q, k) == by_hand(PROBES[1], op, condition, q, k)


def test_a_span_that_ends_inside_too_many_steps_is_refused(monkeypatch):
    monkeypatch.setattr(affine, "MAX_CUT", 3)
    rows = RowMap(0, 0, (Axis(6, head=1, row=1), Axis(5, row=6)))
    condition = Conjunction(None, None, (), (), frozenset(), (7, None))
    with pytest.raises(PassError, match=r"attend where window\(2\) ends inside 6 rows of a batch axis"):
        attend_sum(PROBES[0], Attend(where=P.window(2)), condition, rows, rows)
