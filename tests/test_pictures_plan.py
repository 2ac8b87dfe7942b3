"""Pictures of plans against their figures: the roofline op by op, time length by length, the graph node by node."""

from __future__ import annotations

import attrs
import pytest

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cost import resolve
from attnplan.errors import SpecError
from tests.conftest import ROOT
from tests.drawn import LONGNET, MILLION, ids, svg_of, words

pytest.importorskip("matplotlib")

from attnplan import pictures
from attnplan.pictures.graph import layers
from attnplan.pictures.length import default_lengths, length_curves
from attnplan.pictures.roofline import _Label, _spread, roofline_points
from attnplan.pictures.style import DPI


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


EXAMPLE = attrs.evolve(AttentionSpec.from_file(ROOT / "examples" / "longnet.toml"), dtype="bfloat16")


@pytest.mark.parametrize(
    "spec", [LONGNET, MILLION, EXAMPLE, AttentionSpec(seq_len=4096, heads=8, head_dim=128)], ids=repr
)
def test_labels_of_the_roofline_do_not_overlap_and_name_every_op(spec):
    from matplotlib.text import Text

    plan = attnplan.compile(spec, "h100")
    figure = pictures.roofline_figure(plan)
    figure.set_dpi(DPI)  # as it is saved
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
    assert any(t.endswith("predicted (calibrated elsewhere)") for t in text)
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
