"""Along which axes a condition changes, found without an array: importing numpy takes longer than a small plan."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import attrs

from attnplan.patterns import Pattern, Shape
from attnplan.patterns.base import Array
from attnplan.patterns.custom import Mask


@attrs.frozen(eq=False)
class _Along:
    """Stands for an array in the arithmetic of a condition, and knows only along which axes that array changes."""

    axes: frozenset[str]

    def _joined(self, other: object = None) -> Any:
        return _Along(self.axes | other.axes) if isinstance(other, _Along) else self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __floordiv__ = __mod__ = _joined
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _joined
    __lt__ = __le__ = __gt__ = __ge__ = _joined
    __eq__ = __ne__ = _joined
    __neg__ = __invert__ = __abs__ = _joined
    __hash__ = None  # type: ignore[assignment]

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
    if where.operands or any(isinstance(part, Mask) for part in where.walk()) or where.tables(shape):
        return _asked(where, shape)
    h, q, k = (cast(Array, _Along(frozenset(name))) for name in "hqk")
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
