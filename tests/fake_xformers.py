"""Stand-ins for xformers 0.0.35, and for the CUDA operators of torch 2.11."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from tests.fake_attention import backward, called, check, documents_mask, forward, rows_mask, run, unsigned


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


class Operator(str):
    """An operator of the forward, which by itself checks nothing."""

    def apply(self, given, needs_gradient):
        called(str(self))
        empty = torch.nan if self.startswith("cutlass") else torch.inf
        mask = bias_mask(given.attn_bias, given.query, given.key)
        out, lse = forward(given.query, given.key, given.value, mask, given.scale, 0.0, empty)
        if self.startswith("cutlass"):
            lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
        return out, SimpleNamespace(lse=lse) if needs_gradient else None


def xformers() -> ModuleType:
    made = ModuleType("xformers.ops.fmha")
    made.attn_bias = SimpleNamespace(**{name: type(name, (Bias,), {}) for name in BIASES})
    for name in ("flash", "cutlass", "triton_splitk"):
        setattr(made, name, SimpleNamespace(FwOp=Operator(f"{name} forward"), BwOp=f"{name} backward"))
    made.Inputs = SimpleNamespace

    def memory_efficient_attention_forward_requires_grad(query, key, value, attn_bias=None, p=0.0, scale=None, *, op):
        called("checks")
        equal_heads(query, key, value)
        supported(op, attn_bias)
        out, context = op.apply(made.Inputs(query=query, key=key, value=value, attn_bias=attn_bias, scale=scale), True)
        return out, context.lse

    def memory_efficient_attention_forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op):
        return memory_efficient_attention_forward_requires_grad(query, key, value, attn_bias, p, scale, op=op)[0]

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
    made.memory_efficient_attention_forward = memory_efficient_attention_forward
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

    def _cudnn_mask(self, bias, q, k, causal):
        assert not causal
        assert bias.dtype == q.dtype
        assert bias.shape in [(q.shape[0], heads, q.shape[2], k.shape[2]) for heads in (1, q.shape[1])]
        return (bias == 0).expand(-1, q.shape[1], -1, -1)

    def _scaled_dot_product_cudnn_attention(self, q, k, v, bias, with_lse, dropout, causal, debug, *, scale):
        called("aten cudnn")
        check(*swapped(q, k, v))
        assert with_lse
        if bias is not None:
            keys = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            out, lse = forward(*swapped(q, *keys), self._cudnn_mask(bias, q, k, causal), scale, 0.0, torch.nan)
        else:
            out, lse = run(*swapped(q, k, v), None, (None, None), causal, scale, 0.0, torch.inf)
        return out.transpose(1, 2), lse.unsqueeze(-1)

    def _scaled_dot_product_cudnn_attention_backward(
        self, grad, q, k, v, out, lse, seed, offset, bias, cq, ck, mq, mk, dropout, causal, *, scale
    ):
        assert lse.dim() == 4
        assert lse.is_contiguous()
        assert seed.dtype == torch.int64
        given, above = swapped(q, k, v), swapped(grad, out)
        if bias is None:
            return swapped(*run(*given, None, (None, None), causal, scale, 0.0, None, above, lse.squeeze(-1)))
        group = q.shape[1] // k.shape[1]
        keys = swapped(*(x.repeat_interleave(group, 1) for x in (k, v)))
        found = backward(
            above[0], given[0], *keys, above[1], lse.squeeze(-1), self._cudnn_mask(bias, q, k, causal), scale
        )
        dq, dk, dv = swapped(*found)
        return dq, dk.unflatten(1, (-1, group)).sum(2), dv.unflatten(1, (-1, group)).sum(2)

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
