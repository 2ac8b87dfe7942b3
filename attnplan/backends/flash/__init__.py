"""The ``flash`` backend: the flash-attn packages, versions 2, 3 and 4, whichever is installed.

References
----------
flash-attn 2.8, flash-attn 3's Hopper interface, flash-attn-4 4.0.0b36; limits as their interfaces check them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import attrs

from attnplan.backends.base import Backend, Schedule
from attnplan.backends.eager import NO_WIDE_BACKWARD
from attnplan.backends.limits import Limits, dotted, reasons
from attnplan.cost import Device, KernelModel
from attnplan.ir import Attend, Graph
from attnplan.spec import AttentionSpec

_WINDOWS = frozenset({"window", "documents", "softcap"})

FA2 = Schedule(
    "fa2",
    KernelModel(efficiency=0.35, masks=False, native=_WINDOWS),
    "flash-attn 2",
    runs="fa2",
    packages=("flash-attn",),
    modules=("flash_attn.flash_attn_interface",),
)
FA3 = Schedule(
    "fa3",
    KernelModel(efficiency=0.6, masks=False, native=_WINDOWS),
    "flash-attn 3",
    runs="fa3",
    packages=("flash-attn-3", "flash_attn_3"),
    modules=("flash_attn_interface",),
)
FA4 = Schedule(
    "fa4",
    KernelModel(efficiency=0.64, native=_WINDOWS | {"blocks", "sinks"}, writes_into=True),
    "flash-attn 4",
    tile=(128, 128),
    chunk=None,
    runs="fa4",
    packages=("flash-attn-4",),
    modules=("flash_attn.cute.interface",),
    tested="H100, but for its own sink logits and for split keys",
)
FA4_MASKS = attrs.evolve(
    FA4,
    name="fa4-masks",
    kernel=attrs.evolve(FA4.kernel, native=FA4.kernel.native | {"tile-masks"}),
    title="flash-attn 4 with a mask function",
    tested="H100",
    trains_by_name=True,
)
"""Partial tiles, too. Backward they are gathered for another kernel, which was measured at up to ten times what it was
predicted to take: a plan that trains takes it by backend="flash" only."""
LIMITS = {
    "fa2": Limits("flash-attn 2", least=(8, 0)),
    "fa3": Limits("flash-attn 3", least=(9, 0), most=(9, 0)),
    "fa4": Limits("flash-attn 4", least=(9, 0), most=(12, 1), equal=False),
    "fa4-masks": Limits("flash-attn 4 with a mask function", least=(9, 0), most=(9, 0), equal=False),
}
_HOPPER = (9, 0)
_FA4_WIDTHS = (64, 128)
"""What was checked on an H100. With 72 features the backward returns wrong gradients there, without an error; where
v has another width than q and k it does not compile."""


@attrs.frozen(cache_hash=True)
class Flash(Backend):
    """Schedules: ``fa4``, ``fa4-masks``, ``fa3``, ``fa2``. Each needs its own package only."""

    name: ClassVar[str] = "flash"
    emitter: ClassVar[str] = "attnplan.backends.eager.emit"
    optional: ClassVar[tuple[str, ...]] = ("flash-attn-4", "flash-attn-3", "flash-attn")

    def schedules(self, device: Device) -> tuple[Schedule, ...]:
        if device.kind == "cpu":
            return ()
        capability = device.capability or (0, 0)
        if capability[0] == 10:  # two tiles of queries share a block there
            return attrs.evolve(FA4, tile=(256, 128)), FA3, FA2
        if capability[0] != 9:
            kernel = attrs.evolve(FA4.kernel, masks=False, native=_WINDOWS | {"sinks"})
            return attrs.evolve(FA4, tile=None, kernel=kernel), FA3, FA2
        return FA4, FA4_MASKS, FA3, FA2

    def refuse(self, graph: Graph, spec: AttentionSpec, schedule: Schedule, device: Device) -> tuple[str, ...]:
        return tuple(_reasons(graph, spec, schedule, device))


def _reasons(graph: Graph, spec: AttentionSpec, schedule: Schedule, device: Device) -> Iterator[str]:
    limits = LIMITS[schedule.name]
    if schedule.name == "fa4-masks" and not any(op.tile is not None for _, op in graph.of(Attend)):
        yield "flash-attn 4 calls a mask function in tiles, and nothing here is cut into tiles"
        return
    if schedule.name == "fa4-masks" and spec.softcap is not None:
        yield f"partial tiles have no backward of a softcap, the spec has softcap={spec.softcap}"
    capability = device.capability or (0, 0)
    wide = max(spec.head_dim, spec.value_dim) > 128
    pair = (spec.head_dim, spec.value_dim)
    if schedule.name == "fa4" and capability > _HOPPER and pair not in ((192, 128), (256, 256)):
        limits = attrs.evolve(limits, widest=128)
    if capability == _HOPPER and schedule.runs == "fa4":
        limits = attrs.evolve(limits, widths=_FA4_WIDTHS, equal=True)
    yield from reasons(limits, schedule.native, graph, spec, device)
    if schedule.name == "fa2" and capability in NO_WIDE_BACKWARD and 192 < spec.head_dim <= 224:
        yield f"flash-attn 2 has no backward for head_dim {spec.head_dim} on compute capability {dotted(capability)}"
    if schedule.runs != "fa4":
        return
    if min(pair) < 8:
        yield f"flash-attn 4 needs head_dim >= 8, the spec has {min(pair)}"
    if capability[0] == 12 and spec.softcap is not None:
        yield f"flash-attn 4 has no backward of a softcap on compute capability {dotted(capability)}"
    if wide and any(getattr(n.op, "tile", None) is not None for n in graph):
        yield f"flash-attn 4 skips tiles of up to 128 features, the spec has {max(pair)}"
