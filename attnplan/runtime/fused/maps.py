"""Row maps as the fused kernels read them: small tables of int64, made once for each layout of the tensors.

A part is some rows of a whole tensor ``[B, H, S, D]``, by an affine map. Gathering walks a map forwards: each batch
index of it is a *cell*, ``(head, first row, row step)``. Pulling walks it backwards: for a head and a row of the whole
it asks which index of the part that is, if any. Along the axes that move the head there is at most one index for each
head, so it is tabled; along those that move rows only it is two divisions, and short axes beyond two are tabled.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import gcd, prod

import attrs

from attnplan.runtime.views import Axes

Place = tuple[int, int, Axes]
"""First head, first row, and axes as (size, head step, row step)."""
FIELDS = 18
"""Numbers of each (head, entry): see :func:`pull_table`."""
LARGEST_UNIT = 16
"""Elements in which offsets may be counted; offsets from one tensor to another are, too."""
_NARROW = 2**31


@attrs.frozen
class Packing:
    """How the parts of one launch lie in one tensor ``[N, M, R, D]``: the batch and a part's cells are N."""

    places: tuple[Place, ...]
    """The row map of each part."""
    own: tuple[tuple[int, ...], ...]
    """The batch axes of each part that make cells, outermost first."""
    inner: tuple[tuple[int, ...], ...]
    """Those that are M, outermost first: those along which queries share keys, and of a view maybe others."""

    @property
    def group(self) -> int:
        """M, which is equal in all parts; where keys are shared it is 1 in the packing of the keys."""
        return prod(self.places[0][2][a][0] for a in self.inner[0])

    def order(self, part: int) -> tuple[int, ...]:
        """Return the batch axes of a part, outermost first."""
        return self.own[part] + self.inner[part]

    def cells(self, part: int) -> int:
        """Return the number of cells of a part, for one batch element."""
        return prod(self.places[part][2][a][0] for a in self.own[part])

    def starts(self) -> list[int]:
        """Return the first cell of each part, and the number of all."""
        found = [0]
        for part in range(len(self.places)):
            found.append(found[-1] + self.cells(part))
        return found

    def table(self) -> list[tuple[int, int, int]]:
        """Return (head, first row, row step) of each n and m, in the order of the buffer, for one batch element.

        Examples
        --------
        Rows 1 and 3 of heads 0 and 1:

        >>> Packing(((0, 1, ((2, 1, 0), (2, 0, 2))),), ((0,),), ((),)).table()
        [(0, 1, 2), (1, 1, 2)]
        """
        found = []
        for part, (head, row, axes) in enumerate(self.places):
            order = self.order(part)
            for index in product(*(range(axes[a][0]) for a in order)):
                steps = [(i, *axes[a][1:]) for i, a in zip(index, order, strict=True)]
                at = (head + sum(i * h for i, h, _ in steps), row + sum(i * r for i, _, r in steps))
                found.append((*at, axes[-1][2]))
        return found


@attrs.frozen
class Source:
    """Where a part's numbers lie: in a tensor of its own, or in the buffer of a launch."""

    tensor: int
    """Index of the tensor among those of the call."""
    place: Place
    packing: Packing | None = None
    """The packing of the launch; None where the tensor is ``[B, *sizes, ...]``."""
    part: int = 0
    """Index of the part in the packing."""

    def steps(self, strides: Sequence[int]) -> tuple[int, int, tuple[int, ...]]:
        """Return (batch stride, offset, stride of each axis) in elements, given the strides of the tensor."""
        axes = self.place[2]
        if self.packing is None:
            return strides[0], 0, tuple(strides[1 : 1 + len(axes)])
        starts, order = self.packing.starts(), self.packing.order(self.part)
        found = dict.fromkeys(range(len(axes)), 0)
        by_cell, by_inner = strides[0], strides[1]
        for axis in reversed(order):
            if axis in self.packing.inner[self.part]:
                found[axis], by_inner = by_inner, by_inner * axes[axis][0]
            else:
                found[axis], by_cell = by_cell, by_cell * axes[axis][0]
        found[len(axes) - 1] = strides[2]
        return starts[-1] * strides[0], starts[self.part] * strides[0], tuple(found.values())


def row_axes(place: Place) -> list[tuple[int, int, int]]:
    """Return the axes of a map that move rows only, as (size, row step, index), the longest steps first."""
    found = [(n, r, i) for i, (n, h, r) in enumerate(place[2]) if h == 0 and n > 1]
    return sorted(found, key=lambda a: -a[1])


def walked(place: Place) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Return the axes of which each index is tabled, and at most two others, as (size, row step, index).

    Tabled are those that move the head, and the shortest of those that move rows only, beyond two.
    """
    over = row_axes(place)
    longest = sorted(over, key=lambda a: -a[0])[:2]
    tabled = [i for i, (_, h, _) in enumerate(place[2]) if h]
    return tabled + [a[2] for a in over if a not in longest], [a for a in over if a in longest]


def can_pull(place: Place) -> bool:
    """Return whether a map can be walked backwards: none of the axes that move rows only shows a row again.

    Examples
    --------
    >>> can_pull((0, 0, ((2, 1, 0), (4, 0, 8), (4, 0, 2))))
    True
    >>> can_pull((0, 0, ((4, 0, 4), (8, 0, 1))))  # rows of neighbouring chunks overlap
    False
    """
    axes, reach = row_axes(place), 0
    for size, step, _ in reversed(axes):
        if step <= reach:
            return False
        reach += step * (size - 1)
    return True


def division(divisor: int) -> tuple[int, int]:
    """Return (factor, shift) such that ``n // divisor == 2 * n * factor >> 32 >> shift`` for 0 <= n < 2^31.

    Both ``2 * n`` and the factor have 32 bits, so it is the upper half of one product of 32 by 32 bits.

    References
    ----------
    Granlund and Montgomery, Division by invariant integers using multiplication, PLDI 1994.

    Examples
    --------
    >>> factor, shift = division(7)
    >>> [2 * n * factor >> 32 >> shift for n in (6, 7, 13, 14, 2**31 - 1)] == [0, 1, 1, 2, (2**31 - 1) // 7]
    True
    """
    shift = (divisor - 1).bit_length()
    return (1 << (31 + shift)) // divisor + 1, shift


@attrs.frozen
class PullTable:
    """What the kernel looks up: :data:`FIELDS` numbers of each head and entry."""

    numbers: list[int]
    entries: int
    """Entries of each head: as many as there are parts of the head that has the most."""
    tensors: tuple[int, ...]
    """For each entry the first tensor that it may point into, and the one behind the last."""
    unit: int
    """Elements in which offsets and strides of outputs are counted."""
    wide: bool
    """Whether some numbers, or offsets that are made of them, need 64 bits."""


def pull_table(
    sources: Sequence[Source],
    strides: Sequence[tuple[Sequence[int], Sequence[int]]],
    heads: int,
    length: int,
    weights: Sequence[int] | None = None,
) -> PullTable:
    """Return the numbers by which a kernel walks maps backwards.

    An entry is ``tensor, first row, n1, w, division by w (2), n2, r, division by r (2), offset, batch stride,
    s1, s2``, then of the LSE ``offset, batch stride, s1, s2``; with weights, the bits of one in the place of the LSE's
    offset. Row ``first + w * i + r * j`` lies at ``offset + s1 * i + s2 * j``.

    Parameters
    ----------
    sources
        The parts.
    strides
        The strides of the output and of the LSE of each part, in elements.
    heads, length
        H and S of the whole tensor.
    weights
        The bits of a float32 for each part, where parts have constant weights and no LSE.
    """
    of_head: list[list[list[int]]] = [[] for _ in range(heads)]
    for number, (source, (by_out, by_lse)) in enumerate(zip(sources, strides, strict=True)):
        head, row, axes = source.place
        out, lse = source.steps(by_out), source.steps(by_lse)
        moving, over = walked(source.place)
        nothing = [(1, length + 1, 0, 0)]  # a step beyond the last row: the quotient of every row is 0
        (n1, w, s1, t1), (n2, r, s2, t2) = nothing * (2 - len(over)) + [
            (n, step, out[2][a], lse[2][a]) for n, step, a in over
        ]
        for index in product(*(range(axes[a][0]) for a in moving)):
            pairs = list(zip(index, moving, strict=True))
            first = row + sum(i * axes[a][2] for i, a in pairs)
            place = [out[1] + sum(i * out[2][a] for i, a in pairs), out[0], s1, s2]
            last = [lse[1] + sum(i * lse[2][a] for i, a in pairs), lse[0], t1, t2]
            if weights is not None:
                last = [weights[number], 0, 0, 0]
            entry = [source.tensor, first, n1, w, *division(w), n2, r, *division(r), *place, *last]
            of_head[head + sum(i * axes[a][1] for i, a in pairs)].append(entry)
    return _table(of_head)


def _table(of_head: list[list[list[int]]]) -> PullTable:
    count = max(len(found) for found in of_head)
    none = [0, 0, 0, 1, *division(1), 0, 1, *division(1), *[0] * 8]  # holds no row: n1 is 0
    every = [e for found in of_head for e in found]
    unit = gcd(LARGEST_UNIT, *(n for e in every for n in e[10:14]))
    for e in every:
        e[10:14] = [n // unit for n in e[10:14]]
    slots = [[found[i][0] for found in of_head if i < len(found)] for i in range(count)]
    tensors = tuple(n for slot in slots for n in (min(slot), max(slot) + 1))
    reach = max(max(e[2] * e[12] + e[6] * e[13], e[2] * e[16] + e[6] * e[17], *e[10:12], *e[14:16]) for e in every)
    numbers = [n for found in of_head for e in [*found, *[none] * (count - len(found))] for n in e]
    return PullTable(numbers, count, tensors, unit, wide=reach >= _NARROW)
