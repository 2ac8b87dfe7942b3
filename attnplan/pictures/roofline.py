"""The roofline of a plan: every op that costs something, under the two ceilings of the device."""

from __future__ import annotations

from collections.abc import Sequence
from math import atan2, degrees
from typing import TYPE_CHECKING, Any

import attrs

from attnplan.explain import facts, require_one_device
from attnplan.pictures.style import CATEGORIES, INK, MUTED, PAPER, plain, shortened, styled
from attnplan.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("attend", "take", "merge", "mix")
_COLOURS = dict(zip(KINDS, CATEGORIES, strict=False))


@attrs.frozen
class Point:
    """One op under the roofline."""

    id: int
    op: str
    intensity: float
    """FLOP per byte; 0 for an op that only moves data."""
    rate: float
    """FLOP/s that the op reaches by prediction; for an op that only moves data, bytes/s."""
    share: float
    """Share of the predicted time of all ops."""
    bound: str


def roofline_points(plan: Plan) -> list[Point]:
    """Return one point for every op of a plan that is predicted to take time.

    Examples
    --------
    >>> import attnplan
    >>> spec = attnplan.AttentionSpec(seq_len=8192, heads=8, head_dim=128, causal=True)
    >>> [(p.op, p.bound) for p in roofline_points(attnplan.compile(spec, device="h100"))]
    [('attend', 'compute')]
    """
    require_one_device(plan, "a roofline")
    found = []
    total = sum(op.seconds for op in plan.predicted.ops)
    for node, op in zip(plan.graph, plan.predicted.ops, strict=True):
        moved = op.cost.bytes + op.cost.copied + op.cost.made
        if op.seconds > 0:
            rate = (op.cost.flops or moved) / op.seconds
            intensity = op.cost.flops / moved if moved else 0.0
            found.append(Point(node.id, node.op.name, intensity, rate, op.seconds / total, op.bound))
    return found


def roofline_figure(plan: Plan) -> Figure:
    """Draw the ops of a plan under the roofline of its device.

    Parameters
    ----------
    plan
        The plan. Times are its predictions.

    Returns
    -------
    matplotlib.figure.Figure
        On the left the ops that compute: FLOP per byte against FLOP/s. On the right those that only move data: bytes/s
        under the device's bandwidth. The area of a point is its share of the time.

    Raises
    ------
    AttnPlanError
        If matplotlib is missing.

    References
    ----------
    Williams, Waterman and Patterson, Roofline: An Insightful Visual Performance Model, CACM 52(4), 2009.
    """
    with styled():
        from matplotlib.figure import Figure

        points = roofline_points(plan)
        computing = [p for p in points if p.intensity > 0]
        moving = [p for p in points if p.intensity == 0]
        figure = Figure(figsize=(9.2, 4.9))
        left, right = figure.subplots(1, 2, width_ratios=(2.1, 1))
        figure.subplots_adjust(left=0.075, right=0.975, top=0.83, bottom=0.2, wspace=0.26)
        _compute_axes(left, plan, computing)
        _memory_axes(right, plan, moving)
        choice = f"{plan.strategy} > {plan.backend} ({plan.schedule})"
        figure.text(0.02, 0.97, f"{choice} on {shortened(plan.device.title, 60)}", va="top", size=10.5, weight="bold")
        _kinds(figure, points)
        basis = facts(plan)["choice"]["basis"]
        note = f"predicted ({basis}); area: share of the predicted time; work and bytes as the cost model counts them"
        figure.text(0.02, 0.025, note, size=8, color=MUTED)
        return figure


def _peak(plan: Plan) -> float:
    return plan.device.rate(plan.spec.dtype, plan.spec.precision) or plan.device.rate("float32")


def _compute_axes(axes: Axes, plan: Plan, points: Sequence[Point]) -> None:
    peak, bandwidth = _peak(plan), plan.device.bandwidth
    ridge = peak / bandwidth
    near = [ridge, *(p.intensity for p in points)]
    low, high = min(near) / 5, max(near) * 22
    bottom = min(*(p.rate for p in points), low * bandwidth, peak / 30) / 4
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, peak * 3))
    plain(axes)
    axes.plot([low, ridge, high], [low * bandwidth, peak, peak], color=INK, linewidth=1.4, gid="roof")
    axes.fill_between([low, ridge, high], [low * bandwidth, peak, peak], bottom, color=MUTED, alpha=0.06, linewidth=0)
    axes.text(high / 1.1, peak * 1.12, f"{_rate(peak, 'FLOP/s')} {plan.spec.dtype}", ha="right", va="bottom", size=8)
    start = max(low * 1.15, bottom / bandwidth * 1.3)
    (x0, y0), (x1, y1) = axes.transData.transform([(low, low * bandwidth), (ridge, peak)])
    axes.annotate(
        _rate(bandwidth, "B/s"), (start, start * bandwidth), xytext=(-1, 4), textcoords="offset points", size=8,
        rotation=degrees(atan2(y1 - y0, x1 - x0)), rotation_mode="anchor", ha="left", va="bottom",
    )  # fmt: skip
    axes.set(xlabel="FLOP per byte", ylabel="FLOP/s")
    axes.set_title("ops that compute")
    _plain_ticks(axes.xaxis, axes.yaxis)
    _scatter(axes, points, [p.intensity for p in points])
    _label(axes, points, [p.intensity for p in points], below=peak)
    if not points:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color=MUTED)


def _memory_axes(axes: Axes, plan: Plan, points: Sequence[Point]) -> None:
    bandwidth = plan.device.bandwidth
    total = sum(op.seconds for op in plan.predicted.ops)
    moved = [p.rate * p.share * total for p in points]
    bottom = min([p.rate for p in points] + [bandwidth / 10]) / 12
    low, high = min(moved, default=1e6) / 4, max(moved, default=1e9) * 40
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, bandwidth * 3))
    plain(axes)
    axes.axhline(bandwidth, color=INK, linewidth=1.4, gid="bandwidth")
    axes.text(high / 1.2, bandwidth * 1.08, _rate(bandwidth, "B/s"), ha="right", va="bottom", size=8)
    axes.set(xlabel="bytes moved", ylabel="bytes/s")
    axes.set_title("ops that only move data")
    _plain_ticks(axes.xaxis, axes.yaxis)
    _scatter(axes, points, moved)
    _label(axes, points, moved, below=min([p.rate for p in points], default=bandwidth), room=34)
    if not points:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color=MUTED)


def _plain_ticks(*axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for axis in axes:
        axis.set_major_locator(LogLocator(numticks=6))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: _rate(value, "").strip() if value >= 1 else f"{value:g}")


def _scatter(axes: Axes, points: Sequence[Point], x: Sequence[float]) -> None:
    """Draw each op as a collection of its own, so that a reader of the file can tell them apart."""
    for point, place in zip(points, x, strict=True):
        area, tint = 24 + 700 * point.share, _COLOURS.get(point.op, MUTED)
        axes.scatter(
            [place], [point.rate], s=area, color=tint, alpha=0.65, linewidths=0.6, edgecolors=PAPER,
            zorder=3, gid=f"op-{point.id}",
        )  # fmt: skip


@attrs.define
class _Label:
    """A label, and where it is drawn, in pixels."""

    text: str
    anchor: tuple[float, float]
    y: float


def _label(axes: Axes, points: Sequence[Point], x: Sequence[float], below: float, room: float = 9) -> None:
    """Write a label for each group of points that lie close together, none over another, ``room`` pixels below."""
    if not points:
        return
    pixels = axes.transData.transform(list(zip(x, [p.rate for p in points], strict=True)))
    groups: list[list[int]] = []
    for i in sorted(range(len(points)), key=lambda i: -points[i].share):
        near = (g for g in groups if _close(pixels[i], pixels[g[0]]) and points[g[0]].op == points[i].op)
        group = next(near, None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    labels = [_Label(_names([points[i] for i in g]), tuple(pixels[g[0]]), float(pixels[g[0]][1])) for g in groups]
    box = axes.get_window_extent()
    ceiling = float(axes.transData.transform((axes.get_xlim()[0], below))[1])
    _spread(labels, gap=12.5, low=box.y0 + 8, high=ceiling - room)
    from_pixels = axes.transData.inverted().transform
    for label in labels:
        at, anchor = from_pixels([(label.anchor[0] + 24, label.y), label.anchor]).tolist()
        written = axes.annotate(
            label.text, anchor, xytext=at, size=7.5, va="center", zorder=4,
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "color": MUTED, "linewidth": 0.5, "shrinkA": 1,
                        "shrinkB": 0},
        )  # fmt: skip
        _keep_inside(written)


def _keep_inside(label: Any) -> None:
    """Move a label to the left as far as it would be cut off at the edge of the picture."""
    over = label.get_window_extent().x1 - (label.figure.bbox.x1 - 14)
    if over > 0:
        transform = label.axes.transData
        x, y = transform.transform(label.get_position())
        label.set_position(transform.inverted().transform((x - over, y)))


def _close(a: Any, b: Any) -> bool:
    return bool(abs(a[0] - b[0]) < 25 and abs(a[1] - b[1]) < 12)


def _spread(labels: list[_Label], gap: float, low: float, high: float) -> None:
    """Move labels up and down until each two are ``gap`` apart, as far as there is room."""
    labels.sort(key=lambda label: (min(label.y, high), label.anchor[0]))  # of equal ones the left below: no lines cross
    y = low
    for label in labels:
        y = label.y = max(label.y, y)
        y += gap
    y = high
    for label in reversed(labels):
        y = label.y = min(label.y, y)
        y -= gap


def _names(points: Sequence[Point]) -> str:
    """Name some ops, the first three by number, with their share of the time.

    Examples
    --------
    >>> _names([Point(i, "attend", 1.0, 1.0, 0.1, "memory") for i in (9, 4, 7, 5)])
    '%4 %5 %7 +1 attend, 40 %'
    """
    ids = sorted(p.id for p in points)
    more = f" +{len(ids) - 3}" if len(ids) > 3 else ""
    share = 100 * sum(p.share for p in points)
    return f"{' '.join(f'%{i}' for i in ids[:3])}{more} {points[0].op}, {share:.2g} %"


def _kinds(figure: Figure, points: Sequence[Point]) -> None:
    from matplotlib.lines import Line2D

    kinds = sorted({p.op for p in points}, key=lambda k: (k not in KINDS, k))
    handles = [
        Line2D([], [], marker="o", linestyle="", color=_COLOURS.get(k, MUTED), alpha=0.7, label=k) for k in kinds
    ]
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.012, 0.045), ncols=4, frameon=False, fontsize=8)


def _rate(value: float, unit: str) -> str:
    """Write a rate with a decimal prefix.

    Examples
    --------
    >>> _rate(989e12, "FLOP/s"), _rate(3.35e12, "B/s")
    ('989 TFLOP/s', '3.35 TB/s')
    """
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} P{unit}"
