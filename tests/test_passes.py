from __future__ import annotations

from typing import ClassVar

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnplan import patterns as P
from attnplan.errors import PassError, SpecError, VerifyError
from attnplan.ir import Attend, Graph, Input, Merge, Mix, Output, parse_graph, print_graph, rewrite
from attnplan.ir.coverage import spec_coverage
from attnplan.lower import lower
from attnplan.passes import PASSES as PASSES_BY_NAME
from attnplan.passes import Canonicalize, FuseMerge, Lattice, Pass, Pipeline, SplitHeads
from attnplan.runtime.interpreter import interpret
from attnplan.spec import AttentionSpec, Dim
from tests import oracle
from tests import strategies as some
from tests.programs import PASSES, planned, stages

SPECS = {
    "plain-causal": AttentionSpec(seq_len=8, heads=2, head_dim=4, causal=True),
    "longnet-ragged-gqa": AttentionSpec(
        seq_len=23, heads=6, kv_heads=2, head_dim=4, pattern=P.longnet([8, 16], [1, 3]), causal=True
    ),
    "longnet-more-keys-detached": AttentionSpec(
        seq_len=9, kv_len=20, heads=4, head_dim=4, pattern=P.longnet([8, 32], [2, 4], mix="lse-detached"),
    ),
    "grouped-mean": AttentionSpec(seq_len=13, heads=5, head_dim=4, pattern=P.grouped([4, 8], [1, 2], mix="mean")),
    "grouped-few-heads": AttentionSpec(seq_len=8, heads=2, head_dim=4, pattern=P.grouped([4, 8, 8], [1, 2, 4])),
    "segments-window-documents": AttentionSpec(
        seq_len=20, heads=2, head_dim=4, pattern=P.segments(8) & P.window(3) & P.documents()
    ),
    "dilated-longer-than-n": AttentionSpec(seq_len=10, heads=6, head_dim=4, pattern=P.dilated(64, 4, "interleave")),
    "grouped-few-heads-runtime-offset": AttentionSpec(
        seq_len=4, kv_len=16, heads=1, head_dim=4, pattern=P.grouped([4, 8], [1, 2]), q_offset=True
    ),
    "union-of-heads": AttentionSpec(
        seq_len=16, heads=4, head_dim=4, pattern=P.heads(0, 3) & P.window(2) | P.heads(3, 4), causal=True
    ),
    "runtime-offset": AttentionSpec(
        seq_len=4, kv_len=16, heads=2, head_dim=4, pattern=P.segments(8) & P.full() & P.segments(8), q_offset=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_every_stage_prints_as_reviewed(name, golden):
    texts, before = [], None
    for stage, graph in stages(SPECS[name]):
        texts.append(f"# {stage} changes nothing\n" if graph is before else f"# {stage}\n{print_graph(graph)}")
        before = graph
    golden(name, "\n".join(texts))


def assert_same(got, want, what):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=lambda text: f"{what}: {text}")


def gradients(out, lse, inputs, upstream):
    """Differentiate a random weighting of the output and of the finite log-sum-exps."""
    loss = (out * upstream[0]).sum()
    if lse is not None:
        loss = loss + (torch.where(lse.isfinite(), lse, 0) * upstream[1]).sum()
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


@given(st.data())
def test_every_pass_keeps_coverage_output_lse_and_gradients(data):
    spec = data.draw(some.specs(masks=True))
    values = data.draw(some.operands(spec))
    inputs = oracle.sample_inputs(spec, batch=spec.batch, seed=data.draw(st.integers(0, 9)))
    out, lse = oracle.dense(spec, *inputs, values)
    upstream = torch.randn_like(out), torch.randn_like(out[..., 0])
    grads = gradients(out, lse, inputs, upstream)
    for stage, graph in stages(spec):
        got, got_lse = interpret(graph, *inputs, values)
        assert_same(got, out, f"output after {stage}")
        assert (got_lse is None) == (lse is None) == (not spec.has_lse)
        if lse is not None:
            assert_same(got_lse, lse, f"LSE after {stage}")
        for name, a, b in zip("qkv", gradients(got, got_lse, inputs, upstream), grads, strict=True):
            assert_same(a, b, f"gradient of {name} after {stage}")


@pytest.mark.parametrize("name", SPECS)
def test_the_reviewed_programs_compute_their_specs(name):
    spec = SPECS[name]
    values = {"documents": torch.tensor([0, 5, 5, 13, 20]), "q_offset": 7}
    inputs = oracle.sample_inputs(spec, batch=2)
    out, _ = oracle.dense(spec, *inputs, values)
    for stage, graph in stages(spec):
        assert_same(interpret(graph, *inputs, values)[0], out, stage)


@given(some.specs())
def test_a_pass_that_changes_nothing_returns_the_same_object(spec):
    graph = lower(spec)
    for step in PASSES:
        new = step(graph)
        assert (new is graph) == (new == graph)
        assert step(new) is new, f"{step.name} is not idempotent"
        graph = new


@given(some.specs(), st.permutations(PASSES[:-1]))
def test_rewrites_of_attends_keep_coverage_in_any_order(spec, passes):
    Pipeline((*passes, FuseMerge())).run(lower(spec), spec_coverage(spec))


@given(some.ladders(), st.integers(20, 60), st.sampled_from([(6, 6), (6, 2), (5, 1)]), st.booleans())
def test_a_planned_longnet_is_dense_attention_over_strided_rows(ladder, length, heads, causal):
    spec = AttentionSpec(
        seq_len=length, heads=heads[0], kv_heads=heads[1], head_dim=4, pattern=P.longnet(**ladder), causal=causal
    )
    assert {op.where for _, op in planned(spec).of(Attend)} == {P.causal() if causal else P.full()}


def wheres(graph):
    return [repr(op.where) for _, op in graph.of(Attend)]


@pytest.mark.parametrize(
    ("pattern", "causal", "simplest"),
    [
        ("full() & full()", False, "full()"),
        ("window(3) & full() & window(3)", False, "window(3)"),
        ("window(3)", True, "window(3, 0)"),
        ("window(3, 1) & window(2, 5)", False, "window(2, 1)"),
        ("window(15)", False, "full()"),
        ("window(14)", False, "window(14)"),
        ("window(40)", True, "causal()"),
        ("segments(16)", True, "causal()"),
        ("segments(15)", False, "segments(15)"),
        ("segments(8) & segments(4)", False, "segments(4)"),
        ("segments(6) & segments(4)", False, "segments(4) & segments(6)"),
        ("dilated(8, 2) & segments(4)", False, "dilated(4, 2)"),
        ("dilated(4, 2) & segments(8)", False, "dilated(4, 2)"),
        ("dilated(4, 2) & segments(6)", False, "dilated(4, 2) & segments(6)"),
        ("dilated(8, 2, offset=1) & dilated(8, 2)", False, "dilated(8, 2, offset=1) & dilated(8, 2)"),
        ("dilated(64, 4, offset=3)", False, "dilated(16, 4, offset=3)"),
        ("dilated(64, 20, offset=3)", False, "dilated(20, 20, offset=3)"),
        ("heads(0, 4)", False, "full()"),
        ("heads(0, 3) & heads(1, 4)", False, "heads(1, 3)"),
        ("heads(0, 1) & heads(3, 4)", False, "heads(3, 3)"),
        ("sinks(2) & causal() & sinks(2)", False, "causal() & sinks(2)"),
        ("~causal() | sinks(1)", True, "causal() & (~causal() | sinks(1))"),
    ],
)
def test_canonicalize_finds_the_simplest_spelling(pattern, causal, simplest):
    spec = AttentionSpec(seq_len=16, heads=4, head_dim=4, pattern=pattern, causal=causal)
    (graph,) = (g for name, g in stages(spec, (Canonicalize(),)) if name == "canonicalize")
    assert wheres(graph) == [simplest]


def test_canonicalize_keeps_segments_where_queries_come_before_the_first_key():
    spec = AttentionSpec(seq_len=16, kv_len=8, heads=1, head_dim=4, pattern="segments(64) & window(6, 14)")
    (graph,) = (g for name, g in stages(spec, (Canonicalize(),)) if name == "canonicalize")
    assert wheres(graph) == ["segments(64) & window(6, 14)"]
    wider = attrs.evolve(spec, pattern=P.parse("window(7, 15)"))
    assert wheres(planned(wider)) == ["full()"]


def test_canonicalize_writes_the_lse_mix_as_a_merge_and_keeps_the_others():
    for rule, kind in (("lse", Merge), ("lse-detached", Mix), ("mean", Mix), ("sum", Mix)):
        graph = planned(AttentionSpec(seq_len=16, heads=2, head_dim=4, pattern=P.longnet([4, 8], [1, 2], mix=rule)))
        assert [n.op.name for n, _ in (*graph.of(Merge), *graph.of(Mix))] == [kind.name]


def test_a_mixture_of_one_branch_is_an_attend():
    graph = planned(AttentionSpec(seq_len=16, heads=2, head_dim=4, pattern=P.longnet([16], [1]), causal=True))
    assert [n.op.name for n in graph] == ["input", "input", "input", "attend", "output"]


def test_split_heads_makes_one_family_of_interleaved_offsets():
    spec = AttentionSpec(seq_len=32, heads=8, head_dim=4, pattern=P.dilated(16, 4, "interleave"))
    (graph,) = (g for name, g in stages(spec, (SplitHeads(),)) if name == "split-heads")
    assert [n.type.rows.sizes for n, _ in graph.of(Attend)] == [(2, 4, 32)]


def test_split_heads_keeps_heads_of_one_offset_together():
    spec = AttentionSpec(seq_len=32, heads=8, head_dim=4, pattern=P.dilated(16, 2, "block"))
    (graph,) = (g for name, g in stages(spec, (SplitHeads(),)) if name == "split-heads")
    assert [n.type.rows.sizes for n, _ in graph.of(Attend)] == [(2, 4, 32)]


def test_lattice_keeps_whole_segments_in_one_launch_and_cuts_the_tail():
    spec = AttentionSpec(seq_len=70, heads=2, head_dim=4, pattern=P.dilated(16, 3, 1))
    assert [n.type.rows.sizes for n, _ in planned(spec).of(Attend)] == [(2, 4, 5), (2, 2)]


def test_lowering_a_dim_counts_its_maximum():
    spec = AttentionSpec(seq_len=Dim("s", max=12), heads=2, head_dim=4, causal=True)
    assert lower(spec) == lower(spec.at(12, 12))


# The pipeline


def test_steps_record_every_pass_in_order():
    spec = SPECS["longnet-ragged-gqa"]
    graph = lower(spec)
    final, steps = Pipeline(PASSES).run(graph, spec_coverage(spec))
    assert [s.name for s in steps] == ["canonicalize", "split-heads", "lattice", "fuse-merge"]
    assert [s.before for s in steps] == [len(graph), *(s.after for s in steps[:-1])]
    assert [s.after for s in steps] == [len(s.graph) for s in steps]
    assert steps[-1].graph is final
    assert all(s.seconds > 0 for s in steps)


def test_a_pass_is_known_by_its_name():
    assert {name: kind.name for name, kind in PASSES_BY_NAME.items()} == {n: n for n in PASSES_BY_NAME}
    assert {p.name for p in PASSES} <= set(PASSES_BY_NAME)


@attrs.frozen
class DropCausality(Pass):
    name: ClassVar[str] = "drop-causality"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite(graph, self.visit)

    def visit(self, builder, node, args):
        return builder.add(attrs.evolve(node.op, where=P.full()), *args) if isinstance(node.op, Attend) else None


@attrs.frozen
class WidenInputs(DropCausality):
    name: ClassVar[str] = "widen-inputs"

    def visit(self, builder, node, args):
        return builder.add(attrs.evolve(node.op, dtype="float64")) if isinstance(node.op, Input) else None


@attrs.frozen
class DoubleOutput(DropCausality):
    name: ClassVar[str] = "double-output"

    def visit(self, builder, node, args):
        return builder.add(Output(), builder.add(node.op, *args)) if isinstance(node.op, Output) else None


@attrs.frozen
class Fails(DropCausality):
    name: ClassVar[str] = "fails"

    def visit(self, builder, node, args):
        raise SpecError("no way")


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (DropCausality(), VerifyError, "pass drop-causality does not compute exactly the .* pairs of the spec"),
        (WidenInputs(), VerifyError, "pass widen-inputs takes inputs that are not those of the spec"),
        (DoubleOutput(), PassError, "pass double-output: a graph has one output, and it is the last"),
        (Fails(), PassError, "pass fails: no way"),
    ],
)
def test_a_faulty_pass_is_named(bad, kind, message):
    spec = SPECS["plain-causal"]
    with pytest.raises(kind, match=message):
        Pipeline((Canonicalize(), bad, FuseMerge())).run(lower(spec), spec_coverage(spec))


def test_lowering_is_proved_too():
    spec = SPECS["plain-causal"]
    with pytest.raises(VerifyError, match="lowering does not compute exactly"):
        Pipeline(()).run(lower(attrs.evolve(spec, causal=False)), spec_coverage(spec))


def test_a_lattice_alone_leaves_grouped_heads_of_unlike_offsets_alone():
    spec = AttentionSpec(seq_len=16, heads=4, kv_heads=2, head_dim=4, pattern=P.dilated(8, 4, "interleave"))
    graph = lower(spec)
    assert Pipeline((Lattice(),)).run(graph, spec_coverage(spec))[0] is graph


def test_golden_texts_read_back():
    for spec in SPECS.values():
        for _, graph in stages(spec):
            assert parse_graph(print_graph(graph)) == graph
