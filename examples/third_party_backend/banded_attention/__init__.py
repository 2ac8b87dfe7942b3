"""A backend for attnplan: bands (causal attention and windows) in plain torch. Its declaration imports no torch."""

from collections.abc import Iterator
from typing import ClassVar

import attrs

from attnplan.backends.base import Backend, Schedule
from attnplan.cost import Device, KernelModel
from attnplan.ir import Attend, Graph
from attnplan.ir.slots import slot_band
from attnplan.patterns.sums import Conjunction
from attnplan.spec import AttentionSpec

DENSE = Schedule("dense", KernelModel(0.2, skips_causal=False, materialises=True, tile=1), "all scores, then a band")


@attrs.frozen(cache_hash=True)
class Banded(Backend):
    name: ClassVar[str] = "banded"
    emitter: ClassVar[str] = "banded_attention.emit"

    def schedules(self, device: Device) -> tuple[Schedule, ...]:
        return (DENSE,)

    def refuse(self, graph: Graph, spec: AttentionSpec, schedule: Schedule, device: Device) -> tuple[str, ...]:
        return tuple(_reasons(graph, spec))


def _reasons(graph: Graph, spec: AttentionSpec) -> Iterator[str]:
    """Give every reason, never run less than what is asked: attnplan shows them, and takes another backend."""
    if spec.softcap is not None or spec.dropout:
        yield "bands have neither softcap nor dropout"
    if len(graph) != 5:
        yield f"runs one attend over whole inputs, this graph has {len(graph)} ops"
        return
    ((node, op),) = graph.of(Attend)
    known = Conjunction.of(op.where)
    if known.opaque or known.dilated or known.heads:
        yield f"knows bands only, not {op.where!r}"
    elif slot_band(op, *(n.type.rows for n in graph.args(node)[:2])) is None:
        yield "positions arrive with the call"
