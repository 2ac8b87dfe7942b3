"""Patterns that depend on the distance between query and key only: everything, causal, windows."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from attnplan.patterns.base import Array, Pattern, require, require_int

if TYPE_CHECKING:
    import numpy as np


@attrs.frozen(cache_hash=True, repr=False)
class Full(Pattern):
    """Every pair."""

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        return (q == q) & (k == k)  # derived from q and k: a Python True would break ~ and vmap

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        return []

    def __repr__(self) -> str:
        return "full()"


@attrs.frozen(cache_hash=True, repr=False)
class Band(Pattern):
    """Keys from ``left`` before the query to ``right`` after it, both ends included; None is no limit.

    A negative side lies beyond the query: ``Band(None, -5)`` leaves out the nearest keys.
    """

    left: int | None
    right: int | None

    def __attrs_post_init__(self) -> None:
        for name, value in (("left", self.left), ("right", self.right)):
            if value is not None:
                require_int(value, f"window {name}", -sys.maxsize)
        require(
            self.left is None or self.right is None or self.left + self.right >= 0,
            f"band({self.left}, {self.right}) holds no key: it ends before it begins",
        )

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        result = (q == q) & (k == k)
        if self.left is not None:
            result = result & (k >= q - self.left)
        if self.right is not None:
            result = result & (k <= q + self.right)
        return result

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        left = [] if self.left is None else [q - self.left]
        return left if self.right is None else [*left, q + self.right + 1]

    def __repr__(self) -> str:
        if (self.left, self.right) == (None, 0):
            return "causal()"
        if self.left is None or self.right is None or min(self.left, self.right) < 0:
            return f"band({self.left}, {self.right})"
        return f"window({self.left})" if self.left == self.right else f"window({self.left}, {self.right})"


def full() -> Pattern:
    """Let every query meet every key.

    Examples
    --------
    >>> full()
    full()
    """
    return Full()


def causal() -> Pattern:
    """Let a query meet the keys at or before its own position.

    Query row i has position ``i + kv_len - seq_len``, so the last query sees every key (bottom-right alignment).

    Examples
    --------
    >>> causal() & window(2)
    causal() & window(2)
    """
    return Band(None, 0)


def window(left: int, right: int | None = None) -> Pattern:
    """Let a query meet the keys from ``left`` before it to ``right`` after it, both ends included.

    Parameters
    ----------
    left
        Number of keys before the query's own position.
    right
        Number of keys after it; the default is ``left``.

    Raises
    ------
    SpecError
        If a side is negative or no int.

    Examples
    --------
    >>> window(4096), window(4096, 0)
    (window(4096), window(4096, 0))

    References
    ----------
    The convention is that of flash-attn's ``window_size=(left, right)``.
    """
    require_int(left, "window left", 0)
    if right is not None:
        require_int(right, "window right", 0)
    return Band(left, left if right is None else right)


def band(left: int | None, right: int | None) -> Pattern:
    """Let a query meet the keys from ``left`` before its position to ``right`` after it, both ends included.

    Parameters
    ----------
    left, right
        Ends of the band, None for no limit. A negative end lies on the other side of the query, so that a band may
        leave out the query's own position: it holds the keys k with ``-left <= k - q <= right``.

    Raises
    ------
    SpecError
        If an end is no int, or the band ends before it begins.

    Examples
    --------
    >>> band(None, 0), band(8, None)
    (causal(), band(8, None))

    Everything but the last four keys up to the query:

    >>> band(None, -5)
    band(None, -5)
    """
    return Full() if left is None and right is None else Band(left, right)
