"""The published classes beside independent implementations: what the module tests of any dtype run.

``published`` computes in the dtype that it gets; ``Case.anchor`` is the same mathematics by dense SDPA with a mask, in
bfloat16: the fair price of that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnplan import nn as an
from attnplan.nn.ring import RingMultiheadDilatedAttention
from tests import published

WS, RS = [8, 16, 24], [1, 2, 3]  # rates divide their segments: there RingDilatedAttentionV2 was sound
BLOCK = 4
APART = [1, 3, 6]  # in blocks, with gaps
SPARSE = {"pattern_type": "dilated_sparse", "block_size": BLOCK}
E, H = 40, 5  # H mod 3 groups != 0

Attend = Callable[..., Tensor]  # (q, k, v, causal, keep) -> output, all [B, S, H, D]


def grouped(q: Tensor, k: Tensor, v: Tensor, causal: bool, keep: Tensor | None) -> Tensor:
    return published.grouped(q, k, v, WS, RS, causal, keep=keep)


def torchscale(q: Tensor, k: Tensor, v: Tensor, causal: bool, keep: Tensor | None) -> Tensor:
    return published.longnet(q, k, v, WS, RS, causal, keep=keep)


def paper(q: Tensor, k: Tensor, v: Tensor, causal: bool, keep: Tensor | None) -> Tensor:
    return published.longnet(q, k, v, WS, RS, causal, offset="interleave", detach=False, keep=keep)


def zeros(q: Tensor, k: Tensor, v: Tensor, causal: bool, keep: Tensor | None) -> Tensor:
    return published.longnet_zero_keys(q, k, v, WS, RS, causal, keep=keep)


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, keep: Tensor | None) -> Tensor:
    return published.dense(q, k, v, causal, keep=keep)


def ring(q: Tensor, k: Tensor, v: Tensor, causal: bool, keep: Tensor | None) -> Tensor:
    return published.ring_v2(q, k, v, WS, RS, causal, keep=keep)


def block_sparse(q: Tensor, k: Tensor, v: Tensor, causal: bool, keep: Tensor | None) -> Tensor:
    blocks = published.active_blocks(SPARSE, APART, -(-q.shape[1] // BLOCK))
    return published.block_sparse(q, k, v, blocks, BLOCK, causal, keep=keep)


def sdpa_rows(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Do what ``published.softmax_rows`` does by dense SDPA in bfloat16; sums of its results are free, in float64.

    A row without keys sees all of them and counts 0 times, so that no kernel meets it. The LSE, of which only weights
    without a gradient are made, is exact.
    """
    some = allowed.any(-1)
    mask = allowed | ~some[..., None]
    mask = mask[:, None] if mask.ndim == 3 else mask
    q1, k1, v1 = (x.to(torch.bfloat16).unsqueeze(1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q1, k1, v1, attn_mask=mask, scale=scale).squeeze(1)
    scores = (q @ k.mT).detach() * (q.shape[-1] ** -0.5 if scale is None else scale)
    return out.double() * some[..., None], torch.logsumexp(scores.masked_fill(~allowed, -torch.inf), -1)


def _ring_anchor(q: Tensor, k: Tensor, v: Tensor, causal: bool, keep: Tensor | None) -> Tensor:
    """Compute RingDilatedAttentionV2 with each key once; the published form repeats them."""
    columns, (n, h) = [], q.shape[1:3]
    rows = torch.arange(n)
    last_first = [len(g) for g in published.fork_groups(h, len(WS))][::-1]  # the last groups have one head more
    for i, (w, r, size) in enumerate(zip(WS, RS, last_first, strict=True)):
        seen = (rows % w % r == i % r) | (rows >= n // w * w)
        pairs = (rows[:, None] // w == rows // w) & seen & ((rows <= rows[:, None]) | (not causal))
        for _ in range(size):
            j = len(columns)
            columns.append(sdpa_rows(q[:, :, j], k[:, :, j], v[:, :, j], published.kept(pairs, keep))[0])
    return torch.stack(columns, 2)


def _paper_anchor(q: Tensor, k: Tensor, v: Tensor, causal: bool, keep: Tensor | None) -> Tensor:
    """Compute the ``lse`` mix as one softmax over a copy of the keys per branch: no bias that bfloat16 rounds."""
    columns, (n, h) = [], q.shape[1:3]
    for j in range(h):
        pairs = torch.cat([published.meets(n, w, r, j % r, causal) for w, r in zip(WS, RS, strict=True)], 1)
        copies = None if keep is None else keep.repeat(1, len(WS))
        keys, values = (x[:, :, j].repeat(1, len(WS), 1) for x in (k, v))
        columns.append(sdpa_rows(q[:, :, j], keys, values, published.kept(pairs, copies))[0])
    return torch.stack(columns, 2)


@attrs.frozen(eq=False)
class Case:
    """A class, its mathematics, and the same by dense SDPA if that needs another form than ``sdpa_rows`` within it."""

    build: Callable[[], nn.Module]
    attend: Attend
    form: Callable[..., Tensor] | None = None
    own_anchor: Attend | None = None

    def expected(self, state: Mapping[str, Tensor], x: tuple[Tensor, ...], causal: bool, keep: Any = None) -> Tensor:
        """Return the output of the independent implementation, in the dtype of ``x``."""
        return self._run(self.attend, state, x, causal, keep)

    def anchor(self, patch: Any, state: Mapping[str, Tensor], x: tuple[Tensor, ...], causal: bool) -> Tensor:
        """Return the output in bfloat16: plain torch around dense SDPA. ``patch`` is pytest's monkeypatch."""

        def run(q: Tensor, k: Tensor, v: Tensor, causal: bool, keep: Tensor | None) -> Tensor:
            wide = [t.double() for t in (q, k, v)]
            if self.own_anchor is not None:
                return self.own_anchor(*wide, causal, keep).to(q.dtype)
            with patch.context() as here:
                here.setattr(published, "softmax_rows", sdpa_rows)
                return self.attend(*wide, causal, keep).to(q.dtype)

        return self._run(run, state, x, causal, None)

    def _run(
        self, attend: Attend, state: Mapping[str, Tensor], x: tuple[Tensor, ...], causal: bool, keep: Tensor | None
    ) -> Tensor:
        if self.form is not None:
            return self.form(state, H, x, lambda q, k, v: attend(q, k, v, causal, keep))
        q, k, v = x
        copies = q.shape[2] // k.shape[2]
        return attend(q, k.repeat_interleave(copies, 2), v.repeat_interleave(copies, 2), causal, keep)


ATTENTIONS = {
    "dilated": Case(lambda: an.DilatedAttention(WS, RS), grouped),
    "improved": Case(lambda: an.ImprovedDilatedAttention(WS, RS), grouped),
    "torchscale": Case(lambda: an.LongNetAttention(WS, RS), torchscale),
    "torchscale with its zeros": Case(lambda: an.LongNetAttention(WS, RS, zero_key_padding=True), zeros),
    "paper": Case(lambda: an.LongNetAttention(WS, RS, offset="interleave", mix="lse"), paper, own_anchor=_paper_anchor),
    "dense ring": Case(an.RingAttentionCorrectV2, dense),
    "dilated ring": Case(lambda: an.RingDilatedAttentionV2(WS, RS), ring, own_anchor=_ring_anchor),
    "block-sparse": Case(lambda: an.BlockSparseRingDilatedAttention(WS, APART, SPARSE), block_sparse),
}
"""The classes without projections; tensors are ``[B, S, H, D]``."""

PROJECTED = {
    "pypi": Case(
        lambda: an.MultiheadDilatedAttention(E, H, RS, WS, dtype=torch.float64), grouped, published.multihead_pypi
    ),
    "fork": Case(
        lambda: an.MultiheadDilatedAttention(E, H, RS, WS, variant="fork", dtype=torch.float64),
        grouped,
        published.multihead_fork,
    ),
    "improved": Case(
        lambda: an.ImprovedMultiheadDilatedAttention(E, H, RS, WS, dtype=torch.float64),
        grouped,
        published.multihead_improved,
    ),
    "torchscale": Case(
        lambda: an.MultiheadLongNetAttention(E, H, WS, RS, subln=True, dtype=torch.float64),
        torchscale,
        partial(published.multihead_pypi, norm="inner_attn_ln"),
    ),
    "dilated ring": Case(
        lambda: RingMultiheadDilatedAttention(E, H, RS, WS, variant="fork", dtype=torch.float64),
        ring,
        published.multihead_fork,
        _ring_anchor,
    ),
    "block-sparse": Case(
        lambda: an.BlockSparseRingMultiheadDilatedAttention(E, H, WS, APART, sparse_config=SPARSE, dtype=torch.float64),
        block_sparse,
        published.multihead_pypi,
    ),
}
"""The classes with projections, in float64; tensors are ``[B, S, E]``."""


def tensor_of(result: object) -> Tensor:
    """Return the output of a call: some classes return a pair with None."""
    out = result[0] if isinstance(result, tuple) else result
    assert isinstance(out, Tensor)
    return out


def noise(sizes: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal noise as ``dtype`` represents it."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def nudged(module: nn.Module, seed: int = 5) -> nn.Module:
    """Add noise to every parameter, so that no bias or norm is at its special value."""
    for i, parameter in enumerate(module.parameters()):
        parameter.data += 0.1 * noise(tuple(parameter.shape), seed + i)
    return module
