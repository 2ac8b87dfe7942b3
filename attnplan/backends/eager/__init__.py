"""The ``eager`` backend: torch's own attention kernels on strided views, merged without torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import attrs

from attnplan.backends.base import Backend, Schedule
from attnplan.cost import Device, KernelModel
from attnplan.ir import Attend, Graph
from attnplan.ir.slots import slot_condition
from attnplan.spec import AttentionSpec

FLASH_CPU = Schedule("flash", KernelModel(efficiency=0.5, tile=32, causal_tile=512), "SDPA's flash operator for CPU")
FLASH_CUDA = Schedule("flash", KernelModel(efficiency=0.36, masks=False), "SDPA's FlashAttention-2 operator")
MATH_CPU = Schedule("math", KernelModel(0.5, skips_causal=False, materialises=True, tile=1), "plain torch")
MATH_CUDA = Schedule("math", KernelModel(0.3, skips_causal=False, materialises=True, tile=1), "plain torch")


@attrs.frozen(cache_hash=True)
class Eager(Backend):
    """Schedules: ``flash``, a fused kernel with the merged backward; ``math``, plain differentiable torch."""

    name: ClassVar[str] = "eager"
    emitter: ClassVar[str] = "attnplan.backends.eager.emit"

    def schedules(self, device: Device) -> tuple[Schedule, ...]:
        return (FLASH_CPU, MATH_CPU) if device.kind == "cpu" else (FLASH_CUDA, MATH_CUDA)

    def refuse(self, graph: Graph, spec: AttentionSpec, schedule: Schedule, device: Device) -> tuple[str, ...]:
        return tuple(_reasons(graph, spec, schedule, device))


def _reasons(graph: Graph, spec: AttentionSpec, schedule: Schedule, device: Device) -> Iterator[str]:
    if not device.rate(spec.dtype):
        yield f"{device.name} has no {spec.dtype}"
    if spec.precision == "tf32" and device.kind == "cuda":
        yield 'TF32 in torch is a process-wide flag that a plan must not change; use precision="ieee"'
    if schedule.name == "flash":
        yield from _flash_reasons(graph, spec, device)


def _flash_reasons(graph: Graph, spec: AttentionSpec, device: Device) -> Iterator[str]:
    if spec.dropout:
        yield f"the flash operator draws dropout masks that depend on the plan, the spec has dropout={spec.dropout}"
    if spec.softcap is not None:
        yield f"the flash operator has no softcap, the spec has softcap={spec.softcap}"
    if spec.value_dim != spec.head_dim:
        yield f"the flash operator needs value_dim == head_dim, the spec has {spec.value_dim} and {spec.head_dim}"
    if device.kind == "cpu":
        return
    if device.capability is not None and device.capability < (8, 0):
        capability = ".".join(map(str, device.capability))
        yield f"FlashAttention-2 needs compute capability 8.0, {device.name} has {capability}"
    if spec.dtype not in ("float16", "bfloat16"):
        yield f"FlashAttention-2 takes float16 and bfloat16, the spec has {spec.dtype}"
    if spec.head_dim > 256 or spec.head_dim % 8:
        yield f"FlashAttention-2 needs head_dim <= 256 and a multiple of 8, the spec has {spec.head_dim}"
    for node, op in graph.of(Attend):
        if slot_condition(op, *(graph[a].type.rows for a in node.args[:2])) == "mask":
            yield f"FlashAttention-2 takes no mask, %{node.id} needs one for {op.where!r}"
            return
