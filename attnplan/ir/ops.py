"""The operations of the IR: a small closed set. An op holds options, never tensors, and infers its result's type."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import ClassVar

import attrs

from attnplan.errors import PassError
from attnplan.ir.buffers import Buffer
from attnplan.ir.rows import Axis, RowMap
from attnplan.patterns import Pattern, full
from attnplan.patterns.grids import Neighborhood

SHORT_DTYPES = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}
Standing = RowMap | tuple[RowMap, ...]
"""Which elements of the whole sequence some rows are: one map, or runs of rows one after the other."""


@attrs.frozen(cache_hash=True)
class TensorType:
    """Type of a value: what its elements are, and which rows of which tensor."""

    tensor: str
    """``"q"``, ``"k"``, ``"v"``, or ``"o"`` for attention output."""
    rows: RowMap
    features: int
    dtype: str
    lse: bool = False
    """Whether the value carries one log-sum-exp per row beside its features."""

    def __str__(self) -> str:
        sizes = ", ".join(str(n) for n in (*self.rows.sizes, self.features))
        return f"{SHORT_DTYPES[self.dtype]}[B, {sizes}]{' + lse' if self.lse else ''}"


def _need(condition: bool, op: Op, message: str) -> None:
    if not condition:
        raise PassError(f"{op.name}: {message}")


@attrs.frozen(cache_hash=True)
class Op:
    """An operation: a kebab-case ``name``, options as fields, and a rule for the type of its result."""

    name: ClassVar[str]

    def infer(self, types: Sequence[TensorType]) -> TensorType:
        """Return the type of the result; raise :class:`~attnplan.errors.PassError` where operands do not fit."""
        raise NotImplementedError


@attrs.frozen(cache_hash=True)
class Input(Op):
    """An operand of the call: all rows of q, k or v. Heads in ``groups`` of query heads per key/value head."""

    name: ClassVar[str] = "input"
    tensor: str
    heads: int
    group: int
    length: int
    features: int
    dtype: str

    @property
    def rows(self) -> RowMap:
        """The whole tensor; grouped heads have an axis for the query heads of a group, of size 1 in k and v."""
        if self.group == 1:
            return RowMap.whole(self.heads, self.length)
        if self.tensor == "q":
            return RowMap.whole(self.heads, self.length, self.group)
        return RowMap(0, 0, (Axis(self.heads, head=1), Axis(1), Axis(self.length, row=1)))

    def infer(self, types: Sequence[TensorType]) -> TensorType:
        _need(not types, self, "takes no operands")
        _need(self.tensor in ("q", "k", "v"), self, f"there is no operand {self.tensor!r}")
        _need(self.dtype in SHORT_DTYPES, self, f"there is no dtype {self.dtype!r}")
        return TensorType(self.tensor, self.rows, self.features, self.dtype)


@attrs.frozen(cache_hash=True)
class Take(Op):
    """Some rows of an input, as a strided view or a copy of it."""

    name: ClassVar[str] = "take"
    rows: RowMap

    def infer(self, types: Sequence[TensorType]) -> TensorType:
        _need(len(types) == 1 and types[0].rows.keeps_rows, self, "takes one whole input")
        source = types[0].rows
        _need(self.rows.axes[-1].head == 0, self, "changes the head along the rows that attention runs over")
        _need(all(a.size > 0 for a in self.rows.axes), self, f"takes no rows at all: {self.rows.sizes}")
        _need(
            self.rows.head >= 0 and self.rows.row >= 0 and all(a.head >= 0 and a.row >= 0 for a in self.rows.axes),
            self,
            "steps backwards",
        )
        _need(
            self.rows.last_head <= source.last_head and self.rows.last_row <= source.last_row,
            self,
            f"reaches head {self.rows.last_head}, row {self.rows.last_row} of an input whose last are "
            f"{source.last_head}, {source.last_row}",
        )
        return attrs.evolve(types[0], rows=self.rows)


@attrs.frozen(cache_hash=True)
class Attend(Op):
    """Attention of query rows over key rows, for each index of the batch axes; axes of size 1 in k and v broadcast."""

    name: ClassVar[str] = "attend"
    where: Pattern = attrs.field(factory=full)
    """Which of the pairs meet, in terms of global heads and positions."""
    branch: int = 0
    shift: int | None = 0
    """Position of query row 0; None if it arrives with the call."""
    scale: float = 1.0
    softcap: float | None = None
    dropout: float = 0.0
    precision: str = "ieee"
    biases: tuple[str, ...] = ()
    """Operands that are added to scores, after scale and softcap: ``"alibi_slopes"``, ``"bias"``."""
    tile: tuple[int, int] | None = None
    """(queries, keys) of the tiles that are run one by one, the empty ones left out; None runs all pairs at once."""
    boxes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Boxes of queries and of keys on the grid of a neighbourhood, in whose order the rows are cut into tiles."""
    launch: int | None = None
    """Attends of one number are one kernel call, over rows gathered into one buffer; None is a call of its own."""
    at: tuple[Standing, Standing] | None = None
    """Which (head, row) of the whole sequence each element of q and of k is, where the inputs hold some rows only. A
    tuple of maps is runs of rows, one after the other along the rows that attention runs over."""
    loop: tuple[int, int] | None = None
    """(queries, keys) of the blocks of scores that are computed one after the other, by an online softmax; None is all
    at once. What is computed does not depend on it."""

    def positions(self, q: RowMap, k: RowMap) -> tuple[RowMap, RowMap]:
        """Return which (head, row) of the whole sequence the elements of two operands are.

        Conditions, and the proof, read these; the maps of the operands themselves are addresses in the inputs.

        Raises
        ------
        PassError
            If they are runs of rows, which no one map shows; see :meth:`runs`.
        """
        runs = self.runs(q, k)
        if max(map(len, runs)) > 1:
            raise PassError(f"attend where {self.where!r} stands at runs of rows, which are not one row map")
        return runs[0][0], runs[1][0]

    def runs(self, q: RowMap, k: RowMap) -> tuple[tuple[RowMap, ...], tuple[RowMap, ...]]:
        """Return the same as :meth:`positions` run by run, for queries and for keys."""
        at_q, at_k = self.at or (q, k)
        return at_q if isinstance(at_q, tuple) else (at_q,), at_k if isinstance(at_k, tuple) else (at_k,)

    def infer(self, types: Sequence[TensorType]) -> TensorType:
        _need(self.tile is None or (len(self.tile) == 2 and min(self.tile) > 0), self, f"tile {self.tile} is no tile")
        _need(self.loop is None or (len(self.loop) == 2 and min(self.loop) > 0), self, f"loop {self.loop} is no block")
        _need(self.loop is None or not (self.tile or self.dropout), self, "loops over no tiles, and under no dropout")
        _need(
            self.boxes is None or self._boxes_fit(), self, f"boxes {self.boxes} do not tile the grid of {self.where!r}"
        )
        _need(len(types) == 3, self, f"takes q, k and v, got {len(types)} operands")
        q, k, v = types
        _need((q.tensor, k.tensor, v.tensor) == ("q", "k", "v"), self, f"got {q.tensor}, {k.tensor}, {v.tensor}")
        _need(k.rows == v.rows, self, "the rows of k and of v differ")
        _need(q.rows.shows_rows_once, self, "one query row stands in two places, whose outputs would be written twice")
        _need(q.features == k.features, self, f"q has {q.features} features, k has {k.features}")
        _need(len(q.rows.axes) == len(k.rows.axes), self, "q and k have different numbers of axes")
        for a, b in zip(q.rows.batch, k.rows.batch, strict=True):
            _need(b.size in (1, a.size), self, f"batch axes do not broadcast: {q.rows.sizes} and {k.rows.sizes}")
        self._check_positions(q.rows, k.rows)
        return TensorType("o", q.rows, v.features, q.dtype, lse=True)

    def _check_positions(self, q: RowMap, k: RowMap) -> None:
        if self.at is None:
            return
        _need(self.tile is None, self, "tiles are cut over whole sequences, the inputs hold some rows only")
        for name, rows, runs in zip("qk", (q, k), self.runs(q, k), strict=True):
            sizes = (*runs[0].sizes[:-1], sum(at.length for at in runs)) if runs else ()
            _need(sizes == rows.sizes, self, f"{name} has sizes {rows.sizes}, and stands at {sizes}")
            for at in runs:
                _need(at.axes[-1].head == 0, self, f"{name} changes the head along the rows that attention runs over")
                _need((at.head, at.batch) == (runs[0].head, runs[0].batch), self, f"the runs of {name} differ in heads")
        steps = ([a.head for a in rows.batch if a.size > 1] for rows in (q, self.runs(q, k)[0][0]))
        _need(len({tuple(s) for s in steps}) == 1, self, "q stands at heads that its rows do not step over alike")

    def _boxes_fit(self) -> bool:
        grid = self.where.shape if isinstance(self.where, Neighborhood) else None
        if grid is None or self.boxes is None or self.tile != tuple(prod(b) for b in self.boxes):
            return False
        return all(len(b) == len(grid) and all(n % m == 0 for n, m in zip(grid, b, strict=True)) for b in self.boxes)


def _same_kind(op: Op, types: Sequence[TensorType]) -> None:
    _need(len(types) > 0, op, "needs at least one part")
    for t in types:
        _need(t.tensor == "o" and t.lse, op, f"takes attention outputs with LSE, got {t}")
        _need((t.features, t.dtype) == (types[0].features, types[0].dtype), op, f"{t} does not fit {types[0]}")


@attrs.frozen(cache_hash=True)
class Receive(Op):
    """A collective: the rows of k or v that a rank attends over in one hop, its own and those of its peers."""

    name: ClassVar[str] = "receive"
    hop: int
    store: tuple[RowMap, ...]
    """Rows of the whole sequence, one map after the other; see :class:`~attnplan.ir.buffers.Buffer`."""
    peers: tuple[tuple[int, int], ...] = ()
    """(rank, number of elements that it sends), for each peer that sends any."""

    def infer(self, types: Sequence[TensorType]) -> TensorType:
        _need(len(types) == 1 and types[0].tensor in ("k", "v"), self, "takes this rank's k or v")
        _need(len(self.store) > 0 and all(m.elements_count for m in self.store), self, "receives no rows")
        buffer, rows = Buffer(self.store), types[0].rows
        middle = [Axis(1)] if len(rows.axes) == 3 else []
        return attrs.evolve(
            types[0], rows=RowMap(0, 0, (Axis(buffer.heads, head=1), *middle, Axis(buffer.rows, row=1)))
        )


@attrs.frozen(cache_hash=True)
class Merge(Op):
    """Join parts of one softmax by their log-sum-exps; rows that no part covers get output 0 and LSE -inf."""

    name: ClassVar[str] = "merge"
    rows: RowMap
    pull: bool = False
    """Whether one kernel writes each row once, from the parts that hold it."""

    def infer(self, types: Sequence[TensorType]) -> TensorType:
        _same_kind(self, types)
        return attrs.evolve(types[0], rows=self.rows)


@attrs.frozen(cache_hash=True)
class Mix(Op):
    """Mix the branches of a mixture. The parts of one branch cover disjoint rows."""

    name: ClassVar[str] = "mix"
    rows: RowMap
    rule: str
    branches: tuple[int, ...]
    """The branch of each operand."""
    count: int
    """Number of branches, covered or not."""
    weights: tuple[float, ...] | None = None
    """Constant weight of each of the ``count`` branches, for the sum."""
    pull: bool = False
    """Whether one kernel writes each row once, from the parts that hold it."""

    def weight(self, branch: int) -> float:
        """Return the constant weight of a branch under the ``mean`` and ``sum`` rules."""
        if self.rule == "mean":
            return 1 / self.count
        return 1.0 if self.weights is None else self.weights[branch]

    def infer(self, types: Sequence[TensorType]) -> TensorType:
        _same_kind(self, types)
        _need(len(self.branches) == len(types), self, f"{len(types)} operands, {len(self.branches)} branch labels")
        _need(all(0 <= b < self.count for b in self.branches), self, f"labels {self.branches} of {self.count} branches")
        _need(self.weights is None or len(self.weights) == self.count, self, "needs one weight per branch")
        for branch in set(self.branches):
            parts = [t.rows for t, b in zip(types, self.branches, strict=True) if b == branch]
            _need(disjoint(parts), self, f"two parts of branch {branch} write the same row")
        return attrs.evolve(types[0], rows=self.rows, lse=self.rule in ("lse", "lse-detached"))


@attrs.frozen(cache_hash=True)
class Output(Op):
    """The result of the graph."""

    name: ClassVar[str] = "output"
    sinks: bool = False
    """Whether the softmax of every row has one more key, of value 0, whose score is its head's sink logit."""
    loop: tuple[int, int, int] | None = None
    """(batch elements, key/value heads, query rows) of the pieces of the output for which the whole graph is run, one
    after the other; None is all at once. See :mod:`attnplan.passes.chunk`."""
    recompute: bool = False
    """Whether the backward computes again what it needs beside q, k, v, the output and its LSE; a loop always does."""

    def infer(self, types: Sequence[TensorType]) -> TensorType:
        _need(not self.sinks or types[0].lse, self, "joins sink logits by LSE, and there is none")
        _need(len(types) == 1 and types[0].tensor == "o", self, "takes one attention output")
        _need(self.loop is None or (len(self.loop) == 3 and min(self.loop) > 0), self, f"loop {self.loop} is no piece")
        return types[0]


OPS: dict[str, type[Op]] = {op.name: op for op in (Input, Take, Receive, Attend, Merge, Mix, Output)}


def disjoint(maps: Sequence[RowMap]) -> bool:
    """Return whether no two maps share a (head, row); may say False of maps whose row ranges interleave."""
    return len(maps) < 2 or _disjoint(tuple(maps))


@lru_cache(maxsize=256)
def _disjoint(maps: tuple[RowMap, ...]) -> bool:
    ranges: dict[int, list[tuple[int, int]]] = {}
    for rows in maps:
        for head, extent in rows.head_extents().items():
            ranges.setdefault(head, []).append(extent)
    return all(a[1] < b[0] for spans in ranges.values() for a, b in zip(sorted(spans), sorted(spans)[1:], strict=False))
