"""Ranges of keys by row: in every partial tile they say what the tile's mask says, or there are too many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnplan import patterns as P
from attnplan.patterns import Shape
from attnplan.patterns.tiles import block_table
from attnplan.runtime.row_bounds import row_bounds

SHAPES = st.builds(Shape, st.integers(9, 40), st.integers(9, 40), st.just(3), st.just(1))
RANGED = st.one_of(
    st.builds(P.window, st.integers(0, 9), st.integers(0, 9)),
    st.builds(lambda n, g: P.window(n) | P.global_tokens(g), st.integers(0, 9), st.integers(1, 9)),
    st.builds(lambda n, g: P.causal() & (P.window(n) | P.sinks(g)), st.integers(0, 9), st.integers(1, 4)),
    st.builds(lambda n, d: (P.heads(0, 2) & P.window(n)) | (P.heads(2, 3) & P.segments(d)), *[st.integers(1, 9)] * 2),
)
ANY = st.one_of(
    RANGED,
    st.builds(P.strided, st.integers(1, 9)),
    st.builds(lambda n, d: P.window(n) & P.strided(d), st.integers(0, 9), st.integers(1, 4)),
    st.builds(lambda d, s: P.random_blocks(d, 3, s) | P.window(2), st.floats(0.05, 1), st.integers(0, 5)),
)
TILES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def runs(row):
    """Return the number of runs of True."""
    return int((np.diff(np.concatenate([[False], row])) & row).sum())


def pairs_of(table, number):
    """Return (what masks say, whether a mask is asked) of all pairs of one class of heads."""
    tall, wide = table.grid.tile
    seen = np.zeros((table.grid.rows * tall, table.grid.columns * wide), dtype=bool)
    asked = np.zeros_like(seen)
    for row in range(table.grid.rows):
        line = number * table.grid.rows + row
        for i in range(table.row_ptr[line], table.row_ptr[line + 1]):
            if table.kind[i]:
                at = np.s_[row * tall : (row + 1) * tall, table.column[i] * wide : (table.column[i] + 1) * wide]
                seen[at], asked[at] = table.masks[table.kind[i] - 1], True
    return seen, asked


@settings(max_examples=150, deadline=None)
@given(ANY, SHAPES, TILES)
def test_bounds_say_what_masks_say(pattern, shape, tile):
    table = block_table(pattern, shape, tile, masks=True)
    bounds = row_bounds(table)
    for number in range(int(table.classes.max()) + 1):
        seen, asked = pairs_of(table, number)
        if bounds is None:
            continue
        first, behind = bounds[number, :, ::2, None], bounds[number, :, 1::2, None]
        key = np.arange(seen.shape[1])
        found = ((key >= first) & (key < behind)).any(1)
        assert (found[asked] == seen[asked]).all()
    if bounds is None:
        each = [pairs_of(table, n) for n in range(int(table.classes.max()) + 1)]
        most = max(runs(row[where]) for seen, asked in each for row, where in zip(seen, asked, strict=True))
        assert most > 2, "where the masks of a row lie side by side, it has more than two ranges"


@settings(max_examples=60, deadline=None)
@given(RANGED, SHAPES, TILES)
def test_windows_and_globals_have_bounds(pattern, shape, tile):
    assert row_bounds(block_table(pattern, shape, tile, masks=True)) is not None


def test_whole_tiles_between_two_partial_ones_end_no_range():
    table = block_table(P.window(300) | P.global_tokens(128), Shape(2048, 2048, 1, 1), (128, 128), masks=True)
    bounds = row_bounds(table)[0]
    assert bounds[1000].tolist() == [700, 1301, 0, 0], "the first tile is whole: the bounds do not count it"
    assert bounds[350].tolist() == [512, 651, 0, 0], "a range begins in the first partial tile of its row"
    assert not bounds[:128].any(), "the tiles of global rows are whole"


@pytest.mark.parametrize(("pattern", "found"), [(P.strided(2), False), (P.window(3) & P.strided(2), False)])
def test_rows_of_many_ranges_have_none(pattern, found):
    table = block_table(pattern, Shape(32, 32, 1, 1), (16, 16), masks=True)
    assert (row_bounds(table) is not None) is found
