# mypy: ignore-errors
"""The Triton kernel that merges up to four parts of a softmax. Imported only where Triton is."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _lse_of(part, group, place, first, count, inside):
    """Return a part's LSE of some rows, -inf of those that it does not have."""
    has = inside & (place >= first) & (place < first + count)
    return tl.load(part + group * count + (place - first), mask=has, other=float("-inf"))


@triton.jit
def _rows_of(part, batch, head, place, columns, fits, weight, by_batch, by_head, by_row):
    """Return a part's output of some rows times their weights; rows of weight 0 are not read."""
    at = batch * by_batch + head * by_head + place * by_row
    read = (weight > 0)[:, None] & fits
    return tl.load(part + at[:, None] + columns[None, :], mask=read, other=0.0).to(tl.float32) * weight[:, None]


@triton.jit
def merge_kernel(
    a, a_lse, b, b_lse, c, c_lse, d, d_lse, out, lse, rows, length, heads,
    a_batch, a_head, a_row, a_first, a_count, b_batch, b_head, b_row, b_first, b_count,
    c_batch, c_head, c_row, c_first, c_count, d_batch, d_head, d_row, d_first, d_count,
    o_batch, o_head, o_row, PARTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write the merge of parts row by row. ``out`` may be ``a``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    place, group = row % length, row // length
    head, batch = group % heads, group // heads
    la = _lse_of(a_lse, group, place, a_first, a_count, inside)
    lb = _lse_of(b_lse, group, place, b_first, b_count, inside)
    high = tl.maximum(la, lb)
    if PARTS > 2:
        lc = _lse_of(c_lse, group, place, c_first, c_count, inside)
        high = tl.maximum(high, lc)
    if PARTS > 3:
        ld = _lse_of(d_lse, group, place, d_first, d_count, inside)
        high = tl.maximum(high, ld)
    shift = tl.where(high == float("-inf"), 0.0, high)  # -inf minus -inf would be NaN
    wa, wb = tl.exp(la - shift), tl.exp(lb - shift)
    both = wa + wb
    if PARTS > 2:
        wc = tl.exp(lc - shift)
        both += wc
    if PARTS > 3:
        wd = tl.exp(ld - shift)
        both += wd
    tl.store(lse + row, tl.where(both > 0, shift + tl.log(both), float("-inf")), mask=inside)
    scale = 1.0 / tl.where(both > 0, both, 1.0)
    columns = tl.arange(0, BLOCK_D)
    fits = columns[None, :] < D
    merged = _rows_of(a, batch, head, place - a_first, columns, fits, wa * scale, a_batch, a_head, a_row)
    merged += _rows_of(b, batch, head, place - b_first, columns, fits, wb * scale, b_batch, b_head, b_row)
    if PARTS > 2:
        merged += _rows_of(c, batch, head, place - c_first, columns, fits, wc * scale, c_batch, c_head, c_row)
    if PARTS > 3:
        merged += _rows_of(d, batch, head, place - d_first, columns, fits, wd * scale, d_batch, d_head, d_row)
    at_o = batch * o_batch + head * o_head + place * o_row
    tl.store(out + at_o[:, None] + columns[None, :], merged.to(out.dtype.element_ty), mask=inside[:, None] & fits)
