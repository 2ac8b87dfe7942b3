"""What it takes to ask a predicate about all pairs of a mask: every array that its arithmetic makes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any, cast

import attrs

from attnplan.ir import RowMap
from attnplan.patterns import Pattern, Shape
from attnplan.patterns.base import Array
from attnplan.patterns.custom import Mask

_INDEX, _BOOLEAN = 8, 1
"""Bytes of an index or of what arithmetic makes of some, and of an answer."""


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


class _Counted:
    """Stands for an array in the arithmetic of a condition: it is alive as long as the array would be.

    Whatever is no arithmetic, such as to index a table by it, raises, so that nothing goes uncounted.
    """

    __slots__ = ("axes", "item", "meter", "size")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, axes: frozenset[str], item: int, meter: _Meter) -> None:
        self.axes, self.item, self.meter = axes, item, meter
        self.size = meter.elements(axes) * item
        meter.add(self.size)

    def __del__(self) -> None:
        self.meter.live -= self.size

    @property
    def dtype(self) -> str:
        """The dtype, by which a mask knows that a function answers in booleans."""
        return "bool" if self.item == _BOOLEAN else "int64"

    def _made(self, item: int, other: object = None) -> Any:
        if other is not None and not isinstance(other, _Counted | int | float):
            raise TypeError(f"the arrays that {type(other).__name__} makes of an index are not known")
        both = self.axes | other.axes if isinstance(other, _Counted) else self.axes
        return _Counted(both, item, self.meter)

    def _number(self, other: object = None) -> Any:
        return self._made(_INDEX, other)

    def _answer(self, other: object) -> Any:
        return self._made(_BOOLEAN, other)

    def _joined(self, other: object) -> Any:
        alike = isinstance(other, bool) or (isinstance(other, _Counted) and other.item == _BOOLEAN)
        return self._made(_BOOLEAN if alike and self.item == _BOOLEAN else _INDEX, other)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = __abs__ = _number
    __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _number
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _number
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _joined
    __lt__ = __le__ = __gt__ = __ge__ = _answer
    __eq__ = __ne__ = _answer

    def __invert__(self) -> Any:
        return self._made(self.item)

    def __bool__(self) -> bool:
        raise TypeError("a condition is computed for many pairs at once and cannot be branched on")


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
    if where.operands or not any(isinstance(part, Mask) for part in where.walk()) or where.tables(shape):
        return None

    def elements(axes: frozenset[str]) -> int:
        apart = (a.size for a in q.batch if ("h" in axes and a.head) or (axes & {"q", "k"} and a.row))
        return prod(apart) * (q.length if "q" in axes else 1) * (k.length if "k" in axes else 1)

    meter = _Meter(elements)
    h, row, key = (_Counted(frozenset(name), _INDEX, meter) for name in "hqk")
    try:
        where.pairs({}, cast(Array, h), cast(Array, row), cast(Array, key))
    except Exception:  # it is the user's, and was asked about arrays before: here it only meets what it cannot do
        return None
    return meter.top
