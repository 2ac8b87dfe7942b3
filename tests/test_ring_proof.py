"""The proof of a ring: every pattern, layout and transport passes, and every planted fault is caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.errors import RingError, VerifyError
from attnplan.ir import Attend, Axis, Graph, Input, RowMap, rewrite
from attnplan.patterns import Mixture, Pattern
from attnplan.patterns.base import conjuncts
from attnplan.ring import LAYOUTS, TRANSPORTS, check_ring, programs
from attnplan.ring.program import Exchange, Hop, RankProgram
from attnplan.ring.proof import first_missing, rows_by_head

Programs = tuple[RankProgram, ...]
LONGNET: dict[str, Any] = {"segment_lengths": [8, 16, 32], "dilation_rates": [1, 2, 4]}
PATTERNS: dict[str, tuple[Pattern | Mixture, bool]] = {
    "causal": (P.full(), True),
    "full": (P.full(), False),
    "window": (P.window(5), True),
    "longnet": (P.longnet(**LONGNET), True),
    "longnet mean": (P.longnet(**LONGNET, mix="mean"), True),
    "longnet detached": (P.longnet(**LONGNET, mix="lse-detached"), False),
    "longnet block": (P.longnet(**LONGNET, offset="block"), False),
    "grouped": (P.grouped(segment_lengths=[8, 32], dilation_rates=[1, 2]), False),
    "documents": (P.documents([5, 9, 20, 29]), True),
    "documents of the call": (P.documents(), True),
    "padding of the call": (P.padding() & P.window(9), True),
    "sinks": (P.sinks(3) | P.window(4), True),
    "global tokens": (P.global_tokens([3, 40]) | P.window(3), False),
    "random blocks": (P.random_blocks(0.3, 8, 1), True),
    "window or dilated": (P.window(4) | P.dilated(32, 4), True),
    "strided": (P.strided(8), True),
    "neighborhood": (P.neighborhood((3, 3), 1, (7, 9)), False),
    "function": (P.mask(lambda h, q, k: (q + k) % 5 == 0), True),
    "heads": ((P.heads(0, 2) & P.window(4)) | P.heads(2, 4), True),
}


def spec_of(name: str, kv_heads: int = 2, length: int = 63) -> AttentionSpec:
    pattern, causal = PATTERNS[name]
    return AttentionSpec(seq_len=length, heads=4, kv_heads=kv_heads, head_dim=8, pattern=pattern, causal=causal)


def ranks_of(transport: str, ranks: int) -> int | tuple[int, int]:
    return (ranks // 2, 2) if transport == "hybrid" else ranks


@pytest.mark.parametrize(
    "name",
    ["causal", "longnet", "longnet mean", "documents of the call", "sinks", "random blocks", "window or dilated"],
)
def test_every_ring_that_is_planned_is_proved(name: str) -> None:
    spec, proved = spec_of(name), set()
    for layout in LAYOUTS:
        for transport in TRANSPORTS:
            try:
                found = programs(spec, ranks_of(transport, 4), layout, transport)
            except RingError:
                continue
            check_ring(found, spec)
            proved.add(transport)
    assert {"ring", "all-gather", "rows", "ulysses", "hybrid"} <= proved


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", PATTERNS)
def test_every_ring_of_any_number_of_ranks_is_proved(name: str, kv_heads: int, ranks: int) -> None:
    spec = spec_of(name, kv_heads)
    for layout in LAYOUTS:
        for transport in TRANSPORTS:
            try:
                found = programs(spec, ranks_of(transport, ranks), layout, transport)
            except RingError:
                continue
            check_ring(found, spec)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("length", "kv_len"), [(5, 5), (17, 41), (1, 30)])
def test_short_and_unlike_lengths_are_proved(layout: str, length: int, kv_len: int) -> None:
    spec = AttentionSpec(seq_len=length, kv_len=kv_len, heads=4, head_dim=8, pattern=P.window(6), causal=True)
    for transport in ("ring", "all-gather", "rows", "ulysses"):
        check_ring(programs(spec, 4, layout, transport), spec)


def test_a_ring_of_many_ranks_is_proved() -> None:
    spec = AttentionSpec(seq_len=1 << 20, heads=8, head_dim=64, pattern=P.longnet([4096, 65536, 1 << 20], [1, 16, 256]))
    check_ring(programs(spec, 16, "contiguous", "rows"), spec)


def with_rank(found: Programs, rank: int, **changes: Any) -> Programs:
    return tuple(attrs.evolve(p, **changes) if p.rank == rank else p for p in found)


def with_hop(found: Programs, rank: int, index: int, **changes: Any) -> Programs:
    hops = tuple(attrs.evolve(h, **changes) if h.index == index else h for h in found[rank].hops)
    return with_rank(found, rank, hops=hops)


def hop_of(found: Programs, rank: int, index: int) -> Hop:
    return next(h for h in found[rank].hops if h.index == index)


def with_attends(graph: Graph | None, change: Callable[[Attend], Attend]) -> Graph:
    assert graph is not None

    def visit(builder: Any, node: Any, args: tuple[int, ...]) -> int | None:
        return builder.add(change(node.op), *args) if isinstance(node.op, Attend) else None

    return rewrite(graph, visit)


def changed(found: Programs, rank: int, index: int, change: Callable[[Attend], Attend]) -> Programs:
    graphs = tuple(with_attends(g, change) for g in hop_of(found, rank, index).graphs)
    return with_hop(found, rank, index, graphs=graphs)


def moved(op: Attend, side: int, rows: int) -> Attend:
    assert op.at is not None
    at = tuple(attrs.evolve(m, row=m.row + rows * (i == side)) for i, m in enumerate(op.at))
    return attrs.evolve(op, at=at)


def without_documents(op: Attend) -> Attend:
    kept = [c for c in conjuncts(op.where) if "documents" not in repr(c)]
    return attrs.evolve(op, where=kept[0] if kept else P.full())


def of(name: str, layout: str, transport: str, ranks: int | tuple[int, int] = 4) -> tuple[Programs, AttentionSpec]:
    spec = spec_of(name)
    found = programs(spec, ranks, layout, transport)
    check_ring(found, spec)
    return found, spec


def lookback_without_one() -> tuple[Programs, AttentionSpec]:
    found, spec = of("window", "contiguous", "ring")
    return with_rank(found, 2, hops=found[2].hops[:1]), spec


def striped_equal() -> tuple[Programs, AttentionSpec]:
    found, spec = of("causal", "striped", "ring")
    # rank 0 meets keys of rank 1 that lie before it only; ">=" lets its slot i meet slot i of rank 1, a row behind it
    return changed(found, 0, 3, lambda op: attrs.evolve(op, where=P.band(None, 1))), spec


def document_boundary_ignored() -> tuple[Programs, AttentionSpec]:
    found, spec = of("documents of the call", "contiguous", "ring")
    return changed(found, 2, 1, without_documents), spec


def known_boundary_ignored() -> tuple[Programs, AttentionSpec]:
    spec = AttentionSpec(seq_len=63, heads=4, head_dim=8, pattern=P.documents([3] * 21), causal=True)
    found = programs(spec, 4, "contiguous", "ring")
    check_ring(found, spec)
    return changed(found, 2, 0, without_documents), spec


def dropped_hop() -> tuple[Programs, AttentionSpec]:
    found, spec = of("causal", "zigzag", "ring")
    return with_hop(found, 1, 2, graphs=(None,)), spec


def doubled_hop() -> tuple[Programs, AttentionSpec]:
    found, spec = of("causal", "zigzag", "ring")
    again = attrs.evolve(found[1].hops[0], index=9)
    return with_rank(found, 1, hops=(*found[1].hops, again)), spec


def rows_of_a_wrong_rank() -> tuple[Programs, AttentionSpec]:
    found, spec = of("causal", "contiguous", "ring")
    hop = hop_of(found, 3, 1)
    assert hop.store is not None
    return with_hop(found, 3, 1, store=tuple(attrs.evolve(m, row=m.row - 16) for m in hop.store)), spec


def stands_elsewhere() -> tuple[Programs, AttentionSpec]:
    found, spec = of("causal", "contiguous", "ring")
    return changed(found, 3, 1, lambda op: moved(op, 1, -1)), spec


def queries_stand_elsewhere() -> tuple[Programs, AttentionSpec]:
    found, spec = of("full", "contiguous", "ring")
    return changed(found, 3, 1, lambda op: moved(op, 0, -1)), spec


def stands_nowhere() -> tuple[Programs, AttentionSpec]:
    found, spec = of("full", "contiguous", "ring")
    return changed(found, 0, 0, lambda op: attrs.evolve(op, at=None)), spec


def exchanged(found: Programs, rank: int, index: int, change: Callable[[Exchange], Exchange]) -> Programs:
    exchange = hop_of(found, rank, index).exchange
    assert exchange is not None
    return with_hop(found, rank, index, exchange=change(exchange))


def other_order() -> tuple[Programs, AttentionSpec]:
    found, spec = of("causal", "zigzag", "ring")
    return exchanged(
        found, 0, 1, lambda e: attrs.evolve(e, receives={p: maps[::-1] for p, maps in e.receives.items()})
    ), spec


def message_lost() -> tuple[Programs, AttentionSpec]:
    found, spec = of("window", "contiguous", "halo")
    return exchanged(found, 1, 1, lambda e: attrs.evolve(e, receives={})), spec


def message_to_nobody() -> tuple[Programs, AttentionSpec]:
    found, spec = of("window", "contiguous", "halo")
    return exchanged(found, 1, 1, lambda e: attrs.evolve(e, sends={**e.sends, 3: next(iter(e.sends.values()))})), spec


def sends_what_it_has_not() -> tuple[Programs, AttentionSpec]:
    found, spec = of("window", "contiguous", "halo")
    shift = {m: attrs.evolve(m, row=m.row - 16) for p in found for h in p.hops for m in h.store or ()}

    def elsewhere(e: Exchange) -> Exchange:
        return attrs.evolve(
            e,
            sends={p: tuple(shift.get(m, m) for m in maps) for p, maps in e.sends.items()},
            receives={p: tuple(shift.get(m, m) for m in maps) for p, maps in e.receives.items()},
        )

    for rank in range(4):
        hop = hop_of(found, rank, 1)
        if hop.exchange is not None:
            store = None if hop.store is None else tuple(shift.get(m, m) for m in hop.store)
            found = with_hop(found, rank, 1, exchange=elsewhere(hop.exchange), store=store, graphs=(None,))
    return found, spec


def shards_overlap() -> tuple[Programs, AttentionSpec]:
    found, spec = of("causal", "contiguous", "rows")
    return with_rank(found, 1, keys=found[0].keys), spec


def wrong_queries() -> tuple[Programs, AttentionSpec]:
    found, spec = of("causal", "contiguous", "rows")
    return with_rank(found, 1, queries=found[2].queries), spec


def heads_of_a_peer() -> tuple[Programs, AttentionSpec]:
    found, spec = of("causal", "contiguous", "ulysses", 2)
    shifted = tuple(attrs.evolve(m, head=0) for m in found[1].queries)
    return with_rank(found, 1, queries=shifted), spec


def output_not_sent_home() -> tuple[Programs, AttentionSpec]:
    found, spec = of("causal", "contiguous", "ulysses", 2)
    last = found[0].last
    assert last is not None
    return with_rank(found, 0, last=attrs.evolve(last, sends={})), spec


def false_claim() -> tuple[Programs, AttentionSpec]:
    """A hop with opaque conditions is dropped, and said to hold no pair."""
    found, spec = of("random blocks", "contiguous", "rows")
    hop = hop_of(found, 3, 1)
    claims = [(node.op, *node.op.at) for g in hop.graphs if g for node, _ in g.of(Attend)]  # type: ignore[attr-defined]
    found = with_hop(found, 3, 1, graphs=(None,))
    return with_rank(found, 3, empty=(*found[3].empty, *claims)), spec


def forgotten_claim() -> tuple[Programs, AttentionSpec]:
    found, spec = of("random blocks", "contiguous", "rows")
    assert found[3].empty
    return with_rank(found, 3, empty=found[3].empty[1:]), spec


def lost_branch() -> tuple[Programs, AttentionSpec]:
    found, spec = of("longnet mean", "contiguous", "rows")
    cut = tuple(
        attrs.evolve(
            p, softmaxes=p.softmaxes[:-1], hops=tuple(attrs.evolve(h, graphs=h.graphs[:-1]) for h in p.hops)
        )
        for p in found
    )  # fmt: skip
    return cut, spec


def swapped_branches() -> tuple[Programs, AttentionSpec]:
    found, spec = of("longnet mean", "contiguous", "rows")
    return with_hop(found, 1, 0, graphs=hop_of(found, 1, 0).graphs[::-1]), spec


def other_scale() -> tuple[Programs, AttentionSpec]:
    found, spec = of("causal", "contiguous", "rows")
    return changed(found, 1, 0, lambda op: attrs.evolve(op, scale=1.0)), spec


def other_features() -> tuple[Programs, AttentionSpec]:
    found, spec = of("causal", "contiguous", "rows")

    def visit(builder: Any, node: Any, args: tuple[int, ...]) -> int | None:
        wide = isinstance(node.op, Input) and node.op.tensor == "v"
        return builder.add(attrs.evolve(node.op, features=16), *args) if wide else None

    graph = hop_of(found, 1, 0).graphs[0]
    assert graph is not None
    return with_hop(found, 1, 0, graphs=(rewrite(graph, visit),)), spec


@pytest.mark.parametrize(
    ("mutate", "match"),
    [
        (lookback_without_one, "rank 1, step 1: what it sends|do not compute"),
        (striped_equal, "do not compute the .* pairs"),
        (document_boundary_ignored, "do not compute the .* pairs"),
        (known_boundary_ignored, "do not compute the .* pairs"),
        (dropped_hop, "do not compute the .* pairs"),
        (doubled_hop, "do not compute the .* pairs"),
        (rows_of_a_wrong_rank, "rank 3, hop 1: row 16 of key/value head 0 is neither held nor received"),
        (stands_elsewhere, "rank 3, hop 1: .* reads other key rows"),
        (queries_stand_elsewhere, "rank 3, hop 1: .* reads other query rows"),
        (stands_nowhere, "rank 0, hop 0: .* does not say which"),
        (other_order, "rank 0, step 1: what it receives .* is not what rank 3 sends"),
        (message_lost, "rank 0, step 1: what it sends .* is not what rank 1 receives"),
        (message_to_nobody, "rank 1, step 1: what it sends .* is not what rank 3 receives"),
        (sends_what_it_has_not, "does not hold row .*, which it sends to rank"),
        (shards_overlap, "the shards of all ranks do not hold each head and row of the keys exactly once"),
        (wrong_queries, "rank 1 attends for queries that it does not hold"),
        (heads_of_a_peer, "rank 1 does not have the queries that it attends for"),
        (output_not_sent_home, "rank 0 does not send each output home"),
        (false_claim, "was left out for rows"),
        (forgotten_claim, "do not compute the .* pairs"),
        (lost_branch, "no rank computes branch 2"),
        (swapped_branches, "do not compute the .* pairs of branch"),
        (other_scale, "do not compute the .* pairs"),
        (other_features, "v has 16 features"),
    ],
)
def test_planted_faults_are_caught(mutate: Callable[[], tuple[Programs, AttentionSpec]], match: str) -> None:
    found, spec = mutate()
    with pytest.raises(VerifyError, match=match):
        check_ring(found, spec)


def test_programs_of_other_ranks_are_no_ring() -> None:
    found, spec = of("causal", "contiguous", "ring")
    with pytest.raises(VerifyError, match="are not those of ranks 0 to 2"):
        check_ring(found[1:], spec)


def test_rows_are_missed_head_by_head() -> None:
    have = rows_by_head([RowMap(0, 0, (Axis(2, head=1), Axis(8, row=1)))])
    assert first_missing([RowMap(0, 2, (Axis(2, head=1), Axis(3, row=2)))], have) is None
    assert first_missing([RowMap(1, 6, (Axis(3, row=1),))], have) == (1, 8)
    assert first_missing([RowMap(2, 6, (Axis(1, row=1),))], have) == (2, 6)
