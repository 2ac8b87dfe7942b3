"""SDPA's cuDNN operator, behind the convention of :mod:`.kernels`.

PyTorch keeps what cuDNN compiles for a backward by the sizes and strides of q, k and v, and not by those of the output
and of its gradient, which are part of it: a backward whose output lies otherwise than that of an earlier one reads the
wrong elements, and says nothing. So those of ours always lie as their q does, and keep what is compiled for them apart
from that of others.

References
----------
``aten/src/ATen/native/cudnn/MHA.cpp`` of PyTorch: ``MHAParams``, ``run_cudnn_SDP_bprop``.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from attnplan.runtime.kernels import Pair, Request, Triple, additive, blank_empty_rows, may_lack_keys
from attnplan.runtime.kernels_sdpa import BIAS_ELEMENTS, empty_rows_above

_aten = torch.ops.aten
OWN = -0.0
"""Probability of dropout: none, in other bits than the 0.0 of everybody else, and bits are compared."""


class CuDNN:
    """SDPA's cuDNN operator: half precision, whole and causal squares; any mask, as an additive one."""

    widest = 128
    groups = True

    def __init__(self) -> None:
        self.lse_dims = 4
        """Dimensions of the LSE of this version's operator, 3 or 4, which its backward needs again."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, asked: Request) -> Pair:
        """Run the forward operator."""
        assert asked.is_plain, "the operator knows no windows"
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, _for_all_heads(asked, q), True, 0.0, asked.causal, False, scale=asked.scale
        )
        self.lse_dims = lse.dim()
        lse = lse.squeeze(-1) if lse.dim() == 4 else lse
        if asked.mask is not None and asked.mask.dtype == torch.bool:
            blank_empty_rows(asked.mask, out, lse)  # they are NaN
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, asked: Request
    ) -> Triple:
        """Run the backward operator, whose seed and offset are read only under dropout.

        With LSE +inf all weights of a row are 0, as those of a row without a key must be.
        """
        stats = empty_rows_above(lse) if may_lack_keys(q, k, asked) else lse.contiguous()
        stats = stats.unsqueeze(-1) if self.lse_dims == 4 else stats
        q, out, grad = laid_out_alike(q, out, grad)
        seed = q.new_empty((), dtype=torch.int64)
        lengths = (None, None, q.shape[2], k.shape[2], OWN)
        given = (grad, q, k, v, out, stats, seed, seed, _for_all_heads(asked, q), *lengths)
        return _aten._scaled_dot_product_cudnn_attention_backward(  # type: ignore[no-any-return]
            *given, asked.causal, scale=asked.scale
        )


def differentiable(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """Return the output of the operator as torch differentiates it, the gradient laid out as the output."""
    if torch.compiler.is_compiling():  # the program that is traced decides how gradients lie
        traced: Tensor = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)[0]
        return traced
    if not q.is_contiguous() and _dense(q, q.shape[-1]) is None:
        q = q.contiguous()
    out: Tensor = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, OWN, causal, scale=scale)[0]
    if out.requires_grad:
        out.register_hook(partial(_laid_out, strides=out.stride()))  # type: ignore[no-untyped-call]
    return out


def laid_out_alike(q: Tensor, out: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, an output and its gradient, these laid out in memory as q alone says: with its gaps, or with none."""
    if q.shape == out.shape and _has_steps(out, q.stride()) and _has_steps(grad, q.stride()):
        return q, out, grad
    wanted = _dense(q, out.shape[-1])
    if wanted is None:
        q = q.contiguous()
        wanted = _dense(q, out.shape[-1])
        assert wanted is not None
    return q, _laid_out(out, wanted), _laid_out(grad, wanted)


def _dense(x: Tensor, features: int) -> tuple[int, ...] | None:
    """Return the strides of a tensor of so many features whose dimensions follow each other as those of ``x``.

    None if ``x`` has gaps. The operator makes its output so.
    """
    sizes, strides = x.shape, x.stride()
    made, step, own = [features] * x.dim(), features, sizes[-1]
    made[-1] = 1
    if strides[-1] != 1:
        return None
    for i in sorted((i for i, n in enumerate(sizes[:-1]) if n > 1), key=lambda i: strides[i]):
        if strides[i] != own:
            return None
        made[i], step, own = step, step * sizes[i], own * sizes[i]
    return tuple(made)


def _has_steps(x: Tensor, strides: tuple[int, ...]) -> bool:
    """Return whether elements lie apart by these steps, whatever they are along dimensions of one element."""
    own = x.stride()
    return own == strides or all(a == b or n == 1 for n, a, b in zip(x.shape, own, strides, strict=True))


def _laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    if _has_steps(x, strides):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _for_all_heads(asked: Request, q: Tensor) -> Tensor | None:
    """Return what is added to scores, with one head where all have the same."""
    bias = additive(asked.mask, q.dtype, BIAS_ELEMENTS, asked.bias)
    if bias is None:
        return None
    return (bias[:, :1] if bias.stride(1) == 0 else bias).expand(q.shape[0], -1, -1, -1)
