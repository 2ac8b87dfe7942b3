"""Attention over kept tiles, written in plain torch and compiled by Inductor: forward, LSE and backward on the CPU.

A work item is one tile of query rows of one head with up to ``width`` tiles of its keys. Items of one chunk run as one
compiled call of fixed sizes whose scores fit a cache; a row with more tiles has several items, merged by LSE. So one
program serves every chunk, and the tables differ between plans in tensors only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from attnplan.patterns import Pattern, Shape
from attnplan.patterns.tiles import BlockTable, Grid, block_table
from attnplan.runtime.compiling import PerShape
from attnplan.runtime.conditions import Condition, condition
from attnplan.runtime.scores import biased, pointwise
from attnplan.runtime.tables import tables_by_shift
from attnplan.runtime.views import accumulator

_SCORES = 1 << 19
"""Scores of one chunk: what a core's cache holds."""
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


_structures: OrderedDict[tuple[int, Sizes], Chunks] = OrderedDict()


def structure(module: fx.GraphModule, sizes: Sizes) -> Chunks:
    """Return the structure of a condition and sizes, the same object for equal ones."""
    key = (id(module), sizes)
    if len(_structures) >= _KEPT:
        _structures.popitem(last=False)
    return _structures.setdefault(key, Chunks(module, sizes))


@attrs.frozen(eq=False)
class Items:
    """Work items, padded to whole chunks with items that keep no tile."""

    head: Tensor
    """Query head counted over the batch ``[n]``."""
    row: Tensor
    """Tile row ``[n]``."""
    columns: Tensor
    """Tile columns ``[n, width]``."""
    kept: Tensor
    """How many of the columns are kept ``[n]``."""
    owner: Tensor
    """Head of k and v counted over the batch ``[n]``."""
    place: Tensor
    """Tile of q among those of all heads ``[n]``."""
    key_place: Tensor
    """Tiles of k among those of all heads, one item after the other ``[n * width]``."""
    bounds: tuple[int, ...] = ()
    """Where the first tiles of rows begin, then the next, and so on; no row occurs twice between two of these."""
    step: int = 1
    """Items of one chunk."""

    @property
    def first(self) -> int:
        """How many items hold the first tiles of a row; 0 if no row has a key."""
        return self.bounds[min(1, len(self.bounds) - 1)]


Part = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Head, row, columns, number of kept columns and owner of some items."""


def _places(part: Part, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    batch, h, q_row, k_row = _places(part, sizes)
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
    part = (head, row, columns, kept, own)
    _, _, owner, _, scores, mask = _scores(q, k, part, captures, biases, like)
    scores = torch.where(mask, scores, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)  # a row without a key: -inf minus -inf would be NaN
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    some_v = v[owner, columns].flatten(1, 2).to(scores.dtype)
    out = (weights @ some_v) / torch.where(total == 0, 1.0, total)
    return out, (top + torch.log(total)).squeeze(-1)


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
    some_v = v[owner, columns].flatten(1, 2).to(scores.dtype)
    own_grad, own_out = grad[head, row].to(scores.dtype), out[head, row].to(scores.dtype)
    own_lse = lse[head, row].unsqueeze(-1)
    finite = torch.where(own_lse == -torch.inf, 0.0, own_lse)
    weights = torch.where(mask, torch.exp(scores - finite), 0.0)
    shift = (own_grad * own_out).sum(-1, keepdim=True) - grad_lse[head, row].unsqueeze(-1)
    biased_slope = weights * (own_grad @ some_v.transpose(1, 2) - shift)
    slope = biased_slope
    if like.sizes.softcap is not None:
        slope = torch.where(mask, slope * (1 - (capped / like.sizes.softcap) ** 2), 0.0)
    slope = slope * like.sizes.scale
    found = (slope @ some_k, slope.transpose(1, 2) @ some_q, weights.transpose(1, 2) @ own_grad)
    return (*found, biased_slope) if like.sizes.biases else found


class ChunkedAttend:
    """One attend over whole inputs by compiled chunks of tiles.

    Parameters
    ----------
    where, shape, shift
        The condition, the sizes of the call, and the position of query row 0, None if it arrives with the call.
    sizes
        The rest.
    """

    def __init__(self, where: Pattern, shape: Shape, shift: int | None, sizes: Sizes) -> None:
        self.where, self.shape, self.shift, self.sizes = where, shape, shift, sizes
        self.condition: Condition = condition(where, shape, shift)
        self.like = structure(self.condition.module, sizes)
        self._static: dict[int, tuple[Items, list[Tensor]]] = {}
        self._is_static = not where.operands and shift is not None

    def _items(self, operands: Mapping[str, Any], q: Tensor) -> tuple[Items, list[Tensor]]:
        """Return the work items and captures of a call; those of a static pattern are kept for each batch size."""
        batch = q.shape[0]
        found = self._static.get(batch)
        if found is not None:
            return found
        made = items(self._tables(operands, batch), batch, self.sizes)
        found = made, self.condition.captures(operands, batch, self.shape.kv_len, q.device)
        if self._is_static:
            self._static = {**dict(list(self._static.items())[-3:]), batch: found}
        return found

    def _tables(self, operands: Mapping[str, Any], batch: int) -> list[BlockTable]:
        """Return a block table, or one for each batch element where queries begin at different positions."""
        found = []
        for shift, tables in tables_by_shift(operands, self.shift, self.shape.kv_len):
            grid = Grid(shift, self.shape.seq_len, 0, self.shape.kv_len, self.sizes.tile)
            found.append(block_table(self.where, self.shape, self.sizes.tile, tables, grid=grid))
        return found

    def forward(self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return output ``[B, H, S, Dv]`` and LSE ``[B, H, S]``."""
        work, captures = self._items(operands, q)
        cut = [_cut(x, n) for x, n in zip((q, k, v), _sides(self.sizes.tile), strict=True)]
        wider = accumulator(q.dtype)
        biases = [x.detach() for x in pointwise(self.sizes.biases, operands, self.shift, q)]
        rest = (captures, biases, self.like)
        parts = [self.like.forward(_shapes((*captures, *biases)), *cut, *part, *rest) for part, _ in _parts(work)]
        outs, lses = (torch.cat(x) for x in zip(*parts, strict=True)) if parts else (q, q)
        out = torch.zeros((*cut[0].shape[:3], v.shape[-1]), dtype=wider, device=q.device)
        lse = torch.full(cut[0].shape[:3], -torch.inf, dtype=wider, device=q.device)
        for start, stop in pairwise(work.bounds):
            here = slice(start, stop)
            _merge(out, lse, work.head[here], work.row[here], outs[here], lses[here], first=start == 0)
        sizes = (*q.shape[:2], -1)
        whole = out.reshape(*sizes, v.shape[-1])[:, :, : q.shape[2]].to(q.dtype)
        return whole, lse.reshape(sizes)[:, :, : q.shape[2]]

    def backward(
        self,
        flow: Sequence[Tensor | None],
        given: Sequence[Tensor],
        operands: Mapping[str, Any],
        names: Sequence[str] = (),
    ) -> tuple[Tensor, ...]:
        """Return dq, dk, dv from ``(grad, grad_lse)`` and ``(q, k, v, out, lse)``, then those of the named operands."""
        q, k, v, out, lse = given
        work, captures = self._items(operands, q)
        tall, wide = self.sizes.tile
        grad = torch.zeros_like(out) if flow[0] is None else flow[0]
        grad_lse = torch.zeros_like(lse) if flow[1] is None else flow[1].to(lse.dtype)
        cut = [_cut(x, n) for x, n in zip((q, k, v), (tall, wide, wide), strict=True)]
        rows = [_cut(grad, tall), *(_cut(x.unsqueeze(-1), tall).squeeze(-1) for x in (grad_lse,)), _cut(out, tall)]
        rows.append(_cut(lse.unsqueeze(-1), tall).squeeze(-1))
        totals = [torch.zeros(x.shape, dtype=accumulator(q.dtype), device=q.device) for x in cut[1:]]
        every = work.first == cut[0].shape[0] * cut[0].shape[1]  # rows without a key have no item
        totals.insert(0, (torch.empty if every else torch.zeros)(cut[0].shape, dtype=totals[0].dtype, device=q.device))
        flat = [x.flatten(0, 1) for x in totals]
        biases = [x.detach() for x in pointwise(self.sizes.biases, operands, self.shift, q)]
        rest = (captures, biases, self.like)
        own = [torch.zeros(operands[n].shape, dtype=totals[0].dtype, device=q.device) for n in names]
        for start, (part, real) in zip(range(0, work.bounds[-1], work.step), _parts(work), strict=True):
            dq, dk, dv, *slope = self.like.backward(_shapes((*captures, *biases)), *rows, *cut, *part, *rest)
            for total, x in zip(own, self._own_gradients(slope, part, operands, names, q), strict=True):
                total.add_(x)
            once = min(max(work.first - start, 0), real)  # first tiles of rows: nothing is there to add to
            stop = start + real
            flat[0].index_copy_(0, work.place[start : start + once], dq[:once])
            flat[0].index_add_(0, work.place[start + once : stop], dq[once:real])
            width = part[2].shape[1]
            place = work.key_place[start * width : stop * width]
            for total, x in ((flat[1], dk), (flat[2], dv)):
                total.index_add_(0, place, x[:real].unflatten(1, (-1, wide)).flatten(0, 1))
        dq, dk, dv = (
            t.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, : x.shape[2]].to(x.dtype)
            for t, x in zip(totals, (q, k, v), strict=True)
        )
        return dq, dk, dv, *(x.to(operands[n].dtype) for x, n in zip(own, names, strict=True))

    def _own_gradients(
        self, slope: Sequence[Tensor], part: Part, operands: Mapping[str, Any], names: Sequence[str], q: Tensor
    ) -> Sequence[Tensor]:
        """Return the gradients of biases from those of the scores of one chunk; its padding has none."""
        if not names:
            return ()
        (flow,) = slope
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
            with torch.enable_grad():
                leaves = {n: operands[n].detach().to(flow.dtype).requires_grad_() for n in names}
                tensors = pointwise(self.sizes.biases, {**operands, **leaves}, self.shift, q)
                made = biased(torch.zeros_like(flow), self.sizes.biases, tensors, *_places(part, self.sizes))
            return torch.autograd.grad(made, list(leaves.values()), flow)


def _shapes(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple((x.shape, x.stride()) for x in tensors)


def _sides(tile: tuple[int, int]) -> tuple[int, int, int]:
    return tile[0], tile[1], tile[1]


def _cut(x: Tensor, tile: int) -> Tensor:
    """Return ``[B, H, S, D]`` as ``[B * H, tiles, tile, D]``, a copy where rows are missing or heads are not apart."""
    missing = -x.shape[2] % tile
    whole = F.pad(x, (0, 0, 0, missing)) if missing else x
    return whole.reshape(x.shape[0] * x.shape[1], -1, tile, x.shape[3]).contiguous()


def _parts(work: Items) -> Iterator[tuple[Part, int]]:
    """Iterate over chunks: their items, and how many of them are no padding."""
    real = work.bounds[-1]
    for start in range(0, real, work.step):
        here = slice(start, start + work.step)
        part = (work.head[here], work.row[here], work.columns[here], work.kept[here], work.owner[here])
        yield part, min(work.step, real - start)


def _merge(out: Tensor, lse: Tensor, head: Tensor, row: Tensor, part: Tensor, part_lse: Tensor, *, first: bool) -> None:
    """Merge items of distinct rows into the output by LSE, in place; the first find nothing there."""
    if first:
        out[head, row], lse[head, row] = part, part_lse
        return
    old_lse = lse[head, row]
    total = torch.logaddexp(old_lse, part_lse)
    finite = total.masked_fill(total == -torch.inf, 0)  # -inf minus -inf would be NaN
    old, new = (torch.exp(x - finite).unsqueeze(-1) for x in (old_lse, part_lse))
    out[head, row] = out[head, row] * old + part * new
    lse[head, row] = total


def items(tables: Sequence[BlockTable], batch: int, sizes: Sizes) -> Items:
    """Return the work items of a batch: first those with the first tiles of every row, then the next, and so on.

    The width is that of the middle row: items of longer rows are split.
    """
    grid = tables[0].grid
    counts = np.concatenate([t.kept.reshape(-1) for t in tables])
    some = counts[counts > 0]
    width = int(np.median(some)) if len(some) else 1
    found = []
    for b in range(batch):
        table = tables[min(b, len(tables) - 1)]
        for h, number in enumerate(table.classes[min(b, len(table.classes) - 1)]):
            found.append(_of_head(table, int(number), b * sizes.heads + h, width))
    head, row, segment, columns, kept = (np.concatenate(x) for x in zip(*found, strict=True))
    step = max(1, min(_SCORES // (sizes.tile[0] * sizes.tile[1] * width), batch * sizes.heads * grid.rows))
    order = np.argsort(segment, kind="stable")
    bounds = (0, *np.cumsum(np.bincount(segment)).tolist())
    padded = np.append(order, np.zeros(-len(order) % step, dtype=np.int64))
    kept = np.append(kept[order], np.zeros(len(padded) - len(order), dtype=np.int64))
    head, row, columns = head[padded], row[padded], columns[padded]
    owner = head // sizes.heads * sizes.kv_heads + head % sizes.heads // (sizes.heads // sizes.kv_heads)
    places = (head * grid.rows + row, (owner[:, None] * grid.columns + columns).reshape(-1))
    made = (torch.from_numpy(x.astype(np.int64)) for x in (head, row, columns, kept, owner, *places))
    names = ("head", "row", "columns", "kept", "owner", "place", "key_place")
    return Items(**dict(zip(names, made, strict=True)), bounds=bounds, step=step)


def _of_head(table: BlockTable, number: int, head: int, width: int) -> tuple[np.ndarray, ...]:
    """Return head, row, segment, columns ``[n, width]`` and number of kept columns of the items of one head."""
    first = number * table.grid.rows
    kept = table.kept[number]
    pieces = -(-kept // width)
    row = np.repeat(np.arange(table.grid.rows), pieces)
    segment = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = table.row_ptr[first + row] + segment * width
    count = np.minimum(kept[row] - segment * width, width)
    place = np.arange(width)
    there = place < count[:, None]
    index = np.where(there, start[:, None] + place, 0)
    columns = np.where(there, table.column[index] if len(table.column) else 0, 0)
    return np.full(len(row), head), row, segment, columns, count
