"""Attends over runs of rows: fewer kernel calls at a zigzag hop, with the same pairs and the same numbers."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.errors import PassError, VerifyError
from attnplan.ir import Attend, Axis, Builder, Graph, Input, Merge, Output, RowMap, Take, parse_graph
from attnplan.ir.buffers import Buffer
from attnplan.ir.coverage import attend_coverage
from attnplan.ir.slots import slot_band, slot_condition
from attnplan.passes.ring_cut import Part
from attnplan.passes.ring_runs import in_runs
from attnplan.ring import check_ring, programs
from attnplan.ring.program import RankProgram
from attnplan.runtime.interpreter import interpret


def rows(start: int, count: int = 4, step: int = 1) -> RowMap:
    return RowMap(0, start, (Axis(2, head=1), Axis(count, row=step)))


LOW, HIGH = rows(0), rows(12)
TRIANGLE = [(LOW, LOW), (HIGH, LOW), (HIGH, HIGH)]


def parts(pairs: list[tuple[RowMap, RowMap]], where: P.Pattern, **options: Any) -> list[Part]:
    return [Part(Attend(where=where, **options), *pair) for pair in pairs]


def joined(pairs: list[tuple[RowMap, RowMap]], where: P.Pattern, held: tuple[RowMap, ...], **options: Any) -> list[str]:
    """What each attend that is left is in terms of slots, with the numbers of its queries and keys."""
    found = in_runs(parts(pairs, where, **options), Buffer(held), Buffer(held))
    assert all(one.q is not None and one.k is not None for one in found)
    return [
        f"{slot_condition(attrs.evolve(one.op, at=(one.queries, one.keys)), one.q, one.k)} "  # type: ignore[arg-type]
        f"{one.q.length}x{one.k.length}"  # type: ignore[union-attr]
        for one in found
    ]


@pytest.mark.parametrize(
    ("pairs", "where", "wanted"),
    [
        (TRIANGLE, P.causal(), ["causal 8x8"]),
        (TRIANGLE, P.window(11, 0), ["causal 4x4", "mask 4x4", "causal 4x4"]),
        ([(LOW, LOW), (HIGH, LOW)], P.full(), ["full 8x4"]),
        ([(HIGH, LOW), (HIGH, HIGH)], P.full(), ["full 4x8"]),
        ([(q, k) for q in (LOW, HIGH) for k in (LOW, HIGH)], P.full(), ["full 8x8"]),
        (TRIANGLE, P.full(), ["full 4x8", "full 4x4"]),  # pairs of a slot above the diagonal would be new
        (TRIANGLE[::2], P.causal(), ["causal 4x4", "causal 4x4"]),  # without the block below it
        (TRIANGLE, P.causal() & P.documents([10, 6]), ["mask 4x4"] * 3),
    ],
)
def test_neighbours_are_joined_where_no_mask_is_needed(
    pairs: list[tuple[RowMap, RowMap]], where: P.Pattern, wanted: list[str]
) -> None:
    got = joined(pairs, where, (LOW, HIGH))
    assert sorted(got) == sorted(wanted)


def test_what_does_not_lie_side_by_side_or_draws_at_positions_stays_apart() -> None:
    assert len(joined(TRIANGLE, P.causal(), (LOW, rows(4), HIGH))) == 3
    assert len(joined(TRIANGLE, P.causal(), (HIGH, LOW))) == 3  # in slots the later run comes first: no triangle
    assert len(joined(TRIANGLE, P.causal(), (LOW, HIGH), dropout=0.1)) == 3
    assert len(joined([(LOW, LOW), (HIGH, LOW)], P.full(), (LOW, HIGH), biases=("alibi_slopes",))) == 2


def test_a_diagonal_of_unequal_runs_is_no_causal_square() -> None:
    short = rows(12, 3)
    pairs = [(LOW, LOW), (short, LOW), (short, short)]
    assert joined(pairs, P.causal(), (LOW, short)) == ["causal 7x7"]
    op = attrs.evolve(Attend(where=P.causal()), at=((LOW, short), (rows(0, 3), HIGH)))
    assert slot_condition(op, rows(0, 7), rows(0, 7)) == "mask"
    assert slot_band(op, rows(0, 7), rows(0, 7)) is None
    over = attrs.evolve(op, at=((LOW, rows(3)), (LOW, rows(3))))  # a row of the first run meets the other
    assert slot_condition(over, rows(0, 8), rows(0, 8)) == "mask"


def graph_of(at: Any, q_rows: int = 8, k_rows: int = 8) -> Graph:
    builder = Builder()
    inputs = [builder.add(Input(t, 2, 1, n, 8, "float64")) for t, n in (("q", q_rows), ("k", k_rows), ("v", k_rows))]
    return builder.build(builder.add(Output(), builder.add(Attend(where=P.causal(), scale=0.3, at=at), *inputs)))


def test_runs_are_text_have_the_pairs_of_their_pieces_and_mask_at_their_positions() -> None:
    graph = graph_of(((LOW, HIGH), (LOW, HIGH)))
    assert parse_graph(str(graph)) == graph
    node, op = graph.of(Attend)[0]
    q, k = (n.type.rows for n in graph.args(node)[:2])
    apart = [attend_coverage(Attend(where=P.causal(), scale=0.3), *pair) for pair in TRIANGLE]
    total: dict[Any, tuple[int, ...]] = {}
    for one in apart:
        for term, values in one.items():
            total[term] = tuple((a + b) % (2**61 - 1) for a, b in zip(total.get(term, (0, 0)), values, strict=True))
    assert attend_coverage(op, q, k) == total
    with pytest.raises(PassError, match="stands at runs of rows"):
        op.positions(q, k)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=generator) for _ in range(3)]
    out, _ = interpret(graph, *tensors, shape=AttentionSpec(seq_len=16, heads=2, head_dim=8).shape)
    scores = 0.3 * tensors[0] @ tensors[1].mT
    at = torch.tensor([*range(4), *range(12, 16)])
    weights = scores.masked_fill(at[:, None] < at, -torch.inf).softmax(-1)
    assert torch.allclose(out, weights @ tensors[2], atol=1e-12)


@pytest.mark.parametrize(
    ("at", "match"),
    [
        (((LOW, rows(12, 3)), (LOW, HIGH)), r"q has sizes \(2, 8\), and stands at \(2, 7\)"),
        (((LOW, attrs.evolve(HIGH, head=1)), (LOW, HIGH)), "the runs of q differ in heads"),
        (((LOW, HIGH), ()), "k has sizes"),
    ],
)
def test_runs_that_fit_no_operand_are_refused(at: Any, match: str) -> None:
    with pytest.raises(PassError, match=match):
        graph_of(at)


def attends(program: RankProgram) -> list[int]:
    return [sum(len(g.of(Attend)) for g in hop.graphs if g is not None) for hop in program.hops]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_a_zigzag_hop_is_one_attend_whose_conditions_need_no_mask(ranks: int) -> None:
    spec = AttentionSpec(seq_len=16 * ranks, heads=4, kv_heads=2, head_dim=8, causal=True)
    made = programs(spec, ranks, "zigzag", "ring")
    for program in made:
        assert attends(program) == [1] * ranks
        own = program.hops[0].graphs[0]
        assert own is not None
        assert not own.of(Take)
        assert not own.of(Merge)
    check_ring(made, spec)
    gathered = programs(spec, ranks, "zigzag", "rows")
    assert max(sum(attends(p)) for p in gathered) <= 3
    check_ring(gathered, spec)


def test_a_proof_sees_runs_that_are_swapped_or_moved() -> None:
    spec = AttentionSpec(seq_len=64, heads=2, head_dim=8, causal=True)
    made = list(programs(spec, 4, "zigzag", "ring"))
    hop = made[1].hops[3]
    graph = hop.graphs[0]
    assert graph is not None
    ((_, op),) = graph.of(Attend)
    at_q, at_k = op.at  # type: ignore[misc]
    assert isinstance(at_k, tuple)
    later = attrs.evolve(at_k[1], row=at_k[1].row + 1)
    for wrong, match in ((at_k[::-1], "reads other key rows"), ((at_k[0], later), "reads other key rows")):
        builder = Builder()
        ids: dict[int, int] = {}
        for node in graph:
            changed = attrs.evolve(node.op, at=(at_q, wrong)) if isinstance(node.op, Attend) else node.op
            ids[node.id] = builder.add(changed, *(ids[a] for a in node.args))
        bad = attrs.evolve(hop, graphs=(builder.build(ids[graph.output.id]),))
        ranks = [*made]
        ranks[1] = attrs.evolve(made[1], hops=(*made[1].hops[:3], bad))
        with pytest.raises(VerifyError, match=match):
            check_ring(ranks, spec)


@pytest.mark.parametrize("length", [48, 47, 41])
@pytest.mark.parametrize("transport", ["ring", "rows"])
def test_numbers_over_runs_are_those_of_the_whole(transport: str, length: int) -> None:
    import attnplan

    spec = AttentionSpec(
        seq_len=length, heads=4, kv_heads=2, head_dim=8, causal=True, dtype="float64", ring_size=3, training=True
    )
    plan = attnplan.compile(spec, device="cpu", strategy=f"zigzag > {transport}")
    generator = torch.Generator().manual_seed(length)
    whole = [torch.randn(1, h, length, 8, dtype=torch.float64, generator=generator) for h in (4, 2, 2, 4)]
    grad, given = whole[3], [x.clone().requires_grad_() for x in whole[:3]]
    want_in = [x.clone().requires_grad_() for x in whole[:3]]
    got = plan(*given)
    k, v = (x.repeat_interleave(2, 1) for x in want_in[1:])
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    want = (want_in[0] @ k.mT * spec.softmax_scale).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    found = [got, *torch.autograd.grad(got, given, grad)]
    for a, b in zip([want, *torch.autograd.grad(want, want_in, grad)], found, strict=True):
        assert ((a - b).norm() / a.norm()).item() < 1e-12
