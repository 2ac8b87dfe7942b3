"""``views``: an attend whose rows no kernel can take by strides becomes a few attends whose rows it can."""

from __future__ import annotations

from typing import ClassVar

import attrs

from attnplan.ir import Attend, Builder, Graph, Input, Merge, Node, RowMap, Take, rewrite
from attnplan.ir.launch import fold, strides_in_rows
from attnplan.passes.base import Pass

MOST_LAUNCHES = 8
"""Attends that one may become."""


@attrs.frozen
class Views(Pass):
    """Cut an attend along the shortest axis without which its rows are strided views of the inputs.

    Attention kernels take two batch dimensions. LongNet at a rate below the number of heads has three: heads that share
    an offset, offsets, and segments.
    """

    name: ClassVar[str] = "views"
    layout: str = "bhsd"
    batch: int = 1

    def __call__(self, graph: Graph) -> Graph:
        inputs = graph.inputs
        sources = [(inputs[t].type.rows, inputs[t].type.features) for t in "qkv"]

        def visit(builder: Builder, node: Node, args: tuple[int, ...]) -> int | None:
            op = node.op
            if not isinstance(op, Attend) or not any(isinstance(builder.op(a), Take) for a in args):
                return None
            maps = [builder.type(a).rows for a in args]
            wholes = [s[0] for s in sources]
            if op.tile is not None or not _copies(maps, wholes, self.layout, self.batch):
                return None
            axis = _axis(maps, wholes, self.layout, self.batch)
            if axis is None:
                return None
            parts = []
            for i in range(maps[0].axes[axis].size):
                takes = [
                    builder.add(Take(_without(m, axis, i)), builder.source(a)) for m, a in zip(maps, args, strict=True)
                ]
                parts.append(builder.add(op, *takes))
            return builder.add(Merge(wholes[0]), *parts)

        return rewrite(graph, visit)


def _axis(maps: list[RowMap], wholes: list[RowMap], layout: str, batch: int) -> int | None:
    """Return the shortest axis without which no copy is needed."""
    sizes = [(a.size, i) for i, a in enumerate(maps[0].batch) if 1 < a.size <= MOST_LAUNCHES]
    for _, axis in sorted(sizes):
        if not _copies([_without(m, axis, 0) for m in maps], wholes, layout, batch):
            return axis
    return None


def _without(rows: RowMap, axis: int, index: int) -> RowMap:
    """Return the rows at one index of an axis; an axis of size 1 stays where it is."""
    gone = rows.axes[axis]
    at = index if gone.size > 1 else 0
    axes = tuple(a for i, a in enumerate(rows.axes) if i != axis)
    return RowMap(rows.head + at * gone.head, rows.row + at * gone.row, axes)


def _copies(maps: list[RowMap], wholes: list[RowMap], layout: str, batch: int) -> bool:
    sizes = (batch, *(a.size for a in maps[0].batch))
    return fold(sizes, [strides_in_rows(m, w, layout) for m, w in zip(maps, wholes, strict=True)]).copies


def needs_copy(graph: Graph, node: Node, layout: str, batch: int) -> bool:
    """Return whether the rows of an attend are no views that a kernel takes, for contiguous inputs in a layout."""
    if all(isinstance(n.op, Input) for n in graph.args(node)):
        return False
    maps = [n.type.rows for n in graph.args(node)]
    wholes = [graph.inputs[n.type.tensor].type.rows for n in graph.args(node)]
    return _copies(maps, wholes, layout, batch)
