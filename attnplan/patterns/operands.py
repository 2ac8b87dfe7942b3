"""Patterns whose data may arrive with the call: packed documents and key padding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING

import attrs

from attnplan.errors import SpecError
from attnplan.patterns.bands import full
from attnplan.patterns.base import And, Array, Pattern, Shape, digest, require, require_int

if TYPE_CHECKING:
    import numpy as np


def _frozen_lengths(lengths: Sequence[int] | None, what: str, least: int) -> tuple[int, ...] | None:
    if lengths is None:
        return None
    if isinstance(lengths, str | int) or not isinstance(lengths, Iterable):
        raise SpecError(f"{what} lengths must be a list of ints, got {lengths!r}")
    frozen = tuple(int(n) if hasattr(n, "__index__") else n for n in lengths)
    for n in frozen:
        require_int(n, f"{what} length", least)
    if not frozen:
        raise SpecError(f"{what} lengths must not be empty; leave them out to pass them with each call")
    return frozen


@attrs.frozen(cache_hash=True, repr=False)
class Documents(Pattern):
    """Query and key in the same document of a packed sequence."""

    lengths: tuple[int, ...] | None

    @property
    def _table(self) -> str:
        return "documents" if self.lengths is None else f"documents:{digest(self.lengths)}"

    @property
    def operands(self) -> frozenset[str]:
        return frozenset({"documents"} if self.lengths is None else ())

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        table = tables[self._table]
        return table[q] == table[k]

    def tables(self, shape: Shape) -> dict[str, np.ndarray]:
        if self.lengths is None:
            return {}
        import numpy as np

        return {self._table: np.repeat(np.arange(len(self.lengths)), self.lengths)[None]}

    def check(self, shape: Shape) -> None:
        require(
            shape.seq_len <= shape.kv_len,
            f"documents need a position for every query: seq_len={shape.seq_len} exceeds kv_len={shape.kv_len}",
        )
        if self.lengths is not None:
            require(
                sum(self.lengths) == shape.kv_len,
                f"document lengths sum to {sum(self.lengths)}, but the keys are {shape.kv_len}; add the padding as a "
                "document of its own",
            )

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        if self.lengths is None:
            return None
        import numpy as np

        ends = np.cumsum(self.lengths)
        document = np.searchsorted(ends, q, side="right")
        return [ends[document] - np.asarray(self.lengths)[document], ends[document]]

    def __repr__(self) -> str:
        return f"documents({'' if self.lengths is None else list(self.lengths)})"


@attrs.frozen(cache_hash=True, repr=False)
class Padding(Pattern):
    """Keys that are real, not padding."""

    lengths: tuple[int, ...] | None

    @property
    def _table(self) -> str:
        return "key_padding" if self.lengths is None else f"key_padding:{digest(self.lengths)}"

    @property
    def operands(self) -> frozenset[str]:
        return frozenset({"key_padding"} if self.lengths is None else ())

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        return (tables[self._table][k] > 0) & (q == q)

    def tables(self, shape: Shape) -> dict[str, np.ndarray]:
        if self.lengths is None:
            return {}
        import numpy as np

        return {self._table: (np.arange(shape.kv_len) < np.asarray(self.lengths)[:, None]).astype(np.int64)}

    def check(self, shape: Shape) -> None:
        if self.lengths is not None:
            require(
                len(self.lengths) == shape.batch,
                f"padding has {len(self.lengths)} lengths for batch={shape.batch}; give one per batch element, or "
                "none, to pass key_padding with each call",
            )
            require(
                max(self.lengths) <= shape.kv_len,
                f"padding length {max(self.lengths)} exceeds the {shape.kv_len} keys",
            )

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        return None if self.lengths is None else [q * 0 + n for n in sorted(set(self.lengths))]

    def __repr__(self) -> str:
        return f"padding({'' if self.lengths is None else list(self.lengths)})"


def documents(lengths: Sequence[int] | None = None) -> Pattern:
    """Keep query and key in the same document of a packed sequence.

    Parameters
    ----------
    lengths
        Lengths of the documents, which must sum to the number of keys. Without them the boundaries arrive with each
        call as ``plan(q, k, v, documents=cu_seqlens)``: cumulative lengths ``[n + 1]`` or ``[B, n + 1]``, from 0 to
        the number of keys. New boundaries never make a new plan.

    Raises
    ------
    SpecError
        If a length is not a positive int, or, in a spec, if the lengths do not sum to the number of keys.

    Examples
    --------
    >>> documents([3, 5]), documents()
    (documents([3, 5]), documents())
    """
    return Documents(_frozen_lengths(lengths, "document", 1))


def padding(lengths: Sequence[int] | None = None) -> Pattern:
    """Leave out the keys that are padding.

    Parameters
    ----------
    lengths
        Number of real keys of each batch element, counted from the start. Without them the mask arrives with each
        call as ``plan(q, k, v, key_padding=mask)``: booleans ``[B, kv_len]``, True where the key is real, so that
        left and right padding both work.

    Raises
    ------
    SpecError
        If a length is negative or, in a spec, exceeds the number of keys.

    Examples
    --------
    >>> padding(), padding([5, 8])
    (padding(), padding([5, 8]))
    """
    return Padding(_frozen_lengths(lengths, "padding", 0))


def static_part(pattern: Pattern) -> Pattern:
    """Return the pattern without the conditions whose data arrives with the call.

    Examples
    --------
    >>> from attnplan.patterns import window
    >>> static_part(window(2) & documents())
    window(2)
    """
    if not pattern.operands:
        return pattern
    if isinstance(pattern, And):
        kept = [term for term in map(static_part, pattern.terms) if term != full()]
        return reduce(and_, kept) if kept else full()
    return full()
