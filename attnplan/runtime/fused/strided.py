"""Rows of one attend as the four dimensions of a kernel: views, worked out once for each layout of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from attnplan.runtime.fused.gather import gather_rows
from attnplan.runtime.fused.maps import Packing

_KEPT = 16

Recipe = tuple[tuple[int, ...], tuple[int, ...], int]
"""Sizes, strides and offset of a view."""


class Strided(nn.Module):
    """Shows the rows of one attend in whole tensors.

    Parameters
    ----------
    packings
        For each tensor of a call, what its four dimensions are; one part each.
    copies
        Whether rows that are no view are copied; else None stands for them, as there is nothing to write into.
    """

    def __init__(self, packings: Sequence[Packing], *, copies: bool = True) -> None:
        super().__init__()
        self.packings, self.copies = tuple(packings), copies
        self._recipes: dict[Any, Recipe | None] = {}

    def __call__(self, *tensors: Tensor | None) -> list[Tensor | None]:
        """Return :meth:`forward` without a module's hooks, which take longer than the views."""
        return self.forward(*tensors)

    def forward(self, *tensors: Tensor | None) -> list[Tensor | None]:
        """Return the rows ``[N, M, R, D]`` of each ``[B, H, S, D]``, ``[N, M, R]`` of ``[B, H, S]``, None of None.

        A copy where the strides of a tensor are not those that the plan was made for and four dimensions do not do.
        """
        made: list[Tensor | None] = []
        recipes = self._recipes
        for i, x in enumerate(tensors):
            if x is None:
                made.append(None)
                continue
            key = (i, x.shape[0], x.stride())
            if key not in recipes:
                if len(recipes) >= _KEPT * len(self.packings):
                    recipes.clear()
                recipes[key] = recipe(x.shape, x.stride(), self.packings[i])
            found = recipes[key]
            if found is not None:
                made.append(x.as_strided(found[0], found[1], x.storage_offset() + found[2]))
            else:
                made.append(_copied(x, self.packings[i]) if self.copies else None)
        return made


def _copied(x: Tensor, packing: Packing) -> Tensor:
    if x.dim() == 3:
        return _copied(x.unsqueeze(-1), packing).squeeze(-1)
    cells, count = packing.starts()[-1], packing.places[0][2][-1][0]
    made = x.new_empty((x.shape[0] * cells, packing.group, count, x.shape[3]))
    gather_rows(x, made, packing)
    return made


def recipe(shape: Sequence[int], strides: Sequence[int], packing: Packing) -> Recipe | None:
    """Return the view of a tensor ``[B, H, S, ...]`` that a packing of one part asks for, None if there is none.

    Examples
    --------
    Every second row of two heads, ``[B, S, H, D]`` in memory; batch elements do not lie as far apart as segments do:

    >>> packing = Packing(((0, 1, ((2, 1, 0), (3, 0, 4), (2, 0, 2))),), ((1,),), ((0,),))
    >>> recipe((1, 2, 12, 8), (192, 8, 16, 1), packing)
    ((3, 2, 2, 8), (64, 8, 32, 1), 16)
    >>> recipe((2, 2, 13, 8), (208, 8, 16, 1), packing)
    """
    head, row, axes = packing.places[0]
    by_head, by_row = strides[1], strides[2]
    steps = [(n, h * by_head + r * by_row) for n, h, r in axes]
    first = _folded([(shape[0], strides[0]), *(steps[a] for a in packing.own[0])])
    second = _folded([steps[a] for a in packing.inner[0]])
    if first is None or second is None:
        return None
    sizes = (first[0], second[0], axes[-1][0], *shape[3:])
    return sizes, (first[1], second[1], steps[-1][1], *strides[3:]), head * by_head + row * by_row


def _folded(dims: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return (size, stride) of one dimension that stands for several, outermost first; None if strides do not nest."""
    size, stride = 1, 0
    for n, step in reversed(dims):
        if n == 1:
            continue
        if size > 1 and step != stride * size:
            return None
        size, stride = size * n, step if size == 1 else stride
    return size, stride
