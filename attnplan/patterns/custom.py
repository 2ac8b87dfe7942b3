"""Patterns given by a Python function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import attrs

from attnplan.errors import SpecError
from attnplan.patterns.base import Array, Pattern, Shape

if TYPE_CHECKING:
    import numpy as np

_PROBED = 7
"""Positions of each side at which a function is tried."""


@attrs.frozen(cache_hash=True, repr=False)
class Mask(Pattern):
    """The pairs for which a function returns True. Equal to another only if the function is the same object."""

    fn: Callable[[Array, Array, Array], Array] = attrs.field(eq=id)

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        return _beside(self._booleans(self.fn(h, q, k)), q) & (q == q) & (k == k)

    def _booleans(self, result: Array) -> Array:
        if str(getattr(result, "dtype", "")).rpartition(".")[2] != "bool":
            got = getattr(result, "dtype", type(result).__name__)
            raise SpecError(
                f"the function of {self!r} must return booleans computed from its integer arguments h, q, k; got {got}"
            )
        return result

    def check(self, shape: Shape) -> None:
        """Try the function at a few pairs; raise :class:`~attnplan.errors.SpecError` unless it is a pure rule."""
        import numpy as np

        heads, queries, keys = (
            _spread(first, count)
            for first, count in ((0, shape.heads), (shape.shift, shape.seq_len), (0, shape.kv_len))
        )
        grid = heads[:, None, None], queries[:, None], keys
        size = (len(heads), len(queries), len(keys))
        state = _enclosed(self.fn)
        first, second = self._tried(*grid, size), self._tried(*grid, size)
        if not np.array_equal(first, second):
            raise SpecError(
                f"the function of {self!r} gave two answers to one question: it depends on something besides h, q and "
                "k, such as a random generator or a counter. Draw the choice once, before, and index into it, or use "
                "random_blocks(keep, seed=...)"
            )
        if _enclosed(self.fn) != state:
            raise SpecError(
                f"the function of {self!r} changes a variable outside of it: it is asked as often as a plan likes, in "
                "any order. Leave the side effect out"
            )
        for place in _diagonal(size):
            h, q, k = (axis[i : i + 1].reshape(()) for axis, i in zip((heads, queries, keys), place, strict=True))
            if self._tried(h, q, k, ())[()] != first[place]:
                raise SpecError(
                    f"the function of {self!r} says {not first[place]} for h={h}, q={q}, k={k} asked alone and "
                    f"{first[place]} asked together with others: each pair must be decided by its own h, q and k. "
                    "Leave out reductions, sorting and the arrays' shapes"
                )

    def _tried(self, h: np.ndarray, q: np.ndarray, k: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        """Return what the function says, ``size``, or raise with the reason why it cannot be used."""
        import numpy as np

        given = h.copy(), q.copy(), k.copy()
        try:
            result = self.fn(*given)
        except Exception as error:
            raise SpecError(
                f"the function of {self!r} fails on integer arrays h {h.shape}, q {q.shape} and k {k.shape} "
                f"({type(error).__name__}: {error}). It must decide many pairs at once: write & | ~ for and, or, not, "
                "and arithmetic or indexing for if"
            ) from error
        if not all(np.array_equal(a, b) for a, b in zip(given, (h, q, k), strict=True)):
            raise SpecError(
                f"the function of {self!r} writes to its arguments; let it make new arrays (q + 1, not q += 1)"
            )
        said = _beside(self._booleans(result), q)
        try:
            return np.broadcast_to(said, size)
        except ValueError:
            raise SpecError(
                f"the function of {self!r} returns booleans of shape {said.shape} where h, q and k broadcast "
                f"to {size}: one answer per pair is needed"
            ) from None

    def head_key(self, h: int) -> tuple[object, ...]:
        return (h,)

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        return None

    def __repr__(self) -> str:
        name = getattr(self.fn, "__qualname__", type(self.fn).__name__)
        return f"mask(<{name} at {id(self.fn):#x}>)"


def asks_function(where: Pattern) -> bool:
    """Return whether a Python function decides some pairs of a condition."""
    return any(isinstance(part, Mask) for part in where.walk())


def _beside(result: Array, q: Array) -> Array:
    """Return booleans as an array of the library of ``q``: a function may index into a table of another one."""
    if hasattr(q, "new_tensor"):
        return result if hasattr(result, "detach") else q.new_tensor(result) > 0
    return result.detach().cpu().numpy() if hasattr(result, "detach") else result


def _enclosed(fn: object) -> list[object]:
    """Return what can be seen at little cost of the variables that a function encloses: values and lengths."""
    seen: list[object] = []
    for cell in getattr(fn, "__closure__", None) or ():
        try:
            value = cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
        plain = isinstance(value, bool | int | float | str)
        seen.append(value if plain else len(value) if isinstance(value, list | dict | set) else None)
    return seen


def _spread(first: int, count: int) -> np.ndarray:
    """Return some of ``count`` numbers from ``first`` on, the ends and neighbours among them."""
    import numpy as np

    some = {0, 1, 2, count // 3, count // 2, count - 2, count - 1}
    return np.array(sorted(i + first for i in some if 0 <= i < count)[:_PROBED], dtype=np.int64)


def _diagonal(size: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Return a few places that meet every index of the longer axes."""
    heads, queries, keys = size
    return [(i % heads, i % queries, (i * 3 + 1) % keys) for i in range(max(queries, keys))]


def mask(fn: Callable[[Array, Array, Array], Array]) -> Pattern:
    """Use a function ``fn(h, q, k)`` of head, query position and key position as a pattern.

    The function gets integer arrays that broadcast together and must return booleans, built with operators and
    indexing only. Two such patterns are equal only if the function is the same object, and such a pattern cannot be
    saved; prefer the built-in algebra, which plans faster and can be proved.

    Raises
    ------
    SpecError
        If ``fn`` is not callable. In a spec, where the function is tried at a few pairs: if it raises, returns
        anything but booleans or another shape, writes to its arguments, answers twice differently, or decides a pair
        by more than its own h, q and k.

    Examples
    --------
    >>> even = mask(lambda h, q, k: (q + k) % 2 == 0)
    >>> even == even
    True
    """
    if not callable(fn):
        raise SpecError(f"mask needs a function fn(h, q, k), got {fn!r}")
    return Mask(fn)
