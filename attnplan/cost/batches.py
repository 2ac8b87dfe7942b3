"""Which batches of tiles an attend runs, and what they need: the arithmetic of :mod:`attnplan.runtime.tiles`."""

from __future__ import annotations

from functools import lru_cache
from math import prod

import attrs

from attnplan.cost.buffers import flash_cpu
from attnplan.cost.setting import Setting, value_bytes
from attnplan.cost.tiles import attend_tiles, tile_rows
from attnplan.ir import Attend, Graph, Node, RowMap
from attnplan.patterns.custom import asks_function
from attnplan.spec import AttentionSpec

ELEMENTS = 1 << 22
"""Keys x features of all heads that one batch gathers, as the runtime says."""
SHARE = 0.8
"""Rows of one batch keep at least this share of the tiles of the fullest, as the runtime says."""
_MASKS, _MASKS_KEPT = 16, 64
"""Distinct masks of partial tiles that one pattern has, about, and as many as are taken to stay with a plan."""


@attrs.frozen
class Batch:
    """Rows of tiles that run as one call."""

    rows: int
    width: int
    """Tiles of keys of each."""
    heads: int
    """Query heads that keep the same tiles."""


@lru_cache(maxsize=256)
def batches(op: Attend, q: RowMap, k: RowMap, spec: AttentionSpec) -> tuple[Batch, ...]:
    """Return the batches of tiles that one attend runs, the largest of each width.

    Where operands, or positions that arrive with the call, decide which tiles are kept, one batch as large as any can
    be stands for all.
    """
    assert op.tile is not None
    heads = max(1, q.elements_count // q.length)
    if op.boxes is not None or op.shift is None or op.where.operands:
        return (_largest(op, q, k, spec, heads),)
    found: dict[tuple[int, int], int] = {}
    for counts, members in tile_counts(op, q, k, spec):
        start = 0
        while start < len(counts):
            width = counts[start]
            stop = min(_last_alike(counts, start), start + _at_once(width, op.tile[1], heads))
            found[width, members] = max(found.get((width, members), 0), stop - start)
            start = stop
    return tuple(Batch(rows, width, members) for (width, members), rows in found.items())


def _at_once(width: int, keys: int, heads: int) -> int:
    return max(1, ELEMENTS // (width * keys * 64 * heads))


def _last_alike(counts: list[int], start: int) -> int:
    """Return the end of the rows that keep enough tiles to run with the first; counts never rise."""
    low, high = start, len(counts)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if counts[middle] >= SHARE * counts[start] else (low, middle)
    return low


def tile_counts(op: Attend, q: RowMap, k: RowMap, spec: AttentionSpec) -> list[tuple[list[int], int]]:
    """Return the tiles that each row keeps, the fullest first, and how many heads keep the same."""
    import numpy as np

    from attnplan.patterns.tiles import Grid
    from attnplan.patterns.tiles.states import runs

    assert op.tile is not None
    assert op.shift is not None
    shape, heads = attrs.evolve(spec.shape, batch=1), [head for _, head in q.batch_heads()]
    grid = Grid(q.row + op.shift, q.length, k.row, k.length, op.tile)
    tables = {name: table[0] for name, table in op.where.tables(shape).items()}
    keys = [op.where.head_key(head) for head in heads]
    step = max(1, min(256, 2**22 // grid.columns))
    found = []
    for key in dict.fromkeys(keys):
        every = []
        for start in range(0, grid.rows, step):
            rows = np.arange(start, min(start + step, grid.rows))
            some = runs(op.where, grid, rows, heads[keys.index(key)], tables)
            kept = np.where(some.state > 0, some.lengths(), 0)
            every.append(np.bincount(some.key // some.columns, weights=kept, minlength=some.rows))
        counts = np.concatenate(every).astype(int)
        found.append(([int(n) for n in -np.sort(-counts) if n > 0], keys.count(key)))
    return found


def _largest(op: Attend, q: RowMap, k: RowMap, spec: AttentionSpec, heads: int) -> Batch:
    assert op.tile is not None
    tall, wide = op.tile
    kept = -(-attend_tiles(op, q, k, spec) // heads) * 5 // 4
    width = max(1, tile_rows(op, q, k, spec).fullest)
    tiles = max(width, min(ELEMENTS // (64 * heads * wide), kept))
    return Batch(max(1, min(-(-q.length // tall), -(-tiles // width))), width, heads)


def batch_memory(
    graph: Graph, node: Node, op: Attend, setting: Setting, kind: str, *, backward: bool
) -> tuple[int, int]:
    """Return (workspace, copies) of the largest batch of tiles that runs at once."""
    q, k, _ = (graph[a].type for a in node.args)
    found = [
        _one(graph, node, op, setting, kind, b, backward=backward) for b in batches(op, q.rows, k.rows, setting.spec)
    ]
    workspace, copies = max(found, key=sum, default=(0, 0))
    ragged = _padding(graph, node, op, setting) * (2 if op.boxes else 1)
    return workspace, copies + (2 if backward else 1) * ragged


def _one(
    graph: Graph, node: Node, op: Attend, setting: Setting, kind: str, one: Batch, *, backward: bool
) -> tuple[int, int]:
    assert op.tile is not None
    q, k, v = (graph[a].type for a in node.args)
    item, acc, (tall, wide) = setting.item, setting.accumulator, op.tile
    kv_heads = min(one.heads, max(1, k.rows.elements_count // k.rows.length))
    columns = one.rows * one.width * wide
    bias, masks = columns * tall * item, _masks(op, q.rows, k.rows, setting.spec, _MASKS) * tall * wide * item
    masks = min(masks, 2 * bias // item)  # if there are more, those of the batch are taken first, and complemented
    gathered = columns * kv_heads * (k.features + v.features) * item
    rows = one.rows * tall * one.heads
    queries, result = rows * q.features * item, rows * (v.features * item + acc)
    buffers = flash_cpu(tall, one.width * wide, q.features, item, acc) if kind == "cpu" else 0
    if not backward:
        return max(2 * bias + masks, bias + result + buffers, 2 * result), gathered + queries
    grads = columns * kv_heads * (k.features + v.features) * item
    if kind == "cuda":  # copies of output and gradient in their order, and dq in float32
        buffers = rows * q.features * (2 * item + 4) // 3
    running = max(2 * bias + masks, bias + 2 * result + grads + 3 * buffers), gathered + 3 * queries
    added = columns * kv_heads * max(k.features, v.features) * (item + acc)  # tile by tile, then in the sums' dtype
    adding = result + grads + added, 3 * queries  # what was gathered is gone
    return max(running, adding, key=sum)


def _masks(op: Attend, q: RowMap, k: RowMap, spec: AttentionSpec, few: int) -> int:
    """Return how many masks the partial tiles of a pattern have: ``few``, but one each where a function says."""
    return max(few, tile_rows(op, q, k, spec).partial) if asks_function(op.where) else few


def _padding(graph: Graph, node: Node, op: Attend, setting: Setting) -> int:
    """Return the bytes of operands that are copied because their last tile is not whole, or in order of boxes."""
    assert op.tile is not None
    found = 0
    for place, arg in enumerate(graph.args(node)):
        if arg.type.rows.length % op.tile[1 if place else 0] or op.boxes is not None:
            found += value_bytes(arg, setting) * (1 if place else 2)  # the output as q
    return found


def lookup_bytes(op: Attend, q: RowMap, k: RowMap) -> int:
    """Return the bytes of the tables that a mask function looks up, for heads of one class and up to 64 masks."""
    assert op.tile is not None
    return 4 * (-(-q.length // op.tile[0]) * -(-k.length // op.tile[1]) + _MASKS_KEPT * prod(op.tile))


def table_bytes(op: Attend, q: RowMap, k: RowMap, spec: AttentionSpec, kind: str) -> int:
    """Return the bytes of the lists of tiles and masks that stay with a plan.

    On a CPU the masks of a function are arrays of numpy, which is not asked for memory here.
    """
    assert op.tile is not None
    heads = max(1, q.elements_count // q.length)
    masks = _MASKS_KEPT if kind == "cpu" else _masks(op, q, k, spec, _MASKS_KEPT)
    return attend_tiles(op, q, k, spec) // heads * 24 + masks * prod(op.tile)
