"""Rings written by hand: plain causal or full attention on contiguous shards, each rank's keys sent to each other."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from attnplan import patterns as P
from attnplan.backends import registry
from attnplan.cost import resolve
from attnplan.ir import Attend, Axis, Builder, Graph, Input, Output, RowMap
from attnplan.ring.program import Exchange, Hop, RankProgram
from attnplan.runtime.ring.engines import Engine, VirtualEngine, call
from attnplan.runtime.ring.executor import Rank
from attnplan.runtime.ring.parts import part
from attnplan.spec import AttentionSpec


def extent(length: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return the first row of a shard and its number of rows."""
    size = -(-length // ranks)
    start = min(length, rank * size)
    return start, min(length, start + size) - start


def shard(length: int, heads: int, ranks: int, rank: int) -> tuple[RowMap, ...]:
    start, count = extent(length, ranks, rank)
    return (RowMap(0, start, (Axis(heads, head=1), Axis(count, row=1))),) if count else ()


def program(spec: AttentionSpec, ranks: int, rank: int) -> RankProgram:
    """Return a rank's program: at hop h it receives the keys of rank - h, where it has a use for them."""

    def meet(asking: int, giving: int) -> bool:
        some = extent(spec.seq_len, ranks, asking)[1] and extent(spec.seq_len, ranks, giving)[1]
        return bool(some) and not (spec.causal and giving > asking)

    keys = [shard(spec.seq_len, spec.kv_heads, ranks, r) for r in range(ranks)]
    hops = []
    for h in range(ranks):
        source, target = (rank - h) % ranks, (rank + h) % ranks
        sends = {target: keys[rank]} if h and meet(target, rank) else {}
        receives = {source: keys[source]} if h and meet(rank, source) else {}
        exchange = Exchange(h, "p2p", ("k", "v"), sends, receives) if sends or receives else None
        graph = _graph(spec, ranks, rank, source) if meet(rank, source) else None
        if exchange is not None or h == 0:
            hops.append(Hop(h, exchange, keys[source] if h and graph else None, (graph,)))
    own = shard(spec.seq_len, spec.heads, ranks, rank)
    return RankProgram(rank, ranks, own, tuple(hops), (0,), held=own, keys=keys[rank])


def _graph(spec: AttentionSpec, ranks: int, asking: int, giving: int) -> Graph:
    builder, group = Builder(), spec.heads // spec.kv_heads
    (q_start, q_rows), (k_start, k_rows) = (extent(spec.seq_len, ranks, r) for r in (asking, giving))
    q = builder.add(Input("q", spec.heads, group, q_rows, spec.head_dim, spec.dtype))
    k = builder.add(Input("k", spec.kv_heads, group, k_rows, spec.head_dim, spec.dtype))
    v = builder.add(Input("v", spec.kv_heads, group, k_rows, spec.value_dim, spec.dtype))
    at = tuple(attrs.evolve(builder.type(x).rows, row=start) for x, start in ((q, q_start), (k, k_start)))
    where = P.causal() if spec.causal and asking == giving else P.full()
    return builder.build(
        builder.add(Output(), builder.add(Attend(where=where, scale=spec.softmax_scale, at=at), q, k, v))
    )


def prepared(one: RankProgram, spec: AttentionSpec, schedule: str = "flash") -> Rank:
    """Return a rank with its graphs emitted by the eager backend for the CPU."""
    backend = registry().get("eager")
    (chosen,) = (s for s in backend.schedules(resolve("cpu").device) if s.name == schedule)
    parts = [[g and part(backend.emit(g, spec, chosen, "cpu")) for g in hop.graphs] for hop in one.hops]
    return Rank(one, spec, parts)


def virtual(spec: AttentionSpec, ranks: int, schedule: str = "flash") -> Ring:
    made = [prepared(program(spec, ranks, r), spec, schedule) for r in range(ranks)]
    lengths = (spec.seq_len, spec.seq_len)
    return Ring(spec, VirtualEngine(made, (spec.heads, spec.kv_heads), lengths))


@attrs.frozen(eq=False)
class Ring:
    """An engine that is called like a plan."""

    spec: AttentionSpec
    engine: Engine

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, return_lse: bool = False) -> Any:
        out, lse = call(self.engine, q, k, v, {})
        return (out, lse) if return_lse else out
