"""Loops: pieces of the output and blocks of scores compute what the whole does, and the proof sees when they do not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.errors import MemoryBudgetError, PassError, SpecError
from attnplan.ir import Attend, Axis, Graph, Output, RowMap, parse_graph, print_graph
from attnplan.lower import lower
from attnplan.memory_budget import BLOCKS, LEAST_ROWS, variants
from attnplan.passes import Chunk, Step, chunk
from attnplan.passes import cut as cuts
from attnplan.passes.alike import bodies
from attnplan.passes.chunk import Piece, normal, parts, pieces, restrict, unloopable, without_loop
from attnplan.passes.cut import cut
from attnplan.plan import Plan
from attnplan.runtime import loops
from attnplan.search import Candidate, Found, Lowered, lowerings
from tests.running import Call, assert_agree, every_plan, way
from tests.score_calls import by_plan, drawn, expected, numbers

SHAPE: dict[str, Any] = {"seq_len": 37, "heads": 4, "head_dim": 8, "dtype": "float64"}
MASK = torch.ones(2, 37, dtype=torch.bool)
MASK[0, 30:], MASK[1, :4] = False, False
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({"pattern": P.full(), "kv_heads": 2}, {}),
    "causal": ({"causal": True}, {}),
    "cross": ({"causal": True, "kv_len": 50, "kv_heads": 2}, {}),
    "window": ({"pattern": P.window(7), "causal": True}, {}),
    "softcap": ({"pattern": P.window(7), "causal": True, "softcap": 4.0}, {}),
    "longnet": ({"pattern": P.longnet([8, 32], [1, 4]), "causal": True, "kv_heads": 2}, {}),
    "ragged longnet": ({"pattern": P.longnet([7, 16, 31], [1, 2, 5])}, {}),
    "grouped": ({"pattern": P.grouped([8, 32], [1, 2])}, {}),
    "detached": ({"pattern": P.mix([P.window(3), P.full()], rule="lse-detached")}, {}),
    "mean": ({"pattern": P.grouped([8, 32], [1, 2], mix="mean"), "causal": True}, {}),
    "union": ({"pattern": P.window(5) | P.global_tokens(3)}, {}),
    "rows without a key": ({"pattern": P.dilated(8, 3, 1), "layout": "bshd"}, {}),
    "documents": ({"pattern": P.documents()}, {"documents": torch.tensor([[0, 5, 20, 37], [0, 9, 9, 37]])}),
    "padding": ({"pattern": P.padding(), "causal": True}, {"key_padding": MASK}),
}
LOOPS = (((1, 1, 16), None), (None, (8, 5)), ((2, 2, 10), (4, 16)))


def looped(plan: Plan, loop: tuple[int, int, int] | None, block: tuple[int, int] | None) -> Plan:
    """Return a plan whose graph is looped over."""
    rewrite = Chunk(loop, block)
    graph = rewrite(plan.graph)
    steps = (*plan.steps, Step(rewrite, len(plan.graph), len(graph), 0.0, graph))
    candidate = Candidate(plan.strategy, plan.backend, plan.schedule, plan.predicted)
    found = Found(Lowered(plan.strategy, graph, steps), candidate, plan._backend, plan._schedule, (candidate,))
    return Plan(plan.spec, plan.target, found, {}, strict=True)


QUICK = ("longnet", "cross", "mean", "rows without a key", "documents")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_loops_compute_the_same_forward_and_backward(name):
    options, operands = CASES[name]
    spec = AttentionSpec(**{**SHAPE, **options})
    call = Call.of(spec, operands, batch=2)
    want, tried = call.expected(), 0
    for plan in every_plan(spec):
        for loop, block in LOOPS:
            if plan.backend != "eager" or (block and plan.schedule != "math"):
                continue
            if unloopable(plan.graph, loop, block):
                assert any(op.tile for _, op in plan.graph.of(Attend)), way(plan)
                continue
            assert_agree(call.got(looped(plan, loop, block)), want, 1e-12, f"{way(plan)} {loop} {block}")
            tried += 1
    assert tried >= len(LOOPS)


SCORES: dict[str, dict[str, Any]] = {
    "sinks": {"sink_logits": True, "causal": True, "kv_heads": 2},
    "sinks, rows without a key": {"sink_logits": True, "pattern": P.dilated(8, 3, 1)},
    "sinks, pieces without a key": {"sink_logits": True, "causal": True, "kv_len": 11},
    "bias": {"bias": True, "causal": True, "kv_heads": 2},
    "bias, longnet": {"bias": True, "pattern": P.longnet([8, 32], [1, 4])},
    "slopes": {"alibi_slopes": True, "causal": True},
    "all, longnet": {"bias": True, "alibi_slopes": True, "sink_logits": True, "pattern": P.longnet([8, 32], [1, 4])},
    "all, dilated": {"bias": True, "alibi_slopes": True, "sink_logits": True, "pattern": P.dilated(8, 2, "interleave")},
}
WITHOUT_BLOCKS = ((1, 1, 16), (2, 2, 10), (1, 4, 37))


@pytest.mark.parametrize(
    "name", [n if "all" in n or "pieces" in n else pytest.param(n, marks=pytest.mark.slow) for n in SCORES]
)
def test_loops_bring_each_piece_its_part_of_the_score_operands(name):
    spec = AttentionSpec(**{**SHAPE, "batch": 2, **SCORES[name]})
    operands, tried = drawn(spec), 0
    want = numbers(lambda q, k, v, own: expected(spec, q, k, v, own), spec, operands)
    for plan in every_plan(spec):
        for loop in WITHOUT_BLOCKS:
            if plan.backend == "eager" and not unloopable(plan.graph, loop, None):
                got = numbers(by_plan(looped(plan, loop, None)), spec, operands)
                for what, value in want.items():
                    assert torch.allclose(got[what], value, rtol=1e-11, atol=1e-11), (what, way(plan), loop)
                tried += 1
    assert tried >= len(WITHOUT_BLOCKS)


@pytest.mark.parametrize(
    "shape",
    [(1, 37, 37), (2, 1, 37, 1), *(pytest.param(s, marks=pytest.mark.slow) for s in ((4, 1, 37), (2, 4, 37, 37)))],
)
def test_a_bias_that_broadcasts_is_cut_where_it_can_be(shape):
    spec = AttentionSpec(**{**SHAPE, "batch": 2, "bias": True, "pattern": P.longnet([8, 32], [1, 4])})
    operands = drawn(spec, shape)
    want = numbers(lambda q, k, v, own: expected(spec, q, k, v, own), spec, operands)
    for plan in every_plan(spec):
        if plan.backend == "eager":
            got = numbers(by_plan(looped(plan, (1, 1, 16), None)), spec, operands)
            torch.testing.assert_close(got["grad bias"], want["grad bias"], rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(got["output"], want["output"], rtol=1e-11, atol=1e-11)


def test_slopes_of_each_batch_element_go_with_it():
    spec = AttentionSpec(**{**SHAPE, "batch": 2, "alibi_slopes": True, "causal": True})
    slopes = torch.randn(2, 4, dtype=torch.float64).requires_grad_()
    want = numbers(lambda q, k, v, own: expected(spec, q, k, v, own), spec, {"alibi_slopes": slopes})
    for plan in every_plan(spec):
        if plan.backend == "eager":
            got = numbers(by_plan(looped(plan, (1, 1, 16), None)), spec, {"alibi_slopes": slopes})
            for what, value in want.items():
                torch.testing.assert_close(got[what], value, rtol=1e-11, atol=1e-11)


DROPPED: dict[str, dict[str, Any]] = {
    "causal": {"causal": True, "kv_heads": 2},
    "longnet": {"pattern": P.longnet([8, 32], [1, 4])},
    "by heads": {"pattern": P.dilated(8, 2, "interleave")},
    "slopes": {"alibi_slopes": True, "sink_logits": True, "pattern": P.window(5) | P.global_tokens(3)},
    "one branch by heads": {"pattern": P.mix([P.window(5), P.dilated(8, 2, "interleave")], rule="lse")},
}


@pytest.mark.parametrize(
    "name", [n if "causal" in n or "branch" in n else pytest.param(n, marks=pytest.mark.slow) for n in DROPPED]
)
def test_loops_drop_the_pairs_that_the_whole_drops(name):
    spec = AttentionSpec(**{**SHAPE, "batch": 2, "dropout": 0.4, **DROPPED[name]})
    operands, tried = {"dropout_seed": 7, **drawn(spec)}, 0
    for plan in every_plan(spec):
        want = numbers(by_plan(plan), spec, operands)
        for loop in WITHOUT_BLOCKS:
            if plan.backend == "eager":
                got = numbers(by_plan(looped(plan, loop, None)), spec, operands)
                for what, value in want.items():
                    torch.testing.assert_close(got[what], value, rtol=1e-11, atol=1e-11)
                tried += 1
    assert tried


def test_tiles_are_looped_over_by_batch_elements():
    spec = AttentionSpec(**{**SHAPE, "batch": 3, "pattern": P.random_blocks(0.4, 8, 0), "kv_heads": 2})
    call, tried = Call.of(spec, batch=3), 0
    want = call.expected()
    for plan in every_plan(spec):
        if plan.backend == "eager" and any(op.tile for _, op in plan.graph.of(Attend)):
            for size in (1, 2):
                assert_agree(call.got(looped(plan, (size, 2, 37), None)), want, 1e-12, way(plan))
                tried += 1
    assert tried


def test_an_upstream_gradient_of_one_output_only_is_enough():
    spec = AttentionSpec(**{**SHAPE, "pattern": P.longnet([8, 32], [1, 4])})
    plan = next(p for p in every_plan(spec) if p.strategy == "lattice" and p.schedule == "flash")
    whole, small = plan, looped(plan, (1, 1, 16), None)
    q, k, v = (torch.randn(1, 4, 37, 8, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    weight = torch.randn(1, 4, 37, dtype=torch.float64)
    found = []
    for one in (whole, small):
        lse = one(q, k, v, return_lse=True)[1].clamp_min(-30)
        found.append(torch.autograd.grad((lse * weight).sum(), (q, k, v), allow_unused=True, materialize_grads=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_double_backward_is_refused():
    spec = AttentionSpec(**{**SHAPE, "softcap": 3.0})
    plan = looped(next(p for p in every_plan(spec) if p.schedule == "math"), (1, 1, 16), None)
    q, k, v = (torch.randn(1, 4, 37, 8, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    (first,) = torch.autograd.grad((plan(q, k, v) ** 2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        first.sum().backward()


# ---------------------------------------------------------------------------------------------------------- row maps

axes = st.builds(Axis, st.integers(1, 5), st.integers(0, 2), st.integers(0, 6))
last = st.builds(lambda n, r: Axis(n, 0, r), st.integers(1, 9), st.integers(0, 3))
maps = st.builds(
    lambda h, r, some, end: RowMap(h, r, (*some, end)),
    st.integers(0, 2), st.integers(0, 4), st.lists(axes, max_size=2), last,
)  # fmt: skip


@given(maps, st.integers(0, 8), st.integers(1, 8), st.integers(0, 30), st.integers(1, 30))
def test_a_cut_keeps_exactly_the_rows_of_the_box(q, head, heads, row, rows):
    found = [e for some, _ in cut(q, q, (head, head + heads), (row, row + rows)) for e in some.elements()]
    inside = [(h, r) for h, r in q.elements() if head <= h < head + heads and row <= r < row + rows]
    assert sorted(found) == sorted(inside)


@pytest.mark.parametrize("loop", [(1, 1, 16), (1, 3, 23), (1, 1, 1), (2, 4, 30)])
@pytest.mark.parametrize("name", CASES)
def test_pieces_are_proved(name, loop):
    spec = AttentionSpec(**{**SHAPE, **CASES[name][0]})
    for found in lowerings(spec):
        graph = Chunk(loop)(found.graph)
        assert without_loop(graph) == found.graph
        assert sum(p.piece.rows * p.piece.heads for p in parts(graph)) == 37 * spec.kv_heads
        assert parse_graph(print_graph(graph)) == graph


MUTATIONS = {
    "a key range that ends early": ("_keys", lambda k, first, stop: _end(k, first, max(first + 1, stop - 1))),
    "a key range that begins late": ("_keys", lambda k, first, stop: _end(k, min(first + 1, stop - 1), stop)),
    "keys of all segments": ("_slice_keys", lambda q, k, axis, first, last: k),
    "a piece without its last row": ("pieces", lambda graph, loop: tuple(_short(pieces(graph, loop)))),
    "a wrong origin": ("_moved", lambda rows, head, row: attrs.evolve(rows, head=rows.head - head)),
}
_end = chunk._keys


def _short(found):
    return [*found[:-1], attrs.evolve(found[-1], rows=max(1, found[-1].rows - 1))]


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_proof_of_the_pieces_sees(name, monkeypatch):
    graphs = [
        next(x.graph for x in lowerings(AttentionSpec(**{**SHAPE, **rest})) if x.strategy in ("lattice", "dense"))
        for rest in ({"causal": True}, {"pattern": P.longnet([8, 32], [1, 4]), "causal": True})
    ]
    lattice = lowerings(AttentionSpec(**{**SHAPE, "pattern": P.longnet([8, 32], [1, 4]), "causal": True}))[-1].graph
    target, wrong = MUTATIONS[name]
    restrict.cache_clear()
    monkeypatch.setattr(cuts if target == "_slice_keys" else chunk, target, wrong)
    caught = 0
    for graph in (*graphs, lattice):
        try:
            Chunk((1, 2, 10))(graph)
        except PassError:
            caught += 1
    restrict.cache_clear()
    assert caught


def test_an_attend_that_computes_other_pairs_than_the_piece_is_seen(monkeypatch):
    """The causal square of a piece, with its row 0 one row further than it stands."""
    graph = lower(AttentionSpec(**{**SHAPE, "causal": True}))
    seen = chunk._seen

    def shifted(op, q, k):
        for one, rows, keys in seen(op, q, k):
            yield attrs.evolve(one, shift=1), rows, keys

    restrict.cache_clear()
    monkeypatch.setattr(chunk, "_seen", shifted)
    with pytest.raises(PassError, match="do not compute the pairs of the graph"):
        Chunk((1, 1, 10))(graph)
    restrict.cache_clear()


def test_pieces_that_are_alike_share_a_program():
    spec = AttentionSpec(seq_len=4096, heads=4, head_dim=8, pattern=P.longnet([64, 256], [1, 4]), causal=True)
    graph = Chunk((1, 4, 512))(next(x.graph for x in lowerings(spec) if x.strategy == "lattice"))
    bodies = [normal(p.graph) for p in parts(graph)]
    assert len(bodies) == 8
    assert len(set(bodies)) == 1


# ---------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_looped_over_says_why():
    def why(loop=(1, 1, 16), block=None, **rest):
        return unloopable(lower(AttentionSpec(**{**SHAPE, **rest})), loop, block)

    assert why(dropout=0.1) == why(alibi_slopes=True, bias=True, sink_logits=True) == ""
    assert "not made block by block" in why(None, (4, 4), bias=True)
    assert "not made block by block" in why(None, (4, 4), dropout=0.1)
    assert "positions arrive with the call" in why(q_offset=True, kv_len=64)
    assert why((1, 1, 37), q_offset=True, kv_len=64) == ""
    assert "a loop already" in unloopable(Chunk((1, 1, 16))(lower(AttentionSpec(**SHAPE))), (1, 1, 8), None)
    assert "pieces are more than" in why((1, 1, 1), seq_len=1024)
    with pytest.raises(PassError, match="not made block by block"):
        Chunk(None, (4, 4))(lower(AttentionSpec(**{**SHAPE, "dropout": 0.1})))
    tiled = next(x.graph for x in lowerings(AttentionSpec(**{**SHAPE, "pattern": P.random_blocks(0.3, 8)}), ((4, 3), 3))
                 if any(op.tile for _, op in x.graph.of(Attend)))  # fmt: skip
    assert "only batch elements" in unloopable(tiled, (1, 1, 37), None)
    assert unloopable(tiled, (1, 4, 37), None) == ""
    with pytest.raises(PassError, match="is no piece"):
        Output(loop=(0, 1, 1)).infer([lower(AttentionSpec(**SHAPE)).output.type])
    with pytest.raises(SpecError, match="did you mean '2 GiB'"):
        attnplan.compile(AttentionSpec(**SHAPE), max_memory="2 gigs")


def least_by_brute_force(spec: AttentionSpec, step: int) -> tuple[int, int]:
    """Return the smallest peaks over every candidate: of what is offered, and of all sizes in steps of some rows.

    Each is priced whole. The second takes any number of batch elements, heads and multiples of ``step`` rows, those of
    the least piece or more, and every block of scores.
    """
    from attnplan.cost import resolve
    from attnplan.search import _options, _way

    offered, every = [], []
    target = resolve("cpu")
    for lowered, backend, schedule, candidate in _options(spec, target, "auto", "auto"):
        if candidate.prediction is None:
            continue
        here, graph = _way(spec, target, backend, schedule), lowered.graph
        offered.append(candidate.prediction.peak_bytes)
        plain = schedule.kernel.materialises
        found = [one.graph(graph) for one in variants(graph, spec, plain=plain)]
        offered += [here.price(one).peak_bytes for one in found if here.runs(one)]
        rows = [*range(LEAST_ROWS, spec.seq_len, step), spec.seq_len]
        sizes = [(b, h, r) for b in range(1, spec.batch + 1) for h in range(1, spec.kv_heads + 1) for r in rows]
        blocks = [b for b in (None, *BLOCKS) if b is None or (plain and not unloopable(graph, None, b))]
        found = [Chunk(s, b, prove=False)(graph) for s in sizes for b in blocks if not unloopable(graph, s, b)]
        every += [here.price(one).peak_bytes for one in found if here.runs(one)]
    return min(offered), min(every)


TIGHT = {
    "causal": {"causal": True},
    "longnet": {"pattern": P.longnet([64, 256], [1, 4])},
    "softcap": {"softcap": 5.0},
    "window": {"pattern": P.window(20)},
    "union": {"pattern": P.window(20) | P.global_tokens(5)},
    "sinks": {"causal": True, "sink_logits": True},
}


@pytest.mark.parametrize(
    ("name", "training", "step"),
    [("longnet", False, 300), ("causal", True, 300)]
    + [pytest.param(n, t, 64, marks=pytest.mark.slow) for n in TIGHT for t in (False, True)],
)
def test_a_refusal_is_right_and_what_it_proposes_works(name, training, step):
    spec = AttentionSpec(
        seq_len=700, heads=4, kv_heads=2, head_dim=16, dtype="float32", batch=2, training=training, **TIGHT[name]
    )
    least, every = least_by_brute_force(spec, step)
    assert every >= least  # no other size would have met the budget that is refused
    with pytest.raises(MemoryBudgetError, match=r"the smallest plan, .*, needs") as caught:
        attnplan.compile(spec, max_memory=least - 1)
    proposed = str(caught.value).rpartition("max_memory='")[2].rstrip("'")
    assert proposed == f"{-(-least // 1024)} KiB"
    assert attnplan.compile(spec, max_memory=proposed).predicted.peak_bytes == least


@pytest.mark.parametrize("name", CASES)
def test_pieces_that_are_alike_are_those_whose_graphs_are_equal(name):
    for found in lowerings(AttentionSpec(**{**SHAPE, **CASES[name][0]})):
        for loop in ((1, 1, 16), (1, 3, 5), (1, 4, 37)):
            graph = Chunk(loop, prove=False)(found.graph)
            want = Counter(normal(p.graph) for p in parts(graph) if p.graph is not None)
            assert dict(bodies(graph)) == want


def test_a_hopeless_budget_is_refused_without_building_every_piece(monkeypatch):
    """What takes time is the graphs of pieces: lower bounds leave few of them to be built."""
    spec = AttentionSpec(
        seq_len=65_536, heads=8, head_dim=64, dtype="bfloat16", pattern=P.longnet([2048, 8192, 32_768], [1, 4, 16])
    )
    attnplan.compile(spec, device="h100")
    restrict.cache_clear()
    with pytest.raises(MemoryBudgetError, match=r"max_memory='\d+ KiB'"):
        attnplan.compile(spec, device="h100", max_memory=1)
    assert restrict.cache_info().misses < 1500


def test_a_budget_is_met_by_the_largest_pieces_that_fit():
    spec = AttentionSpec(seq_len=2048, heads=4, head_dim=16, dtype="float32", pattern=P.longnet([64, 256], [1, 4]))
    free = attnplan.compile(spec)
    assert free.graph.output.op == Output()
    half = attnplan.compile(spec, max_memory=free.predicted.peak_bytes // 2)
    assert half.predicted.peak_bytes <= free.predicted.peak_bytes // 2
    assert half.graph.output.op.loop is not None
    assert "pieces of" in half.candidates[0].name
    assert "pieces of" in half.explain()
    q, k, v = (torch.randn(1, 4, 2048, 16) for _ in "qkv")
    torch.testing.assert_close(half(q, k, v), free(q, k, v))
    half.verify()


def test_a_looped_plan_is_saved_and_read(tmp_path):
    spec = AttentionSpec(seq_len=512, heads=4, head_dim=16, dtype="float32", causal=True)
    plan = attnplan.compile(spec, max_memory=attnplan.compile(spec).predicted.peak_bytes // 2)
    plan.save(tmp_path / "plan.json")
    again = attnplan.load(tmp_path / "plan.json")
    assert again.graph == plan.graph
    assert again.predicted.peak_bytes == plan.predicted.peak_bytes
    q, k, v = (torch.randn(1, 4, 512, 16) for _ in "qkv")
    torch.testing.assert_close(again(q, k, v), plan(q, k, v))


def test_open_lengths_are_looped_over_at_the_length_of_the_call():
    spec = AttentionSpec(seq_len=attnplan.Dim("s", max=1024), heads=2, head_dim=16, dtype="float32", causal=True)
    free = attnplan.compile(spec)
    plan = attnplan.compile(spec, max_memory=int(free.predicted.peak_bytes * 0.7))
    assert "pieces" in plan.candidates[0].name
    for length in (1024, 300):
        q, k, v = (torch.randn(1, 2, length, 16) for _ in "qkv")
        torch.testing.assert_close(plan(q, k, v), free(q, k, v))


def test_blocks_of_scores_follow_their_mutations(monkeypatch):
    """A block whose diagonal is off by one must not pass for causal."""
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in "qkv")
    right = loops.attend_blocks(q, k, v, None, True, 0.5, (4, 3))[0]
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
    torch.testing.assert_close(right, want)
    allowed = loops._allowed
    monkeypatch.setattr(
        loops, "_allowed", lambda m, c, rows, keys, d: allowed(m, c, slice(rows.start + 1, rows.stop + 1), keys, d)
    )
    assert not torch.allclose(loops.attend_blocks(q, k, v, None, True, 0.5, (4, 3))[0], want)


def test_a_piece_of_a_graph_is_a_graph():
    graph = lower(AttentionSpec(**{**SHAPE, "causal": True}))
    part = restrict(graph, Piece(1, 2, 5, 10))
    assert isinstance(part.graph, Graph)
    part.graph.verify()
    assert part.keys == (0, 15)
    assert part.graph.inputs["q"].type.rows.sizes == (2, 10)
