"""The ``block-sparse`` pass: chunks that cover a band exactly, and tiles where a band is not all there is."""

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnplan
from attnplan import patterns as P
from attnplan.errors import PassError
from attnplan.ir import Attend
from attnplan.ir.ops import disjoint
from attnplan.passes.block_sparse import chunks
from attnplan.runtime.tiles import TileBuilder
from attnplan.spec import AttentionSpec
from tests.running import Call, assert_agree, every_plan, way

LIMIT = st.one_of(st.none(), st.integers(-40, 40))


@given(st.integers(1, 80), st.integers(1, 80), LIMIT, LIMIT, st.integers(1, 9))
@settings(max_examples=600, deadline=None)
def test_chunks_cover_every_pair_of_the_band_once(rows, columns, low, high, size):
    pieces = list(chunks(rows, columns, low, high, size))
    if not pieces:
        return
    i, j = np.arange(rows)[:, None], np.arange(columns)[None]
    band = np.ones((rows, columns), dtype=bool)
    band &= True if low is None else i - j >= low
    band &= True if high is None else i - j <= high
    seen = np.zeros((rows, columns), dtype=int)
    for piece in pieces:
        for n in range(piece.count):
            row, column = piece.row + n * piece.rows, piece.column + n * piece.rows
            assert column >= 0
            assert column + piece.columns <= columns
            seen[row : row + piece.rows, column : column + piece.columns] += 1
    assert (seen[band] == 1).all()
    assert (seen <= 1).all()
    whole = max(pieces, key=lambda piece: piece.count)
    assert whole.count >= 2
    assert whole.columns - whole.rows <= (high if high is not None else rows) - (low if low is not None else -columns)


def lowered(pattern, strategy="blocks", **options):
    spec = AttentionSpec(**{"seq_len": 4096, "heads": 4, "head_dim": 64, "pattern": pattern, **options})
    return attnplan.compile(spec, device="cpu", strategy=strategy, backend="eager").graph


def test_a_window_becomes_overlapping_chunks():
    graph = lowered(P.window(256), kv_heads=2)
    attends = graph.of(Attend)
    assert len(attends) == 3
    assert disjoint([node.type.rows for node, _ in attends])
    middle = max(attends, key=lambda pair: pair[0].type.rows.elements_count)[0]
    k = graph.args(middle)[1].type.rows
    assert k.axes[-2].row == 32 < k.length == 32 + 2 * 256
    assert all(op.tile is None for _, op in attends)


def test_a_window_that_is_trained_has_longer_chunks():
    attends = lowered(P.window(256), training=True).of(Attend)
    rows = max((node.type.rows for node, _ in attends), key=lambda r: r.elements_count)
    assert (rows.axes[-2].row, rows.length) == (64, 64)


def test_what_is_no_band_becomes_tiles():
    for pattern in (P.documents(), P.window(256) | P.global_tokens(3), P.random_blocks(0.1), P.documents([96, 4000])):
        graph = lowered(pattern)
        assert [op.tile for _, op in graph.of(Attend)] == [(128, 64)], pattern


def test_what_kernels_run_themselves_stays():
    assert lowered(P.full(), causal=True) == lowered(P.full(), causal=True, strategy="dense")
    assert lowered(P.window(3000)).of(Attend)[0][1].tile == (128, 64), "no chunks where they leave out too little"


def test_a_grid_is_visited_by_boxes_where_that_leaves_fewer_tiles():
    assert lowered(P.neighborhood(7, shape=[16, 256])).of(Attend)[0][1].boxes is not None
    assert lowered(P.neighborhood(7)).of(Attend)[0][1].boxes is None
    assert lowered(P.neighborhood(7, shape=[64, 64]) & P.window(900)).of(Attend)[0][1].boxes is None


def test_a_longformer_is_decomposed_into_chunks_columns_and_rows():
    graph = lowered(P.window(256) | P.global_tokens(64), strategy="decompose")
    assert all(op.tile is None for _, op in graph.of(Attend))
    lengths = {(g.type.rows.length, graph.args(g)[1].type.rows.length) for g, _ in graph.of(Attend)}
    assert {(4096, 64), (64, 4032)} <= lengths


def builders(plan):
    plan.program  # noqa: B018  # emits
    return [m for m in plan.program.forward.modules() if isinstance(m, TileBuilder)]


def test_static_tables_are_built_once_and_new_documents_make_no_new_plan():
    q, k, v = (torch.randn(1, 2, 512, 16) for _ in range(3))
    static, runtime = (
        attnplan.compile(
            AttentionSpec(seq_len=512, heads=2, head_dim=16, pattern=pattern, dtype="float32"), "cpu", strategy="blocks"
        )
        for pattern in (P.documents([112, 400]), P.documents())
    )
    programs = static.program, runtime.program
    for cut in range(1, 6):
        static(q, k, v)
        runtime(q, k, v, documents=torch.tensor([0, 80 * cut, 512]))
    assert (static.program, runtime.program) == programs
    assert [b.built for b in builders(static)] == [1]
    assert [b.built for b in builders(runtime)] == [5]


@pytest.mark.parametrize("tile", [(0, 4), (4,), "tile"])
def test_a_tile_is_two_positive_sizes(tile):
    graph = lowered(P.documents())
    node, op = graph.of(Attend)[0]

    with pytest.raises((attnplan.errors.PassError, TypeError)):
        attrs.evolve(op, tile=tile).infer([n.type for n in graph.args(node)])


def test_a_query_row_in_two_chunks_is_refused():
    """The pairs of a symmetric window are covered once if queries overlap instead of keys; the output rows are not."""
    graph = lowered(P.window(256))
    node, op = max(graph.of(Attend), key=lambda pair: pair[0].type.rows.elements_count)
    q, k, _ = (n.type for n in graph.args(node))
    swapped = [attrs.evolve(t, rows=r) for t, r in ((q, k.rows), (k, q.rows), (k, q.rows))]
    swapped[2] = attrs.evolve(swapped[2], tensor="v")
    with pytest.raises(PassError, match="one query row stands in two places"):
        op.infer(swapped)


@pytest.mark.parametrize("lengths", [(700, 700), (130, 700)])
def test_a_function_has_more_masks_than_a_batch_of_tiles_shows(lengths):
    def kept(head, query, key):
        return (query * 7919 + key * 104729 + query * key % 8191 + head) % 100 < 30

    seq_len, kv_len = lengths
    spec = AttentionSpec(seq_len=seq_len, kv_len=kv_len, heads=3, head_dim=16, dtype="float64", pattern=P.mask(kept))
    call = Call.of(spec, batch=2)
    want, tried = call.expected(), 0
    for plan in every_plan(spec):
        if any(op.tile is not None for _, op in plan.graph.of(Attend)):
            assert_agree(call.got(plan), want, 1e-11, way(plan))
            tried += 1
    assert tried
