"""Parts joined by one kernel: each row of the whole is written once, from the parts that hold it."""

from __future__ import annotations

from collections.abc import Sequence
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
_KEPT = 16
"""Layouts of the parts whose tables are kept: kernels choose the layout of their results, and always the same one."""


class _Pull(nn.Module):
    """Finds the parts of each row; keeps the tables that say how, for each layout of the parts."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None) -> None:
        super().__init__()
        self.sources, self.weights = tuple(sources), None if weights is None else tuple(weights)
        self._tables: dict[Any, tuple[Tensor, PullTable]] = {}
        self._start = Launcher(_kernel)

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

    def _launch(self, out: Tensor, lse: Tensor | None, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
        outs = [x if _is_regular(x) else x.clone(memory_format=torch.contiguous_format) for x in outs]
        batch, heads, length, features = out.shape
        strides = tuple([x.stride() for x in outs] + [x.stride() for x in lses])
        key = (out.device, out.dtype, out.shape, out.stride(), strides)
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
    """

    def __init__(self, sources: Sequence[Source], *, disjoint: bool, weights: Sequence[float] | None = None) -> None:
        super().__init__(sources, weights)
        self.disjoint = disjoint

    def forward(self, q: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return (output ``[B, H, S, Dv]`` in the dtype of q, LSE ``[B, H, S]``); constant weights have no LSE.

        A row that no part holds gets output 0 and LSE -inf.
        """
        if not runs_triton(q, *outs):
            return self._plain(q, self.parts(outs), self.parts(lses))
        out = empty_like_rows(q, outs[0].shape[-1], q.dtype)
        by_lse = self.weights is None
        lse = q.new_empty(q.shape[:3], dtype=accumulator(q.dtype)) if by_lse else None
        self._launch(out, lse, outs, lses if by_lse else ())
        return out, lse

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

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        super().__init__(sources, weights)

    def forward(self, x: Tensor, gradients: Sequence[Tensor]) -> Tensor:
        """Return the gradient of ``x`` ``[B, H, S, D]``, in its dtype; rows in no part get 0."""
        if not runs_triton(x, *gradients):
            total = empty_like_rows(x, x.shape[-1], accumulator(x.dtype)).zero_()
            assert self.weights is not None
            for part, weight, source in zip(self.parts(gradients), self.weights, self.sources, strict=True):
                add_rows(total, part if weight == 1.0 else part * weight, *source.place)
            return total.to(x.dtype)
        total = empty_like_rows(x, x.shape[-1], x.dtype)
        self._launch(total, None, gradients, ())
        return total


def view_of(x: Tensor, source: Source) -> Tensor:
    """Return the rows of one part ``[B, *sizes, ...]`` as a view of the tensor that holds them."""
    if source.packing is None:
        return x
    by_batch, offset, steps = source.steps(x.stride())
    sizes = tuple(n for n, _, _ in source.place[2])
    batch = x.shape[0] // source.packing.starts()[-1]
    shape, strides = (batch, *sizes, *x.shape[3:]), (by_batch, *steps, *x.stride()[3:])
    return x.as_strided(shape, strides, x.storage_offset() + offset)
