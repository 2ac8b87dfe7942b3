"""Strides, columns, blocks, random blocks and neighbourhoods, and the functions that mask(fn) refuses."""

from __future__ import annotations

import itertools
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnplan
from attnplan import patterns as P
from attnplan.errors import SpecError
from attnplan.patterns.counts import count_pairs
from attnplan.spec import AttentionSpec, Dim
from tests import oracle
from tests import strategies as some
from tests.running import Call, assert_agree
from tests.test_patterns import evaluated, expected, vmapped

N = 1_000_003
LAYOUT = [[1, 0, 0], [1, 1, 0], [0, 1, 1]]

ATOMS = [
    P.strided(3), P.strided(20), P.columns([0]), P.columns([2, 3, 4]), P.columns([0, 5, 11]), P.columns([3], every=4),
    P.columns([0, 2, 3], every=5), P.block_window(4, 1), P.block_window(5, 0, 2), P.blocks(LAYOUT, 4),
    P.blocks(LAYOUT, 5), P.blocks([LAYOUT, LAYOUT[::-1], [[0] * 3] * 3, LAYOUT], (4, 5)), P.blocks([[1, 0]], (20, 7)),
    P.random_blocks(0.5, 2), P.random_blocks(0.01, 3, seed=5), P.random_blocks(1, 5),
    P.random_blocks(count=2, block_size=3), P.random_blocks(count=9, block_size=4, seed=2**64 - 1),
    P.neighborhood(1), P.neighborhood(12), P.neighborhood(4),
    P.neighborhood(3, dilation=4), P.neighborhood(5, causal=True), P.neighborhood(3, 2, causal=True),
    P.neighborhood(2, shape=[3, 4]), P.neighborhood([1, 2], [1, 2], [2, 6], [True, False]),
    P.neighborhood([2, 1, 3], shape=[2, 2, 3], causal=[False, True, True]),
]  # fmt: skip


@pytest.mark.parametrize("shape", [P.Shape(9, 12, 4), P.Shape(12, 12, 4), P.Shape(1, 12, 4)], ids=str)
@pytest.mark.parametrize("pattern", ATOMS, ids=repr)
def test_every_atom_matches_its_docstring(pattern, shape):
    pattern.check(shape)
    want = expected(pattern, shape)
    np.testing.assert_array_equal(evaluated(pattern, shape), want)
    np.testing.assert_array_equal(evaluated(pattern, shape, torch.as_tensor), want)
    assert count_pairs(pattern, shape) == want.sum()
    assert P.parse(repr(pattern)) == pattern
    assert hash(P.parse(repr(pattern))) == hash(pattern)


@pytest.mark.parametrize("pattern", [P.strided(3), P.columns([1, 3]), P.block_window(5, 1)], ids=repr)
def test_queries_before_the_first_key(pattern):
    shape = P.Shape(20, 12, 1)
    np.testing.assert_array_equal(evaluated(pattern, shape), expected(pattern, shape))
    assert count_pairs(pattern, shape) == expected(pattern, shape).sum()


@given(st.data())
def test_the_new_atoms_serve_numpy_torch_and_vmap(data):
    shape = data.draw(some.shapes())
    pattern = data.draw(some.sparse_atoms(shape))
    pattern.check(shape)
    want = expected(pattern, shape)
    np.testing.assert_array_equal(evaluated(pattern, shape), want)
    np.testing.assert_array_equal(evaluated(pattern, shape, torch.as_tensor), want)
    np.testing.assert_array_equal(vmapped(pattern, shape), want)
    assert count_pairs(pattern, shape) == want.sum()
    assert P.parse(repr(pattern)) == pattern


@given(st.data())
def test_membership_changes_at_breaks_only(data):
    shape = data.draw(some.shapes())
    pattern = data.draw(some.sparse_atoms(shape))
    q = np.arange(shape.seq_len) + shape.shift
    breaks = pattern.breaks({}, q, shape.kv_len)
    for head, i in itertools.product(range(shape.heads), range(shape.seq_len)):
        row = expected(pattern, shape)[0, head, i]
        edges = {int(b[i]) for b in breaks}
        for k in range(shape.kv_len - pattern.period):
            if not edges & set(range(k + 1, k + pattern.period + 1)):
                assert row[k] == row[k + pattern.period]


RUNS = [
    (P.strided(4) | P.window(2), False), (P.strided(5), True), (P.columns([0, 3], every=6) | P.segments(8), True),
    (P.columns([2, 30]) & ~P.window(1), False), (P.blocks("100/110/011", 13), False),
    (P.blocks("10/11|11/01|01/10|11/11", 20), True), (P.blocks("000/100/101", 13), True), (P.block_window(8, 1), True),
    (P.random_blocks(0.3, 5, seed=3) | P.window(1), True), (P.random_blocks(count=1, block_size=4), True),
    (P.neighborhood(6, dilation=3), False), (P.neighborhood(5, causal=True), False),
    (P.mix([P.strided(3), P.block_window(4, 1), P.random_blocks(0.4, 7)]), True),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "causal"), RUNS, ids=[f"{p}, {c}" for p, c in RUNS])
@pytest.mark.parametrize("seq_len", [37, 11])
def test_outputs_and_gradients_are_those_of_the_oracle(pattern, causal, seq_len):
    spec = AttentionSpec(
        seq_len=seq_len, kv_len=37, heads=4, kv_heads=2, head_dim=4, pattern=pattern, causal=causal, dtype="float64"
    )
    call = Call.of(spec, batch=2)
    plan = attnplan.compile(spec)
    assert_agree(call.got(plan), call.expected(), 1e-12, repr(pattern))
    plan.verify()


GRIDS = [P.neighborhood(3, shape=[5, 7]), P.neighborhood([2, 3], [2, 1], [5, 7], [True, False])]


@pytest.mark.parametrize("pattern", [*GRIDS, P.strided(4) | P.window(2)], ids=repr)
def test_one_call_with_a_pattern(pattern):
    q, k, v = (torch.randn(2, 35, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = attnplan.attention(q, k, v, pattern=pattern, layout="bshd")
    spec = AttentionSpec(seq_len=35, heads=4, head_dim=6, pattern=pattern, dtype="float64")
    want, _ = oracle.dense(spec, *(x.transpose(1, 2) for x in (q, k, v)))
    want = want.transpose(1, 2)
    grad = torch.randn_like(out)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_lengths_that_come_with_the_call():
    n = Dim("s", max=64)
    for pattern in (P.neighborhood(4), P.random_blocks(0.3, 4) | P.window(1), P.strided(3), P.columns([1], every=4)):
        plan = attnplan.compile(AttentionSpec(seq_len=n, heads=2, head_dim=4, pattern=pattern, dtype="float64"))
        for length in (64, 37, 8):
            spec = AttentionSpec(seq_len=length, heads=2, head_dim=4, pattern=pattern, dtype="float64")
            q, k, v = oracle.sample_inputs(spec, 1)
            torch.testing.assert_close(plan(q, k, v), oracle.dense(spec, q, k, v)[0], rtol=1e-12, atol=1e-12)
    plan = attnplan.compile(AttentionSpec(seq_len=n, heads=2, head_dim=4, pattern=P.neighborhood(4), dtype="float64"))
    short = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    with pytest.raises(SpecError, match="kernel 4 with dilation 1 needs 4 cells, dimension 0 has 3"):
        plan(short, short, short)


@pytest.mark.parametrize("pattern", [P.blocks(LAYOUT, 4), P.neighborhood(2, shape=[4, 16])], ids=repr)
def test_a_fixed_size_and_an_open_length_contradict(pattern):
    with pytest.raises(SpecError, match=r"(blocks|neighborhood) has a fixed size, but seq_len or kv_len is a Dim"):
        AttentionSpec(seq_len=Dim("s", max=64), heads=2, head_dim=4, pattern=pattern & P.causal())


def test_positions_that_come_with_the_call():
    for pattern in (P.neighborhood(5), P.blocks("100/110/011", 13), P.random_blocks(0.4, 5), P.strided(4)):
        spec = AttentionSpec(
            seq_len=5, kv_len=37, heads=2, head_dim=4, pattern=pattern, q_offset=True, dtype="float64", causal=True
        )
        plan = attnplan.compile(spec)
        q, k, v = oracle.sample_inputs(spec, 2)
        for offset in (0, 17, torch.tensor([3, 32])):
            want, _ = oracle.dense(spec, q, k, v, operands={"q_offset": offset})
            torch.testing.assert_close(plan(q, k, v, q_offset=offset), want, rtol=1e-12, atol=1e-12)


@given(st.data())
def test_a_layout_in_any_form_is_one_pattern(data):
    heads = data.draw(st.sampled_from([(), (1,), (3,)]))
    size = (*heads, data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20)))
    bits = data.draw(st.lists(st.booleans(), min_size=int(np.prod(size)), max_size=int(np.prod(size))))
    array = np.array(bits).reshape(size)
    pattern = P.blocks(array, (4, 8))
    for other in (array.tolist(), array.astype(int).tolist(), torch.tensor(array), torch.tensor(array).int(),
                  array.astype(np.uint8), np.asfortranarray(array)):  # fmt: skip
        assert P.blocks(other, [4, 8]) == pattern
        assert hash(P.blocks(other, [4, 8])) == hash(pattern)
    np.testing.assert_array_equal(pattern.layout().reshape(size), array)
    assert P.parse(repr(pattern)) == pattern
    flipped = array.copy()
    flipped.flat[-1] ^= True
    assert P.blocks(flipped, (4, 8)) != pattern
    assert P.blocks(array, (8, 4)) != pattern


def test_a_layout_is_copied_and_heads_with_one_layout_are_alike():
    array = np.ones((3, 2, 2), dtype=bool)
    pattern = P.blocks(array, 4)
    array[1] = False
    assert pattern.layout().all()
    array[2] = True
    assert [P.blocks(array, 4).head_key(h) for h in range(3)] == [(0,), (1,), (0,)]
    assert P.blocks(array[0], 4).head_key(2) == ()


def test_random_blocks_are_what_they_were():
    """The choice is part of the pattern's meaning: these numbers never change."""
    assert P.random_blocks(0.2, 64).kept(np.arange(4), 1024).tolist() == [
        [0, 12, 13],
        [0, 6, 12],
        [0, 4, 13],
        [2, 4, 8],
    ]
    assert P.random_blocks(count=2, block_size=1, seed=2**64 - 1).kept(np.array([999_999]), N).tolist() == [
        [21573, 284866]
    ]


def test_random_blocks_keep_what_they_say_and_spread_it():
    for keep, total, want in ((0.1, 100, 10), (0.125, 4, 1), (0.625, 4, 3), (1e-9, 50, 1), (1.0, 7, 7), (0.5, 5, 3)):
        kept = P.random_blocks(keep, 3).kept(np.arange(total), 3 * total - 1)
        assert kept.shape == (total, want)
        assert all(len(set(row)) == want and 0 <= min(row) <= max(row) < total for row in kept.tolist())
    table = np.zeros((512, 512))
    np.put_along_axis(table, P.random_blocks(0.25, 1, seed=1).kept(np.arange(512), 512), 1, axis=1)
    assert abs(table.mean(axis=0) - 0.25).max() < 5 * (0.1875 / 512) ** 0.5  # every column, within five deviations
    other = np.zeros((512, 512))
    np.put_along_axis(other, P.random_blocks(0.25, 1, seed=2).kept(np.arange(512), 512), 1, axis=1)
    assert abs((table * other).mean() - 0.0625) < 0.003  # another seed is independent


def test_random_blocks_of_some_rows_are_those_of_all_rows():
    pattern = P.random_blocks(0.3, 2, seed=8)
    every = pattern.kept(np.arange(50), 100)
    np.testing.assert_array_equal(pattern.kept(np.array([7, 3, 49]), 100), every[[7, 3, 49]])
    pattern = P.random_blocks(count=3, block_size=1)  # so wide that rows are drawn in several pieces
    every = pattern.kept(np.arange(900), 5000)
    np.testing.assert_array_equal(pattern.kept(np.array([0, 450, 899]), 5000), every[[0, 450, 899]])


def test_large_counts_match_formulas():
    n, s = 60_000, 250
    assert count_pairs(P.strided(s), P.Shape(n, n, 1)) == n * (n // s)
    assert count_pairs(P.strided(s) & P.causal(), P.Shape(n, n, 1)) == s * (n // s) * (n // s + 1) // 2
    assert count_pairs(P.columns([3, 4, 9]), P.Shape(n, n, 2)) == 2 * 3 * n
    assert count_pairs(P.columns([0, 4], every=5), P.Shape(n, n, 1)) == n * (n // 5) * 2
    assert count_pairs(P.block_window(64, 1), P.Shape(6400, 6400, 1)) == (100 * 3 - 2) * 64 * 64
    assert count_pairs(P.neighborhood(7, dilation=11), P.Shape(N, N, 1)) == 7 * N
    assert count_pairs(P.neighborhood([5, 9], shape=[123, 321]), P.Shape(123 * 321, 123 * 321, 1)) == 123 * 321 * 45
    assert count_pairs(P.random_blocks(0.1, 64), P.Shape(6400, 6400, 3)) == 3 * 100 * 10 * 64 * 64


def test_random_tables_take_one_bit_per_block():
    tracemalloc.start()
    start = time.perf_counter()
    tables = P.random_blocks(0.05, 64).tables(P.Shape(262_144, 262_144, 1))
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(t.nbytes for t in tables.values()) == 4096 * 4096 // 8 + 8
    assert peak < 64 * 2**20
    assert seconds < 10


BAD = {
    "stride must be at least 1, got 0": lambda: P.strided(0),
    "stride must be an int, got 2.0": lambda: P.strided(2.0),
    "columns needs a list of key positions, got 3": lambda: P.columns(3),
    "position of a column must be at least 0, got -1": lambda: P.columns([-1]),
    "position of a column must be an int, got True": lambda: P.columns([True]),
    r"columns needs distinct positions, at least one; got \[\]": lambda: P.columns([]),
    r"at least one; got \[2, 2\]": lambda: P.columns([2, 2]),
    "period of columns must be at least 1": lambda: P.columns([0], every=0),
    "columns every 4 keys are residues below 4, got 4": lambda: P.columns([4], every=4),
    "block_window left must be at least 0, got -1": lambda: P.block_window(4, -1),
    "block_window right must be at least 0, got -2": lambda: P.block_window(4, 1, -2),
    "block size must be at least 1, got 0": lambda: P.block_window(0, 1),
    r"blocks needs a layout .* got \(2,\)": lambda: P.blocks([True, False], 4),
    r"blocks needs a layout .* got \(0, 0\)": lambda: P.blocks(np.zeros((0, 0), dtype=bool), 4),
    "blocks needs a layout of equally long rows": lambda: P.blocks([[1, 0], [1]], 4),
    "True or False .* got values of float64": lambda: P.blocks([[0.5, 1.0]], 4),
    "True or False .* got values of int64": lambda: P.blocks([[2, 1]], 4),
    "a layout in text is rows of 0 and 1": lambda: P.blocks("10/12", 4),
    "must be equally long": lambda: P.blocks("10/1", 4),
    r"equally long, got \[\(1, 2\), \(2, 2\)\]": lambda: P.blocks("10|10/01", 4),
    "block size must be at least 1, got -1": lambda: P.blocks("1", (4, -1)),
    "block size must be an int, got True": lambda: P.blocks("1", True),
    r"must be an int or a pair, of queries and of keys; got \[4\]": lambda: P.blocks("1", [4]),
    "keep must be above 0 and at most 1, got 0.0": lambda: P.random_blocks(0),
    "keep must be above 0 and at most 1, got 1.5": lambda: P.random_blocks(1.5),
    "keep must be above 0 and at most 1, got nan": lambda: P.random_blocks(float("nan")),
    "keep must be a number above 0 and at most 1, got '1'": lambda: P.random_blocks("1"),
    "keep must be a number above 0 and at most 1, got True": lambda: P.random_blocks(True),
    "needs either keep, a share of the key blocks, or count": lambda: P.random_blocks(),
    "needs either keep, a share": lambda: P.random_blocks(0.5, count=3),
    "count of random_blocks must be at least 1": lambda: P.random_blocks(count=0),
    "seed of random_blocks must be at least 0": lambda: P.random_blocks(0.5, seed=-1),
    r"seed of random_blocks must be below 2\*\*64": lambda: P.random_blocks(0.5, seed=2**64),
    "neighborhood kernel must be at least 1, got 0": lambda: P.neighborhood(0),
    "neighborhood kernel must be an int, got True": lambda: P.neighborhood(True),
    "neighborhood dilation must be at least 1, got 0": lambda: P.neighborhood(3, 0),
    "neighborhood dilation must be one value or one per dimension, got 'x'": lambda: P.neighborhood(3, "x"),
    "causal must be True or False per dimension, got 1": lambda: P.neighborhood(3, causal=1),
    r"neighborhood with kernel \[3, 3\] needs shape=": lambda: P.neighborhood([3, 3]),
    "kernel has 2 values for 3 dimensions": lambda: P.neighborhood([3, 3], shape=[4, 4, 4]),
    "has one to 3 dimensions, .* has 4": lambda: P.neighborhood(1, shape=[2, 2, 2, 2]),
    "has one to 3 dimensions, .* has 0": lambda: P.neighborhood(1, shape=[]),
    "shape must be a list of one to three sizes, got 16": lambda: P.neighborhood(1, shape=16),
    "kernel 3 with dilation 3 needs 9 cells, dimension 1 has 8": lambda: P.neighborhood(3, [1, 3], [9, 8]),
    "size of a neighborhood's dimension must be at least 1": lambda: P.neighborhood(1, shape=[4, 0]),
}


@pytest.mark.parametrize("reason", BAD)
def test_what_cannot_be_is_refused_with_the_reason(reason):
    with pytest.raises(SpecError, match=reason):
        BAD[reason]()


UNFIT = {
    r"layout of 3 x 3 blocks; blocks of 4 x 4 over kv_len=13 positions need 4 x 4": (P.blocks(LAYOUT, 4), {}),
    r"layout of 1 x 2 blocks; blocks of 4 x 8 over kv_len=13 positions need 4 x 2": (P.blocks("11", [4, 8]), {}),
    "a layout for 2 heads, the spec has heads=4": (P.blocks("1|0", 13), {}),
    "blocks need a position for every query: seq_len=13 exceeds kv_len=9": (P.blocks("1", 9), {"kv_len": 9}),
    "random_blocks need a position for every query": (P.random_blocks(0.5), {"kv_len": 9}),
    "a cell for every query: seq_len=13 exceeds kv_len=9": (P.neighborhood(3), {"kv_len": 9}),
    r"shape \[3, 4\] has 12 cells, the spec has kv_len=13": (P.neighborhood(2, shape=[3, 4]), {}),
    "kernel 7 with dilation 2 needs 14 cells, dimension 0 has 13": (P.neighborhood(7, 2), {}),
    "key 13 of columns does not exist: the spec has keys 0 to 12": (P.columns([1, 13]), {}),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_what_does_not_fit_the_spec_is_refused(reason):
    pattern, options = UNFIT[reason]
    with pytest.raises(SpecError, match=reason):
        AttentionSpec(seq_len=13, heads=4, head_dim=4, pattern=~pattern | P.causal(), **options)


# mask(fn)

_source = np.random.default_rng(0)


def noisy(h, q, k):
    return (_source.random(np.broadcast_shapes(np.shape(q), np.shape(k))) < 0.5) & (q == q) & (k == k)


def counting():
    calls = 0

    def fn(h, q, k):
        nonlocal calls
        calls += 1
        return q >= k

    return fn


def listing():
    seen = []

    def fn(h, q, k):
        seen.append(q)
        return q >= k

    return fn


def alternating():
    calls = [0]

    def fn(h, q, k):
        calls[0] += 1
        return (q >= k) if calls[0] % 2 else (q > k)

    return fn


def writing(h, q, k):
    q += 1
    return q > k


def branching(h, q, k):
    return q >= k if h > 1 else q > k


IMPURE = {
    "gave two answers to one question.*random_blocks": noisy,
    "gave two answers to one question": alternating(),
    "changes a variable outside of it": counting(),
    "changes a variable outside": listing(),
    "writes to its arguments": writing,
    r"fails on integer arrays .*ValueError.*write & \| ~ for and, or, not": branching,
    r"fails on integer arrays .*ZeroDivisionError": lambda h, q, k: 1 / 0,
    r"fails on integer arrays .*takes 2 positional": lambda q, k: q >= k,
    "must return booleans .*; got int64": lambda h, q, k: q - k,
    "must return booleans .*; got float64": lambda h, q, k: (q >= k) * 1.0,
    "must return booleans .*; got bool": lambda h, q, k: True,
    "must return booleans .*; got NoneType": lambda h, q, k: None,
    "must return booleans .*; got list": lambda h, q, k: [True],
    r"returns booleans of shape \(2,\)": lambda h, q, k: np.array([True, False]),
    r"returns booleans of shape \(1, 4, 7, 7\)": lambda h, q, k: ((q >= k) & (h >= 0))[None],
    "asked alone and (True|False) asked together.*reductions": lambda h, q, k: k < k.max(),
    "asked alone and .* asked together": lambda h, q, k: (q >= k) & (np.size(k) > 1),
    "AxisError": lambda h, q, k: (q + k * 0) <= np.sort(k),
}


@pytest.mark.parametrize("reason", IMPURE)
def test_a_function_that_is_no_rule_for_pairs_is_refused(reason):
    with pytest.raises(SpecError, match=reason):
        AttentionSpec(seq_len=16, heads=4, head_dim=4, pattern=P.causal() & ~P.mask(IMPURE[reason]))


def test_functions_are_tried_for_open_lengths_too():
    with pytest.raises(SpecError, match="gave two answers"):
        AttentionSpec(seq_len=Dim("s", max=64), heads=4, head_dim=4, pattern=P.mask(noisy))


TABLE = np.array([0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5, 5, 5, 6])
PURE = [
    lambda h, q, k: q >= k,
    lambda h, q, k: (h % 2 == 0) | (k > 2),
    lambda h, q, k: k < 3,
    lambda h, q, k: h == 1,
    lambda h, q, k: TABLE[q] == TABLE[k],
    lambda h, q, k: (q - k) * (q - k) < 9 + h,
]


@pytest.mark.parametrize("fn", PURE)
@pytest.mark.parametrize("sizes", [(16, 16, 4), (1, 16, 1), (16, 1, 3), (5, 16, 2), (2, 2, 2)])
def test_rules_are_accepted(fn, sizes):
    seq_len, kv_len, heads = sizes
    if seq_len <= kv_len:
        P.mask(fn).check(P.Shape(seq_len, kv_len, heads))


@pytest.mark.parametrize("table", [TABLE, torch.tensor(TABLE)], ids=["numpy", "torch"])
def test_a_function_may_index_into_a_table_of_either_library(table):
    spec = AttentionSpec(
        seq_len=16, heads=2, head_dim=4, dtype="float64", pattern=P.mask(lambda h, q, k: table[q] == table[k])
    )
    plan = attnplan.compile(spec)
    sizes = np.bincount(TABLE)
    assert spec.count_pairs() == 2 * (sizes**2).sum()
    q, k, v = oracle.sample_inputs(spec, 1)
    blocks = AttentionSpec(seq_len=16, heads=2, head_dim=4, dtype="float64", pattern=P.documents(sizes.tolist()))
    torch.testing.assert_close(plan(q, k, v), oracle.dense(blocks, q, k, v)[0], rtol=1e-12, atol=1e-12)
    assert "mask" in plan.explain()


def test_trying_a_function_takes_less_than_a_millisecond():
    pattern = P.mask(lambda h, q, k: (q + 2 * k + h) % 3 != 0)
    shape = P.Shape(65_536, 65_536, 32)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        pattern.check(shape)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3
