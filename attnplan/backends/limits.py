"""Limits of kernels, and the reasons that follow from them. Without torch: nothing here asks a device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import attrs

from attnplan.cost import Device
from attnplan.ir import Attend, Graph, Node, RowMap, Take
from attnplan.ir.native import OF_PAIRS, Lowered, lowered
from attnplan.patterns import Shape
from attnplan.spec import AttentionSpec
from attnplan.units import format_bytes

HALF = ("float16", "bfloat16")
TF32 = 'TF32 in torch is a process-wide flag that a plan must not change; use precision="ieee"'
Capability = tuple[int, int]


@attrs.frozen
class Limits:
    """What a kernel takes."""

    title: str
    least: Capability
    """Smallest compute capability."""
    most: Capability | None = None
    """Largest compute capability."""
    dtypes: tuple[str, ...] = HALF
    widest: int = 256
    """Most features of a head."""
    multiple: int = 8
    """What the features of a head must be a multiple of."""
    widths: tuple[int, ...] = ()
    """The only numbers of features of a head, if not all."""
    equal: bool = True
    """Whether the features of v must be as many as those of q."""
    no_mask: str = "takes no mask"
    """Why it is given none, where it is not."""


def reasons(limits: Limits, native: frozenset[str], graph: Graph, spec: AttentionSpec, device: Device) -> Iterator[str]:
    """Iterate over every reason why a kernel with these limits cannot run a graph."""
    yield from _numerics(limits, native, spec, device)
    yield from _sizes(limits, spec)
    yield from _conditions(limits, native, graph)
    yield from bias_reasons(limits.title, native, graph)
    if spec.alibi_slopes and spec.dtype in HALF and "mask" in native:
        yield f"{limits.title} adds a bias in {spec.dtype}, which rounds the distances of alibi_slopes beyond 256"


def bias_reasons(title: str, native: frozenset[str], graph: Graph) -> Iterator[str]:
    """Yield why a kernel cannot add the biases of the first attend that has some."""
    for node, op in graph.of(Attend):
        if op.biases and "mask" not in native:
            yield f"{title} adds nothing to scores, %{node.id} has {' and '.join(op.biases)}"
            return
        if op.biases and op.tile is not None:
            yield f"{title} gathers tiles of keys and none of a bias, %{node.id} has {' and '.join(op.biases)}"
            return


def _numerics(limits: Limits, native: frozenset[str], spec: AttentionSpec, device: Device) -> Iterator[str]:
    if not device.rate(spec.dtype):
        yield f"{device.name} has no {spec.dtype}"
    if spec.precision == "tf32" and device.kind == "cuda":
        yield TF32
    if spec.dropout:
        yield f"{limits.title} draws dropout masks that depend on the plan, the spec has dropout={spec.dropout}"
    if spec.softcap is not None and "softcap" not in native:
        yield f"{limits.title} has no softcap, the spec has softcap={spec.softcap}"
    if device.capability is not None and device.capability < limits.least:
        yield f"{limits.title} needs compute capability {dotted(limits.least)}, {device.name} has {_of(device)}"
    if device.capability is not None and limits.most is not None and device.capability > limits.most:
        yield f"{limits.title} runs up to compute capability {dotted(limits.most)}, {device.name} has {_of(device)}"
    if spec.dtype not in limits.dtypes:
        yield f"{limits.title} takes {' and '.join(limits.dtypes)}, the spec has {spec.dtype}"


def _sizes(limits: Limits, spec: AttentionSpec) -> Iterator[str]:
    if limits.equal and spec.value_dim != spec.head_dim:
        yield f"{limits.title} needs value_dim == head_dim, the spec has {spec.value_dim} and {spec.head_dim}"
    if limits.widths and spec.head_dim not in limits.widths:
        yield f"{limits.title} needs head_dim in {', '.join(map(str, limits.widths))}, the spec has {spec.head_dim}"
        return
    for name, size in {"head_dim": spec.head_dim, "value_dim": spec.value_dim}.items():
        if name == "value_dim" and (limits.equal or size == spec.head_dim):
            continue
        if size > limits.widest:
            yield f"{limits.title} needs {name} <= {limits.widest}, the spec has {size}"
        if size % limits.multiple:
            yield f"{limits.title} needs {name} to be a multiple of {limits.multiple}, the spec has {size}"


def _conditions(limits: Limits, native: frozenset[str], graph: Graph) -> Iterator[str]:
    """Yield why a kernel cannot express the first attend that it cannot."""
    masked = None if "mask" in native else _first_masked(graph, native & OF_PAIRS)
    for node, op in graph.of(Attend) if "blocks" in native else ():
        why = _blocks_reason(graph, node, native) if op.tile is not None else ""
        if why and (masked is None or node.id < masked.id):
            yield f"{limits.title} {why}"
            return
    if masked is not None and isinstance(masked.op, Attend):
        yield f"{limits.title} {limits.no_mask}, %{masked.id} needs one for {masked.op.where!r}"


@lru_cache(maxsize=256)
def _first_masked(graph: Graph, native: frozenset[str]) -> Node | None:
    """Return the first attend without tiles whose condition is none that a kernel knows."""
    found = (node for node, op in graph.of(Attend) if op.tile is None and lowered(graph, node, native) is None)
    return next(found, None)


def found_documents(graph: Graph, native: frozenset[str]) -> list[Lowered]:
    """Return the attends over documents that a kernel runs by itself."""
    if "documents" not in native:
        return []
    found = [lowered(graph, node, native) for node, op in graph.of(Attend) if op.tile is None]
    return [x for x in found if x is not None and x.documents]


def _blocks_reason(graph: Graph, node: Node, native: frozenset[str]) -> str:
    op = node.op
    assert isinstance(op, Attend)
    if op.boxes is not None:
        return f"takes tiles of neighbouring rows, %{node.id} has boxes of {op.boxes}"
    if any(isinstance(n.op, Take) and not _is_run(n.type.rows) for n in graph.args(node)):
        return f"skips tiles of neighbouring rows in one axis of heads, %{node.id} takes others"
    if op.where.operands or op.shift is None:
        given = sorted(op.where.operands) or ["q_offset"]
        return f"skips tiles that are known when the plan is made, %{node.id} depends on {', '.join(given)}"
    q, k = (n.type.rows for n in graph.args(node)[:2])
    whole = [graph.inputs[name].type.rows for name in "qk"]
    shape = Shape(whole[0].length, whole[1].length, whole[0].last_head + 1, 1)
    tall, wide = op.tile or (0, 0)
    if "tile-masks" in native:
        return _masks_reason(op, q, k, shape)
    found = tile_counts(op, q, k, shape)
    if found.partial:
        some = f"{found.partial} of the {found.kept} that {op.where!r} keeps of {tall} x {wide}"
        return f"runs whole tiles, and {some} are partial"
    return ""


def _is_run(rows: RowMap) -> bool:
    """Return whether rows are neighbouring ones, the same in every step of one axis of heads."""
    return rows.contiguous and len(rows.batch) == 1


MOST_LOOKED_UP = 1 << 26
"""Bytes of the tables that a mask function looks up."""


def _masks_reason(op: Attend, q: RowMap, k: RowMap, shape: Shape) -> str:
    assert op.tile is not None
    tall, wide = op.tile
    places = -(-q.length // tall) * -(-k.length // wide)
    if 4 * places <= MOST_LOOKED_UP:
        found = tile_counts(op, q, k, shape)
        if not found.partial:
            return "is for partial tiles, and all are whole"
        if found.batched:
            return f"calls one mask function for the whole batch, {op.where!r} keeps other keys in each element of it"
        needed = 4 * (places * found.classes + found.masks * tall * wide)
        if needed <= MOST_LOOKED_UP:
            return ""
    else:
        needed = 4 * places
    return f"looks masks up in at most {format_bytes(MOST_LOOKED_UP)}, this needs {format_bytes(needed)} or more"


class TileCounts(NamedTuple):
    """How many tiles an attend keeps, one of each class of heads; how many of them are partial; distinct masks."""

    kept: int
    partial: int
    masks: int
    classes: int
    batched: bool
    """Whether batch elements have tiles of their own."""


@lru_cache(maxsize=256)
def tile_counts(op: Attend, q: RowMap, k: RowMap, shape: Shape) -> TileCounts:
    """Return the tiles of an attend on rows of tensors of a shape, counted."""
    from attnplan.patterns.tiles import Grid, block_table  # numpy is needed only here

    assert op.tile is not None
    assert op.shift is not None
    heads = [head for _, head in q.batch_heads()]
    grid = Grid(q.row + op.shift, q.length, k.row, k.length, op.tile)
    table = block_table(op.where, shape, op.tile, grid=grid, heads=heads)
    partial = int((~table.full).sum())
    masks, classes = int(table.kind.max(initial=0)), int(table.classes.max()) + 1
    return TileCounts(len(table.column), partial, masks, classes, len(table.classes) > 1)


def dotted(capability: Capability) -> str:
    """Return a compute capability as people write it."""
    return ".".join(map(str, capability))


def _of(device: Device) -> str:
    return dotted(device.capability or (0, 0))
