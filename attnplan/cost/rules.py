"""What each op costs: one rule per op. An op without a rule is an error, never free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import attrs

from attnplan.cost.tiles import attend_tiles
from attnplan.errors import PassError
from attnplan.ir import Attend, Graph, Input, Merge, Mix, Node, Op, Output, RowMap, Take
from attnplan.ir.launch import fold
from attnplan.ir.native import Window, lowered
from attnplan.ir.slots import mask_rows, slot_condition
from attnplan.spec import AttentionSpec

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@attrs.frozen
class Cost:
    """Work and traffic. Additive."""

    flops: float = 0.0
    """Floating-point operations of matrix products."""
    exps: float = 0.0
    """Exponentials."""
    bytes: float = 0.0
    """Bytes moved through memory."""
    comm_bytes: float = 0.0
    """Bytes moved between devices."""
    launches: int = 0
    """Kernels or operators started."""
    copied: float = 0.0
    """Bytes moved by operators before and after the kernel, which no arithmetic hides."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(attrs.astuple(self), attrs.astuple(other), strict=True)))


@attrs.frozen
class KernelModel:
    """What the cost model knows about the attention kernel of a schedule."""

    efficiency: float
    """Fraction of the device's peak that the kernel reaches on long rows."""
    skips_causal: bool = True
    """Whether tiles above the diagonal are skipped."""
    materialises: bool = False
    """Whether scores are written to memory."""
    tile: int = 128
    """Rows and columns of a tile: what is not a multiple of it is computed in vain."""
    causal_tile: int = 128
    """Columns of the tiles that are computed whole along the causal diagonal."""
    masks: bool = True
    """Whether the kernel takes an arbitrary mask."""
    native: frozenset[str] = frozenset()
    """What the kernel does by itself, in the words of :mod:`attnplan.ir.native`."""


@attrs.frozen
class Setting:
    """What every rule may look at."""

    spec: AttentionSpec
    kernel: KernelModel
    graph: Graph
    copied: frozenset[int]
    """The takes that are copies."""

    @classmethod
    def of(cls, graph: Graph, spec: AttentionSpec, kernel: KernelModel) -> Setting:
        """Return the setting in which ``graph`` is priced."""
        return cls(spec, kernel, graph, copied_takes(graph, spec))

    @property
    def batch(self) -> int:
        """Batch size that is priced."""
        return self.spec.batch

    @property
    def item(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.spec.dtype]

    @property
    def accumulator(self) -> int:
        """Bytes of one element of an accumulator."""
        return max(4, self.item)


def value_bytes(node: Node, setting: Setting) -> int:
    """Return the bytes of a node's result, its LSE included."""
    rows = node.type.rows.elements_count * setting.batch
    return rows * node.type.features * setting.item + (rows * setting.accumulator if node.type.lse else 0)


def mask_bytes(node: Node, setting: Setting) -> int:
    """Return the bytes of the masks that an attend needs: boolean, and added to scores in the dtype of q."""
    op, (q, k) = node.op, (setting.graph[a].type.rows for a in node.args[:2])
    assert isinstance(op, Attend)
    if op.tile is not None:  # the table, and the masks of one batch of tiles
        return attend_tiles(op, q, k, setting.spec) * 40 + 2**20
    if slot_condition(op, q, k) != "mask" or lowered(setting.graph, node, setting.kernel.native) is not None:
        return 0
    q, k = mask_rows(op, q, k)
    per_row = any(a.row for a in q.batch)
    per_head = op.where.head_key(0) != () and any(a.head for a in q.batch)
    batch = setting.batch if op.where.operands & {"documents", "key_padding"} else 1
    repeats = prod(a.size for a in q.batch if (per_row and a.row) or (per_head and a.head))
    return batch * repeats * q.length * k.length * (1 + setting.item)


def copied_takes(graph: Graph, spec: AttentionSpec) -> frozenset[int]:
    """Return the takes that have to be copied, because a kernel's four dimensions cannot express them by strides."""
    copied: set[int] = set()
    for node, _ in graph.of(Attend):
        takes = [a for a in node.args if isinstance(graph[a].op, Take)]
        if not takes:
            continue
        sizes = (spec.batch, *(a.size for a in graph[node.args[0]].type.rows.batch))
        strides = [_strides(graph[a].type.rows, graph[a].type.tensor, spec) for a in node.args]
        if fold(sizes, strides).copies:
            copied.update(takes)
    return frozenset(copied)


def _strides(rows: RowMap, tensor: str, spec: AttentionSpec) -> list[int]:
    """Return the strides of batch and batch axes, in elements, for contiguous inputs in the spec's layout."""
    shape = spec.shape
    heads = spec.heads if tensor == "q" else spec.kv_heads
    length = shape.seq_len if tensor == "q" else shape.kv_len
    features = spec.value_dim if tensor == "v" else spec.head_dim
    by_head, by_row = (length * features, features) if spec.layout == "bhsd" else (features, heads * features)
    return [heads * length * features, *(a.head * by_head + a.row * by_row if a.size > 1 else 0 for a in rows.batch)]


def _free(node: Node, setting: Setting) -> Cost:
    return Cost()


def _take(node: Node, setting: Setting) -> Cost:
    if node.id not in setting.copied:
        return Cost()
    return Cost(bytes=2 * value_bytes(node, setting), launches=1)


def _attend(node: Node, setting: Setting) -> Cost:
    op, kernel = node.op, setting.kernel
    assert isinstance(op, Attend)
    q, k, v = (setting.graph[a] for a in node.args)
    rows, columns = q.type.rows.length, k.type.rows.length
    if op.tile is not None:
        return _tiled_attend(node, setting)
    condition: str = slot_condition(op, q.type.rows, k.type.rows)
    native = lowered(setting.graph, node, kernel.native) if condition == "mask" else None
    padded = -(-rows // kernel.tile) * kernel.tile * columns if rows >= kernel.tile else rows * columns
    visited: float = padded
    if condition == "causal" and kernel.skips_causal:
        visited = rows * (columns + min(kernel.causal_tile, columns)) / 2
    if native is not None:
        condition = "native"
        visited = min(padded, window_pairs(rows, columns, native.window) + rows * kernel.causal_tile)
    blocks = prod(a.size for a in q.type.rows.batch) * setting.batch
    moved = sum(value_bytes(n, setting) for n in (q, k, v, node)) + 3 * mask_bytes(node, setting)
    if kernel.materialises:
        moved += 6 * blocks * rows * columns * setting.accumulator
    return Cost(
        flops=2 * blocks * visited * (q.type.features + v.type.features),
        exps=blocks * visited,
        bytes=moved,
        launches=1 + 4 * (condition == "mask") + 4 * kernel.materialises,
    )


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


def _tiled_attend(node: Node, setting: Setting) -> Cost:
    """Price an attend over tiles: each tile's keys are gathered, and most of its mask is made anew in each call."""
    op = node.op
    assert isinstance(op, Attend)
    assert op.tile is not None
    q, k, v = (setting.graph[a] for a in node.args)
    kept = attend_tiles(op, q.type.rows, k.type.rows, setting.spec) * setting.batch
    pairs, heads = kept * op.tile[0] * op.tile[1], prod(q.type.rows.sizes[:-1])
    gathered = 3 * kept * op.tile[1] * (k.type.features + v.type.features) * setting.item
    masks = 4 * pairs / heads * (1 + setting.item)
    if "blocks" in setting.kernel.native:
        gathered = masks = 0
    permuted = 2 * sum(value_bytes(n, setting) for n in (q, k, v, node)) if op.boxes else 0
    return Cost(
        flops=2 * pairs * (q.type.features + v.type.features),
        exps=pairs,
        bytes=sum(value_bytes(n, setting) for n in (q, k, v, node)),
        copied=gathered + masks + permuted,
        launches=1
        if "blocks" in setting.kernel.native
        else 20 + int(20 * pairs / heads * (k.type.features + v.type.features) / 2**22 / op.tile[0]),
    )


def _join(node: Node, setting: Setting) -> Cost:
    """Price a merge: each part is read once and added to the accumulators, which start at zero and end as output."""
    rows = node.type.rows.elements_count * setting.batch
    accumulator = rows * (node.type.features + 1) * setting.accumulator
    moved, exps = 2.0 * accumulator, 0.0
    for part in setting.graph.args(node):
        part_rows = part.type.rows.elements_count * setting.batch
        moved += value_bytes(part, setting) + 2 * part_rows * (part.type.features + 2) * setting.accumulator
        exps += 3 * part_rows
    return Cost(exps=exps, bytes=moved, launches=2 + 6 * len(node.args))


RULES: dict[type[Op], Callable[[Node, Setting], Cost]] = {
    Input: _free,
    Take: _take,
    Attend: _attend,
    Merge: _join,
    Mix: _join,
    Output: _free,
}


def forward_cost(
    node: Node, setting: Setting, rules: Mapping[type[Op], Callable[[Node, Setting], Cost]] = RULES
) -> Cost:
    """Return the cost of one node in the forward pass.

    Raises
    ------
    PassError
        If the op has no cost rule.
    """
    rule = rules.get(type(node.op))
    if rule is None:
        raise PassError(f"op {node.op.name!r} has no cost rule; add one to attnplan/cost/rules.py")
    return rule(node, setting)


def backward_cost(node: Node, setting: Setting) -> Cost:
    """Return the cost of one node in the backward pass: five matrix products for two, and gradients moved twice."""
    forward = forward_cost(node, setting)
    if isinstance(node.op, Attend):
        launches = 2 * forward.launches + 6
        return Cost(2.5 * forward.flops, forward.exps, 2.5 * forward.bytes, 0.0, launches, 2 * forward.copied)
    if isinstance(node.op, Take):
        return forward
    return Cost()
