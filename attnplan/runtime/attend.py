"""Attention over the axes of a row map: fold them into a kernel's two batch dimensions, launch, unfold."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnplan.ir.launch import fold
from attnplan.ir.native import EVERYTHING, Window
from attnplan.runtime.kernels import Request, softmax_attention
from attnplan.runtime.kernels_all import KERNELS
from attnplan.runtime.opaque import Opaque, is_watched
from attnplan.runtime.tables import BlockLists
from attnplan.runtime.tile_masks import BACKWARD, SplitTiles
from attnplan.runtime.tiles import Tiles, attend_tiles, attend_tiles_backward
from attnplan.runtime.views import accumulator

WRITES_INTO = frozenset({"fa4"})
"""Kernels that write to where they are told."""
_LSE_FEATURES = 8  # one would do; this keeps the feature count a multiple of what kernels like
Mask = Tensor | Tiles | BlockLists | SplitTiles | None


Lies = tuple[torch.Size, tuple[int, ...]]
"""How a tensor lies in memory: its shape and its strides."""


class _Folding:
    """Folds tensors ``[B, *axes, R, D]`` into ``[N, M, R, D]`` and back, as views where strides allow.

    It depends on how q, k and v lie, and holds none of them. How a view of a tensor lies is found once for each way in
    which a tensor may lie: the operators that find it take longer than many kernels run.
    """

    def __init__(self, q: Lies, k: Lies, v: Lies, groups: bool) -> None:
        self.groups = groups
        """Whether heads that share keys get one head of keys, not a view of it for each."""
        self.sizes = q[0][:-2]
        broadcast = [[0 if n == 1 else s for n, s in zip(x[0][:-2], x[1], strict=False)] for x in (k, v)]
        first, self.second = fold(self.sizes, [q[1][:-2], *broadcast]).groups
        self.first = (*(a for a in range(len(self.sizes)) if a not in first + self.second), *first)
        self.order = (*self.first, *self.second)
        self._packed: dict[Lies, Lies | None] = {}
        self._unpacked: dict[Lies, Lies | None] = {}

    def pack(self, x: Tensor) -> Tensor:
        """Fold ``x``, whose axes may have size 1 where it broadcasts; what heads share is not copied for each."""
        return _viewed(x, self._pack, self._packed)

    def unpack(self, x: Tensor) -> Tensor:
        """Unfold a kernel's result ``[N, M, ...]`` to ``[B, *axes, ...]``; what heads share stays so, with M == 1."""
        return _viewed(x, self._unpack, self._unpacked)

    def _pack(self, x: Tensor) -> Tensor:
        tail = x.shape[len(self.sizes) :]
        shared = all(x.shape[a] == 1 for a in self.second)
        wide = x.expand(*(1 if shared and a in self.second else n for a, n in enumerate(self.sizes)), *tail)
        ordered = wide.permute(*self.order, *range(len(self.sizes), x.dim()))
        count = prod(self.sizes[a] for a in self.second)
        packed = ordered.reshape(prod(self.sizes[a] for a in self.first), 1 if shared else count, *tail)
        return packed if self.groups else packed.expand(-1, count, *tail)

    def _unpack(self, x: Tensor) -> Tensor:
        count = prod(self.sizes[a] for a in self.second)
        second = [1 if x.shape[1] != count else self.sizes[a] for a in self.second]
        unfolded = x.reshape(*(self.sizes[a] for a in self.first), *second, *x.shape[2:])
        return unfolded.permute(
            *(self.order.index(a) for a in range(len(self.sizes))), *range(len(self.sizes), unfolded.dim())
        )


class _Unfolded:
    """Stands in for :class:`_Folding` where the tensors are ``[B, H, R, D]`` already; heads may be grouped."""

    def pack(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x

    unpack = pack


_UNFOLDED = _Unfolded()
_folding_of = lru_cache(maxsize=512)(_Folding)
_KEPT_VIEWS = 64
"""Ways to lie of which a folding remembers how their views do."""
_NEW: Any = object()


def _folding(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> _Folding | _Unfolded:
    if q.dim() == 4:
        return _UNFOLDED
    make = _Folding if is_watched() else _folding_of  # a trace takes no cache up
    lie_q, lie_k, lie_v = ((x.shape, x.stride()) for x in (q, k, v))
    return make(lie_q, lie_k, lie_v, KERNELS[kernel].groups)


def _viewed(x: Tensor, view: Callable[[Tensor], Tensor], known: dict[Lies, Lies | None]) -> Tensor:
    """Return ``view(x)``, by one operator where that is a view and it is known how it lies."""
    if is_watched():
        return view(x)
    own = (x.shape, x.stride())
    lies = known.get(own, _NEW)
    if lies is _NEW:
        if len(known) >= _KEPT_VIEWS:
            known.clear()
        like = torch.empty_strided(*own, device="meta")
        made = view(like)
        shares = made.untyped_storage()._cdata == like.untyped_storage()._cdata
        lies = known[own] = (made.shape, made.stride()) if shares else None
    return view(x) if lies is None else x.as_strided(*lies)


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: str,
    causal: bool,
    scale: float,
    window: Window = EVERYTHING,
    softcap: float = 0.0,
) -> Tensor:
    """Return the output of one call of another package's kernel, which the package differentiates."""
    if q.numel() == 0:  # kernels return nothing for nothing, and no gradient
        nothing = 0 * (q.sum() + k.sum() + v.sum())
        return q.new_zeros((*q.shape[:-1], v.shape[-1])) + nothing
    one = KERNELS[kernel]
    assert isinstance(one, Opaque)
    return one.direct(q, k, v, Request(scale, causal, window=window, softcap=softcap))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    kernel: str,
    causal: bool,
    scale: float,
    window: Window = EVERYTHING,
    softcap: float = 0.0,
    documents: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    into: tuple[Tensor | None, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Return (output, LSE) of attention by one kernel.

    Parameters
    ----------
    q, k, v
        ``[B, *axes, R, D]``, ``[B, *axes, C, D]``, ``[B, *axes, C, Dv]``; axes of size 1 in k and v broadcast.
    mask
        Booleans that broadcast to ``[B, *axes, R, C]``, True where a pair meets; the tiles to run, or lists of whole
        ones for kernels that skip tiles by themselves; or None.
    kernel
        A key of :data:`~attnplan.runtime.kernels.KERNELS`.
    causal
        Whether row i sees key j only for j <= i.
    window, softcap, documents, sinks
        What the kernel does by itself: see :class:`~attnplan.runtime.kernels.Request`.
    bias
        What is added to scores, broadcasting as the mask does.
    into
        Where a kernel of :data:`WRITES_INTO` writes the output of tensors of four dimensions, instead of a new tensor.
    """
    if q.numel() == 0:
        return q.new_zeros((*q.shape[:-1], v.shape[-1])), _lse_zeros(q)
    if isinstance(mask, Tiles):
        return attend_tiles(q, k, v, mask, kernel, scale)
    assert not isinstance(mask, SplitTiles), "only a backward has whole and partial tiles apart"
    folding = _folding(q, k, v, kernel)
    asked = Request(scale, causal, None, bias, window, softcap, documents, sinks=sinks, into=into)
    asked = _request(folding, q, k, asked, mask)
    out, lse = KERNELS[kernel].forward(folding.pack(q), folding.pack(k), folding.pack(v), asked)
    return folding.unpack(out), folding.unpack(lse)


def attend_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    kernel: str,
    causal: bool,
    scale: float,
    window: Window = EVERYTHING,
    softcap: float = 0.0,
    documents: Tensor | None = None,
    bias: Tensor | None = None,
    into: tuple[Tensor | None, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v from the merged output and LSE of the rows (design: Gradients).

    ``grad_lse`` enters as one more feature of v that is 1 everywhere: the kernel then adds it to every score's
    gradient, which is what differentiating the log-sum-exp does. ``into`` is then without meaning, else as in
    :func:`attend`, for dq, dk and dv.
    """
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if isinstance(mask, SplitTiles):
        given = (grad, grad_lse, q, k, v, out, lse)
        whole = attend_backward(*given, mask.whole, kernel, causal, scale)
        partial = attend_backward(*given, mask.partial, BACKWARD, causal, scale)
        dq, dk, dv = ((a.to(b.dtype) + b).to(a.dtype) for a, b in zip(whole, partial, strict=True))
        return dq, dk, dv
    features, value_features = q.shape[-1], v.shape[-1]
    if grad_lse is not None and not _has_room(q, kernel):
        rest = (mask, kernel, causal, scale, window, softcap, documents, bias)
        from_out = attend_backward(grad, None, q, k, v, out, lse, *rest)
        grad, v, out = _lse_column_alone(grad, grad_lse, v)
        from_lse = attend_backward(grad, None, q, k, v, out, lse, *rest)
        return from_out[0] + from_lse[0], from_out[1] + from_lse[1], from_out[2]
    if grad_lse is not None:
        into = ()
        grad, q, k, v, out = _with_lse_column(grad, grad_lse, q, k, v, out)
    if isinstance(mask, Tiles):
        dq, dk, dv = attend_tiles_backward(grad, q, k, v, out, lse, mask, kernel, scale)
    else:
        asked = Request(scale, causal, None, bias, window, softcap, documents, into=into)
        dq, dk, dv = _kernel_backward(grad, q, k, v, out, lse, mask, kernel, asked)
    return dq[..., :features], dk[..., :features], dv[..., :value_features]


def _kernel_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | BlockLists | None,
    kernel: str,
    asked: Request,
) -> tuple[Tensor, Tensor, Tensor]:
    folding = _folding(q, k, v, kernel)
    dq, dk, dv = KERNELS[kernel].backward(
        folding.pack(grad),
        folding.pack(q),
        folding.pack(k),
        folding.pack(v),
        folding.pack(out),
        folding.pack(lse.unsqueeze(-1)).squeeze(-1),
        _request(folding, q, k, asked, mask),
    )
    return folding.unpack(dq), _reduce_to(folding.unpack(dk), k), _reduce_to(folding.unpack(dv), v)


_EXACT_WIDTHS = frozenset({"fa4"})
"""Kernels that take few widths of heads: a few features more would give wrong gradients."""


def _has_room(q: Tensor, kernel: str) -> bool:
    """Return whether a kernel takes the features of ``q`` and those of the LSE's gradient beside them."""
    return kernel not in _EXACT_WIDTHS and q.shape[-1] + _LSE_FEATURES <= KERNELS[kernel].widest


def _with_lse_column(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    widened = [F.pad(x, (0, _LSE_FEATURES)) for x in (grad, q, k, v, out)]
    widened[0][..., grad.shape[-1]] = grad_lse.to(grad.dtype)
    widened[3][..., v.shape[-1]] = 1
    return widened[0], widened[1], widened[2], widened[3], widened[4]


def _lse_column_alone(grad: Tensor, grad_lse: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return grad, v and output of a call whose only feature is the LSE's, for kernels without room beside the rest."""
    alone, ones = torch.zeros_like(grad), torch.zeros_like(v)
    alone[..., 0] = grad_lse.to(grad.dtype)
    ones[..., 0] = 1
    return alone, ones, torch.zeros_like(grad)


def _lse_zeros(q: Tensor) -> Tensor:
    return q.new_zeros(q.shape[:-1], dtype=accumulator(q.dtype))


def _request(
    folding: _Folding | _Unfolded, q: Tensor, k: Tensor, asked: Request, mask: Tensor | BlockLists | None
) -> Request:
    """Return a request with its mask and bias, folded like the rest, or its lists of tiles."""
    if mask is None and asked.bias is None:
        return asked

    def packed(x: Tensor) -> Tensor:
        return folding.pack(x.expand(*x.shape[:-2], q.shape[-2], k.shape[-2]))

    if asked.bias is not None:
        asked = asked._replace(bias=packed(asked.bias))
    if isinstance(mask, Tensor):
        return asked._replace(mask=packed(mask))
    return asked if mask is None else asked._replace(blocks=mask)


def _reduce_to(grad: Tensor, x: Tensor) -> Tensor:
    """Sum a gradient over the axes along which ``x`` was broadcast."""
    axes = [i for i, (n, m) in enumerate(zip(grad.shape[:-2], x.shape[:-2], strict=True)) if m == 1 and n != 1]
    return grad.sum(dim=axes, keepdim=True) if axes else grad


def attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None = None,
    keep: Tensor | None = None,
    dropout: float = 0.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (output, LSE) of attention in plain torch, scores materialised.

    Arguments as in :func:`attend`, with the softcap, the bias, and with the mask of kept pairs and the probability of
    dropout.
    """
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    group = q.shape[1] // k.shape[1] if q.dim() == 4 else 1
    if group > 1:  # grouped heads get an axis of their own, along which k and v broadcast
        q, k, v = split_heads(q, group), k.unsqueeze(2), v.unsqueeze(2)
        mask, keep, bias = (_split_mask(x, group) for x in (mask, keep, bias))
    out, lse = softmax_attention(
        q, k, v, mask=mask, scale=scale, softcap=softcap, keep=keep, dropout=dropout, bias=bias
    )
    return (out.flatten(1, 2), lse.flatten(1, 2)) if group > 1 else (out, lse)


def _split_mask(mask: Tensor | None, group: int) -> Tensor | None:
    if mask is None or mask.dim() < 4:
        return mask
    return split_heads(mask, group) if mask.shape[1] > 1 else mask.unsqueeze(1)


def split_heads(x: Tensor, group: int) -> Tensor:
    """Return ``[B, H, ...]`` as ``[B, H // group, group, ...]``."""
    return x.reshape(x.shape[0], x.shape[1] // group, group, *x.shape[2:])


def whole_output(x: Tensor, q: Tensor) -> Tensor:
    """Return a value that covers every row once, its heads spread over several axes, as ``[B, H, S, ...]``."""
    spread = 1
    dims = 1
    while spread < q.shape[1] or dims == 1:
        spread *= x.shape[dims]
        dims += 1
    return x.flatten(1, dims - 1)


def in_dtype_of(x: Tensor, q: Tensor) -> Tensor:
    """Return ``x`` in the dtype of ``q``."""
    return x.to(q.dtype)
