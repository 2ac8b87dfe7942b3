"""Planning is quick: lowering, proving and pricing, with nothing remembered of the spec."""

from __future__ import annotations

import statistics
from functools import partial

import pytest

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cost import model, resolve
from attnplan.search import lowerings_clear, search
from bench.spine import beside_pace, pace

pytestmark = pytest.mark.timing
SIZES = {"heads": 12, "head_dim": 64, "dtype": "bfloat16", "causal": True}
DOCUMENTS = P.documents([4096, 512, 2048, 128, 6144, 1024, 896, 1536])
ORDINARY = {
    "dense": AttentionSpec(seq_len=4096, **SIZES),
    "window": AttentionSpec(seq_len=16_384, pattern=P.window(511), **SIZES),
    "documents": AttentionSpec(seq_len=16_384, pattern=DOCUMENTS, **SIZES),
    "grouped": AttentionSpec(seq_len=16_384, pattern=P.grouped([1024, 2048, 4096], [1, 2, 4]), **SIZES),
    "streaming": AttentionSpec(seq_len=16_384, pattern=P.window(1023) | P.sinks(4), **SIZES),
}
LONGNET = P.longnet([2048 << i for i in range(5)], [1 << i for i in range(5)])


def seconds(spec, device, rounds):
    """Return the median of some rounds' seconds of this process, on a core that nothing else disturbs.

    Each round is divided by how much slower plain Python was beside it, as others may use the machine, too.
    """
    target, found = resolve(device), []
    pace()  # the first one is slow
    for _ in range(rounds):
        lowerings_clear()
        model.demands.cache_clear()
        model.room.cache_clear()
        _, taken, slower = beside_pace(partial(search, spec, target))
        found.append(taken / slower)
    return statistics.median(found)


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_specs_plan_in_20_ms(name):
    assert seconds(ORDINARY[name], "h100", 9) <= 0.020


def test_longnet_over_a_million_tokens_plans_in_100_ms():
    spec = AttentionSpec(seq_len=1_000_003, pattern=LONGNET, **SIZES)
    assert seconds(spec, "h100", 5) <= 0.100
