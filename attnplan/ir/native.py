"""What a kernel does by itself: the windows, documents and blocks of an attend in a kernel's own arguments.

A schedule says what its kernel knows as a set of words:

``window``
    A band, as ``window_size=(left, right)`` of flash-attn: aligned to the last query and the last key.
``causal-window``
    The same, for ``right == 0`` alone.
``shared-keys``
    Keys of one head that several query heads see, through a stride of 0.
``documents``
    Boundaries of packed documents that arrive with the call, as cumulative lengths.
``blocks``
    Tables of whole tiles.
``tile-masks``
    Partial tiles among them, by a mask function.
``softcap``
    A cap on scores.
``sinks``
    Sink logits, where one call of the kernel is the whole plan.
``mask``
    Any mask.
"""

from __future__ import annotations

from functools import lru_cache, reduce
from operator import and_

import attrs

from attnplan.ir.graph import Graph, Node
from attnplan.ir.ops import Attend, Take
from attnplan.ir.rows import RowMap
from attnplan.ir.slots import slot_band
from attnplan.patterns import Pattern, full
from attnplan.patterns.base import conjuncts
from attnplan.patterns.operands import Documents
from attnplan.patterns.sums import Conjunction

Window = tuple[int | None, int | None]
"""Keys to the left and to the right of the diagonal that ends at the last query and the last key; None is no limit."""
EVERYTHING: Window = (None, None)


OF_PAIRS = frozenset({"window", "causal-window", "documents"})
"""What of a kernel's own knowledge is about which pairs meet: kernels that differ in the rest share what is found."""


@attrs.frozen
class Lowered:
    """A condition in the arguments of a kernel."""

    window: Window = EVERYTHING
    documents: bool = False


def lowered(graph: Graph, node: Node, native: frozenset[str]) -> Lowered | None:
    """Return the condition of an attend in the arguments of a kernel that knows ``native``, None if there are none.

    Examples
    --------
    >>> from attnplan import AttentionSpec
    >>> from attnplan.lower import lower
    >>> from attnplan.patterns import window
    >>> graph = lower(AttentionSpec(seq_len=8, heads=1, head_dim=8, pattern=window(3), causal=True))
    >>> node, _ = graph.of(Attend)[0]
    >>> lowered(graph, node, frozenset({"window"}))
    Lowered(window=(3, 0), documents=False)
    >>> lowered(graph, node, frozenset()) is None
    True
    """
    assert isinstance(node.op, Attend)
    args = graph.args(node)
    whole = not any(isinstance(n.op, Take) for n in args)
    return _lowered(node.op, args[0].type.rows, args[1].type.rows, whole, native & OF_PAIRS)


@lru_cache(maxsize=1024)
def _lowered(op: Attend, q: RowMap, k: RowMap, whole: bool, native: frozenset[str]) -> Lowered | None:
    where, documents = split_documents(op.where)
    fits = "documents" in native and whole and q.length == k.length and op.shift == 0 and op.at is None
    if documents and not fits:
        return None
    window = native_window(attrs.evolve(op, where=where), q, k)
    if window is None or not knows(native, window, square=q.length == k.length):
        return None
    return Lowered(window, documents)


def knows(native: frozenset[str], window: Window, *, square: bool) -> bool:
    """Return whether a kernel takes a window; every kernel takes the whole and the causal square."""
    if window == EVERYTHING or (window == (None, 0) and square):
        return True
    return "window" in native or ("causal-window" in native and window[1] == 0)


def split_documents(where: Pattern) -> tuple[Pattern, bool]:
    """Return a condition without the documents that arrive with the call, and whether it had them."""
    terms = list(conjuncts(where))
    kept = [t for t in terms if t != Documents(None)]
    return (reduce(and_, kept) if kept else full()), len(kept) < len(terms)


def native_window(op: Attend, q: RowMap, k: RowMap) -> Window | None:
    """Return the band of an attend as a window aligned to the last query and the last key, None if it is no such band.

    A window that lies to one side of the diagonal is none: kernels read a negative number as no limit.

    Examples
    --------
    Three queries that are the last of five keys:

    >>> from attnplan.patterns import causal, window
    >>> q, k = RowMap.whole(1, 3), RowMap.whole(1, 5)
    >>> native_window(Attend(where=window(2) & causal(), shift=2), q, k)
    (2, 0)
    >>> native_window(Attend(where=window(2) & causal(), shift=0), q, k) is None
    True
    """
    known = Conjunction.of(op.where)
    if known.opaque or known.dilated or known.heads:
        return None
    if not known.banded:
        return EVERYTHING
    limits = slot_band(op, q, k)
    if limits is None:
        return None
    low, high = limits
    shift = k.length - q.length
    left = None if high is None or high >= q.length - 1 else high + shift
    right = None if low is None or low <= 1 - k.length else -low - shift
    if (left is not None and left < 0) or (right is not None and right < 0):
        return None
    return left, right
