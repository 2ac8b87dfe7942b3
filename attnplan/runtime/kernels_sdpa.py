"""Torch's own CUDA kernels: FlashAttention-2 with windows and packed documents, and the efficient kernel.

LSE conventions differ: FlashAttention-2 reports +inf for rows without a key, and the efficient kernel pads its rows to
a multiple of 32. Each is converted here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnplan.ir.native import EVERYTHING
from attnplan.runtime.kernels import Pair, Request, Triple, additive, blank_empty_rows, may_lack_keys
from attnplan.runtime.views import rows_first

_aten = torch.ops.aten
_LSE_ROWS = 32  # the efficient kernel reads LSE in runs of this many rows
BIAS_ELEMENTS = 16  # and additive masks whose rows are this many elements apart, so that every load is aligned


def signed(window: tuple[int | None, int | None]) -> tuple[int, int]:
    """Return a window as FlashAttention-2 and 3 take it: -1 is no limit."""
    return tuple(-1 if n is None else n for n in window)  # type: ignore[return-value]


def boundaries(documents: Tensor, batch: int, length: int) -> Tensor:
    """Return cumulative lengths of the documents of a whole batch, laid end to end: int32 ``[batch * (n + 1)]``.

    Where one batch element ends the next begins: the document between them is empty.

    Examples
    --------
    >>> boundaries(torch.tensor([0, 2, 5]), 2, 5)
    tensor([ 0,  2,  5,  5,  7, 10], dtype=torch.int32)
    """
    starts = torch.arange(batch, device=documents.device) * length
    each = documents.reshape(-1, documents.shape[-1]).expand(batch, -1)
    return (each + starts.unsqueeze(1)).flatten().to(torch.int32)


def _split(x: Tensor, dim: int, first: int) -> Tensor:
    """Return ``x`` with a dimension cut in two, the first of the given size."""
    return x.reshape(*x.shape[:dim], first, -1, *x.shape[dim + 1 :])


def packed(x: Tensor) -> Tensor:
    """Return ``[B, H, S, D]`` as ``[B * S, H, D]``, a view where strides allow."""
    return x.transpose(1, 2).flatten(0, 1)


def unpacked(x: Tensor, batch: int) -> Tensor:
    """Return the inverse of :func:`packed`."""
    return _split(x, 0, batch).transpose(1, 2)


def packed_lse(lse: Tensor) -> Tensor:
    """Return LSE ``[B, H, S]`` as ``[H, B * S]``."""
    return lse.transpose(0, 1).flatten(1).contiguous()


def unpacked_lse(lse: Tensor, batch: int) -> Tensor:
    """Return the inverse of :func:`packed_lse`."""
    return _split(lse, 1, batch).transpose(0, 1)


def empty_rows_below(lse: Tensor) -> Tensor:
    """Return LSE with -inf for rows without a key, for which FlashAttention-2 reports +inf."""
    return lse.masked_fill(lse == torch.inf, -torch.inf)


def empty_rows_above(lse: Tensor) -> Tensor:
    """Return contiguous LSE with +inf for rows without a key, as the backward of FlashAttention-2 needs it."""
    return lse.masked_fill(lse == -torch.inf, torch.inf).contiguous()


def _windowed(asked: Request) -> dict[str, Any]:
    left, right = signed(asked.window)
    return {"scale": asked.scale, "window_size_left": left, "window_size_right": right}


class FlashCUDA:
    """SDPA's FlashAttention-2 operator for CUDA: half precision, windows, packed documents, no other mask."""

    widest = 256
    groups = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, asked: Request) -> Pair:
        """Run the forward operator."""
        assert asked.mask is None
        if asked.window == EVERYTHING and asked.documents is None:
            result = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, asked.causal, False, scale=asked.scale)
            return result[0], result[1][..., : q.shape[2]]
        rest = _windowed(asked)
        if asked.documents is None:
            whole = (None, None, q.shape[2], k.shape[2], 0.0, False, False)
            given = (x.transpose(1, 2) for x in (q, k, v))
            out, lse, *_ = _aten._flash_attention_forward(*given, *whole, **rest)
            return out.transpose(1, 2), empty_rows_below(lse) if may_lack_keys(q, k, asked) else lse
        cu = boundaries(asked.documents, q.shape[0], q.shape[2])
        lengths = (cu, cu, q.shape[2], k.shape[2], 0.0, False, False)
        out, lse, *_ = _aten._flash_attention_forward(packed(q), packed(k), packed(v), *lengths, **rest)
        return unpacked(out, q.shape[0]), unpacked_lse(lse, q.shape[0])

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, asked: Request
    ) -> Triple:
        """Run the backward operator. Without packed lengths and dropout it wants None for what describes them."""
        assert asked.mask is None
        lengths = (q.shape[2], k.shape[2], 0.0)
        if asked.window == EVERYTHING and asked.documents is None:
            given = (grad, q, k, v, out, lse.contiguous())
            return _aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
                *given, None, None, *lengths, asked.causal, None, None, scale=asked.scale
            )
        rest = _windowed(asked)
        if asked.documents is None:
            rows = (x.transpose(1, 2) for x in (grad, q, k, v, out))
            stats = empty_rows_above(lse) if may_lack_keys(q, k, asked) else lse.contiguous()
            whole = (stats, None, None, *lengths, False, None, None)
            dq, dk, dv = _aten._flash_attention_backward(*rows, *whole, **rest)
            return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
        cu = boundaries(asked.documents, q.shape[0], q.shape[2])
        rows = (packed(x) for x in (grad, q, k, v, out))
        apart = (packed_lse(lse), cu, cu, *lengths, False, None, None)
        found = _aten._flash_attention_backward(*rows, *apart, **rest)
        dq, dk, dv = (unpacked(x, q.shape[0]) for x in found)
        return dq, dk, dv


class Efficient:
    """SDPA's memory-efficient operator: any mask, as an additive one; equal heads of q and k, others by a view."""

    widest = 1 << 16
    groups = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, asked: Request) -> Pair:
        """Run the forward operator."""
        assert asked.is_plain, "the operator knows no windows"
        heads = Groups(q, k)
        bias = additive(heads.mask(asked.mask), q.dtype, BIAS_ELEMENTS, heads.mask(asked.bias))
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
            heads.queries(q), heads.keys(k), heads.keys(v), bias, True, 0.0, asked.causal, scale=asked.scale
        )
        out, lse = heads.back(out), heads.back(lse[..., : q.shape[2]])
        if asked.mask is not None and asked.mask.dtype == torch.bool:
            out, lse = out.contiguous(), lse.contiguous()
            blank_empty_rows(asked.mask, out, lse)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, asked: Request
    ) -> Triple:
        """Run the backward operator, which wants LSE +inf for rows without a key and for those that pad it."""
        heads = Groups(q, k)
        bias = additive(heads.mask(asked.mask), q.dtype, BIAS_ELEMENTS, heads.mask(asked.bias))
        above = lse.masked_fill(lse == -torch.inf, torch.inf) if may_lack_keys(q, k, asked) else lse
        stats = F.pad(heads.queries(above), (0, -q.shape[2] % _LSE_ROWS), value=torch.inf).contiguous()
        seed = q.new_empty((), dtype=torch.int64)
        before = (heads.queries(grad), heads.queries(q), heads.keys(k), heads.keys(v), bias)
        given = (*before, rows_first(heads.queries(out)), stats)
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
            *given, seed, seed, 0.0, [True, True, True, False], asked.causal, scale=asked.scale
        )
        return heads.back(dq), heads.reduce(dk), heads.reduce(dv)


class Groups:
    """Grouped heads for a kernel that needs as many of k as of q: groups become batches, along which k broadcasts."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.batch, self.heads, self.kv_heads = q.shape[0], q.shape[1], k.shape[1]
        self.group = self.heads // self.kv_heads

    def queries(self, x: Tensor) -> Tensor:
        """Return ``[B, H, ...]`` as ``[B * H_kv, H // H_kv, ...]``, a view where strides allow."""
        return x if self.group == 1 else _split(x, 1, self.kv_heads).flatten(0, 1)

    def keys(self, x: Tensor) -> Tensor:
        """Return ``[B, H_kv, C, D]`` as ``[B * H_kv, H // H_kv, C, D]`` without repeating it in memory."""
        return x if self.group == 1 else x.flatten(0, 1).unsqueeze(1).expand(-1, self.group, -1, -1)

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """Return a mask that broadcasts to ``[B, H, R, C]`` in full size, for the queries."""
        return None if mask is None else self.queries(mask.expand(self.batch, self.heads, -1, -1))

    def back(self, x: Tensor) -> Tensor:
        """Return the inverse of :meth:`queries`."""
        return x if self.group == 1 else _split(x, 0, self.batch).flatten(1, 2)

    def reduce(self, x: Tensor) -> Tensor:
        """Return gradients of keys, summed over the queries of a group."""
        return x if self.group == 1 else _split(x.sum(1), 0, self.batch)
