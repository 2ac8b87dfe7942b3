"""The ``eager`` backend: torch's own attention kernels on strided views, merged without torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import attrs

from attnplan.backends.base import Backend, Schedule
from attnplan.backends.limits import HALF, TF32, Limits, bias_reasons, dotted, reasons
from attnplan.cost import Device, KernelModel
from attnplan.ir import Attend, Graph
from attnplan.spec import AttentionSpec

FLASH_CPU = Schedule(
    name="flash",
    kernel=KernelModel(efficiency=0.5, tile=32, causal_tile=512, native=frozenset({"mask"})),
    title="SDPA's flash operator for CPU",
    tile=(128, 64),
    chunk=64,
    forward_chunk=32,
    runs="flash-cpu",
    deterministic=True,
    tested="CPU",
)
CUDNN = Schedule(
    "cudnn",
    KernelModel(efficiency=0.56, native=frozenset({"mask"})),
    "SDPA's cuDNN operator",
    tile=(128, 128),
    chunk=128,
    runs="cudnn",
    tested="H100",
)
CUDNN_WITHOUT_MASKS = attrs.evolve(CUDNN, kernel=KernelModel(efficiency=0.56, masks=False), tile=None)
"""Where its masks were never tried."""
FLASH_CUDA = Schedule(
    "flash",
    KernelModel(efficiency=0.33, masks=False, native=frozenset({"window", "documents"}), turned=True),
    "SDPA's FlashAttention-2 operator",
    runs="flash-cuda",
    tested="H100",
)
EFFICIENT = Schedule(
    "efficient",
    KernelModel(efficiency=0.17, native=frozenset({"mask"})),
    "SDPA's memory-efficient operator",
    tile=(128, 128),
    chunk=128,
    runs="efficient",
    tested="H100",
)
MATH_CPU = Schedule(
    "math",
    KernelModel(0.5, skips_causal=False, materialises=True, tile=1),
    "plain torch",
    deterministic=True,
    tested="CPU",
)
MATH_CUDA = Schedule(
    "math",
    KernelModel(0.3, skips_causal=False, materialises=True, tile=1),
    "plain torch",
    deterministic=True,
    tested="H100",
)

LIMITS = {
    "cudnn": Limits("cuDNN", least=(8, 0), widest=128, equal=False),
    "flash": Limits("FlashAttention-2", least=(8, 0)),
    "efficient": Limits(
        "the efficient kernel", least=(5, 0), most=(12, 1), dtypes=(*HALF, "float32"), widest=1 << 16, equal=False
    ),
}
TRIED = (9, 0)
"""The compute capability on which cuDNN's masks, and heads of more than 128 features, were tried."""
NO_WIDE_BACKWARD = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))
"""Capabilities on which FlashAttention-2 has no backward for 193 to 224 features."""


@attrs.frozen(cache_hash=True)
class Eager(Backend):
    """Schedules: one for each fused kernel of torch, with the merged backward; ``math``, plain differentiable torch."""

    name: ClassVar[str] = "eager"
    emitter: ClassVar[str] = "attnplan.backends.eager.emit"

    def schedules(self, device: Device) -> tuple[Schedule, ...]:
        if device.kind == "cpu":
            return (FLASH_CPU, MATH_CPU)
        cudnn = CUDNN if device.capability == TRIED else CUDNN_WITHOUT_MASKS
        return (cudnn, FLASH_CUDA, EFFICIENT, MATH_CUDA)

    def refuse(self, graph: Graph, spec: AttentionSpec, schedule: Schedule, device: Device) -> tuple[str, ...]:
        if device.kind == "cpu":
            return tuple(_on_cpu(graph, spec, schedule))
        if schedule.name == "math":
            return tuple(_plain(spec, device))
        return tuple(_fused(graph, spec, schedule, device))


def _on_cpu(graph: Graph, spec: AttentionSpec, schedule: Schedule) -> Iterator[str]:
    if schedule.name == "math":
        return
    if spec.dropout:
        yield f"the flash operator draws dropout masks that depend on the plan, the spec has dropout={spec.dropout}"
    if spec.softcap is not None:
        yield f"the flash operator has no softcap, the spec has softcap={spec.softcap}"
    if spec.value_dim != spec.head_dim:
        yield f"the flash operator needs value_dim == head_dim, the spec has {spec.value_dim} and {spec.head_dim}"
    yield from bias_reasons("the flash operator", schedule.native, graph)


def _plain(spec: AttentionSpec, device: Device) -> Iterator[str]:
    if not device.rate(spec.dtype):
        yield f"{device.name} has no {spec.dtype}"
    if spec.precision == "tf32":
        yield TF32


def _fused(graph: Graph, spec: AttentionSpec, schedule: Schedule, device: Device) -> Iterator[str]:
    limits = LIMITS[schedule.name]
    capability = device.capability or (0, 0)
    if schedule.name == "efficient":
        limits = attrs.evolve(limits, multiple=efficient_alignment(spec.dtype, device))
        yield from float32_reason(spec, device)
    if schedule.name == "cudnn":
        tried = f"was tried with masks on compute capability {dotted(TRIED)} only"
        limits = attrs.evolve(limits, widest=256) if capability == TRIED else attrs.evolve(limits, no_mask=tried)
    yield from reasons(limits, schedule.native, graph, spec, device)
    if schedule.name == "flash" and capability in NO_WIDE_BACKWARD and 192 < spec.head_dim <= 224:
        where = f"on compute capability {dotted(capability)}"
        yield f"FlashAttention-2 has no backward for head_dim {spec.head_dim} {where}"
    if schedule.name == "cudnn":
        for node, _ in graph.of(Attend):
            q, k = (graph[a].type.rows.length for a in node.args[:2])
            if q == k == 1:
                yield f"cuDNN takes no single query with a single key, %{node.id} has these"
                return


def efficient_alignment(dtype: str, device: Device) -> int:
    """Return what the features of a head must be a multiple of in the kernels that CUTLASS makes."""
    capability = device.capability or (0, 0)
    if dtype in HALF:
        return 8 if capability >= (7, 0) else 1
    return 4 if capability >= (8, 0) else 1


def float32_reason(spec: AttentionSpec, device: Device) -> Iterator[str]:
    """Yield why the kernels that CUTLASS makes do not compute in IEEE float32 on a device."""
    if spec.dtype == "float32" and (device.capability or (0, 0)) >= (8, 0):
        yield 'it computes float32 as sums of TF32 products on tensor cores, the spec has precision="ieee"'
