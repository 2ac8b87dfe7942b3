"""The ring classes of the fork."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from attnplan.errors import SpecError
from attnplan.nn.base import PatternAttention, check_dropout, refuse_options
from attnplan.nn.multihead import MultiheadDilatedAttention
from attnplan.patterns import Mixture, Pattern, full, grouped, heads, mask, segments

_KEPT_PATTERNS = 16


def check_ring(ring_size: int | None) -> int:
    """Return the number of ranks of a virtual ring, 1 for None.

    Raises
    ------
    SpecError
        If it is no positive int.
    """
    if ring_size is not None and (not isinstance(ring_size, int) or isinstance(ring_size, bool) or ring_size < 1):
        raise SpecError(f"ring_size must be a positive int or None, got {ring_size!r}")
    return ring_size or 1


class RingAttentionCorrectV2(PatternAttention):
    """Dense attention; the name stands for a ring over which K and V travel.

    *Published* (fork): on one device, a loop over ``ring_size`` chunks of K and V with an online softmax: dense
    attention, no dilation, no communication; stored ``dropout`` without using it; converted the inputs to ``dtype``,
    by default float32 on the CPU and float16 on CUDA; it was no ``Module``.
    *Ours*: dense attention, equal to the published one within rounding. ``ring_size`` defaults to 1 (published: 4), one
    kernel call; larger values run a virtual ring of as many ranks, any length, causal or not, and :meth:`distribute`
    a ring of processes. Inputs are converted only to a device or dtype that is given.

    Parameters
    ----------
    dropout
        Probability with which a weight is dropped in training.
    device, dtype
        Where and in what the attention runs; None for where the inputs are.

    Raises
    ------
    SpecError
        If ``dropout`` is no probability.

    Examples
    --------
    >>> q = k = v = torch.randn(1, 16, 2, 8)
    >>> RingAttentionCorrectV2()(q, k, v, is_causal=True).shape
    torch.Size([1, 16, 2, 8])

    References
    ----------
    Liu et al., Ring Attention with Blockwise Transformers, arXiv 2310.01889.
    """

    def __init__(
        self, dropout: float = 0.0, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.dropout, self.device, self.dtype = check_dropout(dropout), device, dtype

    def pattern(self, seq_len: int, heads: int) -> Pattern | Mixture:
        """Return all pairs."""
        return full()

    def forward(  # type: ignore[override]  # the published order of arguments
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ring_size: int = 1,
        is_causal: bool = False,
        return_memory_stats: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend; tensors as in :meth:`PatternAttention.forward`, ``ring_size`` ranks of a virtual ring.

        Raises
        ------
        SpecError
            If shapes do not fit, or ``return_memory_stats`` is asked for.
        """
        self.ring_size = check_ring(ring_size)
        if return_memory_stats:
            raise SpecError("return_memory_stats=True: use .explain() for the plan's peak, or torch.cuda.memory_stats")
        query, key, value = (x.to(device=self.device, dtype=self.dtype) for x in (query, key, value))
        return super().forward(query, key, value, is_causal, key_padding_mask=key_padding_mask)


class RingDilatedAttentionV2(PatternAttention):
    """Every query of a segment over the segment's dilated keys; heads split over the branches.

    Group i of the heads (the *last* ``H % G`` groups have one head more) attends, within segments of
    ``segment_lengths[i]``, to the keys congruent to ``i % r``. Queries are not dilated, so every row has an output, and
    nothing is divided by G. A last segment shorter than ``segment_lengths[i]`` is attended whole.

    *Published* (fork): repeated the dilated keys cyclically to the segment's length, which saves nothing and weighs
    some keys twice if ``ceil((w - i % r) / r)`` does not divide w; masked by slot, so that causal rows see the future;
    ignored ``attention_mask`` with a warning. Its simulated ring cut queries, too, into chunks that never meet; its
    distributed path called a function that torch does not have.
    *Ours*: each key once, causality by position, ``dropout`` and ``key_padding_mask``. Where the published numbers are
    sound (not causal, one rank, rates that divide their segments) ours are the same. Without a strategy of its own yet,
    it runs as a dense mask: quadratic in the length, in time and memory. Its ring, virtual or of processes, computes
    what one rank does.

    Parameters
    ----------
    segment_lengths, dilation_rates
        One of each per group, in this order; swapped lists are refused.
    dropout
        Probability with which a weight is dropped in training.
    ring_size
        Ranks of a virtual ring on one device; None is 1. For a ring of processes see :meth:`distribute`.
    device, dtype
        Accepted if None: the published class ignored them for computing.
    enable_memory_pool, enable_profiling
        Refused unless left at their default.
    lightweight_pool, use_pattern_cache
        Accepted; patterns are always cached.

    Raises
    ------
    SpecError
        If the lists do not pair up or are swapped, or an option is refused.

    Examples
    --------
    >>> q = k = v = torch.randn(1, 32, 4, 8)
    >>> RingDilatedAttentionV2([8, 16], [1, 2], ring_size=1)(q, k, v).shape
    torch.Size([1, 32, 4, 8])

    References
    ----------
    Liu et al., arXiv 2310.01889; Ding et al., arXiv 2307.02486.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        ring_size: int | None = None,
        device: None = None,
        dtype: None = None,
        enable_memory_pool: bool = False,
        enable_profiling: bool = False,
        lightweight_pool: bool = True,
        use_pattern_cache: bool = True,
    ) -> None:
        super().__init__()
        self.ring_size = check_ring(ring_size)
        refuse_options(
            device=device, dtype=dtype, enable_memory_pool=enable_memory_pool, enable_profiling=enable_profiling
        )
        grouped(segment_lengths, dilation_rates)  # the checks of the two lists
        self.segment_lengths, self.dilation_rates = list(segment_lengths), list(dilation_rates)
        self.dropout = check_dropout(dropout)
        self._patterns: dict[tuple[int, int], Pattern] = {}

    def pattern(self, seq_len: int, heads: int) -> Pattern | Mixture:
        """Return the union over the groups; one object per length and number of heads, so that plans are found."""
        key = (seq_len, heads)
        if key not in self._patterns:
            while len(self._patterns) >= _KEPT_PATTERNS:
                del self._patterns[next(iter(self._patterns))]
            self._patterns[key] = reduce(or_, self._groups(seq_len, heads))
        return self._patterns[key]

    def _groups(self, seq_len: int, total: int) -> list[Pattern]:
        groups, found, start = len(self.segment_lengths), [], 0
        for i, (w, r) in enumerate(zip(self.segment_lengths, self.dilation_rates, strict=True)):
            stop = start + total // groups + (i >= groups - total % groups)
            if stop > start:
                here = heads(start, stop) & segments(w)
                found.append(here if r == 1 else here & mask(_dilated_keys(w, r, i % r, seq_len // w * w)))
            start = stop
        return found

    def _arguments(self) -> list[str]:
        own = [f"segment_lengths={self.segment_lengths}", f"dilation_rates={self.dilation_rates}"]
        return [*own, *super()._arguments()]


def _dilated_keys(w: int, r: int, offset: int, end: int) -> Callable[[Any, Any, Any], Any]:
    def kept(h: Any, q: Any, k: Any) -> Any:
        return (k % w % r == offset) | (k >= end)

    return kept


class RingMultiheadDilatedAttention(MultiheadDilatedAttention):
    """:class:`~attnplan.nn.MultiheadDilatedAttention` around :class:`RingDilatedAttentionV2`; for the factory.

    *Published*: the fork's factory has the kind and raises a TypeError for it. ``mix`` must be ``"none"``.

    Examples
    --------
    >>> RingMultiheadDilatedAttention(32, 4, [1, 2], [8, 16])(torch.randn(1, 32, 32))[0].shape
    torch.Size([1, 32, 32])
    """

    def __init__(self, *args: Any, mix: str = "none", **options: Any) -> None:
        if mix != "none":
            raise SpecError(f'the ring class divides by nothing: mix must be "none", got {mix!r}')
        super().__init__(*args, mix=mix, **options)

    def _core(self, segments: Sequence[int], rates: Sequence[int], dropout: float, mix: str) -> PatternAttention:
        return RingDilatedAttentionV2(segments, rates, dropout)
