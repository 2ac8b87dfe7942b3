"""``pull-merge``: the last join writes each output row once, by one kernel that finds the parts that hold it."""

from __future__ import annotations

from math import prod
from typing import ClassVar

import attrs

from attnplan.ir import Attend, Graph, Merge, Mix, RowMap
from attnplan.passes.base import Pass

MOST_ENTRIES = 8
"""Entries of one part for one head."""


@attrs.frozen
class PullMerge(Pass):
    """Let the join pull if it is the only one, and the maps of its parts can be walked backwards.

    A part adds a row of q to the output, and a row of k to its gradient, at one place each.
    """

    name: ClassVar[str] = "pull-merge"

    def __call__(self, graph: Graph) -> Graph:
        node = graph[graph.output.args[0]]
        if not isinstance(node.op, Merge | Mix) or len(graph.of(Merge)) + len(graph.of(Mix)) != 1:
            return graph
        parts = graph.args(node)
        if not all(isinstance(p.op, Attend) and p.op.tile is None for p in parts):
            return graph
        if not all(can_walk_back(graph[a].type.rows) for p in parts for a in p.args[:2]):
            return graph
        changed = attrs.evolve(node, op=attrs.evolve(node.op, pull=True))
        return Graph(tuple(changed if n.id == node.id else n for n in graph.nodes))


def can_walk_back(rows: RowMap) -> bool:
    """Return whether each (head, row) of a map stands at one index, and finding it takes few table entries.

    Of the axes that move rows only, two are divisions; each index of the others is an entry.
    """
    sizes = sorted(a.size for a in rows.axes if a.size > 1 and not a.head)
    return rows.shows_rows_once and prod(sizes[:-2]) <= MOST_ENTRIES
