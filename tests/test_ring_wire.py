"""The bytes that a plan says, against what the operating system counted on the connections of each rank."""

from __future__ import annotations

import pytest

from attnplan import AttentionSpec
from attnplan import patterns as P
from tests.ring_group import run_group, values
from tests.ring_wire import on_the_wire

LONGNET = P.longnet([512, 2048, 8192], [1, 4, 16])


def cases(length: int) -> list[tuple[AttentionSpec, str]]:
    def spec(pattern: P.Pattern, kv_heads: int = 4) -> AttentionSpec:
        return AttentionSpec(
            seq_len=length, heads=4, kv_heads=kv_heads, head_dim=64, dtype="float32", pattern=pattern, causal=True
        )  # fmt: skip

    return [
        (spec(P.full(), 2), "zigzag > ring"),
        (spec(P.full()), "contiguous > ulysses"),
        (spec(P.full()), "striped > all-gather"),
        (spec(LONGNET), "contiguous > rows"),
        (spec(P.window(600)), "contiguous > halo"),
    ]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_connections_receive_what_the_plan_says(ranks: int) -> None:
    found = values(run_group(ranks, on_the_wire, ranks, cases(8192), deadline=150.0))
    reasons = [row[0] for each in found for row in each if len(row) == 1]
    if reasons:
        pytest.skip(reasons[0])
    moved = 0
    for rank, each in enumerate(found):
        for name, planned, seen in each:
            moved += planned
            # a causal rank 0 of contiguous shards receives nothing forward: what is left are headers and the barrier
            assert planned <= seen <= 1.03 * planned + 8192, (rank, name, planned, seen)
    assert moved > 2**24
