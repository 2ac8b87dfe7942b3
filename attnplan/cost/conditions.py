"""What it takes to ask a predicate about all pairs of a mask: every array that its arithmetic makes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any, cast

import attrs

from attnplan.cost.along import INDEX, Along
from attnplan.ir import RowMap
from attnplan.patterns import Pattern, Shape
from attnplan.patterns.base import Array
from attnplan.patterns.custom import asks_function


@attrs.define
class _Meter:
    """Bytes of the arrays that are alive, and the most that ever were."""

    elements: Callable[[frozenset[str]], int]
    """How many elements an array has that changes along some of ``"h"``, ``"q"`` and ``"k"``."""
    live: int = 0
    top: int = 0

    def add(self, size: int) -> None:
        self.live += size
        self.top = max(self.top, self.live)


class _Counted(Along):
    """Stands for an array that is alive as long as this is.

    Whatever is no arithmetic, such as to index a table by it, raises, so that nothing goes uncounted.
    """

    __slots__ = ("meter", "size")

    def __init__(self, axes: frozenset[str], item: int, meter: _Meter) -> None:
        super().__init__(axes, item)
        self.meter, self.size = meter, meter.elements(axes) * item
        meter.add(self.size)

    def __del__(self) -> None:
        self.meter.live -= self.size

    def made(self, axes: frozenset[str], item: int, other: object) -> Any:
        """Return what stands for the array that is made of this one and another operand."""
        if other is not None and not isinstance(other, _Counted | int | float):
            raise TypeError(f"the arrays that {type(other).__name__} makes of an index are not known")
        return _Counted(axes, item, self.meter)


@lru_cache(maxsize=256)
def predicate_bytes(where: Pattern, q: RowMap, k: RowMap, shape: Shape) -> int | None:
    """Return the most bytes alive while a predicate is asked about all pairs of some rows, its answer included.

    None where that is not known: the condition holds no predicate, or it reads a table, or the function does more than
    arithmetic.

    Examples
    --------
    >>> from attnplan.patterns import mask
    >>> rows, shape = RowMap.whole(1, 64), Shape(64, 64, 1)
    >>> some = mask(lambda h, q, k: (q + k) % 3 == 0)
    >>> predicate_bytes(some, rows, rows, shape) // 64**2  # the sum, and what is left of it
    16
    """
    if where.operands or not asks_function(where) or where.tables(shape):
        return None

    def elements(axes: frozenset[str]) -> int:
        apart = (a.size for a in q.batch if ("h" in axes and a.head) or (axes & {"q", "k"} and a.row))
        return prod(apart) * (q.length if "q" in axes else 1) * (k.length if "k" in axes else 1)

    meter = _Meter(elements)
    h, row, key = (_Counted(frozenset(name), INDEX, meter) for name in "hqk")
    try:
        where.pairs({}, cast(Array, h), cast(Array, row), cast(Array, key))
    except Exception:  # it is the user's, and was asked about arrays before: here it only meets what it cannot do
        return None
    return meter.top
