"""The programs that chunks of tiles run, in plain torch: they know items and tables, not how these were cut.

Each takes q, k and v cut in tiles of rows, and the heads, rows and columns of tiles of some items.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, fx

from attnplan.runtime.compiling import PerShape
from attnplan.runtime.scores import biased
from attnplan.runtime.views import accumulator

_KEPT = 256


@attrs.frozen
class Sizes:
    """What is the same for all plans of one structure, beside the condition."""

    tile: tuple[int, int]
    heads: int
    kv_heads: int
    lengths: tuple[int, int]
    scale: float
    softcap: float | None
    biases: tuple[str, ...] = ()
    """Operands that are added to scores."""


class Chunks:
    """The compiled forward and backward of one structure."""

    def __init__(self, module: fx.GraphModule, sizes: Sizes) -> None:
        self.module, self.sizes = module, sizes
        self.forward = PerShape(forward, "block gather, forward")
        self.backward = PerShape(backward, "block gather, backward")
        self.forward_kept = PerShape(forward_kept, "block gather, forward that keeps weights")
        self.backward_kept = PerShape(backward_kept, "block gather, backward from kept weights")


_structures: OrderedDict[tuple[int, Sizes], Chunks] = OrderedDict()


def structure(module: fx.GraphModule, sizes: Sizes) -> Chunks:
    """Return the structure of a condition and sizes, the same object for equal ones."""
    key = (id(module), sizes)
    if len(_structures) >= _KEPT:
        _structures.popitem(last=False)
    return _structures.setdefault(key, Chunks(module, sizes))


Part = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Head, row, columns, number of kept columns and owner of some items."""


def places(part: Part, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return batch element, head, query row and key row of the scores of some items; they broadcast."""
    head, row, columns, _, _ = part
    tall, wide = sizes.tile
    q_row = (row * tall).reshape(-1, 1, 1) + torch.arange(tall, device=row.device).reshape(1, -1, 1)
    k_row = columns.unsqueeze(2) * wide + torch.arange(wide, device=row.device)
    batch, h = head // sizes.heads, head % sizes.heads
    return batch.reshape(-1, 1, 1), h.reshape(-1, 1, 1), q_row, k_row.flatten(1).unsqueeze(1)


def _scores(
    q: Tensor, k: Tensor, part: Part, captures: Sequence[Tensor], biases: Sequence[Tensor], like: Chunks
) -> tuple[Tensor, ...]:
    """Return q ``[n, R, D]``, k ``[n, C, D]``, K/V heads ``[n, 1]``, scores before and with biases, and mask."""
    head, row, columns, kept, own = part
    sizes, wider = like.sizes, accumulator(q.dtype)
    wide = sizes.tile[1]
    some_q = q[head, row].to(wider)
    batch, h, q_row, k_row = places(part, sizes)
    owner = own.unsqueeze(1)
    some_k = k[owner, columns].flatten(1, 2).to(wider)
    raw = (some_q @ some_k.transpose(1, 2)) * sizes.scale
    capped = raw if sizes.softcap is None else sizes.softcap * torch.tanh(raw / sizes.softcap)
    slot = torch.arange(columns.shape[1] * wide, device=q.device) // wide
    mask = like.module.forward(batch, h, q_row, k_row, *captures)
    mask = mask & (slot < kept.unsqueeze(1)).unsqueeze(1) & (k_row < sizes.lengths[1])
    added = biased(capped, sizes.biases, biases, batch, h, q_row, k_row)
    return some_q, some_k, owner, capped, added, mask & (q_row < sizes.lengths[0])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head: Tensor,
    row: Tensor,
    columns: Tensor,
    kept: Tensor,
    own: Tensor,
    captures: Sequence[Tensor],
    biases: Sequence[Tensor],
    like: Chunks,
) -> tuple[Tensor, Tensor]:
    """Return output ``[n, R, Dv]`` and LSE ``[n, R]`` of some items; q, k and v are cut in tiles of rows."""
    out, lse, *_ = forward_kept(q, k, v, head, row, columns, kept, own, captures, biases, like)
    return out, lse


def forward_kept(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head: Tensor,
    row: Tensor,
    columns: Tensor,
    kept: Tensor,
    own: Tensor,
    captures: Sequence[Tensor],
    biases: Sequence[Tensor],
    like: Chunks,
) -> tuple[Tensor, ...]:
    """Return output and LSE of some items, then the weights ``[n, R, C]`` and highest scores ``[n, R, 1]``.

    Weights are relative to the highest score of their row in this item. With a softcap, its slope ``[n, R, C]``
    follows. All but output and LSE is what :func:`backward_kept` wants.
    """
    part = (head, row, columns, kept, own)
    _, _, owner, capped, scores, mask = _scores(q, k, part, captures, biases, like)
    scores = torch.where(mask, scores, -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    top = torch.where(highest == -torch.inf, 0.0, highest)  # a row without a key: -inf minus -inf would be NaN
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    some_v = v[owner, columns].flatten(1, 2).to(scores.dtype)
    out = (weights @ some_v) / torch.where(total == 0, 1.0, total)
    found = out, (top + torch.log(total)).squeeze(-1), weights, highest
    bend = _bend(capped, mask, like.sizes)
    return found if bend is None else (*found, bend)


def backward(
    grad: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head: Tensor,
    row: Tensor,
    columns: Tensor,
    kept: Tensor,
    own: Tensor,
    captures: Sequence[Tensor],
    biases: Sequence[Tensor],
    like: Chunks,
) -> tuple[Tensor, ...]:
    """Return dq ``[n, R, D]``, dk and dv ``[n, C, D]`` of some items from the merged output and LSE of their rows.

    Where there are biases, the gradient of the scores ``[n, R, C]`` follows.
    """
    part = (head, row, columns, kept, own)
    some_q, some_k, owner, capped, scores, mask = _scores(q, k, part, captures, biases, like)
    weights = torch.where(mask, torch.exp(scores - _finite(lse[head, row])), 0.0)
    bend = _bend(capped, mask, like.sizes)
    some_v = v[owner, columns].flatten(1, 2).to(scores.dtype)
    rows = (grad[head, row], out[head, row], grad_lse[head, row])
    return _gradients(weights, bend, rows, some_q, some_k, some_v, like.sizes)


def backward_kept(
    grad: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head: Tensor,
    row: Tensor,
    columns: Tensor,
    own: Tensor,
    weights: Tensor,
    highest: Tensor,
    bend: Sequence[Tensor],
    like: Chunks,
) -> tuple[Tensor, ...]:
    """Return what :func:`backward` does, of items whose weights were kept: no scores, mask or exponential again."""
    wider, owner = weights.dtype, own.unsqueeze(1)
    weights = weights * torch.exp(highest - _finite(lse[head, row]))  # -inf in rows without a key here: a factor of 0
    some_k, some_v = (x[owner, columns].flatten(1, 2).to(wider) for x in (k, v))
    rows = (grad[head, row], out[head, row], grad_lse[head, row])
    return _gradients(weights, bend[0] if bend else None, rows, q[head, row].to(wider), some_k, some_v, like.sizes)


def _finite(lse: Tensor) -> Tensor:
    """Return the LSE of rows ``[n, R, 1]``, 0 for rows without a key: -inf minus -inf would be NaN."""
    return torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1)


def _bend(capped: Tensor, mask: Tensor, sizes: Sizes) -> Tensor | None:
    """Return the slope of a softcap at what it gave, None without one."""
    return None if sizes.softcap is None else torch.where(mask, 1 - (capped / sizes.softcap) ** 2, 0.0)


def _gradients(
    weights: Tensor,
    bend: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor],
    some_q: Tensor,
    some_k: Tensor,
    some_v: Tensor,
    sizes: Sizes,
) -> tuple[Tensor, ...]:
    """Return dq, dk, dv and, where there are biases, the gradient of the scores; ``bend`` is the slope of a softcap."""
    own_grad, own_out = (x.to(weights.dtype) for x in rows[:2])
    shift = (own_grad * own_out).sum(-1, keepdim=True) - rows[2].unsqueeze(-1)
    biased_slope = weights * (own_grad @ some_v.transpose(1, 2) - shift)
    slope = (biased_slope if bend is None else biased_slope * bend) * sizes.scale
    found = (slope @ some_k, slope.transpose(1, 2) @ some_q, weights.transpose(1, 2) @ own_grad)
    return (*found, biased_slope) if sizes.biases else found
