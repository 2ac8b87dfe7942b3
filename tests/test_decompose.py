from __future__ import annotations

import time

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnplan import patterns as P
from attnplan.errors import PassError, VerifyError
from attnplan.ir import Attend, Merge, RowMap, Take, parse_graph, print_graph
from attnplan.ir.coverage import spec_coverage
from attnplan.lower import lower
from attnplan.passes import Canonicalize, Decompose, FuseMerge, Lattice, Pipeline, SplitHeads
from attnplan.passes import decompose as module
from attnplan.passes.decompose import Box, fold
from attnplan.runtime.interpreter import interpret
from attnplan.spec import AttentionSpec
from attnplan.strategies import STRATEGIES
from tests import oracle
from tests import strategies as some
from tests.programs import prove, replaced, stages
from tests.running import TOLERANCES, Call, assert_agree, every_plan, way
from tests.test_passes import assert_same, gradients

N = 1_000_003
PASSES = (Canonicalize(), SplitHeads(), Decompose(), Lattice(), FuseMerge())


def spec_of(pattern, seq_len=24, heads=2, head_dim=3, **options):
    return AttentionSpec(
        seq_len=seq_len, heads=heads, head_dim=head_dim, pattern=pattern, dtype="float64", **{"scale": 0.5, **options}
    )


def decomposed(spec):
    return Pipeline(PASSES).run(lower(spec), spec_coverage(spec))[0]


LONGFORMER = P.window(4) | P.global_tokens(3)
BIGBIRD = P.window(2) | P.global_tokens(2) | P.segments(6)
SPECS = {
    "longformer": spec_of(LONGFORMER),
    "longformer-causal-gqa": spec_of(LONGFORMER, 23, 4, kv_heads=2, causal=True),
    "streaming": spec_of(P.window(5) | P.sinks(2), causal=True),
    "streaming-more-keys": spec_of(P.window(5) | P.sinks(2), 7, kv_len=20, causal=True),
    "bigbird-like": spec_of(BIGBIRD, 20),
    "window-or-dilated": spec_of(P.window(2) | P.dilated(12, 3, offset="interleave"), 30, 3, causal=True),
    "window-or-dilated-both-sides": spec_of(P.window(2) | P.dilated(12, 2), 29),
    "sparse-transformer": spec_of((P.window(4) | P.strided(4)) & P.causal(), 22),
    "documents-and-sinks": spec_of(P.documents([5, 8, 11]) & (P.window(3) | P.sinks(2)), causal=True),
    "heads-differ": spec_of(P.heads(0, 2) & P.window(3) | P.heads(2, 6), 14, 6, kv_heads=3),
    "runtime-documents": spec_of(P.documents() & (P.window(3) | P.sinks(2)) & P.padding(), causal=True),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_union_falls_into_the_parts_reviewed(name, golden):
    golden(f"decompose-{name}", print_graph(decomposed(SPECS[name])))


def test_golden_graphs_read_back():
    for spec in SPECS.values():
        graph = decomposed(spec)
        assert parse_graph(print_graph(graph)) == graph


def attends(graph):
    """Return (condition, rows of q, rows of k) of each attend, as text and ranges."""
    found = []
    for node, op in graph.of(Attend):
        q, k = (n.type.rows for n in graph.args(node)[:2])
        found.append((repr(op.where), (q.row, q.last_row + 1), (k.row, k.last_row + 1)))
    return found


def test_longformer_is_dense_columns_dense_rows_and_a_pure_window():
    graph = decomposed(spec_of(P.window(512) | P.global_tokens(64), N))
    assert attends(graph) == [
        ("full()", (0, N), (0, 64)),
        ("full()", (0, 64), (64, N)),
        ("window(512)", (64, N), (64, N)),
    ]


def test_streaming_is_sinks_and_a_pure_causal_window():
    graph = decomposed(spec_of(P.window(512) | P.sinks(4), N, causal=True))
    assert attends(graph) == [
        ("causal()", (0, 4), (0, 4)),
        ("full()", (4, N), (0, 4)),
        ("window(512, 0)", (4, N), (4, N)),
    ]


def test_a_window_beside_segments_is_a_pure_window_and_segments_without_it():
    graph = decomposed(spec_of(P.window(5) | P.segments(100), N, causal=True))
    assert [where for where, _, _ in attends(graph)] == ["band(None, -6)", "band(None, -6)", "window(5, 0)"]
    assert [n.type.rows.sizes for n, _ in graph.of(Attend)] == [(2, 10_000, 100), (2, 3), (2, N)]


def test_a_stride_is_dense_attention_over_each_residue():
    graph = decomposed(spec_of(P.window(128) | P.strided(128), N, causal=True))
    assert [where for where, _, _ in attends(graph)] == ["band(None, -129)", "band(None, -129)", "window(128, 0)"]
    sizes = [n.type.rows.sizes for n, _ in graph.of(Attend)]
    assert sizes == [(2, N % 128, N // 128 + 1), (2, 128 - N % 128, N // 128), (2, N)]


@pytest.mark.parametrize(
    "pattern",
    [
        P.window(4),
        P.window(4) & P.segments(6),
        P.documents() | P.window(3),  # no kernel runs either part by itself
        P.segments(6) | P.dilated(4, 2),
        P.global_tokens(range(0, 24, 2)),  # more cuts than pay
        P.documents(),
    ],
)
def test_what_gains_nothing_is_left_alone(pattern):
    graph = lower(spec_of(pattern))
    assert Decompose()(graph) is graph


def test_a_spelling_that_the_proof_does_not_read_is_left_alone():
    irregular = P.segments(2) & P.segments(3)
    graph = lower(spec_of(~(P.causal() | P.segments(2) | irregular), 6, kv_len=5))
    assert Decompose()(graph) is graph
    decomposed(spec_of(~(P.causal() | P.segments(2) | irregular), 2, kv_len=1))


@pytest.mark.parametrize(("stride", "taken"), [(4096, True), (4097, False)])
def test_a_stride_under_a_range_is_taken_apart_as_far_as_that_can_be_proved(stride, taken):
    spec = spec_of(P.strided(stride) & (P.window(3000) | P.sinks(90_000)), 100_003)
    graph = Pipeline((Lattice(), FuseMerge())).run(lower(spec), spec_coverage(spec))[0]
    assert bool(graph.of(Take)) == taken


def test_segments_inside_a_union_are_not_taken_apart_twice():
    spec = spec_of(P.segments(8) & (P.dilated(12, 2) | P.sinks(3)), 30)
    graph = lower(spec)
    assert Lattice()(graph) is graph


def test_positions_that_arrive_with_the_call_are_left_alone():
    graph = lower(spec_of(LONGFORMER, 6, kv_len=24, q_offset=True))
    assert Decompose()(graph) is graph


def test_heads_that_a_range_splits_inside_a_group_are_left_together():
    spec = spec_of(P.heads(0, 1) & P.window(3) | P.heads(1, 4), 14, 4, kv_heads=2)
    assert [n.type.rows.sizes for n, _ in decomposed(spec).of(Attend)] == [(2, 2, 14)]


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("window(2) | sinks(8)", "window(2)"),
        ("window(2) & sinks(8)", "False"),
        ("~sinks(8)", "True"),
        ("~(window(2) | sinks(8))", "~window(2)"),
        ("~(window(2) & ~sinks(8))", "~window(2)"),
        ("window(30) & causal()", "causal()"),
        ("global_tokens(8)", "False"),
        ("global_tokens(9)", "global_tokens(9)"),
        ("global_tokens(20)", "True"),
        ("documents([8, 20])", "True"),
        ("documents([7, 21])", "True"),
        ("documents([10, 18])", "documents([10, 18])"),
        ("documents([2, 3, 23])", "True"),
        ("segments(8)", "segments(8)"),
        ("segments(20)", "True"),
        ("dilated(20, 2)", "dilated(20, 2)"),
        ("strided(2)", "strided(2)"),
        ("columns([3, 7, 20])", "False"),
        ("columns([3, 9])", "columns([3, 9])"),
        ("columns([3, 9], every=12)", "columns([3, 9], every=12)"),
        ("heads(0, 1)", "heads(0, 1)"),
        ("heads(0, 2)", "True"),
        ("heads(2, 3)", "False"),
        ("padding() | padding() & causal()", "padding()"),
        ("padding() | ~padding()", "True"),
        ("padding() & ~padding()", "False"),
        ("padding() & (full() | causal()) & padding()", "padding()"),
    ],
)
def test_folding_a_condition_in_a_box(pattern, left):
    assert repr(fold(P.parse(pattern), Box.of((0, 2), (8, 20), (8, 20)))) == left


@pytest.mark.parametrize(
    ("pattern", "queries", "keys", "left"),
    [
        ("window(3)", (0, 4), (7, 9), False),
        ("window(3)", (0, 5), (7, 9), "window(3)"),
        ("window(3)", (4, 6), (3, 7), True),
        ("window(3)", (4, 7), (3, 7), True),
        ("window(3)", (4, 8), (3, 7), "window(3)"),
        ("causal()", (5, 9), (0, 6), True),
        ("causal()", (4, 9), (0, 6), "causal()"),
        ("causal()", (0, 5), (5, 9), False),
        ("segments(4)", (0, 4), (4, 8), False),
        ("segments(4)", (3, 5), (4, 8), "segments(4)"),
        ("segments(4)", (-3, 0), (0, 4), False),
        ("documents([4, 4])", (0, 4), (4, 8), False),
    ],
)
def test_folding_in_an_oblong_box(pattern, queries, keys, left):
    found = fold(P.parse(pattern), Box.of((0, 1), queries, keys))
    assert (found if isinstance(found, bool) else repr(found)) == left


# Random unions


@st.composite
def unions(draw, shape):
    """Unions whose terms a pass can cut, and conditions around them that it has to carry along."""
    atoms = [
        some.bands(),
        st.sampled_from([P.band(None, -3), P.band(-2, 5), P.band(6, -2), P.band(-1, None), P.band(3, 0)]),
        st.builds(P.sinks, st.integers(1, shape.kv_len)),
        st.builds(P.global_tokens, st.integers(1, shape.kv_len)),
        st.builds(P.global_tokens, st.lists(st.integers(0, shape.kv_len - 1), min_size=1, max_size=3, unique=True)),
        some.dilations(12),
        some.head_ranges(shape.heads),
        st.builds(P.strided, st.integers(1, 7)),
        st.builds(P.columns, st.lists(st.integers(0, shape.kv_len - 1), min_size=1, max_size=3, unique=True)),
        st.builds(P.segments, st.integers(1, 12)),
    ]
    if shape.seq_len <= shape.kv_len:
        atoms.append(st.builds(P.documents, some.cuts(shape.kv_len)))
    inner = st.one_of(atoms)
    union = draw(inner) | draw(inner)
    if draw(st.booleans()):
        union = union | draw(inner) & draw(inner)
    if draw(st.integers(0, 3)) == 0:
        union = ~union
    for outer in (inner, some.runtime_atoms(shape)):
        if draw(st.integers(0, 2)) == 0:
            union = union & draw(outer)
    return union


@st.composite
def specs(draw, longest=19, rules=True):
    shape = draw(some.shapes(longest))
    pattern = draw(unions(shape))
    if rules and draw(st.integers(0, 3)) == 0:
        pattern = P.mix([pattern, draw(unions(shape))], rule=draw(st.sampled_from(some.RULES)))
    return AttentionSpec(
        seq_len=shape.seq_len,
        kv_len=shape.kv_len,
        heads=shape.heads,
        kv_heads=draw(st.sampled_from([n for n in range(1, shape.heads + 1) if shape.heads % n == 0])),
        head_dim=2,
        batch=shape.batch,
        pattern=pattern,
        causal=draw(st.booleans()),
        dtype="float64",
    )


@settings(max_examples=150)
@given(st.data())
def test_every_pass_keeps_coverage_output_lse_and_gradients(data):
    spec = data.draw(specs())
    values = data.draw(some.operands(spec))
    inputs = oracle.sample_inputs(spec, batch=spec.batch, seed=data.draw(st.integers(0, 9)))
    out, lse = oracle.dense(spec, *inputs, values)
    upstream = torch.randn_like(out), torch.randn_like(out[..., 0])
    grads = gradients(out, lse, inputs, upstream)
    for stage, graph in stages(spec, PASSES):
        got, got_lse = interpret(graph, *inputs, values)
        assert_same(got, out, f"output after {stage}")
        if lse is not None:
            assert_same(got_lse, lse, f"LSE after {stage}")
        for name, a, b in zip("qkv", gradients(got, got_lse, inputs, upstream), grads, strict=True):
            assert_same(a, b, f"gradient of {name} after {stage}")


@settings(max_examples=300)
@given(specs(longest=40))
def test_any_union_is_proved_in_any_order_of_passes(spec):
    graph, expected = lower(spec), spec_coverage(spec)
    for passes in (PASSES, (Decompose(), FuseMerge()), (Lattice(), Decompose(), SplitHeads(), FuseMerge())):
        Pipeline(passes).run(graph, expected)


@given(specs())
def test_decomposing_twice_changes_nothing_more(spec):
    graph = Decompose()(lower(spec))
    assert Decompose()(graph) is graph


@settings(max_examples=60)
@given(st.data())
def test_every_strategy_runs_as_the_oracle(data):
    spec = data.draw(specs(longest=15))
    call = Call.of(spec, data.draw(some.operands(spec)), spec.batch)
    want = call.expected()
    plans = list(every_plan(spec))
    assert plans
    for plan in plans:
        assert_agree(call.got(plan), want, TOLERANCES["float64"], way(plan))


@pytest.mark.parametrize("name", SPECS)
def test_a_reviewed_union_runs_decomposed_as_the_oracle(name):
    spec = SPECS[name]
    ends = torch.tensor([0, 5, 5, 13, spec.kv_len])
    operands = {"documents": ends, "key_padding": torch.arange(spec.kv_len)[None] != 7} if spec.operands else {}
    call = Call.of(spec, operands, batch=2)
    plans = [p for p in every_plan(spec) if p.strategy == "decompose"]
    assert {p.schedule for p in plans} == {"flash", "math"}
    for plan in plans:
        assert_agree(call.got(plan), call.expected(), TOLERANCES["float64"], way(plan))


# The proof refuses a wrong decomposition.

BIG = spec_of(P.window(512) | P.global_tokens(64), N, 4, kv_heads=2)
BESIDE = spec_of(P.window(5) | P.dilated(4096, 4), N, causal=True)


def change(graph, at, **changes):
    """Change the op of one attend, or the rows of its queries (``q``) or keys (``k``), given as (first, size)."""
    target, op = graph.of(Attend)[at]
    rows = {"q": changes.pop("q", None), "k": changes.pop("k", None)}

    def visit(builder, node, args):
        if node.id != target.id:
            return None
        taken = []
        for arg, name in zip(args, "qkk", strict=True):
            old = builder.type(arg).rows
            first, size = rows[name] or (old.row, old.length)
            new = RowMap(old.head, first, (*old.batch, attrs.evolve(old.axes[-1], size=size)))
            taken.append(arg if new == old else builder.add(Take(new), builder.source(arg)))
        return builder.add(attrs.evolve(op, **changes), *taken)

    return replaced(graph, visit)


def without(graph, at):
    return replaced(
        graph,
        lambda b, n, args: b.add(n.op, *args[:at], *args[at + 1 :]) if isinstance(n.op, Merge) else None,
    )


MUTATIONS = {
    "gap of one key": (BIG, lambda g: change(g, 0, k=(0, 63))),
    "overlap of one key": (BIG, lambda g: change(g, 0, k=(0, 65))),
    "keys one off": (BIG, lambda g: change(g, 0, k=(1, 64))),
    "gap of one row": (BIG, lambda g: change(g, 2, q=(65, N - 65))),
    "overlap of one row": (BIG, lambda g: change(g, 1, q=(0, 65))),
    "global rows see global keys twice": (BIG, lambda g: change(g, 1, k=(0, N))),
    "window over all keys": (BIG, lambda g: change(g, 2, k=(0, N))),
    "wider window": (BIG, lambda g: change(g, 2, where=P.window(513))),
    "lopsided window": (BIG, lambda g: change(g, 2, where=P.window(512, 511))),
    "no window": (BIG, lambda g: change(g, 2, where=P.full())),
    "dropped part": (BIG, lambda g: without(g, 1)),
    "dropped window": (BIG, lambda g: without(g, 2)),
    "global tokens in the window": (BIG, lambda g: change(g, 2, where=P.window(512) | P.global_tokens(65))),
    "window counted twice": (BESIDE, lambda g: change(g, 0, where=P.causal())),
    "band off by one": (BESIDE, lambda g: change(g, 0, where=P.band(None, -4))),
    "gap beside the window": (BESIDE, lambda g: change(g, 0, where=P.band(None, -9))),
    "complement of another window": (BESIDE, lambda g: change(g, 0, where=P.causal() & ~P.window(3))),
    "shift": (BESIDE, lambda g: change(g, 0, shift=2)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_at_full_size_is_caught(name):
    spec, mutate = MUTATIONS[name]
    graph = decomposed(spec)
    prove(spec, graph)
    with pytest.raises((VerifyError, PassError)):
        prove(spec, mutate(graph))


def test_another_spelling_of_the_same_pairs_is_proved():
    graph = decomposed(BESIDE)
    prove(BESIDE, change(graph, 0, where=P.causal() & ~P.window(5)))
    prove(BESIDE, change(graph, 0, where=P.band(None, -8)))  # every fourth row: the same pairs as from -6 on
    prove(BESIDE, change(graph, 0, where=~P.band(5, None)))
    prove(BIG, change(decomposed(BIG), 2, where=(P.window(512) | P.global_tokens(64)) & ~P.sinks(64)))


def test_a_pass_that_forgets_to_subtract_is_named(monkeypatch):
    monkeypatch.setattr(module, "_ends", lambda where: iter((9,)))
    monkeypatch.setattr(module, "_status", lambda atom, box: True if isinstance(atom, type(P.sinks(1))) else None)
    spec = spec_of(P.window(4) | P.sinks(3))
    with pytest.raises(VerifyError, match="pass decompose does not compute exactly"):
        decomposed(spec)


@pytest.mark.timing
def test_a_union_over_a_million_tokens_is_planned_and_proved_within_50_ms():
    spec = spec_of(P.window(512) | P.global_tokens(64) | P.dilated(8192, 8, offset="interleave"), N, 32)
    decomposed(spec)
    times = []
    for _ in range(5):
        start = time.process_time()
        decomposed(spec)
        times.append(time.process_time() - start)
    assert min(times) < 0.05


def test_the_strategy_decomposes_before_segments_are_taken_apart():
    passes = [type(p) for p in STRATEGIES["decompose"].passes]
    assert passes[:2] == [Canonicalize, SplitHeads]
    assert passes.index(Decompose) < passes.index(Lattice) < passes.index(FuseMerge)
