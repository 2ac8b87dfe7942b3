"""The graph of a plan: ops from left to right, operands as lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attnplan.errors import SpecError
from attnplan.explain import title
from attnplan.ir import Graph
from attnplan.pictures.style import CATEGORIES, INK, MUTED, PAPER, shortened, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from attnplan.plan import Plan

MAX_NODES = 300
_COLOURS = dict(zip(("attend", "take", "merge", "mix"), CATEGORIES, strict=False))
_HIGH, _GAP, _LETTER, _PAD, _BETWEEN = 0.36, 0.12, 0.072, 0.16, 0.9  # inches


def layers(graph: Graph) -> list[list[int]]:
    """Return the nodes by their longest way from an input, each layer ordered so that lines cross little.

    Examples
    --------
    >>> from attnplan import AttentionSpec
    >>> from attnplan.lower import lower
    >>> layers(lower(AttentionSpec(seq_len=64, heads=2, head_dim=8)))
    [[0, 1, 2], [3], [4]]
    """
    import networkx as nx

    view = graph.as_networkx()
    found = [sorted(layer) for layer in nx.topological_generations(view)]
    place: dict[int, float] = {}
    for layer in reversed(found):  # an op stands near what it feeds, so that the operands of one op are together
        centre = {n: _mean([place[m] for m in view.successors(n)]) for n in layer}
        layer.sort(key=lambda n: (0 if layer is found[0] else centre[n], n))
        place.update({n: (i + 0.5) / len(layer) for i, n in enumerate(layer)})
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def node_label(graph: Graph, node: int) -> tuple[str, str]:
    """Return the op of a node, and what it results in.

    Examples
    --------
    >>> from attnplan import AttentionSpec
    >>> from attnplan.lower import lower
    >>> node_label(lower(AttentionSpec(seq_len=64, heads=2, head_dim=8, pattern="window(4)")), 3)
    ('%3 attend window(4)', 'bf16[B, 2, 64, 8] + lse')
    """
    op = graph[node].op
    more = {"input": "tensor", "attend": "where", "mix": "rule"}.get(op.name)
    name = f"%{node} {op.name}" + (f" {getattr(op, more)}" if more else "")
    return (name if len(name) <= 36 else name[:33] + "..."), str(graph[node].type)


def graph_figure(graph: Graph, line: str = "") -> Figure:
    """Draw a graph, layer by layer from left to right.

    Parameters
    ----------
    graph
        The graph of a plan, or after a pass.
    line
        A line above it.

    Raises
    ------
    SpecError
        If it has more nodes than a picture can show.
    AttnPlanError
        If matplotlib is missing.
    """
    if len(graph) > MAX_NODES:
        raise SpecError(
            f"the graph has {len(graph)} nodes, a picture shows up to {MAX_NODES}; `attnplan explain --graph` prints it"
        )
    with styled():
        from matplotlib.figure import Figure

        columns = layers(graph)
        labels = {n.id: node_label(graph, n.id) for n in graph}
        widths = [max(len(text) for n in layer for text in labels[n]) * _LETTER + 2 * _PAD for layer in columns]
        tallest = max(len(layer) for layer in columns)
        width = sum(widths) + _BETWEEN * (len(widths) - 1) + 0.5
        height = tallest * (_HIGH + _GAP) + 0.8
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        boxes = _places(columns, widths, height)
        _edges(axes, graph, boxes)
        for node, box in boxes.items():
            _node(axes, graph, node, box, labels[node])
        axes.text(0.25, 0.25, line, weight="bold", va="center")
        return figure


def heading(plan: Plan) -> str:
    """Return a line that says which plan a picture is of."""
    return (
        f"{shortened(title(plan.spec), 90)}: {plan.strategy} > {plan.backend} ({plan.schedule}) on {plan.device.name}"
    )


Box = tuple[float, float, float]
"""Left, middle, width, in inches."""


def _places(columns: Sequence[Sequence[int]], widths: Sequence[float], height: float) -> dict[int, Box]:
    found: dict[int, Box] = {}
    left = 0.25
    for layer, width in zip(columns, widths, strict=True):
        step = (height - 0.7) / len(layer)
        step = min(step, 4 * (_HIGH + _GAP))
        top = 0.5 + (height - 0.7 - step * len(layer)) / 2
        found |= {n: (left, top + (i + 0.5) * step, width) for i, n in enumerate(layer)}
        left += width + _BETWEEN
    return found


def _edges(axes: Axes, graph: Graph, boxes: Mapping[int, Box]) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    for source, target, data in graph.as_networkx().edges(data=True):
        (x, y, width), (to, end, _) = boxes[source], boxes[target]
        x, count = x + width, len(graph[target].args)
        end += (data["operand"] - (count - 1) / 2) * min(0.09, 0.8 * _HIGH / max(1, count))
        bend = max(0.35, (to - x) / 2)
        curve = Path([(x, y), (x + bend, y), (to - bend, end), (to, end)], [Path.MOVETO] + 3 * [Path.CURVE4])
        axes.add_patch(PathPatch(curve, fill=False, edgecolor=MUTED, linewidth=0.7, alpha=0.55,
                                 gid=f"edge-{source}-{target}-{data['operand']}"))  # fmt: skip


def _node(axes: Axes, graph: Graph, node: int, box: Box, label: tuple[str, str]) -> None:
    from matplotlib.patches import FancyBboxPatch

    (left, middle, width), tint = box, _COLOURS.get(graph[node].op.name, MUTED)
    style: Any = "round,pad=0,rounding_size=0.06"
    for alpha, fill, gid in ((1.0, PAPER, None), (0.14, tint, f"node-{node}")):  # lines pass behind the box
        axes.add_patch(FancyBboxPatch((left, middle - _HIGH / 2), width, _HIGH, boxstyle=style, facecolor=fill,
                                      alpha=alpha, linewidth=0, gid=gid))  # fmt: skip
    axes.add_patch(FancyBboxPatch((left, middle - _HIGH / 2), width, _HIGH, boxstyle=style, fill=False, edgecolor=tint,
                                  linewidth=0.9))  # fmt: skip
    axes.text(left + _PAD / 2, middle - 0.085, label[0], va="center", size=8, color=INK)
    axes.text(left + _PAD / 2, middle + 0.095, label[1], va="center", size=7, color=MUTED)
