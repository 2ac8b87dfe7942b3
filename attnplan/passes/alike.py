"""Pieces that are alike: the distinct programs of a loop, found without building the graph of every piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from attnplan.ir import Graph, Input, Output
from attnplan.passes.chunk import (
    Cell,
    Piece,
    cells_of,
    is_placeless,
    keeps_place,
    normal,
    pieces,
    restrict,
    without_loop,
)


@lru_cache(maxsize=256)
def bodies(graph: Graph) -> tuple[tuple[Graph, int], ...]:
    """Return the programs of the pieces of a looped graph, in the order in which they run, and how often each does.

    Pieces whose attends read alike rows in alike places share a program, so its graph is built once; a piece that sees
    no key has none.

    Examples
    --------
    Of the four pieces of a window, the last three look alike:

    >>> from attnplan import AttentionSpec, patterns
    >>> from attnplan.lower import lower
    >>> from attnplan.passes import Chunk
    >>> graph = lower(AttentionSpec(seq_len=64, heads=1, head_dim=8, pattern=patterns.window(8), causal=True))
    >>> [times for _, times in bodies(Chunk((1, 1, 16))(graph))]
    [1, 3]
    """
    output = graph.output.op
    assert isinstance(output, Output)
    assert output.loop is not None
    known: dict[Any, Graph] = {}
    counts: dict[Graph, int] = {}
    whole = without_loop(graph)
    for piece in pieces(graph, output.loop):
        found = list(cells_of(whole, piece))
        key = signature(whole, piece, found)
        if key is None:
            continue
        if key not in known:
            built = restrict(whole, piece).graph
            assert built is not None
            known[key] = normal(built)
        body = known[key]
        counts[body] = counts.get(body, 0) + 1
    return tuple(counts.items())


def sampled(graph: Graph) -> Iterator[Graph]:
    """Iterate over the programs of a few pieces of a looped graph: first, middle, last, and the last of its head."""
    output = graph.output.op
    assert isinstance(output, Output)
    assert output.loop is not None
    found, whole = pieces(graph, output.loop), without_loop(graph)
    of_head = sum(p.head == 0 for p in found)
    for i in sorted({0, of_head - 1, len(found) // 2, len(found) - 1}):
        body = restrict(whole, found[i]).graph
        if body is not None:
            yield normal(body)


def signature(graph: Graph, piece: Piece, cells: Sequence[tuple[int, Sequence[Cell]]]) -> Any:
    """Return what pieces with equal programs have in common; None if no row of the piece sees a key.

    Everything is counted from the piece's own rows, but where a condition depends on the place of its rows.
    """
    if not any(found for _, found in cells):
        return None
    q_input = graph.inputs["q"].op
    assert isinstance(q_input, Input)
    head, row = piece.head * q_input.group, piece.row
    made: list[Any] = [piece.heads, piece.rows]
    stays = keeps_place(graph)
    for node_id, found in cells:
        anywhere = bool(found) and not stays and is_placeless(found[0][0])
        for op, q, k in found:
            place = (q.head - head, q.row - row, q.axes, k.head - piece.head, k.row - row, k.axes)
            made.append((node_id, op.boxes, place, None if anywhere else (q.head, q.row, k.head, k.row)))
    return tuple(made)
