"""Patterns that repeat along the sequence: strided attention, and periodic columns of keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from attnplan.errors import SpecError
from attnplan.patterns.bands import full
from attnplan.patterns.base import Array, Pattern, Shape, digest, require, require_int

if TYPE_CHECKING:
    import numpy as np


@attrs.frozen(cache_hash=True, repr=False)
class Strided(Pattern):
    """Query and key whose distance is a multiple of ``stride``, in either direction."""

    stride: int

    def __attrs_post_init__(self) -> None:
        require_int(self.stride, "stride", 1)

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        return (q - k) % self.stride == 0

    @property
    def period(self) -> int:
        return self.stride

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        return []

    def __repr__(self) -> str:
        return f"strided({self.stride})"


@attrs.frozen(cache_hash=True, repr=False)
class Columns(Pattern):
    """The keys at ``indices``, or, with ``every``, those whose position modulo it is one of ``indices``."""

    indices: tuple[int, ...]
    """Positions or residues in increasing order."""
    every: int | None = None

    @property
    def _table(self) -> str:
        return f"columns:{digest((self.indices, self.every))}"

    @property
    def _run(self) -> tuple[int, int] | None:
        """First and last index where they are consecutive; then no table is needed."""
        first, last = self.indices[0], self.indices[-1]
        return (first, last) if last - first + 1 == len(self.indices) else None

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        place = k if self.every is None else k % self.every
        if self._run is not None:
            first, last = self._run
            return (place >= first) & (place <= last) & (q == q)
        return (tables[self._table][place] > 0) & (q == q)

    def tables(self, shape: Shape) -> dict[str, np.ndarray]:
        if self._run is not None:
            return {}
        import numpy as np

        table = np.zeros((1, shape.kv_len if self.every is None else self.every), dtype=np.int64)
        table[0, list(self.indices)] = 1
        return {self._table: table}

    def check(self, shape: Shape) -> None:
        require(
            self.every is not None or self.indices[-1] < shape.kv_len,
            f"key {self.indices[-1]} of columns does not exist: the spec has keys 0 to {shape.kv_len - 1}",
        )

    @property
    def period(self) -> int:
        return self.every or 1

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        if self.every is not None:
            return []
        listed = set(self.indices)
        ends = [i for i in self.indices if i - 1 not in listed] + [i + 1 for i in self.indices if i + 1 not in listed]
        return [q * 0 + end for end in ends]

    def __repr__(self) -> str:
        return f"columns({list(self.indices)}{'' if self.every is None else f', every={self.every}'})"


def strided(stride: int) -> Pattern:
    """Let query and key meet where their distance is a multiple of ``stride``.

    This is the second half of the Sparse Transformer's strided attention; the first half is a window. It looks in both
    directions; with ``causal()`` only back.

    Parameters
    ----------
    stride
        Number of positions from one key of a query to the next; 1 is :func:`full`.

    Raises
    ------
    SpecError
        If ``stride`` is not a positive int.

    Examples
    --------
    >>> strided(128)
    strided(128)

    References
    ----------
    Child et al., Generating Long Sequences with Sparse Transformers, arXiv 1904.10509, section 4.3.
    """
    require_int(stride, "stride", 1)
    return Strided(stride) if stride > 1 else full()


def columns(indices: Sequence[int], every: int | None = None) -> Pattern:
    """Let every query meet the listed keys: vertical lines of the mask.

    Unlike :func:`global_tokens`, the listed positions get no more keys as queries than others do.

    Parameters
    ----------
    indices
        Key positions; with ``every``, residues below it.
    every
        If given, the columns repeat: key k is met where ``k % every`` is listed.

    Raises
    ------
    SpecError
        If there is no column, an index is negative or given twice, or a residue is not below ``every``; in a spec, if
        a listed key does not exist.

    Examples
    --------
    >>> columns([0, 17, 96]), columns([6, 7], every=8)
    (columns([0, 17, 96]), columns([6, 7], every=8))

    References
    ----------
    Child et al., arXiv 1904.10509 (periodic); Jiang et al., MInference 1.0, arXiv 2407.02490 (listed).
    """
    if isinstance(indices, str | int) or not isinstance(indices, Iterable):
        raise SpecError(f"columns needs a list of key positions, got {indices!r}")
    listed = [int(i) if hasattr(i, "__index__") and not isinstance(i, bool) else i for i in indices]
    for index in listed:
        require_int(index, "position of a column", 0)
    if not listed or len(set(listed)) != len(listed):
        raise SpecError(f"columns needs distinct positions, at least one; got {listed}")
    if every is not None:
        require_int(every, "period of columns", 1)
        require(max(listed) < every, f"columns every {every} keys are residues below {every}, got {max(listed)}")
    return Columns(tuple(sorted(listed)), every)
