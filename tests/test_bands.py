"""Bands with ends on one side of the query, and conditions that no band satisfies."""

from __future__ import annotations

import pytest
import torch

from attnplan import patterns as P
from attnplan.errors import SpecError
from attnplan.patterns.counts import count_pairs
from attnplan.spec import AttentionSpec
from tests.running import TOLERANCES, Call, assert_agree, every_plan, way


@pytest.mark.parametrize("text", ["band(None, -5)", "band(-1, None)", "band(-2, 4)", "band(4, -2)", "band(-3, 3)"])
def test_a_band_beside_the_query_prints_and_reads_back(text):
    assert repr(P.parse(text)) == text


@pytest.mark.parametrize(
    ("band", "pairs"),
    [
        (P.band(None, -1), 10),
        (P.band(-1, None), 10),
        (P.band(-2, 3), 3 + 2),
        (P.band(3, -2), 3 + 2),
        (P.band(-4, 4), 1),
        (P.band(5, -5), 0),
        (P.causal() & ~P.window(1), 3 + 2 + 1),
        (P.window(2) & P.band(None, -3), 0),
    ],
)
def test_pairs_of_a_band_beside_the_query(band, pairs):
    assert count_pairs(band, P.Shape(5, 5, 1)) == pairs


def test_a_band_that_ends_before_it_begins_is_refused():
    with pytest.raises(SpecError, match=r"band\(2, -3\) holds no key: it ends before it begins"):
        P.band(2, -3)


@pytest.mark.parametrize("left", [2.0, True, "x"])
def test_an_end_that_is_no_int_is_refused(left):
    with pytest.raises(SpecError, match="window left must be an int"):
        P.band(left, None)


@pytest.mark.parametrize(
    "pattern",
    [
        P.band(None, -3),
        P.band(-2, 5),
        P.window(3) & P.band(None, -3),
        P.window(2) & P.band(None, -3),  # no pair at all
        P.band(7, -2) & P.segments(5),
        P.band(None, -2) | P.sinks(1),
    ],
)
def test_every_way_runs_a_band_beside_the_query_as_the_oracle(pattern):
    spec = AttentionSpec(seq_len=13, kv_len=17, heads=2, head_dim=4, pattern=pattern, dtype="float64")
    call = Call.of(spec)
    want = call.expected()
    plans = list(every_plan(spec))
    assert len(plans) > 2
    for plan in plans:
        got = call.got(plan)
        assert_agree(got, want, TOLERANCES["float64"], way(plan))
        assert not torch.isnan(got.dq).any()
