"""``split-heads``: attends over families of heads, so that the condition on heads and offsets becomes regular."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import groupby
from operator import and_
from typing import ClassVar, TypeVar

import attrs

from attnplan.ir import Attend, Axis, Builder, Graph, Merge, Node, RowMap, Take, rewrite
from attnplan.passes.base import Pass
from attnplan.patterns import full
from attnplan.patterns.base import conjuncts
from attnplan.patterns.segments import Heads
from attnplan.patterns.sums import Conjunction

T = TypeVar("T")


@attrs.frozen
class HeadClass:
    """Query heads ``start, start + step, ...`` that share an offset and a key/value head."""

    start: int
    kv_head: int
    offsets: tuple[int, ...]
    step: int
    count: int

    def beyond(self, other: HeadClass) -> tuple[int, ...] | None:
        """Return how far this class lies beyond ``other`` (head, key/value head, offsets), or None if it lies before.

        A strided view cannot step backwards.
        """
        shifts = (a - b for a, b in zip(self.offsets, other.offsets, strict=True))
        distance = (self.start - other.start, self.kv_head - other.kv_head, *shifts)
        return distance if min(distance) >= 0 else None


@attrs.frozen
class SplitHeads(Pass):
    """Split attends whose condition depends on the head into families of head classes with affine offsets."""

    name: ClassVar[str] = "split-heads"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite(graph, _visit)


def _visit(builder: Builder, node: Node, args: tuple[int, ...]) -> int | None:
    op = node.op
    if not isinstance(op, Attend) or op.shift is None or op.at is not None:
        return None
    q, k = (builder.type(a).rows for a in args[:2])
    conjunction = Conjunction.of(op.where)
    varies = bool(conjunction.heads) or any(d.per_head for d in conjunction.dilated)
    whole = all(rows == builder.type(builder.source(a)).rows for rows, a in zip((q, k), args, strict=False))
    if not varies or not whole:
        return None
    families = list(head_families(conjunction, q, k))
    if not families:
        return None
    rest = [c for c in conjuncts(op.where) if not isinstance(c, Heads)]
    split = attrs.evolve(op, where=reduce(and_, rest) if rest else full())
    parts = [
        builder.add(split, *(_take(builder, a, rows) for a, rows in zip(args, (rq, rk, rk), strict=True)))
        for rq, rk in families
    ]
    return parts[0] if builder.type(parts[0]).rows == q else builder.add(Merge(q), *parts)


def _take(builder: Builder, source: int, rows: RowMap) -> int:
    return source if builder.type(source).rows == rows else builder.add(Take(rows), source)


def head_families(conjunction: Conjunction, q: RowMap, k: RowMap) -> Iterator[tuple[RowMap, RowMap]]:
    """Iterate over the row maps of q and k for each family of the heads that take part."""
    classes = sorted(_classes(conjunction, q, k), key=lambda c: (c.step, c.count, c.start))
    for _, alike in groupby(classes, key=lambda c: (c.step, c.count)):
        for block in _runs(_runs(list(alike), HeadClass.beyond), _block_distance):
            yield _family(block, q.length, k.length)


def _classes(conjunction: Conjunction, q: RowMap, k: RowMap) -> Iterator[HeadClass]:
    members: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for index, head in q.batch_heads():
        if conjunction.admits(head):
            members.setdefault((k.head_at(index), conjunction.offsets(head)), []).append(head)
    for (kv_head, offsets), heads in members.items():
        for run in _runs(sorted(heads), lambda a, b: (a - b,)):
            yield HeadClass(run[0], kv_head, offsets, run[1] - run[0] if len(run) > 1 else 0, len(run))


def _block_distance(a: Sequence[HeadClass], b: Sequence[HeadClass]) -> tuple[int, ...] | None:
    """Return how far run ``a`` lies beyond run ``b``, or None unless they have equal length and stride."""
    if len(a) != len(b) or (len(a) > 1 and a[1].beyond(a[0]) != b[1].beyond(b[0])):
        return None
    return a[0].beyond(b[0])


def _runs(items: Sequence[T], distance: Callable[[T, T], tuple[int, ...] | None]) -> list[list[T]]:
    """Split a list into maximal runs whose neighbours are equally far apart."""
    runs: list[list[T]] = []
    for item in items:
        run = runs[-1] if runs else []
        step = distance(item, run[-1]) if run else None
        if step is not None and (len(run) == 1 or step == distance(run[-1], run[-2])):
            run.append(item)
        else:
            runs.append([item])
    return runs


def _family(block: Sequence[Sequence[HeadClass]], seq_len: int, kv_len: int) -> tuple[RowMap, RowMap]:
    first = block[0][0]
    steps = []
    if len(block) > 1:
        steps.append((len(block), block[1][0]))
    if len(block[0]) > 1:
        steps.append((len(block[0]), block[0][1]))
    q_axes = [Axis(n, head=second.start - first.start) for n, second in steps]
    k_axes = [Axis(n, head=second.kv_head - first.kv_head) for n, second in steps]
    if first.count > 1 or not q_axes:
        q_axes.append(Axis(first.count, head=first.step))
        k_axes.append(Axis(1))
    return (
        RowMap(first.start, 0, (*q_axes, Axis(seq_len, row=1))),
        RowMap(first.kv_head, 0, (*k_axes, Axis(kv_len, row=1))),
    )
