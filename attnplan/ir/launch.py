"""How a value with many axes becomes the two batch dimensions that attention kernels take: by strides if possible."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import attrs

from attnplan.errors import PassError
from attnplan.ir.ops import Attend, Merge, Mix
from attnplan.ir.rows import RowMap
from attnplan.ir.slots import slot_condition

if TYPE_CHECKING:
    from attnplan.ir.graph import Graph, Node


@attrs.frozen
class Fold:
    """Two groups of axes, each folded into one dimension, outermost first."""

    groups: tuple[tuple[int, ...], tuple[int, ...]]
    copies: bool
    """Whether folding has to copy, because the strides do not express it."""


def fold(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> Fold:
    """Fold axes of the given sizes into two groups, as views of all tensors where their strides allow.

    Parameters
    ----------
    sizes
        Size of each batch axis of the queries.
    strides
        For each tensor, the stride of each of these axes; 0 where it broadcasts.

    Examples
    --------
    Batch and head of a contiguous tensor stay apart or fold, a third axis that fits neither forces a copy:

    >>> fold([2, 4], [[800, 100]])
    Fold(groups=((0,), (1,)), copies=False)
    >>> fold([2, 4, 5], [[800, 100, 20]])
    Fold(groups=((0,), (1, 2)), copies=False)
    >>> fold([2, 4, 5], [[900, 110, 20]]).copies
    True
    """
    groups: list[tuple[int, ...]] = [(axis,) for axis, size in enumerate(sizes) if size != 1]
    while len(groups) > 2:
        pair = _foldable_pair(groups, sizes, strides)
        if pair is None:
            return _copied(sizes, strides)
        outer, inner = pair
        groups = [outer + inner if g == outer else g for g in groups if g != inner]
    padded = [*groups, (), ()]
    return Fold((padded[0], padded[1]), copies=False)


def _foldable_pair(
    groups: Sequence[tuple[int, ...]], sizes: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    for outer in groups:
        for inner in groups:
            reach = prod(sizes[a] for a in inner)
            if outer != inner and all(s[outer[-1]] == s[inner[-1]] * reach for s in strides):
                return outer, inner
    return None


def _copied(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> Fold:
    """Put the axes along which any tensor broadcasts second, so that a copy never repeats its rows."""
    axes = [a for a, size in enumerate(sizes) if size != 1]
    broadcast = tuple(a for a in axes if any(s[a] == 0 for s in strides))
    return Fold((tuple(a for a in axes if a not in broadcast), broadcast), copies=True)


def strides_in_rows(rows: RowMap, whole: RowMap, layout: str) -> list[int]:
    """Return the strides of the batch and of the batch axes of a map, in rows of features, 0 where it broadcasts.

    Parameters
    ----------
    rows, whole
        The map, and that of the contiguous tensor that it shows rows of.
    layout
        ``"bhsd"`` or ``"bshd"``.

    Examples
    --------
    >>> from attnplan.ir.rows import Axis
    >>> rows = RowMap(0, 0, (Axis(2, head=1, row=1), Axis(4, row=8), Axis(4, row=2)))
    >>> strides_in_rows(rows, RowMap.whole(2, 32), "bshd")
    [64, 3, 16]
    """
    heads, length = whole.last_head + 1, whole.length
    by_head, by_row = (length, 1) if layout == "bhsd" else (1, heads)
    return [heads * length, *(a.head * by_head + a.row * by_row if a.size > 1 else 0 for a in rows.batch)]


def shared_axes(q: RowMap, k: RowMap) -> tuple[int, ...]:
    """Return the batch axes along which several queries see the same keys."""
    return tuple(i for i, (a, b) in enumerate(zip(q.batch, k.batch, strict=True)) if b.size == 1 and a.size > 1)


def launch_key(graph: Graph, node: Node) -> tuple[object, ...] | None:
    """Return what the attends of one launch have in common, None if this one can be in no launch.

    They are calls of one kernel on buffers of equal shape, save for the number of cells: as many rows of q and of k, as
    many heads that share keys, features, and the same condition on slots, which the kernel has to know by itself.
    """
    op = node.op
    if not isinstance(op, Attend) or op.shift is None or op.at is not None:
        return None
    if op.tile or op.loop or op.dropout or op.biases or op.where.operands:
        return None
    q, k, v = (graph[a].type for a in node.args)
    condition = slot_condition(op, q.rows, k.rows)
    if condition == "mask":
        return None
    group = prod(q.rows.batch[a].size for a in shared_axes(q.rows, k.rows))
    return (
        (q.rows.length, k.rows.length, group, q.features, v.features, condition),
        (op.scale, op.softcap, op.precision),
    )


def launches(graph: Graph) -> dict[int, list[Node]]:
    """Return the attends of each launch that has a number, in order."""
    found: dict[int, list[Node]] = {}
    for node, op in graph.of(Attend):
        if op.launch is not None:
            found.setdefault(op.launch, []).append(node)
    return found


def verify_launches(graph: Graph) -> None:
    """Check that the attends of each launch can be one kernel call, and that one join takes them all.

    Raises
    ------
    PassError
        If they cannot.
    """
    for number, nodes in launches(graph).items():
        keys = {launch_key(graph, node) for node in nodes}
        if len(keys) > 1 or None in keys:
            ids = ", ".join(f"%{n.id}" for n in nodes)
            raise PassError(f"launch {number}: {ids} are no calls of one kernel on equal shapes")
        users = {n.id for n in graph if {a.id for a in nodes} & set(n.args)}
        joins = [graph[i].op for i in users]
        if len(users) != 1 or not all(isinstance(op, Merge | Mix) and op.pull for op in joins):
            raise PassError(f"launch {number}: its parts go to {len(users)} nodes, one join that pulls is needed")
