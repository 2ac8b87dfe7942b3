"""Which rows of a sequence a rank holds, and cutting and joining tensors by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attnplan.errors import RingError, SpecError
from attnplan.ring.layouts import Layout
from attnplan.spec import AttentionSpec

if TYPE_CHECKING:
    from torch import Tensor


class Sharded:
    """Base of :class:`~attnplan.plan_ring.RingPlan`."""

    spec: AttentionSpec
    mesh: Any
    ranks: int
    layout: str

    if TYPE_CHECKING:  # defined by RingPlan

        @property
        def rank(self) -> int: ...

    def _layout(self, length: int) -> Layout:
        return Layout(self.layout, self.ranks, length)  # type: ignore[arg-type]  # one of the known kinds

    def _held(self, length: int) -> list[Any]:
        """Return the rows of every rank."""
        from attnplan.runtime.ring.rows import Span

        layout = self._layout(length)
        return [[Span(0, 1, p.start, p.step, p.count) for p in layout.rows(r)] for r in range(self.ranks)]

    def positions(self, rank: int | None = None) -> Any:
        """Return the positions in the whole sequence of a rank's rows, in the order of its shard: int64 ``[s]``.

        Parameters
        ----------
        rank
            Which rank; the default is that of this process.

        Examples
        --------
        >>> import attnplan
        >>> spec = attnplan.AttentionSpec(seq_len=8, heads=2, head_dim=8, dtype="float32", ring_size=2)
        >>> attnplan.compile(spec, device="cpu", strategy="zigzag > ring").positions(0)
        tensor([0, 1, 6, 7])
        """
        from attnplan.runtime.ring.shards import positions

        rank = self.rank if rank is None else rank
        if not 0 <= rank < self.ranks:
            raise RingError(f"there is no rank {rank}: the plan has ranks 0 to {self.ranks - 1}")
        return positions(self._held(self.spec.shape.seq_len)[rank])

    def shard(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        """Return this rank's rows of a whole tensor. Differentiable.

        Parameters
        ----------
        tensor
            A tensor with a dimension of the sequence.
        dim
            That dimension; the default is the spec's for four dimensions, else 1.

        Raises
        ------
        RingError
            If the plan has no mesh.
        SpecError
            If the dimension is not as long as the sequence.
        """
        from attnplan.runtime.ring.shards import cut

        self._need_mesh("shard")
        dim = self._dimension(tensor, dim)
        shape, length = self.spec.shape, tensor.shape[dim]
        if length not in (shape.seq_len, shape.kv_len):
            raise SpecError(f"dimension {dim} of {list(tensor.shape)} is no sequence of {shape.seq_len} rows")
        return cut(tensor, dim, self._held(length)[self.rank])

    def unshard(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        """Return the whole tensor, on every rank, from the ranks' shards. Every rank must call it; not differentiable.

        Parameters
        ----------
        tensor
            This rank's rows.
        dim
            The dimension of the sequence; the default is the spec's for four dimensions, else 1.

        Raises
        ------
        RingError
            If the plan has no mesh, or the tensor is not as long as this rank's shard.
        """
        self._need_mesh("unshard")
        from attnplan.runtime.ring.groups import group_of
        from attnplan.runtime.ring.shards import gather

        dim, shape = self._dimension(tensor, dim), self.spec.shape
        fits = [n for n in (shape.seq_len, shape.kv_len) if self._layout(n).shard_sizes[self.rank] == tensor.shape[dim]]
        return gather(tensor, dim, self._held(fits[0] if fits else shape.seq_len), group_of(self.mesh))

    def shard_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return this rank's part of a batch: its rows of tokens, labels and the like, and their ``positions``.

        Parameters
        ----------
        batch
            Tensors ``[B, S, ...]`` or ``[S]``, sharded alike; ``documents`` and ``key_padding`` describe the whole
            sequence and stay whole. Labels must have been shifted before: the next token may be on another rank.

        Returns
        -------
        dict
            The same names, and ``positions``, int64 ``[s]``, unless the batch has them already.

        Raises
        ------
        RingError
            If the plan has no mesh.
        SpecError
            If a tensor has no dimension of the sequence.
        """
        from attnplan.runtime.ring.shards import cut_batch

        self._need_mesh("shard_batch")
        length = self.spec.shape.seq_len
        return cut_batch(batch, length, self._held(length)[self.rank])

    def _dimension(self, tensor: Tensor, dim: int | None) -> int:
        if dim is None:
            return (2 if self.spec.layout == "bhsd" else 1) if tensor.dim() == 4 else min(1, tensor.dim() - 1)
        return dim % tensor.dim()

    def _need_mesh(self, what: str) -> None:
        if self.mesh is None:
            raise RingError(f"{what} is for a ring of processes: this plan has no mesh, call it with whole tensors")
