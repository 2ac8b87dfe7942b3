"""Rows that a join which pulls need not move, because a kernel has written them where they belong."""

from __future__ import annotations

from attnplan.ir import Attend, Graph, Mix, Node
from attnplan.ir.apart import apart


def rows_there(graph: Graph, join: Node, operand: int, *, writes_into: bool) -> int:
    """Return how many rows of a whole are neither read nor written by a join, for one batch element.

    Parameters
    ----------
    join
        A join of attends that pulls.
    operand
        0 for rows of q, which are those of the output too; 1 and 2 for those of k and v.
    writes_into
        Whether the kernel writes to where it is told; else a part that holds all rows becomes the whole.
    """
    parts, whole = graph.args(join), graph.inputs["qkv"[operand]].type.rows
    maps = [graph[p.args[operand]].type.rows for p in parts]
    if isinstance(join.op, Mix) and join.op.rule != "lse":
        return 0
    able = [i for i, p in enumerate(parts) if isinstance(p.op, Attend) and p.op.launch is None]
    if writes_into:
        there = {able[i] for i in apart(tuple(maps[j] for j in able))}
    else:
        there = set([i for i in able if maps[i].elements_count == whole.elements_count][:1])
    others = tuple(m for i, m in enumerate(maps) if i not in there)
    changed = sum(others[i].elements_count for i in apart(others))  # branches of larger rates mostly share these rows
    return max(0, sum(maps[i].elements_count for i in there) - changed)
