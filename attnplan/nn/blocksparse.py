"""The block-sparse classes of the fork, as unions under one softmax."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from attnplan.errors import SpecError, did_you_mean
from attnplan.nn.base import PatternAttention, ProjectedAttention, check_dropout, refuse_options
from attnplan.nn.ring import check_ring
from attnplan.patterns import Mixture, Pattern, documents, full, grouped, sinks

PATTERN_TYPES = ("dilated_sparse", "global_local", "local_window")
_REFUSED_TYPES = {
    "axial": "no published code implements it",
    "content_adaptive": "a pattern is data and cannot depend on the content",
    "hierarchical": "its blocks have several sizes, which needs a blocks() pattern; this version has none",
    "hybrid": "no published code implements it",
    "learned": "a pattern is data and cannot be learned",
    "random": "it needs random_blocks(keep, block_size, seed), which is not in this version",
}


@attrs.frozen
class SparsePatternConfig:
    """Which blocks of queries and keys meet.

    Parameters
    ----------
    pattern_type
        ``"local_window"``: blocks at most ``local_window_size // block_size // 2`` apart. ``"global_local"``: these,
        and for every query the first ``global_tokens // block_size`` blocks of keys. ``"dilated_sparse"``: blocks 0 or
        one of the first three dilation rates apart.
    sparsity_ratio
        Must be None: no published pattern read it. What is kept follows from the sizes.
    block_size, local_window_size, global_tokens
        In tokens.

    Raises
    ------
    SpecError
        If a value is impossible or has no effect.

    Examples
    --------
    >>> SparsePatternConfig(pattern_type="random")
    Traceback (most recent call last):
    ...
    attnplan.errors.SpecError: pattern_type='random': it needs random_blocks(keep, block_size, seed), which is not in \
this version
    """

    pattern_type: str = "dilated_sparse"
    sparsity_ratio: None = None
    block_size: int = 128
    local_window_size: int = 512
    global_tokens: int = 64

    def __attrs_post_init__(self) -> None:
        if self.pattern_type in _REFUSED_TYPES:
            raise SpecError(f"pattern_type={self.pattern_type!r}: {_REFUSED_TYPES[self.pattern_type]}")
        if self.pattern_type not in PATTERN_TYPES:
            hint = did_you_mean(str(self.pattern_type), PATTERN_TYPES)
            raise SpecError(f"unknown pattern_type {self.pattern_type!r}{hint}")
        if self.sparsity_ratio is not None:
            raise SpecError(
                f"sparsity_ratio={self.sparsity_ratio!r}: no published pattern read it; set block_size, "
                "local_window_size, global_tokens or the dilation rates, which say what is kept"
            )
        for name, least in (("block_size", 1), ("local_window_size", 0), ("global_tokens", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SpecError(f"{name} must be an int of at least {least}, got {value!r}")

    def pattern(self, seq_len: int, dilation_rates: Sequence[int]) -> Pattern:
        """Return the pattern for ``seq_len`` keys."""
        size, radius = self.block_size, self.local_window_size // self.block_size // 2
        if self.pattern_type == "dilated_sparse":
            return _blocks_apart({0, *dilation_rates[:3]}, seq_len, size)
        local = _blocks_apart(range(radius + 1), seq_len, size)
        first = 0 if self.pattern_type == "local_window" else self.global_tokens // size
        return local | sinks(min(first * size, seq_len)) if first else local


def _blocks_apart(distances: Iterable[int], seq_len: int, size: int) -> Pattern:
    """Return the pairs whose blocks are one of ``distances`` apart."""
    wanted = sorted({d for d in distances if d * size < seq_len})
    runs: list[list[int]] = []
    for d in wanted:
        if runs and runs[-1][1] == d - 1:
            runs[-1][1] = d
        else:
            runs.append([d, d])
    found = []
    for first, last in runs:
        near = _within(last, seq_len, size)
        found.append(near & ~_within(first - 1, seq_len, size) if first else near)
    return reduce(or_, found)


def _within(radius: int, seq_len: int, size: int) -> Pattern:
    """Return the pairs whose blocks are at most ``radius`` apart: a union of tilings, each shifted by one block."""
    tile = (radius + 1) * size
    if tile >= seq_len:
        return full()
    tilings = []
    for shift in range(0, tile, size):
        ends = [e for e in range(shift, seq_len, tile) if e > 0]
        tilings.append(documents([b - a for a, b in zip([0, *ends], [*ends, seq_len], strict=True)]))
    return reduce(or_, tilings)


class BlockSparseRingDilatedAttention(PatternAttention):
    """Attention over the blocks of :class:`SparsePatternConfig`, one softmax for each row.

    *Published* (fork): took a softmax inside every active block and *summed* the outputs, so that with m blocks a row's
    weights add up to m; ignored ``sparsity_ratio``, the segments, and the ring; needed a multiple of the block size.
    *Ours*: one softmax over the union of the active blocks, ragged lengths included. The numbers agree only where a row
    has one active block. ``sparsity_ratio`` raises. Without a block-sparse strategy yet, it runs as a dense mask:
    quadratic in the length, in time and memory.

    Parameters
    ----------
    segment_lengths
        Checked against the rates, as published; no pattern reads them.
    dilation_rates
        Distances in blocks, for ``"dilated_sparse"``.
    sparse_config
        A :class:`SparsePatternConfig`, or a dict of its fields.
    dropout
        Probability with which a weight is dropped in training.
    ring_size
        Ranks of a virtual ring on one device; None is 1. For a ring of processes see :meth:`distribute`.
    enable_memory_pool, enable_profiling
        Refused unless left at their default.
    lightweight_pool
        Accepted; it described the pool.

    Raises
    ------
    SpecError
        If the config is impossible, the lists are swapped, or an option is refused.

    Examples
    --------
    >>> attend = BlockSparseRingDilatedAttention([64], [2], {"block_size": 8})
    >>> q = k = v = torch.randn(1, 64, 2, 8)
    >>> attend(q, k, v).shape
    torch.Size([1, 64, 2, 8])

    References
    ----------
    Zaheer et al., Big Bird, arXiv 2007.14062, for attention over a union of blocks.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        sparse_config: SparsePatternConfig | Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        ring_size: int | None = None,
        enable_memory_pool: bool = False,
        enable_profiling: bool = False,
        lightweight_pool: bool = True,
        *,
        sparsity_ratio: None = None,
    ) -> None:
        super().__init__()
        self.ring_size = check_ring(ring_size)
        refuse_options(enable_memory_pool=enable_memory_pool, enable_profiling=enable_profiling)
        grouped(segment_lengths, dilation_rates)  # the checks of the two lists
        self.segment_lengths, self.dilation_rates = list(segment_lengths), list(dilation_rates)
        self.sparse_config = _config(sparse_config, sparsity_ratio)
        self.dropout = check_dropout(dropout)

    def pattern(self, seq_len: int, heads: int) -> Pattern | Mixture:
        """Return the config's pattern."""
        return self.sparse_config.pattern(seq_len, self.dilation_rates)

    def _arguments(self) -> list[str]:
        return [repr(self.sparse_config), f"dilation_rates={self.dilation_rates}", *super()._arguments()]


def _config(config: SparsePatternConfig | Mapping[str, Any] | None, sparsity_ratio: None) -> SparsePatternConfig:
    if isinstance(config, SparsePatternConfig):
        return attrs.evolve(config, sparsity_ratio=sparsity_ratio)
    if config is not None and not isinstance(config, Mapping):
        raise SpecError(f"sparse_config must be a SparsePatternConfig or a dict, got {type(config).__name__}")
    known = [field.name for field in attrs.fields(SparsePatternConfig)]
    for name in config or {}:
        if name not in known:
            raise SpecError(f"unknown sparse_config key {name!r}{did_you_mean(str(name), known)}")
    ratio: dict[str, Any] = {} if sparsity_ratio is None else {"sparsity_ratio": sparsity_ratio}
    return SparsePatternConfig(**{**(config or {}), **ratio})


class BlockSparseRingMultiheadDilatedAttention(ProjectedAttention):
    """Self-attention with projections and :class:`BlockSparseRingDilatedAttention`.

    *Published* (fork): summed softmaxes, as the inner class; set padded keys and values to 0, which leaves them in the
    softmax; warned that it ignores ``attn_mask``, and ignored it; returned the weights of the wrong computation.
    *Ours*: one softmax; ``key_padding_mask`` leaves keys out; ``attn_mask`` and ``need_weights`` raise. ``dropout`` is
    on the output, as published. Same parameters; state dicts load with ``strict=True``. Returns the output.

    Parameters
    ----------
    embed_dim, num_heads
        E and H; H must divide E.
    segment_lengths, dilation_rates, sparse_config
        As in :class:`BlockSparseRingDilatedAttention`: segments *first*.
    dropout
        Probability with which an element of the output is dropped in training.
    bias
        Whether the projections have biases.
    batch_first
        If False, tensors are ``[S, B, E]``.
    device, dtype
        Of the parameters.
    **kwargs
        Further arguments of :class:`BlockSparseRingDilatedAttention`.

    Raises
    ------
    SpecError
        As for :class:`BlockSparseRingDilatedAttention`.

    Examples
    --------
    >>> mha = BlockSparseRingMultiheadDilatedAttention(32, 4, [64], [2], sparse_config={"block_size": 8})
    >>> x = torch.randn(1, 64, 32)
    >>> mha(x, x, x).shape
    torch.Size([1, 64, 32])

    References
    ----------
    As for :class:`BlockSparseRingDilatedAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        sparse_config: SparsePatternConfig | Mapping[str, Any] | None = None,
        batch_first: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads)
        self.batch_first = batch_first
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype) for _ in range(4)
        )
        self.dropout_layer = nn.Dropout(check_dropout(dropout))
        self.attention = BlockSparseRingDilatedAttention(segment_lengths, dilation_rates, sparse_config, **kwargs)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: None = None,
        is_causal: bool = False,
        average_attn_weights: bool = True,
    ) -> Tensor:
        """Attend; arguments as in :meth:`MultiheadDilatedAttention.forward`, in the fork's order."""
        refuse_options(need_weights=need_weights, attn_mask=attn_mask)
        tensors = self._inputs(query, key, value)
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in tensors)
        else:
            query, key, value = tensors
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        out: Tensor = self.dropout_layer(self.out_proj(self._attend(q, k, v, is_causal, key_padding_mask)))
        return out if self.batch_first else out.transpose(0, 1)
