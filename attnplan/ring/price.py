"""What a rank's hops cost: pairs, bytes, seconds and memory, without a process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs

from attnplan.cost import Device, KernelModel, price
from attnplan.cost.comm import Links, exchange_seconds, pipelined_seconds
from attnplan.cost.parameters import Parameters, defaults
from attnplan.errors import PassError
from attnplan.ir import Graph
from attnplan.ir.buffers import Buffer
from attnplan.ir.probes import Probe, attend_sum
from attnplan.ir.slots import slot_band, slot_condition
from attnplan.passes.ring import Local, hop_graph
from attnplan.passes.ring_cut import Part
from attnplan.patterns.indicators import indicator
from attnplan.patterns.sums import Point
from attnplan.ring.mesh import Mesh
from attnplan.ring.program import ITEM_BYTES
from attnplan.ring.transports import LocalHop, LocalPlan, Setting, lowered
from attnplan.spec import AttentionSpec

_COUNTING = Probe(1, 1, 1, Point())
_MAX_TERMS = 256
"""Most terms of a set union's closed form whose pairs are counted for a report, one sum for each head and term."""


@attrs.frozen
class Kernel:
    """A kernel that may run the graphs of a rank."""

    name: str
    model: KernelModel
    refuses: Callable[[Graph], bool] = lambda graph: False


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
    """Seconds of its attention and of the merge of its part."""
    comm: float
    """Seconds until its rows have arrived."""
    kernel: str

    @property
    def facts(self) -> dict[str, object]:
        """The figures as plain data."""
        return attrs.asdict(self)


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
    _seconds: dict[object, tuple[float, float, str]] = attrs.field(factory=dict, init=False)
    _pairs: dict[object, int] = attrs.field(factory=dict, init=False)

    def rank(self, setting: Setting, plan: LocalPlan) -> RankCost:
        """Return what a rank's call costs."""
        hops = [self._hop(setting, plan, h) for h in plan.hops if h.parts.parts]
        spread = self._spread(setting, plan)
        return RankCost(
            rank=plan.rank,
            hops=tuple(hops),
            seconds=self._time(setting, plan, hops, spread[2]),
            forward_bytes=sum(h.bytes * self._times(plan, h) for h in hops) + spread[0],
            backward_bytes=sum(self._again(h) * self._times(plan, h) for h in hops) + spread[1],
            pairs=sum(h.pairs * self._times(plan, h) for h in hops),
            peak_bytes=self._peak(plan),
        )

    def _times(self, plan: LocalPlan, hop: HopCost) -> int:
        """Return for how many hops a planned one stands."""
        return plan.every if hop.hop else 1

    def _hop(self, setting: Setting, plan: LocalPlan, hop: LocalHop) -> HopCost:
        each = self._row_bytes()
        forward, _, name = self._compute(plan, hop)
        foreign = 0 if hop.parts.own else hop.parts.needed - self._own(setting, plan, hop)
        return HopCost(
            hop=hop.parts.hop,
            peers=len(hop.peers()),
            received=(remote := hop.remote),
            asked=foreign,
            bytes=remote * each,
            pairs=self.spec.batch * sum(self._count(p) for p in hop.parts.parts),
            compute=forward + self._merge(plan),
            comm=self._arrival(hop, remote, each),
            kernel=name,
        )

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

    def _compute(self, plan: LocalPlan, hop: LocalHop) -> tuple[float, float, str]:
        """Return forward seconds, forward and backward seconds, and the kernel of a hop."""
        key = (len(plan.ring.queries), plan.ring.heads[1] - plan.ring.heads[0], *(_shape(p) for p in hop.parts.parts))
        if key not in self._seconds:
            graph = self._graph(plan, hop)
            both = attrs.evolve(self.spec, training=True)
            alone = attrs.evolve(self.spec, training=False)
            found = [
                (price(graph, alone, k.model, self.device, self.parameters).seconds, k)
                for k in self.kernels
                if not k.refuses(graph)
            ]
            seconds, kernel = min(found, key=lambda f: f[0])
            trained = seconds
            if self.spec.training:
                trained = price(graph, both, kernel.model, self.device, self.parameters).seconds
            self._seconds[key] = (seconds, trained, kernel.name)
        return self._seconds[key]

    def _graph(self, plan: LocalPlan, hop: LocalHop) -> Graph:
        local = Local.of(lowered(self.spec), plan.ring, 1)
        graph = hop_graph(local, Buffer(plan.ring.query_maps()), hop.parts, None)
        assert graph is not None
        return graph

    def _merge(self, plan: LocalPlan) -> float:
        """Return the seconds of adding one hop's part to the accumulators."""
        rows = sum(m.elements_count for m in plan.ring.query_maps()) * self.spec.batch
        moved = rows * (self.spec.value_dim + 1) * (2 * 4 + ITEM_BYTES[self.spec.dtype])
        table = defaults(self.device.kind) if self.parameters is None else self.parameters
        return moved / (self.device.bandwidth * table.join) + table.start

    def _arrival(self, hop: LocalHop, remote: int, each: int) -> float:
        """Return the seconds until the rows of a hop have arrived, inside the node and from other nodes at once."""
        if not remote:
            return 0.0
        first = self.mesh.node(hop.rank) * self.mesh.per_node
        node = [r for r in range(first, first + self.mesh.per_node) if r != hop.rank]
        near = hop.elements(node) if self.mesh.nodes > 1 else remote
        peers = hop.peers()
        beside = len(peers.intersection(node))
        return exchange_seconds(
            (float(near * each), beside), (float((remote - near) * each), len(peers) - beside), self.links
        )

    def _comm(self, rank: int, sizes: Mapping[int, int]) -> float:
        inside = {p: n for p, n in sizes.items() if self.mesh.node(p) == self.mesh.node(rank)}
        outside = {p: n for p, n in sizes.items() if p not in inside}
        both = [(float(sum(x.values())), len(x)) for x in (inside, outside)]
        return exchange_seconds(both[0], both[1], self.links)

    def _spread(self, setting: Setting, plan: LocalPlan) -> tuple[int, int, float]:
        """Return the bytes received by the exchanges of q and o, forward and backward, and their seconds forward."""
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
        return got * q + home * o, got * do + home * q, seconds

    def _time(self, setting: Setting, plan: LocalPlan, hops: Sequence[HopCost], spread: float) -> float:
        hops = [h for h in hops for _ in range(self._times(plan, h))]
        comm = [h.comm for h in hops]
        total = spread + pipelined_seconds([h.compute for h in hops], comm)
        if not self.spec.training:
            return total
        priced = [self._compute(plan, h) for h in plan.hops if h.parts.parts]
        each = [plan.every if h.parts.hop else 1 for h in plan.hops if h.parts.parts]
        backward = [p[1] - p[0] for p, times in zip(priced, each, strict=True) for _ in range(times)]
        item = ITEM_BYTES[self.spec.dtype]
        home = [0.0, *(c * max(4, item) / item for c in comm)]  # while the next hop is computed
        moving = [c + home[i] for i, c in enumerate(comm)]
        return total + spread + pipelined_seconds(backward, moving) + home[-1]

    def _peak(self, plan: LocalPlan) -> int:
        """Return the bytes of two stores, a part, and the accumulators."""
        each = self._row_bytes()
        stores = [sum(m.elements_count for m in h.parts.store) * each for h in plan.hops if not h.parts.own]
        pairs = [a + b for a, b in zip(stores, [*stores[1:], 0], strict=False)]
        rows = sum(m.elements_count for m in plan.ring.query_maps()) * self.spec.batch
        part = rows * (self.spec.value_dim * ITEM_BYTES[self.spec.dtype] + 4)
        merging = rows * (self.spec.value_dim + 1) * 4 if sum(bool(h.parts.parts) for h in plan.hops) > 1 else 0
        return max(pairs, default=0) + part + merging


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
