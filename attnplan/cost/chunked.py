"""What compiled chunks of tiles need: the arithmetic of :mod:`attnplan.runtime.chunks`."""

from __future__ import annotations

from functools import lru_cache

import attrs

from attnplan.cost.batches import tile_counts
from attnplan.cost.buffers import looked_up
from attnplan.cost.setting import Setting, value_bytes
from attnplan.cost.work import with_tiles
from attnplan.ir import Attend, Graph, Node, RowMap
from attnplan.spec import AttentionSpec

SCORES = 1 << 19
"""Scores of one chunk, as the runtime says."""


@attrs.frozen
class Chunk:
    """The work items of an attend."""

    items: int
    """How many there are, padding included."""
    width: int
    """Tiles of keys of each."""
    step: int
    """How many run at once."""


def runs_chunks(setting: Setting, kind: str) -> bool:
    """Return whether a kernel runs compiled chunks of tiles: FlexAttention for CPU does what needs an LSE by them."""
    spec, kernel = setting.spec, setting.kernel
    return kernel.skips and kind == "cpu" and (spec.training or spec.sink_logits or kernel.key != "flex")


@lru_cache(maxsize=256)
def chunk(op: Attend, q: RowMap, k: RowMap, spec: AttentionSpec) -> Chunk:
    """Return the work items of an attend over tiles: rows of more tiles than the middle row has run as several.

    Where the call decides which tiles are kept, two items for each row stand for all.
    """
    assert op.tile is not None
    tall, wide = op.tile
    rows, columns = -(-q.length // tall), max(1, -(-k.length // wide))
    heads = max(1, q.elements_count // q.length) * spec.batch
    if op.where.operands or op.shift is None or op.boxes is not None:
        items, width = 2 * heads * rows, columns
    else:
        counts = tile_counts(op, q, k, spec)
        every = sorted(n for row, _ in counts for n in row)
        middle = len(every) // 2
        width = (every[middle] + every[(len(every) - 1) // 2]) // 2 if every else 1
        items = spec.batch * sum(members * sum(-(-n // width) for n in row) for row, members in counts)
    step = max(1, min(SCORES // (tall * wide * width), heads * rows))
    return Chunk(-(-items // step) * step, width, step)


def kept_bytes(graph: Graph, node: Node, setting: Setting) -> int:
    """Return the bytes of weights, highest scores and slopes of a softcap that an attend keeps for its backward."""
    op, some = _chunk(graph, node, setting)
    if not setting.kernel.keeps:
        return 0
    assert op.tile is not None
    tall, wide = op.tile
    return some.items * tall * (some.width * wide * (1 + (op.softcap is not None)) + 1) * setting.accumulator


def chunk_bytes(graph: Graph, node: Node, setting: Setting, *, backward: bool) -> int:
    """Return the bytes that an attend needs beside its results: one chunk, and forward the outputs of all items."""
    op, some = _chunk(graph, node, setting)
    q, k, v = (graph[a].type for a in node.args)
    assert op.tile is not None
    (tall, wide), acc = op.tile, setting.accumulator
    scores, bent = some.step * tall * wide * some.width, op.softcap is not None
    both = k.features + v.features
    keys = some.step * some.width * wide * both * acc
    ragged = q.rows.length % tall or k.rows.length % wide or setting.spec.layout != "bhsd"
    inputs = sum(value_bytes(graph[a], setting) for a in node.args)
    cut = inputs if ragged else 0
    widened = inputs // setting.item * acc if acc != setting.item else 0
    if not backward:
        result = (v.features + 1) * acc
        outs = 2 * some.items * tall * result + (value_bytes(node, setting) // setting.item * acc if widened else 0)
        return (
            outs
            + cut
            + 2 * keys
            + scores * ((3 + 2 * bent) * acc + 3 + 8 * looked_up(op.where))
            + some.step * tall * (q.features + 1) * acc
        )
    made = (6 + 2 * bent + 3 * bool(op.biases)) * acc + 3 + 8 * looked_up(op.where)  # whose table is read by index
    tops = some.step * tall * (3 * q.features + 2 * v.features + 4) * acc
    again = 2 * value_bytes(node, setting) if ragged else 0
    return scores * made + 2 * keys + tops + cut + again + widened


def _chunk(graph: Graph, node: Node, setting: Setting) -> tuple[Attend, Chunk]:
    assert isinstance(node.op, Attend)
    op = with_tiles(node.op, setting.kernel)
    q, k = (graph[a].type.rows for a in node.args[:2])
    return op, chunk(op, q, k, setting.spec)
