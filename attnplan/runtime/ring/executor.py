"""One rank's call, forward and backward, as routines that a transport runs.

At hop h a rank waits for what hop h needs, starts the exchange of hop h + 1, and computes: the transfer runs beside the
kernels. In the backward keys and values travel once more, and their gradients go straight home, in float32, to be added
in the order of hops, and of peers within a hop. Every rank goes through all hop numbers in order, so the requests of
any two ranks come in the same order, also where one of them has nothing to do at some hop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from attnplan.ring.program import Exchange, Hop, RankProgram
from attnplan.runtime.ring.exchanges import Received, Routine, Sizes, Start, Wait
from attnplan.runtime.ring.merging import Mixing, Total
from attnplan.runtime.ring.parts import Flow, Part
from attnplan.runtime.ring.rows import Assembly, Holding, Maps, assembly
from attnplan.runtime.views import accumulator, zero_gradient
from attnplan.spec import AttentionSpec

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]
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
        self.hops = {hop.index: (hop, part) for hop, part in zip(program.hops, parts, strict=True)}
        self.last_hop = max(self.hops, default=-1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any]) -> Routine[Result]:
        """Run forward on shards ``[B, H, s, D]``, ``[B, H_kv, t, D]``, ``[B, H_kv, t, Dv]``."""
        asked = q
        if self.program.first is not None:
            (asked,) = yield from self._moved("queries", self.program.first, (q,))
        totals = [Total(sum(p[i] is not None for p in self.parts)) for i in range(len(self.program.softmaxes))]
        handle = yield from self._fetch(0, k, v)
        for h in range(self.last_hop + 1):
            received: Received = (yield Wait(handle)) if handle is not None else {}
            handle = yield from self._fetch(h + 1, k, v)
            if h not in self.hops:
                continue
            hop, parts = self.hops[h]
            if any(parts):
                keys, values = (self._store(hop, i, x, received) for i, x in enumerate((k, v)))
                for total, part in zip(totals, parts, strict=True):
                    if part is not None:
                        total.add(*part.forward(asked, keys, values, operands))
        pairs = tuple(total.result(asked, self.value_dim) for total in totals)
        out, lse = self.mixing.forward(pairs)
        total_lse = lse
        if self.program.last is not None:
            moving = (out,) if lse is None else (out, lse.unsqueeze(-1))
            back = yield from self._moved("outputs", self.program.last, moving, home=True)
            out, lse = back[0], back[1].squeeze(-1) if lse is not None else None
        return Result(out, lse, asked, pairs, total_lse)

    def backward(
        self, grad: Tensor, grad_lse: Tensor | None, saved: Result, k: Tensor, v: Tensor, operands: Mapping[str, Any]
    ) -> Routine[Triple]:
        """Return the gradients of the shards of q, k and v."""
        if self.program.first is not None:
            moving = (grad,) if grad_lse is None else (grad, grad_lse.unsqueeze(-1))
            there = yield from self._moved("gradients of outputs", self.program.first, moving)
            grad, grad_lse = there[0], there[1].squeeze(-1) if grad_lse is not None else None
        flows = self.mixing.backward(grad, grad_lse, saved.total, saved.parts)
        totals = (zero_gradient(saved.queries), zero_gradient(k), zero_gradient(v))
        handle = yield from self._fetch(0, k, v)
        home: tuple[Any, Exchange] | None = None
        for h in range(self.last_hop + 1):
            received: Received = (yield Wait(handle)) if handle is not None else {}
            handle = yield from self._fetch(h + 1, k, v)
            if h not in self.hops:
                continue
            hop, parts = self.hops[h]
            returns = self._hop_backward(hop, parts, flows, saved.queries, (k, v), received, totals, operands)
            if home is not None:
                self._add_arrived(*home[1:], (yield Wait(home[0])), totals)
                home = None
            if hop.exchange is not None:
                sent = yield Start(GRADIENTS, h, _back(hop.exchange), returns, self._sizes(hop.exchange.sends, k, v))
                home = (sent, hop.exchange)
        if home is not None:
            self._add_arrived(home[1], (yield Wait(home[0])), totals)
        dq = totals[0].to(saved.queries.dtype)
        if self.program.last is not None:
            (dq,) = yield from self._moved("gradients of queries", self.program.last, (dq,), home=True)
        return dq, totals[1].to(k.dtype), totals[2].to(v.dtype)

    def _hop_backward(
        self,
        hop: Hop,
        parts: Sequence[Part | None],
        flows: Sequence[Flow],
        q: Tensor,
        own: Pair,
        received: Received,
        totals: Triple,
        operands: Mapping[str, Any],
    ) -> dict[int, Pair]:
        """Add a hop's gradients to those of this rank's rows, and return those of the rows that peers sent."""
        maps = {} if hop.exchange is None else hop.exchange.receives
        returns = {
            peer: tuple(torch.zeros_like(x, dtype=accumulator(x.dtype)) for x in received[peer]) for peer in maps
        }
        if any(parts):
            keys, values = (self._store(hop, i, x, received) for i, x in enumerate(own))
            sums = (zero_gradient(keys), zero_gradient(values))
            for flow, part in zip(flows, parts, strict=True):
                if part is not None:
                    dq, dk, dv = part.backward(flow, q, keys, values, operands)
                    for total, piece in zip((totals[0], *sums), (dq, dk, dv), strict=True):
                        total.add_(piece)
            plan = self._store_plan(hop)
            for i, gradient in enumerate(sums):
                if plan is None:
                    totals[1 + i].add_(gradient)
                else:
                    plan.add(gradient, [totals[1 + i], *(returns[peer][i] for peer in sorted(maps))])
        return {peer: (pair[0], pair[1]) for peer, pair in returns.items()}

    def _add_arrived(self, exchange: Exchange, arrived: Received, totals: Triple) -> None:
        """Add the gradients that peers send home, in the order of peers."""
        for peer in sorted(arrived):
            plan = assembly(Holding.of(exchange.sends[peer]), (self.keys,))
            for i, gradient in enumerate(arrived[peer]):
                plan.add(gradient, [totals[1 + i]])

    def _fetch(self, h: int, k: Tensor, v: Tensor) -> Routine[Any]:
        """Start the exchange of hop h; return its handle, None if there is none."""
        exchange = self.hops[h][0].exchange if h in self.hops else None
        if exchange is None:
            return None
        sends = self._messages(exchange.sends, self.keys, (k, v))
        handle = yield Start(KEYS, h, exchange.collective, sends, self._sizes(exchange.receives, k, v, wide=False))
        return handle

    def _messages(
        self, sends: Mapping[int, Maps], held: Holding, tensors: Sequence[Tensor]
    ) -> dict[int, tuple[Tensor, ...]]:
        """Return what goes to each peer; equal rows are packed once."""
        packed: dict[Maps, tuple[Tensor, ...]] = {}
        for maps in sends.values():
            if maps not in packed:
                plan = assembly(Holding.of(maps), (held,))
                packed[maps] = tuple(plan.gather([x], x).contiguous() for x in tensors)
        return {peer: packed[maps] for peer, maps in sends.items()}

    def _sizes(self, maps: Mapping[int, Maps], k: Tensor, v: Tensor, *, wide: bool = True) -> dict[int, Sizes]:
        """Return what messages of keys and values hold, or of their gradients, which are wide."""
        return {peer: _sizes(Holding.of(m), (k, v), wide=wide) for peer, m in maps.items()}

    def _store_plan(self, hop: Hop) -> Assembly | None:
        """Return how a hop's keys are put together from this rank's own and from each peer's message."""
        if hop.store is None:
            return None
        peers = () if hop.exchange is None else sorted(hop.exchange.receives)
        messages = tuple(Holding.of(hop.exchange.receives[p]) for p in peers) if hop.exchange is not None else ()
        return assembly(_store_of(hop), (self.keys, *messages))

    def _store(self, hop: Hop, i: int, own: Tensor, received: Received) -> Tensor:
        """Return the keys (i = 0) or values (i = 1) that a hop's graphs attend to."""
        plan = self._store_plan(hop)
        return own if plan is None else plan.gather([own, *(received[p][i] for p in sorted(received))], own)

    def _moved(
        self, name: str, exchange: Exchange, tensors: Sequence[Tensor], *, home: bool = False
    ) -> Routine[list[Tensor]]:
        """Exchange rows of queries or outputs: to the ranks that attend for them, or ``home`` again."""
        source, wanted = (self.attended, self.queries) if home else (self.queries, self.attended)
        sends = self._messages(exchange.sends, source, tensors)
        receives = {p: _sizes(Holding.of(maps), tensors, wide=False) for p, maps in exchange.receives.items()}
        handle = yield Start(name, LAST if home else FIRST, exchange.collective, sends, receives)
        received: Received = yield Wait(handle)
        peers = sorted(exchange.receives)
        plan = assembly(wanted, (source, *(Holding.of(exchange.receives[p]) for p in peers)))
        return [plan.gather([x, *(received[p][i] for p in peers)], x) for i, x in enumerate(tensors)]


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
