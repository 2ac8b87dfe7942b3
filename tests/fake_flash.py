"""Stand-ins for flash-attn 2.8, flash-attn 3's Hopper interface and flash-attn-4 4.0.0b36."""

from __future__ import annotations

from collections import Counter
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.fake_attention import (
    called,
    calls,
    check,
    documents_mask,
    forward,
    gradients,
    lse_dtype,
    rows_mask,
    run,
    unsigned,
)

entered: Counter = Counter()
"""How often host code of flash-attn 4 ran, ``calls`` being what its kernels did."""
_LOG2_E = 1.4426950408889634
_ROWS, _FEATURES = 8, 32  # buffers of the backward are rounded up to these


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


class AuxData(NamedTuple):
    tensors: tuple | list | None = None
    scalars: tuple | None = None


def normalized(tensors, q, k, backward_lists, mask_mod):
    """Return the tensors of lists as a kernel gets them: expanded views of what was given, or None."""
    if tensors is None:
        return None
    tall, wide = tensors.block_size
    over, along = (k.shape[1], q.shape[1]) if backward_lists else (q.shape[1], k.shape[1])
    size, other = (wide, tall) if backward_lists else (tall, wide)
    rows, columns, made = -(-over // size), -(-along // other), []
    for count, index in zip(tensors[0:4:2], tensors[1:4:2], strict=True):
        assert count.dtype == index.dtype == torch.int32
        assert count.shape[0] in (1, q.shape[0])
        assert count.shape[1] in (1, q.shape[2])
        assert count.shape[2] == rows
        assert index.shape[:3] == count.shape
        assert index.shape[3] <= columns
        sizes = (q.shape[0], q.shape[2], rows)
        made += [x if x.shape[:3] == sizes else x.expand(*sizes, *x.shape[3:]) for x in (count, index)]
    if mask_mod is None:
        assert tensors.mask_block_cnt.sum() == 0, "partial tiles need a mask function"
    return (*made, None, None, None, None)


def blocks_mask(tensors, block_size, q, k, backward_lists, mask_mod=None, aux=None):
    """Return the pairs ``[B, H, R, C]`` of kept tiles; lists of the backward are by tiles of keys."""
    tall, wide = block_size
    columns = -(-q.shape[1] // tall) if backward_lists else -(-k.shape[1] // wide)
    each = []
    for count, index in zip(tensors[0:4:2], tensors[1:4:2], strict=True):
        there = torch.arange(index.shape[-1]) < count.unsqueeze(-1)
        assert (index.diff() > 0)[there[..., 1:]].all(), "columns must rise"
        kept = torch.zeros(*count.shape, columns + 1, dtype=torch.bool)
        kept = kept.scatter_(-1, torch.where(there, index, columns).long(), value=True)[..., :columns]
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


def told(out, like):
    """Return where a result goes: a new tensor, or what the caller said."""
    if out is None:
        return torch.empty_like(like)
    assert (out.shape, out.dtype, out.device) == (like.shape, like.dtype, like.device)
    assert all(n == 1 or step for n, step in zip(out.shape, out.stride(), strict=True)), "a broadcast"
    return out


def write(out, found):
    """Write a result, as a kernel does; a part of a larger tensor is a place that the caller chose."""
    if out.numel() * out.element_size() < out.untyped_storage().nbytes():
        called("fa4 told where to write")
    out.copy_(found)


def aligned(*tensors):
    for x in tensors:
        if not x.is_contiguous():
            assert all(s % 8 == 0 for s in x.stride()[:-1]), "flash-attn 4 would copy these strides"


def resolved(causal, left, right, mask_mod=None):
    """Return (causal, local, left, right) as the interface hands them on: a window's numbers are arguments."""
    assert all(n is None or n >= 0 for n in (left, right))
    if mask_mod is not None:
        return False, False, left, right
    right = 0 if causal else right
    if left is None and right is None:
        return False, False, None, None
    return (True, False, None, None) if left is None and right == 0 else (False, True, left, right)


class Options(NamedTuple):
    """What a kernel is compiled for. Sizes, windows and tables are arguments."""

    causal: bool
    local: bool
    softcap: float
    mask_mod: Any = None
    block_size: tuple[int, int] | None = None

    def mask(self, q, k, cu_q, cu_k, window, sparse, aux, *, backward_lists=False):
        if sparse is not None:
            return blocks_mask(sparse, self.block_size, q, k, backward_lists, self.mask_mod, aux.tensors)
        left, right = window if self.local else (None, 0 if self.causal else None)
        if cu_q is None:
            return rows_mask(q.shape[1], k.shape[1], False, left, right)
        if cu_k is cu_q:
            return documents_mask(cu_q, left, right)
        calls["fa4 pieces"] += len(cu_k) - 1
        assert left is right is None
        return documents_of(cu_q, q.shape[1])[:, None] == documents_of(cu_k, k.shape[1])


def one_batch(packed, *tensors):
    return [x.unsqueeze(0) if packed else x for x in tensors]


def compiled_forward(options):
    def kernel(
        q, k, v, out, lse, scale, cu_q, cu_k, used_q, used_k, pages, left, right, sink, sparse, aux, total, splits
    ):  # fmt: skip
        called("fa4 forward" if sink is None else "fa4 forward with sinks")
        assert used_q is used_k is pages is total is splits is aux.scalars is None
        q, k, v = one_batch(cu_q is not None, q, k, v)
        mask = options.mask(q, k, cu_q, cu_k, (left, right), sparse, aux)
        found = with_sink(*forward(q, k, v, mask, scale, options.softcap), sink)
        for into, x in zip((out, lse), found, strict=True):
            write(into, x if cu_q is None else x[0])

    return kernel


def compiled_before_backward(out, dout, dpsum, lse, lse_base_2, dq_sum, cu, *rest):
    assert [x for x in rest if x is not None] == [1.0]
    assert not (lse == -torch.inf).any(), "the backward wants +inf for rows without a key"
    rows = lse.shape[-1]
    for x in (dpsum, lse_base_2):
        x[..., rows:].fill_(torch.nan)
    dpsum[..., :rows] = (out.double() * dout.double()).sum(-1).transpose(-1, -2)
    lse_base_2[..., :rows] = lse * _LOG2_E
    dq_sum.zero_()


def added_up(total, found):
    """Add ``[B, S, H, D]`` to a sum in float32 ``[B, H, rounded S * rounded D]``."""
    by_head = found.transpose(1, 2)
    wide = -(-by_head.shape[-1] // _FEATURES) * _FEATURES
    total.view(*by_head.shape[:2], -1, wide)[:, :, : by_head.shape[2], : by_head.shape[3]] += by_head


def compiled_after_backward(total, out, scale, cu, used, sinks, blocks):
    assert used is sinks is blocks is None
    wide = -(-out.shape[-1] // _FEATURES) * _FEATURES
    by_head = total.view(*total.shape[:-1], -1, wide)[..., : out.shape[-3], : out.shape[-1]]
    write(out, by_head.transpose(-2, -3))


def compiled_backward(options):
    def kernel(
        q, k, v, dout, lse_base_2, dpsum, dq_sum, dk, dv, scale, cu_q, cu_k, used_q, used_k, left, right, turn_q,
        turn_k, turn_v, aux, sparse, total,
    ):  # fmt: skip
        called("fa4 backward")
        assert used_q is used_k is turn_q is turn_k is turn_v is total is aux.tensors is aux.scalars is None
        packed, summed = cu_q is not None, q.shape[-2] != k.shape[-2]
        q, k, v, dout, lse_base_2, dpsum, dq_sum = one_batch(packed, q, k, v, dout, lse_base_2, dpsum, dq_sum)
        dk, dv = one_batch(packed, dk, dv)
        mask = options.mask(q, k, cu_q, cu_k, (left, right), sparse, aux, backward_lists=True)
        lse, delta = (x[..., : q.shape[1]] for x in (lse_base_2 / _LOG2_E, dpsum))
        dq, *found = gradients(dout, q, k, v, lse, delta, mask, scale, options.softcap)
        added_up(dq_sum, dq)
        for into, x in zip((dk, dv), found, strict=True):
            (added_up if summed else write)(into, x)

    return kernel


def found_in(table, key, compile_it):
    """Return a compiled kernel as the interface looks it up: asked for, put there, and taken."""
    if key not in table:
        table[key] = compile_it()
    return table[key]


def fa4() -> tuple[ModuleType, ModuleType]:
    made, sparsity = ModuleType("flash_attn.cute.interface"), ModuleType("flash_attn.cute.block_sparsity")
    sparsity.BlockSparseTensorsTorch = BlockSparseTensorsTorch
    entered.clear()

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, *, softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None, learnable_sink=None, mask_mod=None, block_sparse_tensors=None, return_lse=False,
        aux_tensors=None, out=None, lse=None,
    ):  # fmt: skip
        entered["forward"] += 1
        check(q, k, v)
        aligned(q, k, v)
        assert q.dim() == (4 if cu_seqlens_q is None else 3), "packed inputs are [T, H, D]"
        assert return_lse
        assert softcap is None or softcap > 0
        sparse = normalized(block_sparse_tensors, q, k, False, mask_mod)
        assert sparse is None or not causal
        assert sparse is not None or mask_mod is aux_tensors is None
        if cu_seqlens_k is not cu_seqlens_q:
            assert not causal
            assert window_size_left is window_size_right is None
            assert (max_seqlen_q, max_seqlen_k) == (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max())
        out = told(out, q.new_empty((*q.shape[:-1], v.shape[-1])))
        lse = told(lse, q[..., 0].transpose(-1, -2).contiguous().to(lse_dtype(q)))
        assert 0 not in (*out.stride(), *lse.stride()), "out must not have broadcast dimensions"
        is_causal, local, left, right = resolved(causal, window_size_left, window_size_right, mask_mod)
        size = None if sparse is None else block_sparse_tensors.block_size
        options = Options(is_causal, local, softcap or 0.0, mask_mod, size)
        key = (options, q.dtype, sparse is not None and [[s == 0 for s in x.stride()] for x in sparse[:4]])
        found_in(_flash_attn_fwd.compile_cache, str(key), lambda: compiled_forward(options))(
            q.detach(), k.detach(), v.detach(), out.detach(), lse, softmax_scale, cu_seqlens_q, cu_seqlens_k, None,
            None, None, left, right, learnable_sink, sparse, AuxData(aux_tensors, None), None, None,
        )  # fmt: skip
        return out, lse, None, None, None

    def _bwd_preprocess(*args):
        found_in(_bwd_preprocess.compile_cache, args[0].dtype, lambda: compiled_before_backward)(*args)

    def _bwd_postprocess_convert(*args):
        found_in(_bwd_postprocess_convert.compile_cache, args[1].dtype, lambda: compiled_after_backward)(*args)

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        block_sparse_tensors=None, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        entered["backward"] += 1
        check(q, k, v, out, dout)
        assert softcap is not None
        assert lse.shape == (*q.shape[:-3], q.shape[-2], q.shape[-3]), "LSE is [B, H, S], or [H, T] if packed"
        assert lse.is_contiguous()
        assert lse.dtype == lse_dtype(q)
        sparse = normalized(block_sparse_tensors, q, k, True, None)
        dq, dk, dv = (told(into, x) for into, x in zip((dq, dk, dv), (q, k, v), strict=True))
        rows, columns = (-(-x.shape[-3] // _ROWS) * _ROWS for x in (q, k))
        lead = (*q.shape[:-3], q.shape[-2])
        dpsum, lse_base_2 = (lse.new_full((*lead, rows), torch.nan) for _ in range(2))
        wide = -(-q.shape[-1] // _FEATURES) * _FEATURES
        dq_sum = lse.new_full((*lead, rows * wide), torch.nan)
        _bwd_preprocess(
            out, dout, dpsum, lse, lse_base_2, dq_sum, cu_seqlens_q, None, None, None, None, 1.0, None, None
        )
        summed = q.shape[-2] != k.shape[-2]
        sums = [lse.new_zeros((*x.shape[:-3], x.shape[-2], columns * -(-x.shape[-1] // _FEATURES) * _FEATURES))
                for x in (k, v)] if summed else []  # fmt: skip
        is_causal, local, left, right = resolved(causal, window_size_left, window_size_right)
        size = None if sparse is None else block_sparse_tensors.block_size
        options = Options(is_causal, local, softcap, None, size)
        found_in(_flash_attn_bwd.compile_cache, (options, q.dtype), lambda: compiled_backward(options))(
            q.detach(), k.detach(), v.detach(), dout, lse_base_2, dpsum, dq_sum, *(sums or (dk, dv)), softmax_scale,
            cu_seqlens_q, cu_seqlens_k, None, None, left, right, None, None, None, AuxData(None, None), sparse, None,
        )  # fmt: skip
        for total, into in [(dq_sum, dq), *zip(sums, (dk, dv), strict=False)]:
            _bwd_postprocess_convert(total, into, softmax_scale, cu_seqlens_q, None, None, None)
        return dq, dk, dv

    def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size, softcap):
        called("fa4 function")
        aligned(q, k, v)
        return _Dense.apply(q, k, v, window_size, causal, softmax_scale, softcap), None

    for step in (_flash_attn_fwd, _flash_attn_bwd, _bwd_preprocess, _bwd_postprocess_convert):
        step.compile_cache = {}
        setattr(made, step.__name__, step)
    made.flash_attn_func = flash_attn_func
    return made, sparsity
