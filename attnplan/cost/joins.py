"""Rows of a join that nobody moves, because a kernel has written them where they belong.

The rules are those of the emitted programs: ``backends/eager/written.py`` and ``launches.base_of``.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

from attnplan.ir import Attend, Graph, Merge, Mix, Node, Take
from attnplan.ir.apart import apart
from attnplan.ir.launch import launch_key
from attnplan.ir.ops import disjoint


@lru_cache(maxsize=256)
def pull_of(graph: Graph) -> Node | None:
    """Return the join that pulls, None if there is none."""
    return next((n for n in graph if isinstance(n.op, Merge | Mix) and n.op.pull), None)


@lru_cache(maxsize=4096)
def destinations(graph: Graph, join: Node, operand: int) -> tuple[int, ...]:
    """Return the attends for whose rows a new whole is made, where the kernel can be told where to write.

    Parameters
    ----------
    join
        A join of attends: one that pulls, or one of parts that share no row.
    operand
        0 for rows of q, which are those of the output too; 1 and 2 for those of k and v.
    """
    if isinstance(join.op, Mix) and join.op.rule != "lse":
        return ()
    if not getattr(join.op, "pull", False):
        return tuple(placed(graph, join)) if operand == 0 else ()
    able = [n for n in graph.args(join) if _is_view(graph, n, operand)]
    rows = tuple(graph[n.args[operand]].type.rows for n in able)
    return tuple(able[i].id for i in apart(rows))


def written(graph: Graph, join: Node, operand: int, copied: Collection[int]) -> frozenset[int]:
    """Return the attends of :func:`destinations` whose rows are views of the whole: ``copied`` takes are none."""
    found = destinations(graph, join, operand)
    return frozenset(i for i in found if graph[i].args[operand] not in copied)


def placed(graph: Graph, join: Node) -> frozenset[int]:
    """Return the parts of a join that weighs nothing which are neighbouring rows of the output: the result's join."""
    parts = graph.args(join)
    rows = [n.type.rows for n in parts]
    if not isinstance(join.op, Merge) or graph.output.args[0] != join.id or not disjoint(rows):
        return frozenset()
    whole = graph.inputs["q"].type.rows.elements_count
    if not all(isinstance(n.op, Attend) for n in parts) or sum(r.elements_count for r in rows) < whole:
        return frozenset()
    return frozenset(n.id for n in parts if n.type.rows.contiguous and len(n.type.rows.batch) == 1)


def _is_view(graph: Graph, node: Node, operand: int) -> bool:
    return (
        isinstance(node.op, Attend)
        and node.op.launch is None
        and launch_key(graph, node) is not None
        and graph[node.args[operand]].type.rows.shows_rows_once
        and any(isinstance(graph[a].op, Take) for a in node.args)
    )


def base(graph: Graph, join: Node, operand: int) -> Node | None:
    """Return the first part of a join that pulls which holds every row, alone in its tensor, None if none does.

    Where it lies in memory as the whole does, it becomes the whole.
    """
    if isinstance(join.op, Mix) and join.op.rule != "lse":
        return None
    whole = graph.inputs["qkv"[operand]].type.rows
    for part in graph.args(join):
        rows = graph[part.args[operand]].type.rows
        alone = isinstance(part.op, Attend) and part.op.launch is None
        if alone and rows.shows_rows_once and rows.elements_count == whole.elements_count:
            return part
    return None


def rows_there(graph: Graph, join: Node, operand: int, *, writes_into: bool, copied: Collection[int] = ()) -> int:
    """Return how many rows of a whole are neither read nor written by a join, for one batch element.

    Parameters
    ----------
    join
        A join of attends that pulls.
    operand
        0 for rows of q, which are those of the output too; 1 and 2 for those of k and v.
    writes_into
        Whether the kernel writes to where it is told; else a part that holds all rows becomes the whole.
    copied
        The takes that are copies.
    """
    parts = graph.args(join)
    if writes_into:
        there = written(graph, join, operand, copied)
    else:
        whole = base(graph, join, operand)
        there = frozenset() if whole is None else frozenset([whole.id])
    others = tuple(graph[p.args[operand]].type.rows for p in parts if p.id not in there)
    changed = sum(others[i].elements_count for i in apart(others))  # branches of larger rates mostly share these rows
    return max(0, sum(graph[p.args[operand]].type.rows.elements_count for p in parts if p.id in there) - changed)
