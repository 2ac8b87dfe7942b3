"""Layouts: which rows of the sequence each rank holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import attrs

from attnplan.errors import RingError, did_you_mean
from attnplan.ir.progressions import Progression, joined

if TYPE_CHECKING:
    import numpy as np

Kind = Literal["contiguous", "zigzag", "striped"]
LAYOUTS: tuple[Kind, ...] = ("contiguous", "zigzag", "striped")


@attrs.frozen(cache_hash=True)
class Layout:
    """A partition of the rows of a sequence among ranks.

    ``contiguous``: runs of ``ceil(length / ranks)`` rows. ``zigzag``: of ``2 * ranks`` runs, rank r has the runs r and
    ``2 * ranks - 1 - r``, so that causal attention is as much work on every rank. ``striped``: rank r has the rows
    congruent to r modulo the number of ranks. A length that divides by nothing leaves the last ranks, or the second
    runs of the first, shorter or empty.

    Raises
    ------
    RingError
        If the kind is unknown, or there is no rank or no row.

    Examples
    --------
    >>> layout = Layout("zigzag", ranks=2, length=8)
    >>> [layout.positions(r).tolist() for r in range(2)]
    [[0, 1, 6, 7], [2, 3, 4, 5]]
    >>> layout.owner(6), layout.inverse().tolist()
    (0, [0, 1, 4, 5, 6, 7, 2, 3])

    References
    ----------
    Brandon et al., Striped Attention, arXiv 2311.09431; zigzag is that of github.com/zhuzilin/ring-flash-attention.
    """

    kind: Kind
    ranks: int
    length: int

    def __attrs_post_init__(self) -> None:
        if self.kind not in LAYOUTS:
            raise RingError(f"unknown layout {self.kind!r}{did_you_mean(str(self.kind), LAYOUTS)}")
        if self.ranks < 1 or self.length < 1:
            raise RingError(f"a layout needs a rank and a row, got ranks={self.ranks} and length={self.length}")

    @property
    def run(self) -> int:
        """Rows of a whole run: of a shard if contiguous, of half a shard if zigzag; 1 if striped."""
        parts = {"contiguous": self.ranks, "zigzag": 2 * self.ranks, "striped": self.length}[self.kind]
        return -(-self.length // parts)

    def rows(self, rank: int) -> tuple[Progression, ...]:
        """Return the rows of a rank, in the order in which its tensors hold them; empty ones left out."""
        self._check(rank)
        if self.kind == "striped":
            found = [Progression(rank, self.ranks, max(0, -((rank - self.length) // self.ranks)))]
        else:
            runs = (rank,) if self.kind == "contiguous" else (rank, 2 * self.ranks - 1 - rank)
            found = [self._run(i) for i in runs]
        return tuple(p for p in found if p.count)

    def _run(self, i: int) -> Progression:
        start = min(i * self.run, self.length)
        return Progression(start, 1, min(self.run, self.length - start))

    def rows_of(self, ranks: range) -> tuple[Progression, ...]:
        """Return the rows of neighbouring ranks in rising order, those that continue one another joined."""
        if len(ranks) == self.ranks:
            return (Progression(0, 1, self.length),)
        return tuple(joined([p for r in ranks for p in self.rows(r)]))

    def owner(self, row: int) -> int:
        """Return the rank that holds a row."""
        if not 0 <= row < self.length:
            raise RingError(f"there is no row {row}: the layout has rows 0 to {self.length - 1}")
        if self.kind == "striped":
            return row % self.ranks
        i = row // self.run
        return i if i < self.ranks else 2 * self.ranks - 1 - i

    def shares(self, rows: Progression) -> Iterator[tuple[int, Progression]]:
        """Iterate over (rank, the rows of a progression that it holds), in the order in which the rows rise or stride.

        Examples
        --------
        >>> [(rank, list(rows)) for rank, rows in Layout("contiguous", 4, 16).shares(Progression(2, 3, 3))]
        [(0, [2]), (1, [5]), (2, [8])]
        """
        if not rows.count:
            return
        if self.kind == "striped":
            every = ((r, rows.common(p)) for r in range(self.ranks) for p in self.rows(r))
        else:
            runs = range(rows.start // self.run, rows.last // self.run + 1)
            every = ((self.owner(i * self.run), rows.clipped(i * self.run, (i + 1) * self.run)) for i in runs)
        yield from ((rank, found) for rank, found in every if found.count)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Number of rows of each rank."""
        return tuple(sum(p.count for p in self.rows(r)) for r in range(self.ranks))

    def positions(self, rank: int) -> np.ndarray:
        """Return the rows of a rank in the order in which its tensors hold them, int64."""
        import numpy as np

        rows = [p.start + p.step * np.arange(p.count, dtype=np.int64) for p in self.rows(rank)]
        return np.concatenate([np.zeros(0, np.int64), *rows])

    def permutation(self) -> np.ndarray:
        """Return the rows of all ranks, one rank after the other: ``x[:, permutation]`` is what they hold."""
        import numpy as np

        return np.concatenate([self.positions(r) for r in range(self.ranks)])

    def inverse(self) -> np.ndarray:
        """Return where each row stands in :meth:`permutation`: ``held[:, inverse]`` is the sequence again."""
        import numpy as np

        found = np.empty(self.length, dtype=np.int64)
        found[self.permutation()] = np.arange(self.length)
        return found

    def _check(self, rank: int) -> None:
        if not 0 <= rank < self.ranks:
            raise RingError(f"there is no rank {rank}: the layout has ranks 0 to {self.ranks - 1}")
