"""What a rank's hops cost: pairs, bytes, seconds and memory, without a process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import attrs

from attnplan.cost import Device, KernelModel, Prediction, price
from attnplan.cost.comm import Links, exchange_seconds, pipelined_seconds
from attnplan.cost.parameters import DATA_SHEET, Parameters, defaults
from attnplan.errors import NoBackendError, PassError
from attnplan.ir import Graph, Merge
from attnplan.ir.buffers import Buffer
from attnplan.ir.graph import rewrite
from attnplan.ir.probes import Probe, attend_sum
from attnplan.ir.slots import slot_band, slot_condition
from attnplan.passes import PullMerge
from attnplan.passes.ring import Local, hop_graph
from attnplan.passes.ring_cut import Part
from attnplan.patterns.indicators import indicator
from attnplan.patterns.sums import Point
from attnplan.ring.handling import OPERATORS, Rows, backward_bytes, forward_bytes, merge_bytes, spread_bytes
from attnplan.ring.mesh import Mesh
from attnplan.ring.program import ITEM_BYTES
from attnplan.ring.rank_peak import rank_peak
from attnplan.ring.transports import COLLECTIVES, LocalHop, LocalPlan, Setting, lowered
from attnplan.spec import AttentionSpec

MEASURED = {
    "kernels/cudnn/causal": 0.98,
    "kernels/cudnn/backward/peak/128": 0.56,
    "kernels/cudnn/causal_backward": 0.96,
}
"""Of cuDNN on Hopper, from ``bench/results/ring-h200-x2.json``: whole and causal attention reach the same rates there,
599 and 601 TFLOP/s forward, 528 and 520 backward. Which of the two a layout makes of a hop is what it is chosen by."""
_COUNTING = Probe(1, 1, 1, Point())
_MAX_TERMS = 256
"""Most terms of a set union's closed form whose pairs are counted for a report, one sum for each head and term."""


@attrs.frozen
class Kernel:
    """A kernel that may run the graphs of a rank."""

    name: str
    model: KernelModel
    refuses: Callable[[Graph], tuple[str, ...]] = lambda graph: ()


@attrs.frozen
class HopCost:
    """What one hop of one rank costs, forward."""

    hop: int
    peers: int
    received: int
    """Rows of k received, all key/value heads together; as many of v."""
    asked: int
    """Rows of other ranks that the attends ask for, each by itself: branches that share a row ask twice."""
    bytes: int
    """Bytes received."""
    pairs: int
    """(head, query, key) pairs; an upper bound where a condition has no closed form."""
    compute: float
    """Seconds of its attention, of packing what it sends, of putting its keys together, and of merging its part."""
    comm: float
    """Seconds until its rows have arrived."""
    kernel: str
    around: float = 0.0
    """Seconds of :attr:`compute` that are no attention: copies and the merge."""
    backward: float = 0.0
    """The same as :attr:`compute`, of the backward; 0 if the spec does not train."""
    host: float = 0.0
    """Seconds for which the host is busy with it, forward."""
    host_backward: float = 0.0

    @property
    def facts(self) -> dict[str, object]:
        """The figures as plain data."""
        return attrs.asdict(self)


@attrs.frozen
class _Compute:
    """What the kernels of a hop cost: seconds of the device, and of the host forward and backward."""

    forward: float
    backward: float
    hosts: tuple[float, float]
    kernel: str
    attended: int
    """Queries whose parts come out, of one batch element."""
    peak: int
    """Bytes beside operands and part."""


@attrs.frozen
class RankCost:
    """What one rank's call costs."""

    rank: int
    hops: tuple[HopCost, ...]
    seconds: float
    """Time of a call: forward, or forward and backward if the spec says ``training``."""
    forward_bytes: int
    """Bytes received, forward."""
    backward_bytes: int
    """Bytes received, backward."""
    peak_bytes: int
    """Memory beside inputs and output."""
    pairs: int
    """Pairs of all hops."""


def hop_facts(rank: RankCost) -> list[dict[str, object]]:
    """Return the figures of a rank's hops, with the share of each exchange that the compute of the hop before hides."""
    found = []
    before = 0.0
    for hop in rank.hops:
        shown = max(0.0, hop.comm - before)
        found.append({**hop.facts, "hidden": 1 - shown / hop.comm if hop.comm else None})
        before = hop.compute
    return found


def count_part(part: Part) -> int:
    """Return the number of pairs of a part; conditions without a closed form are taken for everything."""
    terms = tuple(indicator(part.op.where))
    if len(terms) > _MAX_TERMS:
        return part.q.elements_count * part.k.length
    try:
        return sum(
            coefficient * attend_sum(_COUNTING, part.op, attrs.evolve(term, opaque=frozenset()), part.q, part.k)
            for term, coefficient in terms
        )
    except PassError:  # bands over rows and keys that step differently
        return part.q.elements_count * part.k.length


@attrs.define
class Pricer:
    """Prices ranks of one spec on one device; hops of equal shape are priced once."""

    spec: AttentionSpec
    mesh: Mesh
    device: Device
    links: Links
    kernels: Sequence[Kernel]
    parameters: Parameters | None = None
    _seconds: dict[object, _Compute] = attrs.field(factory=dict, init=False)
    _pairs: dict[object, int] = attrs.field(factory=dict, init=False)

    def rank(self, setting: Setting, plan: LocalPlan) -> RankCost:
        """Return what a rank's call costs."""
        some = [h for h in plan.hops if h.parts.parts]
        hops = [self._hop(setting, plan, h, (i, len(some))) for i, h in enumerate(some)]
        spread = self._spread(setting, plan)
        return RankCost(
            rank=plan.rank,
            hops=tuple(hops),
            seconds=self._time(setting, plan, hops, spread[2]),
            forward_bytes=sum(h.bytes * self._times(plan, h) for h in hops) + spread[0],
            backward_bytes=sum(self._again(h) * self._times(plan, h) for h in hops) + spread[1],
            pairs=sum(h.pairs * self._times(plan, h) for h in hops),
            peak_bytes=rank_peak(setting, plan, self.device.kind, lambda h: self._compute(plan, h).peak),
        )

    def _times(self, plan: LocalPlan, hop: HopCost) -> int:
        """Return for how many hops a planned one stands."""
        return plan.every if hop.hop else 1

    def _hop(self, setting: Setting, plan: LocalPlan, hop: LocalHop, place: tuple[int, int]) -> HopCost:
        """Return what a hop costs, whose part is merged at a place among so many."""
        each, one = self._row_bytes(), self._compute(plan, hop)
        remote = hop.remote
        collective = COLLECTIVES.get(setting.transport, "p2p")
        rows = self._rows(setting, plan, hop, remote, one.attended)
        around = forward_bytes(self.spec, rows, collective) + merge_bytes(self.spec, rows, *place)
        again = backward_bytes(self.spec, rows, collective, *place) if self.spec.training else 0
        exchanges = self.links.host if remote else 0.0
        table = self._table
        return HopCost(
            hop=hop.parts.hop,
            peers=len(hop.peers()),
            received=remote,
            asked=0 if hop.parts.own else hop.parts.needed - self._own(setting, plan, hop),
            bytes=remote * each,
            pairs=self.spec.batch * sum(self._count(p) for p in hop.parts.parts),
            compute=one.forward + around / self._copying,
            comm=self._arrival(hop, remote, each, collective != "p2p"),
            kernel=one.kernel,
            around=around / self._copying,
            backward=one.backward + again / self._copying,
            host=one.hosts[0] + exchanges + (table.fused if 0 < place[0] == place[1] - 1 else 0.0),
            host_backward=one.hosts[1] + 2 * exchanges + OPERATORS * table.operator,
        )

    def _rows(self, setting: Setting, plan: LocalPlan, hop: LocalHop, remote: int, attended: int) -> Rows:
        batch = self.spec.batch
        store = sum(m.elements_count for m in hop.parts.store)
        own = sum(p.count for p in setting.keys.rows(plan.rank)) * self.spec.kv_heads
        return Rows(
            queries=batch * sum(m.elements_count for m in plan.ring.query_maps()),
            attended=batch * attended,
            store=batch * store,
            received=batch * remote,
            whole=len(hop.peers()) <= 1 and remote == own,
            direct=hop.parts.own or (store == remote and len(hop.peers()) == 1),
        )

    @property
    def _table(self) -> Parameters:
        return _known(self.parameters or defaults(self.device.kind), self.device)

    @property
    def _copying(self) -> float:
        """Bytes/s of copies and sums."""
        return self.device.bandwidth * self._table.copy

    def _own(self, setting: Setting, plan: LocalPlan, hop: LocalHop) -> int:
        """Return how many of the rows that a hop's attends ask for the rank has itself, in proportion."""
        if setting.transport in ("local", "halo", "rows", "ring"):
            return 0
        have = sum(m.elements_count for m in hop.parts.store)
        return round(hop.parts.needed * (1 - hop.remote / have)) if have else 0

    def _row_bytes(self) -> int:
        spec = self.spec
        return spec.batch * (spec.head_dim + spec.value_dim) * ITEM_BYTES[spec.dtype]

    def _again(self, hop: HopCost) -> int:
        """Return the bytes received backward: k and v again; the gradients of what was sent come home in float32.

        What a rank sends is known to its peers only; all ranks together send as much as they receive.
        """
        item = ITEM_BYTES[self.spec.dtype]
        return hop.bytes + hop.bytes // item * max(4, item)

    def _count(self, part: Part) -> int:
        key = _moved(part)
        if key not in self._pairs:
            self._pairs[key] = count_part(key)
        return self._pairs[key]

    def _compute(self, plan: LocalPlan, hop: LocalHop) -> _Compute:
        """Return what the kernels of a hop cost, by the fastest that does not refuse."""
        key = (len(plan.ring.queries), plan.ring.heads[1] - plan.ring.heads[0], *(_shape(p) for p in hop.parts.parts))
        if key not in self._seconds:
            graph, attended = self._graph(plan, hop)
            reasons = {k.name: k.refuses(graph) for k in self.kernels}
            found = [(self._priced(graph, k, training=False), k) for k in self.kernels if not reasons[k.name]]
            if not found:
                lines = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in reasons.items())
                raise NoBackendError(f"no kernel that was asked for runs a rank's part of a ring:\n{lines}")
            forward, kernel = min(found, key=lambda f: f[0].seconds)
            both = self._priced(graph, kernel, training=True) if self.spec.training else forward
            each = (_device_and_host(forward, self.device), _device_and_host(both, self.device))
            backward, host = (b - a for a, b in zip(*each, strict=True))
            self._seconds[key] = _Compute(
                each[0][0], backward, (each[0][1], host), kernel.name, attended, both.peak_bytes
            )
        return self._seconds[key]

    def _priced(self, graph: Graph, kernel: Kernel, *, training: bool) -> Prediction:
        spec = attrs.evolve(self.spec, training=training)
        return price(graph, spec, kernel.model, self.device, self._table)

    def _graph(self, plan: LocalPlan, hop: LocalHop) -> tuple[Graph, int]:
        """Return the graph of a hop as it runs, and how many queries its part has.

        A join of one part is left to the merge of all hops; on CUDA several are joined by a kernel of our own.
        """
        local = Local.of(lowered(self.spec), plan.ring, 1)
        graph = hop_graph(local, Buffer(plan.ring.query_maps()), hop.parts, None)
        assert graph is not None
        join = graph[graph.output.args[0]]
        if isinstance(join.op, Merge) and len(join.args) == 1:
            graph = rewrite(graph, lambda builder, node, args: args[0] if node.id == join.id else None)
        elif self.device.kind == "cuda":
            graph = PullMerge()(graph)
        return graph, graph[graph.output.args[0]].type.rows.elements_count

    def _arrival(self, hop: LocalHop, remote: int, each: int, collective: bool) -> float:
        """Return the seconds until the rows of a hop have arrived, inside the node and from other nodes at once."""
        if not remote:
            return 0.0
        first = self.mesh.node(hop.rank) * self.mesh.per_node
        node = [r for r in range(first, first + self.mesh.per_node) if r != hop.rank]
        near = hop.elements(node) if self.mesh.nodes > 1 else remote
        peers = hop.peers()
        beside = len(peers.intersection(node))
        return exchange_seconds(
            (float(near * each), beside), (float((remote - near) * each), len(peers) - beside), self.links,
            collective=collective,
        )  # fmt: skip

    def _comm(self, rank: int, sizes: Mapping[int, int]) -> float:
        inside = {p: n for p, n in sizes.items() if self.mesh.node(p) == self.mesh.node(rank)}
        outside = {p: n for p, n in sizes.items() if p not in inside}
        both = [(float(sum(x.values())), len(x)) for x in (inside, outside)]
        return exchange_seconds(both[0], both[1], self.links, collective=True)

    def _spread(self, setting: Setting, plan: LocalPlan) -> tuple[int, int, float]:
        """Return the bytes received by the exchanges of q and o, forward and backward, and their seconds forward.

        Nothing is computed beside them: they are packed, moved, and put together.
        """
        if setting.ulysses == 1:
            return 0, 0, 0.0
        spec, item, group = self.spec, ITEM_BYTES[self.spec.dtype], setting.group(plan.rank)
        heads = plan.ring.heads[1] - plan.ring.heads[0]
        mine = sum(p.count for p in setting.queries.rows(plan.rank))
        theirs = {p: sum(r.count for r in setting.queries.rows(p)) * heads for p in group if p != plan.rank}
        back = {p: mine * heads for p in group if p != plan.rank}
        q, o = spec.batch * spec.head_dim * item, spec.batch * (spec.value_dim * item + max(4, item))
        do = spec.batch * spec.value_dim * item
        seconds = self._comm(plan.rank, {p: n * q for p, n in theirs.items()})
        seconds += self._comm(plan.rank, {p: n * o for p, n in back.items()})
        got, home = sum(theirs.values()), sum(back.values())
        attended = sum(m.elements_count for m in plan.ring.query_maps())
        moved = spread_bytes(home * q, attended * q) + spread_bytes(got * o, mine * spec.heads * o)
        seconds += moved / self._copying + 2 * self.links.host
        return got * q + home * o, got * do + home * q, seconds

    def _time(self, setting: Setting, plan: LocalPlan, hops: Sequence[HopCost], spread: float) -> float:
        """Return the seconds of a call: what devices do while the host starts it, from its first kernel on."""
        hops = [h for h in hops for _ in range(self._times(plan, h))]
        comm, slows = [h.comm for h in hops], self.links.slows
        lead = self.links.host if any(h.received for h in hops) else 0.0
        busy = pipelined_seconds([h.compute for h in hops], comm, slows)
        total = spread + lead + self._beside(busy, sum(h.host for h in hops))
        if not self.spec.training:
            return total
        item = ITEM_BYTES[self.spec.dtype]
        home = [0.0, *(c * max(4, item) / item for c in comm)]  # while the next hop is computed
        moving = [c + home[i] for i, c in enumerate(comm)]
        busy = pipelined_seconds([h.backward for h in hops], moving, slows) + home[-1]
        return total + spread + lead + self._beside(busy, sum(h.host_backward for h in hops))

    def _beside(self, busy: float, host: float) -> float:
        """Return the seconds of the device's work and the host's, which on a CPU are done by the same cores."""
        return busy + host if self.device.kind == "cpu" else max(busy, host)


def _known(table: Parameters, device: Device) -> Parameters:
    """Return a table with what rings have measured, unless it is calibrated."""
    hopper = device.capability == (9, 0) and table.basis == DATA_SHEET
    return _on_hopper() if hopper else table


@lru_cache(maxsize=1)
def _on_hopper() -> Parameters:
    return defaults("cuda").replaced(MEASURED, DATA_SHEET)


def _device_and_host(found: Prediction, device: Device) -> tuple[float, float]:
    """Return the seconds of the device and those of the host, which is the device on a CPU."""
    if device.kind == "cpu":
        return found.seconds, 0.0
    return sum(op.seconds for op in found.ops), found.host


def _moved(part: Part) -> Part:
    """Return a part with the same number of pairs for all parts that differ in where they begin only."""
    names = {type(t).__name__ for t in part.op.where.walk()}
    if names - {"Band", "Full", "And"}:
        return part
    row = min(part.q.row, part.k.row)
    return Part(
        attrs.evolve(part.op, branch=0),
        attrs.evolve(part.q, head=0, row=part.q.row - row),
        attrs.evolve(part.k, head=0, row=part.k.row - row),
    )


def _shape(part: Part) -> object:
    """Return what the time of a part depends on."""
    op = attrs.evolve(part.op, branch=0)
    steps = tuple((a.head, a.row) for rows in (part.q, part.k) for a in rows.axes)
    condition = slot_condition(op, part.q, part.k)
    return part.q.sizes, part.k.sizes, steps, condition, slot_band(op, part.q, part.k) if condition == "mask" else None
