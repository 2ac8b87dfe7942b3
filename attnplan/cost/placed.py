"""What a plan writes where it belongs: rows that take no memory of their own, and are not copied.

The rules are those of the emitted programs (``backends/eager/written.py``): on a CUDA device a join that pulls writes
its result to where a loop wants it, and so does a kernel that is told, if it runs a whole piece; parts of a join that
such a kernel writes need no tensor of their own either.
"""

from __future__ import annotations

from attnplan.cost.joins import destinations, pull_of, written
from attnplan.cost.setting import Setting
from attnplan.ir import Attend, Graph, Merge, Mix, Output
from attnplan.ir.native import lowered


def whole_of(setting: Setting, kind: str, operand: int) -> tuple[bool, frozenset[int]]:
    """Return whether a whole of q and the output (0), of k (1) or of v (2) is made first, and who writes into it."""
    graph = setting.graph
    result = graph[graph.output.args[0]]
    join = pull_of(graph) or (result if isinstance(result.op, Merge) else None)
    if kind != "cuda" or join is None or not setting.kernel.writes_into:
        return False, frozenset()
    return bool(destinations(graph, join, operand)), written(graph, join, operand, setting.copied)


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
