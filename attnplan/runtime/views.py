"""Strided views of whole tensors: the rows of a row map, without a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Axes = Sequence[tuple[int, int, int]]
"""(size, head step, row step) of each axis of a row map."""


def rows(x: Tensor, head: int, row: int, axes: Axes) -> Tensor:
    """Return some rows of ``x`` as a view.

    Parameters
    ----------
    x
        ``[B, H, S, D]`` with any strides.
    head, row
        The first element.
    axes
        The axes of the view, as (size, head step, row step).

    Returns
    -------
    Tensor
        ``[B, *sizes, D]``, a view of ``x``.
    """
    batch, by_head, by_row, feature = x.stride()
    sizes = (x.shape[0], *(n for n, _, _ in axes), x.shape[3])
    strides = (batch, *(h * by_head + r * by_row for _, h, r in axes), feature)
    return x.as_strided(sizes, strides, x.storage_offset() + head * by_head + row * by_row)


def rows_of_one(x: Tensor, head: int, row: int, axes: Axes) -> Tensor:
    """Return :func:`rows` of a tensor ``[B, H, S]`` with one number per row."""
    return rows(x.unsqueeze(-1), head, row, axes).squeeze(-1)


def add_rows(total: Tensor, part: Tensor, head: int, row: int, axes: Axes) -> None:
    """Add ``part`` ``[B, *sizes, D]`` to some rows of ``total`` ``[B, H, S, D]``, in place.

    Axes that show the same rows again are summed first: an in-place sum must not touch an element twice.
    """
    again = [i for i, (n, h, r) in enumerate(axes, start=1) if n > 1 and h == 0 and r == 0]
    if again:
        part = part.sum(dim=again, keepdim=True)
    once = [(1 if i in again else n, h, r) for i, (n, h, r) in enumerate(axes, start=1)]
    rows(total, head, row, once).add_(part)


def empty_like_rows(q: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised ``[B, H, S, features]`` whose heads and rows lie in memory in the order of ``q``."""
    b, h, s, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty((b, s, h, features), dtype=dtype).transpose(1, 2)
    return q.new_empty((b, h, s, features), dtype=dtype)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which partial results of ``dtype`` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32
