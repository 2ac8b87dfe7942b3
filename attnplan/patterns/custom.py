"""Patterns given by a Python function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import attrs

from attnplan.errors import SpecError
from attnplan.patterns.base import Array, Pattern

if TYPE_CHECKING:
    import numpy as np


@attrs.frozen(cache_hash=True, repr=False)
class Mask(Pattern):
    """The pairs for which a function returns True. Equal to another only if the function is the same object."""

    fn: Callable[[Array, Array, Array], Array] = attrs.field(eq=id)

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        result = self.fn(h, q, k)
        if str(getattr(result, "dtype", "")).rpartition(".")[2] != "bool":
            got = getattr(result, "dtype", type(result).__name__)
            raise SpecError(
                f"the function of {self!r} must return booleans computed from its integer arguments h, q, k; got {got}"
            )
        return result & (q == q) & (k == k)

    def head_key(self, h: int) -> tuple[object, ...]:
        return (h,)

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        return None

    def __repr__(self) -> str:
        name = getattr(self.fn, "__qualname__", type(self.fn).__name__)
        return f"mask(<{name} at {id(self.fn):#x}>)"


def mask(fn: Callable[[Array, Array, Array], Array]) -> Pattern:
    """Use a function ``fn(h, q, k)`` of head, query position and key position as a pattern.

    The function gets integer arrays that broadcast together and must return booleans, built with operators and
    indexing only. Two such patterns are equal only if the function is the same object, and such a pattern cannot be
    saved; prefer the built-in algebra, which plans faster and can be proved.

    Raises
    ------
    SpecError
        If ``fn`` is not callable, or when it is evaluated and returns anything but booleans.

    Examples
    --------
    >>> even = mask(lambda h, q, k: (q + k) % 2 == 0)
    >>> even == even
    True
    """
    if not callable(fn):
        raise SpecError(f"mask needs a function fn(h, q, k), got {fn!r}")
    return Mask(fn)
