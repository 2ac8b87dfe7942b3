"""The peak of a virtual ring: its engine runs on tensors without data, and what is alive is counted.

A virtual ring holds in one process what a real ring holds on all ranks: their messages, stores, parts and results. No
formula follows that as closely as the engine itself; kernels are stood for by what the cost model says they need.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnplan.cost.allocated import SMALL, rounded
from attnplan.ir import Graph, Merge, RowMap, Take
from attnplan.ring.program import RankProgram
from attnplan.ring.room import Room
from attnplan.runtime.ring.dry import DryPart
from attnplan.runtime.ring.engines import VirtualEngine
from attnplan.runtime.ring.executor import Rank
from attnplan.runtime.ring.parts import Flow, Gradients
from attnplan.runtime.ring.rows import Span
from attnplan.runtime.ring.surgery import Rows
from attnplan.runtime.views import accumulator
from attnplan.spec import AttentionSpec


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made under it, for as long as they are alive."""

    def __init__(self, kind: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kind = kind
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self.live = self.top = 0

    def given(self, tensors: Sequence[Tensor]) -> None:
        """Leave out tensors that are the caller's."""
        for x in tensors:
            self._known.add(x.untyped_storage())

    def passing(self, size: int, stays: int) -> None:
        """Count bytes that are allocated at this moment, and then freed but for those that stay."""
        self.top = max(self.top, self.live + size)
        self.live += stays

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count what it or another before it has made."""
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, found)):
            if isinstance(x, Tensor):
                self._see(x)
        return found

    def _see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = rounded(storage.nbytes(), self._kind)
        self.live += size
        self.top = max(self.top, self.live)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live -= size


@attrs.frozen(eq=False)
class MeteredPart(DryPart):
    """A graph that allocates what its program would."""

    meter: Meter = attrs.field(kw_only=True)
    room: Room = attrs.field(kw_only=True)
    wide: bool = attrs.field(kw_only=True)
    """Whether its gradients are sums in the accumulating dtype."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        batch, heads, rows = q.shape[:3]
        rows = rows if self.rows is None else self.rows[1]
        made = q.new_empty((batch, heads, rows, v.shape[-1]))
        self.meter.passing(self.room.forward, self.room.masks[0])
        return made, q.new_empty((batch, heads, rows), dtype=accumulator(q.dtype))

    def backward(
        self, flow: Flow, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], names: Sequence[str] = ()
    ) -> Gradients:
        dtype = accumulator(q.dtype) if self.wide else q.dtype
        made = []
        for x, rows in zip((q, k, v), self.into, strict=True):
            size = x.shape if rows is None else (*x.shape[:2], rows[1], x.shape[3])
            made.append(x.new_empty(size, dtype=dtype))
        self.meter.passing(self.room.backward, self.room.masks[1])
        return tuple(made)


def virtual_peak(programs: Sequence[RankProgram], spec: AttentionSpec, room: Callable[[Graph], Room], kind: str) -> int:
    """Return the bytes of a virtual ring's call at its worst moment, beside what it is given and returns.

    Parameters
    ----------
    programs
        What each rank does.
    spec
        What they compute together; if it is for training, a call is forward and backward.
    room
        What the program of a hop's graph allocates.
    kind
        ``"cpu"`` or ``"cuda"``, whose allocator rounds.
    """
    meter = Meter(kind)
    ranks = [Rank(p, spec, [[_part(g, meter, room) for g in h.graphs] for h in p.hops]) for p in programs]
    engine = VirtualEngine(ranks, (spec.heads, spec.kv_heads), (spec.shape.seq_len, spec.shape.kv_len))
    q, k, v, grad = _operands(spec)
    meter.given((q, k, v, grad))
    with meter, torch.no_grad():
        out, lse, saved = engine.forward(q, k, v, {}, spec.training)
        results = [out]
        if spec.training:
            results += engine.backward((grad, None), saved, k, v, {})
    del lse
    found = max(0, meter.top - sum(rounded(x.untyped_storage().nbytes(), kind) for x in results))
    return found + SMALL  # of what is too small to be counted


def _operands(spec: AttentionSpec) -> list[Tensor]:
    """Return q, k, v and the gradient of the output, in ``[B, H, S, D]``, without data."""
    dtype = getattr(torch, spec.dtype)
    shape = spec.shape
    sizes = [
        (spec.heads, shape.seq_len, spec.head_dim),
        (spec.kv_heads, shape.kv_len, spec.head_dim),
        (spec.kv_heads, shape.kv_len, spec.value_dim),
        (spec.heads, shape.seq_len, spec.value_dim),
    ]
    if spec.layout == "bshd":
        return [torch.empty((spec.batch, s, h, d), dtype=dtype, device="meta").transpose(1, 2) for h, s, d in sizes]
    return [torch.empty((spec.batch, *size), dtype=dtype, device="meta") for size in sizes]


def _part(graph: Graph | None, meter: Meter, room: Callable[[Graph], Room]) -> MeteredPart | None:
    if graph is None:
        return None
    found = room(graph)
    rows, into = (None, (None, None, None)) if found.plain else pieces(graph)
    wide = not found.plain and bool(graph.of(Take)) and None in into
    return MeteredPart(rows=rows, into=into, meter=meter, room=found, wide=wide)


def pieces(graph: Graph) -> tuple[Rows, tuple[Rows, Rows, Rows]]:
    """Return the rows of the one piece that a graph computes, and of its gradients; None where it is all rows."""
    join = graph[graph.output.args[0]]
    if not isinstance(join.op, Merge) or len(join.args) != 1:
        return None, (None, None, None)
    found = [_span(graph, a, name) for a, name in zip(graph[join.args[0]].args, "qkv", strict=True)]
    return found[0], (found[0], found[1], found[2])


def _span(graph: Graph, taken: int, name: str) -> Rows:
    if not isinstance(graph[taken].op, Take):
        return None
    rows: RowMap = graph[taken].type.rows
    span, whole = Span.of(rows), graph.inputs[name].type.rows
    heads = whole.elements_count // whole.length
    if span is None or span.step != 1 or (span.head, span.heads) != (0, heads):
        return None
    return span.start, span.count
