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
from attnplan.runtime.views import accumulator

_aten = torch.ops.aten
Pair = tuple[Tensor, Tensor]
"""Output and LSE."""
Triple = tuple[Tensor, Tensor, Tensor]
"""Gradients of q, k and v."""


class Request(NamedTuple):
    """What a kernel is asked for, beside its tensors. The last five are what it does by itself, if it can at all."""

    scale: float
    causal: bool = False
    """Whether row i sees key j only for j <= i."""
    mask: Tensor | None = None
    """True where a pair meets; or 0 there and -inf elsewhere, in the dtype of q, and then rows without a key are the
    caller's to blank."""
    bias: Tensor | None = None
    """What is added to the scores, beside a boolean mask or none."""
    window: Window = EVERYTHING
    softcap: float = 0.0
    documents: Tensor | None = None
    """Cumulative lengths of packed documents, int ``[n + 1]`` or ``[B, n + 1]``."""
    blocks: BlockLists | None = None
    sinks: Tensor | None = None
    """Logits ``[M]`` of one more key of value 0 for each head, which the output and the LSE count."""
    into: tuple[Tensor | None, ...] = ()
    """Where to write the output, or dq, dk and dv; a kernel that cannot returns new tensors, and the caller looks."""

    @property
    def is_plain(self) -> bool:
        """Whether nothing is asked for that a kernel has to do by itself. See :mod:`attnplan.ir.native`."""
        few = self.documents is None and self.blocks is None and self.sinks is None
        return self.window == EVERYTHING and not self.softcap and few


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

    def forward(self, q: Tensor, k: Tensor, v: Tensor, asked: Request) -> Pair:
        """Return (output ``[N, M, R, D]``, LSE ``[N, M, R]``)."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, asked: Request
    ) -> Triple:
        """Return the gradients of q, k and v, given the merged output and LSE of the rows."""
        ...


def may_lack_keys(q: Tensor, k: Tensor, asked: Request) -> bool:
    """Return whether a row may have no key: not where all keys, or as many as the diagonal leaves, are there.

    Windows hold the diagonal, and every row is in a document. A bias may be -inf.
    """
    beyond = (asked.causal or asked.window != EVERYTHING) and q.shape[2] > k.shape[2]
    return beyond or any(x is not None for x in (asked.mask, asked.bias, asked.blocks))


def once(x: Tensor) -> Tensor:
    """Return a view of ``x`` that shows each element once: dimensions along which it was expanded get size 1."""
    return x[tuple(slice(0, 1) if step == 0 else slice(None) for step in x.stride())]


def additive(mask: Tensor | None, dtype: torch.dtype, align: int = 1, bias: Tensor | None = None) -> Tensor | None:
    """Return 0, or the bias, where a pair meets and -inf elsewhere; what broadcasts in the mask still does.

    With ``align`` the rows of the result lie a multiple of that many elements apart in memory.
    """
    if bias is not None:
        return _biased(bias, mask, dtype, align)
    if mask is None:
        return None
    if mask.dtype == dtype and all(s % align == 0 for s in mask.stride()[:-1]) and mask.stride(-1) == 1:
        return mask
    some = once(mask)
    columns = some.shape[-1]
    made = torch.zeros((*some.shape[:-1], columns + -columns % align), dtype=dtype, device=mask.device)[..., :columns]
    made = made.masked_fill_(~some, -torch.inf) if some.dtype == torch.bool else made.copy_(some)
    return made.expand(mask.shape)


def _biased(bias: Tensor, mask: Tensor | None, dtype: torch.dtype, align: int) -> Tensor:
    some, kept = once(bias), None if mask is None else once(mask)
    whole, sizes = bias.shape, some.shape
    if mask is not None and kept is not None:
        whole, sizes = (torch.Size(map(max, a, b)) for a, b in ((whole, mask.shape), (sizes, kept.shape)))
    columns = sizes[-1]
    made = torch.empty((*sizes[:-1], columns + -columns % align), dtype=dtype, device=bias.device)[..., :columns]
    made.copy_(some)
    return (made if kept is None else made.masked_fill_(~kept, -torch.inf)).expand(whole)


class FlashCPU:
    """SDPA's flash operator for CPU."""

    widest = 1 << 30
    groups = False  # it does, but not without a copy of what they share

    def forward(self, q: Tensor, k: Tensor, v: Tensor, asked: Request) -> Pair:
        """Run the forward operator."""
        assert asked.is_plain, "the operator knows no windows"
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, asked.causal, attn_mask=self._added(asked, q), scale=asked.scale
        )
        if asked.mask is not None and asked.mask.dtype == torch.bool:
            blank_empty_rows(asked.mask, out, lse)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, asked: Request
    ) -> Triple:
        """Run the backward operator, which wants LSE +inf for rows without a key."""
        assert asked.is_plain, "the operator knows no windows"
        if asked.mask is not None:
            lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
            grad, q, k, v, out, lse, 0.0, asked.causal, attn_mask=self._added(asked, q), scale=asked.scale
        )

    def _added(self, asked: Request, q: Tensor) -> Tensor | None:
        """Return what the operator adds to scores; it takes a bias in the accumulating dtype beside any other."""
        return additive(asked.mask, q.dtype if asked.bias is None else accumulator(q.dtype), bias=asked.bias)


def blank_empty_rows(mask: Tensor, out: Tensor, lse: Tensor) -> None:
    """Give rows without a key output 0 and LSE -inf, in place: the operator reports LSE 0 for them."""
    empty = ~once(mask).any(-1)
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
    bias: Tensor | None = None,
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
    bias
        What is added to scores, after scale and softcap.
    """
    acc = accumulator(q.dtype)
    scores = (q.to(acc) * scale) @ k.to(acc).transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
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
