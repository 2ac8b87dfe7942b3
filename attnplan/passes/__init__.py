"""Rewrites of graphs, one a file, and the pipeline that proves each of them."""

from attnplan.passes.base import Pass
from attnplan.passes.block_sparse import BlockSparse
from attnplan.passes.canonicalize import Canonicalize
from attnplan.passes.decompose import Decompose
from attnplan.passes.fuse_merge import FuseMerge
from attnplan.passes.lattice import Lattice
from attnplan.passes.pipeline import Pipeline, Step
from attnplan.passes.split_heads import SplitHeads

PASSES: dict[str, type[Pass]] = {
    p.name: p for p in (Canonicalize, SplitHeads, Decompose, Lattice, BlockSparse, FuseMerge)
}

__all__ = [
    "PASSES",
    "BlockSparse",
    "Canonicalize",
    "Decompose",
    "FuseMerge",
    "Lattice",
    "Pass",
    "Pipeline",
    "SplitHeads",
    "Step",
]
