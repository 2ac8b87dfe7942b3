"""Meshes: how many ranks there are, and how they are spread over nodes."""

from __future__ import annotations

from math import prod

import attrs

from attnplan.errors import RingError


@attrs.frozen(cache_hash=True)
class Mesh:
    """``nodes`` x ``per_node`` ranks; rank r is on node ``r // per_node``.

    Examples
    --------
    >>> mesh = Mesh.of("128x8")
    >>> mesh.ranks, mesh.node(9)
    (1024, 1)
    """

    nodes: int
    per_node: int

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.nodes * self.per_node

    def node(self, rank: int) -> int:
        """Return the node of a rank."""
        return rank // self.per_node

    @classmethod
    def of(cls, sizes: Mesh | str | int | tuple[int, ...]) -> Mesh:
        """Read a mesh from ``"128x8"``, ``(128, 8)``, or a number of ranks, which are then in one node up to 8.

        Raises
        ------
        RingError
            If it is no mesh.
        """
        if isinstance(sizes, Mesh):
            return sizes
        try:
            each = tuple(int(n) for n in (sizes.lower().split("x") if isinstance(sizes, str) else _tuple(sizes)))
        except (TypeError, ValueError):
            each = ()
        if not 1 <= len(each) <= 2 or min(each) < 1:
            raise RingError(f"a mesh is a number of ranks or NODESxRANKS such as 128x8, got {sizes!r}")
        if len(each) == 1:
            (ranks,) = each
            inner = next(n for n in (8, 4, 2, 1) if ranks % n == 0) if ranks > 8 else ranks
            each = (ranks // inner, inner)
        return cls(*each)

    def __str__(self) -> str:
        return f"{self.nodes}x{self.per_node}" if prod((self.nodes, self.per_node)) > self.per_node else str(self.ranks)


def _tuple(sizes: int | tuple[int, ...]) -> tuple[int, ...]:
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)
