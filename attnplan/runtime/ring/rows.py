"""Where rows of the whole sequence lie in the tensors of one rank.

A tensor of a rank is ``[B, heads, rows, D]`` and holds the elements of some row maps: each head's rows in the order in
which the maps show them, or, in a tensor of one head, all elements in that order. Rows are moved as strided views
wherever the maps are progressions, and by index where they are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import lru_cache

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnplan.errors import RingError
from attnplan.ir import Axis, RowMap
from attnplan.ring.program import kept_heads
from attnplan.runtime import views
from attnplan.runtime.ring.strips import Strip, Strips

Maps = tuple[RowMap, ...]
_MOST_VIEWS = 64
"""Most views that one map is cut into; an index moves what has more."""
Indices = NDArray[np.int64]


@attrs.frozen(cache_hash=True)
class Span:
    """Rows ``start, start + step, ...`` of consecutive heads, in order."""

    head: int
    heads: int
    start: int
    step: int
    count: int

    @classmethod
    def of(cls, rows: RowMap) -> Span | None:
        """Return a map as a span, None if it is none.

        Examples
        --------
        >>> Span.of(RowMap.whole(4, 8, 2))
        Span(head=0, heads=4, start=0, step=1, count=8)
        """
        *batch, last = rows.axes
        heads = 1
        for axis in reversed(batch):
            if axis.size == 1:
                continue
            if axis.row or axis.head != heads:
                return None
            heads *= axis.size
        if last.head or (last.size > 1 and last.row < 1):
            return None
        return cls(rows.head, heads, rows.row, last.row if last.size > 1 else 1, last.size)

    def local(self, wanted: RowMap) -> RowMap | None:
        """Return where a map's elements lie in a tensor of this span alone, None if not all are in there."""
        if any(a.row % self.step for a in wanted.axes if a.size > 1) or (wanted.row - self.start) % self.step:
            return None
        if wanted.row < self.start or wanted.last_row > self.start + (self.count - 1) * self.step:
            return None
        if wanted.head < self.head or wanted.last_head >= self.head + self.heads:
            return None
        axes = tuple(Axis(a.size, a.head, a.row // self.step) for a in wanted.axes)
        return RowMap(wanted.head - self.head, (wanted.row - self.start) // self.step, axes)


def elements(maps: Sequence[RowMap]) -> tuple[Indices, Indices]:
    """Return the head and the row of every element of some maps, in order.

    Examples
    --------
    >>> elements([RowMap(0, 4, (Axis(2, head=1), Axis(2, row=3)))])
    (array([0, 0, 1, 1]), array([4, 7, 4, 7]))
    """
    heads, rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for one in maps:
        head, row = np.full(one.sizes, one.head, np.int64), np.full(one.sizes, one.row, np.int64)
        for i, axis in enumerate(one.axes):
            steps = np.arange(axis.size).reshape([-1 if j == i else 1 for j in range(len(one.axes))])
            head, row = head + steps * axis.head, row + steps * axis.row
        heads.append(head.ravel())
        rows.append(row.ravel())
    return np.concatenate(heads), np.concatenate(rows)


@attrs.frozen(cache_hash=True)
class Holding:
    """What one tensor ``[B, heads, rows, D]`` holds."""

    maps: Maps
    heads: int

    @classmethod
    def of(cls, maps: Maps) -> Holding:
        """Return what a message holds: its heads apart where it keeps them, else all in a row.

        Examples
        --------
        >>> Holding.of((RowMap.whole(4, 8),)).heads, Holding.of((RowMap.whole(4, 8), RowMap.whole(1, 8))).heads
        (4, 1)
        """
        return cls(maps, kept_heads(maps) or 1)

    @property
    def length(self) -> int:
        """Rows of the tensor."""
        return sum(m.elements_count for m in self.maps) // self.heads

    def pieces(self) -> Iterator[tuple[RowMap, RowMap | None]]:
        """Iterate over each map and where it lies in the tensor; None where only an index says so."""
        start, first = 0, min((m.head for m in self.maps), default=0)
        regular = True
        for one in self.maps:
            heads = _heads_apart(one)
            regular = regular and (self.heads == 1 or (heads == self.heads and one.head == first))
            if not regular:  # nothing behind it lies at one row of all heads
                yield one, None
            elif self.heads == 1:
                yield one, _flat(one, one.axes, start)
                start += one.elements_count
            else:
                assert heads is not None
                yield one, _flat(one, [a for a in one.axes if not a.head], start)
                start += one.elements_count // heads

    def places(self) -> tuple[Indices, Indices, Indices, Indices]:
        """Return the head and row of every element in the whole sequence, and its head and row in the tensor."""
        heads, rows = elements(self.maps)
        if self.heads == 1:
            return heads, rows, np.zeros_like(heads), np.arange(len(heads))
        order = np.argsort(heads, kind="stable")
        inside = np.empty_like(order)
        inside[order] = np.arange(len(order))
        return heads, rows, inside // max(self.length, 1), inside % max(self.length, 1)


def _heads_apart(one: RowMap) -> int | None:
    """Return how many consecutive heads a map shows, in order and before its rows; None if it shows heads otherwise."""
    heads = 1
    for axis in reversed(one.axes):
        if axis.size == 1 or (not axis.head and heads == 1):
            continue
        if axis.row or axis.head != heads:
            return None
        heads *= axis.size
    return heads


def _flat(one: RowMap, apart: Sequence[Axis], start: int) -> RowMap:
    """Return where a map lies that is written row by row from ``start``; axes not in ``apart`` step over heads."""
    axes, step = [], 1
    for axis in reversed(one.axes):
        inside = any(axis is a for a in apart)
        axes.append(Axis(axis.size, 0 if inside else axis.head, step if inside else 0))
        step *= axis.size if inside else 1
    return RowMap(0, start, tuple(reversed(axes)))


@attrs.frozen
class Move:
    """Some elements of a tensor, and where they come from."""

    source: int
    here: RowMap | tuple[Indices, Indices]
    there: RowMap | tuple[Indices, Indices]


@attrs.frozen(eq=False)
class Assembly:
    """How one tensor is put together from others, and how its gradient goes back to them."""

    wanted: Holding
    moves: tuple[Move, ...]
    same: int | None
    """The source that the tensor is, if it is one."""
    slice: bool = False
    """Whether it is a view of its one source."""
    strips: Strips | None = None
    """The same as strips along one dimension, if that is what it consists of."""
    whole: Mapping[int, Strip] = attrs.field(factory=dict)
    """Where all rows of a source lie in the tensor, in its order; for sources but the first, if they lie together."""
    _index: dict[tuple[int, int, str], tuple[Tensor, Tensor]] = attrs.field(factory=dict, init=False)

    @property
    def copies(self) -> bool:
        """Whether rows may have to be copied: the tensor is no source, and no view of one."""
        return self.same is None and not self.slice

    def gather(self, sources: Sequence[Tensor], like: Tensor) -> Tensor:
        """Return the tensor ``[B, heads, rows, D]``: a source, or a view of what the sources are of, where it is one.

        ``like`` gives batch size, features, dtype and device.
        """
        if self.same is not None:
            return sources[self.same]
        if self.slice:
            move, strip = self.moves[0], None if self.strips is None else self.strips.strips[0]
            assert isinstance(move.there, RowMap)
            return _view(sources[move.source], move.there) if strip is None else strip.of(sources[strip.source])
        beside = None if self.strips is None else self.strips.view(sources)
        if beside is not None:
            return beside
        made = like.new_empty((like.shape[0], self.wanted.heads, self.wanted.length, like.shape[-1]))
        self.fill(made, sources)
        return made

    def fill(self, made: Tensor, sources: Sequence[Tensor]) -> None:
        """Write the tensor."""
        if self.strips is not None:
            self.strips.fill(made, sources)
            return
        for i, move in enumerate(self.moves):
            if isinstance(move.here, RowMap):
                assert isinstance(move.there, RowMap)
                _view(made, move.here).copy_(_view(sources[move.source], move.there))
            else:
                here, there = self._at(i, 0, made.device), self._at(i, 1, made.device)
                made[:, here[0], here[1]] = sources[move.source][:, there[0], there[1]]

    def add(self, gradient: Tensor, totals: Sequence[Tensor], but: Container[int] = ()) -> None:
        """Add the gradient of the tensor to those of its sources, ``but`` some of them, in place."""
        for i, move in enumerate(self.moves):
            if move.source in but:
                continue
            total = totals[move.source]
            if isinstance(move.here, RowMap):
                assert isinstance(move.there, RowMap)
                where = tuple((a.size, a.head, a.row) for a in move.there.axes)
                part = _view(gradient, move.here).to(total.dtype)
                views.add_rows(total, part, move.there.head, move.there.row, where)
            else:
                here, there = self._at(i, 0, gradient.device), self._at(i, 1, gradient.device)
                total[:, there[0], there[1]] += gradient[:, here[0], here[1]].to(total.dtype)

    def scatter(self, x: Tensor, targets: Sequence[Tensor]) -> None:
        """Write the tensor to where its elements come from."""
        for i, move in enumerate(self.moves):
            target = targets[move.source]
            if isinstance(move.here, RowMap):
                assert isinstance(move.there, RowMap)
                _view(target, move.there).copy_(_view(x, move.here))
            else:
                here, there = self._at(i, 0, x.device), self._at(i, 1, x.device)
                target[:, there[0], there[1]] = x[:, here[0], here[1]]

    def _at(self, i: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (i, side, str(device))
        if key not in self._index:
            arrays = self.moves[i].here if side == 0 else self.moves[i].there
            assert isinstance(arrays, tuple)
            self._index[key] = (torch.from_numpy(arrays[0]).to(device), torch.from_numpy(arrays[1]).to(device))
        return self._index[key]


def _view(x: Tensor, where: RowMap) -> Tensor:
    return views.rows(x, where.head, where.row, tuple((a.size, a.head, a.row) for a in where.axes))


@lru_cache(maxsize=4096)
def assembly(wanted: Holding, sources: tuple[Holding, ...]) -> Assembly:
    """Return how ``wanted`` is put together from tensors that hold ``sources``; the first that has a row gives it.

    Raises
    ------
    RingError
        If no source holds a row that is wanted.

    Examples
    --------
    >>> rows = RowMap(0, 4, (Axis(2, head=1), Axis(4, row=1)))
    >>> some = RowMap(0, 5, (Axis(2, head=1), Axis(2, row=2)))
    >>> assembly(Holding((some,), 2), (Holding((rows,), 2),)).moves[0].there
    RowMap(head=0, row=1, axes=(Axis(size=2, head=1, row=0), Axis(size=2, head=0, row=2)))
    """
    for i, source in enumerate(sources):
        if source == wanted:
            return Assembly(wanted, (_whole(i, wanted),), i)
    moves: list[Move] = []
    rest: list[int] = []
    for number, (one, here) in enumerate(wanted.pieces()):
        found = None if here is None else _views(one, here, sources)
        if found is None:
            rest.append(number)
        elif one.elements_count:
            moves += found
    if rest:
        moves += _by_index(wanted, sources, rest)
    return Assembly(
        wanted,
        tuple(moves),
        None,
        _is_slice(wanted, moves),
        _strips(wanted, moves),
        dict(_whole_sources(sources, moves)),
    )


def _whole_sources(sources: Sequence[Holding], moves: Sequence[Move]) -> Iterator[tuple[int, Strip]]:
    """Iterate over the sources but the first whose rows, all of them and in order, are one strip of the tensor."""
    times = Counter(move.source for move in moves)
    for move in moves:
        if move.source == 0 or times[move.source] > 1:
            continue
        here, there = (Span.of(x) if isinstance(x, RowMap) else None for x in (move.here, move.there))
        source = sources[move.source]
        if here is not None and there == Span(0, source.heads, 0, 1, source.length) and here.heads == there.heads:
            yield move.source, Strip(move.source, here.head, here.heads, here.start, here.step, here.count)


def _strips(wanted: Holding, moves: Sequence[Move]) -> Strips | None:
    """Return moves as strips along one dimension of a tensor; None if they are none, or leave gaps."""
    found: list[tuple[Span, Strip]] = []
    for move in moves:
        here, there = (Span.of(x) if isinstance(x, RowMap) else None for x in (move.here, move.there))
        if here is None or there is None or (here.heads, here.count) != (there.heads, there.count):
            return None
        if here.step != 1:
            return None
        found.append((here, Strip(move.source, there.head, there.heads, there.start, there.step, there.count)))
    by_heads = {(at.start, at.count) for at, _ in found} == {(0, wanted.length)}
    by_rows = {(at.head, at.heads) for at, _ in found} == {(0, wanted.heads)}
    if not (by_heads or by_rows):
        return None
    dim = 2 if by_rows else 1
    found.sort(key=lambda one: one[0].start if by_rows else one[0].head)
    end = 0
    for at, _ in found:
        first, size = (at.start, at.count) if by_rows else (at.head, at.heads)
        if first != end:
            return None
        end += size
    return (
        Strips(dim, tuple(strip for _, strip in found)) if end == (wanted.length if by_rows else wanted.heads) else None
    )


def _is_slice(wanted: Holding, moves: Sequence[Move]) -> bool:
    """Return whether a tensor is some rows of one source, a step apart, with its heads apart."""
    if len(moves) != 1 or not isinstance(moves[0].there, RowMap):
        return False
    return moves[0].there.sizes == (wanted.heads, wanted.length)


def _whole(source: int, held: Holding) -> Move:
    whole = RowMap(0, 0, (Axis(held.heads, head=1), Axis(held.length, row=1)))
    return Move(source, whole, whole)


def _views(one: RowMap, here: RowMap, sources: Sequence[Holding]) -> list[Move] | None:
    """Return the moves of a map as strided views, cut where it goes on in another source; None if only an index can.

    A gathered sequence lies shard by shard in the messages of its owners, and outputs that come home head by head.
    """
    moves: list[Move] = []
    while len(moves) < _MOST_VIEWS:
        found = _found(one, sources)
        if found is not None:
            return [*moves, Move(found[0], here, found[1])]
        cuts = ((axis, _prefix(one, axis, sources)) for axis in reversed(range(len(one.axes))))
        axis, size = next(((a, n) for a, n in cuts if n), (0, 0))
        found = _found(_steps(one, axis, 0, size), sources) if size else None
        if found is None:
            return None
        moves.append(Move(found[0], _steps(here, axis, 0, size), found[1]))
        one, here = (_steps(m, axis, size, m.axes[axis].size) for m in (one, here))
    return None


def _prefix(one: RowMap, axis: int, sources: Sequence[Holding]) -> int:
    """Return how many steps of an axis lie in one source, from the first on."""
    low, high = 0, one.axes[axis].size - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _found(_steps(one, axis, 0, middle), sources) else (low, middle - 1)
    return low


def _steps(rows: RowMap, axis: int, start: int, stop: int) -> RowMap:
    """Return a map with some steps of one axis."""
    along = rows.axes[axis]
    axes = (*rows.axes[:axis], attrs.evolve(along, size=stop - start), *rows.axes[axis + 1 :])
    return RowMap(rows.head + start * along.head, rows.row + start * along.row, axes)


def _found(one: RowMap, sources: Sequence[Holding]) -> tuple[int, RowMap] | None:
    """Return the source in which all elements of a map lie as a strided view, and where."""
    for i, source in enumerate(sources):
        for held, at in source.pieces():
            if at is None:
                continue
            if held == one:
                return i, at
            span = Span.of(held)
            inside = None if span is None else span.local(one)
            if span is None or inside is None:
                continue
            if source.heads > 1:
                return i, attrs.evolve(inside, row=at.row + inside.row)
            axes = tuple(Axis(a.size, 0, a.row + a.head * span.count) for a in inside.axes)
            return i, RowMap(0, at.row + inside.row + inside.head * span.count, axes)
    return None


def _by_index(wanted: Holding, sources: Sequence[Holding], pieces: Sequence[int]) -> Iterator[Move]:
    """Iterate over the moves of some pieces of ``wanted``, element by element."""
    sizes = [m.elements_count for m in wanted.maps]
    ends = np.cumsum([0, *sizes])
    which = np.concatenate([np.arange(ends[p], ends[p + 1]) for p in pieces])
    heads, rows, *here = (x[which] for x in wanted.places())
    left = np.ones(len(which), bool)
    for i, source in enumerate(sources):
        have_heads, have_rows, *there = source.places()
        stride = 1 + max(int(rows.max(initial=0)), int(have_rows.max(initial=0)))
        order = np.argsort(keys := have_heads * stride + have_rows, kind="stable")
        asked = heads * stride + rows
        at = np.searchsorted(keys[order], asked)
        hit = left & (at < len(keys))
        hit[hit] = keys[order[at[hit]]] == asked[hit]
        yield from _rounds(i, [x[hit] for x in here], [x[order[at[hit]]] for x in there])
        left &= ~hit
    if left.any():
        head, row = int(heads[left][0]), int(rows[left][0])
        raise RingError(f"row {row} of head {head} is wanted, and neither held nor received: the program is not sound")


def _rounds(source: int, here: list[Indices], there: list[Indices]) -> Iterator[Move]:
    """Split moves so that none takes one element twice: gradients are added in place."""
    while len(here[0]):
        _, first = np.unique(np.stack(there), axis=1, return_index=True)
        first.sort()
        yield Move(source, (here[0][first], here[1][first]), (there[0][first], there[1][first]))
        here, there = ([np.delete(x, first) for x in pair] for pair in (here, there))
