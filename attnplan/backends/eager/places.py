"""Where values of a graph live in whole tensors, and which merged output and LSE each attend's backward needs."""

from __future__ import annotations

import attrs

from attnplan.ir import Attend, Graph, Merge, Mix, Node, Output, RowMap, Take

Place = tuple[int, int, tuple[tuple[int, int, int], ...]]


def place(rows: RowMap) -> Place:
    """Return a row map as the plain numbers that emitted code prints."""
    return rows.head, rows.row, tuple((a.size, a.head, a.row) for a in rows.axes)


def is_whole(graph: Graph, node: Node) -> bool:
    """Return whether an attend runs on whole inputs, so that its tensors need no view."""
    return not any(isinstance(n.op, Take) for n in graph.args(node))


def keeps_rows(graph: Graph) -> bool:
    """Return whether nothing in a graph depends on its lengths: whole inputs, all pairs at once."""
    return not graph.of(Take) and all(op.tile is None and op.loop is None for _, op in graph.of(Attend))


@attrs.frozen
class Owner:
    """What the backward of one attend is called with.

    A merge is one softmax over all its parts' keys, so each part takes the merge's output and LSE. A ``mean`` or
    ``sum`` leaves each branch its own softmax and scales the gradient. ``lse-detached`` has the weights of the merged
    LSE but the output of its branch: with no gradient through the weights, only the branch's own mean is subtracted.
    """

    out: int
    """Node whose output enters delta."""
    lse: int
    """Node whose LSE normalises the weights."""
    weight: float = 1.0
    """Constant factor on the gradient."""


def owners(graph: Graph) -> dict[int, Owner]:
    """Return the owner of each attend.

    Examples
    --------
    >>> from attnplan.lower import lower
    >>> from attnplan.spec import AttentionSpec
    >>> owners(lower(AttentionSpec(seq_len=4, heads=1, head_dim=8)))
    {3: Owner(out=3, lse=3, weight=1.0)}
    """
    found: dict[int, Owner] = {}
    _descend(graph, graph[graph.output.args[0]], None, None, 1.0, found)
    return found


def _descend(
    graph: Graph, node: Node, out: int | None, lse: int | None, weight: float, found: dict[int, Owner]
) -> None:
    op = node.op
    if isinstance(op, Attend):
        found[node.id] = Owner(node.id if out is None else out, node.id if lse is None else lse, weight)
    elif isinstance(op, Merge) or (isinstance(op, Mix) and op.rule == "lse"):
        for arg in graph.args(node):
            _descend(graph, arg, node.id if out is None else out, node.id if lse is None else lse, weight, found)
    elif isinstance(op, Mix):
        detached = op.rule == "lse-detached"
        for arg, branch in zip(graph.args(node), op.branches, strict=True):
            scale = weight if detached else weight * op.weight(branch)
            _descend(graph, arg, None, node.id if detached else None, scale, found)
    else:
        assert isinstance(op, Output)
