"""The predicted peak of one rank of a mesh, against its executor on tensors without data and a transport's buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.plan_ring import RingPlan
from attnplan.ring.program import RankProgram
from attnplan.ring.room import room_of
from attnplan.runtime.ring.dry import DryTransport
from attnplan.runtime.ring.exchanges import Received, Start, run, size_of
from attnplan.runtime.ring.executor import Rank
from attnplan.runtime.ring.peak import Meter, _part
from bench.memory import MIB

SPECS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "materialised": {"softcap": 1e6},
    "longnet": {"pattern": P.longnet([128, 512], [1, 4])},
    "trained": {"training": True},
}
STRATEGIES = ["contiguous > rows", "zigzag > ring", "zigzag > rows", "striped > all-gather", "zigzag > ulysses"]


class Buffers(DryTransport):
    """Allocates what :class:`attnplan.runtime.ring.real.RealTransport` does, when it does."""

    def start(self, request: Start) -> Any:
        kept: list[Any] = [request.sends]
        sizes = [size_of(m) for m in request.sends.values()]
        if request.collective != "p2p":
            gathers = request.collective == "all-gather"
            packed = max(sizes, default=0) if gathers else sum(sizes)
            kept += [torch.empty(n, dtype=torch.uint8, device="meta") for n in (packed, packed * gathers)]
        return super().wait(request), kept

    def wait(self, handle: Any) -> Received:
        received: Received = handle[0]
        return received


def peak_of_rank(plan: RingPlan, program: RankProgram) -> int:
    spec, meter = plan.spec, Meter("cpu")

    def room(graph: Any) -> Any:
        return room_of(graph, spec, plan._runner(graph).schedule.priced, "cpu")

    rank = Rank(program, spec, [[_part(g, meter, room) for g in h.graphs] for h in program.hops])
    lengths = (rank.queries.length, rank.keys.length, rank.keys.length, rank.queries.length)
    given = [torch.empty((1, spec.heads, n, spec.head_dim), device="meta") for n in lengths]
    q, k, v, grad = given
    meter.given(given)
    with meter, torch.no_grad():
        found = run(rank.forward(q, k, v, {}), Buffers())
        results = [found.out]
        if spec.training:
            results += run(rank.backward(grad, None, found, k, v, {}), Buffers())
    return meter.top - sum(x.numel() * x.element_size() for x in results)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SPECS)
def test_the_peak_of_a_rank_is_predicted(name, strategy, monkeypatch):
    monkeypatch.setattr("attnplan.cost.buffers._threads", lambda: 1)
    spec = AttentionSpec(seq_len=4096, heads=4, head_dim=64, dtype="float32", ring_size=4, **SPECS[name])
    plan = attnplan.compile(spec, device="cpu", strategy=strategy)
    assert isinstance(plan, RingPlan)
    peak, predicted = max(peak_of_rank(plan, p) for p in plan.programs), plan.predicted.rank_peak_bytes
    assert peak <= predicted <= max(1.3 * peak, peak + 16 * MIB), f"predicted {predicted}, counted {peak}"
