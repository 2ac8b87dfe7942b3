"""From costs to predicted time and peak memory: a roofline per op with each kernel's own curve.

A call takes the longer of what the device needs and, on a GPU, what the host needs to start it all. An attention
kernel's time is the makespan of its blocks of threads over the device's units: blocks of like length come in waves, of
which the last may be incomplete; blocks of unlike length are started longest first, and none ends after the longest
plus its fair share. In the end the longest has its unit to itself, which some kernels need two blocks to fill.

References
----------
Williams et al., Roofline, CACM 2009; Graham, Bounds on multiprocessing timing anomalies, 1969.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, partial
from math import ceil

import attrs

from attnplan.cost.allocated import Memory
from attnplan.cost.device import Device
from attnplan.cost.looped import is_piecewise, piecewise_seconds
from attnplan.cost.memory import peak_memory
from attnplan.cost.parameters import Curve, KernelParameters, Parameters, defaults
from attnplan.cost.placed import is_alone
from attnplan.cost.rules import FREE, Cost, backward_cost, forward_cost, launched_rows
from attnplan.cost.setting import KernelModel, Setting
from attnplan.cost.work import Work, attend_work
from attnplan.cost.workspaces import like
from attnplan.ir import Attend, Graph, Node
from attnplan.ir.slots import slot_condition
from attnplan.spec import AttentionSpec

EXPS_PER_FLOP = {"cpu": 1 / 16, "cuda": 1 / 64}
"""Exponentials that the device computes in the time of one floating-point operation of its matrix units."""
SPLIT = 256
"""Keys that a kernel which splits them leaves in one piece."""


@attrs.frozen
class Load:
    """What one node asks of a device, forward and, where it is trained, backward."""

    node: int
    kind: str
    """Name of the op."""
    forward: Cost
    backward: Cost
    work: Work | None
    """The attention kernel's part; None for what runs as plain operators."""
    shared: bool
    """Whether another node stands for the launch that this one is part of."""
    own: bool = False
    """Whether it is a kernel of our own: rows gathered for a launch of several attends, or a join that pulls."""


@attrs.frozen
class OpCost:
    """Predicted cost of one node."""

    node: int
    cost: Cost
    seconds: float
    bound: str
    """``"compute"``, ``"memory"`` or ``"launch"``: what takes the longest."""
    roofline: float
    """Ideal time at the device's peak over predicted time, from 0 to 1."""
    host: float = 0.0
    """Seconds for which it keeps the host busy."""


@attrs.frozen
class Prediction:
    """What a candidate is expected to take."""

    seconds: float
    """Time of one call, forward only, or forward and backward if the spec says ``training``."""
    peak_bytes: int
    """Memory beside inputs and output at the worst moment."""
    ops: tuple[OpCost, ...] = attrs.field(repr=False)
    host: float = 0.0
    """Seconds of the host. On a GPU the device works meanwhile, and a call takes the longer of the two."""
    basis: str = "data sheet"
    """Where the numbers come from: ``"data sheet"``, ``"calibrated"`` or ``"calibrated elsewhere"``."""
    note: str = ""
    """What is odd about the calibration."""
    memory: Memory = attrs.field(factory=Memory)
    """What :attr:`peak_bytes` consists of."""
    compile_seconds: float = 0.0
    """Seconds for which the first call compiles, once; no part of :attr:`seconds`."""


def price(
    graph: Graph, spec: AttentionSpec, kernel: KernelModel, device: Device, parameters: Parameters | None = None
) -> Prediction:
    """Predict the time and peak memory of a graph run with one kernel on one device.

    Parameters
    ----------
    graph, spec, kernel, device
        What runs, and where.
    parameters
        What is known about kernels; the default is what publications say.
    """
    table = defaults(device.kind) if parameters is None else parameters
    plain = _is_plain(graph)
    alike = _alike(kernel, plain=plain)
    found_loads = demands(graph, spec, alike)
    wide, shared = max(spec.head_dim, spec.value_dim) > 128, spec.kv_heads < spec.heads
    key = like(kernel.key, training=spec.training, masked=not plain, shared=shared, wide=wide)
    memory = room(graph, spec, attrs.evolve(alike, key=key), device.kind)
    ops, seconds, host = timed(found_loads, spec, kernel, device, table)
    found = Prediction(seconds, memory.total, ops, host, table.basis, table.note, memory)
    if is_piecewise(graph):
        each = partial(price, kernel=kernel, device=device, parameters=table.indirect(kernel.key))
        seconds, host = piecewise_seconds(graph, spec, kernel, device, each, table)
        found = attrs.evolve(found, seconds=seconds, host=host)
    return found


@lru_cache(maxsize=256)
def _alike(kernel: KernelModel, *, plain: bool) -> KernelModel:
    """Return what stands for all kernels that ask the same of a device, of a plain graph or of any."""
    same = attrs.evolve(kernel, key="", efficiency=1.0)
    return attrs.evolve(same, native=frozenset(), masks=True) if plain else same


@lru_cache(maxsize=4096)
def _free(node: int) -> OpCost:
    return OpCost(node, FREE, 0.0, "launch", 0.0)


@lru_cache(maxsize=256)
def _is_plain(graph: Graph) -> bool:
    """Return whether no attend asks a kernel for more than all of them know: whole or causal rows.

    Pieces of rows may, as their diagonals end elsewhere.
    """
    return is_alone(graph) and all(
        op.tile is None
        and op.softcap is None
        and not op.biases
        and slot_condition(op, *(n.type.rows for n in graph.args(node)[:2])) != "mask"
        for node, op in graph.of(Attend)
    )


@lru_cache(maxsize=2048)  # a loop has up to 512 programs, which several kernels price
def demands(graph: Graph, spec: AttentionSpec, kernel: KernelModel) -> tuple[Load, ...]:
    """Return what a graph asks of a device: the same for kernels that differ in their speed only."""
    return loads(Setting.of(graph, spec, kernel))


@lru_cache(maxsize=2048)
def room(graph: Graph, spec: AttentionSpec, kernel: KernelModel, kind: str) -> Memory:
    """Return the peak memory of a graph: the same for kernels that allocate alike."""
    return peak_memory(graph, Setting.of(graph, spec, kernel), kind)


def loads(setting: Setting) -> tuple[Load, ...]:
    """Return what each node of a graph asks of a device."""
    rows = launched_rows(setting)
    return tuple(_load(node, setting, rows.get(node.id, 0.0)) for node in setting.graph)


def _load(node: Node, setting: Setting, rows: float) -> Load:
    backward = backward_cost(node, setting) if setting.spec.training else FREE
    fused = isinstance(node.op, Attend) and not setting.kernel.materialises
    work = attend_work(node, setting) if fused else None
    if work is not None and rows:
        work = attrs.evolve(work, launch=rows)
    own = getattr(node.op, "pull", False) or node.id in setting.gathered
    return Load(node.id, node.op.name, forward_cost(node, setting), backward, work, node.id in setting.together, own)


def timed(
    found: Iterable[Load], spec: AttentionSpec, kernel: KernelModel, device: Device, table: Parameters
) -> tuple[tuple[OpCost, ...], float, float]:
    """Return the cost of each op, the seconds of a call, and those of the host."""
    loaded = tuple(found)
    clock = _Clock(spec, kernel, device, table)
    if (clock.kernel.direct != 1.0 or clock.kernel.quick != 1.0) and is_direct(loaded, spec, kernel):
        clock.shares = (1.0, clock.kernel.direct) if spec.training else (clock.kernel.quick, 1.0)
    ops = tuple(_free(x.node) if x.forward is FREE and x.backward is FREE else clock.op(x) for x in loaded)
    busy = [op for op in ops if op.cost is not FREE]
    around = clock.kernel.call + (clock.shares[1] * clock.kernel.backward_call if spec.training else 0.0)
    host = around + sum(op.host for op in busy)
    on_device = sum(op.seconds for op in busy)
    if device.kind == "cpu":  # the host is the device, and an op's seconds include its own
        return ops, on_device + around, host
    return ops, max(on_device, host) + table.exposed * min(on_device, host), host


def is_direct(found: Iterable[Load], spec: AttentionSpec, kernel: KernelModel) -> bool:
    """Return whether a plan is one call of a kernel, as ``Emitter.direct`` says."""
    if not spec.is_static or spec.biases or spec.sink_logits:
        return False
    busy = [x for x in found if x.forward is not FREE or x.backward is not FREE]
    if len(busy) != 1 or busy[0].work is None or busy[0].forward.launches != 1:
        return False
    work = busy[0].work
    if work.group > 1 and kernel.key == "efficient":  # whose operator wants as many heads of k as of q
        return False
    return not (work.masked or work.windowed or work.documents)


class _Clock:
    """Turns the loads of one call into seconds."""

    def __init__(self, spec: AttentionSpec, kernel: KernelModel, device: Device, table: Parameters) -> None:
        self.device, self.table = device, table
        self.peak = device.rate(spec.dtype, spec.precision) or device.rate("float32")
        self.plain = device.rate("float64" if spec.dtype == "float64" else "float32", spec.precision) or self.peak
        """Rate of products in plain torch, which widens its inputs."""
        self.kernel: KernelParameters = table.kernel(kernel.key, kernel.efficiency)
        self.materialises = kernel.materialises
        self.again = 2.0 if kernel.keeps else 2.5
        """Matrix products of a backward for each of the forward."""
        self._known: dict[tuple[int, int], tuple[float, float]] = {}
        """Peak and half of each curve and width that was asked for."""
        self.shares = (1.0, 1.0)
        """Shares of the host's time that are left of a forward and of a backward."""

    def _at(self, curve: Curve, width: int) -> tuple[float, float]:
        """Return :meth:`Curve.at`, remembered: the parts of a call have heads of one width."""
        key = (id(curve), width)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = curve.at(width)
        return found

    def op(self, load: Load) -> OpCost:
        cost, host = load.forward, self._host(load, load.forward, self.shares[0] * self.kernel.host)
        compute, memory, start = self._device(load, cost, self.kernel.forward, self.kernel.causal, 1.0)
        seconds = max(compute, memory) + start
        if load.backward is not FREE:
            cost += load.backward
            host += self._host(load, load.backward, self.shares[1] * self.kernel.backward_host)
            back = self._device(load, load.backward, self.kernel.backward, self.kernel.causal_backward, self.again)
            seconds += max(back[0], back[1]) + back[2]
            compute, memory, start = compute + back[0], memory + back[1], start + back[2]
        if self.device.kind == "cpu":
            start += host
            seconds += host
        bound = max((compute, "compute"), (memory, "memory"), (start, "launch"))[1]
        ideal = max(cost.flops / self.peak, cost.bytes / self.device.bandwidth)
        return OpCost(load.node, cost, seconds, bound, min(1.0, ideal / seconds) if seconds else 0.0, host)

    def _host(self, load: Load, cost: Cost, own: float) -> float:
        if load.shared or not cost.launches + cost.views:
            return 0.0
        if load.kind != "attend":
            return (cost.launches + cost.views) * (self.table.fused if load.own else self.table.operator)
        packed = self.kernel.packed if load.work is not None and load.work.documents else 0.0
        return own + packed + (cost.launches - 1 + cost.views) * self.table.operator

    def _device(self, load: Load, cost: Cost, curve: Curve, causal: float, factor: float) -> tuple[float, float, float]:
        """Return the seconds of the arithmetic, of the memory, and of starting kernels."""
        bandwidth, table = self.device.bandwidth, self.table
        start = 0.0 if load.shared else cost.launches * table.start
        copied = cost.copied / (bandwidth * table.gather) + cost.made / (bandwidth * table.join)
        exps = cost.exps / (self.peak * EXPS_PER_FLOP[self.device.kind])
        if load.kind == "attend":
            if load.work is None:  # products and passes over the scores, one after the other
                memory = cost.bytes / (bandwidth * table.join)
                return max(cost.flops / (self.plain * curve.at(128)[0]), exps) + memory, memory, start + copied
            busy, compute = self._makespan(load.work, curve, causal, factor)
            memory = cost.bytes / (bandwidth * table.memory * busy)
            return max(compute, exps), memory, start + copied
        if load.kind in ("take", "input"):
            share = table.own_copy if load.own else table.copy
        else:
            share = table.own_join if load.own else table.join
        return exps, cost.bytes / (bandwidth * share), start + copied

    def _makespan(self, work: Work, curve: Curve, causal: float, factor: float) -> tuple[float, float]:
        """Return the share of the device's units that work, and the seconds until the last is done.

        ``factor`` is how many times the arithmetic of the forward is done.
        """
        units = self.device.units
        peak, half = self._at(curve, work.features)
        rate = self.peak * peak / units * (1.0 if work.even else causal) * (self.kernel.masked if work.masked else 1.0)
        rate *= curve.in_window(work.features) if work.windowed else 1.0
        tile = min(self.kernel.tile, work.rows) if self.device.kind == "cpu" else self.kernel.tile
        blocks = max(1.0, work.blocks * ceil(work.rows / tile))
        if self.kernel.packs and work.rows * work.group <= tile:
            blocks = max(1.0, blocks / work.group)
        pairs = max(1.0, work.blocks * work.rows * work.keys)
        each = factor * work.flops / pairs * tile / rate  # of one block of threads, for each key that it visits
        more = self.kernel.compare * 2 * tile / rate  # the same for each key that it compares, in a backward once, too
        mean = (work.keys + half) * each + work.compared * more
        longest = (work.longest + half) * each + work.longest_compared * more
        if self.kernel.splits and blocks < units and work.keys > SPLIT:
            pieces = min(units // blocks, ceil(work.keys / SPLIT))
            blocks, mean, longest = blocks * pieces, (work.keys / pieces + half) * each, longest / pieces
        own = min(1.0, work.blocks * work.rows / work.launch) if work.launch else 1.0  # its share of the launch
        load = blocks / own / units
        if work.even:
            waited = self.table.quantum * (ceil(load) - load)  # of the last wave
            seconds = own * mean * max(self.kernel.few, load + waited)
        else:
            slow = self.kernel.few if load <= 1.0 else self.kernel.lone
            seconds = own * max(slow * longest, mean * load + 0.5 * self.table.quantum * mean)
        return min(1.0, load), seconds
