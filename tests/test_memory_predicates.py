"""Predicted peaks of masks that a Python function gives: what its arithmetic allocates is counted, not guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cost.conditions import predicate_bytes
from attnplan.ir import Attend, Axis, RowMap
from attnplan.patterns import Shape
from bench.memory import call_of, measured
from tests.test_memory import every_plan

SLOPES = torch.arange(8)
PREDICATES: dict[str, Any] = {
    "of keys": lambda h, q, k: (k % 512 % 2 == 0) | (k >= 1000),
    "of pairs": lambda h, q, k: (q + k) % 3 == 0,
    "of heads": lambda h, q, k: ((q * k + h) % 5 == 0) & (q >= k),
    "of differences": lambda h, q, k: abs(q - k) // 2**h % 2 == 0,
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr("attnplan.cost.buffers._threads", lambda: 1)


@pytest.mark.parametrize("pattern", [P.full(), P.segments(256)], ids=repr)
@pytest.mark.parametrize("name", PREDICATES)
def test_the_peak_of_a_call_that_asks_a_predicate_is_predicted(name, pattern):
    """Within 1.3 times, however small: not by the 16 MiB that hide a mask of this size."""
    some = pattern & P.mask(PREDICATES[name])
    spec = AttentionSpec(seq_len=1024, heads=4, head_dim=32, dtype="float32", pattern=some)
    plans = [p for p in every_plan(spec) if all(op.tile is None for _, op in p.graph.of(Attend))]
    assert len(plans) >= 2
    for plan in plans:
        peak = measured(call_of(plan, "cpu"), "cpu").allocated
        assert peak <= plan.predicted.peak_bytes <= 1.3 * peak, f"{plan}: {plan.predicted.peak_bytes}, measured {peak}"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["of pairs", "of differences"])
def test_a_predicate_in_tiles_has_a_mask_for_each_of_them_and_makes_those_of_one_batch(name, training):
    """2,048 masks of 128 x 64 pairs: all of them at once were 67 MB in float32, of 97 for the call."""
    spec = AttentionSpec(
        seq_len=2048, heads=4, head_dim=32, dtype="float32", pattern=P.mask(PREDICATES[name]), training=training
    )
    plans = [p for p in every_plan(spec) if any(op.tile is not None for _, op in p.graph.of(Attend))]
    assert plans
    for plan in plans:
        peak = measured(call_of(plan, "cpu"), "cpu").allocated
        assert peak <= plan.predicted.peak_bytes <= 1.3 * peak, f"{plan}: {plan.predicted.peak_bytes}, measured {peak}"
        assert peak < 32e6


SHAPE = Shape(64, 64, 4)
ROWS = RowMap.whole(4, 64)


def test_arrays_count_for_as_long_as_they_live():
    pairs = 64 * 64
    found = {n: predicate_bytes(P.mask(f), ROWS, ROWS, SHAPE) for n, f in PREDICATES.items()}
    indices = 8 * (4 + 2 * 64)
    assert found["of keys"] == indices + 64 + 2 * pairs, "the answer for each key, and for each pair with q and with k"
    assert found["of pairs"] == indices + 16 * pairs, "the sum, and what is left of it"
    assert found["of heads"] == indices + 16 * 4 * pairs


def test_axes_of_rows_are_those_of_positions():
    apart = RowMap(0, 0, (Axis(4, row=16), Axis(16, row=1)))
    wide = predicate_bytes(P.mask(lambda h, q, k: (q + k) % 3 == 0), apart, apart, SHAPE)
    assert wide == 8 + 2 * 8 * 64 + 16 * 4 * 16 * 16


@pytest.mark.parametrize(
    "fn",
    [
        lambda h, q, k: SLOPES[h] < q - k,
        lambda h, q, k: torch.abs(q - k) < 3,
        lambda h, q, k: q.new_tensor(3) < k,
        lambda h, q, k: (q - k) * SLOPES[0] > 0,
    ],
)
def test_what_is_no_arithmetic_is_not_counted(fn):
    assert predicate_bytes(P.mask(fn), ROWS, ROWS, SHAPE) is None


def test_only_predicates_are_asked():
    assert predicate_bytes(P.window(8), ROWS, ROWS, SHAPE) is None
    assert predicate_bytes(P.mask(PREDICATES["of keys"]) & P.random_blocks(0.5, 16, 0), ROWS, ROWS, SHAPE) is None
