"""Peak memory of lattices whose takes and joins a compiler fuses: :mod:`attnplan.runtime.lattices` on CUDA.

One loop takes the rows of each part, and one joins all of them. Inductor frees a buffer after its last use. Between the
kernels it writes the parts' LSE in the order of the whole and their weights, and makes dk and dv in one loop.
"""

from __future__ import annotations

from attnplan.cost.allocated import Memory, larger
from attnplan.cost.setting import Setting, value_bytes
from attnplan.cost.workspaces import backward_workspace, forward_workspace, needs
from attnplan.ir import Attend, Graph, Mix, Node, Take

_WEIGHTS = 3
"""Float32 numbers of each row in a join beside one for each part: the top, the sum and the LSE."""


def lattice_memory(graph: Graph, setting: Setting) -> Memory:
    """Return the peak of a call beside the output and the gradients."""
    out = setting.batch * graph.output.type.rows.elements_count * graph.output.type.features * setting.item
    forward = _forward(graph, setting, out)
    if not setting.spec.training:
        return forward.beside(out)
    gradients = sum(value_bytes(n, setting) for n in graph.inputs.values())
    return larger(forward, _backward(graph, setting, out)).beside(out + gradients)


def _lse(graph: Graph, setting: Setting) -> int:
    return setting.batch * graph.output.type.rows.elements_count * setting.accumulator if graph.output.type.lse else 0


def _forward(graph: Graph, setting: Setting, out: int) -> Memory:
    peak, live = Memory(), 0
    for node, _ in graph.of(Attend):
        own = value_bytes(node, setting)
        workspace = live + own + forward_workspace(node, setting, "cuda")
        peak = larger(peak, Memory(workspace=workspace, gathered=_taken(graph, node, setting)))
        live += own
    weights = (len(graph.of(Attend)) + _WEIGHTS) * setting.batch * graph.output.type.rows.elements_count
    return larger(peak, Memory(workspace=live + out + weights * setting.accumulator))


def _backward(graph: Graph, setting: Setting, out: int) -> Memory:
    result = graph[graph.output.args[0]]
    apart = isinstance(result.op, Mix) and result.op.rule != "lse"
    kept = sum(value_bytes(n, setting) for n in graph.args(result)) if apart else 0
    saved = Memory(workspace=out, saved=_lse(graph, setting) + kept)
    peak, pieces = saved, [0, 0, 0]
    for node, _ in graph.of(Attend):
        own = [value_bytes(n, setting) for n in graph.args(node)]
        taken = _taken(graph, node, setting)
        flow = 2 * value_bytes(node, setting)  # the gradient and the output, each with an LSE: taken, put in order
        flow *= (taken > 0) + needs(setting).in_order
        workspace = sum(pieces) + sum(own) + flow + backward_workspace(node, setting, "cuda")
        peak = larger(peak, saved + Memory(workspace=workspace, gathered=taken))
        pieces = [a + b for a, b in zip(pieces, own, strict=True)]
    whole = [value_bytes(graph.inputs[t], setting) for t in "qkv"]
    joins = (sum(pieces) + whole[0], sum(whole) + pieces[1] + pieces[2])
    return larger(peak, saved + Memory(workspace=max(joins)))


def _taken(graph: Graph, node: Node, setting: Setting) -> int:
    """Return the bytes of an attend's rows of q, k and v that are copied: slices of the whole are none."""
    moved = any(a.size > 1 and a.head and a.row for a in graph[node.args[0]].type.rows.batch)
    takes = [n for n in graph.args(node) if isinstance(n.op, Take)]
    return sum(value_bytes(n, setting) for n in takes if moved or n.id in setting.copied)
