"""Keys and values as hops attend to them, put together once for all ranks of a process that attend to the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from torch import Tensor

from attnplan.runtime.ring.rows import Holding

Asked = tuple[int, Holding]
"""A hop, and what its store holds."""


class Stores:
    """The stores of one call of a ring whose ranks are all in this process.

    A store that several ranks assemble from the same rows is made by the first of them, as each would make its own: the
    numbers and the strides are the same, so the kernels' results are, too. It lies there until the last has taken it,
    which is no longer than one rank's store would if ranks made theirs one after the other.

    Parameters
    ----------
    asked
        What each rank assembles, one after the other.
    """

    def __init__(self, asked: Iterable[Asked]) -> None:
        self._left = Counter((one, i) for one in asked for i in range(2))
        self._made: dict[tuple[Asked, int], Tensor] = {}

    def take(self, asked: Asked, i: int, make: Callable[[], Tensor]) -> Tensor:
        """Return the keys (i = 0) or values (i = 1) of a store, made if no rank made them; nobody may write to them."""
        key = (asked, i)
        made = self._made.get(key)
        if made is None:
            made = make()
        self._left[key] -= 1
        if self._left[key] > 0:
            self._made[key] = made
        else:
            self._made.pop(key, None)
        return made
