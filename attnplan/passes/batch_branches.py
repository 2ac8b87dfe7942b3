"""``batch-branches``: attends of equal inner shape run as one kernel call, over rows gathered into one buffer."""

from __future__ import annotations

from math import prod
from typing import ClassVar

import attrs

from attnplan.ir import Attend, Graph, Merge, Mix, Node
from attnplan.ir.launch import launch_key
from attnplan.passes.base import Pass
from attnplan.passes.views import needs_copy

MOST_CELLS = 32_768
"""Blocks of one launch, for one batch element: kernels count them in a dimension of 65,535."""


@attrs.frozen
class BatchBranches(Pass):
    """Give attends that can be one launch the same number, where a join that pulls takes them.

    The pairs do not change: a launch is how attends run. One launch fills a device that each alone would not, for the
    price of copying all its rows.
    """

    name: ClassVar[str] = "batch-branches"
    layout: str = "bhsd"
    batch: int = 1
    whole: bool = True
    """Whether attends that run on views without a copy take part, too."""

    def __call__(self, graph: Graph) -> Graph:
        node = graph[graph.output.args[0]]
        if not isinstance(node.op, Merge | Mix) or not node.op.pull:
            return graph
        groups: dict[tuple[object, ...], list[Node]] = {}
        for part in graph.args(node):
            key = launch_key(graph, part)
            if key is not None and (self.whole or needs_copy(graph, part, self.layout, self.batch)):
                groups.setdefault(key, []).append(part)
        chosen = [nodes for nodes in groups.values() if self._is_worth_it(graph, nodes)]
        numbers = {n.id: i for i, nodes in enumerate(chosen) for n in nodes}
        if not numbers:
            return graph
        return Graph(tuple(_numbered(n, numbers.get(n.id)) for n in graph.nodes))

    def _is_worth_it(self, graph: Graph, nodes: list[Node]) -> bool:
        cells = sum(prod(n.type.rows.sizes[:-1]) for n in nodes)
        copied = any(needs_copy(graph, n, self.layout, self.batch) for n in nodes)
        return (len(nodes) > 1 or copied) and cells <= MOST_CELLS


def _numbered(node: Node, number: int | None) -> Node:
    if number is None or not isinstance(node.op, Attend):
        return node
    return attrs.evolve(node, op=attrs.evolve(node.op, launch=number))
