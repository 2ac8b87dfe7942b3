"""Pictures against what they show: block tables tile by tile, costs op by op, graphs node by node."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
import time
import tracemalloc
from xml.etree import ElementTree

import attrs
import numpy as np
import pytest
from click.testing import CliRunner

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cli import main
from attnplan.cost import resolve
from attnplan.errors import AttnPlanError, SpecError
from attnplan.patterns.tiles import Grid, block_table

pytest.importorskip("matplotlib")
image = pytest.importorskip("PIL.Image")

from attnplan import pictures  # noqa: E402
from attnplan.pictures import cells as cells_module  # noqa: E402
from attnplan.pictures import style  # noqa: E402
from attnplan.pictures.cells import EMPTY, FULL, PARTIAL, UNDECIDED, branch_cells, looks, region_grid  # noqa: E402
from attnplan.pictures.graph import layers  # noqa: E402
from attnplan.pictures.length import default_lengths, length_curves  # noqa: E402
from attnplan.pictures.mask import caption, composed, mask_panels  # noqa: E402
from attnplan.pictures.roofline import _Label, _spread, roofline_points  # noqa: E402

LONGNET = AttentionSpec(
    seq_len=16_384, heads=12, head_dim=64, pattern=P.longnet([1024, 4096, 16_384], [1, 4, 16]), causal=True
)
MILLION = AttentionSpec(
    seq_len=1_000_000,
    heads=12,
    head_dim=64,
    pattern=P.longnet([2048 << i for i in range(10)], [1 << i for i in range(10)]),
    causal=True,
)
SVG = "{http://www.w3.org/2000/svg}"


def svg_of(figure):
    return pictures.inline_svg(figure, "x", "a picture")


def ids(svg):
    return [e.get("id", "") for e in ElementTree.fromstring(svg).iter()]


def words(svg):
    return [e.text for e in ElementTree.fromstring(svg).iter(f"{SVG}text") if e.text]


def pixels(svg):
    """Return the raster images of a picture, RGBA."""
    found = re.findall(r'xlink:href="data:image/png;base64,([^"]+)"', svg)
    return [np.array(image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")) for data in found]


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


# --------------------------------------------------------------------------------------------------------- roofline


@pytest.fixture(scope="module")
def plan():
    return attnplan.compile(LONGNET, "h100", backend="eager", strategy="lattice")


@pytest.fixture(scope="module")
def tiled():
    """A plan that gathers tiles: its copies are no part of a kernel's own traffic."""
    spec = AttentionSpec(seq_len=8192, heads=4, head_dim=64, pattern=P.window(512) | P.strided(512), causal=True)
    return attnplan.compile(spec, "h100", backend="eager", strategy="blocks")


@pytest.mark.parametrize("name", ["plan", "tiled"])
def test_the_roofline_has_one_point_for_each_op_that_costs_something(name, request):
    plan = request.getfixturevalue(name)
    if name == "tiled":
        assert any(op.cost.copied for op in plan.predicted.ops)
    costly = [op for op in plan.predicted.ops if op.seconds > 0]
    assert len(costly) >= (6 if name == "plan" else 1)
    points = roofline_points(plan)
    assert [p.id for p in points] == [op.node for op in costly]
    assert sum(p.share for p in points) == pytest.approx(1)
    for point, op in zip(points, costly, strict=True):
        moved = op.cost.bytes + op.cost.copied
        assert point.intensity == pytest.approx(op.cost.flops / moved)
        assert point.rate == pytest.approx((op.cost.flops or moved) / op.seconds)
    drawn = [i for i in ids(svg_of(pictures.roofline_figure(plan))) if i.startswith("x-op-")]
    assert sorted(drawn) == sorted(f"x-op-{op.node}" for op in costly)


def test_points_stand_at_their_figures_and_under_the_ceilings(plan):
    figure = pictures.roofline_figure(plan)
    peak, bandwidth = plan.device.rate("bfloat16"), plan.device.bandwidth
    at = {c.get_gid(): c.get_offsets()[0] for axes in figure.axes for c in axes.collections if c.get_gid()}
    for point in roofline_points(plan):
        x, y = at[f"op-{point.id}"]
        assert y == pytest.approx(point.rate)
        if point.intensity:
            assert x == pytest.approx(point.intensity)
            assert y <= min(peak, x * bandwidth) * 1.0001
        else:
            assert y <= bandwidth * 1.0001
    roof = next(line for line in figure.axes[0].lines if line.get_gid() == "roof")
    (x0, x1, _), (y0, y1, y2) = roof.get_xdata(), roof.get_ydata()
    assert (y0 / x0, y1, y2) == (pytest.approx(bandwidth), pytest.approx(peak), pytest.approx(peak))
    assert x1 == pytest.approx(peak / bandwidth)


@pytest.mark.parametrize("spec", [LONGNET, MILLION, AttentionSpec(seq_len=4096, heads=8, head_dim=128)], ids=repr)
def test_labels_of_the_roofline_do_not_overlap_and_name_every_op(spec):
    from matplotlib.text import Text

    plan = attnplan.compile(spec, "h100")
    figure = pictures.roofline_figure(plan)
    figure.draw_without_rendering()
    named = 0
    for axes in figure.axes:
        labels = [t for t in axes.texts if t.get_text().startswith("%")]
        boxes = [Text.get_window_extent(t) for t in labels]  # without their lines
        for i, a in enumerate(boxes):
            assert figure.bbox.x1 >= a.x1
            for b in boxes[:i]:
                assert a.y0 >= b.y1 - 2 or a.y1 <= b.y0 + 2 or a.x0 >= b.x1 or a.x1 <= b.x0
        texts = [t.get_text().split(" ") for t in labels]
        named += sum(sum(w.startswith("%") and len(w) > 1 for w in t) for t in texts)
        named += sum(int(w) for t in texts for w in t if w.startswith("+"))
    assert named == len(roofline_points(plan))


@pytest.mark.parametrize(
    ("given", "spread"),
    [([0, 0, 0], [0, 10, 20]), ([100, 100, 100], [80, 90, 100]), ([50, 52, 70], [50, 60, 70]), ([300], [100])],
)
def test_labels_are_spread_between_two_bounds(given, spread):
    labels = [_Label("", (float(i), 0.0), float(y)) for i, y in enumerate(given)]
    _spread(labels, gap=10, low=0, high=100)
    assert [label.y for label in labels] == spread


# ----------------------------------------------------------------------------------------------------------- length


def test_curves_are_what_a_plan_predicts_at_each_length():
    target = resolve("h100")
    curves = length_curves(LONGNET, target, [4096, 16_384])
    for length in (4096, 16_384):
        plan = attnplan.compile(attrs.evolve(LONGNET, seq_len=length, kv_len=length), "h100")
        at = {c.name: dict(zip(c.lengths, zip(c.seconds, c.fits, strict=True), strict=True)) for c in curves}
        for candidate in plan.candidates:
            if candidate.prediction is not None:
                seconds, fits = at[candidate.name][length]
                assert seconds == candidate.prediction.seconds
                assert fits == (not candidate.reasons)
            else:
                [curve] = [c for c in curves if c.name == candidate.name]
                assert dict(curve.refused)[length] == candidate.reasons[0]
    assert curves[0].name == f"{plan.strategy} > {plan.backend} ({plan.schedule})"  # the fastest comes first


def test_every_candidate_that_can_run_is_drawn_and_refusals_are_noted():
    target = resolve("h100")
    curves = [c for c in length_curves(LONGNET, target) if c.lengths]
    svg = svg_of(pictures.length_figure(LONGNET, target))
    assert len([i for i in ids(svg) if i.startswith("x-curve-")]) == len(curves)
    text = words(svg)
    assert all(c.name in text for c in curves)
    assert any("refused: FlashAttention-2 takes no mask" in t for t in text)
    assert any(not fits for c in curves for fits in c.fits) == any(t.startswith("hollow") for t in text)
    assert not any("refused" in t for t in words(svg_of(pictures.length_figure(LONGNET, target, refusals=False))))


def test_lengths_are_halved_and_doubled():
    assert default_lengths(AttentionSpec(seq_len=300, heads=1, head_dim=8)) == [150, 300, 600, 1200]
    decode = AttentionSpec(seq_len=1, kv_len=512, heads=1, head_dim=64)
    [curve, *_] = [c for c in length_curves(decode, resolve("h100")) if c.lengths]
    assert curve.lengths == (128, 256, 512, 1024, 2048)


def test_a_pattern_that_fixes_its_length_has_no_curve():
    spec = AttentionSpec(seq_len=64, heads=1, head_dim=8, pattern=P.documents([32, 32]))
    with pytest.raises(SpecError, match="no other length can be planned: document lengths sum to 64"):
        pictures.length_figure(spec, resolve("cpu"))


# ------------------------------------------------------------------------------------------------------------ graph


def test_the_graph_has_every_node_and_every_operand(plan):
    svg = svg_of(pictures.graph_figure(plan.graph))
    found = ids(svg)
    assert sorted(i for i in found if i.startswith("x-node-")) == sorted(f"x-node-{n.id}" for n in plan.graph)
    edges = sorted(f"x-edge-{a}-{n.id}-{i}" for n in plan.graph for i, a in enumerate(n.args))
    assert sorted(i for i in found if i.startswith("x-edge-")) == edges
    assert {str(n.type) for n in plan.graph} <= set(words(svg))


def test_operands_come_from_the_left(plan):
    column = {n: i for i, layer in enumerate(layers(plan.graph)) for n in layer}
    assert sorted(column) == [n.id for n in plan.graph]
    assert all(column[a] < column[n.id] for n in plan.graph for a in n.args)


def test_boxes_do_not_overlap_and_hold_their_labels(plan):
    figure = pictures.graph_figure(plan.graph)
    [axes] = figure.axes
    boxes = {p.get_gid(): p.get_window_extent() for p in axes.patches if (p.get_gid() or "").startswith("node-")}
    for name, a in boxes.items():
        assert not any(a.overlaps(b) for other, b in boxes.items() if other != name)
    for label in axes.texts[1:] if not axes.texts[0].get_text() else axes.texts:
        if label.get_text():
            extent = label.get_window_extent()
            assert any(b.x0 <= extent.x0 and extent.x1 <= b.x1 + 1 for b in boxes.values() if b.overlaps(extent))


def test_a_graph_that_cannot_be_read_is_refused(plan, monkeypatch):
    monkeypatch.setattr("attnplan.pictures.graph.MAX_NODES", len(plan.graph) - 1)
    with pytest.raises(SpecError, match=r"has \d+ nodes, a picture shows up to \d+"):
        pictures.graph_figure(plan.graph)


# ------------------------------------------------------------------------------------------------- files and the CLI

FLAGS = ("--seq-len", "512", "--heads", "2", "--head-dim", "64", "--pattern", "window(64)", "--causal")


def draw(*arguments):
    return CliRunner().invoke(main, ["draw", *map(str, arguments)])


@pytest.mark.parametrize("what", ["mask", "roofline", "length", "graph"])
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_draw_writes_every_picture(what, kind, tmp_path):
    paths = [tmp_path / f"{i}.{kind}" for i in range(2)]
    for path in paths:
        result = draw(*FLAGS, "--device", "h100", "--what", what, "-o", path)
        assert (result.exit_code, result.output) == (0, f"wrote {path}\n")
    assert paths[0].read_bytes() == paths[1].read_bytes()  # equal input, equal bytes
    if kind == "png":
        with image.open(paths[0]) as picture:
            assert min(picture.size) > 300
    else:
        assert ElementTree.parse(paths[0]).getroot().tag == f"{SVG}svg"


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        (("--zoom", 4), ((192, 320), (320, 192))),
        (("--rows", "100:200"), ((100, 200), (200, 100))),
        (("--rows", ":256", "--keys", "0:0.125k"), ((0, 128), (256, 0))),
    ],
)
def test_draw_zooms(options, limits, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: seen.append(figure))
    assert draw(*FLAGS, *options, "-o", tmp_path / "a.png").exit_code == 0
    [axes] = seen[0].axes
    assert (axes.get_xlim(), axes.get_ylim()) == limits


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("-o", "a.pdf"), 2, "written to a .png or .svg file, got 'a.pdf'"),
        (("-o", "a.png", "--what", "ring"), 3, "ring execution is not in this version"),
        (("-o", "a.png", "--what", "graph", "--tile", "8"), 2, "--tile belongs to --what mask, not to --what graph"),
        (("-o", "a.png", "--backend", "eager"), 2, "--backend belongs to --what roofline or graph"),
        (("-o", "a.png", "--lengths", "1k"), 2, "--lengths belongs to --what length"),
        (("-o", "a.png", "--rows", "5"), 2, "--rows is a range such as 0:4k, got '5'"),
        (("-o", "a.png", "--zoom", "2", "--rows", "0:4"), 2, "give one of them"),
        (("-o", "a.png", "--head", "7"), 2, "head 7 does not exist"),
        (("-o", "/nowhere/a.png"), 2, "cannot write '/nowhere/a.png': No such file or directory"),
    ],
)
def test_draw_refuses_in_words(options, code, message):
    result = draw(*FLAGS, *options)
    assert result.exit_code == code
    assert message in result.output


@pytest.mark.parametrize("command", [("draw", "-o", "a.png"), ("report", "-o", "a.html")])
def test_without_matplotlib_the_command_that_installs_it_is_named(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(main, [*command, *FLAGS])
    assert result.exit_code == 2
    assert "pip install 'attnplan[plot]'" in result.output
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AttnPlanError, match="matplotlib"):
        pictures.mask_figure(LONGNET)


def test_drawing_loads_matplotlib_late_and_never_pyplot(tmp_path):
    code = f"""
import sys, attnplan.pictures, attnplan.report
assert "matplotlib" not in sys.modules
spec = attnplan.AttentionSpec(seq_len=8, heads=1, head_dim=8)
attnplan.pictures.save(attnplan.pictures.mask_figure(spec), {str(tmp_path / "a.svg")!r})
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_text_and_never_formulas_or_markup(plan):
    hostile = attrs.evolve(plan.device, title=r"$\frac{$ <b>&amp;</b> 机")
    made = attnplan.plan.Plan.__new__(type(plan))
    made.__dict__ = {**plan.__dict__, "device": hostile}
    assert any(hostile.title in w for w in words(svg_of(pictures.roofline_figure(made))))


@pytest.mark.parametrize("what", ["mask", "roofline", "length", "graph"])
def test_an_inline_picture_takes_the_colours_of_its_page(plan, what):
    figure = {
        "mask": lambda: pictures.mask_figure(LONGNET),
        "roofline": lambda: pictures.roofline_figure(plan),
        "length": lambda: pictures.length_figure(LONGNET, plan.target),
        "graph": lambda: pictures.graph_figure(plan.graph),
    }[what]()
    svg = svg_of(figure)
    assert "var(--ink)" in svg
    assert "var(--muted)" in svg
    for colour in (style.INK, style.MUTED, style.LINE, style.PAPER, "#ffffff", "#000000"):
        assert colour not in svg  # on a dark page neither white boxes nor black text
    named = [i for i in ids(svg) if i]
    assert all(i.startswith("x-") for i in named)
    used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
    assert used <= set(named)
    assert used or what == "graph"
