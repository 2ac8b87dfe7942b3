"""``ring``: the attends of one rank, over the rows that it holds and those that arrive hop by hop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import ClassVar, Literal

import attrs

from attnplan.errors import PassError
from attnplan.ir import Axis, Builder, Graph, Input, Merge, Mix, Output, Receive, RowMap, Take
from attnplan.ir.buffers import Buffer
from attnplan.ir.progressions import Progression
from attnplan.passes.base import Pass
from attnplan.passes.ring_cut import Part, cut, of_heads, parts_of
from attnplan.passes.ring_need import narrowed
from attnplan.passes.ring_runs import Piece, in_runs
from attnplan.patterns import Shape

Sending = Literal["own", "needed", "range", "whole"]
"""What of its keys a hop has: this rank's own as they lie; the needed rows; ranges from the first to the last row that
an attend needs; or everything."""


@attrs.frozen(cache_hash=True)
class Keys:
    """The keys of one hop: which rows there are, and which of them the rank gets."""

    hop: int
    rows: tuple[Progression, ...]
    sending: Sending


@attrs.frozen
class HopParts:
    """What a rank attends over in one hop."""

    hop: int
    parts: tuple[Part, ...]
    store: tuple[RowMap, ...]
    own: bool
    """Whether the store is the rank's own keys as they lie."""
    needed: int
    """Number of (head, row) keys that the parts ask for, each part by itself."""
    why: str = ""
    """Why more rows are sent than are needed; empty if none are."""
    empty: tuple[Part, ...] = ()
    """What was left out for holding no pair, where a proof does not see that by its sums."""


@attrs.frozen(cache_hash=True)
class Ring(Pass):
    """Keep the queries of one rank, and cut each attend by the hop in which its keys arrive.

    Every pair of these queries stays, once. An attend whose keys all lie elsewhere, or meet none of the queries,
    vanishes. The graph that is left reads rows of the rank's own inputs, and of what :class:`~attnplan.ir.ops.Receive`
    brings; ``at`` in each attend says which rows of the whole sequence they are.

    References
    ----------
    Liu et al., Ring Attention with Blockwise Transformers for Near-Infinite Context, arXiv 2310.01889.
    """

    name: ClassVar[str] = "ring"
    shape: Shape
    queries: tuple[Progression, ...]
    """Rows of the queries, in the order in which they lie in q."""
    heads: tuple[int, int]
    """The first query head, and the one after the last."""
    kv_heads: tuple[int, int]
    """The first key/value head, and the one after the last."""
    keys: tuple[Keys, ...]

    def __call__(self, graph: Graph) -> Graph:
        """Return the graph of the rank: all hops, merged."""
        return whole_graph(graph, self, self.hops(graph))

    def hops(self, graph: Graph) -> tuple[HopParts, ...]:
        """Return what the rank attends over in each hop that has any pairs.

        Raises
        ------
        PassError
            If rows cannot be cut, or positions arrive with the call.
        """
        return _hops(self, graph)

    def query_maps(self) -> tuple[RowMap, ...]:
        """Return the rows of the queries as maps."""
        return tuple(as_map(p, *self.heads) for p in self.queries)

    def hop(self, parts: Sequence[Part], keys: Keys) -> HopParts | None:
        """Return what is attended over in one hop, from attends over all keys; None if no pair is in it."""
        rows = keys.rows
        near = (
            (i, one, p)
            for i, one in enumerate(rows)
            for p in parts
            if one.start <= p.k.last_row and p.k.row <= one.last
        )
        pieces = [(i, p) for i, one, part in near for p in cut(part, Progression(0, 1, self.shape.seq_len), one)]
        why, empty = "", tuple[Part, ...]()
        if keys.sending == "needed":
            found = [(i, narrowed(p, self.shape)) for i, p in pieces]
            pieces = [(i, p) for i, each in found for p in each.parts]
            why = next((each.why for _, each in found if each.why), "")
            empty = tuple(p for _, each in found for p in each.empty)
        if not pieces and not empty:
            return None
        made = tuple(p for _, p in pieces)
        needed = sum(_distinct(p.k) for p in made)
        if keys.sending == "needed":
            store = store_of([p.k for p in made], self.kv_heads)
        elif keys.sending == "range":
            store = tuple(self._ranges(rows, pieces))
        else:
            store = tuple(as_map(p, *self.kv_heads) for p in rows)
        return HopParts(keys.hop, made, store, keys.sending == "own", needed, why, empty)

    def _ranges(self, rows: Sequence[Progression], pieces: Sequence[tuple[int, Part]]) -> Iterator[RowMap]:
        for i, one in enumerate(rows):
            ends = sorted({(p.k.row, p.k.last_row) for place, p in pieces if place == i})
            joined: list[tuple[int, int]] = []
            for low, high in ends:
                if joined and low <= joined[-1][1] + one.step:
                    joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
                else:
                    joined.append((low, high))
            yield from (as_map(one.clipped(low, high + 1), *self.kv_heads) for low, high in joined)


@lru_cache(maxsize=256)
def _hops(ring: Ring, graph: Graph) -> tuple[HopParts, ...]:
    parts = _with_queries(graph, ring.queries, ring.heads, ring.shape.kv_len)
    return tuple(hop for keys in ring.keys if (hop := ring.hop(parts, keys)) is not None)


@lru_cache(maxsize=256)
def _with_queries(
    graph: Graph, queries: tuple[Progression, ...], heads: tuple[int, int], keys: int
) -> tuple[Part, ...]:
    """Return the attends of some heads and some queries, over all keys that these can meet; transports share it."""
    every = Progression(0, 1, keys)
    mine = (part for whole in parts_of(graph) for part in of_heads(whole, *heads))
    return tuple(piece for part in mine for rows in queries for piece in cut(part, rows, every))


def as_map(rows: Progression, start: int, stop: int) -> RowMap:
    """Return the rows of a progression in some heads."""
    return RowMap(start, rows.start, (Axis(stop - start, head=1), Axis(rows.count, row=rows.step)))


def _distinct(rows: RowMap) -> int:
    return rows.elements_count // _repeats(rows)


def _repeats(rows: RowMap) -> int:
    count = 1
    for axis in rows.axes:
        count *= axis.size if axis.repeats else 1
    return count


def store_of(maps: Sequence[RowMap], heads: tuple[int, int]) -> tuple[RowMap, ...]:
    """Return a store that holds some maps, each in one piece; it keeps its heads if all of them show every head.

    Examples
    --------
    >>> parts = [RowMap(0, 4, (Axis(2, head=1), Axis(4, row=1))), RowMap(0, 6, (Axis(2, head=1), Axis(4, row=1)))]
    >>> store_of(parts, (0, 2))
    (RowMap(head=0, row=4, axes=(Axis(size=2, head=1, row=0), Axis(size=6, head=0, row=1))),)
    """
    bare = [attrs.evolve(m, axes=(*(a for a in m.batch if a.size > 1 and not a.repeats), m.axes[-1])) for m in maps]
    plain = [_plain(m, heads) for m in bare]
    known = [m for m in plain if m is not None]
    wanted = known if len(known) == len(plain) else bare
    found: list[RowMap] = []
    for one in sorted(_merged(wanted), key=lambda m: (-m.elements_count, m.row, m.head)):
        if Buffer(tuple(found)).address(one) is None:
            found.append(one)
    return tuple(sorted(found, key=lambda m: (m.row, m.head)))


def _plain(rows: RowMap, heads: tuple[int, int]) -> RowMap | None:
    """Return a map with all heads along its first axis, None if it does not show all of them alike."""
    leads = sorted((a for a in rows.batch if a.head), key=lambda a: a.head)
    reach = 1
    for axis in leads:
        if axis.row or axis.head != reach:
            return None
        reach *= axis.size
    if rows.head != heads[0] or reach != heads[1] - heads[0]:
        return None
    return attrs.evolve(rows, axes=(Axis(reach, head=1), *(a for a in rows.axes if not a.head)))


def _merged(maps: Sequence[RowMap]) -> Iterator[RowMap]:
    """Join maps that differ only in where their last axis begins and ends, where they overlap or continue."""
    groups: dict[object, list[RowMap]] = {}
    for one in dict.fromkeys(maps):
        step = max(one.axes[-1].row, 1)
        groups.setdefault((one.head, one.batch, step, one.row % step), []).append(one)
    for (_, _, step, _), members in groups.items():  # type: ignore[misc]
        members.sort(key=lambda m: m.row)
        current = members[0]
        for one in members[1:]:
            end = current.row + step * current.length
            if one.row <= end:
                length = max(current.length, (one.row - current.row) // step + one.length)
                current = attrs.evolve(current, axes=(*current.batch, Axis(length, row=step)))
            else:
                yield current
                current = one
        yield current


@attrs.frozen
class Local:
    """The inputs of a rank: how many query heads share a key/value head, sizes, dtype."""

    q: Input
    k: Input
    v: Input
    shape: Shape
    """Sizes of the whole sequence."""

    @classmethod
    def of(cls, graph: Graph, ring: Ring, own: int) -> Local:
        """Return the inputs of a rank that holds ``own`` keys."""
        (q, k, v) = (graph.inputs[name].op for name in "qkv")
        assert isinstance(q, Input)
        assert isinstance(k, Input)
        assert isinstance(v, Input)
        heads, kv_heads = ring.heads[1] - ring.heads[0], ring.kv_heads[1] - ring.kv_heads[0]
        rows = sum(p.count for p in ring.queries)
        group = heads // kv_heads
        return cls(
            q=attrs.evolve(q, heads=heads, group=group, length=rows),
            k=attrs.evolve(k, heads=kv_heads, group=group, length=own),
            v=attrs.evolve(v, heads=kv_heads, group=group, length=own),
            shape=ring.shape,
        )

    def is_whole(self, queries: Buffer, store: Buffer) -> bool:
        """Return whether the inputs are whole sequences, so that addresses of rows are their positions."""
        return (queries.rows, store.rows) == (self.shape.seq_len, self.shape.kv_len)


def hop_graph(local: Local, queries: Buffer, hop: HopParts, branch: int | None) -> Graph | None:
    """Return the graph of one hop and one softmax, over the rank's queries and the store; None if nothing is in it."""
    parts = [p for p in hop.parts if branch is None or p.op.branch == branch]
    if not parts:
        return None
    store, builder = Buffer(hop.store), Builder()
    q = builder.add(local.q)
    kv = [builder.add(attrs.evolve(x, heads=store.heads, length=store.rows)) for x in (local.k, local.v)]
    whole = local.is_whole(queries, store)
    made = [attend(builder, one, (q, *kv), whole=whole) for one in in_runs(parts, queries, store)]
    return builder.build(builder.add(Output(), _joined(builder, made, q)))


def _joined(builder: Builder, made: Sequence[int], q: int) -> int:
    rows = builder.type(q).rows
    return made[0] if len(made) == 1 and builder.type(made[0]).rows == rows else builder.add(Merge(rows), *made)


def attend(builder: Builder, piece: Piece, sources: Sequence[int], *, whole: bool) -> int:
    """Append an attend over rows of a rank's inputs; ``whole`` says that these are whole sequences.

    Raises
    ------
    PassError
        If the inputs do not hold its rows.
    """
    q, k = piece.q, piece.k
    if q is None or k is None:
        raise PassError(
            f"rows {piece.queries if q is None else piece.keys} do not lie in one piece of what the rank has"
        )
    here = whole and (piece.queries, piece.keys) == ((q,), (k,))
    op = attrs.evolve(piece.op, at=None if here else (_standing(piece.queries), _standing(piece.keys)))
    args = [
        source if builder.type(source).rows == rows else builder.add(Take(rows), source)
        for source, rows in zip(sources, (q, k, k), strict=True)
    ]
    return builder.add(op, *args)


def _standing(runs: tuple[RowMap, ...]) -> RowMap | tuple[RowMap, ...]:
    return runs[0] if len(runs) == 1 else runs


def whole_graph(
    graph: Graph,
    ring: Ring,
    hops: Sequence[HopParts],
    own: Sequence[RowMap] | None = None,
    peers: Mapping[int, tuple[tuple[int, int], ...]] | None = None,
) -> Graph:
    """Return the graph of a rank with every hop in it, joined as ``graph`` joins its branches.

    Parameters
    ----------
    graph
        The graph over whole inputs.
    ring, hops
        The pass, and what it found in ``graph``.
    own
        Rows that the rank's k and v hold; by default those of the hop that has its own rows.
    peers
        (rank, number of elements that it sends) for each hop.
    """
    held = Buffer(tuple(own if own is not None else next((h.store for h in hops if h.own), ())))
    local = Local.of(graph, ring, max(held.rows, 1))
    builder, queries = Builder(), Buffer(ring.query_maps())
    q, k, v = (builder.add(x) for x in (local.q, local.k, local.v))
    made: dict[int, list[int]] = {}
    for hop in hops:
        store = Buffer(hop.store)
        kv = (k, v) if hop.own else tuple(builder.add(_receive(hop, peers or {}), x) for x in (k, v))
        for piece in in_runs(hop.parts, queries, store):
            one = attend(builder, piece, (q, *kv), whole=local.is_whole(queries, store))
            made.setdefault(piece.op.branch, []).append(one)
    if not made:
        raise PassError("none of this rank's queries meets a key")
    mixes = [op for _, op in graph.of(Mix) if op.rule != "lse"]
    if not mixes:
        return builder.build(builder.add(Output(), _joined(builder, [n for each in made.values() for n in each], q)))
    rows = builder.type(q).rows
    parts = [builder.add(Merge(rows), *each) for each in made.values()]
    mixed = builder.add(attrs.evolve(mixes[0], rows=rows, branches=tuple(made)), *parts)
    return builder.build(builder.add(Output(), mixed))


def _receive(hop: HopParts, peers: Mapping[int, tuple[tuple[int, int], ...]]) -> Receive:
    return Receive(hop.hop, hop.store, peers.get(hop.hop, ()))
