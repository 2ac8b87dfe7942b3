"""Programs of ranks: what a rank receives is its own knowledge, what it sends is that of its peers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from attnplan.errors import RingError
from attnplan.ir import Attend, Graph, Mix, RowMap
from attnplan.ir.buffers import Buffer
from attnplan.passes.ring import HopParts, Local, as_map, hop_graph, whole_graph
from attnplan.ring.program import Exchange, Hop, RankProgram
from attnplan.ring.transports import COLLECTIVES, LocalHop, LocalPlan, Setting, local_plan, lowered, setting_of
from attnplan.spec import AttentionSpec

Maps = tuple[RowMap, ...]


def rank_program(
    spec: AttentionSpec, ranks: int | tuple[int, int], layout: str, transport: str, rank: int
) -> RankProgram:
    """Return what one rank does.

    Parameters
    ----------
    spec
        What to compute, over the whole sequence.
    ranks
        Number of ranks; for ``hybrid``, (groups of the ring, ranks of a group, among which heads are spread).
    layout
        ``"contiguous"``, ``"zigzag"`` or ``"striped"``.
    transport
        ``"local"``, ``"halo"``, ``"ring"``, ``"all-gather"``, ``"ulysses"``, ``"hybrid"`` or ``"rows"``.
    rank
        Which rank.

    Raises
    ------
    RingError
        If the transport cannot carry the spec, with the reason.

    Examples
    --------
    >>> from attnplan.patterns import window
    >>> spec = AttentionSpec(seq_len=4096, heads=2, head_dim=64, pattern=window(256, 0))
    >>> program = rank_program(spec, 16, "contiguous", "halo", rank=3)
    >>> [(hop.index, hop.exchange.receives if hop.exchange else None) for hop in program.hops][1]
    (1, {2: (RowMap(head=0, row=512, axes=(Axis(size=2, head=1, row=0), Axis(size=256, head=0, row=1))),)})

    References
    ----------
    Liu et al., Ring Attention, arXiv 2310.01889; Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509; Fang and Zhao,
    USP, arXiv 2405.07719, for the hybrid of both.
    """
    return programs(spec, ranks, layout, transport)[rank]


@lru_cache(maxsize=32)
def programs(spec: AttentionSpec, ranks: int | tuple[int, int], layout: str, transport: str) -> tuple[RankProgram, ...]:
    """Return the programs of all ranks.

    Raises
    ------
    RingError
        If the transport cannot carry the spec, with the reason.
    """
    setting = setting_of(spec, ranks, layout, transport)
    plans = [local_plan(setting, r) for r in range(setting.ranks)]
    sends: dict[int, dict[int, dict[int, Maps]]] = {}
    receives = [{hop.parts.hop: hop.receives for hop in plan.hops} for plan in plans]
    for plan, got in zip(plans, receives, strict=True):
        for index, each in got.items():
            for peer, maps in each.items():
                sends.setdefault(index, {}).setdefault(peer, {})[plan.rank] = maps
    return tuple(_program(setting, plan, got, sends) for plan, got in zip(plans, receives, strict=True))


def _program(
    setting: Setting,
    plan: LocalPlan,
    received: Mapping[int, Mapping[int, Maps]],
    sends: Mapping[int, Mapping[int, Mapping[int, Maps]]],
) -> RankProgram:
    rank = plan.rank
    known = {hop.parts.hop: hop for hop in plan.hops if hop.parts.parts}
    collective = COLLECTIVES.get(setting.transport)
    indices = sorted(h for h in {*known, *sends} if h in known or collective or rank in sends[h])
    held = tuple(as_map(p, 0, setting.spec.heads) for p in setting.queries.rows(rank))
    keys = tuple(as_map(p, 0, setting.spec.kv_heads) for p in setting.keys.rows(rank))
    softmaxes = _softmaxes(lowered(setting.spec))
    hops = []
    for index in indices:
        hop, sent = known.get(index), sends.get(index, {}).get(rank, {})
        got = received.get(index, {})
        moves = bool(got or sent) or (collective is not None and index in sends)
        exchange = None
        if moves:
            group = _takers(setting, rank, index, sends)
            exchange = Exchange(index, collective or "p2p", ("k", "v"), dict(sent), dict(got), group)
        hops.append(Hop(index, exchange, _store(hop), _graphs(setting, plan, hop, softmaxes, keys)))
    return RankProgram(
        rank=rank,
        ranks=setting.ranks,
        queries=plan.ring.query_maps(),
        hops=tuple(hops),
        softmaxes=softmaxes,
        first=_spread(setting, rank, "q"),
        last=_spread(setting, rank, "o"),
        held=held,
        keys=keys,
        layout=setting.layout,
        transport=setting.transport,
        ulysses=setting.ulysses,
        exact=setting.transport in ("local", "halo", "rows") and not plan.why,
        notes=(plan.why,) if plan.why else (),
        empty=tuple((p.op, p.q, p.k) for hop in plan.hops for p in hop.parts.empty),
    )


def _takers(
    setting: Setting, rank: int, index: int, sends: Mapping[int, Mapping[int, Mapping[int, Maps]]]
) -> tuple[int, ...]:
    """Return the ranks that take part in a hop's exchange with this one."""
    if setting.transport in COLLECTIVES:
        return tuple(range(setting.ranks))
    here = sends.get(index, {})
    peers = {p for p, given in here.items() if rank in given} | set(here.get(rank, {}))
    return tuple(sorted({rank, *peers}))


def _softmaxes(graph: Graph) -> tuple[int, ...]:
    mixed = any(op.rule != "lse" for _, op in graph.of(Mix))
    return tuple(sorted({op.branch for _, op in graph.of(Attend)})) if mixed else (0,)


def _store(hop: LocalHop | None) -> Maps | None:
    return None if hop is None or hop.parts.own else hop.parts.store


def _graphs(
    setting: Setting, plan: LocalPlan, hop: LocalHop | None, softmaxes: tuple[int, ...], keys: Maps
) -> tuple[Graph | None, ...]:
    if hop is None:
        return (None,) * len(softmaxes)
    graph = lowered(setting.spec)
    mixed = any(op.rule != "lse" for _, op in graph.of(Mix))
    local = Local.of(graph, plan.ring, Buffer(keys).rows)
    queries = Buffer(plan.ring.query_maps())
    return tuple(hop_graph(local, queries, hop.parts, branch if mixed else None) for branch in softmaxes)


def _spread(setting: Setting, rank: int, tensor: str) -> Exchange | None:
    """Return the exchange that spreads heads over a group, or the one that undoes it."""
    if setting.ulysses == 1:
        return None
    group, rows = setting.group(rank), setting.queries.rows

    def part(holder: int, heads: int) -> Maps:
        return tuple(as_map(p, *setting.heads(heads)) for p in rows(holder))

    mine = {p: maps for p in group if p != rank and (maps := part(rank, p))}  # my rows, the heads of a peer
    theirs = {p: maps for p in group if p != rank and (maps := part(p, rank))}
    sends, receives = (mine, theirs) if tensor == "q" else (theirs, mine)
    return Exchange(-1 if tensor == "q" else 1 << 30, "all-to-all", (tensor,), sends, receives, tuple(group))


def rank_graph(spec: AttentionSpec, ranks: int | tuple[int, int], layout: str, transport: str, rank: int) -> Graph:
    """Return the graph of a rank with every hop in it: what is received is an op, printed, parsed and priced.

    Raises
    ------
    RingError
        If the transport cannot carry the spec, or no query of the rank meets a key.
    """
    setting = setting_of(spec, ranks, layout, transport)
    plan = local_plan(setting, rank)
    if not any(h.parts.parts for h in plan.hops):
        raise RingError(f"rank {rank} has nothing to compute")
    keys = tuple(as_map(p, 0, spec.kv_heads) for p in setting.keys.rows(rank))
    peers = {h.parts.hop: _counts(h) for h in plan.hops}
    hops: tuple[HopParts, ...] = tuple(h.parts for h in plan.hops if h.parts.parts)
    return whole_graph(lowered(spec), plan.ring, hops, own=keys, peers=peers)


def _counts(hop: LocalHop) -> tuple[tuple[int, int], ...]:
    return tuple((p, sum(m.elements_count for m in maps)) for p, maps in sorted(hop.receives.items()))
