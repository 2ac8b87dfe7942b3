"""The specs that every mutant compiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnplan import patterns as P
from attnplan.spec import AttentionSpec


def _spec(pattern: P.Pattern | P.Mixture, seq_len: int = 19, heads: int = 4, **options: Any) -> AttentionSpec:
    return AttentionSpec(seq_len=seq_len, heads=heads, head_dim=3, pattern=pattern, dtype="float64", **options)


SMALL: Mapping[str, AttentionSpec] = {
    "longnet-interleave": _spec(P.longnet([4, 8, 16], [1, 2, 4]), causal=True),
    "longnet-block": _spec(P.longnet([6, 12], [2, 3], offset="block"), 25, 6),
    "longnet-block-uneven": _spec(P.longnet([7, 14], [3, 5], offset="block"), 30, 7, causal=True),
    "longnet-short": _spec(P.longnet([8, 16], [2, 4]), 5),
    "longnet-gqa": _spec(P.longnet([4, 12], [1, 3]), 26, 8, kv_heads=2, causal=True),
    "longnet-gqa-block": _spec(P.longnet([8], [4], offset="block"), 20, 8, kv_heads=4),
    "longnet-mqa": _spec(P.longnet([6, 12], [2, 3]), 23, 9, kv_heads=1),
    "longnet-gqa-mean": _spec(P.longnet([6, 9], [2, 3], mix="mean"), 20, 12, kv_heads=2, kv_len=23),
    "longnet-offset-per-head": _spec(P.longnet([8], [8]), 15, 8, kv_heads=4),
    "longnet-unlike-runs": _spec(P.longnet([10], [5]), 24, 12, kv_heads=4),
    "longnet-more-keys": _spec(P.longnet([4, 8], [1, 2]), 7, 3, kv_len=22, causal=True),
    "longnet-more-queries": _spec(P.longnet([4, 8], [1, 2]), 22, 3, kv_len=9),
    "longnet-one-query": _spec(P.longnet([4, 8], [1, 4]), 1, 5, kv_len=23, causal=True),
    "longnet-detached": _spec(P.longnet([4, 8], [1, 2], mix="lse-detached"), causal=True, value_dim=5),
    "longnet-mean": _spec(P.longnet([4, 8], [1, 3], mix="mean"), 18, 3),
    "longnet-sum-documents": _spec(P.longnet([6, 12], [1, 2], mix="sum") & P.documents()),
    "grouped-none": _spec(P.grouped([4, 8, 16], [1, 2, 4]), 21, 7, causal=True),
    "grouped-mean": _spec(P.grouped([4, 8, 12], [1, 2, 3], mix="mean"), 21, 7),
    "grouped-few-heads": _spec(P.grouped([4, 8, 12], [1, 2, 3], mix="mean"), 13, 2),
    "grouped-gqa": _spec(P.grouped([5, 10], [1, 2]), 23, 6, kv_heads=3, causal=True),
    "window-softcap": _spec(P.window(5), heads=4, kv_heads=2, causal=True, softcap=5.0, scale=0.7),
    "window-more-keys": _spec(P.window(4, 2), 9, 2, kv_len=17),
    "window-more-queries": _spec(P.window(4, 2), 17, 2, kv_len=9),
    "window-wide": _spec(P.window(8, 30) & P.band(25, 40), 9, 2, kv_len=33),
    "window-just-all": _spec(P.window(9, 5), 6, 2, kv_len=10),
    "window-not-all": _spec(P.window(8, 4), 6, 2, kv_len=10),
    "window-or-sinks": _spec((P.window(3) | P.sinks(2)) & P.segments(8), 18, 2, causal=True),
    "global-more-keys": _spec(P.window(2) | P.global_tokens([1, 9]), 11, 2, kv_len=15),
    "documents-more-keys": _spec(P.documents([5, 7, 8]), 12, 2, kv_len=20),
    "padding": _spec(P.dilated(8, 2, offset="interleave") & P.padding() & P.full(), 21, 3, batch=2),
    "padding-lengths": _spec(P.segments(6) & P.padding([20, 11]), 20, 2, batch=2, causal=True),
    "heads-union": _spec(P.heads(0, 2) & P.window(3) | P.heads(2, 4), 14),
    "heads-overlap": _spec(P.heads(0, 3) & P.heads(1, 4) & P.window(4, 0), 14),
    "heads-all": _spec(P.heads(0, 4) & P.window(3), 9),
    "heads-not-all": _spec(P.heads(0, 3) & P.window(3), 9),
    "heads-offset-falls": _spec(P.heads(1, 3) & P.dilated(8, 2, offset="interleave"), 17),
    "heads-none": _spec(P.heads(0, 1) & P.heads(2, 4), 6),
    "mix-sum-weights": _spec(P.mix([P.heads(0, 3) & P.segments(4), P.window(2)], "sum", [0.5, 2.0]), 14),
    "mix-detached-heads": _spec(P.mix([P.heads(0, 2) & P.segments(4), P.heads(1, 4)], "lse-detached"), 14),
    "mix-one": _spec(P.mix([P.heads(1, 3) & P.segments(4)]), 14),
    "mix-no-heads": _spec(P.mix([P.heads(0, 1) & P.heads(2, 4), P.heads(0, 2) & P.heads(3, 4)]), 8),
    "mix-twice": _spec(P.mix([P.window(3), P.window(3), P.full()]), 13, 2, causal=True),
    "nested": _spec(P.segments(12) & P.dilated(4, 2, 1) & P.segments(24) & P.segments(40), 33, 2),
    "nested-rates": _spec(P.dilated(12, 2, offset="interleave") & P.segments(4), 33, 3, causal=True),
    "nested-offsets": _spec(P.dilated(12, 3, 1) & P.segments(4), 30, 2),
    "nested-twice": _spec(P.dilated(12, 2, 1) & P.dilated(4, 2, offset="interleave"), 30, 2),
    "unnested": _spec(P.segments(6) & P.dilated(4, 2, 1), 25, 2),
    "unnested-rates": _spec(P.dilated(12, 3, offset="interleave") & P.dilated(4, 2, 1), 30, 3),
    "segment-holds-all": _spec(P.segments(32) & P.dilated(64, 3, offset="interleave"), 17, 5, kv_len=20),
    "segment-holds-all-more-queries": _spec(P.segments(32) & P.dilated(64, 3), 18, 2, kv_len=17),
    "segment-whole": _spec(P.segments(40), 12, 2),
    "segment-exact": _spec(P.segments(20) & P.dilated(20, 2), 17, 2, kv_len=20),
    "longformer": _spec(P.window(3) | P.global_tokens(2), 17, 4, kv_heads=2),
    "longformer-scattered": _spec(P.window(4, 1) | P.global_tokens([0, 7, 8]), 15, 2, kv_len=18),
    "streaming": _spec((P.window(4) | P.sinks(2)) & P.padding(), 17, 2, causal=True, batch=2, softcap=5.0),
    "streaming-more-queries": _spec(P.window(4) | P.sinks(2), 17, 2, kv_len=12, causal=True),
    "bigbird": _spec(P.window(2) | P.segments(6) | P.global_tokens(4), 23, 2),
    "window-or-dilated": _spec(P.window(3) | P.dilated(8, 2, offset="interleave"), 21, 3, causal=True),
    "window-and-gap": _spec(P.dilated(9, 2) & ~P.window(2, 3), 24, 2, kv_len=27),
    "union-complement": _spec(~(P.window(3) | P.sinks(2) | P.global_tokens([5])), 15, 2),
    "documents-or-tokens": _spec(P.documents([4, 6, 7]) & (P.window(2) | P.sinks(3)) | P.heads(0, 1), 17, 2),
    "heads-and-tokens": _spec(P.heads(0, 2) & P.window(2) | P.heads(2, 6) & P.sinks(3), 13, 6, kv_heads=3),
    "q-offset": _spec(P.longnet([4, 8], [1, 2]), 6, 3, kv_len=24, causal=True, q_offset=True),
    "q-offset-few-heads": _spec(P.grouped([4, 8, 12], [1, 2, 3], mix="mean"), 6, 2, kv_len=20, q_offset=True),
}
"""Specs that are proved and interpreted."""

_BIG = 1_000_003
LARGE: Mapping[str, AttentionSpec] = {
    "million-longnet": _spec(
        P.longnet([2048 << i for i in range(5)], [1 << i for i in range(5)]), _BIG, 16, kv_heads=4, causal=True
    ),
    "million-grouped": _spec(P.grouped([1000, 4096, 30_000], [1, 3, 6], mix="mean"), _BIG, 8, kv_len=_BIG + 77),
    "million-longformer": _spec(P.window(512) | P.global_tokens(64) | P.dilated(4096, 8), _BIG, 8, kv_heads=2),
    "million-window": _spec(P.window(4096) & P.padding(), _BIG, 8, kv_heads=2, dropout=0.1, precision="tf32"),
}
"""Specs that are proved only."""

CORPUS = {**SMALL, **LARGE}
