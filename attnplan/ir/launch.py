"""How a value with many axes becomes the two batch dimensions that attention kernels take: by strides if possible."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import attrs


@attrs.frozen
class Fold:
    """Two groups of axes, each folded into one dimension, outermost first."""

    groups: tuple[tuple[int, ...], tuple[int, ...]]
    copies: bool
    """Whether folding has to copy, because the strides do not express it."""


def fold(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> Fold:
    """Fold axes of the given sizes into two groups, as views of all tensors where their strides allow.

    Parameters
    ----------
    sizes
        Size of each batch axis of the queries.
    strides
        For each tensor, the stride of each of these axes; 0 where it broadcasts.

    Examples
    --------
    Batch and head of a contiguous tensor stay apart or fold, a third axis that fits neither forces a copy:

    >>> fold([2, 4], [[800, 100]])
    Fold(groups=((0,), (1,)), copies=False)
    >>> fold([2, 4, 5], [[800, 100, 20]])
    Fold(groups=((0,), (1, 2)), copies=False)
    >>> fold([2, 4, 5], [[900, 110, 20]]).copies
    True
    """
    groups: list[tuple[int, ...]] = [(axis,) for axis, size in enumerate(sizes) if size != 1]
    while len(groups) > 2:
        pair = _foldable_pair(groups, sizes, strides)
        if pair is None:
            return _copied(sizes, strides)
        outer, inner = pair
        groups = [outer + inner if g == outer else g for g in groups if g != inner]
    padded = [*groups, (), ()]
    return Fold((padded[0], padded[1]), copies=False)


def _foldable_pair(
    groups: Sequence[tuple[int, ...]], sizes: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    for outer in groups:
        for inner in groups:
            reach = prod(sizes[a] for a in inner)
            if outer != inner and all(s[outer[-1]] == s[inner[-1]] * reach for s in strides):
                return outer, inner
    return None


def _copied(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> Fold:
    """Put the axes along which any tensor broadcasts second, so that a copy never repeats its rows."""
    axes = [a for a, size in enumerate(sizes) if size != 1]
    broadcast = tuple(a for a in axes if any(s[a] == 0 for s in strides))
    return Fold((tuple(a for a in axes if a not in broadcast), broadcast), copies=True)
