"""Merging two parts of a softmax in one pass: a Triton kernel on CUDA, plain torch elsewhere."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from attnplan.runtime.fused.switch import features_of_block, runs_triton
from attnplan.runtime.views import accumulator, empty_like_rows

Pair = tuple[Tensor, Tensor]


def merge_two(a: Pair, b: Pair, dtype: torch.dtype, *, over: bool = False) -> Pair:
    """Return the merge of two parts, each output ``[B, H, S, Dv]`` and LSE ``[B, H, S]``, with output in ``dtype``.

    Rows without a key have LSE -inf, in either part or in both. With ``over`` the first output is a running one, which
    may be written over.
    """
    if _has_triton() and runs_triton(a[0]) and a[0].stride(-1) == b[0].stride(-1) == 1:
        return _by_kernel(a, b, dtype, over)
    wide = accumulator(a[0].dtype)
    (out, lse), (part, part_lse) = a, (b[0].to(wide), b[1].to(wide))
    total = torch.logaddexp(lse.to(wide), part_lse)
    finite = total.masked_fill(total == -torch.inf, 0)  # -inf minus -inf would be NaN; such rows have weight 0
    before, now = torch.exp(lse.to(wide) - finite), torch.exp(part_lse - finite)
    merged = (out * before.unsqueeze(-1)).addcmul_(part, now.unsqueeze(-1))
    return merged.to(dtype), total


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _by_kernel(a: Pair, b: Pair, dtype: torch.dtype, over: bool) -> Pair:
    from attnplan.runtime.ring.merge_kernel import merge_kernel

    (out, lse), (part, part_lse) = a, b
    batch, heads, length, features = out.shape
    made = out if over and out.dtype == dtype else empty_like_rows(out, features, dtype)
    total = torch.empty((batch, heads, length), dtype=torch.float32, device=out.device)
    rows = batch * heads * length
    block = 16 if features <= 128 else 8
    kernel: Any = merge_kernel
    if rows:
        kernel[(-(-rows // block),)](
            out, lse.float().contiguous(), part, part_lse.float().contiguous(), made, total, rows, length, heads,
            *out.stride()[:3], *part.stride()[:3], *made.stride()[:3],
            D=features, BLOCK_D=features_of_block(features), BLOCK_R=block,
        )  # fmt: skip
    return made, total
