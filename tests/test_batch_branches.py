"""The passes around our own kernels: which attends share a launch, which rows are views, which join pulls."""

from __future__ import annotations

import attrs
import pytest

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cost import KernelModel, price, resolve
from attnplan.cost.setting import copied_takes
from attnplan.errors import PassError
from attnplan.ir import Attend, Graph, Merge, Mix, RowMap
from attnplan.ir.launch import launch_key, launches, strides_in_rows
from attnplan.ir.text import parse_graph, print_graph
from attnplan.passes import (
    BatchBranches,
    BlockSparse,
    Canonicalize,
    FuseMerge,
    Lattice,
    Pipeline,
    PullMerge,
    SplitHeads,
    Views,
    batch_branches,
    pull_merge,
)
from attnplan.search import _start, lowerings
from attnplan.strategies import pipelines

_FRONT = (Canonicalize(), SplitHeads(), Lattice())
LONGNET = AttentionSpec(
    seq_len=1024, heads=12, head_dim=64, pattern=P.longnet([128, 256, 512, 1024], [1, 2, 4, 8]), layout="bshd",
    dtype="bfloat16", causal=True,
)  # fmt: skip


def run(spec, *passes):
    return Pipeline((*_FRONT, *passes)).run(*_start(spec))[0]


def batched(spec, **options):
    return run(spec, FuseMerge(), PullMerge(), BatchBranches(spec.layout, spec.batch, **options))


def views(spec):
    return run(spec, Views(spec.layout, spec.batch), FuseMerge(), PullMerge())


def attends(graph):
    return [n for n, _ in graph.of(Attend)]


def joins(graph):
    return [n.op for n in graph if isinstance(n.op, Merge | Mix)]


def test_branches_of_equal_inner_length_are_one_launch():
    graph = batched(LONGNET)
    assert len(attends(graph)) > 4
    assert list(launches(graph)) == [0]
    assert launches(graph)[0] == attends(graph)


def test_branches_of_unlike_inner_length_are_launches_of_their_own():
    spec = attrs.evolve(LONGNET, pattern=P.longnet([128, 256, 512, 1024], [1, 2, 2, 4]))
    graph = batched(spec)
    lengths = [{n.type.rows.length for n in nodes} for nodes in launches(graph).values()]
    assert sorted(map(tuple, lengths)) == [(128,), (256,)]


def test_ragged_segments_of_the_same_length_join_in():
    spec = attrs.evolve(LONGNET, seq_len=1000, kv_len=1000, causal=False)
    graph = batched(spec)
    for nodes in launches(graph).values():
        assert len({launch_key(graph, n) for n in nodes}) == 1
    assert len(launches(graph)) > 1


def test_an_attend_on_views_is_no_launch_by_itself():
    """It would copy its rows for nothing."""
    graph = batched(attrs.evolve(LONGNET, pattern=P.longnet([128, 256], [1, 1])))
    assert len(attends(graph)) == 2
    assert not launches(graph)


def test_attends_on_views_stay_alone_where_only_copies_are_batched():
    graph = batched(LONGNET, whole=False)
    alone = [n for n, op in graph.of(Attend) if op.launch is None]
    copied = copied_takes(run(LONGNET, FuseMerge()), LONGNET)
    assert copied, "nothing is copied in this test"
    assert 0 < len(alone) < len(attends(graph))
    assert not copied_takes(graph, LONGNET) & {a for n in alone for a in n.args}


def test_too_many_cells_are_no_launch(monkeypatch):
    cells = sum(n.type.rows.elements_count // n.type.rows.length for n in attends(batched(LONGNET)))
    monkeypatch.setattr(batch_branches, "MOST_CELLS", cells)
    assert launches(batched(LONGNET))
    monkeypatch.setattr(batch_branches, "MOST_CELLS", cells - 1)
    assert not launches(batched(LONGNET))


@pytest.mark.parametrize(
    "change",
    [{"scale": 0.5}, {"softcap": 3.0}, {"tile": (8, 8)}, {"dropout": 0.1}, {"where": P.full()}, {"where": P.window(3)}],
    ids=str,
)
def test_a_launch_of_unlike_attends_is_refused(change):
    graph = batched(LONGNET)
    node = attends(graph)[1]
    nodes = [attrs.evolve(n, op=attrs.evolve(n.op, **change)) if n is node else n for n in graph]
    with pytest.raises(PassError, match=r"launch 0: .* are no calls of one kernel on equal shapes"):
        Graph(tuple(nodes)).verify()


def test_attends_that_need_a_mask_are_no_launch():
    graph = batched(LONGNET)
    nodes = [
        attrs.evolve(n, op=attrs.evolve(n.op, where=P.window(30))) if isinstance(n.op, Attend) else n for n in graph
    ]
    with pytest.raises(PassError, match="launch 0"):
        Graph(tuple(nodes)).verify()


def test_a_launch_needs_one_join_that_pulls():
    graph = batched(LONGNET)
    nodes = [attrs.evolve(n, op=attrs.evolve(n.op, pull=False)) if isinstance(n.op, Merge | Mix) else n for n in graph]
    with pytest.raises(PassError, match="launch 0: its parts go to 1 nodes, one join that pulls is needed"):
        Graph(tuple(nodes)).verify()


def test_graphs_with_launches_are_read_back():
    for graph in (batched(LONGNET), views(LONGNET)):
        assert parse_graph(print_graph(graph)) == graph
    assert "launch=0" in print_graph(batched(LONGNET))
    assert "pull=True" in print_graph(views(LONGNET))


# --------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("batch", [1, 2])
def test_no_rows_of_views_are_copied(layout, batch):
    spec = attrs.evolve(LONGNET, layout=layout, batch=batch)
    assert copied_takes(run(spec, FuseMerge()), spec), "nothing is copied in this test"
    assert not copied_takes(views(spec), spec)


def test_views_cut_along_the_shortest_axis():
    sizes = sorted(n.type.rows.sizes[:-1] for n in attends(views(LONGNET)))
    # rate 1: one launch; 2: one for each offset; 4: for each segment; 8: for eight heads, and the four that are left
    assert sizes == sorted([(12, 8), (6, 4), (6, 4), (3, 4), (3, 4), (8,), (4,)])


def test_rows_that_no_single_cut_makes_views_stay():
    """With ragged segments the batch does not fold into them: two cuts would be needed."""
    spec = attrs.evolve(LONGNET, seq_len=1000, kv_len=1000, batch=3)
    graph = views(spec)
    assert copied_takes(graph, spec)
    assert all(isinstance(n.type.rows, RowMap) for n in attends(graph))


def test_strides_are_those_of_a_contiguous_tensor():
    rows = attends(run(LONGNET, FuseMerge()))[1].type.rows
    whole = RowMap.whole(12, 1024)
    assert [a.size for a in rows.batch] == [6, 2, 4]
    assert strides_in_rows(rows, whole, "bshd") == [12 * 1024, 2, 1 + 12, 256 * 12]
    assert strides_in_rows(rows, whole, "bhsd") == [12 * 1024, 2 * 1024, 1024 + 1, 256]


# ---------------------------------------------------------------------------------------------------------------- pull


def test_the_last_join_pulls():
    assert [op.pull for op in joins(views(LONGNET))] == [True]
    assert [op.pull for op in joins(run(LONGNET, FuseMerge()))] == [False]


def test_a_join_of_joins_does_not_pull():
    """Branches whose parts overlap are joined one by one under ``mean``: the parts of the last join are no attends."""
    spec = attrs.evolve(LONGNET, pattern=P.mix([P.segments(64) | P.dilated(256, 4), P.window(8)], rule="mean"))
    for lowered in lowerings(spec, ((64, 64), 64), fused=True):
        if len(joins(lowered.graph)) > 1:
            assert not any(op.pull for op in joins(lowered.graph))


def test_chunks_whose_keys_overlap_do_not_pull():
    """A key row that stands in two chunks gets two gradients from one part."""
    spec = AttentionSpec(seq_len=256, heads=2, head_dim=8, pattern=P.mix([P.window(8), P.segments(16)]))
    graph = Pipeline((*_FRONT[:2], BlockSparse((16, 16), 16), Lattice(), FuseMerge(), PullMerge())).run(*_start(spec))[
        0
    ]
    assert any(not n.type.rows.shows_rows_once for n in graph if n.type.tensor == "k")
    assert [op.pull for op in joins(graph)] == [False]


def test_keys_of_few_offsets_pull_and_of_many_do_not(monkeypatch):
    """Heads that share keys at unlike offsets: segments, offsets and rows all move the row of a key."""
    spec = attrs.evolve(LONGNET, kv_heads=6)
    graph = run(spec, FuseMerge())
    assert any(sum(a.size > 1 and not a.head for a in n.type.rows.axes) == 3 for n in graph if n.type.tensor == "k")
    assert [op.pull for op in joins(run(spec, FuseMerge(), PullMerge()))] == [True]
    monkeypatch.setattr(pull_merge, "MOST_ENTRIES", 1)
    assert [op.pull for op in joins(run(spec, FuseMerge(), PullMerge()))] == [False]


def test_a_single_attend_has_nothing_to_pull():
    spec = AttentionSpec(seq_len=64, heads=2, head_dim=8, causal=True)
    assert run(spec, FuseMerge(), PullMerge(), BatchBranches()) == run(spec, FuseMerge())


# -------------------------------------------------------------------------------------------------------------- search


def test_strategies_with_our_own_kernels_are_for_kernels_on_cuda():
    with_kernels, without = pipelines(None, ("bshd", 1)), pipelines(None)
    assert {"lattice-views", "lattice-batch"} <= set(with_kernels)
    assert not {"lattice-views", "lattice-batch"} & set(without)
    assert Views("bshd", 1) in with_kernels["lattice-views"].passes
    assert not {type(p) for p in without["lattice"].passes} & {Views, PullMerge, BatchBranches}


def test_a_pull_reads_and_writes_once_and_a_launch_starts_once():
    kernel, device = KernelModel(efficiency=0.5, masks=False), resolve("h100").device
    eager, pulled, together = run(LONGNET, FuseMerge()), views(LONGNET), batched(LONGNET)
    costs = [
        {n.op.name: o.cost for n, o in zip(g, price(g, LONGNET, kernel, device).ops, strict=True)}
        for g in (eager, pulled)
    ]
    assert costs[1]["merge"].launches < costs[0]["merge"].launches
    assert costs[1]["merge"].bytes < costs[0]["merge"].bytes / 2
    calls = [
        sum(
            o.cost.launches
            for n, o in zip(g, price(g, LONGNET, kernel, device).ops, strict=True)
            if n.op.name == "attend"
        )
        for g in (pulled, together)
    ]
    assert calls[1] == 1
    assert calls[0] == len(attends(pulled))
