"""Parts joined by one kernel: each row of the whole is written once, from the parts that hold it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from struct import pack, unpack
from typing import Any

import torch
from torch import Tensor, nn

from attnplan.runtime import merge
from attnplan.runtime.fused.launching import Launcher
from attnplan.runtime.fused.maps import LARGEST_UNIT, PullTable, Source, pull_table
from attnplan.runtime.fused.switch import features_of_block, runs_triton
from attnplan.runtime.views import accumulator, add_rows, empty_like_rows

_ELEMENTS = 4096
"""Elements that one program writes."""
_PIECE = 32
"""Features that one program takes at a time: fewer threads for a row work its place out, and lines are still read whole
by neighbouring threads."""
_WARPS = 4
"""Warps of one program. ``bench.longnet_pull`` measures these three."""
_MOST_BASES = 62
"""Tensors that may be the whole, or rows of it: each is a bit of an int64."""
_KEPT = 16
"""Layouts of the parts whose tables are kept: kernels choose the layout of their results, and always the same one."""


class _Pull(nn.Module):
    """Finds the parts of each row; keeps the tables that say how, for each layout of the parts."""

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None,
        base: int | None = None,
        there: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.sources, self.weights = tuple(sources), None if weights is None else tuple(weights)
        self.base, self.there = base, tuple(i for i in there if i < _MOST_BASES)
        self._wholes: dict[Any, bool] = {}
        self._tables: dict[Any, tuple[Tensor, PullTable]] = {}
        self._start = Launcher(_kernel, _WARPS)

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the rows of each part ``[B, *sizes, ...]``, a view of the tensor that holds them."""
        return [view_of(tensors[s.tensor], s) for s in self.sources]

    def _table(
        self, key: Any, outs: Sequence[Tensor], lses: Sequence[Tensor], like: Tensor
    ) -> tuple[Tensor, PullTable]:
        if len(self._tables) >= _KEPT:
            self._tables.clear()
        each = [
            (outs[s.tensor].stride(), lses[s.tensor].stride() if lses else (0,) * (outs[s.tensor].dim() - 1))
            for s in self.sources
        ]
        bits = None if self.weights is None else [_bits(w) for w in self.weights]
        table = pull_table(self.sources, each, like.shape[1], like.shape[2], bits)
        numbers = torch.tensor(table.numbers, dtype=torch.int64)
        if not table.wide:
            numbers = numbers.where(numbers < 2**31, numbers - 2**32).to(torch.int32)  # factors have 32 bits, unsigned
        self._tables[key] = numbers.to(like.device), table
        return self._tables[key]

    def _whole(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor | None:
        """Return the base as the whole ``[B, H, S, D]`` if it lies in memory as a new whole like ``x`` would."""
        if self.base is None:
            return None
        part = tensors[self.sources[self.base].tensor]
        if part.dtype != x.dtype or not _is_regular(part):
            return None
        sizes, strides = (*x.shape[:3], part.shape[-1]), _strides_like_rows(x, part.shape[-1])
        if self.sources[self.base].tensor >= _MOST_BASES:
            return None
        key = (sizes, strides, part.shape, part.stride())
        if key not in self._wholes:
            if len(self._wholes) >= _KEPT:
                self._wholes.clear()
            self._wholes[key] = _is_whole(self.sources[self.base], part, sizes, strides)
        return part.as_strided(sizes, strides, part.storage_offset()) if self._wholes[key] else None

    def _joined(
        self,
        x: Tensor,
        lse: Tensor | None,
        outs: Sequence[Tensor],
        lses: Sequence[Tensor],
        whole: Tensor | None,
    ) -> Tensor:
        """Return the whole like ``x``: that which kernels wrote into, the base if it lies so, or a new one."""
        bases = 0
        if whole is not None:
            start = whole.untyped_storage().data_ptr()
            for i in self.there:  # a kernel that somebody looks at, or a copy in the place of a view, wrote elsewhere
                if outs[i].untyped_storage().data_ptr() == start and _is_regular(outs[i]):
                    bases |= 1 << i
        else:
            whole = self._whole(x, outs)
            if whole is not None and self.base is not None:
                bases = 1 << self.sources[self.base].tensor
        if whole is None:
            whole = empty_like_rows(x, outs[0].shape[-1], x.dtype)
        self._launch(whole, lse, outs, lses, bases)
        return whole

    def _launch(
        self,
        out: Tensor,
        lse: Tensor | None,
        outs: Sequence[Tensor],
        lses: Sequence[Tensor],
        bases: int,
    ) -> None:
        """Start the kernel. ``bases`` has a bit for each tensor among ``outs`` that is ``out``, or rows of it."""
        outs = [x if _is_regular(x) else x.clone(memory_format=torch.contiguous_format) for x in outs]
        batch, heads, length, features = out.shape
        strides = tuple([x.stride() for x in outs] + [x.stride() for x in lses])
        key = (out.device, out.dtype, out.shape, out.stride(), strides, bases)
        found = self._tables.get(key)
        numbers, table = self._table(key, outs, lses, out) if found is None else found
        piece = min(_PIECE, features_of_block(features))
        block = max(1, _ELEMENTS // features_of_block(features))
        pointers = 0
        for x in (*outs, *lses, out):
            pointers |= x.data_ptr()
        self._start(
            (heads * -(-length // block), batch, 1),
            key,
            out.device,
            pointers,
            tuple(outs),
            tuple(lses) if lses else (numbers,),
            numbers,
            out,
            numbers if lse is None else lse,
            *out.stride()[:3],
            heads,
            length,
            table.entries,
            table.tensors,
            table.unit,
            table.wide,
            features,
            piece,
            -(-features // piece),
            block,
            lse is not None,
            bases,
        )


def _strides_like_rows(x: Tensor, features: int) -> tuple[int, int, int, int]:
    """Return the strides of :func:`empty_like_rows`."""
    _, heads, length, _ = x.shape
    if x.stride(1) < x.stride(2):
        return length * heads * features, features, heads * features, 1
    return heads * length * features, length * features, features, 1


def _is_whole(source: Source, part: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether each row of a part that holds all rows lies where a whole of these strides has it."""
    by_batch, offset, steps = source.steps(part.stride())
    head, row, axes = source.place
    return (
        part.numel() == prod(sizes)
        and head == row == offset == 0
        and (sizes[0] == 1 or by_batch == strides[0])
        and all(n == 1 or step == h * strides[1] + r * strides[2] for (n, h, r), step in zip(axes, steps, strict=True))
    )


def _is_regular(x: Tensor) -> bool:
    """Return whether features lie side by side, and the first at a multiple of the largest unit of offsets."""
    return x.stride(-1) == 1 and x.data_ptr() % (LARGEST_UNIT * x.element_size()) == 0


def _bits(weight: float) -> int:
    """Return the bits of a float32 as an integer."""
    found: int = unpack("<i", pack("<f", weight))[0]
    return found


def _kernel() -> Any:
    from attnplan.runtime.fused.triton_kernels import pull_kernel

    return pull_kernel


class PullMerge(_Pull):
    """Joins attention outputs: by their log-sum-exps, or by constant weights, one for each part.

    Parameters
    ----------
    sources
        Where each part lies.
    disjoint
        Whether no two parts share a row, so that plain torch may copy.
    weights
        Constant weights; None merges by LSE.
    base
        Index of a part that holds every row, and whose tensor holds nothing else and nobody needs again: where it lies
        in memory as the whole does, the others are merged into it in place. None where there is no such part.
    there
        Tensors that may be rows of the whole that the join is called with. No two of them share a row.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        disjoint: bool,
        weights: Sequence[float] | None = None,
        base: int | None = None,
        there: Sequence[int] = (),
    ) -> None:
        super().__init__(sources, weights, base if weights is None else None, there if weights is None else ())
        self.disjoint = disjoint

    def forward(
        self, q: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor], whole: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output ``[B, H, S, Dv]`` in the dtype of q, LSE ``[B, H, S]``); constant weights have no LSE.

        A row that no part holds gets output 0 and LSE -inf. ``whole`` becomes the output; kernels may have written rows
        of it.
        """
        if not runs_triton(q, *outs):
            return self._plain(q, self.parts(outs), self.parts(lses))
        by_lse = self.weights is None
        lse = q.new_empty(q.shape[:3], dtype=accumulator(q.dtype)) if by_lse else None
        return self._joined(q, lse, outs, lses if by_lse else (), whole), lse

    def _plain(self, q: Tensor, outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        places = [s.place for s in self.sources]
        if self.weights is not None:
            return merge.weighted_sum(q, outs, self.weights, places).to(q.dtype), None
        out, lse = (merge.placed if self.disjoint else merge.merge)(q, outs, lses, places)
        return out.to(q.dtype), lse


class PullSum(_Pull):
    """Sums the gradients of parts, each weighted by a constant: each row of the whole is written once.

    The order of a sum is that of the parts, so the result repeats bit for bit.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        base: int | None = None,
        there: Sequence[int] = (),
    ) -> None:
        unweighted = {s.tensor for s in sources} - {s.tensor for s, w in zip(sources, weights, strict=True) if w != 1.0}
        base = None if base is None or sources[base].tensor not in unweighted else base
        super().__init__(sources, weights, base, [i for i in there if i in unweighted])

    def forward(self, x: Tensor, gradients: Sequence[Tensor], whole: Tensor | None = None) -> Tensor:
        """Return the gradient of ``x`` ``[B, H, S, D]``, in its dtype; rows in no part get 0.

        ``whole`` becomes the gradient; kernels may have written rows of it.
        """
        if not runs_triton(x, *gradients):
            total = empty_like_rows(x, x.shape[-1], accumulator(x.dtype)).zero_()
            assert self.weights is not None
            for part, weight, source in zip(self.parts(gradients), self.weights, self.sources, strict=True):
                add_rows(total, part if weight == 1.0 else part * weight, *source.place)
            return total.to(x.dtype)
        return self._joined(x, None, gradients, (), whole)


def view_of(x: Tensor, source: Source) -> Tensor:
    """Return the rows of one part ``[B, *sizes, ...]`` as a view of the tensor that holds them."""
    if source.packing is None:
        return x
    by_batch, offset, steps = source.steps(x.stride())
    sizes = tuple(n for n, _, _ in source.place[2])
    batch = x.shape[0] // source.packing.starts()[-1]
    shape, strides = (batch, *sizes, *x.shape[3:]), (by_batch, *steps, *x.stride()[3:])
    return x.as_strided(shape, strides, x.storage_offset() + offset)
