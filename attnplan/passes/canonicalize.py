"""``canonicalize``: one spelling for each condition, and no op that does nothing."""

from __future__ import annotations

from functools import reduce
from operator import and_
from typing import ClassVar

import attrs

from attnplan.ir import Attend, Builder, Graph, Merge, Mix, Node, TensorType, rewrite
from attnplan.passes.base import Pass
from attnplan.patterns import Pattern, band, full
from attnplan.patterns.base import conjuncts
from attnplan.patterns.segments import Dilated, Heads
from attnplan.patterns.sums import Conjunction


@attrs.frozen
class Canonicalize(Pass):
    """Simplify conditions, write the ``lse`` mix as the merge that it is, and drop joins of one whole part.

    Conditions: ``a & a`` is ``a``, ``full() & a`` is ``a``, windows and causality make one band, segments that hold
    everything go, and segments that nest are joined.
    """

    name: ClassVar[str] = "canonicalize"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite(graph, _visit)


def _visit(builder: Builder, node: Node, args: tuple[int, ...]) -> int | None:
    op = node.op
    if isinstance(op, Attend):
        where = simplify(op, builder.type(args[0]), builder.type(args[1]))
        return builder.add(attrs.evolve(op, where=where), *args)
    if isinstance(op, Mix) and op.rule == "lse":
        return _merge(builder, Merge(op.rows), args)
    if isinstance(op, Merge):
        return _merge(builder, op, args)
    return None


def _merge(builder: Builder, op: Merge, args: tuple[int, ...]) -> int:
    if len(args) == 1 and builder.type(args[0]).rows == op.rows:
        return args[0]
    return builder.add(op, *args)


def simplify(op: Attend, q: TensorType, k: TensorType) -> Pattern:
    """Return the simplest spelling of an attend's condition over whole rows of q and k."""
    if op.shift is None or op.at is not None or not (q.rows.keeps_rows and k.rows.keeps_rows):
        return _join([c for c in dict.fromkeys(conjuncts(op.where)) if c != full()])
    known = Conjunction.of(op.where)
    first, last, keys = op.shift, op.shift + q.rows.length - 1, k.rows.length
    left = None if known.left is not None and known.left >= last else known.left
    right = None if known.right is not None and known.right >= keys - 1 - first else known.right
    parts: list[Pattern] = list(_heads(known.heads, q.rows.last_head + 1))
    parts += _dilated(list(known.dilated), first, keys)
    if left is not None and right is not None and left + right < 0:
        parts += [band(left, None), band(None, right)]  # nothing lies between the two, and no one band says so
    elif left is not None or right is not None:
        parts.append(band(left, right))
    parts += [c for c in dict.fromkeys(conjuncts(op.where)) if c in known.opaque]
    return _join(parts)


def _join(parts: list[Pattern]) -> Pattern:
    return reduce(and_, parts) if parts else full()


def _heads(parts: tuple[Heads, ...], heads: int) -> tuple[Heads, ...]:
    if not parts:
        return ()
    start = max(p.start for p in parts)
    stop = max(start, min(p.stop for p in parts))
    return () if start == 0 and stop >= heads else (Heads(start, stop),)


def _dilated(parts: list[Dilated], first: int, length: int) -> list[Pattern]:
    """Cut segments to the sequence, drop those that hold all of it, and join those that nest."""
    if first >= 0:  # rows at negative positions lie outside every segment
        parts = [attrs.evolve(p, length=max(length, p.rate)) if p.length > length else p for p in parts]
        parts = [p for p in parts if p.rate > 1 or p.length < length]
    parts.sort(key=lambda p: p.length)
    joined: list[Dilated] = []
    for part in parts:
        at = next((i for i, finer in enumerate(joined) if _nests(part, finer)), None)
        if at is None:
            joined.append(part)
        else:
            joined[at] = attrs.evolve(part, length=joined[at].length) if part.rate > 1 else joined[at]
    return list(joined)


def _nests(coarse: Dilated, fine: Dilated) -> bool:
    """Return whether ``coarse & fine`` is one pattern with the segments of ``fine``."""
    if coarse.length % fine.length:
        return False
    return coarse.rate == 1 or (fine.rate == 1 and fine.length % coarse.rate == 0)
