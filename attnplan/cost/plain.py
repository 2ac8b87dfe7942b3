"""Peak memory of a training step in plain torch, which autograd differentiates op by op."""

from __future__ import annotations

from collections.abc import Mapping

from attnplan.cost.setting import Setting, value_bytes
from attnplan.ir import Attend, Graph, Merge, Mix, Node, Take

_INDICES = 16
"""Bytes by which autograd remembers a row that was gathered or put: its head and its place, in 8 bytes each."""


def plain_training(
    graph: Graph,
    setting: Setting,
    made: Mapping[int, int],
    learnt: int,
    masks: int,
    output_bytes: int,
    gradient_bytes: int,
    wide: int,
) -> tuple[int, int]:
    """Return the bytes (saved, workspace) of the worst moment, output and gradients of q, k and v left out.

    That is in the join, whose every part is spread over all rows, or in the backward of an attend. The last attend
    comes first, and what one saved is freed once its backward is done.

    Parameters
    ----------
    graph, setting
        The program, and where it runs.
    made
        Bytes of masks and biases that a call makes for each attend, by node.
    learnt
        Bytes of a whole bias's gradient, where several attends have one.
    masks
        Bytes of masks that stay with the plan.
    output_bytes, gradient_bytes
        Bytes of the output, and of the gradients of q, k and v.
    wide
        Bytes of the copies of q, k and v in the accumulating dtype, 0 if they have it.
    """
    acc, item = setting.accumulator, setting.item
    rows = graph.output.type.rows.elements_count * setting.batch * graph.output.type.features * acc
    whole = gradient_bytes // item * acc
    attends = [(_scores(graph, n, setting), *_kept(graph, n, op, setting, made[n.id])) for n, op in graph.of(Attend)]
    saved, outs = sum(a[1] for a in attends), sum(a[2] for a in attends)
    spread = sum(rows * (len(n.args) + 4) + _weights(graph, n, setting) for n in graph if isinstance(n.op, Merge | Mix))
    beside = max(wide - output_bytes, rows if wide else 0)
    found = [(saved, outs + spread + beside)]
    done = before = 0  # gradients of whole q, k and v, and of a bias, once a backward has been run
    for scores, kept, out in reversed(attends):
        found.append((saved, 3 * scores + masks + outs + done + before))
        added = 5 * whole // 3 + learnt + before  # two, while one is added to the other
        found.append((saved if learnt else saved - kept, outs - out + added))  # a bias comes before the rest is freed
        saved, outs, done, before = saved - kept, outs - out, whole, learnt
    best = max(found, key=sum)
    return best[0], max(0, best[1] - gradient_bytes)


def _scores(graph: Graph, node: Node, setting: Setting) -> int:
    q, k = (graph[a].type.rows for a in node.args[:2])
    return q.elements_count * k.length * setting.batch * setting.accumulator


def _weights(graph: Graph, node: Node, setting: Setting) -> int:
    """Return the bytes that a join keeps per row: where a part's rows go, and the weights of the parts, three times."""
    rows = graph.output.type.rows.elements_count * setting.batch
    placed = _INDICES * sum(n.type.rows.elements_count for n in graph.args(node))
    return placed + 3 * len(node.args) * rows * setting.accumulator


def _kept(graph: Graph, node: Node, op: Attend, setting: Setting, made: int) -> tuple[int, int]:
    """Return the bytes that autograd saves of an attend, and those of its output.

    Saved are scores and weights; under a softcap also the hyperbolic tangents, under dropout the weights that are kept
    and which those are.
    """
    quarters = 8 + 4 * (op.softcap is not None) + 5 * (op.dropout > 0)
    made += sum(_INDICES * n.type.rows.elements_count for n in graph.args(node) if isinstance(n.op, Take))
    given = sum(value_bytes(n, setting) for n in graph.args(node)) // setting.item * setting.accumulator
    out = value_bytes(node, setting) // setting.item * setting.accumulator
    return quarters * _scores(graph, node, setting) // 4 + given + made, out
