"""What a loop costs: its pieces, one after the other, and the copies of their results to their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import attrs

from attnplan.cost.device import Device
from attnplan.cost.parameters import Parameters
from attnplan.cost.placed import is_alone, is_placed
from attnplan.cost.setting import KernelModel, Setting, value_bytes
from attnplan.ir import Attend, Graph, Output
from attnplan.passes.alike import bodies
from attnplan.passes.chunk import without_loop
from attnplan.passes.recompute import saves_more
from attnplan.spec import AttentionSpec

PIECE = 6e-5
"""Seconds of the host for one pass over a piece, beside its operators: slices, and the call of its program."""


class Timed(Protocol):
    """The time of one op on the device."""

    @property
    def seconds(self) -> float:
        """Seconds."""
        ...


class Priced(Protocol):
    """A predicted time."""

    @property
    def seconds(self) -> float:
        """Seconds of a call."""
        ...

    @property
    def host(self) -> float:
        """Seconds of the host."""
        ...

    @property
    def ops(self) -> Sequence[Timed]:
        """What each op costs."""
        ...


def is_piecewise(graph: Graph) -> bool:
    """Return whether a graph is run piece by piece, or computes again in the backward what it did not save."""
    output = graph.output.op
    assert isinstance(output, Output)
    return output.loop is not None or output.recompute


def piecewise_seconds(
    graph: Graph,
    spec: AttentionSpec,
    kernel: KernelModel,
    device: Device,
    price: Callable[[Graph, AttentionSpec], Priced],
    table: Parameters,
) -> tuple[float, float]:
    """Return the seconds of all pieces of a graph, and those of the host; ``price`` predicts one piece.

    The host starts one piece after the other without waiting for any, in one call of the plan.
    In training a piece's forward runs once more in the backward where that needs more than the output and its LSE.
    """
    output = graph.output.op
    assert isinstance(output, Output)
    if output.loop is None:
        count = 1
        programs: tuple[tuple[Graph, int], ...] = ((without_loop(graph), 1),)
        batch = spec.batch
    else:
        batch = min(spec.batch, output.loop[0])
        count = -(-spec.batch // batch)
        programs = bodies(graph)
    small = attrs.evolve(spec, batch=batch)
    call = table.kernel(kernel.key, kernel.efficiency)
    calls = [call.call + (call.backward_call if spec.training else 0.0), call.call]  # a piece takes PIECE instead
    seconds, host = 0.0, calls[0]
    for body, times in programs:
        found = [price(body, small)]
        if spec.training and _runs_again(body, kernel):
            found.append(price(body, attrs.evolve(small, training=False)))
        moved = _moved_bytes(graph, Setting.of(body, small, kernel), device.kind)
        copied = 2 * moved / device.bandwidth + 2 * device.launch * (moved > 0)
        work = (f.seconds if device.kind == "cpu" else sum(op.seconds for op in f.ops) for f in found)
        seconds += count * times * (sum(work) + copied)
        started = sum(max(0.0, f.host - each) for f, each in zip(found, calls, strict=False))
        host += count * times * (started + PIECE * (1 + spec.training))
    if device.kind == "cpu":  # the host is the device
        return seconds, host
    return max(seconds, host) + table.exposed * min(seconds, host), host


def _runs_again(body: Graph, kernel: KernelModel) -> bool:
    plain = kernel.materialises and not any(op.loop for _, op in body.of(Attend))
    return kernel.keeps or saves_more(body, plain=plain)


def _moved_bytes(graph: Graph, setting: Setting, kind: str) -> int:
    """Return the bytes of a piece's results that are copied or added to those of the whole."""
    body, placed, alone = setting.graph, is_placed(setting, kind), is_alone(graph)
    size = setting.batch * setting.item
    moved = 0 if placed else body.output.type.rows.elements_count * body.output.type.features * size
    if not setting.spec.training:
        return moved
    copied = "" if placed and alone else "kv" if placed else "qkv"
    return moved + sum(value_bytes(body.inputs[t], setting) for t in copied)
