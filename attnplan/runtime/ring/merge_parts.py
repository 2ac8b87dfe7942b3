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


def merge_parts(pieces: Sequence[Piece], q: Tensor, dtype: torch.dtype, *, over: bool = False) -> Pair:
    """Return output in ``dtype`` and LSE of 1 to :data:`MOST` pieces, for all rows of ``q``.

    Rows without a key in any piece have output 0 and LSE -inf. With ``over`` the first output is a running one of all
    rows, which may be written over.
    """
    lines = all(p.out.stride(-1) == 1 for p in pieces)
    if len(pieces) > 1 and _has_triton() and runs_triton(pieces[0].out) and lines:
        return _by_kernel(pieces, q, dtype, over)
    wide = accumulator(q.dtype)
    total = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
    for p in pieces:
        here = p.of(total)
        here.copy_(torch.logaddexp(here, p.lse.to(wide)))
    finite = total.masked_fill(total == -torch.inf, 0)  # -inf minus -inf would be NaN; such rows have weight 0
    made = empty_like_rows(q, pieces[0].out.shape[-1], wide).zero_()
    for p in pieces:
        weight = torch.exp(p.lse.to(wide) - p.of(finite))
        p.of(made).addcmul_(p.out.to(wide), weight.unsqueeze(-1))
    return made.to(dtype), total


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
