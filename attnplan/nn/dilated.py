"""Dilated attention without projections, under the names of the published libraries."""

from __future__ import annotations

from collections.abc import Sequence

from attnplan.nn.base import PatternAttention, check_dropout, refuse_options
from attnplan.patterns import Mixture, Pattern, grouped


class DilatedAttention(PatternAttention):
    """Dilated attention with the heads split over the branches.

    With H heads and G branches, the first ``H % G`` groups of ``H // G`` heads get one head more. Group i attends
    within segments of ``segment_lengths[i]`` among the rows congruent to ``i % r``, ``r = dilation_rates[i]``. Other
    rows of that head are 0. ``mix="mean"`` divides by G as the published classes do.

    *Published* (PyPI 0.2.0): computed some heads twice and left others 0 when G does not divide H; divided each channel
    by its signed sum over the sequence, which is unbounded and lets the future into causal outputs; stored
    ``softmax_scale`` and ``attention_dropout`` without using them; needed a length that every segment divides.
    *Published* (the fork with the same version number): right head groups and no division; ignored ``softmax_scale``
    and ``attention_mask``; applied dropout twice, to the weights and to the output.
    *Ours*: the fork's mathematics with every argument in force, ragged lengths exactly, grouped-query heads, dropout
    on the weights only. What has no meaning here raises.

    Parameters
    ----------
    segment_lengths, dilation_rates
        One segment length and one rate per group, in this order; swapped lists are refused.
    softmax_scale
        Factor on ``q @ k^T``; the default is ``1 / sqrt(D)``.
    attention_dropout
        Probability with which a weight is dropped in training. Each call draws a seed from torch's default generator.
    op, enable_memory_pool, enable_profiling
        Refused unless left at their default: there is nothing for them to do.
    lightweight_pool
        Accepted; it described the pool.
    mix
        ``"mean"`` divides the output by G, ``"none"`` leaves it.

    Raises
    ------
    SpecError
        If the lists do not pair up or are swapped, or an option is refused.

    Examples
    --------
    >>> import torch
    >>> attend = DilatedAttention(segment_lengths=[8, 16], dilation_rates=[1, 2])
    >>> q = k = v = torch.randn(1, 32, 4, 8)
    >>> attend(q, k, v, is_causal=True).shape
    torch.Size([1, 32, 4, 8])

    References
    ----------
    Ding et al., LongNet: Scaling Transformers to 1,000,000,000 Tokens, arXiv 2307.02486. Splitting the heads is the
    published libraries' reading; the paper's own is :class:`~attnplan.nn.LongNetAttention`.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        op: None = None,
        enable_memory_pool: bool = False,
        enable_profiling: bool = False,
        lightweight_pool: bool = True,
        *,
        mix: str = "mean",
    ) -> None:
        super().__init__()
        refuse_options(op=op, enable_memory_pool=enable_memory_pool, enable_profiling=enable_profiling)
        self._mixture = grouped(segment_lengths, dilation_rates, mix)
        self.segment_lengths, self.dilation_rates, self.mix = list(segment_lengths), list(dilation_rates), mix
        self.softmax_scale, self.dropout = softmax_scale, check_dropout(attention_dropout)

    def pattern(self, seq_len: int, heads: int) -> Pattern | Mixture:
        """Return :func:`attnplan.patterns.grouped` with the module's arguments."""
        return self._mixture

    def _arguments(self) -> list[str]:
        return [repr(self._mixture), *super()._arguments()]


class ImprovedDilatedAttention(DilatedAttention):
    """The same attention as :class:`DilatedAttention`, with the fork's second signature.

    *Published* (fork): handed tensors to the kernel with heads where it expects the sequence, so that every token
    attended over the heads of its own group and no token saw another; ``is_causal`` masked heads. Its speed and its
    maximum lengths are those of that computation. It also set torch's global TF32 flag.
    *Ours*: dilated attention over tokens; no global flag is touched. Outputs differ from the published class always.

    Parameters
    ----------
    segment_lengths, dilation_rates, mix
        As in :class:`DilatedAttention`.
    dropout
        Probability with which a weight is dropped in training.
    use_tf32
        Refused if True, which was the published default: precision is the spec's, never a global flag.
    enable_memory_pool, enable_profiling, lightweight_pool
        As in :class:`DilatedAttention`.
    softmax_scale
        Factor on ``q @ k^T``.

    Raises
    ------
    SpecError
        As for :class:`DilatedAttention`.

    Examples
    --------
    >>> ImprovedDilatedAttention([8, 16], [1, 2], dropout=0.1)
    ImprovedDilatedAttention(grouped(segment_lengths=[8, 16], dilation_rates=[1, 2], mix="mean"), dropout=0.1)

    References
    ----------
    Ding et al., arXiv 2307.02486.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        use_tf32: bool = False,
        enable_memory_pool: bool = False,
        enable_profiling: bool = False,
        lightweight_pool: bool = True,
        *,
        softmax_scale: float | None = None,
        mix: str = "mean",
    ) -> None:
        refuse_options(use_tf32=use_tf32)
        super().__init__(
            segment_lengths,
            dilation_rates,
            softmax_scale,
            dropout,
            enable_memory_pool=enable_memory_pool,
            enable_profiling=enable_profiling,
            mix=mix,
        )
