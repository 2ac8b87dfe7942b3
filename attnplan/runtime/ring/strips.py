"""Tensors put together from strips: a view where these lie side by side in one storage, one copy where they do not.

The ranks of a virtual ring hand over views of the tensors that the call brought. What a rank puts together of them is
then often a view of these tensors again, and nothing has to be copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor


@attrs.frozen
class Strip:
    """Rows of some heads of a source, which are one step along a dimension of the tensor that is put together."""

    source: int
    head: int
    heads: int
    row: int
    """The first of the rows in the source, ``step`` apart."""
    step: int
    rows: int

    def of(self, source: Tensor) -> Tensor:
        """Return the strip of a source, as a view ``[B, heads, rows, D]``."""
        by_batch, by_head, by_row, by_feature = source.stride()
        offset = source.storage_offset() + self.head * by_head + self.row * by_row
        size = (source.shape[0], self.heads, self.rows, source.shape[3])
        return source.as_strided(size, (by_batch, by_head, by_row * self.step, by_feature), offset)


@attrs.frozen
class Strips:
    """Strips that are a tensor ``[B, heads, rows, D]`` when they are joined along one dimension, in order."""

    dim: int
    """1 (heads) or 2 (rows)."""
    strips: tuple[Strip, ...]

    def view(self, sources: Sequence[Tensor]) -> Tensor | None:
        """Return the tensor as a view of the storage of its sources; None if they do not lie side by side there.

        The rows of a head must lie as those of a copy would, one after the other: what kernels compute is then the
        same, bit for bit.
        """
        runs = self._runs(sources)
        return runs[0].made() if len(runs) == 1 and runs[0].is_dense else None

    def fill(self, made: Tensor, sources: Sequence[Tensor]) -> None:
        """Write the tensor."""
        torch.cat([run.made() for run in self._runs(sources)], self.dim, out=made)

    def _runs(self, sources: Sequence[Tensor]) -> list[Run]:
        """Return the strips, those that lie side by side as one. Calls have hundreds of strips: this loop is short."""
        runs: list[Run] = []
        end = -1
        for strip in self.strips:
            source = sources[strip.source]
            stride = source.stride()
            offset = int(source.storage_offset()) + strip.head * stride[1] + strip.row * stride[2]
            if offset == end and (run := runs[-1]).goes_on(source, stride, strip.step):
                run.grow(self.dim, strip.heads if self.dim == 1 else strip.rows)
            else:
                run = Run(
                    source, offset, stride, strip.step, [source.shape[0], strip.heads, strip.rows, source.shape[3]]
                )
                runs.append(run)
            end = run.end(self.dim)
        return runs


@attrs.define(eq=False)
class Run:
    """Strips that lie side by side."""

    source: Tensor
    offset: int
    stride: tuple[int, ...]
    """Of the source."""
    step: int
    size: list[int]

    def goes_on(self, source: Tensor, stride: tuple[int, ...], step: int) -> bool:
        """Return whether a strip of another source is of the same storage, and lies there as this run does."""
        same = source is self.source or source.untyped_storage() is self.source.untyped_storage()
        return same and stride == self.stride and step == self.step

    def grow(self, dim: int, count: int) -> None:
        """Take one more strip."""
        self.size[dim] += count

    def end(self, dim: int) -> int:
        """Return where a strip has to begin to go on."""
        return self.offset + self.size[dim] * self.stride[dim] * (self.step if dim == 2 else 1)

    @property
    def is_dense(self) -> bool:
        """Whether each head's rows lie one after the other, as in a new tensor."""
        return self.stride[3] == 1 and (self.stride[2] * self.step == self.size[3] or self.size[2] == 1)

    def made(self) -> Tensor:
        """Return the run as a view ``[B, heads, rows, D]``."""
        by_batch, by_head, by_row, by_feature = self.stride
        return self.source.as_strided(self.size, (by_batch, by_head, by_row * self.step, by_feature), self.offset)
