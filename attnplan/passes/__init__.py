"""Rewrites of graphs, one a file, and the pipeline that proves each of them."""

from attnplan.passes.base import Pass
from attnplan.passes.batch_branches import BatchBranches
from attnplan.passes.block_sparse import BlockSparse
from attnplan.passes.canonicalize import Canonicalize
from attnplan.passes.chunk import Chunk
from attnplan.passes.decompose import Decompose
from attnplan.passes.fuse_merge import FuseMerge
from attnplan.passes.lattice import Lattice
from attnplan.passes.pipeline import Pipeline, Step
from attnplan.passes.pull_merge import PullMerge
from attnplan.passes.recompute import Recompute
from attnplan.passes.ring import Ring
from attnplan.passes.split_heads import SplitHeads
from attnplan.passes.views import Views

PASSES: dict[str, type[Pass]] = {
    p.name: p
    for p in (
        Canonicalize,
        SplitHeads,
        Decompose,
        Lattice,
        BlockSparse,
        Views,
        FuseMerge,
        PullMerge,
        BatchBranches,
        Chunk,
        Recompute,
    )
}

__all__ = [
    "PASSES",
    "BatchBranches",
    "BlockSparse",
    "Canonicalize",
    "Chunk",
    "Decompose",
    "FuseMerge",
    "Lattice",
    "Pass",
    "Pipeline",
    "PullMerge",
    "Recompute",
    "Ring",
    "SplitHeads",
    "Step",
    "Views",
]
