"""Stand-ins for the packages that need a GPU: their interfaces in plain torch, which check what they are given.

They follow the sources of flash-attn 2.8, flash-attn 3's Hopper interface, flash-attn-4 4.0.0b36, xformers 0.0.35 and
torch 2.11: argument names and order, ``[B, S, H, D]`` or ``[T, H, D]``, shapes and conventions of the LSE, alignment.
"""

from __future__ import annotations

import sys
from collections import Counter
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

calls: Counter = Counter()
broken: set[str] = set()
"""Names of functions that raise when they are called."""


def called(name: str) -> None:
    calls[name] += 1
    if name in broken:
        raise AssertionError(f"head_dim is not supported by {name}")


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def rows_mask(rows: int, columns: int, causal: bool, left: int | None, right: int | None) -> Tensor:
    """Return the window ``[R, C]``, aligned to the last query and the last key."""
    ahead = torch.arange(columns) - torch.arange(rows)[:, None] - (columns - rows)
    right = 0 if causal else right
    mask = torch.ones(rows, columns, dtype=torch.bool)
    mask = mask & (ahead >= -left) if left is not None else mask
    return mask & (ahead <= right) if right is not None else mask


def scores_of(q: Tensor, k: Tensor, mask: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Return masked scores ``[B, H, R, C]`` in float64, and the derivative of the softcap."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    s = torch.einsum("brhd,bchd->bhrc", q.double(), k.double()) * scale
    slope = torch.ones_like(s)
    if softcap:
        slope = 1 - torch.tanh(s / softcap) ** 2
        s = softcap * torch.tanh(s / softcap)
    return s.masked_fill(~mask, -torch.inf), slope


def forward(q, k, v, mask, scale, softcap=0.0, empty=-torch.inf):
    """Return output ``[B, R, H, Dv]`` and LSE ``[B, H, R]``, which is ``empty`` for rows without a key."""
    s, _ = scores_of(q, k, mask, scale, softcap)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1))
    out = torch.einsum("bhrc,bchd->brhd", p, v.double().repeat_interleave(q.shape[2] // v.shape[2], 2))
    if empty != empty:  # a kernel that leaves garbage in rows without a key
        out = out.masked_fill((lse == -torch.inf).transpose(1, 2).unsqueeze(-1), torch.nan)
    return out.to(q.dtype), lse.masked_fill(lse == -torch.inf, empty).to(lse_dtype(q))


def backward(grad, q, k, v, out, lse, mask, scale, softcap=0.0):
    """Return the gradients from any output and LSE; rows whose LSE is +inf get none."""
    assert not (lse == -torch.inf).any(), "the backward wants +inf for rows without a key"
    s, slope = scores_of(q, k, mask, scale, softcap)
    p = torch.exp(s - lse.double().unsqueeze(-1))
    group = q.shape[2] // k.shape[2]
    dp = torch.einsum("brhd,bchd->bhrc", grad.double(), v.double().repeat_interleave(group, 2))
    delta = (grad.double() * out.double()).sum(-1).transpose(1, 2).unsqueeze(-1)
    ds = p * (dp - delta) * slope * scale
    dq = torch.einsum("bhrc,bchd->brhd", ds, k.double().repeat_interleave(group, 2))
    dk = torch.einsum("bhrc,brhd->bchd", ds, q.double())
    dv = torch.einsum("bhrc,brhd->bchd", p, grad.double())
    dk, dv = (x.unflatten(2, (k.shape[2], group)).sum(3) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def documents_mask(cu: Tensor, left: int | None, right: int | None) -> Tensor:
    assert cu.dtype == torch.int32
    assert cu.dim() == 1
    assert cu.is_contiguous()
    lengths = cu.diff()
    assert (lengths >= 0).all()
    which = torch.repeat_interleave(torch.arange(len(lengths)), lengths.long())
    return (which[:, None] == which) & rows_mask(len(which), len(which), False, left, right)


def check(q, k, v, *more):
    for x in (q, k, v, *more):
        assert x.stride(-1) == 1, "features must lie side by side"
        assert x.dtype == q.dtype
        assert x.dim() == q.dim()
    assert q.shape[-2] % k.shape[-2] == 0
    assert k.shape[:-1] == v.shape[:-1]


def run(q, k, v, cu, window, causal, scale, softcap, empty, backward_of=None, lse=None):
    """Run forward, or backward if ``backward_of`` = (grad, out) is given, packed if ``cu`` is."""
    if cu is None:
        assert q.dim() == 4
        mask = rows_mask(q.shape[1], k.shape[1], causal, *window)
    else:
        assert q.dim() == 3, "packed inputs are [T, H, D]"
        mask = documents_mask(cu, window[0], 0 if causal else window[1])
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    if backward_of is None:
        out, found = forward(q, k, v, mask, scale, softcap, empty)
        return (out, found) if cu is None else (out[0], found[0])
    grad, out = backward_of
    if cu is not None:
        assert lse.shape == (q.shape[2], q.shape[1]), "packed LSE is [H, T]"
        grad, out, lse = grad.unsqueeze(0), out.unsqueeze(0), lse.unsqueeze(0)
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert lse.is_contiguous()
    assert lse.dtype == lse_dtype(q)
    found = backward(grad, q, k, v, out, lse, mask, scale, softcap)
    return found if cu is None else tuple(x[0] for x in found)


def unsigned(left: int, right: int) -> tuple[int | None, int | None]:
    return None if left < 0 else left, None if right < 0 else right


# ------------------------------------------------------------------------------------------------- flash-attn 2 and 3


def fa2() -> ModuleType:
    made = ModuleType("flash_attn.flash_attn_interface")

    def one(name, varlen):
        def _forward(
            q, k, v, *lengths, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
            alibi_slopes, return_softmax,
        ):  # fmt: skip
            called(name)
            check(q, k, v)
            assert (dropout_p, alibi_slopes, return_softmax) == (0.0, None, False)
            assert len(lengths) == (4 if varlen else 0)
            cu = lengths[0] if varlen else None
            window = unsigned(window_size_left, window_size_right)
            out, lse = run(q, k, v, cu, window, causal, softmax_scale, softcap, torch.inf)
            return out, lse, torch.empty(0), torch.empty(2)

        return _forward

    def two(name, varlen):
        def _backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, *lengths, dropout_p, softmax_scale, causal, window_size_left,
            window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
        ):  # fmt: skip
            called(name)
            check(q, k, v, dout, out, dq, dk, dv)
            assert all(x.is_contiguous() for x in (dq, dk, dv))
            assert len(lengths) == (4 if varlen else 0)
            cu = lengths[0] if varlen else None
            window = unsigned(window_size_left, window_size_right)
            found = run(q, k, v, cu, window, causal, softmax_scale, softcap, None, (dout, out), softmax_lse)
            for into, x in zip((dq, dk, dv), found, strict=True):
                into.copy_(x)
            return torch.empty(0)

        return _backward

    made._flash_attn_forward = one("fa2 forward", False)
    made._flash_attn_varlen_forward = one("fa2 varlen forward", True)
    made._flash_attn_backward = two("fa2 backward", False)
    made._flash_attn_varlen_backward = two("fa2 varlen backward", True)

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
        called("fa2 function")
        return _Dense.apply(q, k, v, unsigned(*window_size), causal, softmax_scale, softcap)

    made.flash_attn_func = flash_attn_func
    return made


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, window, causal, scale, softcap):
        check(q, k, v)
        out, lse = run(q, k, v, None, window, causal, scale, softcap, torch.inf)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = window, causal, scale, softcap
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        found = run(q, k, v, None, *ctx.rest, None, (grad, out), lse)
        return *found, None, None, None, None


def fa3() -> ModuleType:
    made = ModuleType("flash_attn_interface")

    def _flash_attn_forward(
        q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
        causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
    ):  # fmt: skip
        called("fa3 forward")
        check(q, k, v)
        assert (cu_seqlens_q is None) == (max_seqlen_q is None)
        window = unsigned(window_size_left, window_size_right)
        out, lse = run(q, k, v, cu_seqlens_q, window, causal, softmax_scale, softcap, torch.inf)
        return out, lse, torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        called("fa3 backward")
        check(q, k, v, dout, out, dq, dk, dv)
        assert isinstance(is_causal, bool)
        assert sequed_q is sequed_k is None
        assert (cu_seqlens_q is None) == (max_seqlen_q is None)
        window = unsigned(window_size_left, window_size_right)
        found = run(q, k, v, cu_seqlens_q, window, is_causal, softmax_scale, softcap, None, (dout, out), softmax_lse)
        for into, x in zip((dq, dk, dv), found, strict=True):
            into.copy_(x)
        return torch.empty(0)

    made._flash_attn_forward, made._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    made.flash_attn_func = fa2().flash_attn_func
    return made


# ------------------------------------------------------------------------------------------------------- flash-attn 4


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_block_idx_offsets: Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: Tensor | None = None
    dq_write_order_full: Tensor | None = None
    spt: bool | None = None


def blocks_mask(tensors, q, k, backward_lists):
    """Return the pairs ``[B, H, R, C]`` of whole tiles; lists of the backward are by tiles of keys."""
    tall, wide = tensors.block_size
    over, along = (k.shape[1], q.shape[1]) if backward_lists else (q.shape[1], k.shape[1])
    size, other = (wide, tall) if backward_lists else (tall, wide)
    rows, columns = -(-over // size), -(-along // other)
    for count, index in zip(tensors[0:4:2], tensors[1:4:2], strict=True):
        assert count.dtype == index.dtype == torch.int32
        assert count.shape[0] in (1, q.shape[0])
        assert count.shape[1] in (1, q.shape[2])
        assert count.shape[2] == rows
        assert index.shape[:3] == count.shape
        assert index.shape[3] <= columns
    assert tensors.mask_block_cnt.sum() == 0, "partial tiles need a mask function"
    kept = torch.zeros(*tensors.full_block_cnt.shape, columns, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in kept.shape[:3])).tolist():
        b, h, r = place
        found = tensors.full_block_idx[b, h, r, : tensors.full_block_cnt[b, h, r]].long()
        assert (found.diff() > 0).all(), "columns must rise"
        kept[b, h, r, found] = True
    kept = kept.transpose(-1, -2) if backward_lists else kept
    return kept.repeat_interleave(tall, 2).repeat_interleave(wide, 3)[:, :, : q.shape[1], : k.shape[1]]


def fa4() -> tuple[ModuleType, ModuleType]:
    made, sparsity = ModuleType("flash_attn.cute.interface"), ModuleType("flash_attn.cute.block_sparsity")
    sparsity.BlockSparseTensorsTorch = BlockSparseTensorsTorch

    def aligned(*tensors):
        for x in tensors:
            if not x.is_contiguous():
                assert all(s % 8 == 0 for s in x.stride()[:-1]), "flash-attn 4 would copy these strides"

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, *, softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None, block_sparse_tensors=None, return_lse=False,
    ):  # fmt: skip
        called("fa4 forward")
        check(q, k, v)
        aligned(q, k, v)
        assert return_lse
        assert softcap is None or softcap > 0
        if block_sparse_tensors is not None:
            assert not causal
            mask = blocks_mask(block_sparse_tensors, q, k, False)
            return *forward(q, k, v, mask, softmax_scale), None, None, None
        window = window_size_left, window_size_right
        assert all(n is None or n >= 0 for n in window)
        found = run(q, k, v, cu_seqlens_q, window, causal, softmax_scale, softcap or 0.0, -torch.inf)
        return *found, None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        block_sparse_tensors=None,
    ):  # fmt: skip
        called("fa4 backward")
        check(q, k, v, out, dout)
        assert softcap is not None
        if block_sparse_tensors is not None:
            mask = blocks_mask(block_sparse_tensors, q, k, True)
            return backward(dout, q, k, v, out, lse, mask, softmax_scale)
        window = window_size_left, window_size_right
        return run(q, k, v, cu_seqlens_q, window, causal, softmax_scale, softcap, None, (dout, out), lse)

    def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size, softcap):
        called("fa4 function")
        aligned(q, k, v)
        return _Dense.apply(q, k, v, window_size, causal, softmax_scale, softcap), None

    made._flash_attn_fwd, made._flash_attn_bwd, made.flash_attn_func = _flash_attn_fwd, _flash_attn_bwd, flash_attn_func
    return made, sparsity


# ----------------------------------------------------------------------------------------------------------- xformers


class Bias(SimpleNamespace):
    """A bias object: any keyword arguments, or one positional window size."""

    def __init__(self, *window, **fields):
        super().__init__(**fields, **({"_window_size": window[0]} if window else {}))


BIASES = (
    "LowerTriangularMask", "LowerTriangularFromBottomRightMask", "LowerTriangularFromBottomRightLocalAttentionMask",
    "LocalAttentionFromBottomRightMask", "BlockDiagonalMask", "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask", "_SeqLenInfo",
)  # fmt: skip


def bias_mask(bias, q, k) -> Tensor:
    if bias is None:
        return rows_mask(q.shape[1], k.shape[1], False, None, None)
    if isinstance(bias, Tensor):
        assert bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        assert bias.dtype == q.dtype
        assert bias.stride(-1) == 1
        assert all(s % 8 == 0 for s in bias.stride()[:-1]), "attn_bias.stride(-2) % 8 != 0"
        return bias == 0
    name = type(bias).__name__
    window = getattr(bias, "_window_size", None)
    left = window - 1 if window else getattr(bias, "window_left", None)
    right = getattr(bias, "window_right", None) if "Local" in name and "Causal" not in name else None
    if "Triangular" in name or "Causal" in name:
        right = 0
    if name == "LowerTriangularMask":
        assert q.shape[1] == k.shape[1]
    if name.startswith("BlockDiagonal"):
        assert q.shape[0] == 1, "Expected batch_size=1 when using block-diagonal bias"
        return documents_mask(bias.q_seqinfo.seqstart, left, right)
    return rows_mask(q.shape[1], k.shape[1], False, left, right)


def supported(op, bias):
    kind = type(bias).__name__
    if op.startswith("triton"):
        assert bias is None or isinstance(bias, Tensor), f"Query length should not be larger than 16: {kind}"
    if op.startswith("flash"):
        assert not isinstance(bias, Tensor), "flash takes no tensor bias"
    if op == "cutlass backward":
        assert "Local" not in kind, "cutlass has no backward of local windows"


def equal_heads(q, k, v):
    check(q, k, v)
    assert q.shape[0] == k.shape[0]
    assert q.shape[2] == k.shape[2], "grouped heads must be expanded"


def xformers() -> ModuleType:
    made = ModuleType("xformers.ops.fmha")
    made.attn_bias = SimpleNamespace(**{name: type(name, (Bias,), {}) for name in BIASES})
    for name in ("flash", "cutlass", "triton_splitk"):
        setattr(made, name, SimpleNamespace(FwOp=f"{name} forward", BwOp=f"{name} backward"))

    def memory_efficient_attention_forward_requires_grad(query, key, value, attn_bias=None, p=0.0, scale=None, *, op):
        called(op)
        equal_heads(query, key, value)
        supported(op, attn_bias)
        empty = torch.nan if op.startswith("cutlass") else torch.inf
        out, lse = forward(query, key, value, bias_mask(attn_bias, query, key), scale, 0.0, empty)
        if op.startswith("cutlass"):
            lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
        return out, lse

    def memory_efficient_attention_backward(
        grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op
    ):
        called(op)
        equal_heads(query, key, value)
        supported(op, attn_bias)
        assert lse.dim() == query.dim() - 1
        assert lse.shape[1] == query.shape[2]
        assert lse.shape[-1] >= query.shape[1]
        lse = lse[..., : query.shape[1]]
        return backward(grad, query, key, value, output, lse, bias_mask(attn_bias, query, key), scale)

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op):
        called("function")
        equal_heads(query, key, value)
        supported(op[0], attn_bias)
        mask = bias_mask(attn_bias, query, key)
        return _Masked.apply(query, key, value, mask, scale)

    made.memory_efficient_attention_forward_requires_grad = memory_efficient_attention_forward_requires_grad
    made.memory_efficient_attention_backward = memory_efficient_attention_backward
    made.memory_efficient_attention = memory_efficient_attention
    return made


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        out, lse = forward(q, k, v, mask, scale, 0.0, torch.inf)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, mask = ctx.saved_tensors
        return *backward(grad, q, k, v, out, lse, mask, ctx.scale), None, None


# ------------------------------------------------------------------------------------------------ operators of torch


def swapped(*tensors):
    return tuple(x.transpose(1, 2) for x in tensors)


class Aten:
    """The CUDA operators of ``torch.ops.aten`` that :mod:`attnplan.runtime.kernels_sdpa` calls."""

    def _scaled_dot_product_flash_attention(self, q, k, v, dropout, causal, debug, *, scale):
        called("aten flash")
        check(*swapped(q, k, v))
        assert not causal or q.shape[2] == k.shape[2]
        out, lse = run(*swapped(q, k, v), None, (None, None), causal, scale, 0.0, torch.inf)
        return out.transpose(1, 2), lse

    def _scaled_dot_product_flash_attention_backward(
        self, grad, q, k, v, out, lse, cq, ck, mq, mk, dropout, causal, seed, offset, *, scale
    ):
        given = swapped(q, k, v)
        found = run(*given, None, (None, None), causal, scale, 0.0, None, swapped(grad, out), lse)
        return swapped(*found)

    def _flash_attention_forward(
        self, q, k, v, cq, ck, mq, mk, dropout, causal, debug, *, scale, window_size_left, window_size_right
    ):
        called("aten flash window")
        check(q, k, v)
        window = unsigned(window_size_left, window_size_right)
        return *run(q, k, v, cq, window, causal, scale, 0.0, torch.inf), None, None, None

    def _flash_attention_backward(
        self, grad, q, k, v, out, lse, cq, ck, mq, mk, dropout, causal, rng, unused, *, scale, window_size_left,
        window_size_right,
    ):  # fmt: skip
        check(q, k, v)
        window = unsigned(window_size_left, window_size_right)
        return run(q, k, v, cq, window, causal, scale, 0.0, None, (grad, out), lse)

    def _scaled_dot_product_cudnn_attention(self, q, k, v, bias, with_lse, dropout, causal, debug, *, scale):
        called("aten cudnn")
        check(*swapped(q, k, v))
        assert bias is None
        assert with_lse
        out, lse = run(*swapped(q, k, v), None, (None, None), causal, scale, 0.0, torch.inf)
        return out.transpose(1, 2), lse.unsqueeze(-1)

    def _scaled_dot_product_cudnn_attention_backward(
        self, grad, q, k, v, out, lse, seed, offset, bias, cq, ck, mq, mk, dropout, causal, *, scale
    ):
        assert lse.dim() == 4
        assert lse.is_contiguous()
        assert seed.dtype == torch.int64
        given, above = swapped(q, k, v), swapped(grad, out)
        return swapped(*run(*given, None, (None, None), causal, scale, 0.0, None, above, lse.squeeze(-1)))

    def _efficient_mask(self, bias, q, k, causal):
        if bias is None:
            return rows_mask(q.shape[2], k.shape[2], causal, None, None)
        assert not causal
        return bias_mask(bias, *swapped(q, k))

    def _scaled_dot_product_efficient_attention(self, q, k, v, bias, with_lse, dropout, causal, *, scale):
        called("aten efficient")
        check(*swapped(q, k, v))
        assert q.shape[1] == k.shape[1]
        assert with_lse
        out, lse = forward(*swapped(q, k, v), self._efficient_mask(bias, q, k, causal), scale, 0.0, torch.nan)
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
        return out.transpose(1, 2), lse, None, None

    def _scaled_dot_product_efficient_attention_backward(
        self, grad, q, k, v, bias, out, lse, seed, offset, dropout, which, causal, *, scale
    ):
        assert which == [True, True, True, False]
        assert lse.shape[-1] % 32 == 0
        assert lse.is_contiguous()
        assert (lse[..., q.shape[2] :] == torch.inf).all()
        mask = self._efficient_mask(bias, q, k, causal)
        found = backward(*swapped(grad, q, k, v, out), lse[..., : q.shape[2]], mask, scale)
        return *swapped(*found), None


def install(monkeypatch, *, without=()):
    """Put the packages where imports find them, as if they were installed, and torch's operators where they are."""
    from attnplan.backends import base
    from attnplan.runtime import kernels_flash, kernels_sdpa, kernels_xformers

    calls.clear()
    broken.clear()
    four, sparsity = fa4()
    modules = {
        "flash_attn": ModuleType("flash_attn"),
        "flash_attn.cute": ModuleType("flash_attn.cute"),
        "flash_attn.cute.interface": four,
        "flash_attn.cute.block_sparsity": sparsity,
        "flash_attn.flash_attn_interface": fa2(),
        "flash_attn_interface": fa3(),
        "xformers": ModuleType("xformers"),
        "xformers.ops": ModuleType("xformers.ops"),
        "xformers.ops.fmha": xformers(),
    }
    for name, module in modules.items():
        if name not in without:
            monkeypatch.setitem(sys.modules, name, module)
    for cached in (kernels_flash.module, kernels_xformers.fmha, base.import_failure):
        cached.cache_clear()
    monkeypatch.setattr(base, "_version", lambda name: "0.0")
    monkeypatch.setattr(kernels_sdpa, "_aten", Aten())
