"""What is mutated, and the pipelines and limits that each mutant is judged by."""

from __future__ import annotations

from collections.abc import Mapping

from attnplan.errors import PassError, SpecError, VerifyError
from attnplan.lower import lower
from attnplan.passes import BlockSparse, Canonicalize, Decompose, FuseMerge, Lattice, Pass, SplitHeads

PIPELINES: Mapping[str, tuple[Pass, ...]] = {
    "usual": (Canonicalize(), SplitHeads(), Lattice(), FuseMerge()),
    "decomposed": (Canonicalize(), SplitHeads(), Decompose(), Lattice(), FuseMerge()),
    "chunked": (Canonicalize(), SplitHeads(), Decompose(), Lattice(), BlockSparse((8, 4), 4), FuseMerge()),
    "chunks-alone": (Canonicalize(), BlockSparse((4, 4), 3)),
    "decompose-alone": (Decompose(), FuseMerge()),
    "unsplit": (Canonicalize(), FuseMerge()),
    "unfused": (Canonicalize(), SplitHeads(), Lattice()),
    "lattice-alone": (Canonicalize(), Lattice(), FuseMerge()),
    "twice": (SplitHeads(), Lattice(), SplitHeads(), Lattice(), Canonicalize(), FuseMerge(), Canonicalize()),
}
"""The order of a real compilation, and others that exercise what one pass does without the one before it."""
TARGETS = tuple(dict.fromkeys([lower.__module__, *(p.__module__ for run in PIPELINES.values() for p in run)]))
"""The modules that are mutated: lowering, and every pass of a pipeline."""

TIME_LIMIT = 20.0
"""Seconds that one mutant may take."""
REFUSALS = (PassError, VerifyError, SpecError)
TOLERANCE = 1e-9
