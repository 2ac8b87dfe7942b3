"""Sums of gradients over hops."""

from __future__ import annotations

import torch
from torch import Tensor

from attnplan.runtime.ring.surgery import Rows
from attnplan.runtime.views import accumulator, zero_gradient


class Sum:
    """The sum of some gradients of one tensor, in the accumulating dtype.

    The first that has all rows is kept as it is: where no other comes, nothing is added.

    Parameters
    ----------
    like
        The tensor.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._first: Tensor | None = None
        self._total: Tensor | None = None

    def add(self, piece: Tensor, rows: Rows = None) -> None:
        """Add a gradient ``[B, *heads, n, D]`` of some rows, or of all; it may be kept."""
        piece = piece.flatten(1, -3) if piece.dim() > 4 else piece
        whole = rows is None or rows == (0, self._like.shape[2])
        if whole and self._first is None and self._total is None:
            self._first = piece
            return
        total = self.dense()
        (total if whole or rows is None else total.narrow(2, *rows)).add_(piece)

    def dense(self) -> Tensor:
        """Return the sum as a tensor to add to."""
        if self._total is None:
            wide = accumulator(self._like.dtype)
            if self._first is None:
                four = self._like.dim() == 4
                self._total = zero_gradient(self._like) if four else torch.zeros_like(self._like, dtype=wide)
            elif self._first.dtype == wide and 0 not in self._first.stride():
                self._total = self._first
            else:  # an expanded tensor cannot be added to
                self._total = self._first.to(wide, copy=True)
            self._first = None
        return self._total

    def found(self) -> Tensor | None:
        """Return the sum in whatever dtype it has, None if nothing was added."""
        return self._first if self._total is None else self._total

    def result(self) -> Tensor:
        """Return the sum in the dtype of the tensor."""
        found = self.found()
        return torch.zeros_like(self._like) if found is None else found.to(self._like.dtype)
