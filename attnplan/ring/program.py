"""What one rank does: which rows it holds, what it exchanges at each hop, and what it attends over there.

Nothing here has tensors. A :class:`RankProgram` is run by a process of a real ring, by one device for every rank in
turn (the virtual ring), or by nobody (a dry run): the bytes are the same.

How a tuple of row maps lies in a tensor
----------------------------------------
A tuple of maps names elements (head, row) of the whole sequence in *flat order*: map after map, within a map the axes
in order with the last the fastest, the axes of the heads included.

- A **message** is ``[B, elements, features]``, one for each tensor of the exchange, in flat order.
- The **store** of a hop, and the q, k and v of a rank, are ``[B, heads, rows, features]``. A tensor *keeps its heads*
  where every map shows the same consecutive heads along its first axis, each with the same rows (:func:`kept_heads`):
  then a head's rows are those of the maps, one after the other. Otherwise the tensor has one head, whose rows are all
  elements in flat order. The ``heads`` of the graph's inputs say the same, and :class:`~attnplan.ir.buffers.Buffer`
  says where in the tensor the elements of a map are.

A row may stand in a store more than once, where branches read it in different orders; it travels once. Its gradients
add up.

What moves
----------
Forward: each exchange moves its tensors in the dtype of the spec; an exchange of ``("o",)`` moves the output, and one
float32 (float64 in float64) for each element, its log-sum-exp. Backward: the gradient of the output goes the way of
:attr:`RankProgram.first`, the received rows of K and V travel again, their gradients go home in float32 (float64 in
float64), each in one message to its owner, and the gradient of q goes the way of :attr:`RankProgram.last`, in the
dtype of the spec. The gathered q, the merged output and its LSE are kept from the forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import attrs

from attnplan.ir import Attend, Graph, RowMap
from attnplan.ir.buffers import Buffer, kept_heads

Collective = Literal["p2p", "all-gather", "all-to-all"]
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@attrs.frozen(cache_hash=True)
class Exchange:
    """Rows that one rank sends and receives in one step: the same rows of each tensor in ``tensors``."""

    hop: int
    """Which step this is, the same number on every rank that takes part."""
    collective: Collective
    """``"p2p"``: a message from each entry of :attr:`receives`, one to each of :attr:`sends`. The others are collective
    calls of all ranks of :attr:`group`; peers without an entry send and receive nothing."""
    tensors: tuple[str, ...]
    """What moves: ``("k", "v")``, ``("q",)`` or ``("o",)``, output and LSE."""
    sends: Mapping[int, tuple[RowMap, ...]] = attrs.field(eq=lambda m: tuple(sorted(m.items())))
    """Rows of the whole sequence for each peer, in the order in which they are packed. No entry for this rank."""
    receives: Mapping[int, tuple[RowMap, ...]] = attrs.field(eq=lambda m: tuple(sorted(m.items())))
    """Rows of the whole sequence from each peer, in the order in which they are packed."""
    group: tuple[int, ...] = ()
    """The ranks that take part in the step, this one included, in order; all of them call a collective."""

    @property
    def sent(self) -> int:
        """Number of (head, row) elements sent, of each tensor."""
        return sum(count(maps) for maps in self.sends.values())

    @property
    def received(self) -> int:
        """Number of (head, row) elements received, of each tensor."""
        return sum(count(maps) for maps in self.receives.values())


@attrs.frozen
class Hop:
    """One step of a rank: what arrives, and the attention over it while the next hop's rows are under way.

    A hop may only send: then it has no store and no graph.
    """

    index: int
    exchange: Exchange | None
    """What must have arrived before this hop can run; None if it needs this rank's own rows only."""
    store: tuple[RowMap, ...] | None
    """Rows of the whole sequence, one map after the other, that the key/value inputs of the graphs are: gathered from
    this rank's own rows and from what arrived. None if they are this rank's own rows as they lie."""
    graphs: tuple[Graph | None, ...]
    """One graph for each softmax of the program (see :attr:`RankProgram.softmaxes`), over this rank's queries and the
    store; its result is a part of that softmax. None where the hop adds nothing to it."""


@attrs.frozen
class RankProgram:
    """All that one rank does in a call."""

    rank: int
    ranks: int
    queries: tuple[RowMap, ...]
    """Rows of the whole sequence, one map after the other, that the query inputs of the graphs are."""
    hops: tuple[Hop, ...]
    """In the order in which they are merged."""
    softmaxes: tuple[int, ...]
    """The branch of each softmax: one for a plain pattern or the ``lse`` rule, one per branch for the other rules."""
    first: Exchange | None = None
    """Exchange of queries before the first hop (all-to-all by head); None if a rank attends for its own rows."""
    last: Exchange | None = None
    """Exchange of outputs after the last hop, which undoes :attr:`first`."""
    held: tuple[RowMap, ...] = ()
    """Rows of the whole sequence that this rank's own q and its output are, all query heads."""
    keys: tuple[RowMap, ...] = ()
    """Rows of the whole sequence that this rank's own k and v are, all key/value heads."""
    layout: str = "contiguous"
    transport: str = "local"
    ulysses: int = 1
    """Ranks among which heads are spread."""
    exact: bool = True
    """Whether it is known that no row is sent that no query needs, and none twice."""
    notes: tuple[str, ...] = ()
    """Why a transport that sends needed rows only sends more."""
    empty: tuple[tuple[Attend, RowMap, RowMap], ...] = ()
    """Attends that were left out because no pair of theirs meets, with queries and keys: claims for the proof."""

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """Every exchange of the forward pass, in order."""
        inner = tuple(h.exchange for h in self.hops if h.exchange is not None)
        return tuple(e for e in (self.first, *inner, self.last) if e is not None)


@attrs.frozen
class Traffic:
    """Bytes that one rank sends and receives for one batch element, messages only."""

    sent: int = 0
    received: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.received + other.received)


def count(maps: Sequence[RowMap]) -> int:
    """Return the number of elements of some maps."""
    return sum(m.elements_count for m in maps)


def forward_traffic(exchange: Exchange, features: Mapping[str, int], dtype: str) -> Traffic:
    """Return the bytes of an exchange in the forward pass; ``features`` are those of q, k, v and o."""
    item = ITEM_BYTES[dtype]
    each = sum(features[t] * item + (max(4, item) if t == "o" else 0) for t in exchange.tensors)
    return Traffic(exchange.sent * each, exchange.received * each)


def backward_traffic(exchange: Exchange, features: Mapping[str, int], dtype: str) -> Traffic:
    """Return the bytes of an exchange in the backward pass: see the top of this module."""
    item = ITEM_BYTES[dtype]
    if exchange.tensors == ("k", "v"):
        again, home = ((features["k"] + features["v"]) * size for size in (item, max(4, item)))
        sent, received = exchange.sent, exchange.received
        return Traffic(sent * again + received * home, received * again + sent * home)
    each = item * features["o" if exchange.tensors == ("q",) else "q"]
    return Traffic(exchange.sent * each, exchange.received * each)


def traffic(program: RankProgram, features: Mapping[str, int], dtype: str, *, backward: bool = False) -> Traffic:
    """Return the bytes that a rank sends and receives in one pass, for one batch element.

    Parameters
    ----------
    program
        What the rank does.
    features
        Features of ``q``, ``k``, ``v`` and ``o``.
    dtype
        That of the spec.
    backward
        The backward pass instead of the forward pass.
    """
    one = backward_traffic if backward else forward_traffic
    return sum((one(e, features, dtype) for e in program.exchanges), Traffic())


__all__ = [
    "Buffer",
    "Collective",
    "Exchange",
    "Hop",
    "RankProgram",
    "Traffic",
    "backward_traffic",
    "count",
    "forward_traffic",
    "kept_heads",
    "traffic",
]
