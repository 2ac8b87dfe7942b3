from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnplan import patterns as P
from attnplan.errors import SpecError
from attnplan.patterns.counts import count_pairs
from tests import oracle
from tests import strategies as some

N = 1_000_003


def brute_force(pattern, shape):
    positions = np.arange(shape.seq_len)[None].repeat(shape.batch, 0) + shape.shift
    return int(oracle.member(pattern, heads=shape.heads, positions=positions, kv_len=shape.kv_len).sum())


@given(st.data())
def test_count_of_any_combination_is_the_number_of_pairs(data):
    shape = data.draw(some.shapes(longest=40))
    pattern = data.draw(some.patterns(shape, masks=True)).bind(shape.heads)
    assert count_pairs(pattern, shape) == brute_force(pattern, shape)


@given(st.data())
def test_count_of_a_conjunction_is_the_number_of_pairs(data):
    shape = data.draw(some.shapes(longest=60))
    pattern = data.draw(some.conjunctions(shape)).bind(shape.heads)
    assert count_pairs(pattern, shape) == brute_force(pattern, shape)


@given(st.data())
def test_count_by_rows_agrees_with_the_closed_form(data):
    shape = data.draw(some.shapes(longest=40))
    pattern = data.draw(some.conjunctions(shape)).bind(shape.heads)
    assert count_pairs(pattern | pattern, shape) == count_pairs(pattern, shape)


def triangle(n):
    return n * (n + 1) // 2


def segment_pairs(length, rate, offset, n=N):
    """Pairs of one head: the squares of the rows in each whole segment and in the tail."""
    whole, tail = divmod(n, length)

    def rows(extent):
        return max(0, -(-(extent - offset) // rate))

    return whole * rows(length) ** 2 + rows(tail) ** 2


CLOSED_FORMS = [
    (P.full(), N * N),
    (P.causal(), triangle(N)),
    (~P.causal(), N * (N - 1) // 2),
    (P.window(700), N * 1401 - 700 * 701),
    (P.window(700, 0), N * 701 - triangle(700)),
    (P.window(700) & P.causal(), N * 701 - triangle(700)),
    (P.window(700, 50), N * 751 - triangle(700) - triangle(50)),
    (P.band(None, 9), triangle(N) + 9 * N - triangle(9)),
    (P.window(2 * N), N * N),
    (P.segments(4096), segment_pairs(4096, 1, 0)),
    (P.segments(4096) & P.causal(), N // 4096 * triangle(4096) + triangle(N % 4096)),
    (P.segments(4096) & P.segments(1024), segment_pairs(1024, 1, 0)),
    (P.dilated(4096, 7, 3), segment_pairs(4096, 7, 3)),
    (P.dilated(2 * N, 1000, 999), (N // 1000) ** 2),
    (P.dilated(2 * N, 1000, 2) & P.causal(), triangle(N // 1000 + 1)),
    (P.heads(1, 1), 0),
    (P.sinks(4) | P.window(700, 0), N * 701 - triangle(700) + triangle(3) + triangle(4) + 4 * (N - 705)),
    (P.sinks(5) & P.causal(), 5 * N - triangle(4)),
    (P.documents([N - 1000, 600, 400]), (N - 1000) ** 2 + 600**2 + 400**2),
    (P.documents([N - 1000, 600, 400]) & P.causal(), triangle(N - 1000) + triangle(600) + triangle(400)),
    (P.padding([N - 7]), N * (N - 7)),
]


@pytest.mark.parametrize(("pattern", "pairs"), CLOSED_FORMS, ids=[str(p) for p, _ in CLOSED_FORMS])
def test_large_counts_match_formulas(pattern, pairs):
    assert count_pairs(pattern, P.Shape(N, N, heads=1)) == pairs


def test_large_counts_over_heads_sum_each_heads_offset():
    shape = P.Shape(N, N, heads=13)
    block = P.dilated(8192, 5, "block").bind(13)
    assert count_pairs(P.dilated(8192, 5, "interleave"), shape) == sum(segment_pairs(8192, 5, h % 5) for h in range(13))
    assert count_pairs(block, shape) == sum(segment_pairs(8192, 5, h // 3) for h in range(13))
    assert count_pairs(P.heads(2, 6), shape) == 4 * N * N
    assert count_pairs(P.causal(), P.Shape(N, N, heads=13, batch=3)) == 39 * triangle(N)


def test_large_counts_with_unlike_lengths_align_at_the_end():
    assert count_pairs(P.causal(), P.Shape(1000, N, heads=1)) == 1000 * (N - 1000) + triangle(1000)
    assert count_pairs(P.causal(), P.Shape(N, 1000, heads=1)) == triangle(1000)
    assert count_pairs(P.segments(4096), P.Shape(1000, N, heads=1)) == (
        (N % 4096) ** 2 + (1000 - N % 4096) * 4096
        if N % 4096 < 1000
        else 1000 * (N % 4096)
    )  # fmt: skip


def test_global_tokens_and_a_window_are_counted_in_little_memory():
    n, w, g = 65_536, 512, 64
    tracemalloc.start()
    found = count_pairs(P.window(w) | P.global_tokens(g), P.Shape(n, n, heads=8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    rest = n - g
    assert found == 8 * (2 * g * n - g * g + rest * (2 * w + 1) - w * (w + 1))
    assert peak < 64 * 2**20


@pytest.mark.parametrize(
    "pattern", [P.window(512) | P.sinks(4), ~P.window(512), P.documents([30_000, 35_536])], ids=str
)
def test_counting_by_rows_holds_nothing_of_queries_times_keys(pattern):
    tracemalloc.start()
    count_pairs(pattern, P.Shape(65_536, 65_536, heads=1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 2**20


def test_a_mask_is_counted_block_by_block():
    tracemalloc.start()
    found = count_pairs(P.mask(lambda h, q, k: (q + k) % 2 == 0), P.Shape(4096, 4096, heads=1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == 4096 * 4096 // 2
    assert peak < 64 * 2**20


@pytest.mark.parametrize("pattern", [P.documents(), P.causal() & P.padding(), ~P.documents() | P.padding()])
def test_a_count_that_depends_on_the_call_is_refused(pattern):
    with pytest.raises(SpecError, match=r"depends on what arrives with the call \((documents|key_padding)"):
        count_pairs(pattern, P.Shape(8, 8, 1))
