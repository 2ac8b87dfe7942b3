"""Patterns that cut the sequence into segments: local segments, and the dilated segments of LongNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import attrs

from attnplan.errors import SpecError, did_you_mean
from attnplan.patterns.base import Array, Pattern, Shape, require, require_int

if TYPE_CHECKING:
    import numpy as np

OFFSETS = ("interleave", "block")


@attrs.frozen(cache_hash=True, repr=False)
class Dilated(Pattern):
    """Query and key in one segment of ``length``, both congruent to the head's offset modulo ``rate`` inside it."""

    length: int
    rate: int = 1
    offset: int | str = 0
    heads: int | None = None
    """Number of heads, which the ``block`` offsets need; :meth:`bind` fills it in."""

    def __attrs_post_init__(self) -> None:
        require_int(self.length, "segment length", 1)
        require_int(self.rate, "dilation rate", 1)
        require(
            self.rate <= self.length,
            f"dilation rate {self.rate} exceeds its segment length {self.length}, so some heads would see nothing; "
            f"use a rate of at most {self.length} or a longer segment",
        )
        if isinstance(self.offset, str):
            if self.offset not in OFFSETS:
                raise SpecError(f"unknown dilation offset {self.offset!r}{did_you_mean(self.offset, OFFSETS)}")
        else:
            require_int(self.offset, "dilation offset", 0)
            require(
                self.offset < self.rate,
                f"dilation offset {self.offset} must be below the rate {self.rate}; use {self.offset % self.rate}",
            )
        if self.heads is not None:
            require_int(self.heads, "number of heads of a dilation", 1)

    @property
    def per_head(self) -> bool:
        """Whether the offset depends on the head."""
        return isinstance(self.offset, str) and self.rate > 1

    def offset_of(self, h: Array) -> Array:
        """Return the offset of head ``h`` inside each run of ``rate`` rows; one number if it is that of all heads."""
        if isinstance(self.offset, int):
            return cast(Array, self.offset)
        if self.offset == "interleave":
            return h % self.rate
        if self.heads is None:
            raise SpecError('offset="block" depends on the number of heads: use the pattern in an AttentionSpec')
        return h // -(-self.heads // self.rate)

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        together = q // self.length == k // self.length
        if self.rate == 1:
            return together
        offset = self.offset_of(h)
        return together & (q % self.length % self.rate == offset) & (k % self.length % self.rate == offset)

    def check(self, shape: Shape) -> None:
        require(
            self.heads in (None, shape.heads),
            f"{self!r} spreads its offsets over {self.heads} heads, the spec has heads={shape.heads}; leave heads out",
        )

    def bind(self, heads: int) -> Pattern:
        return attrs.evolve(self, heads=heads) if self.offset == "block" and self.heads is None else self

    def head_key(self, h: int) -> tuple[object, ...]:
        return (self.offset_of(h),) if self.per_head else ()

    @property
    def period(self) -> int:
        return self.rate

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        start = q // self.length * self.length
        return [start, start + self.length]

    def __repr__(self) -> str:
        if self.rate == 1:
            return f"segments({self.length})"
        offset = "" if self.offset == 0 else f", offset={self.offset!r}".replace("'", '"')
        heads = "" if self.heads is None else f", heads={self.heads}"
        return f"dilated({self.length}, {self.rate}{offset}{heads})"


def segments(length: int) -> Pattern:
    """Cut the sequence into segments of ``length``; query and key meet inside one segment only.

    A sequence that is no multiple of ``length`` has a shorter last segment.

    Raises
    ------
    SpecError
        If ``length`` is not a positive int.

    Examples
    --------
    >>> segments(2048)
    segments(2048)
    """
    return Dilated(length)


def dilated(segment_length: int, dilation_rate: int, offset: int | str = 0, heads: int | None = None) -> Pattern:
    """Keep, in each segment, the queries and keys whose index is ``offset`` modulo ``dilation_rate``.

    Parameters
    ----------
    segment_length, dilation_rate
        Segment length w and rate r: query i and key k meet iff ``i // w == k // w`` and both ``i % w`` and ``k % w``
        are congruent to the offset modulo r.
    offset
        An int below the rate, or the rule that gives each head h of H its own: ``"interleave"`` is ``h % r`` (the
        paper), ``"block"`` is ``h // ceil(H / r)`` (torchscale).
    heads
        Number of heads H, which ``"block"`` needs; a spec fills it in.

    Raises
    ------
    SpecError
        If the rate exceeds the segment, or the offset is unknown or not below the rate.

    Examples
    --------
    >>> dilated(8, 2, offset="interleave")
    dilated(8, 2, offset="interleave")

    References
    ----------
    Ding et al., LongNet: Scaling Transformers to 1,000,000,000 Tokens, arXiv 2307.02486, eq. 3-5 and 11-13.
    """
    pattern = Dilated(segment_length, dilation_rate, offset, heads)
    return pattern if pattern.rate > 1 else Dilated(pattern.length)  # every offset is 0


@attrs.frozen(cache_hash=True, repr=False)
class Heads(Pattern):
    """Every pair of the heads from ``start`` up to, not including, ``stop``."""

    start: int
    stop: int

    def __attrs_post_init__(self) -> None:
        require_int(self.start, "first head", 0)
        require_int(self.stop, "last head + 1", self.start)

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        return (h >= self.start) & (h < self.stop) & (q == q) & (k == k)

    def check(self, shape: Shape) -> None:
        require(self.stop <= shape.heads, f"{self!r} names heads that do not exist: the spec has heads={shape.heads}")

    def head_key(self, h: int) -> tuple[object, ...]:
        return (self.start <= h < self.stop,)

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        return []

    def __repr__(self) -> str:
        return f"heads({self.start}, {self.stop})"


def heads(start: int, stop: int) -> Pattern:
    """Let everything meet in heads ``start`` to ``stop - 1``, and nothing in the others.

    Examples
    --------
    Different patterns for different heads:

    >>> from attnplan.patterns import window, full
    >>> heads(0, 8) & window(512) | heads(8, 12)
    heads(0, 8) & window(512) | heads(8, 12)
    """
    return Heads(start, stop)
