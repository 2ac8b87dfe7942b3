# mypy: ignore-errors
"""The Triton kernel that merges two parts of a softmax. Imported only where Triton is."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_kernel(
    a, a_lse, b, b_lse, out, lse, rows, length, heads,
    a_batch, a_head, a_row, b_batch, b_head, b_row, o_batch, o_head, o_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write the merge of ``a`` and ``b`` row by row; rows of weight 0 are not read. ``out`` may be ``a``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    la = tl.load(a_lse + row, mask=inside, other=float("-inf"))
    lb = tl.load(b_lse + row, mask=inside, other=float("-inf"))
    high = tl.maximum(la, lb)
    shift = tl.where(high == float("-inf"), 0.0, high)  # -inf minus -inf would be NaN
    wa, wb = tl.exp(la - shift), tl.exp(lb - shift)
    both = wa + wb
    total = tl.where(both > 0, shift + tl.log(both), float("-inf"))
    tl.store(lse + row, total, mask=inside)
    scale = 1.0 / tl.where(both > 0, both, 1.0)
    wa, wb = wa * scale, wb * scale
    place, head, batch = row % length, (row // length) % heads, row // length // heads
    columns = tl.arange(0, BLOCK_D)
    fits = columns[None, :] < D
    at_a = batch * a_batch + head * a_head + place * a_row
    at_b = batch * b_batch + head * b_head + place * b_row
    at_o = batch * o_batch + head * o_head + place * o_row
    x = tl.load(a + at_a[:, None] + columns[None, :], mask=(inside & (wa > 0))[:, None] & fits, other=0.0).to(
        tl.float32
    )
    y = tl.load(b + at_b[:, None] + columns[None, :], mask=(inside & (wb > 0))[:, None] & fits, other=0.0).to(
        tl.float32
    )
    merged = x * wa[:, None] + y * wb[:, None]
    tl.store(out + at_o[:, None] + columns[None, :], merged.to(out.dtype.element_ty), mask=inside[:, None] & fits)
