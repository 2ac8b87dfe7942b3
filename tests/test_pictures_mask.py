"""Pictures of masks against block tables, tile by tile and pair by pair."""

from __future__ import annotations

import re
import time
import tracemalloc

import attrs
import numpy as np
import pytest

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.errors import SpecError
from attnplan.patterns.tiles import Grid, block_table
from tests.drawn import LONGNET, MILLION, pixels, svg_of, words

pytest.importorskip("matplotlib")

from attnplan import pictures
from attnplan.pictures import cells as cells_module
from attnplan.pictures import style
from attnplan.pictures.cells import EMPTY, FULL, PARTIAL, UNDECIDED, branch_cells, looks, region_grid
from attnplan.pictures.mask import caption, composed, mask_panels


def brute(pattern, shape, head):
    tables = {name: t[0] for name, t in pattern.tables(shape).items()}
    q, k = np.arange(shape.seq_len)[:, None] + shape.shift, np.arange(shape.kv_len)[None]
    return np.broadcast_to(pattern.pairs(tables, np.array(head), q, k), (shape.seq_len, shape.kv_len))


# ------------------------------------------------------------------------------------------------------------ cells

PATTERNS = [
    P.full(),
    P.causal(),
    P.causal() & P.window(7),
    P.window(5) | P.sinks(3),
    P.dilated(16, 4, offset="interleave") & P.causal(),
    P.global_tokens([0, 9, 30]) | P.window(2),
    P.documents([10, 1, 26]) & P.causal(),
    P.heads(0, 1) & P.segments(8),
    P.mask(lambda h, q, k: (q + 2 * k + h) % 5 == 0),
    ~P.window(3),
]
REGIONS = [(None, None, 4), (None, None, None), ((3, 31), (0, 37), 5), ((30, 31), (5, 6), 1), ((0, 11), (20, 37), 37)]


def expected(pattern, shape, head, rows, keys, tile):
    """The states and shares of a region, pair by pair."""
    met = brute(pattern, shape, head)[slice(*rows or (None,)), slice(*keys or (None,))]
    high, wide = (-(-n // tile) for n in met.shape)
    state, share = np.zeros((high, wide), dtype=int), np.zeros((high, wide))
    for r in range(high):
        for c in range(wide):
            part = met[r * tile : (r + 1) * tile, c * tile : (c + 1) * tile]
            state[r, c] = FULL if part.all() else PARTIAL if part.any() else EMPTY
            share[r, c] = part.mean()
    return state, share


def without_address(pattern):
    return re.sub(r" at 0x[0-9a-f]+", "", str(pattern))


@pytest.mark.parametrize("region", REGIONS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=without_address)
@pytest.mark.parametrize("seq_len", [37, 31])
def test_cells_are_what_the_pairs_say(pattern, region, seq_len):
    shape = P.Shape(seq_len, 37, heads=3)
    rows, keys, tile = region
    if rows is not None and rows[1] > seq_len:
        rows = (rows[0], seq_len)
    grid = region_grid(shape, rows, keys, tile)
    for head in (0, 2):
        found = branch_cells(pattern.bind(3), shape, grid, head)
        state, share = expected(pattern.bind(3), shape, head, rows, keys, grid.tile[0])
        np.testing.assert_array_equal(found.state, state)
        np.testing.assert_allclose(found.share, share, rtol=1e-6)
        assert found.sampled == 0


@pytest.mark.parametrize("pattern", PATTERNS, ids=without_address)
def test_sampled_cells_claim_nothing_wrong(pattern, monkeypatch):
    monkeypatch.setattr(cells_module, "MAX_ASKED", 1)
    shape = P.Shape(300, 37 if pattern.tables(P.Shape(37, 37, 1)) else 300, heads=3)
    shape = attrs.evolve(shape, seq_len=min(shape.seq_len, shape.kv_len))
    grid = region_grid(shape, tile=64 if shape.kv_len > 64 else 16)
    found = branch_cells(pattern.bind(3), shape, grid, 1)
    state, _ = expected(pattern.bind(3), shape, 1, None, None, grid.tile[0])
    assert set(np.unique(state[found.state == FULL])) <= {FULL}
    assert set(np.unique(state[found.state == EMPTY])) <= {EMPTY}
    assert set(np.unique(state[found.state == PARTIAL])) <= {PARTIAL, FULL}
    assert found.sampled == int(((found.state == PARTIAL) | (found.state == UNDECIDED)).sum())
    if (state == PARTIAL).any():
        assert found.sampled > 0


def test_a_huge_dilated_branch_is_sampled_and_the_picture_says_so():
    spec = attrs.evolve(MILLION, seq_len=40_000_000, kv_len=40_000_000)
    [panel] = mask_panels(spec, head=5)
    assert max(c.state.size for c in panel.branches) <= 512**2
    assert sum(c.sampled for c in panel.branches) > 0
    assert "sampled" in caption(spec, [panel])[0]
    assert all((c.state == PARTIAL).sum() > 100 for c in panel.branches)  # dilation is met by neighbouring lines


def test_of_a_batch_the_first_element_is_drawn_and_the_picture_says_so():
    spec = AttentionSpec(seq_len=64, heads=1, head_dim=8, batch=2, pattern=P.padding([10, 64]))
    [panel] = mask_panels(spec)
    assert panel.branches[0].count(FULL) == 64 * 10
    assert caption(spec, [panel])[-1] == "batch element 0"


def test_of_equally_many_tiles_the_denser_are_on_top():
    spec = AttentionSpec(seq_len=64, heads=1, head_dim=8, pattern=P.longnet([64, 64], [1, 4]))
    tints = style.colours(2)
    [panel] = mask_panels(spec, tile=8)
    drawn = composed(panel, tints)
    assert (drawn[..., :3] == [int(tints[0][i : i + 2], 16) for i in (1, 3, 5)]).all()
    assert (drawn[..., 3] == 255).all()


def test_what_sampling_does_not_find_is_left_undecided_and_drawn_grey(monkeypatch):
    monkeypatch.setattr(cells_module, "MAX_ASKED", 1)
    spec = AttentionSpec(seq_len=640, heads=1, head_dim=8, pattern=P.mask(lambda h, q, k: (q == 3) & (k == 3)))
    [panel] = mask_panels(spec, tile=64)
    assert panel.branches[0].count(PARTIAL) == 1
    assert panel.branches[0].count(UNDECIDED) == 99
    svg = svg_of(pictures.mask_figure(spec, tile=64))
    [drawn] = pixels(svg)
    grey = [int(style.MUTED[i : i + 2], 16) for i in (1, 3, 5)]
    assert ((drawn[..., :3] == grey).all(axis=-1) & (drawn[..., 3] > 0)).sum() == 99
    assert "mask: 0 full, 1 partial, 0 empty, 99 undecided" in words(svg)


def test_a_million_tokens_take_little_memory_and_time():
    tracemalloc.start()
    start = time.perf_counter()
    [panel] = mask_panels(MILLION)
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 * 2**20  # a byte for each pair of the whole mask would be a terabyte
    assert seconds < 30
    assert all(c.sampled == 0 for c in panel.branches)
    shape = MILLION.shape
    for cells, branch in zip(panel.branches, MILLION.branches, strict=True):
        table = block_table(branch, shape, grid=Grid.of(shape, (2048, 2048)), heads=[0])
        assert cells.count(FULL) == int(table.full.sum())
        assert cells.count(PARTIAL) == len(table.column) - int(table.full.sum())


def test_heads_that_look_alike_are_drawn_once():
    grouped = AttentionSpec(seq_len=512, heads=5, head_dim=8, pattern=P.grouped([64, 512], [1, 2], mix="none"))
    assert [(p.head, p.alike) for p in mask_panels(grouped)] == [(0, (0, 1, 2)), (3, (3, 4))]
    assert [p.head for p in mask_panels(LONGNET)] == [0]
    assert [p.head for p in mask_panels(grouped, head="all")] == [0, 1, 2, 3, 4]
    assert [p.head for p in mask_panels(grouped, head=4)] == [4]
    [_, other] = mask_panels(grouped)
    assert [c.count(EMPTY) == c.state.size for c in other.branches] == [True, False]  # only its own branch
    assert looks(grouped.branches, grouped.shape) == {0: [0, 1, 2], 3: [3, 4]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": 12}, r"head 12 does not exist: the spec has heads 0..11"),
        ({"head": "some"}, r'"auto" or "all"'),
        ({"rows": (5, 5)}, r"rows 5:5 is no range inside 0:16384"),
        ({"keys": (0, 20_000)}, r"keys 0:20000 is no range"),
        ({"tile": 1}, r"tiles of 1 make 16384 x 16384 cells.*at least 16"),
    ],
)
def test_impossible_masks_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        mask_panels(LONGNET, **options)


# ------------------------------------------------------------------------------------------------------------- mask


@pytest.mark.parametrize("pattern", [P.window(1000) | P.sinks(70), P.segments(512), P.dilated(4096, 8)], ids=str)
def test_as_many_cells_are_drawn_as_the_table_has(pattern):
    spec = AttentionSpec(seq_len=5000, heads=2, head_dim=8, pattern=pattern, causal=True)
    svg = svg_of(pictures.mask_figure(spec, tile=64))
    [drawn] = pixels(svg)
    table = block_table(spec.branches[0], spec.shape, (64, 64), heads=[0])
    full, partial = int(table.full.sum()), int((~table.full).sum())
    assert drawn.shape[:2] == (79, 79)
    assert (drawn[..., 3] == 255).sum() == full
    assert ((drawn[..., 3] > 0) & (drawn[..., 3] < 255)).sum() == partial
    assert f"mask: {full:,} full, {partial:,} partial, {79**2 - full - partial:,} empty" in words(svg)
    state = table.states(0)
    np.testing.assert_array_equal(drawn[..., 3] == 255, state == 2)  # each at its place
    np.testing.assert_array_equal(drawn[..., 3] == 0, state == 0)


def test_each_branch_has_its_colour_and_the_smaller_lies_on_top():
    tints = style.colours(3)
    svg = svg_of(pictures.mask_figure(LONGNET, tile=64))
    [drawn] = pixels(svg)
    left = np.ones(drawn.shape[:2], dtype=bool)
    for branch, tint in zip(LONGNET.branches, tints, strict=True):  # from the shortest segment to the longest
        kept = block_table(branch, LONGNET.shape, (64, 64), heads=[0]).states(0) > 0
        rgb = [int(tint[i : i + 2], 16) for i in (1, 3, 5)]
        np.testing.assert_array_equal((drawn[..., :3] == rgb).all(axis=-1) & (drawn[..., 3] > 0), kept & left)
        left &= ~kept
    assert (drawn[left][:, 3] == 0).all()


def test_partial_cells_are_darker_where_more_pairs_meet():
    [panel] = mask_panels(AttentionSpec(seq_len=64, heads=1, head_dim=8, pattern=P.sinks(3)), tile=8)
    [other] = mask_panels(AttentionSpec(seq_len=64, heads=1, head_dim=8, pattern=P.sinks(7)), tile=8)
    few, many = (int(composed(p, ["#0000ff"])[0, 0, 3]) for p in (panel, other))
    assert 0.2 * 255 <= few < many <= 0.7 * 255 + 1


def test_a_region_is_drawn_where_it_lies():
    spec = AttentionSpec(seq_len=900, kv_len=1000, heads=1, head_dim=8, causal=True)
    figure = pictures.mask_figure(spec, rows=(100, 300), keys=(150, 450), tile=50)
    [axes] = figure.axes
    assert axes.get_xlim() == (150, 450)
    assert axes.get_ylim() == (300, 100)
    [picture] = axes.get_images()
    assert tuple(picture.get_extent()) == (150, 450, 300, 100)
    drawn = picture.get_array()
    # row 100 is at position 200: the tile of the keys 150..199 is full, that of 200..249 has the diagonal
    assert drawn[0, :, 3].tolist()[0] == 255
    assert 0 < drawn[0, 1, 3] < 255
    assert drawn[0, 2, 3] == 0


def test_what_arrives_with_the_call_counts_as_met():
    spec = AttentionSpec(seq_len=128, heads=1, head_dim=8, pattern=P.window(16) & P.documents(), causal=True)
    svg = svg_of(pictures.mask_figure(spec))
    assert "counted as met, since they arrive with the call: documents" in words(svg)
    [panel] = mask_panels(spec)
    assert panel.branches[0].count(FULL) == attrs.evolve(spec, pattern=P.window(16)).count_pairs()
