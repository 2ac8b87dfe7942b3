"""The proof of a ring: the ranks together compute the spec, each over rows that it really has.

Three things are read off the programs and nothing is believed:

- the pairs of all graphs of all ranks and hops, at their positions in the whole sequence, sum to those of the spec;
- each attend's addresses in the rank's queries and in the store are the rows that it says it stands at, and each row of
  the store is one that the rank holds or receives;
- each message has the same rows in the same order at both ends, and the sender holds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import attrs

from attnplan.errors import PassError, VerifyError
from attnplan.ir import Attend, Axis, Graph, Input, RowMap, Take
from attnplan.ir.buffers import Buffer
from attnplan.ir.coverage import Pairs, Term, attend_coverage, coverage, join_pairs, spec_coverage, spec_inputs
from attnplan.ir.probes import PROBES, Probe
from attnplan.ir.progressions import Progression
from attnplan.patterns import Pattern
from attnplan.patterns.operands import static_part
from attnplan.patterns.sums import PRIME
from attnplan.ring.program import Exchange, Hop, RankProgram
from attnplan.spec import AttentionSpec

Maps = Sequence[RowMap]
Rows = Mapping[int, Sequence[Progression]]
"""Rows of each head."""
MAX_LANES = 1 << 18
MAX_ASKED = 1 << 30
"""Most pairs that are asked one by one."""


def check_ring(programs: Sequence[RankProgram], spec: AttentionSpec) -> None:
    """Check that the programs of all ranks together compute ``spec``.

    Parameters
    ----------
    programs
        One for each rank, in order.
    spec
        What was asked for, over the whole sequence.

    Raises
    ------
    VerifyError
        If a pair is missing, doubled or wrong, an attend reads rows that its rank does not have, or the two ends of a
        message differ; the message names rank and hop.

    Examples
    --------
    >>> from attnplan.patterns import window
    >>> from attnplan.ring.build import programs
    >>> spec = AttentionSpec(seq_len=64, heads=2, head_dim=8, pattern=window(5))
    >>> check_ring(programs(spec, 4, "contiguous", "halo"), spec)
    """
    if [p.rank for p in programs] != list(range(len(programs))) or any(p.ranks != len(programs) for p in programs):
        raise VerifyError(f"{len(programs)} programs are not those of ranks 0 to {len(programs) - 1}")
    _check_shards(programs, spec)
    for program in programs:
        _check_spread(program)
        for hop in program.hops:
            _check_hop(program, hop, spec)
        for exchange in program.exchanges:
            _check_messages(program, exchange, programs)
    _check_pairs(programs, spec)
    _check_empty(programs, spec)


def _check_shards(programs: Sequence[RankProgram], spec: AttentionSpec) -> None:
    """Check that the shards are a partition of queries and of keys."""
    shape = spec.shape
    for name, heads, length in (("queries", spec.heads, shape.seq_len), ("keys", spec.kv_heads, shape.kv_len)):
        held = [m for p in programs for m in (p.held if name == "queries" else p.keys)]
        if _prints(held) != _prints([RowMap.whole(heads, length)]):
            raise VerifyError(f"the shards of all ranks do not hold each head and row of the {name} exactly once")


def _prints(maps: Maps) -> tuple[int, ...]:
    """Return a fingerprint of the multiset of (head, row), at two random points."""
    return tuple(sum(_print(probe, m) for m in maps) % PRIME for probe in PROBES)


def _print(probe: Probe, rows: RowMap) -> int:
    point = probe.pairs
    total = pow(probe.head, rows.head, PRIME) * pow(point.x, rows.row, PRIME)
    for axis in rows.axes:
        ratio = pow(probe.head, axis.head, PRIME) * pow(point.x, axis.row, PRIME) % PRIME
        total = total * point.geometric(ratio, axis.size) % PRIME
    return total


def _check_spread(program: RankProgram) -> None:
    """Check that the queries are the rank's own, or what it has of them after the heads were spread."""
    who = f"rank {program.rank}"
    if (program.first is None) != (program.last is None):
        raise VerifyError(f"{who} spreads heads without gathering them again, or gathers what was never spread")
    if program.first is None or program.last is None:
        if program.queries != program.held:
            raise VerifyError(f"{who} attends for queries that it does not hold")
        return
    heads = {(m.head, m.head + m.axes[0].size) for m in program.queries}
    if len(heads) > 1:
        raise VerifyError(f"{who} has different heads of different queries")
    own = [
        RowMap(start, m.row, (Axis(stop - start, head=1), *m.axes[1:])) for start, stop in heads for m in program.held
    ]
    got = [m for maps in program.first.receives.values() for m in maps]
    if _prints(program.queries) != _prints([*own, *got]):
        raise VerifyError(f"{who} does not have the queries that it attends for, each once")
    if dict(program.last.sends) != dict(program.first.receives) or dict(program.last.receives) != dict(
        program.first.sends
    ):
        raise VerifyError(f"{who} does not send each output home whose query it got")


def _check_hop(program: RankProgram, hop: Hop, spec: AttentionSpec) -> None:
    who = f"rank {program.rank}, hop {hop.index}"
    store = Buffer(tuple(program.keys if hop.store is None else hop.store))
    queries = Buffer(program.queries)
    if hop.store is not None:
        got = hop.exchange.receives if hop.exchange is not None else {}
        have = rows_by_head([*program.keys, *(m for maps in got.values() for m in maps)])
        missing = first_missing(hop.store, have)
        if missing is not None:
            raise VerifyError(f"{who}: row {missing[1]} of key/value head {missing[0]} is neither held nor received")
    if len(hop.graphs) != len(program.softmaxes):
        raise VerifyError(f"{who} has {len(hop.graphs)} graphs for {len(program.softmaxes)} softmaxes")
    for graph in hop.graphs:
        if graph is not None:
            _check_graph(who, graph, queries, store, spec)


def _check_graph(who: str, graph: Graph, queries: Buffer, store: Buffer, spec: AttentionSpec) -> None:
    try:
        graph.verify()
    except PassError as error:
        raise VerifyError(f"{who}: {error}") from error
    whole = {op.tensor: op for op in spec_inputs(spec)}
    for _, op in graph.of(Input):
        buffer = queries if op.tensor == "q" else store
        if (op.heads, op.length) != (buffer.heads, buffer.rows):
            raise VerifyError(
                f"{who}: {op.tensor} has {op.heads} heads of {op.length} rows, the rank has {buffer.heads} "
                f"of {buffer.rows}"
            )
        if (op.features, op.dtype) != (whole[op.tensor].features, whole[op.tensor].dtype):
            raise VerifyError(f"{who}: {op.tensor} has {op.features} features of {op.dtype}, the spec has others")
    for node, attend in graph.of(Attend):
        if any(not isinstance(n.op, Take | Input) for n in graph.args(node)):
            raise VerifyError(f"{who}: %{node.id} attends over what is no row of an input")
        if attend.at is None and (queries.rows, store.rows) != (spec.shape.seq_len, spec.shape.kv_len):
            raise VerifyError(f"{who}: %{node.id} runs on some rows only, and does not say which")
        q, k = (n.type.rows for n in graph.args(node)[:2])
        at = attend.runs(q, k)
        for name, buffer, rows, stands in (("query", queries, q, at[0]), ("key", store, k, at[1])):
            if [position(buffer, one) for one in _run_by_run(rows, stands)] != [_plain(one) for one in stands]:
                raise VerifyError(f"{who}: %{node.id} reads other {name} rows than those it says it stands at")


def _run_by_run(rows: RowMap, runs: Sequence[RowMap]) -> Iterator[RowMap]:
    """Iterate over the addresses of each run of rows, which follow one another along the last axis."""
    start, last = 0, rows.axes[-1]
    for one in runs:
        axes = (*rows.batch, attrs.evolve(last, size=one.length))
        yield attrs.evolve(rows, row=rows.row + start * last.row, axes=axes)
        start += one.length


def position(buffer: Buffer, address: RowMap) -> RowMap | None:
    """Return which elements of the sequence a map shows through its addresses in a tensor; None if in no one map.

    Examples
    --------
    >>> buffer = Buffer((RowMap(0, 8, (Axis(2, head=1), Axis(8, row=2))),))
    >>> position(buffer, RowMap(0, 1, (Axis(2, head=1), Axis(3, row=2))))
    RowMap(head=0, row=10, axes=(Axis(size=2, head=1, row=0), Axis(size=3, head=0, row=4)))
    """
    start = 0
    for held in buffer.maps:
        rows = held.elements_count // buffer.heads
        if start <= address.row and address.last_row < start + rows:
            return _through(held, address, start, kept=buffer.heads > 1)
        start += rows
    return None


def _through(held: RowMap, address: RowMap, start: int, *, kept: bool) -> RowMap | None:
    """Return the elements of ``held`` at some addresses, if each step of them is a step along one axis of it."""
    inner = list(held.axes[1:]) if kept else list(held.axes)
    first = _mixed(address.row - start, inner)
    reach = list(first)
    head, row = held.head, held.row
    if kept:
        lead = held.axes[0]
        if address.last_head >= lead.size:
            return None
        head, row = head + address.head * lead.head, row + address.head * lead.row
    elif address.last_head:
        return None
    head += sum(d * a.head for d, a in zip(first, inner, strict=True))
    row += sum(d * a.row for d, a in zip(first, inner, strict=True))
    axes = []
    for axis in address.axes:
        if axis.size == 1:
            axes.append(Axis(1))
            continue
        steps = _mixed(axis.row, inner)
        by_head = axis.head * held.axes[0].head if kept else 0
        by_row = axis.head * held.axes[0].row if kept else 0
        for i, step in enumerate(steps):
            reach[i] += (axis.size - 1) * step
        axes.append(
            Axis(
                axis.size,
                by_head + sum(d * a.head for d, a in zip(steps, inner, strict=True)),
                by_row + sum(d * a.row for d, a in zip(steps, inner, strict=True)),
            )
        )
    inside = all(last < a.size for last, a in zip(reach, inner, strict=True))
    return RowMap(head, row, tuple(axes)) if inside else None


def _mixed(number: int, axes: Sequence[Axis]) -> list[int]:
    """Return the digits of a flat place along some axes, the last the fastest."""
    digits = []
    for axis in reversed(axes[1:]):
        number, digit = divmod(number, axis.size)
        digits.append(digit)
    return [number, *digits[::-1]] if axes else []


def _plain(rows: RowMap) -> RowMap:
    return RowMap(rows.head, rows.row, tuple(a if a.size > 1 else Axis(1) for a in rows.axes))


def rows_by_head(maps: Maps) -> Rows:
    """Return the rows that some maps show, head by head."""
    found: dict[int, list[Progression]] = {}
    for one in maps:
        for head, rows in _lanes(one):
            found.setdefault(head, []).append(rows)
    return found


def _lanes(rows: RowMap) -> Iterator[tuple[int, Progression]]:
    """Iterate over (head, rows along the last axis)."""
    lanes = rows.elements_count // rows.length if rows.length else 0
    if lanes > MAX_LANES:
        raise VerifyError(f"{rows.sizes} rows are too many to be checked one batch axis after the other")
    last = rows.axes[-1]
    places = [(rows.head, rows.row)]
    for axis in rows.batch:
        places = [(h + t * axis.head, r + t * axis.row) for h, r in places for t in range(axis.size)]
    for head, row in places:
        yield head, Progression(row, max(last.row, 1), last.size)


def first_missing(wanted: Maps, have: Rows) -> tuple[int, int] | None:
    """Return the first (head, row) of some maps that is not there, None if all are."""
    for one in wanted:
        for head, rows in _lanes(one):
            rest = [rows]
            for held in have.get(head, ()):
                rest = [piece for r in rest for piece in r.without(held)]
                if not rest:
                    break
            if rest:
                return head, min(r.start for r in rest)
    return None


def _check_messages(program: RankProgram, exchange: Exchange, programs: Sequence[RankProgram]) -> None:
    who = f"rank {program.rank}, step {exchange.hop}"
    for peer, maps in exchange.receives.items():
        other = _same_step(programs[peer], exchange) if 0 <= peer < len(programs) and peer != program.rank else None
        if other is None or other.sends.get(program.rank) != maps:
            raise VerifyError(f"{who}: what it receives of {exchange.tensors} is not what rank {peer} sends")
    held = rows_by_head(_sendable(program, exchange))
    for peer, maps in exchange.sends.items():
        other = _same_step(programs[peer], exchange) if 0 <= peer < len(programs) and peer != program.rank else None
        if other is None or other.receives.get(program.rank) != maps:
            raise VerifyError(f"{who}: what it sends of {exchange.tensors} is not what rank {peer} receives")
        missing = first_missing(maps, held)
        if missing is not None:
            raise VerifyError(
                f"{who}: does not hold row {missing[1]} of head {missing[0]}, which it sends to rank {peer}"
            )
        if len(programs) > 1 and exchange.collective != "p2p" and peer not in exchange.group:
            raise VerifyError(f"{who}: rank {peer} takes no part in the {exchange.collective}")


def _sendable(program: RankProgram, exchange: Exchange) -> Maps:
    if exchange.tensors == ("q",):
        return program.held
    return program.queries if exchange.tensors == ("o",) else program.keys


def _same_step(program: RankProgram, exchange: Exchange) -> Exchange | None:
    """Return the exchange of a peer that is the other end of a step."""
    key = (exchange.hop, exchange.tensors, exchange.collective)
    return next((e for e in program.exchanges if (e.hop, e.tensors, e.collective) == key), None)


def _check_empty(programs: Sequence[RankProgram], spec: AttentionSpec) -> None:
    """Check pair by pair that what was left out for holding no pair holds none."""
    import numpy as np

    claims = [claim for p in programs for claim in p.empty]
    asked = sum(q.elements_count * k.length for _, q, k in claims)
    if asked > MAX_ASKED:
        raise VerifyError(f"{asked} pairs were left out for not meeting, too many to be asked one by one")
    tables: dict[Pattern, Mapping[str, np.ndarray]] = {}
    for op, q, k in claims:
        where = static_part(op.where)
        known = tables.setdefault(where, where.tables(spec.shape))
        keys = k.row + np.arange(k.length) * k.axes[-1].row
        for index in product(*(range(a.size) for a in q.batch)):
            head, row = _place(q, index)
            key = _place(k, tuple(i if a.size > 1 else 0 for i, a in zip(index, k.batch, strict=True)))[1] - k.row
            rows = row + (op.shift or 0) + np.arange(q.length) * q.axes[-1].row
            for b in range(max((len(t) for t in known.values()), default=1)):
                here = {name: t[min(b, len(t) - 1)] for name, t in known.items()}
                for start in range(0, len(rows), size := max(1, (1 << 22) // len(keys))):
                    some = rows[start : start + size, None]
                    if np.any(where.pairs(here, np.array(head), some, keys + key)):
                        raise VerifyError(f"{op.where!r} was left out for rows from {row} on, which meet keys")


def _place(rows: RowMap, index: tuple[int, ...]) -> tuple[int, int]:
    head = rows.head + sum(a.head * i for a, i in zip(rows.batch, index, strict=True))
    return head, rows.row + sum(a.row * i for a, i in zip(rows.batch, index, strict=True))


def _check_pairs(programs: Sequence[RankProgram], spec: AttentionSpec) -> None:
    """Check that the pairs of all graphs sum to those of the spec, softmax by softmax."""
    expected = spec_coverage(spec).pairs
    softmaxes = {p.softmaxes for p in programs}
    if len(softmaxes) != 1:
        raise VerifyError("the ranks do not agree on the softmaxes")
    (branches,) = softmaxes
    for i, branch in enumerate(branches):
        graphs = [g for p in programs for hop in p.hops if (g := hop.graphs[i]) is not None]
        left_out = [e for p in programs for e in p.empty if len(branches) == 1 or e[0].branch == branch]
        try:
            got = join_pairs([*(coverage(g).pairs for g in graphs), *(attend_coverage(*e) for e in left_out)])
        except PassError as error:
            raise VerifyError(f"the graphs of a rank cannot be summed: {error}") from error
        wanted = {_unmixed(t): v for t, v in expected.items() if not t.mixing or t.mixing[1] == branch}
        if got != wanted:
            which = f"branch {branch}" if len(branches) > 1 else "the spec"
            raise VerifyError(f"the ranks together do not compute the (head, query, key) pairs of {which}, once each")
    mixed = {t.mixing[1] for t in expected if t.mixing}
    if mixed - set(branches):
        raise VerifyError(f"no rank computes branch {min(mixed - set(branches), key=str)}")


def _unmixed(term: Term) -> Term:
    return attrs.evolve(term, mixing=())


__all__ = ["Pairs", "check_ring", "first_missing", "position", "rows_by_head"]
