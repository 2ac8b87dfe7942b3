"""Every preset against the definition in its paper, written out as a rule for one (head, query, key) at a time."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import attnplan
from attnplan import patterns as P
from attnplan.errors import SpecError
from attnplan.patterns.counts import Table, count_pairs
from attnplan.spec import AttentionSpec
from tests import oracle
from tests.oracle_atoms import neighbors_of, splitmix
from tests.running import Call, assert_agree

ROOT = Path(__file__).resolve().parent.parent
HEADS = 5


def drawn(pattern, n, heads=HEADS, seq_len=None):
    """Return what ``pairs`` says, ``[heads, S, K]``."""
    shape = P.Shape(seq_len or n, n, heads)
    pattern = pattern.bind(heads)
    pattern.check(shape)
    tables = {name: Table(t) for name, t in pattern.tables(shape).items()}
    h, q, k = np.arange(heads).reshape(-1, 1, 1), np.arange(shape.seq_len)[:, None] + shape.shift, np.arange(n)
    found = pattern.pairs(tables, h, q, k)
    return np.broadcast_to(found, (1, heads, shape.seq_len, n))[0]


def ruled(rule, n, heads=HEADS):
    """Return what a rule says, pair by pair."""
    result = np.zeros((heads, n, n), dtype=bool)
    for h in range(heads):
        for i in range(n):
            for j in range(n):
                result[h, i, j] = rule(h, i, j, n)
    return result


def chosen_blocks(seed, row, total, count):
    """Return the random key blocks of one row of blocks: the definition in the docstring of random_blocks."""
    golden, word = 0x9E3779B97F4A7C15, 2**64
    own = splitmix((splitmix((seed + golden) % word) + (row + 1) * golden) % word)
    return sorted(range(total), key=lambda j: splitmix((own + (j + 1) * golden) % word))[:count]


def longformer(w, dilation, tokens):
    return lambda h, i, j, n: j in [i + s * dilation for s in range(-w, w + 1)] or i in tokens or j in tokens


def bigbird(block, window, tokens, count, seed):
    def rule(h, i, j, n):
        row, column, total = i // block, j // block, -(-n // block)
        near = column in range(row - window // 2, row + window // 2 + 1)
        return near or i < tokens or j < tokens or column in chosen_blocks(seed, row, total, count(total))

    return rule


def streaming(sinks, recent):
    """Cache size of the paper: ``recent`` keys, the query's own among them."""
    return lambda h, i, j, n: j <= i and (j in range(sinks) or j in range(i - recent + 1, i + 1))


def strided(length):
    def rule(h, i, j, n):
        first = set(range(max(0, i - length), i + 1))
        second = {k for k in range(i + 1) if (i - k) % length == 0}
        return j in first | second

    return rule


def fixed(length, c):
    def rule(h, i, j, n):
        first = {k for k in range(i + 1) if k // length == i // length}
        second = {k for k in range(i + 1) if k % length in range(length - c, length)}
        return j in first | second

    return rule


def chunked(size):
    def rule(h, i, j, n):
        return any(i in range(s, s + size) and j in range(s, s + size) for s in range(0, n, size))

    return rule


def prefix_lm(prefix):
    return lambda h, i, j, n: j <= i or (i < prefix and j < prefix)


def vertical_slash(vertical, slash):
    return lambda h, i, j, n: j <= i and (j in vertical or any(j == i - s for s in slash))


def longlora(group, heads):
    """The second half of the heads groups positions as if the sequence began half a group earlier."""

    def rule(h, i, j, n):
        ahead = group // 2 if h >= heads // 2 else 0
        return (i + ahead) // group == (j + ahead) // group

    return rule


def along(size, kernel, dilation=1, causal=False):
    return lambda x, y: y in neighbors_of(x, size, kernel, dilation, causal)


def grid2(height, width, rows, columns):
    return lambda h, i, j, n: rows(i // width, j // width) and columns(i % width, j % width)


CASES = {
    "longformer": (lambda n: P.longformer(3), longformer(3, 1, [])),
    "longformer, global": (lambda n: P.longformer(2, global_tokens=3), longformer(2, 1, [0, 1, 2])),
    "longformer, listed": (lambda n: P.longformer(1, [0, 4, 11]), longformer(1, 1, [0, 4, 11])),
    "longformer, dilated": (lambda n: P.longformer(2, [1], dilation=3), longformer(2, 3, [1])),
    "bigbird": (lambda n: P.bigbird(4, 3, 1, 2), bigbird(4, 3, 4, lambda total: 2, 0)),
    "bigbird, default count": (lambda n: P.bigbird(2, 1, 2), bigbird(2, 1, 4, lambda total: 3, 0)),
    "bigbird, share": (
        lambda n: P.bigbird(3, 5, 0, random_keep=0.4, seed=9),
        bigbird(3, 5, 0, lambda total: max(1, int(0.4 * total + 0.5)), 9),
    ),
    "bigbird, none random": (lambda n: P.bigbird(3, 3, 2, 0), bigbird(3, 3, 6, lambda total: 0, 0)),
    "streaming": (lambda n: P.streaming(2, 3), streaming(2, 4)),
    "a_shape": (lambda n: P.a_shape(4, 0), streaming(4, 1)),
    "strided": (lambda n: P.sparse_transformer(4), strided(4)),
    "strided by one": (lambda n: P.sparse_transformer(1), strided(1)),
    "fixed": (lambda n: P.sparse_transformer(5, kind="fixed", expressivity=2), fixed(5, 2)),
    "fixed, every position": (lambda n: P.sparse_transformer(4, "fixed", 4), fixed(4, 4)),
    "fixed, default": (lambda n: P.sparse_transformer(9, kind="fixed"), fixed(9, 8)),
    "chunked": (lambda n: P.chunked(5), chunked(5)),
    "prefix_lm": (lambda n: P.prefix_lm(7), prefix_lm(7)),
    "vertical_slash": (
        lambda n: P.vertical_slash([0, 5, 6, 11], [0, 1, 4, 5, 6, 9]),
        vertical_slash([0, 5, 6, 11], [0, 1, 4, 5, 6, 9]),
    ),
    "verticals": (lambda n: P.vertical_slash(vertical=[3, 4]), vertical_slash([3, 4], [])),
    "slashes": (lambda n: P.vertical_slash(slash=[2, 8]), vertical_slash([], [2, 8])),
    "longlora": (lambda n: P.longlora(4, HEADS, n), longlora(4, HEADS)),
    "longlora, one group": (lambda n: P.longlora(64, HEADS, n), longlora(64, HEADS)),
    "neighborhood": (lambda n: P.neighborhood(5), lambda h, i, j, n: along(n, 5)(i, j)),
    "neighborhood, dilated": (lambda n: P.neighborhood(3, dilation=4), lambda h, i, j, n: along(n, 3, 4)(i, j)),
}  # fmt: skip


@pytest.mark.parametrize("n", [12, 17, 23])
@pytest.mark.parametrize("name", CASES)
def test_a_preset_is_what_its_paper_says(name, n):
    build, rule = CASES[name]
    pattern, want = build(n), ruled(rule, n)
    np.testing.assert_array_equal(drawn(pattern, n), want)
    assert want.any()
    assert count_pairs(pattern, P.Shape(n, n, HEADS)) == want.sum()
    assert P.parse(repr(pattern)) == pattern
    lower = np.tril(np.ones((n, n), dtype=bool))
    if name != "prefix_lm":
        np.testing.assert_array_equal(drawn(pattern & P.causal(), n), want & lower)
    np.testing.assert_array_equal(drawn(pattern, n, seq_len=5), want[:, -5:])


GRIDS = {
    "square kernel": (P.neighborhood(3, shape=[4, 6]), 24, grid2(4, 6, along(4, 3), along(6, 3))),
    "even kernel": (P.neighborhood([2, 4], shape=[3, 7]), 21, grid2(3, 7, along(3, 2), along(7, 4))),
    "dilated": (
        P.neighborhood([2, 3], dilation=[2, 2], shape=[5, 7]), 35, grid2(5, 7, along(5, 2, 2), along(7, 3, 2))
    ),
    "causal in time": (
        P.neighborhood([2, 3], shape=[4, 5], causal=[True, False]), 20, grid2(4, 5, along(4, 2, 1, True), along(5, 3))
    ),
    "volume": (
        P.neighborhood([2, 3, 1], dilation=[1, 1, 2], shape=[3, 4, 2], causal=[True, False, True]), 24,
        lambda h, i, j, n: along(3, 2, 1, True)(i // 8, j // 8) and along(4, 3)(i // 2 % 4, j // 2 % 4)
        and along(2, 1, 2, True)(i % 2, j % 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
def test_neighbourhoods_of_grids(name):
    pattern, n, rule = GRIDS[name]
    np.testing.assert_array_equal(drawn(pattern, n, heads=1), ruled(rule, n, heads=1))


def test_every_query_away_from_causal_borders_has_all_its_neighbours():
    found = drawn(P.neighborhood([3, 4], dilation=[2, 1], shape=[7, 9]), 63, heads=1)
    assert (found.sum(-1) == 12).all()
    found = drawn(P.neighborhood(4, causal=True), 9, heads=1)[0]
    assert found.sum(-1).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4]


def natten_start(index, length, kernel, dilation):
    """Return the first neighbour by the closed form that NATTEN's papers state for odd kernels."""
    half = kernel // 2
    if index - half * dilation < 0:
        return index % dilation
    if index + half * dilation >= length:
        residue, whole = index % dilation, length // dilation * dilation
        if residue < length - whole:
            return whole + residue - 2 * half * dilation
        return whole + residue - kernel * dilation
    return index - half * dilation


def test_the_window_starts_where_the_published_formula_says():
    from attnplan.patterns.grids import neighbors

    for length in range(3, 20):
        for dilation in range(1, length // 3 + 1):
            for kernel in range(3, length // dilation + 1, 2):
                x = np.arange(length)
                first, last = neighbors(x, length, kernel, dilation, False)
                want = [natten_start(i, length, kernel, dilation) for i in x]
                assert first.tolist() == want
                assert (last - first == (kernel - 1) * dilation).all()


def test_the_ends_of_neighbourhoods_are_neighbours():
    from attnplan.patterns.grids import neighbors

    for size in range(1, 14):
        for dilation in range(1, size + 1):
            for kernel in range(1, size // dilation + 1):
                for causal in (False, True):
                    first, last = neighbors(np.arange(size), size, kernel, dilation, causal)
                    want = [neighbors_of(x, size, kernel, dilation, causal) for x in range(size)]
                    assert list(zip(first.tolist(), last.tolist(), strict=True)) == [(w[0], w[-1]) for w in want]


@pytest.mark.parametrize("name", GRIDS)
def test_runs_are_the_neighbours(name):
    pattern, n, _ = GRIDS[name]
    found = np.zeros((n, n), dtype=bool)
    for start, stop in pattern.runs(np.arange(n), n):
        for q in range(n):
            found[q, start[q] : stop[q] : pattern.dilation[-1]] = True
    np.testing.assert_array_equal(found, drawn(pattern, n, heads=1)[0])


RUN = ["longformer, dilated", "bigbird", "streaming", "strided", "fixed", "vertical_slash", "longlora", "prefix_lm",
       "neighborhood, dilated"]  # fmt: skip


@pytest.mark.parametrize("name", RUN)
def test_a_preset_runs_forward_and_backward(name):
    n = 19
    spec = AttentionSpec(
        seq_len=n, heads=4, kv_heads=2, head_dim=4, dtype="float64",
        pattern=P.longlora(4, 4, n) if name == "longlora" else CASES[name][0](n), causal=name == "longlora",
    )  # fmt: skip
    call = Call.of(spec, batch=2)
    assert_agree(call.got(attnplan.compile(spec)), call.expected(), 1e-12, name)
    plan = attnplan.compile(spec)
    plan.verify()


@pytest.mark.parametrize("name", RUN)
def test_specs_of_presets_read_back(name):
    spec = AttentionSpec(seq_len=23, heads=HEADS, head_dim=8, pattern=CASES[name][0](23))
    assert AttentionSpec.from_text(spec.to_toml()) == spec
    assert AttentionSpec.from_text(spec.to_json(), kind="json") == spec


def test_presets_can_be_written_in_files():
    assert P.parse("longformer(256, global_tokens=4)") == P.longformer(256, 4)
    assert P.parse("heads(0, 2) & a_shape(4, 8) | heads(2, 4)") == P.heads(0, 2) & P.a_shape(4, 8) | P.heads(2, 4)


def test_causal_on_the_spec_changes_nothing_for_causal_presets():
    for pattern in (P.streaming(2, 3), P.sparse_transformer(4), P.vertical_slash([1], [0])):
        spec = AttentionSpec(seq_len=13, heads=1, head_dim=4, pattern=pattern)
        both = AttentionSpec(seq_len=13, heads=1, head_dim=4, pattern=pattern, causal=True)
        np.testing.assert_array_equal(oracle.branch_masks(spec)[0], oracle.branch_masks(both)[0])


BAD = {
    "longformer window must be at least 1, got 0": lambda: P.longformer(0),
    "longformer dilation must be at least 1, got 0": lambda: P.longformer(2, dilation=0),
    "number of global tokens must be at least 1, got -1": lambda: P.longformer(2, -1),
    "window_blocks must be odd, with the query's own block in the middle; got 2": lambda: P.bigbird(8, 2),
    "num_random_blocks or random_keep, not both": lambda: P.bigbird(8, 3, 1, 3, 0.5),
    "count of random_blocks must be at least 1, got -1": lambda: P.bigbird(8, 3, 1, -1),
    "bigbird global_blocks must be at least 0": lambda: P.bigbird(8, 3, -1),
    "number of sinks must be at least 1": lambda: P.streaming(0, 4),
    "window left must be at least 0, got -1": lambda: P.a_shape(1, -1),
    "needs at least one vertical line or one slash": lambda: P.vertical_slash(),
    "distance of a slash must be at least 0, got -3": lambda: P.vertical_slash(slash=[-3]),
    "distance of a slash must be an int, got True": lambda: P.vertical_slash(slash=[True]),
    r"distinct distances, got \[2, 2\]": lambda: P.vertical_slash(slash=[2, 2]),
    "unknown sparse_transformer kind 'fix'.*fixed": lambda: P.sparse_transformer(8, "fix"),
    "expressivity belongs to the fixed kind": lambda: P.sparse_transformer(8, expressivity=2),
    "expressivity 8 exceeds the stride 4": lambda: P.sparse_transformer(4, "fixed"),
    "sparse_transformer stride must be at least 1": lambda: P.sparse_transformer(0),
    "segment length must be at least 1": lambda: P.chunked(0),
    "prefix of prefix_lm must be at least 1": lambda: P.prefix_lm(0),
    "longlora group must be even, to be shifted by half of it; got 5": lambda: P.longlora(5, 4, 20),
    "longlora heads must be at least 2": lambda: P.longlora(4, 1, 20),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_preset_that_cannot_be_is_refused(reason):
    with pytest.raises(SpecError, match=reason):
        BAD[reason]()


def test_a_preset_that_does_not_fit_the_spec_is_refused():
    for pattern, reason in (
        (P.longlora(4, 4, 12), "document lengths sum to 12, but the keys are 13"),
        (P.longlora(4, 8, 13), "names heads that do not exist"),
        (P.prefix_lm(14), "needs 14 keys"),
        (P.bigbird(8, global_blocks=2), "global token 15 does not exist"),
        (P.vertical_slash([13]), "key 13 of columns does not exist"),
    ):
        with pytest.raises(SpecError, match=reason):
            AttentionSpec(seq_len=13, heads=4, head_dim=4, pattern=pattern)


def test_the_page_of_presets_is_up_to_date():
    found = importlib.util.spec_from_file_location("make_presets", ROOT / "docs" / "make_presets.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    assert page == module.page(), "run python docs/make_presets.py"
    presets = {n for n in P.__all__ if getattr(P, n).__module__.endswith(".presets")} | {"neighborhood"}
    assert {line[4:-1] for line in page.splitlines() if line.startswith("## `")} == presets
