"""The ``reference`` backend: float64, dense masks, the naive graph. The oracle that everything is compared with."""

from __future__ import annotations

from typing import ClassVar

import attrs

from attnplan.backends.base import Backend, Schedule
from attnplan.cost import Device, KernelModel
from attnplan.ir import Graph
from attnplan.spec import AttentionSpec

_KERNEL = KernelModel(efficiency=0.1, skips_causal=False, materialises=True, tile=1)


@attrs.frozen(cache_hash=True)
class Reference(Backend):
    """Interprets the graph in float64; runs only when it is asked for by name."""

    name: ClassVar[str] = "reference"
    emitter: ClassVar[str] = "attnplan.backends.reference.emit"
    automatic: ClassVar[bool] = False
    naive: ClassVar[bool] = True

    def schedules(self, device: Device) -> tuple[Schedule, ...]:
        return (Schedule("float64", _KERNEL, "float64 interpreter, dense masks", deterministic=True, tested="CPU"),)

    def refuse(self, graph: Graph, spec: AttentionSpec, schedule: Schedule, device: Device) -> tuple[str, ...]:
        return ()
