"""Lattices in operators that a compiler fuses: rows taken by affine indices, torch's own kernels, joins that pull.

Everything around a kernel is pointwise: an index that is affine in the position becomes an address, so Inductor makes
one loop of what takes the rows of a part, and one of the join, whatever the layout of the tensors on either side. There
is no accumulator that is written in place, no strided scatter, and no constant but a few integers.

References
----------
Ding et al., LongNet, 2023 (arXiv:2307.02486), eq. 9 and 10: the join by LSE.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

import attrs
import torch
from torch import Tensor

from attnplan.runtime.attend import attend_backward
from attnplan.runtime.kernels import Request
from attnplan.runtime.kernels_all import KERNELS
from attnplan.runtime.views import Axes, accumulator, indices

Place = tuple[int, int, Axes]
"""First head, first row, and axes as (size, head step, row step)."""
Walk = tuple[tuple[Tensor, ...], Tensor]
"""For each head and row of a whole ``[H, S]`` the index in a part along each of its axes, and whether it is there."""


@attrs.frozen(cache_hash=True)
class Part:
    """One attend of a lattice: its rows, and what joins it to the others."""

    q: Place
    """Rows of q, of the output and of their gradients."""
    k: Place
    """Rows of k and v; axes of size 1 that are longer in ``q`` are shared."""
    causal: bool
    scale: float
    constant: float | None = None
    """Its constant weight in the join; None weighs it by its LSE."""
    own_out: bool = False
    """Whether its backward takes its own output, instead of the joined one."""
    own_lse: bool = False
    """The same for its LSE."""
    flow: float = 1.0
    """What its gradient is multiplied by."""


@attrs.frozen(cache_hash=True)
class Recipe:
    """A whole plan: parts that one join takes. Equal plans have equal recipes, and share what is compiled."""

    kernel: str
    """A key of :data:`~attnplan.runtime.kernels.KERNELS`."""
    parts: tuple[Part, ...]

    @property
    def has_lse(self) -> bool:
        """Whether there is one LSE."""
        return self.parts[0].constant is None

    @property
    def results(self) -> int:
        """Number of results of :func:`forward` that are those of a call."""
        return 2 if self.has_lse else 1

    @property
    def keeps_parts(self) -> bool:
        """Whether the backward takes outputs or LSE of parts."""
        return any(part.own_out or part.own_lse for part in self.parts)


def take(x: Tensor, place: Place) -> Tensor:
    """Return some rows of ``x`` ``[B, H, S, ...]`` as ``[B, *sizes, ...]``: slices where they do, else by index.

    Examples
    --------
    Every second row of segments of 4, from row 1:

    >>> x = torch.arange(8).reshape(1, 1, 8)
    >>> take(x, (0, 1, ((2, 0, 4), (2, 0, 2)))).tolist()
    [[[1, 3], [5, 7]]]
    """
    sliced = _sliced(x, place)
    return x[(slice(None), *indices(*place, x.device))] if sliced is None else sliced


def _sliced(x: Tensor, place: Place) -> Tensor | None:
    """Return the rows as slices and reshapes, None where heads move rows, or rows do not lie in whole segments."""
    head, row, axes = place
    heads = [a for a in axes if a[1]]
    rows = axes[len(heads) :]
    nested = all(a[1] == b[0] * b[1] for a, b in pairwise(heads))
    if any(a[2] for a in heads) or tuple(axes[: len(heads)]) != tuple(heads) or not nested or len(rows) > 2:
        return None
    count, _, step = rows[-1]
    segments, width = (rows[0][0], rows[0][2]) if len(rows) == 2 else (1, (count - 1) * step + 1)
    before = max(0, row + segments * width - x.shape[2])  # rows of the segments that lie ahead of the first
    last = before + (count - 1) * step + 1
    if before > row or last > width or not width:
        return None
    some = x.narrow(2, row - before, segments * width)
    if heads:
        some = some[:, head : head + (prod([a[0] for a in heads]) - 1) * heads[-1][1] + 1 : heads[-1][1]]
    else:
        some = some.narrow(1, head, 1)
    sizes = tuple(a[0] for a in axes[:-1])
    cut = some.reshape(x.shape[0], *(sizes[:-1] if len(rows) == 2 else sizes), segments, width, *x.shape[3:])
    cut = cut[(slice(None),) * (cut.dim() - x.dim() + 2) + (slice(before, last, step),)]
    return cut.reshape(x.shape[0], *sizes, count, *x.shape[3:])


def where_of(place: Place, heads: Tensor, rows: Tensor) -> Walk:
    """Return where heads ``[H, 1]`` and rows ``[S]`` of a whole are in a part: the index along each axis, and if any.

    The map of a part is walked backwards, largest steps first: :attr:`attnplan.ir.RowMap.shows_rows_once` says that
    each step reaches over all that smaller ones do.

    Examples
    --------
    Rows 1 and 3 are the first and the second of a part; row 2 is not there:

    >>> (index,), there = where_of((0, 1, ((2, 0, 2),)), torch.zeros(1, 1, dtype=torch.int64), torch.arange(1, 4))
    >>> index.tolist(), there.tolist()
    ([[0, 0, 1]], [[True, False, True]])
    """
    head, row, axes = place
    found: dict[int, Tensor] = {}
    by_size = sorted(range(len(axes)), key=lambda a: (-axes[a][1], -axes[a][2]))
    left = heads - head
    there = left >= 0
    over = rows - row
    for a in (a for a in by_size if axes[a][1] and axes[a][0] > 1):
        size, step, by_row = axes[a]
        index = left // step
        there = there & (index < size)
        left, over = left - index * step, over - index * by_row
        found[a] = index
    there = there & (left == 0) & (over >= 0)
    for a in (a for a in by_size if not axes[a][1] and axes[a][2] and axes[a][0] > 1):
        size, _, step = axes[a]
        index = over // step
        there = there & (index < size)
        over = over - index * step
        found[a] = index
    there = there & (over == 0)
    none = torch.zeros_like(heads)
    return tuple(torch.where(there, found[a], 0) if a in found else none for a in range(len(axes))), there


def _pulled(part: Tensor, walk: Walk) -> Tensor:
    """Return the elements of a part ``[B, *sizes, ...]`` at the heads and rows of a whole, whether there or not."""
    index: tuple[Any, ...] = (slice(None), *walk[0])
    return part[index]


def _walks(places: Sequence[Place], like: Tensor) -> list[Walk]:
    heads = torch.arange(like.shape[1], device=like.device).unsqueeze(1)
    rows = torch.arange(like.shape[2], device=like.device)
    return [where_of(place, heads, rows) for place in places]


class _Fold:
    """Folds ``[B, *axes, R, D]`` into a kernel's four dimensions, whose second is what queries share keys along."""

    def __init__(self, part: Part, batch: int) -> None:
        q, k = ([a[0] for a in place[2][:-1]] for place in (part.q, part.k))
        shared = [a for a, (n, m) in enumerate(zip(q, k, strict=True)) if n != m]
        self.second = shared or [len(q) - 1]
        self.first = [a for a in range(len(q)) if a not in self.second]
        self.batch, self.sizes = batch, q

    def rows(self, q: Tensor, k: Tensor, v: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows of a part, packed."""
        return self.pack(take(q, part.q)), self.pack(take(k, part.k)), self.pack(take(v, part.k))

    def pack(self, x: Tensor) -> Tensor:
        """Return ``[N, M, ...]``, M == 1 for keys that are shared."""
        order = (0, *(a + 1 for a in (*self.first, *self.second)))
        tail = x.shape[len(self.sizes) + 1 :]
        count = prod([x.shape[a + 1] for a in self.second])
        return x.permute(*order, *range(len(order), x.dim())).reshape(-1, count, *tail)

    def unpack(self, x: Tensor, place: Place) -> Tensor:
        """Return the inverse of :meth:`pack`, for a tensor whose rows are those of ``place``."""
        sizes = [a[0] for a in place[2][:-1]]
        order = (*self.first, *self.second)
        whole = x.reshape(self.batch, *(sizes[a] for a in order), *x.shape[2:])
        back = (0, *(order.index(a) + 1 for a in range(len(order))))
        return whole.permute(*back, *range(len(back), whole.dim()))


def _attend(q: Tensor, k: Tensor, v: Tensor, part: Part, kernel: str) -> tuple[Tensor, Tensor]:
    """Return output ``[B, *sizes, R, Dv]`` and LSE ``[B, *sizes, R]`` of one part."""
    fold = _Fold(part, q.shape[0])
    given = fold.rows(q, k, v, part)
    if kernel == "cudnn":  # its class notes the form of the LSE, which is no business of a trace
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *given, None, True, 0.0, part.causal, False, scale=part.scale
        )
        lse = lse.squeeze(-1) if lse.dim() == 4 else lse
    else:
        out, lse = KERNELS[kernel].forward(*given, Request(part.scale, part.causal))
    return fold.unpack(out, part.q), fold.unpack(lse, part.q)


def forward(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
    """Return the output ``[B, H, S, Dv]``, its LSE ``[B, H, S]`` if there is one, then what the backward needs beside.

    Rows that no part holds get 0 and -inf.
    """
    parts = [_attend(q, k, v, part, recipe.kernel) for part in recipe.parts]
    walks = _walks([part.q for part in recipe.parts], q)
    dtype = accumulator(q.dtype)
    saved = []
    for part, (part_out, part_lse) in zip(recipe.parts, parts, strict=True):
        saved += [part_out] if part.own_out else []
        saved += [part_lse] if part.own_lse else []
    if recipe.has_lse:
        pulled = [
            torch.where(w[1], _pulled(x, w).to(dtype), -torch.inf) for (_, x), w in zip(parts, walks, strict=True)
        ]
        top = pulled[0]
        for x in pulled[1:]:
            top = torch.maximum(top, x)
        top = torch.where(top == -torch.inf, 0.0, top)  # -inf minus -inf would be NaN
        weights = [torch.exp(x - top) for x in pulled]
        total = sum(weights[1:], weights[0])
        lse = top + torch.log(total)
        weights = [x / torch.where(total == 0, 1.0, total) for x in weights]
        results = [lse]
    else:
        weights = [torch.full(q.shape[:3], part.constant or 0.0, dtype=dtype, device=q.device) for part in recipe.parts]
        results = []
    out: Tensor | None = None
    for (x, _), weight, walk in zip(parts, weights, walks, strict=True):
        one = torch.where(walk[1].unsqueeze(-1), _pulled(x, walk).to(dtype), 0.0) * weight.unsqueeze(-1)
        out = one if out is None else out + one
    assert out is not None
    return out.to(q.dtype), *results, *saved


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    saved: Sequence[Tensor],
    recipe: Recipe,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv: each part's kernel gets the joined output and LSE of its rows, or its own."""
    rest = list(saved)
    flows: list[tuple[Tensor, Tensor, Tensor]] = []
    for part in recipe.parts:
        fold = _Fold(part, q.shape[0])
        given = fold.rows(q, k, v, part)
        own_grad = fold.pack(take(grad, part.q))
        own_grad = own_grad if part.flow == 1.0 else own_grad * part.flow
        own_grad_lse = None if grad_lse is None else fold.pack(take(grad_lse, part.q))
        own_out = fold.pack(rest.pop(0) if part.own_out else take(out, part.q))
        if part.own_lse:
            own_lse = fold.pack(rest.pop(0))
        else:
            assert lse is not None
            own_lse = fold.pack(take(lse, part.q))
        found = attend_backward(
            own_grad, own_grad_lse, *given, own_out, own_lse.contiguous(), None, recipe.kernel, part.causal, part.scale
        )
        made = zip(found, (part.q, part.k, part.k), strict=True)
        flows.append(tuple(fold.unpack(x, place) for x, place in made))  # type: ignore[arg-type]
    walks_q, walks_k = _walks([p.q for p in recipe.parts], q), _walks([p.k for p in recipe.parts], k)
    dq, dk, dv = (
        _summed([flow[i] for flow in flows], walks, x)
        for i, walks, x in ((0, walks_q, q), (1, walks_k, k), (2, walks_k, v))
    )
    return dq, dk, dv


def _summed(parts: Sequence[Tensor], walks: Sequence[Walk], like: Tensor) -> Tensor:
    total: Tensor | None = None
    for part, walk in zip(parts, walks, strict=True):
        one = torch.where(walk[1].unsqueeze(-1), _pulled(part, walk).to(accumulator(like.dtype)), 0.0)
        total = one if total is None else total + one
    assert total is not None
    return total.to(like.dtype)
