"""What a rank does around its kernels: rows packed, put together and merged, gradients added. Bytes through memory.

These follow :mod:`attnplan.runtime.ring`, operator by operator.
"""

from __future__ import annotations

import attrs

from attnplan.ring.program import ITEM_BYTES
from attnplan.spec import AttentionSpec

COPIES = {"p2p": 1, "all-gather": 1, "all-to-all": 2}
"""How often a message is copied before it is sent: cut out, and for an all-to-all joined with those for others; what
an all-gather sends is a whole shard, which is put into a buffer of bytes."""
ASSEMBLED = 2
"""Times that what is put together goes through memory: read where it lies or arrived, and written, by strided views. An
index takes about six times as long."""
AT_ONCE = 4
"""Parts that are merged in one pass."""
OPERATORS = 12
"""Operators of a hop's backward beside its kernels: zeros, sums, and gradients that came home."""


@attrs.frozen
class Rows:
    """(head, row) elements that a hop handles, over all batch elements."""

    queries: int
    attended: int
    """Queries that attend in the hop."""
    store: int
    """Keys of the hop's graph."""
    received: int
    """Keys that other ranks sent; what is sent is taken to be as much."""
    whole: bool
    """Whether a message is all that its sender holds, which is then sent as it lies."""
    direct: bool
    """Whether the store is one message as it came, or the rank's own rows as they lie."""


def forward_bytes(spec: AttentionSpec, rows: Rows, collective: str) -> int:
    """Return the bytes read and written to pack what a hop sends, and to put its store together."""
    item = ITEM_BYTES[spec.dtype]
    copies = COPIES[collective] - (rows.whole and collective == "p2p")
    moved = 2 * copies * rows.received + (0 if rows.direct else ASSEMBLED * rows.store)
    return moved * (spec.head_dim + spec.value_dim) * item


def merge_bytes(spec: AttentionSpec, rows: Rows, place: int, parts: int) -> int:
    """Return the bytes of merging the part of a place: parts are read once, a few at a time, rows written rounded."""
    if parts == 1:
        return 0
    item = ITEM_BYTES[spec.dtype]
    wide = max(4, item)
    moved = rows.attended * (spec.value_dim * item + wide)
    if place == parts - 1:
        moved += rows.queries * (spec.value_dim * item + wide)
    if place >= AT_ONCE and (place - AT_ONCE) % (AT_ONCE - 1) == 0:  # what is merged so far is written, and read again
        moved += 2 * rows.queries * (spec.value_dim + 1) * wide
    return moved


def backward_bytes(spec: AttentionSpec, rows: Rows, collective: str, place: int, parts: int) -> int:
    """Return the bytes of a hop's backward: keys come again, gradients are added up and sent home.

    The first gradient of the queries is kept as it is, and widened when a second is added.
    """
    item, features = ITEM_BYTES[spec.dtype], spec.head_dim + spec.value_dim
    wide = max(4, item)
    asked = rows.attended * (item + 2 * wide) if place else 0
    asked += rows.queries * (item + wide) * ((place == 1) + (0 < place == parts - 1))
    assembled = item + 3 * wide
    keys = rows.store * features * (0 if not rows.received else item + wide if rows.direct else assembled)
    home = rows.received * features * wide * (3 + (0 if collective == "p2p" else 2 * COPIES["all-to-all"]))
    return forward_bytes(spec, rows, collective) + asked * spec.head_dim + keys + home


def spread_bytes(sent: int, whole: int) -> int:
    """Return the bytes of packing ``sent`` bytes for an all-to-all by head, and of putting ``whole`` together."""
    return 2 * COPIES["all-to-all"] * sent + ASSEMBLED * whole
