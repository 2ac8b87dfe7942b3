"""Merging parts of a softmax in one pass: a Triton kernel on CUDA, plain torch elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import attrs
import torch
from torch import Tensor

from attnplan.runtime.fused.switch import features_of_block, runs_triton
from attnplan.runtime.ring.surgery import Rows
from attnplan.runtime.views import accumulator, empty_like_rows

Pair = tuple[Tensor, Tensor]
MOST = 4
"""Parts that are merged in one pass."""


@attrs.frozen(eq=False)
class Piece:
    """Output ``[B, H, n, Dv]`` and LSE ``[B, H, n]`` of some rows, or of all. A row without a key has LSE -inf."""

    out: Tensor
    lse: Tensor
    rows: Rows = None

    def of(self, x: Tensor) -> Tensor:
        """Return this piece's rows of a tensor of all rows."""
        return x if self.rows is None else x.narrow(2, *self.rows)

    def is_whole(self, length: int) -> bool:
        """Return whether it has all of ``length`` rows."""
        return self.rows is None or self.rows == (0, length)


def merge_parts(pieces: Sequence[Piece], q: Tensor, dtype: torch.dtype, *, over: bool = False) -> Pair:
    """Return output in ``dtype`` and LSE of 1 to :data:`MOST` pieces, for all rows of ``q``.

    Rows without a key in any piece have output 0 and LSE -inf. With ``over`` the first output is a running one of all
    rows, which may be written over.
    """
    lines = all(p.out.stride(-1) == 1 for p in pieces)
    if len(pieces) > 1 and _has_triton() and runs_triton(pieces[0].out) and lines:
        return _by_kernel(pieces, q, dtype, over)
    total = _lse_of_all(pieces, q)
    finite = total.masked_fill(total == -torch.inf, 0)  # -inf minus -inf would be NaN; such rows have weight 0
    return _weighed(pieces, finite, q, over).to(dtype), total


def _lse_of_all(pieces: Sequence[Piece], q: Tensor) -> Tensor:
    wide, length = accumulator(q.dtype), q.shape[2]
    if pieces[0].is_whole(length):
        total, rest = pieces[0].lse.to(wide), pieces[1:]
    else:
        total, rest = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device), pieces
    for p in rest:
        lse = p.lse.to(wide)
        if p.is_whole(length):
            total = torch.logaddexp(total, lse)
        else:
            total = total.clone() if total is pieces[0].lse else total  # a part's is not ours to write to
            here = p.of(total)
            torch.logaddexp(here, lse, out=here)
    return total


def _weighed(pieces: Sequence[Piece], finite: Tensor, q: Tensor, over: bool) -> Tensor:
    """Return the sum of outputs times their weights, where ``finite`` is the LSE of all of them, or 0."""
    wide, first = finite.dtype, pieces[0]
    weights = (p.lse.to(wide).sub(p.of(finite)).exp_().unsqueeze(-1) for p in pieces)
    if not first.is_whole(q.shape[2]):
        made, rest = empty_like_rows(q, first.out.shape[-1], wide).zero_(), pieces
    else:
        made, rest = first.out if over else empty_like_rows(q, first.out.shape[-1], wide), pieces[1:]
        torch.mul(first.out.to(wide), next(weights), out=made)
    for p, weight in zip(rest, weights, strict=True):
        p.of(made).addcmul_(p.out.to(wide), weight)
    return made


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _by_kernel(pieces: Sequence[Piece], q: Tensor, dtype: torch.dtype, over: bool) -> Pair:
    from attnplan.runtime.ring.merge_kernel import merge_kernel

    (batch, heads, length), features, first = q.shape[:3], pieces[0].out.shape[-1], pieces[0].out
    made = first if over and first.dtype == dtype else empty_like_rows(q, features, dtype)
    total = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    rows = batch * heads * length
    block = 16 if features <= 128 else 8
    tensors: list[Tensor] = []
    places: list[int] = []
    for p in (*pieces, *[pieces[-1]] * (MOST - len(pieces))):  # those that fill up are not read
        tensors += [p.out, p.lse.float().contiguous()]
        places += [*p.out.stride()[:3], *(p.rows or (0, length))]
    kernel: Any = merge_kernel
    if rows:
        kernel[(-(-rows // block),)](
            *tensors, made, total, rows, length, heads, *places, *made.stride()[:3],
            PARTS=len(pieces), D=features, BLOCK_D=features_of_block(features), BLOCK_R=block,
        )  # fmt: skip
    return made, total
