from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from attnplan import patterns as P
from attnplan.errors import SpecError
from tests import oracle
from tests import strategies as some

SHAPE = P.Shape(seq_len=9, kv_len=12, heads=4)


def expected(pattern, shape):
    positions = np.arange(shape.seq_len)[None].repeat(shape.batch, 0) + shape.shift
    return oracle.member(pattern, heads=shape.heads, positions=positions, kv_len=shape.kv_len)


def evaluated(pattern, shape, convert=lambda array: array):
    """Evaluate ``pairs`` batch element by batch element over arrays of some library."""
    h = convert(np.arange(shape.heads).reshape(-1, 1, 1))
    q = convert(np.arange(shape.seq_len).reshape(-1, 1) + shape.shift)
    k = convert(np.arange(shape.kv_len))
    size = (shape.heads, shape.seq_len, shape.kv_len)
    parts = []
    for b in range(shape.batch):
        tables = {name: convert(t[min(b, len(t) - 1)]) for name, t in pattern.tables(shape).items()}
        parts.append(np.broadcast_to(np.asarray(pattern.pairs(tables, h, q, k)), size))
    return np.stack(parts)


class Row:
    """A table ``[batch or 1, length]`` indexed by position, for one batch element that may be a vmapped scalar."""

    def __init__(self, table, b):
        self.table, self.b = table, b % len(table)

    def __getitem__(self, position):
        return self.table[self.b, position]


def vmapped(pattern, shape):
    tables = {name: torch.as_tensor(t) for name, t in pattern.tables(shape).items()}

    def mask_mod(b, h, q, k):
        return pattern.pairs({name: Row(t, b) for name, t in tables.items()}, h, q + shape.shift, k)

    return create_mask(mask_mod, shape.batch, shape.heads, shape.seq_len, shape.kv_len, device="cpu").numpy()


@given(st.data())
def test_one_definition_serves_numpy_torch_and_vmap(data):
    shape = data.draw(some.shapes())
    pattern = data.draw(some.patterns(shape, masks=True)).bind(shape.heads)
    pattern.check(shape)
    want = expected(pattern, shape)
    np.testing.assert_array_equal(evaluated(pattern, shape), want)
    np.testing.assert_array_equal(evaluated(pattern, shape, torch.as_tensor), want)
    np.testing.assert_array_equal(vmapped(pattern, shape), want)


@pytest.mark.parametrize(
    "pattern",
    [
        P.full(), P.causal(), P.window(2), P.window(1, 3), P.window(0), P.band(None, 2), P.band(3, None), P.segments(5),
        P.dilated(5, 2, 1), P.dilated(7, 3, "interleave"), P.dilated(7, 3, "block"), P.heads(1, 3), P.sinks(3),
        P.global_tokens(2), P.global_tokens([3, 7, 11]), P.global_tokens([0, 5]), P.documents([5, 1, 6]),
        P.padding([7]),
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("shape", [SHAPE, P.Shape(12, 12, 4), P.Shape(1, 12, 5)], ids=str)
def test_every_atom_matches_its_docstring(pattern, shape):
    bound = pattern.bind(shape.heads)
    np.testing.assert_array_equal(evaluated(bound, shape), expected(bound, shape))


@pytest.mark.parametrize("pattern", [P.full(), P.dilated(5, 2, 1), P.sinks(3), P.global_tokens([3, 7]), P.padding([7])])
def test_queries_before_the_first_key_belong_to_no_segment(pattern):
    shape = P.Shape(seq_len=20, kv_len=12, heads=1)
    np.testing.assert_array_equal(evaluated(pattern, shape), expected(pattern, shape))


@given(st.data())
def test_text_form_reads_back_to_an_equal_pattern(data):
    shape = data.draw(some.shapes())
    pattern = data.draw(st.one_of(some.patterns(shape, runtime=True), some.mixtures(shape, runtime=True)))
    assert P.parse(repr(pattern)) == pattern
    assert hash(P.parse(repr(pattern))) == hash(pattern)


@given(st.data())
def test_bound_patterns_read_back_too(data):
    shape = data.draw(some.shapes())
    for branch in data.draw(some.mixtures(shape)).branches(shape.heads):
        assert P.parse(repr(branch)) == branch


@given(st.data())
def test_algebra_obeys_the_laws_of_sets(data):
    shape = data.draw(some.shapes())
    a, b, c = (data.draw(some.patterns(shape)).bind(shape.heads) for _ in range(3))

    def same(x, y):
        np.testing.assert_array_equal(evaluated(x, shape), evaluated(y, shape))

    same(~(a & b), ~a | ~b)
    same(a & (b | c), (a & b) | (a & c))
    same(a | (a & b), a)
    same(a & P.full(), a)
    same(a | ~a, P.full())
    assert not evaluated(a & ~a, shape).any()
    assert ~~a == a
    assert (a & b) & c == a & (b & c)
    assert (a | b) | c == a | (b | c)


@given(st.data())
def test_heads_with_one_key_are_treated_alike(data):
    shape = data.draw(some.shapes())
    pattern = data.draw(some.patterns(shape)).bind(shape.heads)
    pairs = expected(pattern, shape)
    keys = [pattern.head_key(h) for h in range(shape.heads)]
    for a in range(shape.heads):
        for b in range(a):
            assert keys[a] != keys[b] or (pairs[:, a] == pairs[:, b]).all()


def test_equal_patterns_are_equal_and_hash_alike():
    assert P.window(3) == P.window(3, 3) == P.band(3, 3)
    assert P.causal() == P.band(None, 0)
    assert P.full() == P.band(None, None)
    assert P.global_tokens(3) == P.global_tokens([2, 0, 1])
    assert P.segments(8) == P.dilated(8, 1) == P.dilated(8, 1, "interleave") == P.dilated(8, 1, "block", heads=4)
    assert hash(P.documents([3, 4])) == hash(P.documents((3, 4)))
    assert P.window(3) != P.window(3, 4)


def test_a_mask_equals_itself_only():
    def fn(h, q, k):
        return q >= k

    assert P.mask(fn) == P.mask(fn)
    assert hash(P.mask(fn)) == hash(P.mask(fn))
    assert P.mask(fn) != P.mask(lambda h, q, k: q >= k)


def test_bind_fills_in_heads_everywhere_and_keeps_what_needs_none():
    unbound = P.window(2) | ~(P.dilated(8, 3, "block") & P.causal())
    assert repr(unbound.bind(4)) == 'window(2) | ~(dilated(8, 3, offset="block", heads=4) & causal())'
    plain = P.window(2) & ~P.segments(4)
    assert plain.bind(4) is plain
    assert unbound.bind(4).bind(8) == unbound.bind(4)


def test_mixture_branches_follow_the_docstrings():
    assert P.grouped([8, 16, 32], [1, 2, 4]).ranges(8) == ((0, 3), (3, 6), (6, 8))
    assert P.grouped([8, 16, 32], [1, 2, 4]).ranges(2) == ((0, 1), (1, 2), (2, 2))
    assert P.longnet([8, 16], [1, 2], mix="lse-detached").rule == "lse-detached"
    assert (P.grouped([8], [1]).rule, P.grouped([8], [1], mix="mean").rule) == ("lse", "mean")
    assert P.mix([P.full()], rule="sum", weights=[2]).weights == (2.0,)


@given(st.data())
def test_mixture_branches_match_the_oracle(data):
    spec = data.draw(some.specs(masks=True))
    values = data.draw(some.operands(spec))
    if spec.q_offset or spec.operands:
        return
    for branch, want in zip(spec.branches, oracle.branch_masks(spec, values, spec.batch), strict=True):
        np.testing.assert_array_equal(evaluated(branch, spec.shape), want)


def test_mixtures_are_restricted_from_either_side():
    mixture = P.longnet([8, 16], [1, 2])
    assert mixture & P.causal() == P.causal() & mixture
    assert (mixture & P.causal() & P.window(3)).where == P.causal() & P.window(3)
    assert mixture & P.full() == mixture
    assert (mixture & (P.causal() | P.sinks(1))).where == P.causal() | P.sinks(1)


def test_operands_are_found_inside():
    assert (P.window(2) & ~P.documents()).operands == {"documents"}
    assert (P.mix([P.padding(), P.full()]) & P.documents()).operands == {"documents", "key_padding"}
    assert P.documents([4]).operands == frozenset()


BAD_PATTERNS = {
    "window left must be an int, got 2.0": lambda: P.window(2.0),
    "window left must be an int, got True": lambda: P.window(True),
    "window left must be at least 0, got -1": lambda: P.window(-1),
    "window right must be at least 0, got -2": lambda: P.window(1, -2),
    "window right must be an int, got 'x'": lambda: P.band(None, "x"),
    "segment length must be at least 1, got 0": lambda: P.segments(0),
    "dilation rate must be at least 1": lambda: P.dilated(4, 0),
    "dilation rate 5 exceeds its segment length 4": lambda: P.dilated(4, 5),
    "unknown dilation offset 'interleaved'; did you mean 'interleave'": lambda: P.dilated(4, 2, "interleaved"),
    "dilation offset must be an int, got None": lambda: P.dilated(4, 2, None),
    "dilation offset must be at least 0": lambda: P.dilated(4, 2, -1),
    "dilation offset 7 must be below the rate 4; use 3": lambda: P.dilated(8, 4, 7),
    "dilation offset 4 must be below the rate 4; use 0": lambda: P.dilated(8, 4, 4),
    "number of heads of a dilation must be at least 1": lambda: P.dilated(8, 4, "block", heads=0),
    'offset="block" depends on the number of heads': lambda: P.dilated(8, 4, "block").offset_of(0),
    "first head must be at least 0": lambda: P.heads(-1, 2),
    r"last head \+ 1 must be at least 3": lambda: P.heads(3, 2),
    "number of sinks must be at least 1": lambda: P.sinks(0),
    "number of global tokens must be at least 1": lambda: P.global_tokens(0),
    "number of global tokens must be an int": lambda: P.global_tokens(True),
    "a global token's position must be at least 0": lambda: P.global_tokens([-1, 3]),
    "a global token's position must be an int": lambda: P.global_tokens([1.5]),
    r"distinct positions, at least one; got \[2, 2\]": lambda: P.global_tokens([2, 2]),
    r"distinct positions, at least one; got \[\]": lambda: P.global_tokens([]),
    "document length must be at least 1": lambda: P.documents([3, 0]),
    "document length must be an int": lambda: P.documents([1.5]),
    "document lengths must not be empty": lambda: P.documents([]),
    "padding length must be at least 0": lambda: P.padding([-1]),
    "padding lengths must not be empty": lambda: P.padding([]),
    "mask needs a function": lambda: P.mask(3),
}


@pytest.mark.parametrize("message", BAD_PATTERNS)
def test_an_impossible_pattern_says_why(message):
    with pytest.raises(SpecError, match=message):
        BAD_PATTERNS[message]()


BAD_MIXTURES = {
    r"must pair up, at least one of each; got \[8\] and \[1, 2\]": lambda: P.longnet([8], [1, 2]),
    r"must pair up, at least one of each; got \[\]": lambda: P.grouped([], []),
    "are the two swapped": lambda: P.longnet([1, 2], [8, 16]),
    "dilation rate 16 exceeds its segment length 8": lambda: P.longnet([8, 8], [1, 16]),
    "segment_lengths must be a list of ints, got 8": lambda: P.longnet(8, [1]),
    "dilation_rates must be a list of ints, got '12'": lambda: P.grouped([8], "12"),
    "each of segment_lengths must be at least 1, got 0": lambda: P.longnet([0], [1]),
    "each of dilation_rates must be an int": lambda: P.longnet([8], [1.0]),
    "unknown longnet offset 'blok'; did you mean 'block'": lambda: P.longnet([8], [1], offset="blok"),
    "unknown longnet mix 'avg'; known: lse": lambda: P.longnet([8], [1], mix="avg"),
    "unknown grouped mix 'sum'; known: mean, none": lambda: P.grouped([8], [1], mix="sum"),
    "unknown mix rule 'lse-detach'; did you mean": lambda: P.mix([P.full()], rule="lse-detach"),
    "at least one pattern, and patterns only; got": lambda: P.mix([]),
    "patterns only; got": lambda: P.mix([P.full(), 3]),
    "patterns only": lambda: P.mix([P.longnet([8], [1])]),
    r"needs a list of patterns, got one pattern: mix\(\[causal": lambda: P.mix(P.causal()),
    'weights go with rule="sum" only, got rule="mean"': lambda: P.mix([P.full()], rule="mean", weights=[1]),
    "one weight per pattern: 2 weights for 1 patterns": lambda: P.mix([P.full()], rule="sum", weights=[1, 2]),
    "weights must be finite numbers, got": lambda: P.mix([P.full()], rule="sum", weights=[float("nan")]),
    "weights must be finite numbers": lambda: P.mix([P.full()], rule="sum", weights=["a"]),
    "a mixture has no union": lambda: P.longnet([8], [1]) | P.causal(),
    r"no union.*join patterns with \|": lambda: P.causal() | P.longnet([8], [1]),
    "a mixture has no complement": lambda: ~P.longnet([8], [1]),
}


@pytest.mark.parametrize("message", BAD_MIXTURES)
def test_an_impossible_mixture_says_why(message):
    with pytest.raises(SpecError, match=message):
        BAD_MIXTURES[message]()


@pytest.mark.parametrize(
    ("pattern", "shape", "message"),
    [
        (P.heads(2, 5), SHAPE, r"heads\(2, 5\) names heads that do not exist: the spec has heads=4"),
        (P.sinks(13), SHAPE, r"sinks\(13\) needs 13 keys, the spec has 12"),
        (P.global_tokens([12]), SHAPE, "global token 12 does not exist: the spec has positions 0 to 11"),
        (P.documents([3, 8]), SHAPE, "document lengths sum to 11, but the keys are 12"),
        (P.documents(), P.Shape(13, 12, 1), "seq_len=13 exceeds kv_len=12"),
        (P.padding([3, 4]), SHAPE, "padding has 2 lengths for batch=1"),
        (P.padding([13]), SHAPE, "padding length 13 exceeds the 12 keys"),
        (P.dilated(8, 2, "block", heads=3), SHAPE, "spreads its offsets over 3 heads, the spec has heads=4"),
    ],
)
def test_a_pattern_that_does_not_fit_the_sizes_says_why(pattern, shape, message):
    for wrapped in (pattern, P.causal() & pattern, P.causal() | pattern, ~pattern):
        with pytest.raises(SpecError, match=message):
            wrapped.check(shape)
    with pytest.raises(SpecError, match=message):
        P.mix([P.full(), pattern]).check(shape)


@pytest.mark.parametrize("fn", [lambda h, q, k: True, lambda h, q, k: q - k, lambda h, q, k: None])
def test_a_mask_that_returns_no_booleans_says_so(fn):
    with pytest.raises(SpecError, match="must return booleans computed from its integer arguments h, q, k; got"):
        evaluated(P.mask(fn), SHAPE)


@pytest.mark.parametrize("other", [3, "causal()", None, [P.causal()]])
def test_joining_with_something_else_is_a_type_error(other):
    for join in (lambda: P.causal() & other, lambda: P.causal() | other, lambda: other & P.longnet([8], [1])):
        with pytest.raises(TypeError):
            join()


UNREADABLE = {
    "": "cannot read the pattern",
    "window(": "cannot read the pattern",
    "\0": "cannot read the pattern",
    "windw(3)": "unknown pattern 'windw'; did you mean 'window'",
    "zzz(3)": "unknown pattern 'zzz'; known: a_shape, band, bigbird, block_window, blocks, causal",
    "causal": r"'causal' is a function: write causal\(...\)",
    "causal() & 5": r"'causal\(\) & 5' joins something that is not a pattern",
    "causal() + causal()": "is not part of the pattern algebra",
    "longnet([8], [1]) & longnet([8], [1])": "joins something that is not a pattern",
    "~5": "'5' is not a pattern",
    "5": "'5' is not a pattern; write one such as",
    "'causal()'": "is not a pattern",
    "[causal()]": "is not a pattern",
    "window()": "missing 1 required positional argument",
    "window(left=1, wide=2)": "unexpected keyword argument 'wide'",
    "window(**{'left': 1})": "unexpected keyword argument",
    "window(-1)": "window left must be at least 0",
    "mix(5)": "not iterable",
    "mask(5)": "mask.fn. holds a Python function and has no text form",
    "window(2 ** 70)": "is not part of the pattern algebra",
    "__import__('os').system('true')": "is not part of the pattern algebra",
    "__import__('os')": "unknown pattern '__import__'",
    "causal.__globals__": "is not part of the pattern algebra",
    "causal().pairs": "is not part of the pattern algebra",
    "causal().pairs(1, 2)": "is not part of the pattern algebra",
    "(lambda: causal())()": "is not part of the pattern algebra",
    "mix([causal() for _ in [1]])": "is not part of the pattern algebra",
    "causal() if 1 else full()": "is not part of the pattern algebra",
    "window(open('/etc/passwd'))": "unknown pattern 'open'",
    "window(f'{3}')": "is not part of the pattern algebra",
    "window(x := 3)": "is not part of the pattern algebra",
    "window(*[3])": "is not part of the pattern algebra",
    "import os": "cannot read the pattern",
    "causal(); full()": "cannot read the pattern",
}


@pytest.mark.parametrize("text", UNREADABLE)
def test_parse_refuses_what_is_no_pattern_and_runs_nothing(text):
    with pytest.raises(SpecError, match=UNREADABLE[text]):
        P.parse(text)


@pytest.mark.parametrize("text", ["~" * 5000 + "causal()", " & ".join(["causal()"] * 900), "(" * 5000 + ")" * 5000])
def test_parse_refuses_very_deep_text_with_a_short_message(text):
    with pytest.raises(SpecError, match="cannot read the pattern") as caught:
        P.parse(text)
    assert len(str(caught.value)) < 300


@given(st.text(alphabet="()[]{}&|~,=*'\"0123456789 abcdefglmnosuw_.:", max_size=40))
def test_parse_raises_spec_errors_only(text):
    with suppress(SpecError):
        P.parse(text)


def test_parse_reads_precedence_as_python_does():
    assert P.parse("causal() | window(1) & sinks(2)") == P.causal() | (P.window(1) & P.sinks(2))
    assert P.parse(" ~causal() & sinks(2)\n") == ~P.causal() & P.sinks(2)
    assert P.parse("longnet((8, 16), dilation_rates=[1, 2])") == P.longnet([8, 16], [1, 2])
