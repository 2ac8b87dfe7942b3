"""Dry runs: bytes and FLOPs against closed forms that are written out here, the choice, and the page."""

from __future__ import annotations

import json
import time

import attrs
import pytest
from click.testing import CliRunner

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cli import main
from attnplan.cost import catalogue
from attnplan.cost.comm import exchange_seconds, links, pipelined_seconds
from attnplan.cost.rules import forward_cost
from attnplan.cost.setting import KernelModel, Setting
from attnplan.errors import RingError, SpecError
from attnplan.explain_mesh import facts, render
from attnplan.explain_tables import hop_table
from attnplan.ir import Receive, parse_graph
from attnplan.ring import choose, programs, rank_graph, traffic
from attnplan.ring.choose import RingCandidate
from attnplan.ring.price import count_part
from attnplan.ring.transports import local_plan, setting_of
from attnplan.spec import Dim

H200 = catalogue()["h200"]
N, RANKS, HEADS, KV_HEADS, FEATURES = 2**30, 1024, 32, 8, 128
ROWS = N // RANKS
SEGMENTS, RATES = [2048 * 2**j for j in range(20)], [2**j for j in range(20)]
BILLION = AttentionSpec(
    seq_len=N, heads=HEADS, kv_heads=KV_HEADS, head_dim=FEATURES, pattern=P.longnet(SEGMENTS, RATES)
)


def test_longnet_over_a_billion_tokens_costs_what_its_closed_form_says() -> None:
    start = time.process_time()
    found = choose(BILLION, "128x8", H200)
    assert time.process_time() - start < 5  # a second on a machine of its own: python -m bench.ring_dry
    best = found[0]
    assert best.name == "contiguous > rows"
    each = [sum(h.asked for h in rank.hops) for rank in best.ranks]
    foreign = sum(2048 - 2048 * ROWS // w for w in SEGMENTS if w > ROWS)  # (w / r)(1 - n / w), of one offset
    row_bytes = 2 * KV_HEADS * FEATURES * 2
    assert foreign * row_bytes == 75_505_664  # with one offset for each key/value head: 75.5 MB
    group = HEADS // KV_HEADS
    assert each == [foreign * KV_HEADS * group] * 3  # the heads of a group have offsets of their own: at most 302 MB
    shared = sum(1024 for w in SEGMENTS if w > ROWS)  # a longer branch repeats rows of the shorter ones
    assert [r.forward_bytes for r in best.ranks] == [shared * group * row_bytes] * 3
    flops = 4 * FEATURES * HEADS * sum(N // w * 2048**2 for w in SEGMENTS) // RANKS
    assert [2 * 2 * FEATURES * r.pairs for r in best.ranks] == [flops] * 3
    assert round(flops / 1e13, 1) == 7.0


def test_offsets_that_follow_the_key_heads_are_asked_for_once() -> None:
    plain = attrs.evolve(BILLION, heads=KV_HEADS, kv_heads=KV_HEADS)
    (best, *_) = choose(plain, "128x8", H200, "contiguous", "rows")
    assert {h.asked * 2 * FEATURES * 2 for r in best.ranks for h in r.hops if h.hop} == {75_505_664}


def test_the_causal_ring_over_a_billion_tokens_costs_what_its_closed_form_says() -> None:
    dense = attrs.evolve(BILLION, pattern=P.full(), causal=True)
    (best, *_) = choose(dense, "128x8", H200, "zigzag", "ring")
    assert max(r.forward_bytes for r in best.ranks) == (RANKS - 1) * 2 * ROWS * KV_HEADS * FEATURES * 2
    assert round((RANKS - 1) * 2 * ROWS * KV_HEADS * FEATURES * 2 / 1e9) == 4394
    assert {r.pairs for r in best.ranks} == {N * (N + 1) // 2 * HEADS // RANKS}
    assert [len(r.hops) for r in best.ranks] == [RANKS] * 3
    assert round(best.imbalance, 6) == 1.0


def test_bytes_of_longnet_stay_as_they_are_while_ranks_and_tokens_grow() -> None:
    received = set()
    for ranks in (16, 64, 256):
        spec = AttentionSpec(seq_len=4096 * ranks, heads=4, head_dim=64, pattern=P.longnet([1024, 16384], [1, 16]))
        received |= {r.forward_bytes for r in choose(spec, ranks, H200, "contiguous", "rows")[0].ranks}
    assert received == {(16384 - 4096) // 16 * 4 * 2 * 64 * 2}


def test_a_window_of_256_over_16_ranks_is_one_hop_to_one_neighbour() -> None:
    spec = AttentionSpec(seq_len=65536, heads=2, head_dim=64, pattern=P.window(256, 0))
    for transport in ("halo", "ring", "rows"):
        for program in programs(spec, 16, "contiguous", transport):
            moved = [e for e in program.exchanges if e.receives]
            assert [(list(e.receives), e.received) for e in moved] == (
                [([program.rank - 1], 512)] if program.rank else []
            )


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("transport", ["halo", "ring", "all-gather", "rows", "ulysses", "hybrid"])
def test_what_is_priced_is_what_the_programs_move(transport: str, layout: str) -> None:
    spec = AttentionSpec(seq_len=96, heads=4, kv_heads=2, head_dim=8, value_dim=16, pattern=P.window(9), causal=True)
    try:
        (best, *_) = choose(spec, "2x2", H200, layout, transport)
    except RingError:
        assert transport == "halo"
        return
    features = {"q": 8, "k": 8, "v": 16, "o": 16}
    ranks = programs(spec, (best.ring, best.ulysses) if transport == "hybrid" else 4, layout, transport)
    moved = [traffic(p, features, spec.dtype) for p in ranks]
    assert [r.forward_bytes for r in best.ranks] == [t.received for t in moved]
    assert sum(t.sent for t in moved) == sum(t.received for t in moved)
    back = [traffic(p, features, spec.dtype, backward=True) for p in ranks]
    assert sum(r.backward_bytes for r in best.ranks) == sum(t.received for t in back) == sum(t.sent for t in back)
    assert sum(r.pairs for r in best.ranks) == spec.count_pairs()


def test_a_ring_moves_what_its_formula_says() -> None:
    n, ranks, features = 512, 4, {"q": 64, "k": 64, "v": 64, "o": 64}
    spec = AttentionSpec(seq_len=n * ranks, heads=8, kv_heads=2, head_dim=64)
    kv, q = 2 * n * 2 * 64 * 2, n * 8 * 64 * 2
    ring, gathered, spread = (
        [traffic(p, features, spec.dtype).received for p in programs(spec, ranks, "contiguous", t)]
        for t in ("ring", "all-gather", "ulysses")
    )
    assert ring == gathered == [(ranks - 1) * kv] * ranks
    lse = n * 8 * 4
    # 4 ranks share 2 key/value heads: each of these travels to 2 ranks
    assert spread == [(2 * q + lse + 2 * kv) * (ranks - 1) // ranks] * ranks
    back = traffic(programs(spec, ranks, "contiguous", "ring")[0], features, spec.dtype, backward=True)
    assert back.received == (ranks - 1) * (kv + 2 * kv)  # k and v again, and their gradients in float32
    first = programs(attrs.evolve(spec, causal=True), ranks, "contiguous", "ring")[0]  # it only gives
    home = traffic(first, features, spec.dtype, backward=True)
    assert (home.sent, home.received) == ((ranks - 1) * kv, (ranks - 1) * 2 * kv)


def test_windows_stay_beside_their_rows_and_dense_attention_is_balanced() -> None:
    window = AttentionSpec(seq_len=65536, heads=8, head_dim=128, pattern=P.window(256, 0))
    found = choose(window, "2x8", H200)
    assert found[0].layout == "contiguous"
    assert found[0].transport in ("halo", "ring", "rows")
    dense = AttentionSpec(seq_len=131072, heads=32, kv_heads=8, head_dim=128, causal=True)
    found = choose(dense, 4, H200)
    by_name = {c.name: c for c in found}
    assert by_name["contiguous > ring"].seconds > 1.4 * by_name["zigzag > ring"].seconds
    assert round(by_name["contiguous > ring"].imbalance, 2) == 1.75
    local = AttentionSpec(seq_len=4096, heads=8, head_dim=64, pattern=P.segments(256), causal=True)
    assert "local" in {c.transport for c in choose(local, 4, H200) if not c.refused and c.slowest.forward_bytes == 0}


def test_every_refusal_has_its_reason() -> None:
    spec = AttentionSpec(seq_len=4096, heads=6, kv_heads=2, head_dim=64, pattern=P.sinks(4) | P.window(64), causal=True)
    refused = {c.name: c.refused for c in choose(spec, 4, H200) if c.refused}
    assert "needs rows of rank 0" in refused["contiguous > local"]
    assert "which do not follow its own rows" in refused["contiguous > halo"]
    assert "has no such neighbours" in refused["zigzag > halo"]
    assert refused["contiguous > ulysses"] == "6 query heads do not spread over 4 ranks"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seq_len": Dim("s", max=64), "kv_len": Dim("s", max=64)}, "lengths arrive with the call"),
        ({"q_offset": True}, "the position of query row 0 arrives with the call"),
        ({"bias": True}, "would lie whole on every rank"),
    ],
)
def test_what_no_rank_can_plan_is_refused(changes: dict[str, object], match: str) -> None:
    spec = attrs.evolve(AttentionSpec(seq_len=64, heads=2, head_dim=8), **changes)  # type: ignore[arg-type]
    with pytest.raises(RingError, match=match):
        programs(spec, 2, "contiguous", "ring")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((2, "contiguos", "ring"), "unknown layout 'contiguos'; did you mean 'contiguous'"),
        ((2, "contiguous", "rings"), "unknown transport 'rings'; did you mean 'ring'"),
        ((4, "contiguous", "hybrid"), "needs a mesh of two dimensions"),
        ((0, "contiguous", "ring"), "ranks must be at least 1"),
    ],
)
def test_unknown_names_are_refused(arguments: tuple[object, str, str], match: str) -> None:
    with pytest.raises(RingError, match=match):
        programs(AttentionSpec(seq_len=64, heads=2, head_dim=8), *arguments)  # type: ignore[arg-type]


def test_all_refusals_are_listed_if_nothing_carries_a_spec() -> None:
    spec = AttentionSpec(seq_len=64, heads=2, head_dim=8)
    with pytest.raises(
        RingError, match=r"no layout and transport carry this over 4 ranks:\n.*local: rank 0 needs rows"
    ):
        choose(spec, 4, H200, transport="local")
    with pytest.raises(RingError, match="unknown transport 'p2p'"):
        choose(spec, 4, H200, transport="p2p")


def test_the_graph_of_a_rank_is_text_and_its_collectives_are_priced() -> None:
    spec = AttentionSpec(seq_len=64, heads=4, kv_heads=2, head_dim=8, pattern=P.window(5), causal=True)
    graph = rank_graph(spec, 4, "contiguous", "halo", 2)
    graph.verify()
    assert parse_graph(str(graph)) == graph
    received = graph.of(Receive)
    assert [op.peers for _, op in received] == [((1, 10),)] * 2
    setting = Setting.of(graph, spec, KernelModel(efficiency=0.5))
    assert [forward_cost(node, setting).comm_bytes for node, _ in received] == [10 * 8 * 2] * 2


def test_parts_are_counted_in_closed_form() -> None:
    spec = AttentionSpec(seq_len=96, heads=4, head_dim=8, pattern=P.longnet([16, 48], [1, 3]), causal=True)
    setting = setting_of(spec, 4, "zigzag", "rows")
    counted = sum(count_part(p) for r in range(4) for h in local_plan(setting, r).hops for p in h.parts.parts)
    assert counted == spec.count_pairs()


def test_compute_hides_the_next_exchange_and_no_other() -> None:
    assert pipelined_seconds([4.0, 1.0, 1.0], [0.0, 3.0, 3.0]) == 4.0 + 3.0 + 1.0
    assert pipelined_seconds([1.0], [5.0]) == 6.0
    known = links(H200)
    alone = exchange_seconds((0.0, 0), (5e9, 1), known)
    assert alone == pytest.approx(5e9 / known.between.bandwidth, rel=1e-3)
    assert exchange_seconds((5e9, 1), (5e9, 1), known) == alone  # both links at once


def test_candidates_without_ranks_cost_nothing_to_look_at() -> None:
    refused = RingCandidate("zigzag", "halo", 4, 1, refused="because")
    assert (refused.seconds, refused.peak_bytes, refused.imbalance) == (float("inf"), 0, 1.0)


def test_the_page_says_what_the_facts_say() -> None:
    spec = AttentionSpec(seq_len=65536, heads=8, head_dim=128, pattern=P.window(256, 0), training=True)
    found = facts(spec, "2x8", "h200")
    assert found["choice"]["received_bytes"] == 256 * 8 * 2 * 128 * 2
    assert found["choice"]["received_bytes_backward"] == 3 * found["choice"]["received_bytes"]
    assert found["mesh"] == {"nodes": 2, "per_node": 8, "ranks": 16}
    assert json.loads(json.dumps(found)) == found
    page = render(found)
    for text in ("16 ranks on 2 nodes of 8", "1 MiB to the rank", "3 MiB backward", "forward and backward", "refused"):
        assert text in page


def test_the_pages_of_a_mesh_and_of_a_plan_share_their_tables() -> None:
    spec = AttentionSpec(seq_len=512, heads=4, head_dim=32, causal=True)
    plan = attnplan.compile(attrs.evolve(spec, ring_size=4), device="h200", strategy="ring")
    others = [c.name for c in plan.candidates[1:] if not c.refused]
    assert others
    for page in (render(facts(spec, 4, "h200", transport="ring")), plan.explain()):
        head = next(line for line in page.splitlines() if "rows asked" in line)
        assert all(word in head for word in ("hop", "from", "bytes", "pairs", "arrive", "hidden", "copies", "kernel"))
        assert "itself" in page
        assert page.count("imbalance") >= len(others)


def test_long_tables_of_hops_say_what_they_leave_out() -> None:
    hop = {"peers": 1, "asked": 8, "received": 8, "bytes": 64, "pairs": 0, "comm": 0.0, "hidden": None}
    hops = [{"hop": i, **hop, "compute": 0.0, "around": 0.0, "kernel": "k"} for i in range(14)]
    for count, left_out in ((12, []), (13, [8]), (14, [8, 9])):
        lines = list(hop_table(hops[:count]))[2:]
        shown = [int(line.split()[0]) for line in lines if "..." not in line]
        assert shown == [i for i in range(count) if i not in left_out]
        said = [f"  ... and {len(left_out)} more hops; the JSON lists all"] if left_out else []
        assert [line for line in lines if "..." in line] == said


def test_the_command_line_plans_for_a_mesh() -> None:
    flags = ["--seq-len", "65536", "--heads", "8", "--head-dim", "64", "--pattern", "window(256, 0)"]
    runner = CliRunner()
    result = runner.invoke(main, ["explain", *flags, "--mesh", "16", "--device", "h200", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["choice"]["transport"] in ("halo", "ring", "rows")
    result = runner.invoke(main, ["explain", *flags, "--mesh", "16", "--device", "h200", "--transport", "all-gather"])
    assert "choice     contiguous > all-gather" in result.output
    for extra, code in ((["--mesh", "16", "--graph"], 2), (["--mesh", "x"], 3), (["--mesh", "4", "--shards", "no"], 3)):
        assert runner.invoke(main, ["explain", *flags, "--device", "h200", *extra]).exit_code == code


def test_a_spec_error_stays_one() -> None:
    with pytest.raises(SpecError):
        facts(AttentionSpec(seq_len=64, heads=2, head_dim=8), 4, "h20")
