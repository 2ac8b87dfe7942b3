"""What each op costs: one rule per op. An op without a rule is an error, never free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import attrs

from attnplan.cost.buffers import mask_elements, mask_spread
from attnplan.cost.joins import placed, pull_of, rows_there
from attnplan.cost.setting import Setting, value_bytes
from attnplan.cost.tiles import attend_tiles, launches_of_tiles, tile_rows
from attnplan.cost.views import views_of
from attnplan.cost.work import attend_work, needs_mask, with_tiles
from attnplan.errors import PassError
from attnplan.ir import Attend, Input, Merge, Mix, Node, Op, Output, Receive, Take
from attnplan.ir.launch import launches
from attnplan.ir.ops import disjoint
from attnplan.ir.slots import mask_rows, slot_condition


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
    views: int = 0
    """Operators that keep the host alone busy: views of tensors, and what a call's masks and tables are made of."""
    made: float = 0.0
    """Bytes moved by operators that make a mask before the kernel runs, which no arithmetic hides."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.exps + other.exps,
            self.bytes + other.bytes,
            self.comm_bytes + other.comm_bytes,
            self.launches + other.launches,
            self.copied + other.copied,
            self.views + other.views,
            self.made + other.made,
        )


FREE = Cost()
"""What costs nothing."""


def launched_rows(setting: Setting) -> dict[int, float]:
    """Return the query rows, of all heads and batch elements, of the launch that each attend of several is part of."""
    found: dict[int, float] = {}
    for nodes in launches(setting.graph).values():
        rows = sum(prod(setting.graph[n.args[0]].type.rows.sizes) for n in nodes) * setting.batch
        found.update((n.id, float(rows)) for n in nodes)
    return found


def _free(node: Node, setting: Setting) -> Cost:
    return FREE


def _take(node: Node, setting: Setting) -> Cost:
    """Price the rows that a kernel cannot read where they stand: attends of one launch share one copy of theirs."""
    if node.id not in setting.copied:
        return FREE
    apart = node.id not in setting.together and not setting.kernel.fuses
    return Cost(bytes=2 * value_bytes(node, setting), launches=int(apart))


def _receive(node: Node, setting: Setting) -> Cost:
    """Price a collective: what peers send crosses a link once, and the store is written once."""
    op = node.op
    assert isinstance(op, Receive)
    sent = sum(count for _, count in op.peers) * setting.batch * node.type.features * setting.item
    return Cost(bytes=2 * value_bytes(node, setting), comm_bytes=sent, launches=1)


def _attend(node: Node, setting: Setting) -> Cost:
    op, kernel = node.op, setting.kernel
    assert isinstance(op, Attend)
    if op.tile is not None and not kernel.skips:
        return _tiled_attend(node, setting)
    q, k, v = (setting.graph[a] for a in node.args)
    work = attend_work(node, setting)
    rows, columns = q.type.rows.length, k.type.rows.length
    read, made = _mask_traffic(node, setting, masked=work.masked)
    moved = sum(value_bytes(n, setting) for n in (q, k, v, node)) + read
    if kernel.materialises:  # inputs are widened first, and shared keys repeated
        shared = 4 * work.group if work.group > 1 else 0
        moved += (4 + shared) * sum(value_bytes(n, setting) for n in (q, k, v))
        moved += int(11 * prod(q.type.rows.sizes[:-1]) * setting.batch * rows * columns * setting.accumulator)
    pairs = work.flops / (2 * (q.type.features + v.type.features))
    arrives = _OF_MADE * (work.masked and not kernel.skips and _arrives(op))
    around = _OF_MASKS * (work.masked and not kernel.skips) + _OF_DOCUMENTS * work.documents
    if kernel.materialises:
        around += _OF_PLAIN + _OF_TRIANGLES * (slot_condition(op, q.type.rows, k.type.rows) == "causal")
    return Cost(
        flops=work.flops,
        exps=pairs,
        bytes=moved + _kept(op, pairs, setting),
        launches=(1 + around) * _steps(op, rows, columns),
        views=views_of(node, setting) + _OF_WINDOWS * (work.windowed and kernel.turned) + arrives,
        made=made,
    )


def _mask_traffic(node: Node, setting: Setting, *, masked: bool) -> tuple[float, float]:
    """Return the bytes of a mask that the kernel moves, and those that operators move before a fused one.

    They copy the boolean where no strides express it; fill zeros, read the boolean, write and read its complement, read
    and write what is added, and look for rows without a key.
    """
    op, (q, k) = node.op, (setting.graph[a].type.rows for a in node.args[:2])
    kernel, item = setting.kernel, setting.item
    assert isinstance(op, Attend)
    if op.biases:  # what the operands make, and what is added to scores
        return 6.0 * setting.batch * prod(q.sizes) * k.length * setting.accumulator, 0.0
    if kernel.skips:  # its tables
        tiles = attend_tiles(with_tiles(op, kernel), q, k, setting.spec) if needs_mask(node, setting) else 0
        return 24.0 * tiles, 0.0
    if not masked:
        return 0.0, 0.0
    elements = mask_elements(op, *mask_rows(op, q, k), setting.batch, setting.spec)
    whole = mask_spread(op, q, k, setting.spec)
    added = whole or elements
    if kernel.materialises:  # the boolean, and what is added to scores
        return 3.0 * (1 + item) * added, 0.0
    arriving = _OF_COMPARED * elements * _arrives(op)
    return float(item * added), arriving + (elements + whole if whole else 0) + (3 * item + 4) * added


def _arrives(op: Attend) -> bool:
    """Return whether a condition is not known before a call."""
    return bool(op.where.operands) or op.shift is None


def _kept(op: Attend, pairs: float, setting: Setting) -> float:
    """Return the bytes of the weights, and of slopes of a softcap, that a forward keeps for its backward."""
    each = (1 + (op.softcap is not None)) * setting.accumulator
    return pairs * each if setting.kernel.keeps and setting.spec.training else 0


def _steps(op: Attend, rows: int, columns: int) -> int:
    """Return how many blocks of scores an attend computes one after the other."""
    return 1 if op.loop is None else -(-rows // op.loop[0]) * -(-columns // op.loop[1])


_OF_COMPARED = 5
"""Bytes that are moved for each pair to compare what comes with a call."""
_OF_DOCUMENTS, _OF_MASKS = 6, 8
"""Operators that lay documents end to end, and that make of a boolean mask one that is added and blank rows without a
key."""
_OF_PLAIN, _OF_TRIANGLES = 4, 6
"""The same of plain torch: operators around its products, and those of a causal mask, which is made in each call."""
_OF_WINDOWS = 1
"""As many operators take as long as the views that turn tensors for a window. The same of:"""
_OF_MADE = 17
"""... what makes a mask of what comes with a call."""
_OF_LISTS, _OF_TABLES = 4, 185
"""... lists of tiles on their way to a kernel, and what makes a table of tiles for one call."""
_OF_GRADIENTS = 5
"""... what a backward does with rows that were gathered for one launch."""


def _tiled_attend(node: Node, setting: Setting, *, skips: bool | None = None) -> Cost:
    """Price an attend over tiles: each tile's keys are gathered, and most of its mask is made anew in each call.

    Unless the kernel itself ``skips`` those that are not kept, as its description says.
    """
    op = node.op
    assert isinstance(op, Attend)
    assert op.tile is not None
    q, k, v = (setting.graph[a] for a in node.args)
    kept = attend_tiles(op, q.type.rows, k.type.rows, setting.spec) * setting.batch
    pairs, heads = kept * op.tile[0] * op.tile[1], prod(q.type.rows.sizes[:-1])
    gathered = 3 * kept * op.tile[1] * (k.type.features + v.type.features) * setting.item
    masks = 4 * pairs / heads * (1 + setting.item)
    skips = "blocks" in setting.kernel.native if skips is None else skips
    if skips:
        gathered = masks = 0
    known = not skips and op.boxes is None and not _arrives(op)
    whole = known and not tile_rows(op, q.type.rows, k.type.rows, setting.spec).partial
    permuted = 2 * sum(value_bytes(n, setting) for n in (q, k, v, node)) if op.boxes else 0
    return Cost(
        flops=2 * pairs * (q.type.features + v.type.features),
        exps=pairs,
        bytes=sum(value_bytes(n, setting) for n in (q, k, v, node)),
        copied=gathered + masks + permuted,
        launches=1 if skips else launches_of_tiles(q.type.rows.length, kept, heads, op.tile, whole=whole),
        views=_OF_LISTS * skips + _OF_TABLES * _arrives(op),
    )


def _join(node: Node, setting: Setting) -> Cost:
    """Price a merge: each part is read once and added to the accumulators, which start at zero and end as output.

    A merge that pulls reads each part once, and writes each output row once; not those that are there already.
    """
    op = node.op
    assert isinstance(op, Merge | Mix)
    parts = setting.graph.args(node)
    read = sum(value_bytes(part, setting) for part in parts)
    elements = [part.type.rows.elements_count * setting.batch for part in parts]
    if op.pull:
        per_row = setting.batch * node.type.features * setting.item
        kept = 2.0 * _rows_there(node, setting, 0) * per_row
        return Cost(exps=2.0 * sum(elements), bytes=read + value_bytes(node, setting) - kept, launches=1)
    if setting.kernel.fuses:
        return Cost(exps=2.0 * sum(elements), bytes=read + value_bytes(node, setting), launches=2)
    rows = node.type.rows.elements_count * setting.batch
    constant = isinstance(op, Mix) and op.rule in ("mean", "sum")
    if disjoint([part.type.rows for part in parts]) and not constant and not setting.kernel.materialises:
        return _placed(node, setting, sum(elements) < rows)
    accumulator = rows * (node.type.features + 1) * setting.accumulator
    moved = 2.0 * accumulator + read
    for count in elements:
        moved += 2 * count * (node.type.features + 2) * setting.accumulator
    return Cost(exps=3.0 * sum(elements), bytes=moved, launches=2 + 6 * len(parts))


def _rows_there(join: Node, setting: Setting, operand: int) -> int:
    writes = setting.kernel.writes_into
    return rows_there(setting.graph, join, operand, writes_into=writes, copied=setting.copied)


def _placed(node: Node, setting: Setting, gaps: bool) -> Cost:
    """Price a merge of parts that share no row: what no kernel wrote there is copied to its place, with no weights.

    The LSE is filled, and each part's is copied; an output with gaps is filled with zeros.
    """
    parts = setting.graph.args(node)
    there = placed(setting.graph, node) if setting.kernel.writes_into else frozenset()
    lse = node.type.rows.elements_count * setting.batch * setting.accumulator
    moved = sum(
        n.type.rows.elements_count * setting.batch * n.type.features * setting.item for n in parts if n.id not in there
    )
    whole = value_bytes(node, setting) - lse
    copies = len(parts) - len(there)
    return Cost(bytes=2.0 * moved + 3.0 * lse + gaps * whole, launches=1 + gaps + copies + len(parts))


RULES: dict[type[Op], Callable[[Node, Setting], Cost]] = {
    Input: _free,
    Take: _take,
    Receive: _receive,
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
    cost = rule(node, setting)
    return attrs.evolve(cost, launches=0) if cost.launches and node.id in setting.together else cost


def backward_cost(node: Node, setting: Setting) -> Cost:
    """Return the cost of one node in the backward pass.

    An attend computes five matrix products where it computed two, four if its weights were kept. Rows that were taken
    have gradients that are added to those of the whole inputs, in the accumulating dtype: by one operator for each
    take, or by the join that pulls.
    """
    forward = forward_cost(node, setting)
    graph, op = setting.graph, node.op
    if isinstance(op, Attend):
        if op.tile is not None and "tile-masks" in setting.kernel.native:  # partial tiles are gathered, as for others
            forward = _tiled_attend(node, setting, skips=False)
        views = forward.views
        if op.tile is None:
            views += views_of(node, setting, back=True) - views_of(node, setting)
        rest = (0.0, 2 * forward.launches + 2, 2 * forward.copied, views, forward.made)
        kept = _kept(op, forward.exps, setting)
        if kept:
            return Cost(2 * forward.flops, 0, 2.5 * (forward.bytes - kept) + kept, *rest)
        if setting.kernel.materialises:  # the scores are there
            return Cost(2 * forward.flops, 0, 1.5 * forward.bytes, *rest)
        return Cost(2.5 * forward.flops, forward.exps, 2.5 * forward.bytes, *rest)
    pulls = pull_of(graph) is not None
    elements = node.type.rows.elements_count * setting.batch * node.type.features if node.type else 0
    if isinstance(op, Take) and pulls and node.id in setting.copied and node.id not in setting.together:
        return Cost(views=_OF_GRADIENTS)
    if isinstance(op, Take) and not pulls:
        again = 2 * elements * setting.item if node.id in setting.copied else 0
        return Cost(bytes=elements * (setting.item + 2 * setting.accumulator) + again, launches=1 + bool(again))
    if isinstance(op, Input) and not pulls and any(isinstance(n.op, Take) for n in graph):
        return Cost(bytes=elements * (2 * setting.accumulator + setting.item), launches=2)
    if isinstance(op, Merge | Mix) and op.pull:
        taken = [graph[a] for part in graph.args(node) for a in part.args]
        moved = sum(value_bytes(n, setting) for n in taken)
        whole = sum(value_bytes(n, setting) for n in graph if isinstance(n.op, Input))
        there = [_rows_there(node, setting, i) for i in range(3)]
        per_row = [graph.inputs[t].type.features * setting.batch * setting.item for t in "qkv"]
        kept = 2.0 * sum(n * size for n, size in zip(there, per_row, strict=True))
        return Cost(bytes=2.0 * moved + whole - kept, launches=3)
    return FREE
