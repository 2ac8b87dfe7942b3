"""``fuse-merge``: one join writes each output row once, instead of a join of joins."""

from __future__ import annotations

from typing import ClassVar

import attrs

from attnplan.ir import Builder, Graph, Merge, Mix, Node, rewrite
from attnplan.ir.ops import disjoint
from attnplan.passes.base import Pass


@attrs.frozen
class FuseMerge(Pass):
    """Flatten merges of merges, and let a mix read the parts of its branches where those are disjoint."""

    name: ClassVar[str] = "fuse-merge"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite(graph, _visit)


def _visit(builder: Builder, node: Node, args: tuple[int, ...]) -> int | None:
    op = node.op
    if isinstance(op, Merge):
        return builder.add(op, *(part for a in args for part in _parts(builder, a)))
    if isinstance(op, Mix):
        labelled = [
            (part, branch) for a, branch in zip(args, op.branches, strict=True) for part in _disjoint_parts(builder, a)
        ]
        branches = tuple(branch for _, branch in labelled)
        return builder.add(attrs.evolve(op, branches=branches), *(part for part, _ in labelled))
    return None


def _parts(builder: Builder, node_id: int) -> tuple[int, ...]:
    """Return the parts that a merge joins, or the value itself."""
    return builder.args(node_id) if isinstance(builder.op(node_id), Merge) else (node_id,)


def _disjoint_parts(builder: Builder, node_id: int) -> tuple[int, ...]:
    parts = _parts(builder, node_id)
    return parts if disjoint([builder.type(p).rows for p in parts]) else (node_id,)
