"""Cutting attends by rows, which keys are needed, and where rows lie in tensors."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.errors import PassError, RingError
from attnplan.ir import Attend, Axis, RowMap
from attnplan.ir.buffers import Buffer
from attnplan.ir.progressions import Progression
from attnplan.passes.ring import store_of
from attnplan.passes.ring_cut import MAX_LANES, Part, cut, of_heads
from attnplan.passes.ring_need import narrowed
from attnplan.patterns import Pattern, Shape
from attnplan.patterns.sums import Conjunction
from attnplan.ring import LAYOUTS, programs
from attnplan.ring.program import RankProgram
from attnplan.ring.proof import position

Pair = tuple[int, int, int, int]
BANDS = (P.full(), P.causal(), P.window(2), P.band(5, -1), P.band(None, 2))


def pairs(part: Part) -> Counter[Pair]:
    """(head, key/value head, query row, key row), one by one."""
    found: Counter[Pair] = Counter()
    for index in product(*(range(a.size) for a in part.q.batch)):
        shown = tuple(i if a.size > 1 else 0 for i, a in zip(index, part.k.batch, strict=True))
        (h, r), (g, c) = (
            (m.head + sum(a.head * i for a, i in zip(m.batch, at, strict=True)),
             m.row + sum(a.row * i for a, i in zip(m.batch, at, strict=True)))
            for m, at in ((part.q, index), (part.k, shown))
        )  # fmt: skip
        for i, j in product(range(part.q.length), range(part.k.length)):
            found[h, g, r + i * part.q.axes[-1].row, c + j * part.k.axes[-1].row] += 1
    return found


@st.composite
def parts(draw: st.DrawFn) -> Part:
    q_axes, k_axes = [], []
    for _ in range(draw(st.integers(0, 2))):
        size, row = draw(st.integers(1, 4)), draw(st.sampled_from([0, 0, 1, 2, 5, 8]))
        q_axes.append(Axis(size, head=draw(st.integers(0, 1)), row=row))
        alone = draw(st.booleans())
        k_axes.append(Axis(1) if alone else Axis(size, head=1, row=draw(st.sampled_from([row, row, 0, 3]))))
    step = draw(st.integers(1, 3))
    q = RowMap(0, draw(st.integers(0, 3)), (*q_axes, Axis(draw(st.integers(1, 8)), row=step)))
    last = Axis(draw(st.integers(1, 8)), row=draw(st.sampled_from([step, 1, 2])))
    k = RowMap(0, draw(st.integers(0, 3)), (*k_axes, last))
    op = Attend(where=draw(st.sampled_from(BANDS)), shift=draw(st.sampled_from([0, 0, 3, -2])))
    return Part(op, q, k)


held = st.builds(Progression, st.integers(0, 6), st.integers(1, 3), st.integers(1, 12))


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(parts(), held, held)
def test_a_cut_keeps_each_pair_of_its_rows_once(part: Part, mine: Progression, theirs: Progression) -> None:
    known, shift = Conjunction.of(part.op.where), part.op.shift or 0

    def meets(pair: Pair) -> bool:
        _, _, q, k = pair
        low = known.left is None or k >= q + shift - known.left
        return low and (known.right is None or k <= q + shift + known.right)

    rows, keys = set(mine), set(theirs)
    wanted = {p: n for p, n in pairs(part).items() if p[2] in rows and p[3] in keys and meets(p)}
    got = sum((pairs(piece) for piece in cut(part, mine, theirs)), Counter[Pair]())
    assert all(q in rows and k in keys for _, _, q, k in got)
    assert {p: n for p, n in got.items() if meets(p)} == wanted


@settings(max_examples=100, deadline=None)
@given(parts(), st.integers(0, 3), st.integers(0, 3))
def test_heads_are_cut_out_once(part: Part, start: int, width: int) -> None:
    wanted = {p: n for p, n in pairs(part).items() if start <= p[0] < start + width}
    got = sum((pairs(piece) for piece in of_heads(part, start, start + width)), Counter[Pair]())
    assert got == wanted


def test_whole_segments_stay_one_axis_and_ragged_ones_alone() -> None:
    rows = RowMap(0, 0, (Axis(2, head=1), Axis(8, row=8), Axis(8, row=1)))
    part = Part(Attend(), rows, rows)
    found = list(cut(part, Progression(12, 1, 36), Progression(12, 1, 36)))
    assert sorted(p.q.sizes for p in found) == [(2, 1, 4), (2, 4, 8)]


def test_axes_that_are_cut_in_very_many_ways_are_refused() -> None:
    size = MAX_LANES + 1
    rows = RowMap(0, 0, (Axis(size, row=1), Axis(4, row=size)))
    with pytest.raises(PassError, match="cut an axis of 4097 in more than"):
        list(cut(Part(Attend(), rows, rows), Progression(size, 1, size), Progression(0, 1, 4 * size)))


CONDITIONS = (
    P.documents([5, 9, 20, 30]),
    P.columns([3, 9, 10, 33]),
    P.columns([1, 2], every=8),
    P.random_blocks(0.3, 8, 1),
    P.global_tokens([4, 7]),
    P.sinks(2) | P.window(2),
    P.strided(5),
    P.dilated(16, 4, offset=1),
    P.neighborhood((3, 3), 1, (8, 8)),
    P.padding([50]),
    P.window(1),
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(CONDITIONS), st.booleans(), st.data())
def test_needed_keys_are_those_that_some_query_meets(where: Pattern, causal: bool, data: st.DataObject) -> None:
    where = where & P.causal() if causal else where
    sizes = [data.draw(st.integers(*ends)) for ends in ((0, 40), (1, 12), (1, 3), (0, 30), (1, 17), (1, 2))]
    q = RowMap(0, sizes[0], (Axis(1), Axis(sizes[1], row=sizes[2])))
    k = RowMap(0, sizes[3], (Axis(1), Axis(sizes[4], row=sizes[5])))
    shape = Shape(64, 64, 1)
    found = narrowed(Part(Attend(where=where), q, k), shape)
    rows, keys = (m.row + np.arange(m.length) * m.axes[-1].row for m in (q, k))
    tables = {name: t[0] for name, t in where.tables(shape).items()}
    met = np.broadcast_to(where.pairs(tables, np.array(0), rows[:, None], keys), (len(rows), len(keys))).any(0)
    got = [p.k.row + i * p.k.axes[-1].row for p in found.parts for i in range(p.k.length)]
    banded = where in (P.window(1), P.window(1) & P.causal())  # a band over neighbouring rows is left to the cut
    assert not found.why
    assert sorted(got) == keys[met].tolist() or (banded and set(got) >= set(keys[met].tolist()))
    out = [p.k.row + i * p.k.axes[-1].row for p in found.empty for i in range(p.k.length)]
    assert banded or sorted(got + out) == keys.tolist()


def test_blocks_are_chosen_from_all_of_the_sequence() -> None:
    """Keys before row 18 of 37: a shorter sequence would have other random blocks."""
    where = P.causal() & P.random_blocks(0.4, 4, 1)
    q, k = RowMap(0, 18, (Axis(1), Axis(3, row=1))), RowMap(0, 0, (Axis(1), Axis(18, row=1)))
    found = narrowed(Part(Attend(where=where), q, k), Shape(37, 37, 4))
    assert [(p.k.row, p.k.length) for p in found.parts] == [(4, 4), (12, 6)]


def test_conditions_of_the_call_leave_every_key_and_say_so() -> None:
    rows = RowMap(0, 0, (Axis(1), Axis(8, row=1)))
    found = narrowed(Part(Attend(where=P.documents() & P.columns([3])), rows, rows), Shape(8, 8, 1))
    assert [p.k.row for p in found.parts] == [3]
    assert "arrives with the call" in found.why


maps = st.builds(
    lambda head, row, lead, step, size, by: RowMap(head, row, (Axis(lead, head=1), Axis(size, row=step * by))),
    st.integers(0, 2), st.integers(0, 9), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 2),
)  # fmt: skip


@given(st.lists(maps, min_size=1, max_size=3), maps)
def test_addresses_lead_back_to_the_rows(held_maps: list[RowMap], wanted: RowMap) -> None:
    buffer = Buffer(tuple(held_maps))
    found = buffer.address(wanted)
    if found is None:
        inside = [set(wanted.elements()) <= set(m.elements()) for m in held_maps]
        assert not any(inside) or buffer.heads > 1 or wanted.axes[0].size > 1 or wanted.length == 1
        return
    back = position(buffer, found)
    assert back is not None
    assert list(back.elements()) == list(wanted.elements())


@given(st.lists(maps, min_size=1, max_size=4))
def test_a_store_holds_every_map_in_one_piece(wanted: list[RowMap]) -> None:
    store = store_of(wanted, (0, 3))
    assert all(Buffer(store).address(m) is not None for m in wanted)


def lower_bound(spec: AttentionSpec, ranks: tuple[RankProgram, ...]) -> list[int]:
    """(Key/value head, row) pairs that each rank's queries meet and that it does not hold, pair by pair."""
    shape, group = spec.shape, spec.heads // spec.kv_heads
    found = []
    for program in ranks:
        own = {e for m in program.keys for e in m.elements()}
        rows = np.array(sorted({r for m in program.queries for _, r in m.elements()}), dtype=np.int64)
        needed: set[tuple[int, int]] = set()
        for where in spec.branches:
            tables = {name: t[0] for name, t in where.tables(shape).items()}
            for h in range(spec.heads):
                met = where.pairs(tables, np.array(h), rows[:, None] + shape.shift, np.arange(shape.kv_len))
                met = np.broadcast_to(met, (len(rows), shape.kv_len)).any(0)
                needed |= {(h // group, int(r)) for r in np.flatnonzero(met)}
        found.append(len(needed - own))
    return found


STATIC = (
    P.window(3),
    P.window(9, 0),
    P.dilated(16, 4, offset="interleave"),
    P.longnet(segment_lengths=[8, 16, 32], dilation_rates=[1, 2, 4]),
    P.longnet(segment_lengths=[6, 18], dilation_rates=[2, 3]),
    P.documents([3, 11, 20, 13]),
    P.documents([1] * 47),
    P.random_blocks(0.3, 8, 1),
    P.sinks(3) | P.window(2),
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(STATIC), st.booleans(), st.sampled_from(LAYOUTS), st.integers(1, 6), st.sampled_from([1, 2, 4]))
def test_rows_sends_each_needed_row_once(
    pattern: Pattern, causal: bool, layout: str, ranks: int, kv_heads: int
) -> None:
    spec = AttentionSpec(seq_len=47, heads=4, kv_heads=kv_heads, head_dim=8, pattern=pattern, causal=causal)
    found = programs(spec, ranks, layout, "rows")
    assert all(p.exact for p in found)
    assert [sum(e.received for e in p.exchanges) for p in found] == lower_bound(spec, found)
    if layout == "contiguous":
        try:
            beside = programs(spec, ranks, layout, "halo")
        except RingError:
            return
        assert [sum(e.received for e in p.exchanges) for p in beside] == lower_bound(spec, beside)


def test_a_window_narrower_than_a_stripe_needs_its_neighbours_only() -> None:
    spec = AttentionSpec(seq_len=48, heads=2, head_dim=8, pattern=P.window(1, 0))
    found = programs(spec, 6, "striped", "rows")
    moved = [e.received for p in found for e in p.exchanges]
    assert moved == lower_bound(spec, found) == [14, *[16] * 5]
    assert [sorted(e.receives) for p in found for e in p.exchanges] == [[5], [0], [1], [2], [3], [4]]


def test_rows_between_those_of_a_map_have_no_address() -> None:
    buffer = Buffer((RowMap(0, 0, (Axis(4, row=10), Axis(3, row=1))),))
    assert buffer.address(RowMap(0, 0, (Axis(4, row=1),))) is None
    assert buffer.address(RowMap(0, 10, (Axis(3, row=1),))) == RowMap(0, 3, (Axis(3, row=1),))
    assert buffer.address(RowMap(0, 1, (Axis(4, row=10),))) == RowMap(0, 1, (Axis(4, row=3),))


def test_a_ring_sends_no_rows_between_the_ranges_that_attends_need() -> None:
    spec = AttentionSpec(seq_len=64, heads=2, head_dim=8, pattern=P.sinks(3) | P.window(4), causal=True)
    found = programs(spec, 4, "contiguous", "ring")
    assert [sum(e.received for e in p.exchanges) for p in found] == lower_bound(spec, found) == [0, 14, 14, 14]
