from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnplan import patterns as P
from attnplan.errors import SpecError
from attnplan.patterns.sums import PRIME, Cell, Conjunction, Point, _intersect, head_sum
from tests import oracle
from tests import strategies as some

numbers = st.integers(2, PRIME - 2)
points = st.builds(lambda x, y: Point(x, y, PRIME), numbers, numbers)
sizes = st.integers(0, 12)
limits = st.one_of(st.none(), st.integers(-14, 14))


def total(point, pairs):
    """Sum ``x^i y^j`` over pairs, as its definition says."""
    prime = point.prime or 10**30
    return sum(pow(point.x, i, prime) * pow(point.y, j, prime) for i, j in pairs) % prime


@given(st.one_of(points, st.just(Point())), sizes, sizes)
def test_rectangle_is_the_sum_over_a_rectangle(point, rows, columns):
    pairs = [(i, j) for i in range(rows) for j in range(columns)]
    assert point.rectangle(point.x, point.y, rows, columns) == total(point, pairs)


@given(st.one_of(points, st.just(Point())), sizes, sizes, st.integers(-14, 14))
def test_below_is_the_sum_under_a_diagonal(point, rows, columns, c):
    pairs = [(i, j) for i in range(rows) for j in range(columns) if j < i + c]
    assert point.below(point.x, point.y, rows, columns, c) == total(point, pairs)


@given(st.one_of(points, st.just(Point())), sizes, sizes, limits, limits)
def test_banded_is_the_sum_between_two_diagonals(point, rows, columns, low, high):
    inside = [
        (i, j)
        for i in range(rows)
        for j in range(columns)
        if (low is None or low <= i - j) and (high is None or i - j <= high)
    ]
    assert point.banded(point.x, point.y, rows, columns, low, high) == total(point, inside)


@given(
    point=st.one_of(points, st.just(Point())),
    q=st.integers(0, 9),
    k=st.integers(0, 9),
    extent=st.tuples(sizes, sizes),
    stride=st.integers(1, 4),
    repeat=st.tuples(st.integers(0, 9), st.integers(0, 4)),
    left=st.one_of(st.none(), st.integers(0, 20)),
    right=st.one_of(st.none(), st.integers(0, 20)),
    shift=st.integers(-3, 0),
)
def test_a_cell_is_the_sum_over_its_progressions(point, q, k, extent, stride, repeat, left, right, shift):
    (rows, columns), (step, count) = extent, repeat
    every = [
        (q + t * step + i * stride, k + t * step + j * stride)
        for t in range(count)
        for i in range(rows)
        for j in range(columns)
    ]
    inside = [(a - shift, b) for a, b in every if (left is None or b >= a - left) and (right is None or b <= a + right)]
    cell = Cell(q, k, rows, columns, stride, step, count)
    assert cell.sum(point, left, right, shift) == total(point, inside)


@given(st.data(), points)
def test_head_sum_is_the_sum_over_the_pairs_of_each_head(data, point):
    shape = data.draw(some.shapes(longest=30))
    pattern = data.draw(some.conjunctions(shape)).bind(shape.heads)
    conjunction = Conjunction.of(pattern)
    assert not conjunction.opaque
    positions = np.arange(shape.seq_len)[None] + shape.shift
    pairs = oracle.member(pattern, heads=shape.heads, positions=positions, kv_len=shape.kv_len)[0]
    for head in range(shape.heads):
        found = head_sum(conjunction, head, point, shape.shift, shape.seq_len, shape.kv_len)
        assert found == total(point, np.argwhere(pairs[head]).tolist())


@given(st.lists(st.integers(1, 12).flatmap(lambda m: st.tuples(st.integers(0, 30), st.just(m))), max_size=3))
def test_intersection_of_progressions_is_their_common_members(progressions):
    found = _intersect(progressions)
    members = {n for n in range(-2000, 2000) if all((n - a) % m == 0 for a, m in progressions)}
    assert members == (set() if found is None else {n for n in range(-2000, 2000) if (n - found[0]) % found[1] == 0})


def test_a_conjunction_separates_closed_and_opaque_terms():
    pattern = P.window(5, 3) & P.causal() & P.segments(8) & P.segments(8) & P.heads(0, 2) & P.sinks(1) & ~P.window(1)
    found = Conjunction.of(pattern & P.full())
    assert (found.left, found.right, found.dilated, found.heads) == (5, 0, (P.segments(8),), (P.heads(0, 2),))
    assert found.opaque == {P.sinks(1), ~P.window(1)}
    assert found.banded
    assert [found.admits(h) for h in range(3)] == [True, True, False]
    assert not Conjunction.of(P.full()).banded


def test_too_many_irregular_pieces_are_refused():
    conjunction = Conjunction.of(P.segments(2) & P.segments(3))
    with pytest.raises(SpecError, match="over 1048576 irregular pieces; use segment lengths that divide each other"):
        head_sum(conjunction, 0, Point(), 0, 4_000_000, 4_000_000)
