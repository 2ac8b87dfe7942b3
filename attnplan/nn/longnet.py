"""LongNet as in the paper and in torchscale: every head takes part in every dilated branch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnplan.api import attention
from attnplan.errors import SpecError
from attnplan.nn.base import PatternAttention, ProjectedAttention, check_dropout, refuse_options
from attnplan.patterns import Mixture, Pattern, longnet


class LongNetAttention(PatternAttention):
    """Dilated attention in which every head takes part in every branch.

    With the defaults this is torchscale's variant: head h of H has the offset ``h // ceil(H / r)`` in a branch of rate
    r, and branches are weighed by their softmax denominators without a gradient through the weights. The paper has the
    offset ``h % r`` and differentiates the weights: ``offset="interleave", mix="lse"``.

    *Published* (torchscale): pads the sequence to a multiple of each segment, and each segment to a multiple of its
    rate, with rows of zeros that take part in the softmax as keys of score 0; ignores ``key_padding_mask`` on its flash
    path; drops a row whose log-sum-exp is exactly 0.
    *Ours*: shorter last segments, exactly, and no phantom keys; ``key_padding_mask`` works. For checkpoints trained
    with the zeros on ragged lengths, ``zero_key_padding=True`` reproduces them. A log-sum-exp of 0 is a number.

    Parameters
    ----------
    segment_lengths, dilation_rates
        One of each per branch, in this order; swapped lists are refused.
    softmax_scale
        Factor on ``q @ k^T``; the default is ``1 / sqrt(D)``.
    dropout
        Probability with which a weight is dropped in training.
    offset, mix
        As in :func:`attnplan.patterns.longnet`.
    zero_key_padding
        Let torchscale's rows of zeros join the softmax. Needs the default mix, and as many queries as keys. On ragged
        lengths each branch is then a call of its own; :meth:`explain` shows the plan without the zeros.

    Raises
    ------
    SpecError
        If the lists do not pair up or are swapped, an option is unknown, or ``zero_key_padding`` does not apply.

    Examples
    --------
    >>> attend = LongNetAttention([8, 16], [1, 2])
    >>> q = k = v = torch.randn(1, 30, 4, 8)
    >>> attend(q, k, v).shape
    torch.Size([1, 30, 4, 8])

    References
    ----------
    Ding et al., arXiv 2307.02486, eq. 9-13; microsoft/torchscale, component/dilated_attention.py.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        softmax_scale: float | None = None,
        dropout: float = 0.0,
        *,
        offset: str = "block",
        mix: str = "lse-detached",
        zero_key_padding: bool = False,
    ) -> None:
        super().__init__()
        self._mixture = longnet(segment_lengths, dilation_rates, offset, mix)
        if zero_key_padding and mix != "lse-detached":
            raise SpecError(f'zero_key_padding=True reproduces torchscale and needs mix="lse-detached", got {mix!r}')
        self.segment_lengths, self.dilation_rates = list(segment_lengths), list(dilation_rates)
        self.offset, self.mix, self.zero_key_padding = offset, mix, zero_key_padding
        self.softmax_scale, self.dropout = softmax_scale, check_dropout(dropout)

    def pattern(self, seq_len: int, heads: int) -> Pattern | Mixture:
        """Return :func:`attnplan.patterns.longnet` with the module's arguments."""
        return self._mixture

    def _run(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, operands: Mapping[str, Any]) -> Tensor:
        n = self._length(k)
        ragged = any(n % min(w, n) or min(w, n) % r for w, r in self._branches())
        if not (self.zero_key_padding and ragged):
            return super()._run(q, k, v, is_causal, operands)
        if self.is_ring:
            raise SpecError("zero_key_padding=True pads every branch differently, which no ring does; leave it False")
        if q.shape[1] != n:
            raise SpecError(f"zero_key_padding=True needs as many queries as keys, got {q.shape[1]} and {n}")
        if operands.get("dropout"):
            raise SpecError("zero_key_padding=True pads every branch differently, and dropout is defined on positions")
        pairs = [self._padded_branch(q, k, v, w, r, is_causal, operands) for w, r in self._branches()]
        outs, lses = torch.stack([o for o, _ in pairs]), torch.stack([x for _, x in pairs])
        weights = torch.softmax(lses.detach().clamp_min(-1e8), 0)  # no branch covers the row: equal weights on zeros
        return (weights.transpose(2, 3).unsqueeze(-1).to(outs.dtype) * outs).sum(0)

    def _branches(self) -> list[tuple[int, int]]:
        return list(zip(self.segment_lengths, self.dilation_rates, strict=True))

    def _padded_branch(
        self, q: Tensor, k: Tensor, v: Tensor, w: int, r: int, is_causal: bool, operands: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Run one branch among rows of zeros; return ``[B, S, H, Dv]`` and the log-sum-exp ``[B, H, S]``."""
        n = q.shape[1]
        segment = _Padded(n, min(w, n), r)
        pattern = longnet([segment.padded], [r], self.offset, "lse")
        here: dict[str, Any] = {name: segment.pad(x, fill=True) for name, x in operands.items()}
        out, lse = attention(
            segment.pad(q), segment.pad(k), segment.pad(v), pattern, causal=is_causal, scale=self.softmax_scale,
            layout="bshd", return_lse=True, **here,
        )  # fmt: skip
        return segment.crop(out), segment.crop(lse.transpose(1, 2)).transpose(1, 2)

    def _arguments(self) -> list[str]:
        extra = ["zero_key_padding=True"] if self.zero_key_padding else []
        return [repr(self._mixture), *extra, *super()._arguments()]


class _Padded:
    """Rows in segments of ``length``, each lengthened by rows of zeros to a multiple of ``rate``."""

    def __init__(self, rows: int, length: int, rate: int) -> None:
        self.rows, self.length = rows, length
        self.segments, self.padded = -(-rows // length), -(-length // rate) * rate

    def pad(self, x: Tensor, fill: bool = False) -> Tensor:
        """Return ``[B, rows, ...]`` as ``[B, segments * padded, ...]``; new rows are zero, or True with ``fill``."""
        behind = (0, 0) * (x.ndim - 2)
        whole = F.pad(x, (*behind, 0, self.segments * self.length - self.rows), value=float(fill))
        split = whole.reshape(x.shape[0], self.segments, self.length, *x.shape[2:])
        return F.pad(split, (*behind, 0, self.padded - self.length), value=float(fill)).flatten(1, 2)

    def crop(self, x: Tensor) -> Tensor:
        """Undo :meth:`pad`."""
        whole = x.reshape(x.shape[0], self.segments, self.padded, *x.shape[2:])
        return whole[:, :, : self.length].flatten(1, 2)[:, : self.rows]


class MultiheadLongNetAttention(ProjectedAttention):
    """Self-attention with projections and :class:`LongNetAttention`, with torchscale's parameter names.

    *Published* (torchscale ``DilatedAttention(args, embed_dim, num_heads, ...)``): read its options from ``args``; see
    :class:`LongNetAttention` for the attention itself. Its checkpoints, pathology models among them, load here with
    ``strict=True``: ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``, and ``inner_attn_ln`` under ``subln``.
    *Ours*: the same names and shapes; options are arguments; ``key_padding_mask`` works, ``attn_mask`` raises. Not
    here: xPos, multiway layers, incremental state, sequence parallelism.

    Parameters
    ----------
    embed_dim, num_heads
        E and H; H must divide E.
    segment_lengths, dilation_rates
        One of each per branch: torchscale's ``segment_length`` and ``dilated_ratio``.
    dropout
        Probability with which a weight is dropped in training.
    subln, layernorm_eps
        Whether to normalise the merged heads before ``out_proj``, and the epsilon.
    offset, mix, zero_key_padding
        As in :class:`LongNetAttention`.
    device, dtype
        Of the parameters.

    Raises
    ------
    SpecError
        As for :class:`LongNetAttention`, or if H does not divide E.

    Examples
    --------
    >>> mha = MultiheadLongNetAttention(32, 4, [8, 16], [1, 2], subln=True)
    >>> mha(torch.randn(1, 24, 32))[0].shape
    torch.Size([1, 24, 32])

    References
    ----------
    microsoft/torchscale, component/dilated_attention.py and component/multihead_attention.py.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        subln: bool = False,
        layernorm_eps: float = 1e-5,
        *,
        offset: str = "block",
        mix: str = "lse-detached",
        zero_key_padding: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads)
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (  # in the published order
            nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype) for _ in range(4)
        )
        self.inner_attn_ln = (
            nn.LayerNorm(embed_dim, eps=layernorm_eps, device=device, dtype=dtype) if subln else nn.Identity()
        )
        self.attention = LongNetAttention(
            segment_lengths, dilation_rates, dropout=dropout, offset=offset, mix=mix, zero_key_padding=zero_key_padding
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as torchscale does: Xavier uniform, q, k and v with the gain 1 / sqrt(2)."""
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(layer.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend; tensors ``[B, S, E]``, masks as in :meth:`MultiheadDilatedAttention.forward`."""
        refuse_options(attn_mask=attn_mask)
        query, key, value = self._inputs(query, key, value)
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        out = self._attend(q, k, v, is_causal, key_padding_mask)
        return self.out_proj(self.inner_attn_ln(out)), None
