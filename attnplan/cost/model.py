"""From costs to predicted time and peak memory: a roofline per op, liveness over the schedule."""

from __future__ import annotations

import attrs

from attnplan.cost.device import Device
from attnplan.cost.rules import (
    Cost,
    KernelModel,
    Setting,
    backward_cost,
    forward_cost,
    mask_bytes,
    value_bytes,
)
from attnplan.ir import Attend, Graph, Merge, Mix, Node
from attnplan.spec import AttentionSpec

EXPS_PER_FLOP = {"cpu": 1 / 16, "cuda": 1 / 64}
"""Exponentials that the device computes in the time of one floating-point operation of its matrix units."""


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


@attrs.frozen
class Prediction:
    """What a candidate is expected to take."""

    seconds: float
    """Time of one call, forward only, or forward and backward if the spec says ``training``."""
    peak_bytes: int
    """Memory beside inputs and output at the worst moment."""
    ops: tuple[OpCost, ...] = attrs.field(repr=False)


def price(graph: Graph, spec: AttentionSpec, kernel: KernelModel, device: Device) -> Prediction:
    """Predict the time and peak memory of a graph run with one kernel on one device."""
    setting = Setting.of(graph, spec, kernel)
    ops = tuple(_price_node(node, setting, device) for node in graph)
    return Prediction(sum(op.seconds for op in ops), peak_bytes(graph, setting), ops)


def _price_node(node: Node, setting: Setting, device: Device) -> OpCost:
    cost = forward_cost(node, setting)
    if setting.spec.training:
        cost = cost + backward_cost(node, setting)
    peak = device.rate(setting.spec.dtype, setting.spec.precision) or device.rate("float32")
    flop_seconds, byte_seconds = cost.flops / peak, cost.bytes / device.bandwidth
    exp_seconds = cost.exps / (peak * EXPS_PER_FLOP[device.kind])
    efficiency = setting.kernel.efficiency * _fill(node, setting, device)
    compute = max(flop_seconds / efficiency, exp_seconds)
    launch = cost.launches * device.launch
    copying = cost.copied / device.bandwidth
    bound = max((compute, "compute"), (byte_seconds + copying, "memory"), (launch, "launch"))[1]
    seconds = max(compute, byte_seconds) + launch + copying
    ideal = max(flop_seconds, byte_seconds)
    return OpCost(node.id, cost, seconds, bound, ideal / seconds if seconds else 0.0)


def _fill(node: Node, setting: Setting, device: Device) -> float:
    """Return how far short rows and few blocks leave the device's units idle, from 0 to 1."""
    if not isinstance(node.op, Attend):
        return 1.0
    rows = setting.graph[node.args[1]].type.rows.length
    return rows / (rows + (24 if device.kind == "cpu" else 256))


def peak_bytes(graph: Graph, setting: Setting) -> int:
    """Return the most memory that is live at one moment, inputs and the output itself left out."""
    last_use = {arg: node.id for node in graph for arg in node.args}
    live: dict[int, int] = {}
    peak = kept = 0
    for node in graph:
        transient = 0
        if isinstance(node.op, Attend):
            kept += mask_bytes(node, setting)  # static masks stay with the plan; counted for all
            transient = sum(value_bytes(graph[a], setting) for a in node.args if a in setting.copied)
            transient += _scores_bytes(graph, node, setting)
            live[node.id] = value_bytes(node, setting)
        elif isinstance(node.op, Merge | Mix):
            rows = node.type.rows.elements_count * setting.batch
            live[node.id] = rows * (node.type.features + 1) * setting.accumulator
        peak = max(peak, kept + transient + sum(live.values()))
        live = {n: size for n, size in live.items() if last_use.get(n, len(graph)) > node.id}
    return max(0, peak - _output_bytes(graph, setting))


def _scores_bytes(graph: Graph, node: Node, setting: Setting) -> int:
    if not setting.kernel.materialises:
        return 0
    rows, keys = (graph[a].type.rows for a in node.args[:2])
    return 3 * rows.elements_count * keys.length * setting.batch * setting.accumulator


def _output_bytes(graph: Graph, setting: Setting) -> int:
    """Return the output's bytes, if the last op writes the output itself and no copy of it."""
    rows = graph.output.type.rows.elements_count * setting.batch
    return rows * graph.output.type.features * setting.item
