"""Cutting what a ring does itself out of emitted programs: rounding, and putting pieces at their rows.

An emitted program returns whole tensors in the dtype of its inputs. The hops of a ring add up, so that its gradients
are left as wide as they are, and a piece that concerns some rows only is returned as it is, with its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem
from typing import Any

import attrs
from torch import fx

from attnplan.runtime import merge, views
from attnplan.runtime.attend import in_dtype_of
from attnplan.runtime.views import Axes

Rows = tuple[int, int] | None
"""First row and number of rows, of all heads; None is all of them."""


@attrs.frozen
class Cut:
    """A program that returns pieces, and where each is."""

    module: fx.GraphModule
    rows: tuple[Rows, ...]


def _copied(module: fx.GraphModule) -> tuple[fx.Graph, list[fx.Node]]:
    """Return a copy of a module's code without an output, and the nodes that it returned."""
    code = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    code.graph_copy(module.graph, copied)
    output: Any = next(iter(module.graph.find_nodes(op="output"))).args[0]
    return code, [copied[node] for node in output]


def _bare(node: Any) -> fx.Node:
    """Return what is rounded to the dtype of the inputs."""
    while node.op == "call_function" and node.target is in_dtype_of:
        node = node.args[0]
    found: fx.Node = node
    return found


def _finished(module: fx.GraphModule, code: fx.Graph, results: Sequence[fx.Node], drop: Sequence[fx.Node]) -> Any:
    """Return a module of some code, without nodes that nothing needs any more."""
    code.output(tuple(results))
    rounding = [n for n in code.nodes if n.op == "call_function" and n.target is in_dtype_of]
    for node in (*reversed(rounding), *drop):
        if not node.users:
            code.erase_node(node)
    return fx.GraphModule(module, code, "Cut")


def widened(module: fx.GraphModule) -> fx.GraphModule:
    """Return a backward whose gradients are not rounded to the dtype of the inputs at the end."""
    code, results = _copied(module)
    made: fx.GraphModule = _finished(module, code, [_bare(node) for node in results], ())
    return made


def forward_piece(module: fx.GraphModule, heads: int) -> Cut | None:
    """Return a forward as the one piece that it puts at some rows; None if it is none, or rows of some heads only."""
    code, results = _copied(module)
    if len(results) != 2:
        return None
    pair = [_bare(node) for node in results]
    if any(node.target is not getitem for node in pair) or pair[0].args[0] is not pair[1].args[0]:
        return None
    both: Any = pair[0].args[0]
    if both.target is not merge.placed or len(both.args[1]) != 1:
        return None
    rows = _rows(both.args[3][0], heads)
    if rows is None:
        return None
    pieces = [both.args[1][0], both.args[2][0]]
    return Cut(_finished(module, code, pieces, [*pair, both]), (rows,))


def backward_pieces(module: fx.GraphModule, heads: Sequence[int]) -> Cut | None:
    """Return a backward as the one piece of each gradient; None if one has more pieces, or rows of some heads only."""
    code, results = _copied(module)
    pieces, rows, drop = [], [], []
    for node, total in zip(map(_bare, results), heads, strict=True):
        added = [n for n in node.users if n.target is views.add_rows]
        others = [n for n in node.users if n.target not in (views.add_rows, in_dtype_of)]
        if node.target is not views.zero_gradient or len(added) != 1 or others or added[0].args[0] is not node:
            return None
        _, piece, *place = added[0].args
        where = _rows(tuple(place), total)
        if where is None:
            return None
        pieces.append(piece)
        rows.append(where)
        drop += [added[0], node]
    return Cut(_finished(module, code, pieces, drop), tuple(rows))  # type: ignore[arg-type]  # nodes, not constants


def _rows(place: Any, heads: int) -> Rows:
    """Return the rows of a place that shows all heads in order, side by side; None if it is another."""
    if place is None or len(place) != 3:
        return None
    head, row, axes = place
    typed: Axes = axes
    *outer, (count, last_head, step) = typed
    reach = 1
    for size, by_head, by_row in reversed(outer):
        if size == 1:
            continue
        if by_row or by_head != reach:
            return None
        reach *= size
    if head or last_head or reach != heads or (count > 1 and step != 1):
        return None
    return row, count
