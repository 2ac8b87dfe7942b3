"""Stand-ins for flash-attn 2.8, flash-attn 3's Hopper interface and flash-attn-4 4.0.0b36."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from tests.fake_attention import backward, called, calls, check, forward, run, unsigned


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


def blocks_mask(tensors, q, k, backward_lists, mask_mod=None, aux=None):
    """Return the pairs ``[B, H, R, C]`` of kept tiles; lists of the backward are by tiles of keys."""
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
    if mask_mod is None:
        assert tensors.mask_block_cnt.sum() == 0, "partial tiles need a mask function"
    each = []
    for count, index in zip(tensors[0:4:2], tensors[1:4:2], strict=True):
        kept = torch.zeros(*count.shape, columns, dtype=torch.bool)
        for b, h, r in torch.cartesian_prod(*(torch.arange(n) for n in kept.shape[:3])).tolist():
            found = index[b, h, r, : count[b, h, r]].long()
            assert (found.diff() > 0).all(), "columns must rise"
            kept[b, h, r, found] = True
        kept = kept.transpose(-1, -2) if backward_lists else kept
        each.append(kept.repeat_interleave(tall, 2).repeat_interleave(wide, 3)[:, :, : q.shape[1], : k.shape[1]])
    partial, full = each
    assert not (partial & full).any(), "a tile is whole or partial"
    return full if mask_mod is None else full | (partial & called_mask(mask_mod, aux, q, k))


def called_mask(mask_mod, aux, q, k):
    """Return what a mask function says of every pair, called as ``flash_attn.cute.mask.call_mask_mod`` does."""
    assert isinstance(aux, list)
    for x in aux:
        assert x.dtype == torch.int32
        assert sum(n > 1 and s == 1 for n, s in zip(x.shape, x.stride(), strict=True)) <= 1, "one dimension of stride 1"
        assert all(s > 0 for s in x.stride())
        assert x.stride().count(1) == 1, "which dimension leads is not clear"
    sizes = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    b, h, i, j = (torch.arange(n).reshape([n if d == a else 1 for d in range(4)]) for a, n in enumerate(sizes))
    return mask_mod([b], [h], [i], [j], SimpleNamespace(seqlen_q=sizes[2], seqlen_k=sizes[3]), aux).expand(sizes)


def mask_language():
    """Return the modules in which mask functions are written: a decorated function stays what it is."""
    cutlass, cute, utils = (ModuleType(n) for n in ("cutlass", "cutlass.cute", "flash_attn.cute.utils"))
    cutlass.Int32, cutlass.cute, cute.jit = "int32", cute, lambda function: function
    utils.scalar_to_ssa = lambda x, dtype: x
    return {m.__name__: m for m in (cutlass, cute, utils)}


def documents_of(cu, length):
    """Return the document of each row."""
    assert cu.dtype == torch.int32
    assert cu.is_contiguous()
    assert (cu[0], cu[-1]) == (0, length)
    return torch.repeat_interleave(torch.arange(len(cu) - 1), cu.diff().long())


def with_sink(out, lse, sink):
    """Return output and LSE that count one more key of value 0 for each head; rows without another get its logit."""
    if sink is None:
        return out, lse
    assert sink.shape == (out.shape[-2],), "learnable_sink must be [heads]"
    assert sink.dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert not sink.requires_grad
    total = torch.logaddexp(lse, (sink[:, None]).to(lse.dtype).expand_as(lse))
    kept = torch.exp(lse - total.masked_fill(total == -torch.inf, 0)).transpose(-1, -2).unsqueeze(-1)
    return (out * kept).to(out.dtype), total


def written(found, out):
    """Write a result where the caller said, if it did; the interface refuses broadcasts there."""
    if out is None:
        return found
    assert (out.shape, out.dtype) == (found.shape, found.dtype)
    assert 0 not in out.stride(), "out must not have broadcast dimensions"
    called("fa4 told where to write")
    return out.copy_(found)


def aligned(*tensors):
    for x in tensors:
        if not x.is_contiguous():
            assert all(s % 8 == 0 for s in x.stride()[:-1]), "flash-attn 4 would copy these strides"


def forward_of(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, softcap,
    window_size_left, window_size_right, learnable_sink, mask_mod, block_sparse_tensors, return_lse, aux_tensors,
):  # fmt: skip
    check(q, k, v)
    aligned(q, k, v)
    assert return_lse
    assert softcap is None or softcap > 0
    if block_sparse_tensors is not None:
        assert not causal
        mask = blocks_mask(block_sparse_tensors, q, k, False, mask_mod, aux_tensors)
        return *forward(q, k, v, mask, softmax_scale), None, None, None
    assert mask_mod is aux_tensors is None
    window = window_size_left, window_size_right
    assert all(n is None or n >= 0 for n in window)
    if cu_seqlens_k is not cu_seqlens_q:
        calls["fa4 pieces"] += len(cu_seqlens_k) - 1
        assert not causal
        assert window == (None, None)
        assert (max_seqlen_q, max_seqlen_k) == (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max())
        mask = documents_of(cu_seqlens_q, len(q))[:, None] == documents_of(cu_seqlens_k, len(k))
        out, lse = forward(q[None], k[None], v[None], mask, softmax_scale, softcap or 0.0)
        return out[0], lse[0], None, None, None
    found = run(q, k, v, cu_seqlens_q, window, causal, softmax_scale, softcap or 0.0, -torch.inf)
    return *with_sink(*found, learnable_sink), None, None, None


def backward_of(
    q, k, v, out, dout, lse, softmax_scale, causal, softcap, window_size_left, window_size_right, cu_seqlens_q,
    block_sparse_tensors,
):  # fmt: skip
    assert softcap is not None
    if block_sparse_tensors is not None:
        mask = blocks_mask(block_sparse_tensors, q, k, True)
        return backward(dout, q, k, v, out, lse, mask, softmax_scale)
    window = window_size_left, window_size_right
    return run(q, k, v, cu_seqlens_q, window, causal, softmax_scale, softcap, None, (dout, out), lse)


def fa4() -> tuple[ModuleType, ModuleType]:
    made, sparsity = ModuleType("flash_attn.cute.interface"), ModuleType("flash_attn.cute.block_sparsity")
    sparsity.BlockSparseTensorsTorch = BlockSparseTensorsTorch

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, *, softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None, learnable_sink=None, mask_mod=None, block_sparse_tensors=None, return_lse=False,
        aux_tensors=None, out=None,
    ):  # fmt: skip
        called("fa4 forward" if learnable_sink is None else "fa4 forward with sinks")
        given = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        rest = (softmax_scale, causal, softcap, window_size_left, window_size_right, learnable_sink, mask_mod)
        found, *more = forward_of(*given, *rest, block_sparse_tensors, return_lse, aux_tensors)
        return written(found, out), *more

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        block_sparse_tensors=None, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        called("fa4 backward")
        check(q, k, v, out, dout)
        options = (softmax_scale, causal, softcap, window_size_left, window_size_right, cu_seqlens_q)
        found = backward_of(q, k, v, out, dout, lse, *options, block_sparse_tensors)
        return tuple(written(x, into) for x, into in zip(found, (dq, dk, dv), strict=True))

    def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size, softcap):
        called("fa4 function")
        aligned(q, k, v)
        return _Dense.apply(q, k, v, window_size, causal, softmax_scale, softcap), None

    made._flash_attn_fwd, made._flash_attn_bwd, made.flash_attn_func = _flash_attn_fwd, _flash_attn_bwd, flash_attn_func
    return made, sparsity
