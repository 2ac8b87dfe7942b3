"""Patterns that single out positions: attention sinks and global tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from attnplan.errors import SpecError
from attnplan.patterns.base import Array, Pattern, Shape, digest, require, require_int

if TYPE_CHECKING:
    import numpy as np


@attrs.frozen(cache_hash=True, repr=False)
class Sinks(Pattern):
    """The first ``count`` keys, for every query."""

    count: int

    def __attrs_post_init__(self) -> None:
        require_int(self.count, "number of sinks", 1)

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        return (k < self.count) & (q == q)

    def check(self, shape: Shape) -> None:
        require(self.count <= shape.kv_len, f"sinks({self.count}) needs {self.count} keys, the spec has {shape.kv_len}")

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        return [q * 0 + self.count]

    def __repr__(self) -> str:
        return f"sinks({self.count})"


@attrs.frozen(cache_hash=True, repr=False)
class GlobalTokens(Pattern):
    """Pairs in which the query or the key is one of the global positions."""

    indices: tuple[int, ...]
    """Positions in increasing order."""

    @property
    def _table(self) -> str:
        return f"global_tokens:{digest(self.indices)}"

    @property
    def _count(self) -> int | None:
        """The n of ``global_tokens(n)``: the positions are 0 to n - 1."""
        return len(self.indices) if self.indices[-1] == len(self.indices) - 1 else None

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        if self._count is not None:
            return ((q >= 0) & (q < self._count)) | (k < self._count)
        table = tables[self._table]
        return ((q >= 0) & (table[q * (q >= 0)] > 0)) | (table[k] > 0)

    def tables(self, shape: Shape) -> dict[str, np.ndarray]:
        if self._count is not None:
            return {}
        import numpy as np

        table = np.zeros((1, shape.kv_len), dtype=np.int64)
        table[0, list(self.indices)] = 1
        return {self._table: table}

    def check(self, shape: Shape) -> None:
        require(
            self.indices[-1] < shape.kv_len,
            f"global token {self.indices[-1]} does not exist: the spec has positions 0 to {shape.kv_len - 1}",
        )

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        ends = [self._count] if self._count is not None else [j for i in self.indices for j in (i, i + 1)]
        return [q * 0 + end for end in ends]

    def __repr__(self) -> str:
        return f"global_tokens({self._count if self._count is not None else list(self.indices)})"


def sinks(n: int) -> Pattern:
    """Let every query meet the first ``n`` keys.

    Learnable sink *logits* are something else: they are a runtime operand, not a pattern.

    Raises
    ------
    SpecError
        If ``n`` is not a positive int.

    Examples
    --------
    >>> window_and_sinks = sinks(4)
    >>> window_and_sinks
    sinks(4)

    References
    ----------
    Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453.
    """
    return Sinks(n)


def global_tokens(n_or_indices: int | Sequence[int]) -> Pattern:
    """Let the global tokens meet everything, and everything meet the global tokens.

    Parameters
    ----------
    n_or_indices
        The first n positions, or a list of positions.

    Raises
    ------
    SpecError
        If there is no global token, or a position is negative or given twice.

    Examples
    --------
    >>> global_tokens(64), global_tokens([0, 512, 1024])
    (global_tokens(64), global_tokens([0, 512, 1024]))

    References
    ----------
    Beltagy et al., Longformer: The Long-Document Transformer, arXiv 2004.05150.
    """
    if isinstance(n_or_indices, int):
        require_int(n_or_indices, "number of global tokens", 1)
        return GlobalTokens(tuple(range(n_or_indices)))
    if not isinstance(n_or_indices, Iterable):
        raise SpecError(f"global_tokens needs a number or a list of positions, got {n_or_indices!r}")
    for index in n_or_indices:
        require_int(index, "a global token's position", 0)
    indices = sorted(n_or_indices)
    if not indices or len(set(indices)) != len(indices):
        raise SpecError(f"global_tokens needs distinct positions, at least one; got {list(n_or_indices)}")
    return GlobalTokens(tuple(indices))
