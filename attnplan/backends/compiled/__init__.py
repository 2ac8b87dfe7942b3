"""The ``compiled`` backend: FlexAttention and programs of plain torch, compiled by Inductor at the first call.

References
----------
Dong et al., FlexAttention, 2024 (arXiv:2412.05496); ``torch.nn.attention.flex_attention``, torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import attrs

from attnplan.backends.base import Backend, Schedule
from attnplan.backends.limits import TF32
from attnplan.cost import Device, KernelModel
from attnplan.ir import Attend, Graph, Merge, Mix, Take
from attnplan.patterns.bands import Band, Full
from attnplan.patterns.base import conjuncts
from attnplan.patterns.operands import Documents, Padding
from attnplan.spec import AttentionSpec

_NATIVE = frozenset({"softcap", "mask"})
FLEX_CPU = Schedule(
    name="flex",
    kernel=KernelModel(efficiency=0.3, tile=128, native=_NATIVE, skips=True),
    title="FlexAttention, for gradients and LSE gathered tiles",
    tile=(128, 128),
    chunk=None,
    tested="CPU",
)
FLEX_CUDA = Schedule(
    name="flex",
    kernel=KernelModel(efficiency=0.43, tile=128, native=_NATIVE, skips=True),
    title="FlexAttention",
    tile=(128, 128),
    chunk=None,
)
INDUCTOR_CPU = Schedule(
    name="inductor",
    kernel=KernelModel(efficiency=0.2, tile=128, native=_NATIVE, skips=True),
    title="gathered tiles in plain torch",
    tile=(128, 128),
    chunk=None,
    tested="CPU",
)


@attrs.frozen(cache_hash=True)
class Compiled(Backend):
    """Schedules: ``flex``, FlexAttention; ``inductor``, gathered tiles for the CPU.

    It is not chosen by ``backend="auto"``: the first call compiles for seconds, which no prediction of a call holds.
    """

    name: ClassVar[str] = "compiled"
    emitter: ClassVar[str] = "attnplan.backends.compiled.emit"
    automatic: ClassVar[bool] = False
    inlines: ClassVar[bool] = True
    """Whether a trace takes up the program itself."""
    note: ClassVar[str] = "compiled once for each structure, at the first call: seconds that are not priced"

    def schedules(self, device: Device) -> tuple[Schedule, ...]:
        return (FLEX_CPU, INDUCTOR_CPU) if device.kind == "cpu" else (FLEX_CUDA,)

    def refuse(self, graph: Graph, spec: AttentionSpec, schedule: Schedule, device: Device) -> tuple[str, ...]:
        return tuple(_reasons(graph, spec, schedule, device))


def _reasons(graph: Graph, spec: AttentionSpec, schedule: Schedule, device: Device) -> Iterator[str]:
    if not device.rate(spec.dtype):
        yield f"{device.name} has no {spec.dtype}"
    if spec.precision == "tf32" and device.kind == "cuda":
        yield TF32
    if spec.dropout:
        yield f"compiled scores have no dropout, the spec has dropout={spec.dropout}"
    attends = graph.of(Attend)
    if len(attends) != 1 or any(isinstance(node.op, Take | Merge | Mix) for node in graph):
        apart = "takes rows apart or joins parts"
        yield f"it runs one attend over whole inputs, the graph has {len(attends)} and {apart}"
        return
    op = attends[0][1]
    if op.at is not None:
        yield "its masks count rows and heads from 0, the inputs of this graph are some rows of the sequence only"
    if op.boxes is not None:
        yield "its tiles are runs of rows, those of this graph are boxes of a grid"
    if schedule.name == "flex":
        yield from _flex_reasons(op, spec, device)


def _flex_reasons(op: Attend, spec: AttentionSpec, device: Device) -> Iterator[str]:
    if spec.dtype == "float64":
        yield "FlexAttention takes float32, float16 and bfloat16, the spec has float64"
    if device.kind == "cuda" and min(spec.head_dim, spec.value_dim) < 16:
        yield f"FlexAttention needs head_dim >= 16, the spec has {spec.head_dim} and {spec.value_dim}"
    if device.capability is not None and device.capability < (8, 0):
        yield "FlexAttention needs compute capability 8.0"
    terms = [t for t in conjuncts(op.where) if not isinstance(t, Full)]
    for term in terms:
        if term.operands and not isinstance(term, Documents | Padding):
            yield f"{term!r} mixes data of the call into a union or complement: its tiles are found on the CPU"
    fixed = [t for t in terms if not t.operands]
    other = [t for t in fixed if not isinstance(t, Band)]
    if op.shift is None and other:
        yield f"with q_offset the tiles of {other[0]!r} are found on the CPU; bands only are judged on the device"
    arrives = op.shift is None or len(fixed) < len(terms)
    if arrives and len({tuple(t.head_key(h) for t in terms) for h in range(spec.heads)}) > 1:
        yield "heads differ, and tables that follow the data of a call are the same for all heads"
