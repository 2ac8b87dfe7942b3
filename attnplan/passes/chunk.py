"""``chunk``: run a graph piece by piece, and scores block by block, so that it fits a memory budget.

A loop is an option, not text: the output op says into which pieces (batch elements, key/value heads, query rows) the
output is cut, and an attend says which block of scores is computed at a time. The nodes still state everything that is
computed. What a piece computes is *derived* from them: :func:`restrict` cuts every row map to the piece, and the pass
proves that the pieces together cover what the graph covers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import ClassVar

import attrs

from attnplan.errors import PassError
from attnplan.ir import Attend, Builder, Graph, Input, Merge, Mix, Node, Output, RowMap, Take, rewrite
from attnplan.ir.coverage import Term, attend_coverage
from attnplan.ir.ops import disjoint
from attnplan.ir.slots import slot_band, slot_condition
from attnplan.passes.base import Pass
from attnplan.passes.cut import cut
from attnplan.passes.pull_merge import PullMerge
from attnplan.patterns.sums import PRIME, Conjunction

MAX_PIECES = 512
"""Pieces of the output, batch elements aside: more would be proved and emitted for too long."""


@attrs.frozen(cache_hash=True)
class Piece:
    """Some rows of some heads of the output. Heads are counted in key/value heads."""

    head: int
    heads: int
    row: int
    rows: int


@attrs.frozen
class Part:
    """A piece and what computes it."""

    piece: Piece
    keys: tuple[int, int]
    """First key row that the graph reads, and the row after the last."""
    graph: Graph | None
    """An ordinary graph over the piece's queries and those keys; None where no row of the piece sees a key."""


@attrs.frozen
class Chunk(Pass):
    """Loop over pieces of the output, and over blocks of scores inside attends that materialise them.

    Parameters
    ----------
    loop
        (batch elements, key/value heads, query rows) of a piece; None for no loop around the graph.
    block
        (queries, keys) of a block of scores; None for no loop inside attends.
    prove
        Whether to prove the pieces; a search that only prices leaves it for the one that it chooses.

    Notes
    -----
    An attend over a causal square that is cut at query rows is split in two: the keys before the piece, which all its
    rows see, and a causal square. So kernels need no mask for it.

    References
    ----------
    Rabe and Staats, Self-attention Does Not Need O(n^2) Memory, arXiv 2112.05682; Milakov and Gimelshein, Online
    normalizer calculation for softmax, arXiv 1805.02867.
    """

    name: ClassVar[str] = "chunk"
    loop: tuple[int, int, int] | None = None
    block: tuple[int, int] | None = None
    prove: bool = attrs.field(default=True, eq=False, repr=False)

    def __call__(self, graph: Graph) -> Graph:
        reason = unloopable(graph, self.loop, self.block)
        if reason:
            raise PassError(reason)
        looped = rewrite(graph, self._visit)
        if looped is not graph and self.loop is not None and self.prove:
            check_pieces(looped)
        return looped

    def _visit(self, builder: Builder, node: Node, args: tuple[int, ...]) -> int | None:
        op = node.op
        if isinstance(op, Attend) and self.block is not None:
            return builder.add(attrs.evolve(op, loop=self.block), *args)
        if isinstance(op, Output) and self.loop is not None:
            return builder.add(attrs.evolve(op, loop=self.loop), *args)
        return None


def unloopable(graph: Graph, loop: tuple[int, int, int] | None, block: tuple[int, int] | None) -> str:
    """Return why a graph cannot be looped over in this way; empty if it can."""
    output = graph.output.op
    attends = [op for _, op in graph.of(Attend)]
    if isinstance(output, Output) and output.loop is not None:
        return "the graph is a loop already"
    if any(op.at is not None for op in attends):
        return "the graph holds some rows of the sequence only: a ring's chunks are its hops"
    if block is not None and any(op.dropout or op.biases or op.tile for op in attends):
        return "dropout, biases and tiles are not made block by block"
    if loop is None:
        return ""
    rows = graph.inputs["q"].type.rows.length
    whole = loop[1] >= kv_heads(graph) and loop[2] >= rows
    if any(op.tile is not None for op in attends) and not whole:
        return "tiles are cut over whole sequences: only batch elements of them are looped over"
    if loop[2] < rows and any(op.shift is None for op in attends):
        return "query rows whose positions arrive with the call are not cut into pieces"
    count = -(-kv_heads(graph) // loop[1]) * -(-graph.inputs["q"].type.rows.length // loop[2])
    if count > MAX_PIECES:
        return f"{count} pieces are more than {MAX_PIECES}"
    return ""


@lru_cache(maxsize=1024)
def normal(graph: Graph) -> Graph:
    """Return a piece's graph with what does not depend on its place left out; pieces that are alike become equal.

    Rows are counted from the piece's first: a band looks the same wherever its queries and keys stand, if they stand
    apart by as much. What depends on the place of a pair beside that finds it by :func:`origin`.
    """
    if keeps_place(graph):
        return graph

    def visit(builder: Builder, node: Node, args: tuple[int, ...]) -> int | None:
        op = node.op
        if not isinstance(op, Attend) or op.at is None or not is_placeless(op):
            return None
        local, local_k = (n.type.rows for n in graph.args(node)[:2])
        q, k = op.positions(local, local_k)
        head, row = q.head - local.head, q.row - local.row
        at = _moved(q, head, row), _moved(k, k.head - local_k.head, row)
        if at == (local, local_k) and not (op.tile or op.dropout or op.biases or op.where.operands):
            return builder.add(attrs.evolve(op, at=None), *args)
        return builder.add(attrs.evolve(op, at=(at[0], _moved(k, k.head, row))), *args)

    return rewrite(graph, visit)


def is_placeless(op: Attend) -> bool:
    """Return whether which pairs meet does not depend on where the rows stand, if they stand apart by as much."""
    known = Conjunction.of(op.where)
    return not (known.opaque or known.dilated or known.heads or op.shift is None)


def keeps_place(graph: Graph) -> bool:
    """Return whether a piece's graph is run where it stands: one origin has to serve all attends, or none."""
    ops = [op for _, op in graph.of(Attend)]
    return any(op.dropout or op.biases for op in ops) and not all(is_placeless(op) for op in ops)


def origin(part: Part) -> tuple[int, int]:
    """Return the head and the row from which the normal graph of a piece counts its queries and keys.

    Dropout, and biases by distance, are functions of the head and the positions of a pair.
    """
    if part.graph is None or keeps_place(part.graph):
        return 0, 0
    op = part.graph.inputs["q"].op
    assert isinstance(op, Input)
    return part.piece.head * op.group, part.piece.row


def pieces(graph: Graph, loop: tuple[int, int, int]) -> tuple[Piece, ...]:
    """Return the pieces of the output of one batch element, those of the same heads side by side.

    Examples
    --------
    >>> from attnplan.lower import lower
    >>> from attnplan.spec import AttentionSpec
    >>> [(p.head, p.row, p.rows) for p in pieces(lower(AttentionSpec(seq_len=5, heads=2, head_dim=8)), (1, 1, 4))]
    [(0, 0, 4), (0, 4, 1), (1, 0, 4), (1, 4, 1)]
    """
    heads, length = kv_heads(graph), graph.inputs["q"].type.rows.length
    return tuple(
        Piece(head, min(loop[1], heads - head), row, min(loop[2], length - row))
        for head in range(0, heads, loop[1])
        for row in range(0, length, loop[2])
    )


def kv_heads(graph: Graph) -> int:
    """Return the number of key/value heads of a graph."""
    op = graph.inputs["q"].op
    assert isinstance(op, Input)
    return op.heads // op.group


def without_loop(graph: Graph) -> Graph:
    """Return the graph whose pieces a loop runs."""
    output = graph.output
    assert isinstance(output.op, Output)
    if output.op.loop is None and not output.op.recompute:
        return graph
    plain = attrs.evolve(output.op, loop=None, recompute=False)
    return Graph((*graph.nodes[:-1], attrs.evolve(output, op=plain)))


def parts(graph: Graph, loop: tuple[int, int, int] | None = None) -> Iterator[Part]:
    """Iterate over the pieces of a looped graph, in the order in which they run."""
    output = graph.output.op
    assert isinstance(output, Output)
    loop = loop or output.loop
    assert loop is not None
    whole = without_loop(graph)
    for piece in pieces(graph, loop):
        yield restrict(whole, piece)


@lru_cache(maxsize=1024)
def restrict(graph: Graph, piece: Piece) -> Part:
    """Return the graph that computes one piece from its own query rows and the keys that they see.

    Its inputs hold the piece's rows of q, and of k and v the rows from the first that any attend reads to the last;
    where they lie in the whole sequence is the option ``at`` of its attends.

    Examples
    --------
    >>> from attnplan.lower import lower
    >>> from attnplan.spec import AttentionSpec
    >>> graph = lower(AttentionSpec(seq_len=8, heads=1, head_dim=4, causal=True, dtype="float32", scale=0.5))
    >>> part = restrict(graph, Piece(0, 1, 4, 2))
    >>> part.keys, [str(n.type) for n, _ in part.graph.of(Attend)]
    ((0, 6), ['f32[B, 1, 2, 4] + lse', 'f32[B, 1, 2, 4] + lse'])
    """
    rows = graph.inputs["q"].type.rows.length
    if (piece.head, piece.heads, piece.row, piece.rows) == (0, kv_heads(graph), 0, rows):
        return Part(piece, (0, graph.inputs["k"].type.rows.length), graph)
    cells = dict(cells_of(graph, piece))
    read = [k for found in cells.values() for _, _, k in found]
    if not read:
        return Part(piece, (0, 0), None)
    keys = min(k.row for k in read), max(k.last_row for k in read) + 1
    local = _Local(graph, piece, keys).build(cells)
    pulls = any(isinstance(n.op, Merge | Mix) and n.op.pull for n in graph)
    return Part(piece, keys, PullMerge()(local) if pulls else local)


Cell = tuple[Attend, RowMap, RowMap]
"""An attend, and the rows of the whole sequence that its q and k are."""


def cells_of(graph: Graph, piece: Piece) -> Iterator[tuple[int, list[Cell]]]:
    """Iterate over the attends of a graph, by id, with what is left of each in a piece."""
    for node, _ in graph.of(Attend):
        yield node.id, list(_cells(node, graph, piece))


class _Local:
    """Builds the graph of a piece."""

    def __init__(self, graph: Graph, piece: Piece, keys: tuple[int, int]) -> None:
        self.graph, self.builder = graph, Builder()
        inputs = {name: node.op for name, node in graph.inputs.items()}
        self.ids: dict[str, int] = {}
        for name in "qkv":
            op = inputs[name]
            assert isinstance(op, Input)
            length = piece.rows if name == "q" else keys[1] - keys[0]
            heads = piece.heads * (op.group if name == "q" else 1)
            self.ids[name] = self.builder.add(attrs.evolve(op, heads=heads, length=length))
            self.group = op.group
        self.origins = {"q": (piece.head * self.group, piece.row), "k": (piece.head, keys[0])}
        self.rows = self.builder.type(self.ids["q"]).rows

    def build(self, cells: Mapping[int, Sequence[Cell]]) -> Graph:
        made: dict[int, list[int]] = {}
        for node in self.graph:
            if isinstance(node.op, Attend):
                made[node.id] = [self._attend(*cell) for cell in cells[node.id]]
            elif isinstance(node.op, Merge):
                found = [i for a in node.args for i in made[a]]
                made[node.id] = [self._merge(found)] if found else []
            elif isinstance(node.op, Mix):
                made[node.id] = self._mix(node.op, [made[a] for a in node.args])
            elif isinstance(node.op, Output):
                result = self._whole(made[node.args[0]])
                made[node.id] = [self.builder.add(node.op, result)]
        return self.builder.build(made[self.graph.output.id][0])

    def _attend(self, op: Attend, q: RowMap, k: RowMap) -> int:
        local = {"q": _moved(q, *self.origins["q"]), "k": _moved(k, *self.origins["k"])}
        local["v"] = local["k"]
        args = []
        for name in "qkv":
            whole = self.builder.type(self.ids[name]).rows
            given = self.ids[name]
            args.append(given if local[name] == whole else self.builder.add(Take(local[name]), given))
        return self.builder.add(attrs.evolve(op, at=(q, k), launch=None), *args)

    def _merge(self, found: Sequence[int]) -> int:
        if len(found) == 1 and self.builder.type(found[0]).rows == self.rows:
            return found[0]
        return self.builder.add(Merge(self.rows), *found)

    def _mix(self, op: Mix, found: Sequence[Sequence[int]]) -> list[int]:
        of_branch: dict[int, list[int]] = {}
        for ids, branch in zip(found, op.branches, strict=True):
            of_branch.setdefault(branch, []).extend(ids)
        labelled: list[tuple[int, int]] = []
        for branch, ids in of_branch.items():
            apart = disjoint(
                [self.builder.type(i).rows for i in ids]
            )  # else its parts are merged, each row's own first
            labelled += [(i, branch) for i in (ids if apart or not ids else [self._merge(ids)])]
        if not labelled:
            return []
        mix = attrs.evolve(op, rows=self.rows, branches=tuple(b for _, b in labelled), pull=False)
        return [self.builder.add(mix, *(i for i, _ in labelled))]

    def _whole(self, found: Sequence[int]) -> int:
        """Return the value that holds every row of the piece."""
        if len(found) == 1 and not isinstance(self.builder.op(found[0]), Attend):
            return found[0]
        return self._merge(found)


def _moved(rows: RowMap, head: int, row: int) -> RowMap:
    """Return a map counted from a head and a row of the whole sequence."""
    return attrs.evolve(rows, head=rows.head - head, row=rows.row - row)


def _cells(node: Node, graph: Graph, piece: Piece) -> Iterator[Cell]:
    """Iterate over what is left of an attend in a piece."""
    op = node.op
    assert isinstance(op, Attend)
    q, k = (n.type.rows for n in graph.args(node)[:2])
    whole = graph.inputs["q"].type.rows
    group = graph.inputs["q"].op.group  # type: ignore[attr-defined]
    heads = (piece.head * group, (piece.head + piece.heads) * group)
    for some_q, some_k in cut(q, k, heads, (piece.row, piece.row + piece.rows)):
        if op.boxes is not None and some_q.length < whole.length:
            op = attrs.evolve(op, boxes=None)  # boxes are cut from the whole grid
        yield from _seen(op, some_q, some_k)


def _seen(op: Attend, q: RowMap, k: RowMap) -> Iterator[Cell]:
    """Iterate over an attend with the keys that a band lets its rows see; those that all of them see may be apart."""
    limits = slot_band(attrs.evolve(op, at=(q, k)), q, k) if Conjunction.of(op.where).banded else None
    if limits is None:
        yield op, q, k
        return
    low, high = limits
    first = 0 if high is None else max(0, -high)
    stop = k.length if low is None else min(k.length, q.length - low)
    if first >= stop:
        return
    seen = _keys(k, first, stop)
    here = attrs.evolve(op, at=None)
    past = None if low is None or low > 0 else -low  # row 0 sees slots up to this one, both ends included
    square = past is not None and 0 < past < seen.length and seen.length - past == q.length and q.length > 1
    if square and past is not None and op.tile is None and op.loop is None and high is None and not first:
        before, diagonal = _keys(seen, 0, past), _keys(seen, past, seen.length)
        if slot_condition(attrs.evolve(here, at=(q, diagonal)), q, diagonal) == "causal":
            yield here, q, before
            yield here, q, diagonal
            return
    yield here, q, seen


def _keys(k: RowMap, first: int, stop: int) -> RowMap:
    """Return the key slots from ``first`` to ``stop`` of every batch axis."""
    last = k.axes[-1]
    return attrs.evolve(k, row=k.row + first * last.row, axes=(*k.batch, attrs.evolve(last, size=stop - first)))


def check_pieces(graph: Graph) -> None:
    """Prove that the pieces of a looped graph compute what the graph states: every pair once, each row in one piece.

    A graph without a loop is its own piece.

    Raises
    ------
    PassError
        If the pieces leave out or repeat a row or a pair, or a piece reads other rows than its attends say.
    """
    output = graph.output.op
    assert isinstance(output, Output)
    if output.loop is None:
        return
    reason = unloopable(without_loop(graph), output.loop, None)
    if reason:
        raise PassError(reason)
    got: dict[Term, tuple[int, ...]] = {}
    rows = 0
    for part in parts(graph):
        rows += part.piece.rows * part.piece.heads
        if part.graph is None:
            continue
        part.graph.verify()
        for node, op in part.graph.of(Attend):
            q, k = (n.type.rows for n in part.graph.args(node)[:2])
            _check_addresses(part, op, q, k)
            _add(got, attend_coverage(op, q, k))
    length = graph.inputs["q"].type.rows.length
    if rows != length * kv_heads(graph):
        raise PassError(f"the pieces hold {rows} rows of heads, the output has {length * kv_heads(graph)}")
    expected: dict[Term, tuple[int, ...]] = {}
    for node, op in graph.of(Attend):
        q, k = (n.type.rows for n in graph.args(node)[:2])
        _add(expected, attend_coverage(op, q, k))
    if {t: v for t, v in got.items() if any(v)} != {t: v for t, v in expected.items() if any(v)}:
        raise PassError("the pieces together do not compute the pairs of the graph, once each")


def _add(total: dict[Term, tuple[int, ...]], found: Mapping[Term, tuple[int, ...]]) -> None:
    for term, values in found.items():
        old = total.get(term, (0,) * len(values))
        total[term] = tuple((a + b) % PRIME for a, b in zip(old, values, strict=True))


def _check_addresses(part: Part, op: Attend, q: RowMap, k: RowMap) -> None:
    """Check that the rows which a piece's attend reads from its inputs are those that it says."""
    assert part.graph is not None
    group = part.graph.inputs["q"].op.group  # type: ignore[attr-defined]
    piece = part.piece
    places = (
        ("q", q, op.positions(q, k)[0], (piece.head * group, piece.row)),
        ("k", k, op.positions(q, k)[1], (piece.head, part.keys[0])),
    )
    for name, local, at, (head, row) in places:
        if (local.head + head, local.row + row, local.axes) != (at.head, at.row, at.axes):
            raise PassError(f"a piece reads rows {local} of {name}, and says that they are {at}")
