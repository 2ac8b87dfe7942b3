"""Strided views of whole tensors: the rows of a row map, without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

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


def indices(head: int, row: int, axes: Axes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the head and the row of each element of a view, each of a shape that broadcasts to its sizes."""
    heads = torch.full((1,) * len(axes), head, device=device)
    positions = torch.full((1,) * len(axes), row, device=device)
    for place, (size, by_head, by_row) in enumerate(axes):
        steps = torch.arange(size, device=device).reshape([-1 if i == place else 1 for i in range(len(axes))])
        heads, positions = heads + steps * by_head, positions + steps * by_row
    return heads, positions


def gather(x: Tensor, head: int, row: int, axes: Axes) -> Tensor:
    """Return :func:`rows` as a copy taken by index, which autograd differentiates any number of times."""
    return x[(slice(None), *indices(head, row, axes, x.device))]


def rows_of_one(x: Tensor, head: int, row: int, axes: Axes) -> Tensor:
    """Return :func:`rows` of a tensor ``[B, H, S]`` with one number per row."""
    return rows(x.unsqueeze(-1), head, row, axes).squeeze(-1)


def rows_if_any(x: Tensor | None, head: int, row: int, axes: Axes) -> Tensor | None:
    """Return :func:`rows_of_one`, or None where there is no gradient."""
    return None if x is None else rows_of_one(x, head, row, axes)


def add_rows(total: Tensor, part: Tensor, head: int = 0, row: int = 0, axes: Axes = ()) -> None:
    """Add ``part`` ``[B, *sizes, D]`` to some rows of ``total`` ``[B, H, S, D]``, or to all without axes, in place.

    Axes that show the same rows again are summed first: an in-place sum must not touch an element twice. The last axis
    moves over rows only.
    """
    if not axes:
        total.add_(part)
        return
    again = [i for i, (n, h, r) in enumerate(axes, start=1) if n > 1 and h == 0 and r == 0]
    if again:
        part = part.sum(dim=again, keepdim=True)
    once = [(1 if i in again else n, h, r) for i, (n, h, r) in enumerate(axes, start=1)]
    *outer, (count, _, step) = once
    apart = min((r // step for n, h, r in outer if n > 1 and h == 0 and step <= r < count * step), default=count)
    for start in range(0, count, apart):  # chunks that overlap are added slab by slab, each of which does not
        stop = min(start + apart, count)
        rows(total, head, row + start * step, (*outer, (stop - start, 0, step))).add_(part[..., start:stop, :])


def empty_like_rows(q: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised ``[B, H, S, features]`` whose heads and rows lie in memory in the order of ``q``."""
    b, h, s, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty((b, s, h, features), dtype=dtype).transpose(1, 2)
    return q.new_empty((b, h, s, features), dtype=dtype)


def empty_whole(x: Tensor, like: Tensor) -> Tensor:
    """Return an uninitialised tensor of the rows of ``x`` with as many features as ``like``, in the dtype of ``x``."""
    return empty_like_rows(x, like.shape[-1], x.dtype)


def rows_first(x: Tensor) -> Tensor:
    """Return ``[B, H, S, D]`` whose memory has the order ``[B, S, H, D]``.

    The CUTLASS backward needs its output so: it reads rows as if all heads of one lay side by side. Registered
    operators promise it, so that a trace knows their strides.
    """
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def zero_gradient(x: Tensor) -> Tensor:
    """Return zeros in which the gradient of ``x`` is summed."""
    return empty_like_rows(x, x.shape[-1], accumulator(x.dtype)).zero_()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which partial results of ``dtype`` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(x: Tensor) -> Tensor:
    """Return ``x`` in the dtype in which its partial results are summed."""
    return x.to(accumulator(x.dtype))


_ALIGNED = 16
"""Bytes of one load of a CUDA kernel."""


def with_features_in_line(x: Tensor) -> Tensor:
    """Return ``x``, or a copy if its features do not lie side by side, or its rows where no CUDA kernel can load them.

    Kernels do not check: FlashAttention-2 faults on rows that are not aligned to 16 bytes, cuDNN returns wrong numbers.
    """
    if x.stride(-1) != 1:
        return x.contiguous()
    if not x.is_cuda or _is_aligned(x):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def in_line(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`with_features_in_line` of each, most of the time after one look at all three; not for a trace."""
    if _regular(q.stride(), k.stride(), v.stride()):
        starts = int(q.storage_offset()) | int(k.storage_offset()) | int(v.storage_offset())
        if starts % _ALIGNED == 0:
            return q, k, v
    return with_features_in_line(q), with_features_in_line(k), with_features_in_line(v)


@lru_cache(maxsize=256)
def _regular(*strides: tuple[int, ...]) -> bool:
    return all(steps[-1] == 1 and _steps_of_sixteen(steps) for steps in strides)


def _is_aligned(x: Tensor) -> bool:
    strides = x.stride()
    if torch.compiler.is_compiling():  # a trace does not know where a tensor starts, and takes no cache up
        return _steps_align(strides, x.shape, x.element_size())
    start = x.storage_offset()
    if start % _ALIGNED == 0 and _steps_of_sixteen(strides):  # whatever the dtype: most tensors, for half the time
        return True
    size = x.element_size()
    return start * size % _ALIGNED == 0 and _steps_align_cached(strides, x.shape, size)


@lru_cache(maxsize=256)
def _steps_of_sixteen(strides: tuple[int, ...]) -> bool:
    return all(step % _ALIGNED == 0 for step in strides[:-1])


def _steps_align(strides: tuple[int, ...], shape: tuple[int, ...], size: int) -> bool:
    """Return whether every row starts at a multiple of :data:`_ALIGNED` if the first does."""
    return all(step * size % _ALIGNED == 0 for step, n in zip(strides[:-1], shape[:-1], strict=True) if n > 1)


_steps_align_cached = lru_cache(maxsize=256)(_steps_align)
