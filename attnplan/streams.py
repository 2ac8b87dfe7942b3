"""``Plan.stream``: choose the pieces that fit the budget, check what is streamed, run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from attnplan.calls import check_operand_names, require_here
from attnplan.cost.memory import peak_memory
from attnplan.cost.setting import ITEM_BYTES, Setting
from attnplan.errors import MemoryBudgetError, SpecError
from attnplan.ir import Graph
from attnplan.memory_budget import LEAST_ROWS
from attnplan.passes.chunk import Chunk, Part, kv_heads, normal, parts, restrict, unloopable, without_loop
from attnplan.passes.chunk import pieces as pieces_of
from attnplan.spec import AttentionSpec
from attnplan.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from attnplan.plan import Plan

Loop = tuple[int, int, int]


@attrs.frozen
class Pieces:
    """The pieces of a stream, and what they need."""

    loop: Loop
    parts: tuple[Part, ...]
    buffers: int
    """Bytes of the buffers that pieces are copied to and from."""
    peak: int
    """Bytes that computing the largest piece needs beside them."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.buffers + self.peak


def stream(
    plan: Plan,
    q: Any,
    k: Any,
    v: Any,
    out: Any = None,
    max_memory: int | str | None = None,
    progress: Any = None,
    resume: bool = False,
    journal: str | Path | None = None,
    **operands: Any,
) -> Any:
    """Run a plan over tensors that lie in host memory or in files. See :meth:`attnplan.plan.Plan.stream`."""
    import torch

    from attnplan.runtime.files import Store
    from attnplan.runtime.streaming import Journal, Stores, Stream, Work, shown

    spec = plan.spec
    require_here(plan.target)
    _check(spec, operands)
    batch = _batch(q, spec)
    chosen = choose(
        plan, max_memory, batch, resident=[x for x in (q, k, v, out) if not isinstance(x, str | os.PathLike)]
    )
    dtype, swapped = getattr(torch, spec.dtype), spec.layout == "bshd"
    shape = spec.shape
    sizes = {
        "q": (batch, spec.heads, shape.seq_len, spec.head_dim),
        "k": (batch, spec.kv_heads, shape.kv_len, spec.head_dim),
        "v": (batch, spec.kv_heads, shape.kv_len, spec.value_dim),
        "out": (batch, spec.heads, shape.seq_len, spec.value_dim),
    }
    if out is None:
        b, h, s, d = sizes["out"]
        order = (b, s, h, d) if swapped else (b, h, s, d)
        out = torch.empty(order, dtype=dtype, pin_memory=plan.device.kind == "cuda")
    opened: list[Store] = []
    try:
        for name, data in (("q", q), ("k", k), ("v", v), ("out", out)):
            opened.append(Store(name, data, sizes[name], dtype, swapped=swapped, write=name == "out"))
        work = [Work(b, part, spec.heads // spec.kv_heads) for b in range(batch) for part in chosen.parts]
        log = Journal(_journal(out, journal), _identity(plan, chosen, batch, q, k, v))
        start = log.done() if resume else 0
        log.write(start)
        with shown(progress) as bar:
            running = Stream(
                work, lambda body: plan._emit(spec, body), Stores(*opened), str(plan.target.torch_device), operands
            )
            running.run(log, start, bar)
    finally:
        for store in opened:
            store.close()
    return out


def _check(spec: AttentionSpec, operands: Mapping[str, Any]) -> None:
    if spec.bias:
        raise SpecError("a bias is as large as the scores of a whole call and would lie on the device: not streamed")
    if not spec.is_static:
        raise SpecError("a stream needs lengths that are known: compile for spec.at(seq_len, kv_len)")
    check_operand_names(operands, spec.operands)
    missing = sorted(spec.operands - set(operands))
    if missing:
        raise SpecError(f"the spec needs {', '.join(missing)} with each stream: plan.stream(..., {missing[0]}=...)")


def _batch(q: Any, spec: AttentionSpec) -> int:
    """Return the number of batch elements: a file has those of the spec."""
    shape = getattr(q, "shape", None)
    return spec.batch if shape is None or len(shape) != 4 else int(shape[0])


def _journal(out: Any, given: str | Path | None) -> Path | None:
    if given is not None:
        return Path(given)
    path = out if isinstance(out, str | os.PathLike) else getattr(out, "filename", None)
    return None if path is None else Path(str(path) + ".journal")


def _identity(plan: Plan, chosen: Pieces, batch: int, *inputs: Any) -> dict[str, Any]:
    """Return what must be the same for a stream to go on where another ended."""
    files = []
    for one in inputs:
        path = one if isinstance(one, str | os.PathLike) else getattr(one, "filename", None)
        found = None if path is None else os.stat(path)
        files.append(None if found is None else [str(path), found.st_size, found.st_mtime_ns])
    whole = str(without_loop(plan.graph))
    return {"graph": whole, "loop": list(chosen.loop), "batch": batch, "files": files, "backend": plan.backend}


def choose(plan: Plan, max_memory: int | str | None, batch: int, resident: list[Any]) -> Pieces:
    """Return the largest pieces that fit a budget; their plan is proved.

    Raises
    ------
    MemoryBudgetError
        If none fits; the message says what the smallest need.
    SpecError
        If the graph cannot be run in pieces.
    """
    budget = plan.device.memory if max_memory is None else parse_bytes(max_memory)
    graph = without_loop(plan.graph)
    heads, rows = kv_heads(graph), graph.inputs["q"].type.rows.length
    reason = unloopable(graph, (1, heads, rows), None)
    if reason:
        raise SpecError(f"this plan cannot be streamed: {reason}")
    least: Pieces | None = None
    for loop in _loops(graph, heads, rows):
        if unloopable(graph, loop, None) or _estimate(plan, graph, loop, resident).total > budget:
            continue
        found = needed(plan, graph, tuple(parts(graph, loop)), loop, resident)
        if found.total <= budget:
            Chunk(loop)(graph)  # the proof of the pieces
            return found
        least = found if least is None or found.total < least.total else least
    for loop in _loops(graph, heads, rows):
        if not unloopable(graph, loop, None) and (
            least is None or _estimate(plan, graph, loop, resident).total < least.total
        ):
            found = needed(plan, graph, tuple(parts(graph, loop)), loop, resident)
            least = found if least is None or found.total < least.total else least
    assert least is not None
    raise MemoryBudgetError(
        f"the smallest pieces of this stream, {least.loop[1]} x {least.loop[2]}, need {format_bytes(least.total)}, of "
        f"which {format_bytes(least.buffers)} for copies; the budget is {format_bytes(budget)}; try "
        f"max_memory='{-(-least.total // 2**10)} KiB'"
    )


def _loops(graph: Graph, heads: int, rows: int) -> Iterator[Loop]:
    size = heads
    while size > 1:
        yield 1, size, rows
        size = -(-size // 2)
    yield 1, 1, rows
    length = 1 << max(0, (rows - 1).bit_length() - 1)
    while length >= LEAST_ROWS and length < rows:
        yield 1, 1, length
        length //= 2


def _estimate(plan: Plan, graph: Graph, loop: Loop, resident: list[Any]) -> Pieces:
    """Return what the first, the middle and the last piece need, a lower bound."""
    found = pieces_of(graph, loop)
    some = tuple(restrict(graph, found[i]) for i in sorted({0, len(found) // 2, len(found) - 1}))
    return needed(plan, graph, some, loop, resident)


def needed(plan: Plan, graph: Graph, found: tuple[Part, ...], loop: Loop, resident: list[Any]) -> Pieces:
    """Return what some pieces need. On the CPU, tensors that are in memory are read where they lie."""
    spec, item = plan.spec, ITEM_BYTES[plan.spec.dtype]
    group = spec.heads // spec.kv_heads
    on_device = plan.device.kind == "cuda"
    queries = keys = output = peak = 0
    for part in found:
        piece, span = part.piece, part.keys[1] - part.keys[0]
        queries = max(queries, piece.heads * group * piece.rows * spec.head_dim * item)
        output = max(output, piece.heads * group * piece.rows * spec.value_dim * item)
        keys = max(keys, piece.heads * span * (spec.head_dim + spec.value_dim) * item)
    one = attrs.evolve(spec, batch=1, training=False)
    for body in {normal(p.graph) for p in found if p.graph is not None}:
        setting = Setting.of(body, one, plan._schedule.priced)
        peak = max(peak, peak_memory(body, setting, plan.device.kind).total + output)
    if not on_device:
        return Pieces(loop, found, 0 if len(resident) == 4 else queries + keys + output, peak)
    many = len({(p.piece.head, p.keys) for p in found}) > 1
    return Pieces(loop, found, 2 * (queries + output) + (2 if many else 1) * keys, peak)
