"""The ``xformers`` backend: its operators, or those of its successor package, as schedules.

References
----------
xformers 0.0.35, ``xformers.ops.fmha``; limits as its operators state them in ``not_supported_reasons``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import attrs

from attnplan.backends.base import Backend, Schedule
from attnplan.backends.eager import NO_WIDE_BACKWARD, efficient_alignment, float32_reason
from attnplan.backends.limits import HALF, Limits, dotted, found_documents, reasons
from attnplan.cost import Device, KernelModel
from attnplan.cost.setting import ITEM_BYTES
from attnplan.ir import Attend, Graph
from attnplan.ir.slots import slot_condition
from attnplan.spec import AttentionSpec
from attnplan.units import format_bytes

PACKAGES = ("mslk", "xformers")
MODULES = ("mslk.attention.fmha", "xformers.ops.fmha")

FLASH = Schedule(
    "flash",
    KernelModel(efficiency=0.33, masks=False, native=frozenset({"window", "documents"})),
    "xformers' FlashAttention-2",
    runs="xformers-flash",
    packages=PACKAGES,
    modules=MODULES,
    tested="H100",
)
CUTLASS = Schedule(
    "cutlass",
    KernelModel(efficiency=0.17, native=frozenset({"mask"})),
    "xformers' CUTLASS kernel",
    tile=(128, 128),
    chunk=128,
    runs="xformers-cutlass",
    packages=PACKAGES,
    modules=MODULES,
    tested="H100",
)
SPLIT_K = Schedule(
    "split-k",
    KernelModel(efficiency=0.2, masks=False, skips_causal=False),
    "xformers' Triton split-K forward, FlashAttention-2 backward",
    runs="xformers-split-k",
    packages=PACKAGES,
    modules=MODULES,
    tested="H100",
)
LIMITS = {
    "flash": Limits("xformers' flash", least=(8, 0)),
    "cutlass": Limits(
        "xformers' cutlass", least=(5, 0), most=(9, 0), dtypes=(*HALF, "float32"), widest=1 << 16, equal=False
    ),
    "split-k": Limits("xformers' split-k", least=(8, 0), widths=(16, 32, 64, 128, 256)),
}


@attrs.frozen(cache_hash=True)
class XFormers(Backend):
    """Schedules: ``flash``, ``cutlass``, which takes any mask, and ``split-k``, for whole attention."""

    name: ClassVar[str] = "xformers"
    emitter: ClassVar[str] = "attnplan.backends.eager.emit"
    optional: ClassVar[tuple[str, ...]] = PACKAGES

    def schedules(self, device: Device) -> tuple[Schedule, ...]:
        return () if device.kind == "cpu" else (FLASH, CUTLASS, SPLIT_K)

    def refuse(self, graph: Graph, spec: AttentionSpec, schedule: Schedule, device: Device) -> tuple[str, ...]:
        return tuple(_reasons(graph, spec, schedule, device))


def _reasons(graph: Graph, spec: AttentionSpec, schedule: Schedule, device: Device) -> Iterator[str]:
    limits = LIMITS[schedule.name]
    if schedule.name == "cutlass":
        limits = attrs.evolve(limits, multiple=efficient_alignment(spec.dtype, device))
        yield from float32_reason(spec, device)
    yield from reasons(limits, schedule.native, graph, spec, device)
    capability = device.capability or (0, 0)
    if schedule.name == "flash" and capability in NO_WIDE_BACKWARD and 192 < spec.head_dim <= 224:
        yield f"{limits.title} has no backward for head_dim {spec.head_dim} on compute capability {dotted(capability)}"
    if schedule.name == "split-k":
        yield from _causal_reason(graph)
    yield from _documents_reasons(limits.title, graph, spec, schedule)


def _causal_reason(graph: Graph) -> Iterator[str]:
    for node, op in graph.of(Attend):
        rows = (graph[a].type.rows for a in node.args[:2])
        if slot_condition(op, *rows) == "causal":
            yield f"xformers' split-k is causal over padded blocks only, %{node.id} is a causal square"
            return


def _documents_reasons(title: str, graph: Graph, spec: AttentionSpec, schedule: Schedule) -> Iterator[str]:
    found = found_documents(graph, schedule.native)
    if found and spec.heads != spec.kv_heads:
        rows = spec.batch * spec.shape.kv_len * spec.heads * (spec.head_dim + spec.value_dim)
        copied = format_bytes(rows * ITEM_BYTES[spec.dtype])
        yield f"{title} has no grouped heads over documents: it would need a copy of {copied} of keys and values"
    for one in found:
        if one.window != (None, None) and one.window[1] != 0:
            yield f"{title} has causal windows over documents only, the spec has one to both sides"
            return
