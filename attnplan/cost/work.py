"""What a launch of an attention kernel computes for one attend: blocks of rows, keys that they visit, arithmetic."""

from __future__ import annotations

from math import prod

import attrs

from attnplan.cost.setting import KernelModel, Setting
from attnplan.cost.tiles import DOCUMENTS, attend_tiles, tile_rows
from attnplan.ir import Attend, Node
from attnplan.ir.native import EVERYTHING, Window, lowered
from attnplan.ir.slots import slot_condition


@attrs.frozen
class Work:
    """What one launch of a fused kernel computes: as many blocks of rows as heads and batch elements have."""

    blocks: float
    """Heads times batch elements."""
    rows: int
    """Query rows of one of them."""
    keys: float
    """Keys that a row visits on average, in whole tiles."""
    longest: float
    """Keys that the rows with the most of them visit."""
    features: int
    """Features of q or of v, whichever has more."""
    flops: float
    """Floating-point operations of the launch, forward."""
    masked: bool = False
    """Whether a mask in memory, or a table of tiles, says which pairs meet."""
    windowed: bool = False
    """Whether the kernel itself compares positions with a window."""
    group: int = 1
    """Query heads that share keys."""
    launch: float = 0.0
    """Query rows, of all heads and batch elements, of the launch that this is part of; 0 if it is one by itself."""
    compared: float = 0.0
    """Keys of tiles whose pairs are compared one by one, of those that a row visits on average."""
    longest_compared: float = 0.0
    """The same of the row with the most of them."""
    documents: bool = False
    """Whether packed documents are laid end to end for the kernel."""

    @property
    def even(self) -> bool:
        """Whether all rows visit as many keys, and compare as many."""
        return self.longest + self.longest_compared <= 1.02 * (self.keys + self.compared)


def with_tiles(op: Attend, kernel: KernelModel) -> Attend:
    """Return an attend over the tiles that a kernel skips or runs."""
    return op if op.tile is not None else attrs.evolve(op, tile=(kernel.tile, kernel.tile))


def needs_mask(node: Node, setting: Setting) -> bool:
    """Return whether only some of an attend's pairs meet."""
    q, k = (setting.graph[a].type.rows for a in node.args[:2])
    assert isinstance(node.op, Attend)
    return slot_condition(node.op, q, k) != "full"


def attend_work(node: Node, setting: Setting) -> Work:
    """Return what one call of the attention kernel computes for an attend."""
    found = setting.works.get(node.id)
    if found is None:
        found = setting.works[node.id] = _work_of(node, setting)
    return found


def _work_of(node: Node, setting: Setting) -> Work:
    op, kernel = node.op, setting.kernel
    assert isinstance(op, Attend)
    q, k, v = (setting.graph[a] for a in node.args)
    rows, columns = q.type.rows.length, k.type.rows.length
    blocks = prod(a.size for a in q.type.rows.batch) * setting.batch
    widest, both = max(q.type.features, v.type.features), q.type.features + v.type.features
    if op.tile is not None or (kernel.skips and needs_mask(node, setting)):
        op = with_tiles(op, kernel)
        assert op.tile is not None
        kept = attend_tiles(op, q.type.rows, k.type.rows, setting.spec) * setting.batch
        pairs = kept * op.tile[0] * op.tile[1]
        tiles = max(1, -(-rows // op.tile[0]))
        keys = kept * op.tile[1] / max(1, blocks * tiles)
        work = Work(blocks, rows, keys, 1.25 * keys, widest, 2 * pairs * both, masked=True)
        if not (kernel.skips or "blocks" in kernel.native):
            return work
        of = tile_rows(op, q.type.rows, k.type.rows, setting.spec)  # not cut, as rows of gathered tiles are
        return attrs.evolve(
            work,
            longest=max(work.longest, of.fullest * op.tile[1]),
            compared=of.partial * setting.batch * op.tile[1] / max(1, blocks * tiles),
            longest_compared=of.most_partial * op.tile[1],
        )
    condition: str = slot_condition(op, q.type.rows, k.type.rows)
    native = lowered(setting.graph, node, kernel.native) if condition == "mask" else None
    windowed = native is not None and native.window not in (EVERYTHING, (None, 0))
    if native is not None and native.documents:  # each document is a block of its own
        blocks, rows, columns = blocks * DOCUMENTS, max(1, rows // DOCUMENTS), max(1, columns // DOCUMENTS)
        condition = "causal" if native.window == (None, 0) else "" if native.window == EVERYTHING else condition
    keys = longest = float(columns)
    if condition == "causal" and kernel.skips_causal:
        keys = (columns + min(kernel.causal_tile, columns)) / 2
    elif native is not None and native.window != EVERYTHING:
        keys = min(columns, window_pairs(rows, columns, native.window) / max(1, rows) + kernel.causal_tile)
        left, right = (columns if n is None else n for n in native.window)
        longest = max(keys, min(columns, left + right + 1 + kernel.causal_tile))
    padded = -(-rows // kernel.tile) * kernel.tile if rows >= kernel.tile else rows
    seen = padded if keys == columns else rows
    masked = native is None and condition == "mask"
    flops, group = 2 * blocks * seen * keys * both, setting.spec.heads // setting.spec.kv_heads
    documents = native is not None and native.documents
    return Work(blocks, rows, keys, longest, widest, flops, masked, windowed, group, documents=documents)


def window_pairs(rows: int, columns: int, window: Window) -> int:
    """Return the number of pairs in a window that is aligned to the last of some rows and the last of some columns.

    Examples
    --------
    >>> window_pairs(4, 4, (None, 0)), window_pairs(3, 5, (1, 1)), window_pairs(5, 3, (None, 0))
    (10, 8, 6)
    """

    def keys_before(offset: int) -> int:  # the sum over rows i of i + offset, cut to 0..columns
        first, last = (min(max(n, 0), rows) for n in (-offset, columns - offset))
        return (first + last - 1 + 2 * offset) * (last - first) // 2 + (rows - last) * columns

    shift = columns - rows
    left, right = (rows + columns if n is None else n for n in window)
    return keys_before(shift + right + 1) - keys_before(shift - left)
