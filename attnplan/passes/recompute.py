"""``recompute``: the backward computes again what the forward would have saved for it."""

from __future__ import annotations

from typing import ClassVar

import attrs

from attnplan.ir import Builder, Graph, Mix, Node, Output, rewrite
from attnplan.passes.base import Pass


@attrs.frozen
class Recompute(Pass):
    """Save q, k, v, the output and its LSE only.

    A fused schedule saves more where branches are mixed by another rule than ``lse``: each branch's own output and LSE.
    Plain torch saves scores and weights of every attend. With this option the forward runs once more in the backward.
    Gathered copies are never saved: the backward takes its rows from q, k and v again.

    References
    ----------
    Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174.
    """

    name: ClassVar[str] = "recompute"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite(graph, _visit)


def _visit(builder: Builder, node: Node, args: tuple[int, ...]) -> int | None:
    op = node.op
    if not isinstance(op, Output) or op.recompute or op.loop is not None:
        return None
    return builder.add(attrs.evolve(op, recompute=True), *args)


def saves_more(graph: Graph, *, plain: bool) -> bool:
    """Return whether a schedule saves more for the backward than the output and its LSE.

    Parameters
    ----------
    graph
        The program.
    plain
        Whether it runs as plain torch, which autograd differentiates.
    """
    op = graph[graph.output.args[0]].op
    return plain or (isinstance(op, Mix) and op.rule != "lse")
