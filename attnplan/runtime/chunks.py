"""Attention over kept tiles, written in plain torch and compiled by Inductor: forward, LSE and backward on the CPU.

A work item is one tile of query rows of one head with up to ``width`` tiles of its keys. Items of one chunk run as one
compiled call of fixed sizes whose scores fit a cache; a row with more tiles has several items, merged by LSE. So one
program serves every chunk, and the tables differ between plans in tensors only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnplan.patterns import Pattern, Shape
from attnplan.patterns.tiles import BlockTable, Grid, block_table
from attnplan.runtime.chunk_programs import Part, Sizes, places, structure
from attnplan.runtime.conditions import Condition, condition
from attnplan.runtime.scores import biased, pointwise
from attnplan.runtime.tables import tables_by_shift
from attnplan.runtime.views import accumulator

_SCORES = 1 << 19
"""Scores of one chunk: what a core's cache holds."""


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

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], keep: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return output ``[B, H, S, Dv]`` and LSE ``[B, H, S]``; ``keep`` gets what :meth:`backward` may be given."""
        work, captures = self._items(operands, q)
        cut = [_cut(x, n) for x, n in zip((q, k, v), _sides(self.sizes.tile), strict=True)]
        wider = accumulator(q.dtype)
        biases = [x.detach() for x in pointwise(self.sizes.biases, operands, self.shift, q)]
        rest = (captures, biases, self.like)
        run = self.like.forward if keep is None else self.like.forward_kept
        parts = []
        for part, _ in _parts(work):
            both = run(_shapes((*captures, *biases)), *cut, *part, *rest)
            parts.append(both[:2])
            if keep is not None:
                keep += both[2:]
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
        kept: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """Return dq, dk, dv from ``(grad, grad_lse)`` and ``(q, k, v, out, lse)``, then those of the named operands.

        ``kept`` is what :meth:`forward` kept, if it did.
        """
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
        each = 2 + (self.sizes.softcap is not None)
        own = [torch.zeros(operands[n].shape, dtype=totals[0].dtype, device=q.device) for n in names]
        for start, (part, real) in zip(range(0, work.bounds[-1], work.step), _parts(work), strict=True):
            if kept:
                weights, highest, *bend = kept[start // work.step * each : (start // work.step + 1) * each]
                some = (*part[:3], part[4], weights, highest, bend, self.like)
                dq, dk, dv, *slope = self.like.backward_kept(None, *rows, *cut, *some)
            else:
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
                made = biased(torch.zeros_like(flow), self.sizes.biases, tensors, *places(part, self.sizes))
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
