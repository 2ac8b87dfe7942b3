from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnplan.errors import RingError
from attnplan.ir.progressions import Progression, joined, union, without
from attnplan.ring import LAYOUTS, Layout, Mesh

layouts = st.builds(Layout, st.sampled_from(LAYOUTS), st.integers(1, 9), st.integers(1, 70))
progressions = st.builds(Progression, st.integers(0, 30), st.integers(1, 7), st.integers(0, 12))


@given(layouts)
def test_a_layout_is_a_partition_of_the_rows(layout: Layout) -> None:
    rows = [layout.positions(r) for r in range(layout.ranks)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(layout.length))
    assert layout.shard_sizes == tuple(len(r) for r in rows)
    for rank, held in enumerate(rows):
        assert all(layout.owner(int(row)) == rank for row in held)
        assert held.tolist() == [row for p in layout.rows(rank) for row in p]


@given(layouts)
def test_the_inverse_undoes_the_permutation(layout: Layout) -> None:
    x = np.arange(layout.length) * 3
    held = x[layout.permutation()]
    assert (held[layout.inverse()] == x).all()


@given(layouts, st.data())
def test_rows_of_neighbouring_ranks_are_theirs_and_rise(layout: Layout, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, layout.ranks - 1))
    ranks = range(first, data.draw(st.integers(first + 1, layout.ranks)))
    found = [row for p in layout.rows_of(ranks) for row in p]
    assert sorted(found) == sorted(row for r in ranks for row in layout.positions(r).tolist())


@given(layouts, progressions)
def test_shares_of_a_progression_go_to_their_owners(layout: Layout, rows: Progression) -> None:
    rows = rows.clipped(None, layout.length)
    shares = list(layout.shares(rows))
    assert sorted(row for _, p in shares for row in p) == list(rows)
    assert all(layout.owner(row) == rank for rank, p in shares for row in p)


def test_zigzag_gives_each_rank_an_early_and_a_late_run() -> None:
    layout = Layout("zigzag", 4, 64)
    assert layout.rows(1) == (Progression(8, 1, 8), Progression(48, 1, 8))
    work = [sum(row + 1 for row in layout.positions(r)) for r in range(4)]
    assert len(set(work)) == 1  # causal attention is as much work on every rank


def test_a_last_shard_may_be_short_and_others_empty() -> None:
    assert Layout("contiguous", 4, 9).shard_sizes == (3, 3, 3, 0)
    assert Layout("striped", 4, 9).shard_sizes == (3, 2, 2, 2)
    assert sum(Layout("zigzag", 4, 9).shard_sizes) == 9


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Layout("zigzg", 2, 4), "unknown layout 'zigzg'; did you mean 'zigzag'"),  # type: ignore[arg-type]
        (lambda: Layout("striped", 0, 4), "needs a rank and a row"),
        (lambda: Layout("striped", 2, 4).rows(2), "there is no rank 2"),
        (lambda: Layout("striped", 2, 4).owner(4), "there is no row 4"),
        (lambda: Mesh.of("8x0"), "a mesh is a number of ranks"),
        (lambda: Mesh.of("2x2x2"), "a mesh is a number of ranks"),
        (lambda: Mesh.of("many"), "got 'many'"),
    ],
)
def test_what_is_no_layout_and_no_mesh_is_refused(make: object, match: str) -> None:
    with pytest.raises(RingError, match=match):
        make()  # type: ignore[operator]


def test_meshes_are_read_from_sizes() -> None:
    assert Mesh.of("128x8") == Mesh.of((128, 8)) == Mesh(128, 8)
    assert Mesh.of(4) == Mesh(1, 4)
    assert Mesh.of(1024) == Mesh(128, 8)
    assert (Mesh(2, 4).node(3), Mesh(2, 4).node(4), str(Mesh(2, 4)), str(Mesh(1, 4))) == (0, 1, "2x4", "4")


@given(progressions, progressions)
def test_progressions_are_sets_of_rows(a: Progression, b: Progression) -> None:
    assert set(a.common(b)) == set(a) & set(b)
    assert a.holds(b) == (set(b) <= set(a))
    rest = [row for p in a.without(b) for row in p]
    assert sorted(rest) == sorted(set(a) - set(b))


@given(progressions, st.integers(0, 60), st.integers(0, 60))
def test_clipping_keeps_the_rows_between(a: Progression, low: int, high: int) -> None:
    assert list(a.clipped(low, high)) == [row for row in a if low <= row < high]


@given(st.lists(progressions, max_size=5))
def test_unions_and_differences_of_many(many: list[Progression]) -> None:
    rows = [row for p in union(many) for row in p]
    assert sorted(rows) == sorted({row for p in many for row in p})
    whole = Progression(0, 1, 40)
    assert sorted(row for p in without(whole, many) for row in p) == sorted(set(whole) - set(rows))


@given(st.lists(st.integers(0, 20), max_size=6))
def test_joining_keeps_rows(starts: list[int]) -> None:
    many = [Progression(s, 1, 3) for s in starts]
    found = joined(many)
    assert [row for p in found for row in p] == sorted({row for p in many for row in p})
