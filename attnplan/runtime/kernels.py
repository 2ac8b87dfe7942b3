"""The attention kernels of torch behind one convention.

Every kernel takes q ``[N, M, R, D]``, k and v ``[N, M or fewer, C, D]``, returns natural-log LSE ``[N, M, R]`` in
float32 (float64 for float64), and gives rows without a key output 0, LSE -inf and zero gradients. Its backward takes
the *merged* output and LSE of its rows, which makes it exact for a part of a larger softmax.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_aten = torch.ops.aten


class Kernel(Protocol):
    """One attention kernel with its backward."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return (output ``[N, M, R, D]``, LSE ``[N, M, R]``); ``mask`` is boolean, True where a pair meets."""
        ...

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v, given the merged output and LSE of the rows."""
        ...


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


class FlashCPU:
    """SDPA's flash operator for CPU."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Run the forward operator."""
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_additive(mask, q.dtype), scale=scale
        )
        if mask is not None:  # the operator reports LSE 0 for rows without a key
            empty = ~mask.any(-1)
            out = out.masked_fill(empty.unsqueeze(-1), 0)
            lse = lse.masked_fill(empty, -torch.inf)
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the backward operator, which wants LSE +inf for rows without a key."""
        if mask is not None:
            lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=_additive(mask, q.dtype), scale=scale
        )


class FlashCUDA:
    """SDPA's FlashAttention-2 operator for CUDA: half precision, no mask, whole or causal squares."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Run the forward operator."""
        assert mask is None
        result = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return result[0], result[1][..., : q.shape[2]]

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the backward operator. Without packed lengths and dropout it wants None for what describes them."""
        assert mask is None
        return _aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
            grad,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            None,
            None,
            scale=scale,
        )


KERNELS: dict[str, Kernel] = {"flash-cpu": FlashCPU(), "flash-cuda": FlashCUDA()}


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return output and LSE of attention written in plain torch, which can be differentiated any number of times.

    Parameters
    ----------
    q, k, v
        ``[..., R, D]``, ``[..., C, D]``, ``[..., C, Dv]`` whose leading dimensions broadcast.
    mask
        Booleans that broadcast to ``[..., R, C]``, True where a pair meets, or None.
    keep, dropout
        Which weights are kept, and the probability with which one is dropped; the LSE is that of all.
    """
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.to(acc) * scale) @ k.to(acc).transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    empty = None if mask is None else ~mask.any(-1)
    if mask is not None and empty is not None:
        # A row without a key gets finite scores here and is blanked below: -inf minus -inf would be NaN.
        scores = scores.masked_fill(~(mask | empty.unsqueeze(-1)), -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    if keep is not None:
        weights = weights * keep / (1 - dropout)
    out = weights @ v.to(acc)
    if empty is None:
        return out.to(q.dtype), lse
    return out.masked_fill(empty.unsqueeze(-1), 0).to(q.dtype), lse.masked_fill(empty, -torch.inf)
