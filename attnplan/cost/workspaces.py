"""What attention kernels allocate while they run, beside their results."""

from __future__ import annotations

from math import prod

from attnplan.cost.buffers import flash_cpu
from attnplan.cost.rules import Setting
from attnplan.ir import Attend, Node

MULTIPROCESSORS = 132


def forward_workspace(node: Node, setting: Setting, kind: str, output_bytes: int) -> int:
    """Return the bytes that a fused kernel allocates in the forward."""
    q, k = (setting.graph[a].type for a in node.args[:2])
    blocks = prod(q.rows.sizes[:-1]) * setting.batch
    if kind == "cpu":
        return flash_cpu(q.rows.length, k.rows.length, q.features, setting.item, setting.accumulator)
    row = (node.type.features + 1) * 4  # of a piece of a split over keys, in float32
    split = min(-(-k.rows.length // 64) * blocks * q.rows.length, MULTIPROCESSORS * 128) * row
    if setting.kernel.writes_into and blocks * -(-q.rows.length // 128) > MULTIPROCESSORS // 2:
        return 2**18  # enough blocks of threads: it splits nothing, and its results are all that it allocates
    if setting.kernel.partials > 1:
        split = setting.kernel.partials * blocks * q.rows.length * row + output_bytes
    wide = blocks * q.rows.length * node.type.features * 4 if node.type.features > 128 else 0
    return split + wide + 2**20


def backward_workspace(node: Node, setting: Setting, kind: str) -> int:
    """Return the bytes that a fused kernel allocates in the backward."""
    q, k, _ = (setting.graph[a].type for a in node.args)
    blocks = prod(q.rows.sizes[:-1]) * setting.batch
    if kind == "cpu":
        repeated = blocks * k.rows.length * (k.features + node.type.features) * setting.item
        shared = k.rows.elements_count < q.rows.elements_count // q.rows.length * k.rows.length
        buffers = 3 * flash_cpu(q.rows.length, k.rows.length, q.features, setting.item, setting.accumulator)
        return buffers + blocks * q.rows.length * q.features * setting.item + shared * repeated
    rows = blocks * -(-q.rows.length // 128) * 128
    own = k.rows.elements_count // k.rows.length * setting.batch if setting.kernel.writes_into else blocks
    keys = own * -(-k.rows.length // 128) * 128
    grouped = k.rows.elements_count * q.rows.length < q.rows.elements_count * k.rows.length
    return rows * (q.features * 4 + 8) + grouped * keys * (k.features + node.type.features) * 4 + 2**20


def block_bytes(node: Node, setting: Setting, *, backward: bool) -> int:
    """Return the bytes of one step of an attend that computes its scores block by block."""
    op = node.op
    assert isinstance(op, Attend)
    assert op.loop is not None
    q, k, v = (setting.graph[a].type for a in node.args)
    acc = setting.accumulator
    heads = prod(q.rows.sizes[:-1]) * setting.batch
    rows, keys = min(op.loop[0], q.rows.length), min(op.loop[1], k.rows.length)
    shared = k.rows.elements_count * q.rows.length < q.rows.elements_count * k.rows.length
    copies = (acc != setting.item) + shared + backward  # of k or v: cast, shown to each head, a gradient
    scores = 3 + 2 * (op.softcap is not None) if backward else 1
    tall = rows * (2 * q.features + v.features + 16 if backward else q.features + 2 * v.features + 8)
    wide = copies * keys * max(k.features, v.features)
    return heads * (scores * rows * keys + tall + wide) * acc + 2 * rows * keys
