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
from attnplan.backends.eager import CUDNN_WITHOUT_MASKS, FLASH_CPU, FLASH_CUDA, Eager
from attnplan.backends.limits import TF32
from attnplan.cost import Device, KernelModel, Target
from attnplan.ir import Attend, Graph, Merge, Mix, Node, Take
from attnplan.ir.slots import slot_condition
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
    tested="H100",
    modules=("triton",),
    compile_seconds=(6.0, 10.0),  # of 21 and 6 first calls in bench/results/regret-h100-xformers.json three in four
)
FLEX_FLASH = Schedule(
    name="flex-flash",
    kernel=KernelModel(efficiency=0.55, tile=128, native=frozenset({"mask"}), skips=True),
    title="FlexAttention's FLASH kernel",
    tile=(128, 128),
    chunk=None,
    packages=("flash-attn-4",),
    modules=("flash_attn.cute.interface",),
)
INDUCTOR_CPU = Schedule(
    name="inductor",
    kernel=KernelModel(efficiency=0.2, tile=128, native=_NATIVE, skips=True),
    title="gathered tiles in plain torch",
    tile=(128, 128),
    chunk=None,
    tested="CPU",
)
INDUCTOR_KEPT_CPU = Schedule(
    name="inductor-kept",
    kernel=KernelModel(efficiency=0.2, tile=128, native=_NATIVE, skips=True, key="inductor", keeps=True),
    title="gathered tiles in plain torch, weights kept for the backward",
    tile=(128, 128),
    chunk=None,
    tested="CPU",
)

FLASH_SINCE = (2, 13)
"""Earlier versions of torch hand masks to its kernels that flash-attn 4 reads in another way."""
_FLASH_WIDTHS = (64, 128)
_TIMED_WIDTHS = (64, 128)
_TIMED_ROWS = 128
"""FlexAttention has another kernel for fewer queries."""
_SCORES = frozenset({"bias", "alibi_slopes"})
"""Operands that change scores."""


def _around(kernel: Schedule, name: str) -> Schedule:
    """Return a schedule of one of torch's own kernels, around which Inductor fuses what takes and joins rows."""
    return Schedule(
        name=name,
        kernel=attrs.evolve(kernel.kernel, key=kernel.runs, native=frozenset(), fuses=True),
        title=f"{kernel.title}, lattices fused around it",
        chunk=None,
        tested="CPU" if kernel is FLASH_CPU else "",
    )


LATTICES = {"sdpa": FLASH_CPU, "sdpa-cudnn": CUDNN_WITHOUT_MASKS, "sdpa-flash": FLASH_CUDA}
"""The kernel of each schedule for lattices: one of the ``eager`` backend, whose limits hold here, too."""
SDPA_CPU, SDPA_CUDNN, SDPA_FLASH = (_around(kernel, name) for name, kernel in LATTICES.items())


@attrs.frozen(cache_hash=True)
class Compiled(Backend):
    """Schedules: ``flex``, ``flex-flash``: FlexAttention; ``inductor``: gathered tiles on the CPU; ``sdpa``: lattices.

    ``inductor-kept`` keeps the weights of these tiles for the backward: faster to train, for the memory that it says.

    ``backend="auto"`` may choose a schedule whose seconds of compiling are known, for what it has been timed on: see
    :meth:`by_name_only`. With ``tune=True`` all that have been run on a kind of device are measured beside the others.
    """

    name: ClassVar[str] = "compiled"
    emitter: ClassVar[str] = "attnplan.backends.compiled.emit"
    automatic: ClassVar[bool] = False
    compiles: ClassVar[bool] = True
    inlines: ClassVar[bool] = True
    """Whether a trace takes up the program itself."""
    note: ClassVar[str] = "compiles once for each layout of its tensors, at its first call"

    def schedules(self, device: Device) -> tuple[Schedule, ...]:
        return (
            (FLEX_CPU, INDUCTOR_CPU, INDUCTOR_KEPT_CPU, SDPA_CPU)
            if device.kind == "cpu"
            else (FLEX_CUDA, FLEX_FLASH, SDPA_CUDNN, SDPA_FLASH)
        )

    def is_automatic(self, schedule: Schedule) -> bool:
        """Return whether ``backend="auto"`` may choose a schedule for some specs."""
        return schedule.automatic and bool(schedule.tested) and any(schedule.compile_seconds)

    def by_name_only(self, spec: AttentionSpec, schedule: Schedule, *, measured: bool = False) -> str:
        """Return why ``backend="auto"`` leaves a schedule to those who ask for it; empty if it may choose it.

        It may choose what has been run on such a device and whose seconds of compiling are known, for specs like those
        that were timed there.
        """
        found = super().by_name_only(spec, schedule, measured=measured)
        if not found or not self.is_automatic(schedule):
            return found
        why = next(_untimed(spec), "")
        return f"{found}: {why}" if why else ""

    def missing(self, schedule: Schedule, target: Target) -> tuple[str, ...]:
        """Return why this machine cannot run a schedule: see :meth:`~attnplan.backends.base.Backend.missing`."""
        reasons = super().missing(schedule, target)
        version = self.versions()["torch"]
        if schedule.name == "flex-flash" and target.torch_device is not None and version is not None:
            release = tuple(int(n) for n in version.split(".")[:2])
            if release < FLASH_SINCE:
                needed = ".".join(map(str, FLASH_SINCE))
                reasons += (f"FlexAttention's FLASH kernel is complete since torch {needed}, this is {version}",)
        return reasons

    def refuse(self, graph: Graph, spec: AttentionSpec, schedule: Schedule, device: Device) -> tuple[str, ...]:
        if schedule.name in LATTICES:
            return tuple(_lattice_reasons(graph, spec, schedule, device))
        return tuple(_reasons(graph, spec, schedule, device))


def _untimed(spec: AttentionSpec) -> Iterator[str]:
    """Yield in what a spec differs from those for which FlexAttention has been timed on a GPU."""
    if not spec.is_static:
        yield "each length would be compiled by itself, and the spec has open lengths"
    if spec.dtype not in ("float16", "bfloat16"):
        yield f"it was timed with float16 and bfloat16, the spec has {spec.dtype}"
    if not {spec.head_dim, spec.value_dim} <= {*_TIMED_WIDTHS}:
        widths = " and ".join(map(str, _TIMED_WIDTHS))
        yield f"it was timed with head_dim of {widths}, the spec has {spec.head_dim} and {spec.value_dim}"
    if spec.shape.seq_len < _TIMED_ROWS:
        yield f"it was timed with {_TIMED_ROWS} queries and more, the spec has {spec.shape.seq_len}"
    changed = [*sorted(_SCORES & spec.operands), *(["softcap"] if spec.softcap is not None else [])]
    if changed:
        yield f"it was timed without score functions, the spec has {' and '.join(changed)}"


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
    arriving = op.where.operands or op.shift is None
    if schedule.kernel.keeps and arriving:
        yield "it keeps the weights of tiles, and how many there are is known only when the call decides which"
    if schedule.name in ("flex", "flex-flash"):
        yield from _flex_reasons(op, spec, device)
    if schedule.name == "flex-flash":
        yield from _flash_reasons(op, spec, device)


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


def _flash_reasons(op: Attend, spec: AttentionSpec, device: Device) -> Iterator[str]:
    """Yield what FlexAttention's FLASH kernel does not take; gradients of captures and of the LSE it has not."""
    kernel = "FlexAttention's FLASH kernel"
    if device.capability != (9, 0):
        yield f"{kernel} was made ready for compute capability 9.0 only, where a tile of the mask is one of its own"
    if spec.dtype not in ("float16", "bfloat16"):
        yield f"{kernel} takes float16 and bfloat16, the spec has {spec.dtype}"
    if spec.head_dim != spec.value_dim or spec.head_dim not in _FLASH_WIDTHS:
        widths = " or ".join(map(str, _FLASH_WIDTHS))
        yield f"{kernel} takes head_dim == value_dim of {widths}, the spec has {spec.head_dim} and {spec.value_dim}"
    if op.biases:
        yield f"{kernel} has no gradients of what scores capture, the spec has {' and '.join(op.biases)}"
    if op.softcap is not None:
        yield f"{kernel} is used without score functions, the spec has softcap={op.softcap}"
    if spec.sink_logits:
        yield f"{kernel} has no gradient of the LSE, which sink logits need"


def _lattice_reasons(graph: Graph, spec: AttentionSpec, schedule: Schedule, device: Device) -> Iterator[str]:
    if not graph.of(Take):
        yield "it fuses around rows that are taken apart, and this graph takes none apart"
        return
    yield from Eager().refuse(graph, spec, LATTICES[schedule.name], device)
    if not spec.is_static:
        yield "each length would be compiled by itself, which takes seconds, and the spec has open lengths"
    if spec.operands:
        yield f"its lattices take no data with a call, the spec has {', '.join(sorted(spec.operands))}"
    output = graph.output.op
    if getattr(output, "loop", None) is not None:
        yield "each piece of a loop would be compiled by itself"
    result = graph[graph.output.args[0]]
    parts = graph.args(result) if isinstance(result.op, Merge | Mix) else [result]
    if not all(isinstance(part.op, Attend) for part in parts):
        yield f"it joins parts once, and parts of %{result.id} are joins themselves"
        return
    for part in parts:
        why = _part_reason(graph, part)
        if why:
            yield f"%{part.id} {why}"
            return


def _part_reason(graph: Graph, part: Node) -> str:
    """Return why an attend is no part of a lattice; empty if it is one."""
    op = part.op
    assert isinstance(op, Attend)
    q, k = (node.type.rows for node in graph.args(part)[:2])
    if op.at is not None:
        return "runs over some rows of the sequence only"
    if op.launch is not None or op.tile is not None or op.loop is not None:
        return "runs in launches, tiles or blocks of its own"
    if slot_condition(op, q, k) == "mask":
        return f"needs a mask for {op.where!r}"
    if not k.shows_rows_once:
        return "takes rows of k more than once, whose gradients no index finds"
    return ""
