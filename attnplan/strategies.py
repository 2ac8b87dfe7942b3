"""The strategies: pipelines of passes, in the sizes of the schedule that they are for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import attrs

from attnplan.passes import (
    BatchBranches,
    BlockSparse,
    Canonicalize,
    Decompose,
    FuseMerge,
    Lattice,
    Pass,
    Pipeline,
    PullMerge,
    SplitHeads,
    Views,
)

STRATEGIES: Mapping[str, Pipeline] = {
    "naive": Pipeline(()),
    "dense": Pipeline((Canonicalize(), SplitHeads(), FuseMerge())),
    "lattice": Pipeline((Canonicalize(), SplitHeads(), Lattice(), FuseMerge())),
    "lattice-views": Pipeline((Canonicalize(), SplitHeads(), Lattice(), Views(), FuseMerge(), PullMerge())),
    "lattice-batch": Pipeline((Canonicalize(), SplitHeads(), Lattice(), FuseMerge(), PullMerge(), BatchBranches())),
    "blocks": Pipeline((Canonicalize(), SplitHeads(), BlockSparse(), FuseMerge())),
    "blocks-rows": Pipeline(
        (Canonicalize(), SplitHeads(), Decompose(full_rows=True), BlockSparse(), FuseMerge(), PullMerge())
    ),
    "decompose": Pipeline((Canonicalize(), SplitHeads(), Decompose(), Lattice(), BlockSparse(), FuseMerge())),
    "decompose-pull": Pipeline(
        (Canonicalize(), SplitHeads(), Decompose(), Lattice(), BlockSparse(), FuseMerge(), PullMerge())
    ),
}
"""Legal pipelines.

``dense`` attends over whole rows, masked where a kernel does not know the pattern; ``lattice`` takes segments and
dilation apart; ``lattice-views`` and ``lattice-batch`` do so with kernels of our own around those of attention, which
need Triton: one join writes each row once, and rows are strided views in more launches, or copied for fewer of them;
``blocks`` run the tiles of the mask that hold pairs, or a band as overlapping chunks, and ``blocks-rows`` rows that see
every key apart from them; ``decompose`` cuts set unions
into disjoint parts, each of which the others take up, and ``decompose-pull`` joins them by a kernel of our own;
``naive`` is the lowering itself, which only the reference runs. Where a schedule has no tiles, ``block-sparse`` is left
out; where it has no CUDA kernel, so are ``views``, ``pull-merge`` and ``batch-branches``.
"""


Tiling = tuple[tuple[int, int], int | None]
"""Tile (queries, keys) and chunk of a schedule; without a chunk it runs bands whole."""


Fusing = tuple[str, int]
"""Layout and batch size of the tensors between which our own kernels gather and join."""


def pipelines(tiling: Tiling | None, fusing: Fusing | None = None) -> dict[str, Pipeline]:
    """Return the pipelines for a schedule with tiles of this size; without tiles there is no ``blocks``.

    Without ``fusing`` there is no strategy that needs kernels of our own.
    """
    sized = {name: Pipeline(tuple(_sized(p.passes, tiling, fusing))) for name, p in STRATEGIES.items()}
    if tiling is None:
        del sized["blocks-rows"]  # without tiles no row holds others up
    first = {pipeline: name for name, pipeline in reversed(sized.items())}
    return {name: pipeline for name, pipeline in sized.items() if first[pipeline] == name}


def _sized(passes: tuple[Pass, ...], tiling: Tiling | None, fusing: Fusing | None) -> Iterator[Pass]:
    for one in passes:
        if isinstance(one, BlockSparse):
            if tiling is not None:
                yield BlockSparse(*tiling)
        elif isinstance(one, Views | BatchBranches):
            if fusing is not None:
                yield attrs.evolve(one, layout=fusing[0], batch=fusing[1])
        elif not isinstance(one, PullMerge) or fusing is not None:
            yield one
