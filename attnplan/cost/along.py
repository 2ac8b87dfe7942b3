"""Along which axes a condition changes, found without an array: importing numpy takes longer than a small plan."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

from attnplan.patterns import Pattern, Shape
from attnplan.patterns.base import Array
from attnplan.patterns.custom import asks_function

INDEX, BOOLEAN = 8, 1
"""Bytes of an index or of what arithmetic makes of some, and of an answer."""


class Along:
    """Stands for an array in the arithmetic of a condition, and knows along which axes that array changes."""

    __slots__ = ("axes", "item")

    def __init__(self, axes: frozenset[str], item: int = INDEX) -> None:
        self.axes, self.item = axes, item

    @property
    def dtype(self) -> str:
        """The dtype, by which a mask knows that a function answers in booleans."""
        return "bool" if self.item == BOOLEAN else "int64"

    def made(self, axes: frozenset[str], item: int, other: object) -> Any:
        """Return what stands for the array that is made of this one and another operand, None if there is no other."""
        return Along(axes, item)

    def _made(self, item: int, other: object = None) -> Any:
        return self.made(self.axes | other.axes if isinstance(other, Along) else self.axes, item, other)

    def _number(self, other: object = None) -> Any:
        return self._made(INDEX, other)

    def _answer(self, other: object) -> Any:
        return self._made(BOOLEAN, other)

    def _joined(self, other: object) -> Any:
        alike = isinstance(other, bool) or (isinstance(other, Along) and other.item == BOOLEAN)
        return self._made(BOOLEAN if alike and self.item == BOOLEAN else INDEX, other)

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
def mask_axes(where: Pattern, shape: Shape) -> tuple[bool, bool, bool]:
    """Return whether the mask of a condition has an axis of heads, of queries and of keys.

    Examples
    --------
    >>> from attnplan.patterns import Shape, causal, sinks
    >>> mask_axes(causal() & sinks(4), Shape(8, 8, 2))
    (False, True, True)
    """
    if where.operands or asks_function(where) or where.tables(shape):
        return _asked(where, shape)
    h, q, k = (cast(Array, Along(frozenset(name))) for name in "hqk")
    found: Any = where.pairs({}, h, q, k)
    return "h" in found.axes and shape.heads > 1, "q" in found.axes, "k" in found.axes


def _asked(where: Pattern, shape: Shape) -> tuple[bool, bool, bool]:
    """Return the same by asking for a few pairs."""
    import numpy as np

    from attnplan.patterns.counts import Table

    zero = np.zeros((1, shape.kv_len), dtype=np.int64)
    tables = {name: Table(t) for name, t in where.tables(shape).items()}
    tables |= {name: Table(zero) for name in where.operands}
    heads, two = np.arange(min(2, shape.heads)).reshape(-1, 1, 1), np.zeros(2, dtype=np.int64)  # a row there always is
    found = np.shape(where.pairs(tables, heads, two.reshape(1, 2, 1), two.reshape(1, 1, 2)))
    sizes = (1,) * (3 - len(found)) + found
    return sizes[-3] > 1, sizes[-2] > 1, sizes[-1] > 1
