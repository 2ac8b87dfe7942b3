"""Joining attention outputs: parts of one softmax merge by LSE, branches of a mixture mix by their rule.

A part is ``(output [B, *sizes, D], LSE [B, *sizes])`` and a row map ``(head, row, axes)`` that says where its rows go.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnplan.runtime.destinations import put
from attnplan.runtime.views import Axes, accumulator, empty_like_rows, indices, rows, rows_of_one

Place = tuple[int, int, Axes] | None
"""First head, first row and axes of a part's rows; None is the whole output."""


def _at(x: Tensor, place: Place) -> Tensor:
    return x if place is None else rows(x, *place)


def _at_one(x: Tensor, place: Place) -> Tensor:
    return x if place is None else rows_of_one(x, *place)


def merged_lse(q: Tensor, lses: Sequence[Tensor], places: Sequence[Place]) -> Tensor:
    """Return the LSE ``[B, H, S]`` of the union of parts; -inf where none covers a row."""
    total = torch.full(q.shape[:3], -torch.inf, dtype=accumulator(q.dtype), device=q.device)
    for lse, place in zip(lses, places, strict=True):
        target = _at_one(total, place)
        target.copy_(torch.logaddexp(target, lse.to(total.dtype)))
    return total


def merge(q: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor], places: Sequence[Place]) -> tuple[Tensor, Tensor]:
    """Return (output ``[B, H, S, Dv]`` in the accumulating dtype, LSE) of the softmax over all parts' keys.

    A row that no part covers gets output 0 and LSE -inf.
    """
    total = merged_lse(q, lses, places)
    finite = total.masked_fill(total == -torch.inf, 0)  # -inf minus -inf would be NaN; such rows have weight 0
    out = empty_like_rows(q, outs[0].shape[-1], total.dtype).zero_()
    for part, lse, place in zip(outs, lses, places, strict=True):
        weight = torch.exp(lse.to(total.dtype) - _at_one(finite, place))
        _at(out, place).addcmul_(part.to(out.dtype), weight.unsqueeze(-1))
    return out, total


def placed(
    q: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor], places: Sequence[Place], whole: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return :func:`merge` of parts that share no row: each is its rows' whole softmax, and is copied to its place.

    Where kernels wrote some of them into ``whole``, that is the output, and those are there already.
    """
    total = torch.full(q.shape[:3], -torch.inf, dtype=accumulator(q.dtype), device=q.device)
    out = empty_like_rows(q, outs[0].shape[-1], q.dtype) if whole is None else whole
    if whole is None and sum(lse.numel() for lse in lses) < total.numel():
        out.zero_()  # rows that no part covers
    for part, lse, place in zip(outs, lses, places, strict=True):
        put(_at(out, place), part)
        _at_one(total, place).copy_(lse)
    return out, total


def weighted_sum(q: Tensor, outs: Sequence[Tensor], weights: Sequence[float], places: Sequence[Place]) -> Tensor:
    """Return the sum of parts times constant weights, ``[B, H, S, Dv]`` in the accumulating dtype."""
    out = empty_like_rows(q, outs[0].shape[-1], accumulator(q.dtype)).zero_()
    for part, weight, place in zip(outs, weights, places, strict=True):
        _at(out, place).add_(part.to(out.dtype), alpha=weight)
    return out


def _spread(part: Tensor, place: Place, base: Tensor) -> Tensor:
    """Return ``base`` ``[B, H, S, D]`` with a part's rows written into it, differentiably.

    By index: the gradient of ``as_strided_scatter`` reads a wrong offset where its own gradient is a slice.
    """
    if place is None:
        return part
    heads, positions = indices(*place, base.device)
    batch = torch.arange(base.shape[0], device=base.device).reshape(-1, *(1,) * heads.dim())
    return base.index_put((batch, heads, positions), part)


def merge_plain(
    q: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor], places: Sequence[Place], detach: bool = False
) -> tuple[Tensor, Tensor]:
    """Return :func:`merge` in plain torch that can be differentiated any number of times.

    With ``detach`` no gradient flows through the weights.
    """
    dtype = accumulator(q.dtype)
    none = torch.full((*q.shape[:3], 1), -torch.inf, dtype=dtype, device=q.device)
    spread = torch.stack([_spread(x.unsqueeze(-1).to(dtype), p, none) for x, p in zip(lses, places, strict=True)])
    covered = (spread > -torch.inf).any(0)
    # logsumexp of -inf alone has a NaN gradient: rows that no part covers take part with 0 and are blanked after.
    total = torch.logsumexp(spread.masked_fill(~covered, 0), 0).masked_fill(~covered, -torch.inf)
    weights = torch.exp(spread - total.masked_fill(~covered, 0))
    zero = torch.zeros((*q.shape[:3], outs[0].shape[-1]), dtype=dtype, device=q.device)
    weights = weights.detach() if detach else weights
    out = sum(w * _spread(o.to(dtype), p, zero) for w, o, p in zip(weights, outs, places, strict=True))
    assert isinstance(out, Tensor)
    return out, total.squeeze(-1)


def weighted_sum_plain(q: Tensor, outs: Sequence[Tensor], weights: Sequence[float], places: Sequence[Place]) -> Tensor:
    """Return :func:`weighted_sum` in plain torch that can be differentiated any number of times."""
    zero = torch.zeros((*q.shape[:3], outs[0].shape[-1]), dtype=accumulator(q.dtype), device=q.device)
    out = sum(w * _spread(o.to(zero.dtype), p, zero) for w, o, p in zip(weights, outs, places, strict=True))
    assert isinstance(out, Tensor)
    return out
