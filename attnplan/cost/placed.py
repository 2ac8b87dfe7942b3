"""What a plan writes where it belongs: rows that take no memory of their own, and are not copied.

The rules are those of the emitted programs (``backends/eager/written.py``): on a CUDA device a join that pulls writes
its result to where a loop wants it, and so does a kernel that is told, if it runs a whole piece; parts of a join that
such a kernel writes need no tensor of their own either.
"""

from __future__ import annotations

from functools import lru_cache

from attnplan.cost.rules import Setting
from attnplan.ir import Attend, Graph, Merge, Mix, Node, Output
from attnplan.ir.apart import apart
from attnplan.ir.launch import launch_key
from attnplan.ir.native import lowered


def pull_of(graph: Graph) -> Node | None:
    """Return the join that pulls, None if there is none."""
    return next((n for n in graph if isinstance(n.op, Merge | Mix) and n.op.pull), None)


@lru_cache(maxsize=4096)
def parts_written(setting: Setting, kind: str, operand: int) -> frozenset[int]:
    """Return the attends whose rows of q and of the output (0), of k (1) or of v (2) are written into the whole."""
    graph = setting.graph
    join = pull_of(graph)
    if kind != "cuda" or join is None or not setting.kernel.writes_into:
        return frozenset()
    if isinstance(join.op, Mix) and join.op.rule != "lse":
        return frozenset()
    able = [n for n in graph.args(join) if _is_view(n, setting, operand)]
    rows = tuple(graph[n.args[operand]].type.rows for n in able)
    return frozenset(able[i].id for i in apart(rows))


def _is_view(node: Node, setting: Setting, operand: int) -> bool:
    graph, op = setting.graph, node.op
    taken = node.args[operand]
    return (
        isinstance(op, Attend)
        and op.launch is None
        and launch_key(graph, node) is not None
        and graph[taken].type.rows.shows_rows_once
        and taken not in setting.copied
    )


def is_placed(setting: Setting, kind: str) -> bool:
    """Return whether a piece's output and gradients are written where the loop wants them."""
    graph, output = setting.graph, setting.graph.output.op
    result = graph[graph.output.args[0]]
    if kind != "cuda" or (isinstance(output, Output) and output.sinks) or setting.kernel.materialises:
        return False
    if isinstance(result.op, Merge | Mix):
        return result.op.pull
    op, whole = result.op, all(graph[a].id == graph.inputs[t].id for a, t in zip(result.args, "qkv", strict=True))
    if not setting.kernel.writes_into or not whole or not isinstance(op, Attend):
        return False
    found = lowered(graph, result, setting.kernel.native)
    return op.tile is None and op.loop is None and not op.biases and found is not None and not found.documents


def is_alone(graph: Graph) -> bool:
    """Return whether the pieces of a loop share no keys: each has all rows of its heads."""
    output = graph.output.op
    assert isinstance(output, Output)
    return output.loop is None or output.loop[2] >= graph.inputs["q"].type.rows.length


def sums_bytes(graph: Graph, batch: int, setting: Setting) -> int:
    """Return the bytes in which a loop sums the gradients of k and v over the pieces of the same heads."""
    output = graph.output.op
    assert isinstance(output, Output)
    k, v = (graph.inputs[n].type for n in "kv")
    heads = k.rows.elements_count // k.rows.length
    here = heads if output.loop is None else min(heads, output.loop[1])
    return batch * here * k.rows.length * (k.features + v.features) * setting.accumulator
