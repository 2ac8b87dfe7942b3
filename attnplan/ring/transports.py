"""Transports: in which hops the keys that a rank needs arrive, and what refuses to carry them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import gcd
from typing import Literal, get_args

import attrs

from attnplan.errors import PassError, RingError, did_you_mean
from attnplan.ir import Graph, RowMap
from attnplan.ir.buffers import kept_heads
from attnplan.ir.progressions import Progression, joined, union
from attnplan.lower import lower
from attnplan.passes import Canonicalize, Decompose, Lattice, Ring, SplitHeads
from attnplan.passes.ring import HopParts, Keys, as_map
from attnplan.passes.ring_cut import parts_of
from attnplan.patterns.sums import Conjunction
from attnplan.ring.layouts import Kind, Layout
from attnplan.ring.program import Collective
from attnplan.spec import AttentionSpec

Transport = Literal["local", "halo", "ring", "all-gather", "ulysses", "hybrid", "rows"]
TRANSPORTS: tuple[Transport, ...] = get_args(Transport)
PASSES = (Canonicalize(), SplitHeads(), Decompose(), Lattice())
COLLECTIVES: dict[Transport, Collective] = {"all-gather": "all-gather", "ulysses": "all-to-all", "rows": "all-to-all"}

Received = dict[int, tuple[RowMap, ...]]
"""The rows that each peer sends, by rank."""


@attrs.frozen(cache_hash=True)
class Setting:
    """A spec on some ranks: ``ring`` groups of ``ulysses`` neighbouring ranks; heads are spread inside a group."""

    spec: AttentionSpec
    ring: int
    ulysses: int
    layout: Kind
    transport: Transport

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.ring * self.ulysses

    @property
    def queries(self) -> Layout:
        """Which queries each rank holds."""
        return Layout(self.layout, self.ranks, self.spec.shape.seq_len)

    @property
    def keys(self) -> Layout:
        """Which keys each rank holds."""
        return Layout(self.layout, self.ranks, self.spec.shape.kv_len)

    def group(self, rank: int) -> range:
        """Return the ranks among which a rank's heads are spread."""
        first = rank // self.ulysses * self.ulysses
        return range(first, first + self.ulysses)

    def heads(self, rank: int) -> tuple[int, int]:
        """Return the first query head of a rank, and the one after the last."""
        each = self.spec.heads // self.ulysses
        place = rank % self.ulysses
        return place * each, (place + 1) * each

    def kv_heads(self, rank: int) -> tuple[int, int]:
        """Return the first key/value head of a rank, and the one after the last."""
        group, (start, stop) = self.spec.heads // self.spec.kv_heads, self.heads(rank)
        return start // group, -(-stop // group)


@attrs.frozen
class LocalHop:
    """A hop of one rank, as the rank sees it: what it sends is known to its peers only."""

    setting: Setting
    rank: int
    parts: HopParts
    needs: tuple[tuple[tuple[int, int], tuple[Progression, ...]], ...]
    """Rows of the store, each once, by the range of key/value heads that needs them; the rank's own among them."""

    @property
    def receives(self) -> Received:
        """The rows that each peer sends."""
        found: Received = {}
        for heads, rows in self.needs:
            for one in rows:
                for owner, share in self.setting.keys.shares(one):
                    if owner != self.rank:
                        found[owner] = (*found.get(owner, ()), as_map(share, *heads))
        return found

    def elements(self, ranks: Sequence[int] | None = None) -> int:
        """Return the number of (head, row) elements of the store that some ranks hold, of all ranks by default."""
        held = [p for r in ranks or () for p in self.setting.keys.rows(r)]
        return sum(
            (heads[1] - heads[0]) * (one.count if ranks is None else sum(one.common(p).count for p in held))
            for heads, rows in self.needs
            for one in rows
        )

    @property
    def remote(self) -> int:
        """Number of elements received, of k and of v each."""
        return self.elements() - self.elements([self.rank])

    def peers(self) -> set[int]:
        """Return the ranks that may send; where rows lie further apart than shards are long, some of them may not."""
        layout, found = self.setting.keys, set[int]()
        rows = [one for _, each in self.needs for one in each]
        if layout.kind == "striped":
            for one in set(rows):
                apart = range(min(one.count, layout.ranks // gcd(one.step, layout.ranks)))
                found.update((one.start + i * one.step) % layout.ranks for i in apart)
        else:
            spans = joined([_span(one, layout.run) for one in rows])
            found.update(layout.owner(i * layout.run) for span in spans for i in span)
        return found - {self.rank}


def _span(rows: Progression, run: int) -> Progression:
    """Return the runs between the first and the last row."""
    return Progression(rows.start // run, 1, rows.last // run - rows.start // run + 1)


@attrs.frozen
class LocalPlan:
    """What one rank attends over and receives."""

    rank: int
    ring: Ring
    hops: tuple[LocalHop, ...]
    every: int = 1
    """Hops of the ring for which each planned one beyond its own stands; 1 if all are planned."""

    @property
    def why(self) -> str:
        """Why more rows are sent than are needed; empty if none are."""
        return next((h.parts.why for h in self.hops if h.parts.why), "")


@lru_cache(maxsize=64)
def lowered(spec: AttentionSpec) -> Graph:
    """Return the graph that ranks are cut from."""
    graph = lower(spec)
    for one in PASSES:
        graph = one(graph)
    return graph


def refusals(spec: AttentionSpec, ranks: int, ulysses: int, layout: str, transport: str) -> Iterator[str]:
    """Iterate over the reasons, in words, why a transport cannot carry a spec, as far as no rank has to be planned."""
    if not spec.is_static:
        yield "lengths arrive with the call: a rank would not know which rows it holds; give seq_len and kv_len as ints"
    if spec.q_offset:
        yield "the position of query row 0 arrives with the call, so no rank knows which keys its queries meet"
    yield from _whole_operands(spec)
    if transport == "hybrid" and not 1 < ulysses < ranks:
        yield "hybrid needs a mesh of two dimensions, both above 1: ranks of one node exchange heads, nodes form a ring"
    if transport not in ("hybrid", "ulysses") and ulysses != 1:
        yield f"{transport} spreads no heads, the mesh asks for {ulysses} ranks a group"
    if transport in ("hybrid", "ulysses") and ulysses > 1:
        yield from _heads(spec, ulysses)
    if transport == "halo" and layout != "contiguous":
        yield f"halo sends rows next to a shard, and a {layout} shard has no such neighbours; use layout='contiguous'"


def _whole_operands(spec: AttentionSpec) -> Iterator[str]:
    if spec.bias:
        yield "a bias has a row for each query and a column for each key, and would lie whole on every rank"


def _heads(spec: AttentionSpec, ulysses: int) -> Iterator[str]:
    if spec.heads % ulysses:
        yield f"{spec.heads} query heads do not spread over {ulysses} ranks"
    elif spec.kv_heads % ulysses and ulysses % spec.kv_heads:
        yield f"{spec.kv_heads} key/value heads do not spread over {ulysses} ranks, nor ranks over heads"


def estimated_parts(setting: Setting) -> int:
    """Return an upper estimate of the attends of one rank: pieces of its queries times those of the keys they meet."""
    total, length = 0, setting.keys.length
    mine, per = (x.rows_of(setting.group(0)) for x in (setting.queries, setting.keys))
    singly = setting.layout == "striped" or setting.transport in ("ring", "hybrid")
    shard = max(1, length // setting.ring)
    for part in parts_of(lowered(setting.spec)):
        reach = min(length, part.k.last_row - part.k.row + 1, part.k.length * max(part.k.axes[-1].row, 1))
        known = Conjunction.of(part.op.where)
        if known.left is not None and known.right is not None:
            reach = min(reach, shard + known.left + known.right)
        near = 1 if reach <= shard else -(-reach // shard)
        owners = setting.ring if setting.layout == "striped" else near
        total += len(mine) * len(per) * (owners if singly and setting.transport != "ulysses" else 1)
    return total


def check(setting: Setting) -> None:
    """Raise :class:`~attnplan.errors.RingError` with every reason why a setting is refused."""
    reasons = list(refusals(setting.spec, setting.ranks, setting.ulysses, setting.layout, setting.transport))
    if reasons:
        raise RingError(f"transport {setting.transport!r} is refused: {'; '.join(reasons)}")


def setting_of(spec: AttentionSpec, ranks: int | tuple[int, int], layout: str, transport: str) -> Setting:
    """Return the setting that arguments name; ``ranks`` is a number, or (ring groups, ranks that share heads).

    Raises
    ------
    RingError
        If the layout or the transport is unknown or refused.
    """
    if transport not in TRANSPORTS:
        raise RingError(f"unknown transport {transport!r}{did_you_mean(transport, TRANSPORTS)}")
    ring, ulysses = (ranks, 1) if isinstance(ranks, int) else ranks
    if ring < 1 or ulysses < 1:
        raise RingError(f"ranks must be at least 1, got {ranks}")
    if transport == "ulysses":
        ring, ulysses = 1, ring * ulysses
    elif transport != "hybrid" and not isinstance(ranks, int):
        ring, ulysses = ring * ulysses, 1
    Layout(layout, ring * ulysses, 1)  # type: ignore[arg-type]  # it checks the kind
    setting = Setting(spec, ring, ulysses, layout, transport)  # type: ignore[arg-type]
    check(setting)
    return setting


@lru_cache(maxsize=512)
def local_plan(setting: Setting, rank: int, every: int = 1) -> LocalPlan:
    """Return what a rank attends over and receives; with ``every`` above 1, in a sample of the hops of a ring.

    Raises
    ------
    RingError
        If the transport cannot carry what the rank needs.
    """
    group = setting.group(rank)
    queries = setting.queries.rows(rank) if setting.ulysses == 1 else setting.queries.rows_of(group)
    ring = Ring(
        shape=setting.spec.shape,
        queries=queries,
        heads=setting.heads(rank),
        kv_heads=setting.kv_heads(rank),
        keys=tuple(k for k in _keys(setting, rank) if k.hop % every == 0),
    )
    try:
        found = ring.hops(lowered(setting.spec))
    except PassError as error:
        raise RingError(f"transport {setting.transport!r}, layout {setting.layout!r} is refused: {error}") from None
    hops = tuple(LocalHop(setting, rank, h, () if h.own else _by_heads(h.store)) for h in found)
    _check_carried(setting, rank, hops)
    return LocalPlan(rank, ring, hops, every)


def _keys(setting: Setting, rank: int) -> Iterator[Keys]:
    """Iterate over the hops of a transport, empty ones included."""
    own, length = setting.keys.rows(rank), setting.keys.length
    match setting.transport:
        case "all-gather":
            striped = setting.layout == "striped"  # slots of one step each are what kernels call causal
            every = (p for r in range(setting.ranks) for p in setting.keys.rows(r))
            yield Keys(0, tuple(every) if striped else (Progression(0, 1, length),), "whole")
        case "ring" | "ulysses" | "hybrid":
            if setting.ulysses == 1:
                yield Keys(0, own, "own")
            else:
                yield Keys(0, setting.keys.rows_of(setting.group(rank)), "range")
            place = rank // setting.ulysses
            for hop in range(1, setting.ring):
                first = (place - hop) % setting.ring * setting.ulysses
                yield Keys(hop, setting.keys.rows_of(range(first, first + setting.ulysses)), "range")
        case _:
            yield Keys(0, own, "own")
            yield Keys(1, tuple(_others(setting.keys, rank)), "needed")


def _others(layout: Layout, rank: int) -> Iterator[Progression]:
    """Iterate over the rows that a rank does not hold."""
    if layout.kind == "striped":
        yield from (p for r in range(layout.ranks) if r != rank for p in layout.rows(r))
        return
    low = 0
    for own in sorted(layout.rows(rank), key=lambda p: p.start):
        yield Progression(low, 1, own.start - low)
        low = own.last + 1
    yield Progression(low, 1, layout.length - low)


def _by_heads(store: Sequence[RowMap]) -> tuple[tuple[tuple[int, int], tuple[Progression, ...]], ...]:
    """Return the rows that each run of neighbouring heads needs, each once."""
    each: dict[tuple[int, int], list[Progression]] = {}
    for one in store:
        for head, width, rows in progressions(one):
            each.setdefault((head, head + width), []).append(rows)
    if len(each) == 1:
        return tuple((heads, tuple(union(rows))) for heads, rows in each.items())
    single: dict[int, list[Progression]] = {}
    for (start, stop), given in each.items():
        for head in range(start, stop):
            single.setdefault(head, []).extend(given)
    runs: list[tuple[tuple[int, int], tuple[Progression, ...]]] = []
    for head in sorted(single):
        kept = tuple(union(single[head]))
        if runs and runs[-1][0][1] == head and runs[-1][1] == kept:
            runs[-1] = ((runs[-1][0][0], head + 1), kept)
        else:
            runs.append(((head, head + 1), kept))
    return tuple(runs)


def progressions(rows: RowMap) -> Iterator[tuple[int, int, Progression]]:
    """Iterate over (first head, number of heads, rows) of the progressions that a map shows, in any order.

    Segments that go on where the one before ends are one progression.

    Examples
    --------
    >>> from attnplan.ir import Axis
    >>> list(progressions(RowMap(0, 0, (Axis(2, head=1), Axis(4, row=16), Axis(8, row=2)))))
    [(0, 2, Progression(start=0, step=2, count=32))]
    """
    wide = next((i for i, a in enumerate(rows.batch) if a.head == 1 and not a.row), None)
    width = 1 if wide is None else rows.axes[wide].size
    step, count = max(rows.axes[-1].row, 1), rows.length
    moving = [a for i, a in enumerate(rows.batch) if i != wide and a.size > 1 and not a.repeats]
    places = [(rows.head, rows.row)]
    for axis in sorted(moving, key=lambda a: a.row):
        if not axis.head and count == 1:
            step, count = axis.row, axis.size
        elif not axis.head and axis.row == step * count:
            count *= axis.size
        else:
            places = [(h + t * axis.head, r + t * axis.row) for h, r in places for t in range(axis.size)]
    for head, row in places:
        yield head, width, Progression(row, step, count)


def _check_carried(setting: Setting, rank: int, hops: Sequence[LocalHop]) -> None:
    if setting.transport == "local":
        peers = sorted({p for h in hops for p in h.peers()})
        if peers:
            raise RingError(
                f"transport 'local' is refused: rank {rank} needs rows of rank {peers[0]}"
                + (f" and {len(peers) - 1} more" if len(peers) > 1 else "")
            )
    if setting.transport == "halo":
        for hop in hops:
            if not hop.parts.own:
                _check_halo(setting, rank, hop)


def _check_halo(setting: Setting, rank: int, hop: LocalHop) -> None:
    """Refuse rows that do not follow one another from the shard on."""
    own = setting.keys.rows(rank)
    low, stop = (own[0].start, own[-1].last + 1) if own else (0, 0)
    rows = sorted((p for m in hop.parts.store for _, _, p in progressions(m)), key=lambda p: p.start)
    reach = {"before": low, "behind": stop}
    for side, ordered in (("before", rows[::-1]), ("behind", rows)):
        for p in ordered:
            before = p.start < low
            if before != (side == "before"):
                continue
            touches = p.last + 1 >= reach[side] if before else p.start <= reach[side]
            if p.step > 1 or not touches or kept_heads(hop.parts.store) is None:
                raise RingError(
                    f"transport 'halo' is refused: rank {rank} needs rows {p.start} to {p.last}"
                    + (f" by steps of {p.step}" if p.step > 1 else "")
                    + f", which do not follow its own rows {low} to {stop - 1} without a gap; use 'rows'"
                )
            reach[side] = min(reach[side], p.start) if before else max(reach[side], p.last + 1)
