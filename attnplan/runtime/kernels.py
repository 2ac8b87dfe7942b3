"""Attention kernels behind one convention.

Every kernel takes q ``[N, M, R, D]``, k and v ``[N, M or fewer, C, D]``, returns natural-log LSE ``[N, M, R]`` in
float32 (float64 for float64), and gives rows without a key output 0, LSE -inf and zero gradients. Its backward takes
the *merged* output and LSE of its rows, which makes it exact for a part of a larger softmax.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from attnplan.ir.native import EVERYTHING, Window
from attnplan.runtime.tables import BlockLists

_aten = torch.ops.aten


class Native(NamedTuple):
    """What a kernel is asked to do by itself, beside the whole or the causal square. See :mod:`attnplan.ir.native`."""

    window: Window = EVERYTHING
    softcap: float = 0.0
    documents: Tensor | None = None
    """Cumulative lengths of packed documents, int ``[n + 1]`` or ``[B, n + 1]``."""
    blocks: BlockLists | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing is asked for."""
        return self.window == EVERYTHING and not self.softcap and self.documents is None and self.blocks is None


PLAIN = Native()


class Kernel(Protocol):
    """One attention kernel with its backward."""

    @property
    def widest(self) -> int:
        """Most features of a head that it takes."""
        ...

    @property
    def groups(self) -> bool:
        """Whether one head of k may serve several of q."""
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        mask: Tensor | None,
        scale: float,
        native: Native = PLAIN,
    ) -> tuple[Tensor, Tensor]:
        """Return (output ``[N, M, R, D]``, LSE ``[N, M, R]``).

        ``mask`` is True where a pair meets; or it is 0 there and -inf elsewhere, in the dtype of q, and rows without a
        key are the caller's to blank.
        """
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
        native: Native = PLAIN,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v, given the merged output and LSE of the rows."""
        ...


def additive(mask: Tensor | None, dtype: torch.dtype, align: int = 1) -> Tensor | None:
    """Return 0 where a pair meets and -inf elsewhere; what broadcasts in the mask still does.

    With ``align`` the rows of the result lie a multiple of that many elements apart in memory.
    """
    if mask is None:
        return None
    if mask.dtype == dtype and all(s % align == 0 for s in mask.stride()[:-1]) and mask.stride(-1) == 1:
        return mask
    once = mask[tuple(slice(0, 1) if step == 0 else slice(None) for step in mask.stride())]
    columns = once.shape[-1]
    made = torch.zeros((*once.shape[:-1], columns + -columns % align), dtype=dtype, device=mask.device)[..., :columns]
    made = made.masked_fill_(~once, -torch.inf) if once.dtype == torch.bool else made.copy_(once)
    return made.expand(mask.shape)


class FlashCPU:
    """SDPA's flash operator for CPU."""

    widest = 1 << 30
    groups = False  # it does, but not without a copy of what they share

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        mask: Tensor | None,
        scale: float,
        native: Native = PLAIN,
    ) -> tuple[Tensor, Tensor]:
        """Run the forward operator."""
        assert native.is_plain, "the operator knows no windows"
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=additive(mask, q.dtype), scale=scale
        )
        if mask is not None and mask.dtype == torch.bool:
            blank_empty_rows(mask, out, lse)
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
        native: Native = PLAIN,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the backward operator, which wants LSE +inf for rows without a key."""
        assert native.is_plain, "the operator knows no windows"
        if mask is not None:
            lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=additive(mask, q.dtype), scale=scale
        )


def blank_empty_rows(mask: Tensor, out: Tensor, lse: Tensor) -> None:
    """Give rows without a key output 0 and LSE -inf, in place: the operator reports LSE 0 for them."""
    once = mask[tuple(slice(0, 1) if step == 0 else slice(None) for step in mask.stride())]
    empty = ~once.any(-1)
    if mask.is_cuda or bool(empty.any()):  # on the CPU, reading it makes nobody wait
        out.masked_fill_(empty.unsqueeze(-1), 0)
        lse.masked_fill_(empty, -torch.inf)


KERNELS: dict[str, Kernel] = {"flash-cpu": FlashCPU()}
"""Kernels by name. Those for CUDA are added by :mod:`attnplan.runtime.kernels_all`."""


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
