"""Specs that tests of plans share."""

from __future__ import annotations

import attrs

from attnplan import AttentionSpec, Dim
from attnplan import patterns as P
from tests.running import Call

SMALL = AttentionSpec(seq_len=32, heads=2, head_dim=8, dtype="float32", pattern=P.longnet([8, 16], [1, 2]), causal=True)


def open_spec(longest, **options):
    """Return the small spec with an open length."""
    return attrs.evolve(SMALL, seq_len=Dim("s", max=longest), kv_len=Dim("s", max=longest), **options)


def tensors(spec=SMALL, batch=1):
    """Return random q, k and v for a spec."""
    return Call.of(spec, batch=batch).inputs
