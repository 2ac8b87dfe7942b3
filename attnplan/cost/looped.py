"""What a loop costs: its pieces, one after the other, and the copies of their results to their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import attrs

from attnplan.cost.device import Device
from attnplan.cost.rules import ITEM_BYTES
from attnplan.ir import Graph, Output
from attnplan.passes.alike import bodies
from attnplan.passes.chunk import without_loop
from attnplan.spec import AttentionSpec


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


def is_piecewise(graph: Graph) -> bool:
    """Return whether a graph is run piece by piece, or computes again in the backward what it did not save."""
    output = graph.output.op
    assert isinstance(output, Output)
    return output.loop is not None or output.recompute


def piecewise_seconds(
    graph: Graph, spec: AttentionSpec, device: Device, price: Callable[[Graph, AttentionSpec], Priced]
) -> tuple[float, float]:
    """Return the seconds of all pieces of a graph, and those of the host; ``price`` predicts one piece.

    In training a piece's forward runs once more in the backward where its kernel keeps nothing for it; that is priced
    for every piece.
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
    seconds = host = 0.0
    for body, times in programs:
        found = [price(body, small)]
        if spec.training:
            found.append(price(body, attrs.evolve(small, training=False)))
        copied = 2 * _moved_bytes(body, batch, spec) / device.bandwidth + 2 * device.launch
        seconds += count * times * (sum(f.seconds for f in found) + copied)
        host += count * times * sum(f.host for f in found)
    return seconds, host


def _moved_bytes(body: Graph, batch: int, spec: AttentionSpec) -> int:
    """Return the bytes of a piece's results that are copied: the output, and in training the gradients."""
    item = ITEM_BYTES[spec.dtype]
    moved = body.output.type.rows.elements_count * body.output.type.features
    if spec.training:
        moved += sum(n.type.rows.elements_count * n.type.features for n in body.inputs.values())
    return batch * moved * item
