"""One rank's call, forward and backward, as routines that a transport runs.

At hop h a rank waits for what hop h needs, starts the exchange of hop h + 1, and computes: the transfer runs beside the
kernels. In the backward keys and values travel once more, and their gradients go straight home, in float32, to be added
in the order of hops, and of peers within a hop. Every rank goes through all hop numbers in order, so the requests of
any two ranks come in the same order, also where one of them has nothing to do at some hop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from attnplan.ring.program import Exchange, Hop, RankProgram
from attnplan.runtime.ring.exchanges import Received, Routine, Sizes, Start, Wait
from attnplan.runtime.ring.merging import Mixing, Total
from attnplan.runtime.ring.parts import Flow, Gradients, Part
from attnplan.runtime.ring.rows import Assembly, Holding, Maps, assembly
from attnplan.runtime.ring.stores import Asked, Stores
from attnplan.runtime.ring.sums import Sum
from attnplan.runtime.views import accumulator
from attnplan.spec import AttentionSpec

Pair = tuple[Tensor, Tensor]
KEYS, GRADIENTS = "keys and values", "gradients of keys and values"
FIRST, LAST = -1, 1 << 20
"""Hop numbers of the exchanges before and after all hops."""


@attrs.frozen(eq=False)
class Result:
    """What a forward returns, and what its backward needs."""

    out: Tensor
    lse: Tensor | None
    queries: Tensor
    """The queries that the rank attended for."""
    parts: tuple[Pair, ...]
    """Output and LSE of each softmax at those queries."""
    total: Tensor | None
    """Their LSE after mixing."""


@attrs.frozen(eq=False)
class Route:
    """How the messages of an exchange are packed, and what is made of them; the same in every call."""

    sends: tuple[tuple[Assembly, tuple[int, ...]], ...]
    """What is packed, once for all peers that get the same rows."""
    outgoing: Mapping[int, Holding]
    incoming: Mapping[int, Holding]
    peers: tuple[int, ...]
    """Who sends something, in order."""
    _expected: dict[object, dict[int, Sizes]] = attrs.field(factory=dict, init=False)

    @classmethod
    def of(cls, exchange: Exchange, held: Holding) -> Route:
        """Return the route of an exchange whose sender has what is ``held``."""
        outgoing, incoming = (
            {p: Holding.of(m) for p, m in maps.items()} for maps in (exchange.sends, exchange.receives)
        )
        targets: dict[Maps, list[int]] = {}
        for peer, maps in exchange.sends.items():
            targets.setdefault(maps, []).append(peer)
        packed = tuple((assembly(outgoing[p[0]], (held,)), tuple(p)) for p in targets.values())
        return cls(packed, outgoing, incoming, tuple(sorted(incoming)))

    def expected(self, tensors: Sequence[Tensor], *, home: bool = False) -> Mapping[int, Sizes]:
        """Return what messages of tensors hold: those that arrive, or the gradients that come home, which are wide."""
        key = (home, *((x.shape[0], x.shape[-1], x.dtype) for x in tensors))
        if key not in self._expected:
            held = self.outgoing if home else self.incoming
            self._expected[key] = {peer: _sizes(one, tensors, wide=home) for peer, one in held.items()}
        return self._expected[key]

    def messages(self, tensors: Sequence[Tensor]) -> dict[int, tuple[Tensor, ...]]:
        """Return what goes to each peer."""
        found: dict[int, tuple[Tensor, ...]] = {}
        for plan, peers in self.sends:
            packed = tuple(plan.gather([x], x) for x in tensors)
            found.update(dict.fromkeys(peers, packed))
        return found


class Rank:
    """A rank's program with its emitted graphs."""

    def __init__(self, program: RankProgram, spec: AttentionSpec, parts: Sequence[Sequence[Part | None]]) -> None:
        self.program, self.parts = program, parts
        self.mixing = Mixing.of(spec, program.softmaxes)
        self.queries, self.keys = Holding(program.held, spec.heads), Holding(program.keys, spec.kv_heads)
        """What the rank's shards of q and out, and of k and v, hold."""
        self.attended = self.queries if program.first is None else Holding.of(program.queries)
        """The queries it attends for: its own, or those of some heads."""
        self.value_dim = spec.value_dim
        self._routes: dict[int, Route] = {}
        self._stores: dict[int, Assembly] = {}
        self.hops = {hop.index: (hop, part) for hop, part in zip(program.hops, parts, strict=True)}
        self.last_hop = max(self.hops, default=-1)

    def assembled(self) -> Iterator[Asked]:
        """Iterate over the stores that this rank copies rows to, in a forward and again in a backward."""
        for hop, parts in self.hops.values():
            plan = self._store_plan(hop) if any(parts) else None
            if plan is not None and plan.copies:
                yield hop.index, plan.wanted

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], stores: Stores | None = None
    ) -> Routine[Result]:
        """Run forward on shards ``[B, H, s, D]``, ``[B, H_kv, t, D]``, ``[B, H_kv, t, Dv]``.

        ``stores`` are those of all ranks of this process, where there are others.
        """
        asked = q
        if self.program.first is not None:
            (asked,) = yield from self._moved("queries", self.program.first, (q,))
        totals = [Total(asked, self.value_dim) for _ in self.program.softmaxes]
        handle = yield from self._fetch(0, k, v)
        for h in range(self.last_hop + 1):
            received: Received = (yield Wait(handle)) if handle is not None else {}
            handle = yield from self._fetch(h + 1, k, v)
            if h not in self.hops:
                continue
            hop, parts = self.hops[h]
            if any(parts):
                keys, values = (self._store(hop, i, x, received, stores) for i, x in enumerate((k, v)))
                for total, part in zip(totals, parts, strict=True):
                    if part is not None:
                        total.add(*part.forward(asked, keys, values, operands), part.rows)
        pairs = tuple(total.result() for total in totals)
        out, lse = self.mixing.forward(pairs)
        total_lse = lse
        if self.program.last is not None:
            moving = (out,) if lse is None else (out, lse.unsqueeze(-1))
            back = yield from self._moved("outputs", self.program.last, moving, home=True)
            out, lse = back[0], back[1].squeeze(-1) if lse is not None else None
        return Result(out, lse, asked, pairs, total_lse)

    def backward(
        self,
        grad: Tensor,
        grad_lse: Tensor | None,
        saved: Result,
        k: Tensor,
        v: Tensor,
        operands: Mapping[str, Any],
        names: Sequence[str] = (),
        stores: Stores | None = None,
    ) -> Routine[Gradients]:
        """Return the gradients of the shards of q, k and v, and this rank's part of those of the named operands."""
        if self.program.first is not None:
            moving = (grad,) if grad_lse is None else (grad, grad_lse.unsqueeze(-1))
            there = yield from self._moved("gradients of outputs", self.program.first, moving)
            grad, grad_lse = there[0], there[1].squeeze(-1) if grad_lse is not None else None
        flows = self.mixing.backward(grad, grad_lse, saved.total, saved.parts)
        totals = tuple(Sum(x) for x in (saved.queries, k, v, *(operands[name] for name in names)))
        handle = yield from self._fetch(0, k, v)
        home: tuple[Any, Exchange] | None = None
        for h in range(self.last_hop + 1):
            received: Received = (yield Wait(handle)) if handle is not None else {}
            handle = yield from self._fetch(h + 1, k, v)
            if h not in self.hops:
                continue
            hop, parts = self.hops[h]
            returns = self._hop_backward(
                hop, parts, flows, saved.queries, (k, v), received, totals, operands, names, stores
            )
            if home is not None:
                self._add_arrived(*home[1:], (yield Wait(home[0])), totals)
                home = None
            if hop.exchange is not None:
                sent = yield Start(
                    GRADIENTS,
                    h,
                    _back(hop.exchange),
                    returns,
                    self._route(hop.exchange, self.keys).expected((k, v), home=True),
                )
                home = (sent, hop.exchange)
        if home is not None:
            self._add_arrived(home[1], (yield Wait(home[0])), totals)
        dq = totals[0].result()
        if self.program.last is not None:
            (dq,) = yield from self._moved("gradients of queries", self.program.last, (dq,), home=True)
        return dq, *(total.result() for total in totals[1:])

    def _hop_backward(
        self,
        hop: Hop,
        parts: Sequence[Part | None],
        flows: Sequence[Flow],
        q: Tensor,
        own: Pair,
        received: Received,
        totals: Sequence[Sum],
        operands: Mapping[str, Any],
        names: Sequence[str],
        stores: Stores | None,
    ) -> dict[int, Pair]:
        """Add a hop's gradients to those of this rank's rows, and return those of the rows that peers sent."""
        sums = None
        if any(parts):
            keys, values = (self._store(hop, i, x, received, stores) for i, x in enumerate(own))
            sums = (Sum(keys), Sum(values))
            for flow, part in zip(flows, parts, strict=True):
                if part is not None:
                    dq, dk, dv, *more = part.backward(flow, q, keys, values, operands, names)
                    each = zip((totals[0], *sums), (dq, dk, dv), part.into, strict=True)
                    for total, piece, rows in (*each, *((t, x, None) for t, x in zip(totals[3:], more, strict=True))):
                        total.add(piece, rows)
        maps = {} if hop.exchange is None else hop.exchange.receives
        homes = [self._home(hop, None if sums is None else sums[i], totals[1 + i], i, received) for i in range(2)]
        return {peer: (homes[0][peer], homes[1][peer]) for peer in maps}

    def _home(self, hop: Hop, total: Sum | None, own: Sum, i: int, received: Received) -> dict[int, Tensor]:
        """Add the gradient of a hop's store to that of this rank's rows, and return what goes home to each peer."""
        peers = [] if hop.exchange is None else sorted(hop.exchange.receives)
        gradient, plan = None if total is None else total.found(), self._store_plan(hop)
        source = 0 if plan is None else plan.same
        if gradient is not None and source == 0:
            own.add(gradient)
        homes: dict[int, Tensor] = {}
        for place, peer in enumerate(peers, start=1):
            like = received[peer][i]
            wide = accumulator(like.dtype)
            if gradient is not None and source == place:  # the store is this message
                homes[peer] = torch.empty_like(like, dtype=wide).copy_(gradient)
            elif (
                gradient is not None and plan is not None and place in plan.whole
            ):  # its rows lie together in the store
                homes[peer] = plan.whole[place].of(gradient).to(wide)
            else:
                homes[peer] = torch.zeros_like(like, dtype=wide)
        if gradient is not None and source is None:
            assert plan is not None
            plan.add(gradient, [own.dense(), *homes.values()], but=plan.whole)
        return homes

    def _add_arrived(self, exchange: Exchange, arrived: Received, totals: Sequence[Sum]) -> None:
        """Add the gradients that peers send home, in the order of peers."""
        for peer in sorted(arrived):
            plan = assembly(self._route(exchange, self.keys).outgoing[peer], (self.keys,))
            for i, gradient in enumerate(arrived[peer]):
                if plan.same is None:
                    plan.add(gradient, [totals[1 + i].dense()])
                else:
                    totals[1 + i].add(gradient)

    def _fetch(self, h: int, k: Tensor, v: Tensor) -> Routine[Any]:
        """Start the exchange of hop h; return its handle, None if there is none."""
        exchange = self.hops[h][0].exchange if h in self.hops else None
        if exchange is None:
            return None
        route = self._route(exchange, self.keys)
        handle = yield Start(KEYS, h, exchange.collective, route.messages((k, v)), route.expected((k, v)))
        return handle

    def _route(self, exchange: Exchange, held: Holding) -> Route:
        """Return the route of an exchange; each hop has one, and so do those before and after all hops."""
        if exchange.hop not in self._routes:
            self._routes[exchange.hop] = Route.of(exchange, held)
        return self._routes[exchange.hop]

    def _store_plan(self, hop: Hop) -> Assembly | None:
        """Return how a hop's keys are put together from this rank's own and from each peer's message."""
        if hop.store is None:
            return None
        if hop.index not in self._stores:
            route = None if hop.exchange is None else self._route(hop.exchange, self.keys)
            messages = () if route is None else tuple(route.incoming[p] for p in route.peers)
            self._stores[hop.index] = assembly(_store_of(hop), (self.keys, *messages))
        return self._stores[hop.index]

    def _store(self, hop: Hop, i: int, own: Tensor, received: Received, stores: Stores | None) -> Tensor:
        """Return the keys (i = 0) or values (i = 1) that a hop's graphs attend to."""
        plan = self._store_plan(hop)
        if plan is None:
            return own

        def made() -> Tensor:
            return plan.gather([own, *(received[p][i] for p in sorted(received))], own)

        return made() if stores is None or not plan.copies else stores.take((hop.index, plan.wanted), i, made)

    def _moved(
        self, name: str, exchange: Exchange, tensors: Sequence[Tensor], *, home: bool = False
    ) -> Routine[list[Tensor]]:
        """Exchange rows of queries or outputs: to the ranks that attend for them, or ``home`` again."""
        source, wanted = (self.attended, self.queries) if home else (self.queries, self.attended)
        route = self._route(exchange, source)
        handle = yield Start(
            name, LAST if home else FIRST, exchange.collective, route.messages(tensors), route.expected(tensors)
        )
        received: Received = yield Wait(handle)
        plan = assembly(wanted, (source, *(route.incoming[p] for p in route.peers)))
        return [plan.gather([x, *(received[p][i] for p in route.peers)], x) for i, x in enumerate(tensors)]


def _sizes(held: Holding, tensors: Sequence[Tensor], *, wide: bool) -> Sizes:
    return tuple(
        ((x.shape[0], held.heads, held.length, x.shape[-1]), accumulator(x.dtype) if wide else x.dtype) for x in tensors
    )


def _store_of(hop: Hop) -> Holding:
    """Return what a hop's store holds; its graphs say whether heads are apart in it."""
    assert hop.store is not None
    graph = next(g for g in hop.graphs if g is not None)
    rows = graph.inputs["k"].type.rows
    return Holding(hop.store, rows.elements_count // rows.length)


def _back(exchange: Exchange) -> Any:
    """Return how gradients go home: one by one to their owners, also where one collective brought all rows."""
    return "p2p" if exchange.collective == "p2p" else "all-to-all"
