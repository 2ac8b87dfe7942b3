"""Block tables against brute force: every pair of every tile, and closed forms where brute force cannot go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnplan import patterns as P
from attnplan.errors import SpecError
from attnplan.patterns.counts import count_pairs
from attnplan.patterns.tiles import BlockTable, Grid, block_table, kept_tiles
from attnplan.patterns.tiles import table as tables
from attnplan.patterns.tiles.boxes import best_boxes, boxed_table, kept_boxes, visiting_order
from attnplan.patterns.tiles.runs import EMPTY, FULL, MAYBE, Runs
from attnplan.patterns.tiles.states import runs
from tests import strategies as own

RELAXED = settings(deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(RELAXED, max_examples=600)


def brute(pattern: P.Pattern, shape: P.Shape, b: int, h: int, operands: dict[str, Any] | None = None) -> np.ndarray:
    """Every pair of one batch element and head, straight from the definition."""
    raw = {**pattern.tables(shape), **(operands or {})}
    tables = {name: t[min(b, t.shape[0] - 1)] for name, t in raw.items()}
    q = np.arange(shape.seq_len)[:, None] + shape.shift
    k = np.arange(shape.kv_len)[None]
    return np.broadcast_to(pattern.pairs(tables, np.array(h), q, k), (shape.seq_len, shape.kv_len))


def padded(mask: np.ndarray, grid: Grid) -> np.ndarray:
    full = np.zeros((grid.rows * grid.tile[0], grid.columns * grid.tile[1]), dtype=bool)
    full[: mask.shape[0], : mask.shape[1]] = mask
    return full.reshape(grid.rows, grid.tile[0], grid.columns, grid.tile[1]).swapaxes(1, 2)


def check(table: BlockTable, number: int, mask: np.ndarray) -> None:
    """Compare one class of a table with a mask, tile by tile."""
    grid = table.grid
    tiles = padded(mask, grid)
    size = padded(np.ones_like(mask), grid).sum(axis=(2, 3))
    found = tiles.sum(axis=(2, 3))
    states = np.where(found == size, FULL, np.where(found > 0, MAYBE, EMPTY))
    np.testing.assert_array_equal(table.states(number), states)
    for row in range(grid.rows):
        here = table.row(number, row)
        columns = table.column[here]
        np.testing.assert_array_equal(columns, np.flatnonzero(found[row]))
        np.testing.assert_array_equal(table.pairs[here], found[row][columns])
        assert table.masks is not None
        for column, kind in zip(columns, table.kind[here], strict=True):
            if kind:
                np.testing.assert_array_equal(table.masks[kind - 1], tiles[row, column])


BLOCKY = """
strided(1); strided(3); strided(7); columns([0,2,3]); columns([1],every=3); columns([0,4,5],every=6);
block_window(1,2); block_window(5,1); block_window(4,0,2); random_blocks(0.3,block_size=3);
random_blocks(count=2,block_size=7,seed=3); neighborhood(3); neighborhood(2,dilation=3); neighborhood(4,causal=True)
""".split(";")  # noqa: SIM905


@st.composite
def grids(draw: st.DrawFn) -> tuple[P.Pattern, P.Shape]:
    """A neighbourhood on a grid or a volume, or a layout, and a shape that it fits."""
    heads = draw(st.integers(1, 3))
    if draw(st.booleans()):
        sizes = draw(st.lists(st.integers(2, 7), min_size=2, max_size=3))
        dilation = [draw(st.integers(1, 2)) for _ in sizes]
        kernel = [draw(st.integers(1, n // d)) for n, d in zip(sizes, dilation, strict=True)]
        causal = [draw(st.booleans()) for _ in sizes]
        n = int(np.prod(sizes))
        return P.neighborhood(kernel, dilation, sizes, causal), P.Shape(draw(st.integers(1, n)), n, heads)
    kv_len = draw(st.integers(1, 40))
    block = draw(st.lists(st.integers(1, 12), min_size=2, max_size=2))
    high, wide = (-(-kv_len // b) for b in block)
    seed = np.random.default_rng(draw(st.integers(0, 99)))
    layout = seed.random((heads, high, wide)) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    return P.blocks(layout, block), P.Shape(draw(st.integers(1, kv_len)), kv_len, heads)


@st.composite
def cases(draw: st.DrawFn) -> tuple[P.Pattern, P.Shape, tuple[int, int]]:
    if draw(st.booleans()):
        pattern, shape = draw(grids())
        other = draw(own.patterns(shape))
        pattern = draw(st.sampled_from([pattern, pattern & other, pattern | other, ~pattern])).bind(shape.heads)
    else:
        shape = draw(own.shapes(longest=40))
        shape = P.Shape(shape.seq_len, max(shape.kv_len, 6), shape.heads, shape.batch)
        atoms = [own.closed_atoms(shape), own.table_atoms(shape), st.sampled_from(own.MASKS)]
        if shape.seq_len <= shape.kv_len:
            atoms.append(st.sampled_from([P.parse(text.strip()) for text in BLOCKY]))
        pattern = draw(own.combined(st.one_of(atoms))).bind(shape.heads)
    return pattern, shape, (draw(st.integers(1, 17)), draw(st.integers(1, 17)))


@given(cases())
@MANY
def test_tables_and_counts_equal_brute_force(case: tuple[P.Pattern, P.Shape, tuple[int, int]]) -> None:
    pattern, shape, tile = case
    table = block_table(pattern, shape, tile, masks=True)
    total = 0
    for b in range(shape.batch):
        for h in range(shape.heads):
            mask = brute(pattern, shape, b, h)
            total += int(mask.sum())
            check(table, int(table.classes[min(b, len(table.classes) - 1), h]), mask)
    assert table.count_pairs() * (shape.batch // len(table.classes)) == total


SINGLY = """
full(); causal(); window(5); window(0); window(4, 9); band(None, -3); band(7, -2); segments(7); dilated(9, 2, 1);
dilated(11, 3, "interleave"); heads(1, 3); sinks(7); sinks(1); global_tokens(6); global_tokens([0, 4, 5, 19]);
documents([6, 1, 12, 4]); padding([9]); columns([0, 3, 11]); columns([1, 2], every=5); block_window(5, 1);
blocks("1010/0110/1001/1111", 6); blocks("101/011", [12, 8]); random_blocks(0.4, 5); neighborhood(5);
neighborhood(3, dilation=2); neighborhood(4, causal=True); strided(3); strided(23)
""".split(";")  # noqa: SIM905


@pytest.mark.parametrize("text", [text.strip() for text in SINGLY])
def test_equal_signatures_are_equal_tiles(text: str) -> None:
    """Beside a condition that no rule knows every tile is asked: two of one signature must be alike."""
    pattern = P.parse(text).bind(4)
    for shape in (P.Shape(23, 23, heads=4), P.Shape(31, 11, heads=4)):
        if fits(pattern, shape):
            sides = (pattern, pattern & P.strided(2), pattern | P.strided(3), ~pattern & P.strided(2))
            for joined in sides:
                for tile in ((4, 4), (3, 5), (8, 2), (1, 7), (23, 6)):
                    table = block_table(joined, shape, tile, masks=True)
                    for h in range(4):
                        check(table, int(table.classes[0, h]), brute(joined, shape, 0, h))


def fits(pattern: P.Pattern, shape: P.Shape) -> bool:
    try:
        pattern.check(shape)
    except SpecError:
        return False
    return True


@given(cases())
@settings(RELAXED, max_examples=60)
def test_tables_built_in_small_blocks_are_the_same(case: tuple[P.Pattern, P.Shape, tuple[int, int]]) -> None:
    pattern, shape, tile = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_TILES_AT_ONCE", 5)
        patch.setattr(tables, "_ROWS_AT_ONCE", 3)
        patch.setattr(tables, "_PAIRS_AT_ONCE", 40)
        table = block_table(pattern, shape, tile, masks=True)
    for h in range(shape.heads):
        check(table, int(table.classes[0, h]), brute(pattern, shape, 0, h))


@given(cases())
@settings(RELAXED, max_examples=150)
def test_what_rules_say_without_asking_is_true(case: tuple[P.Pattern, P.Shape, tuple[int, int]]) -> None:
    pattern, shape, tile = case
    grid = Grid.of(shape, tile)
    raw = pattern.tables(shape)
    tables = {name: t[0] for name, t in raw.items()}
    found = runs(pattern, grid, np.arange(grid.rows), 0, tables)
    claimed = np.zeros((grid.rows, grid.columns), dtype=int)
    row, column, state = found.tiles()
    claimed[row, column] = state
    mask = brute(pattern, shape, 0, 0)
    tiles, size = padded(mask, grid).sum(axis=(2, 3)), padded(np.ones_like(mask), grid).sum(axis=(2, 3))
    assert (tiles[claimed == EMPTY] == 0).all()
    assert (tiles == size)[claimed == FULL].all()
    assert kept_tiles(pattern, shape, grid, [0]) >= (tiles > 0).sum()


@given(cases(), st.data())
@settings(RELAXED, max_examples=150)
def test_a_table_over_some_rows_and_keys_is_that_part(
    case: tuple[P.Pattern, P.Shape, tuple[int, int]], data: st.DataObject
) -> None:
    pattern, shape, tile = case
    q0, k0 = (data.draw(st.integers(0, n - 1)) for n in (shape.seq_len, shape.kv_len))
    queries, keys = data.draw(st.integers(1, shape.seq_len - q0)), data.draw(st.integers(1, shape.kv_len - k0))
    grid = Grid(q0 + shape.shift, queries, k0, keys, tile)
    table = block_table(pattern, shape, grid=grid, heads=[shape.heads - 1], masks=True)
    mask = brute(pattern, shape, 0, shape.heads - 1)[q0 : q0 + queries, k0 : k0 + keys]
    check(table, 0, mask)


@given(st.data())
@settings(RELAXED, max_examples=200)
def test_operands_stand_for_tables(data: st.DataObject) -> None:
    shape = data.draw(own.shapes(longest=40))
    pattern = data.draw(own.patterns(shape, runtime=True)).bind(shape.heads)
    lengths = data.draw(own.cuts(shape.kv_len))
    operands = {
        "documents": np.repeat(np.arange(len(lengths)) * 2, lengths)[None],  # an empty document between any two
        "key_padding": np.array(
            [data.draw(st.lists(st.integers(0, 1), min_size=shape.kv_len, max_size=shape.kv_len)) for _ in range(2)]
        )[: shape.batch],
    }
    given_ = {name: operands[name] for name in pattern.operands}
    table = block_table(pattern, shape, (4, 3), given_, masks=True)
    for b in range(len(table.classes)):
        check(table, int(table.classes[b, 0]), brute(pattern, shape, b, 0, given_))


ROWS = st.lists(st.lists(st.sampled_from([EMPTY, MAYBE, FULL]), min_size=7, max_size=7), min_size=1, max_size=5)


def dense(found: Runs) -> np.ndarray:
    states = np.zeros((found.rows, found.columns), dtype=int)
    row, column, state = found.tiles()
    states[row, column] = state
    return states


@given(ROWS, ROWS)
@RELAXED
def test_runs_combine_like_their_states(left: list[list[int]], right: list[list[int]]) -> None:
    rows = min(len(left), len(right))
    a, b = np.array(left[:rows]), np.array(right[:rows])
    x, y = Runs.dense(a), Runs.dense(b)
    np.testing.assert_array_equal(dense(x & y), np.minimum(a, b))
    np.testing.assert_array_equal(dense(x | y), np.maximum(a, b))
    np.testing.assert_array_equal(dense(~x), 2 - a)
    assert (x & y).kept() == (np.minimum(a, b) > 0).sum()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)), max_size=8))
@RELAXED
def test_ranges_that_overlap_become_runs(ranges: list[tuple[int, int, int]]) -> None:
    expected = np.zeros((4, 9), dtype=int)
    for row, first, stop in ranges:
        expected[row, first:stop] = MAYBE
    row, first, stop = (np.array([r[i] for r in ranges], dtype=np.int64) for i in range(3))
    np.testing.assert_array_equal(dense(Runs.maybe(4, 9, row, first, stop)), expected)


LONG = P.Shape(1_048_576, 1_048_576, heads=1)


@pytest.mark.parametrize(
    "pattern",
    [
        P.window(4096) & P.causal(),
        P.window(4096, 0) | P.global_tokens(1024),
        P.segments(3000) & P.causal(),
        P.documents([1000, 47_576, 1_000_000]) & P.window(700),
        P.sinks(5) & ~P.window(3),
    ],
    ids=repr,
)
def test_a_million_tokens_count_as_their_closed_form(pattern: P.Pattern) -> None:
    assert block_table(pattern, LONG).count_pairs() == count_pairs(pattern, LONG)


def test_only_distinct_tiles_are_asked() -> None:
    table = block_table(P.causal() & P.window(4096), LONG)
    assert table.asked <= 64 * 128 * 128  # the diagonal and the far end of the window, once for each block of rows
    assert len(table.column) == 33 * 8192 - 32 * 33 // 2


def test_too_large_a_table_is_refused_with_its_size() -> None:
    shape = P.Shape(1_048_576, 1_048_576, heads=32)
    with pytest.raises(SpecError, match=r"needs \d+ tiles in 16 class\(es\) of heads, 832 MiB; the limit is 256 MiB"):
        block_table(P.dilated(65_536, 16, offset="interleave"), shape)
    with pytest.raises(SpecError, match="asks over 4294967296 pairs one by one"):
        block_table(P.mask(lambda h, q, k: q >= k), P.Shape(131_072, 131_072, heads=1), max_bytes=2**30)
    with pytest.raises(SpecError, match=r"depend on what arrives with the call \(documents\)"):
        block_table(P.documents(), shape)
    with pytest.raises(SpecError, match="tile must be at least 1"):
        block_table(P.causal(), shape, (0, 128))


@st.composite
def boxed(draw: st.DrawFn) -> tuple[P.Pattern, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A neighbourhood on a grid, and boxes of queries and keys that divide it."""
    sizes = draw(st.lists(st.sampled_from([2, 3, 4, 6, 8]), min_size=2, max_size=3))
    dilation = [draw(st.integers(1, 2)) for _ in sizes]
    kernel = [draw(st.integers(1, n // d)) for n, d in zip(sizes, dilation, strict=True)]
    causal = [draw(st.booleans()) for _ in sizes]
    boxes = [tuple(draw(st.sampled_from([b for b in range(1, n + 1) if n % b == 0])) for n in sizes) for _ in range(2)]
    return P.neighborhood(kernel, dilation, sizes, causal), tuple(sizes), *boxes


@given(boxed())
@settings(RELAXED, max_examples=100)
def test_tables_of_boxes_equal_brute_force(case: Any) -> None:
    pattern, sizes, queries, keys = case
    n = int(np.prod(sizes))
    table = boxed_table(pattern, queries, keys)
    mask = brute(pattern, P.Shape(n, n, 1), 0, 0)
    check(table, 0, mask[visiting_order(sizes, queries)][:, visiting_order(sizes, keys)])
    assert kept_boxes(pattern, queries, keys) == len(table.column)
    assert table.count_pairs() == mask.sum()


def test_boxes_run_fewer_pairs_than_strips() -> None:
    pattern = P.neighborhood(7, shape=[256, 256])
    found = best_boxes(pattern, (128, 64))
    assert found is not None
    queries, keys, kept = found
    assert (int(np.prod(queries)), int(np.prod(keys))) == (128, 64)
    shape = P.Shape(65_536, 65_536, heads=1)
    assert 1.8 * kept < kept_tiles(pattern, shape, Grid.of(shape, (128, 64)), [0])
    assert best_boxes(P.neighborhood(7), (128, 64)) is None, "one dimension has no boxes"
    assert best_boxes(P.neighborhood(3, shape=[4, 5000]), (128, 64)) is None, "too long a dimension"


@pytest.mark.slow
@given(cases())
@settings(RELAXED, max_examples=10_000)
def test_ten_thousand_combinations_equal_brute_force(case: tuple[P.Pattern, P.Shape, tuple[int, int]]) -> None:
    test_tables_and_counts_equal_brute_force.hypothesis.inner_test(case)  # type: ignore[attr-defined]
