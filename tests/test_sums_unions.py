from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnplan import patterns as P
from attnplan.patterns import indicators
from attnplan.patterns.base import Not, Or
from attnplan.patterns.counts import count_pairs
from attnplan.patterns.indicators import LIMIT, boxes, indicator, runs, unread
from attnplan.patterns.sums import Cell, Point, head_sum
from tests import oracle
from tests import strategies as some
from tests.test_sums import points, total

N = 1_000_003


def members(pattern, shape, head):
    positions = np.arange(shape.seq_len)[None].repeat(shape.batch, 0) + shape.shift
    inside = oracle.member(pattern, heads=shape.heads, positions=positions, kv_len=shape.kv_len)
    return inside[:, head]


def opaque_masks(pattern, shape, head):
    """Return the members of each atom that the polynomial leaves opaque."""
    atoms = {atom for term, _ in indicator(pattern) for atom in term.opaque}
    return {atom: members(atom, shape, head) for atom in atoms}


@given(st.data(), points)
def test_an_indicator_sums_to_the_pairs_of_any_combination(data, point):
    shape = data.draw(some.shapes(longest=14))
    pattern = data.draw(some.patterns(shape, masks=True)).bind(shape.heads)
    for head in range(shape.heads):
        inside, masks = members(pattern, shape, head), opaque_masks(pattern, shape, head)
        if not masks:
            sums = (
                c * head_sum(t, head, point, shape.shift, shape.seq_len, shape.kv_len) for t, c in indicator(pattern)
            )
            assert sum(sums) % point.prime == total(point, np.argwhere(inside[0]).tolist())
        assert np.array_equal(evaluated(pattern, shape, head, masks), inside)


@st.composite
def nesting(draw, shape):
    """Two intersections or unions of atoms whose segments nest often, and whose bands have one end often."""
    atoms = st.one_of(
        st.builds(P.band, st.sampled_from([None, 2, 5]), st.sampled_from([None, 0, 3])),
        st.builds(P.segments, st.sampled_from([2, 4, 8])),
        st.builds(P.dilated, st.sampled_from([4, 8, 12]), st.sampled_from([1, 2, 4])),
        st.builds(P.dilated, st.sampled_from([4, 8]), st.just(2), st.sampled_from([1, "interleave"])),
        st.builds(P.strided, st.integers(1, 4)),
        st.builds(P.sinks, st.integers(1, shape.kv_len)),
        st.builds(P.columns, st.lists(st.integers(0, shape.kv_len - 1), min_size=1, max_size=4, unique=True)),
        some.head_ranges(shape.heads),
    )
    first, second = draw(atoms) & draw(atoms), draw(atoms) | draw(atoms)
    return draw(
        st.sampled_from([first & second, first | second, ~first & second, first & ~second, first | first & ~second])
    )


@settings(max_examples=600)
@given(st.data())
def test_an_indicator_of_nested_segments_is_their_members(data):
    shape = data.draw(some.shapes(longest=17))
    pattern = data.draw(nesting(shape)).bind(shape.heads)
    for head in range(min(shape.heads, 3)):
        masks = opaque_masks(pattern, shape, head)
        assert np.array_equal(evaluated(pattern, shape, head, masks), members(pattern, shape, head))
    assert count_pairs(pattern, shape) == sum(int(members(pattern, shape, h).sum()) for h in range(shape.heads))


@pytest.mark.parametrize(
    ("coarse", "fine", "joined"),
    [
        (P.segments(8), P.segments(4), (P.segments(4),)),
        (P.segments(8), P.dilated(4, 2, 1), (P.dilated(4, 2, 1),)),
        (P.dilated(8, 2, 1), P.segments(4), (P.dilated(4, 2, 1),)),
        (P.dilated(12, 3, 1), P.segments(4), (P.segments(4), P.dilated(12, 3, 1))),
        (P.dilated(8, 2, 1), P.dilated(4, 2, 1), (P.dilated(4, 2, 1), P.dilated(8, 2, 1))),
        (P.segments(6), P.segments(4), (P.segments(4), P.segments(6))),
        (P.segments(8), P.segments(8), (P.segments(8),)),
    ],
)
def test_segments_that_nest_are_one_condition(coarse, fine, joined):
    for union in ((coarse | P.window(0)) & (fine | P.window(0)), (fine | P.window(0)) & (coarse | P.window(0))):
        assert joined in {term.dilated for term, _ in indicator(union)}


def evaluated(pattern, shape, head, masks):
    """Evaluate a polynomial pair by pair, its variables being what their atoms say."""
    q = (np.arange(shape.seq_len) + shape.shift)[:, None]
    k = np.arange(shape.kv_len)[None]
    value = np.zeros((shape.batch, shape.seq_len, shape.kv_len), dtype=np.int64)
    for term, coefficient in indicator(pattern):
        inside = np.ones_like(value, dtype=bool)
        if term.left is not None:
            inside &= k >= q - term.left
        if term.right is not None:
            inside &= k <= q + term.right
        for axis, (low, high) in ((q, term.queries), (k, term.keys)):
            inside &= (low is None or axis >= low) & (high is None or axis < high)
        inside &= (q - k) % term.period == 0
        for atom in term.dilated:
            inside &= members(atom, shape, head)
        for atom in term.opaque:
            inside &= masks[atom]
        value += coefficient * (inside & term.admits(head))
    assert set(np.unique(value)) <= {0, 1}
    return value.astype(bool)


@given(
    point=points,
    start=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    extent=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    stride=st.integers(1, 4),
    repeat=st.tuples(st.integers(0, 9), st.integers(1, 3)),
    period=st.integers(1, 9),
    left=st.one_of(st.none(), st.integers(-5, 20)),
)
def test_the_pairs_a_multiple_apart_fall_into_cells(point, start, extent, stride, repeat, period, left):
    cell = Cell(*start, *extent, stride, *repeat)
    pairs = [
        (start[0] + t * repeat[0] + i * stride, start[1] + t * repeat[0] + j * stride)
        for t in range(repeat[1])
        for i in range(extent[0])
        for j in range(extent[1])
    ]
    inside = [(a, b) for a, b in pairs if (a - b) % period == 0 and (left is None or b >= a - left)]
    cells = list(cell.congruent(period))
    assert len(cells) <= 5
    assert sum(c.sum(point, left, None, 0) for c in cells) % point.prime == total(point, inside)


@given(st.data())
def test_complement_and_original_add_up_to_everything(data):
    shape = data.draw(some.shapes(longest=30))
    pattern = data.draw(some.patterns(shape)).bind(shape.heads)
    whole = shape.batch * shape.heads * shape.seq_len * shape.kv_len
    assert count_pairs(pattern, shape) + count_pairs(~pattern, shape) == whole


def test_runs_and_boxes_of_positions():
    assert runs((3,)) == ((3, 4),)
    assert runs((0, 1, 5, 6, 7, 9)) == ((0, 2), (5, 8), (9, 10))
    assert list(boxes([3, 1, 4])) == [(0, 3), (3, 4), (4, 8)]


@pytest.mark.parametrize(
    ("pattern", "opaque"),
    [
        (P.window(3) | P.sinks(2), set()),
        (P.documents() | P.window(3), set()),
        (P.segments(6) | P.dilated(4, 2), {P.segments(6) | P.dilated(4, 2)}),
        (P.segments(8) | P.segments(4), set()),
        (P.window(1) & ~(P.segments(6) & P.segments(4)), {~(P.segments(6) & P.segments(4))}),
    ],
)
def test_a_union_of_segments_that_do_not_nest_stays_whole(pattern, opaque):
    assert unread(pattern) == opaque


def test_few_documents_and_tokens_are_summed_and_many_stay_variables():
    few, many = P.documents([3] * indicators.MAX_DOCUMENTS), P.documents([3] * (indicators.MAX_DOCUMENTS + 1))
    assert all(not term.opaque for term, _ in indicator(few))
    assert [term.opaque for term, _ in indicator(many)] == [{many}]
    for atom in (P.global_tokens, P.columns):
        few, many = (atom(range(0, 2 * n, 2)) for n in (indicators.MAX_RUNS, indicators.MAX_RUNS + 1))
        assert all(not term.opaque for term, _ in indicator(few))
        assert [term.opaque for term, _ in indicator(many)] == [{many}]


def test_a_union_beyond_the_limit_stays_opaque_whatever_the_order_of_its_neighbours():
    masks = [P.mask(lambda h, q, k, i=i: (q + k) % 17 == i) for i in range(14)]
    union = Or(tuple(masks))
    assert 2 ** len(masks) > LIMIT
    assert [term.opaque for term, _ in indicator(union)] == [{union}]
    assert unread(P.causal() & union) == {union}
    some_of_them, others = Or(tuple(masks[:8])), Or(tuple(masks[6:13]))
    found = [unread(a & b) for a, b in ((some_of_them, others), (others, some_of_them))]
    assert found[0] == found[1]
    assert len(found[0]) == 1
    assert Not(union) not in unread(~union)


@pytest.mark.parametrize(
    ("pattern", "pairs"),
    [
        (P.window(100) | P.global_tokens(64), None),
        (P.sinks(4) | P.full(), N * N),
        (P.causal() & ~P.window(9), (N - 10) * (N - 9) // 2),
        (P.strided(N // 2) | P.window(0), N + 2 * (N - N // 2) + 2 * (N % 2)),
        (P.strided(97) | ~P.strided(97), N * N),
        (P.documents([N - 5, 5]) | ~P.documents([N - 5, 5]), N * N),
    ],
)
def test_unions_over_a_million_positions_are_counted_at_once(pattern, pairs):
    start = time.process_time()
    found = count_pairs(pattern, P.Shape(N, N, 1))
    assert time.process_time() - start < 0.5
    if pairs is None:  # far from both ends each further row adds as many pairs as the one before
        inside = oracle.member(pattern, heads=1, positions=np.arange(2003)[None], kv_len=2003)
        pairs = int(inside.sum()) + (N - 2003) * (201 + 128)
    assert found == pairs


def test_the_point_of_counting_has_no_prime():
    assert head_sum(indicator(P.causal())[0][0], 0, Point(), 0, 5, 5) == 15
