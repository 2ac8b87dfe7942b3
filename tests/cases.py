"""Hand-picked specs for parity tests: each is there for something that could go wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch

from attnplan import patterns as P
from attnplan.spec import AttentionSpec


@attrs.frozen(eq=False)
class Case:
    """A spec in float64, and one call's batch size and operands."""

    spec: AttentionSpec
    batch: int
    operands: Mapping[str, Any]


def _case(
    pattern: P.Pattern | P.Mixture | None = None,
    seq_len: int = 37,
    batch: int = 2,
    operands: Mapping[str, Any] | None = None,
    **options: Any,
) -> Case:
    """Return a case of odd length, with four heads of eight features."""
    sizes = {"heads": 4, "head_dim": 8, "dtype": "float64", "pattern": pattern or P.full(), "batch": batch}
    return Case(AttentionSpec(seq_len=seq_len, **{**sizes, **options}), batch, operands or {})


_REAL = torch.arange(37) < torch.tensor([[37], [21]])
_ENDS = torch.tensor([0, 5, 5, 18, 37])
_ENDS_EACH = torch.tensor([[0, 1, 18, 37], [0, 20, 20, 37]])
_LADDER = {"segment_lengths": [8, 16, 64], "dilation_rates": [1, 2, 4]}

CASES: Mapping[str, Case] = {
    # one softmax, static conditions
    "full": _case(),
    "causal": _case(causal=True),
    "one row": _case(seq_len=1, causal=True),
    "window": _case(P.window(5)),
    "causal window": _case(P.window(5, 2), causal=True),
    "band ahead only": _case(P.band(0, 9)),
    "window of one key": _case(P.window(0)),
    "sinks": _case(P.window(6) | P.sinks(3), causal=True),
    "global tokens": _case(P.window(2) | P.global_tokens([0, 11, 36])),
    "first tokens global": _case(P.window(2) | P.global_tokens(3), causal=True),
    "documents": _case(P.documents([5, 1, 31]), causal=True),
    "padding": _case(P.padding([37, 21])),
    "mask of heads": _case(P.mask(lambda h, q, k: (q + 2 * k + h) % 3 != 0), causal=True),
    "complement": _case(~P.window(3)),
    "heads apart": _case(P.heads(0, 3) & P.window(4) | P.heads(3, 4), causal=True),
    # sparse tiles and chunks
    "long causal window": _case(P.window(5), seq_len=67, causal=True, kv_heads=2),
    "window, fewer queries": _case(P.window(6, 2), seq_len=41, kv_len=83, kv_heads=1),
    "window, more queries": _case(P.window(6, 2), seq_len=83, kv_len=41),
    "far band": _case(P.band(9, -3), seq_len=61),
    "longformer": _case(P.window(4) | P.global_tokens(3), seq_len=61, kv_heads=2),
    "streaming": _case(P.window(4) | P.sinks(2), seq_len=61, causal=True),
    "bigbird": _case(P.bigbird(4, 3, 1, 2), seq_len=61),
    "random blocks": _case(P.random_blocks(0.2, 5), seq_len=61, kv_heads=2, causal=True),
    "layout per head": _case(P.blocks("10/11|01/11|00/10|11/01", 19), kv_heads=2),
    "strided window": _case(P.window(3) | P.strided(7), seq_len=61, causal=True),
    "neighborhood": _case(P.neighborhood(5), seq_len=61),
    "neighborhood on a grid": _case(P.neighborhood(3, shape=[6, 8]), seq_len=48, kv_heads=2),
    "neighborhood in a volume": _case(P.neighborhood([3, 2, 3], shape=[4, 4, 6], causal=[True, False, False]), 96),
    "runtime documents in a window": _case(
        P.documents() & P.window(9), seq_len=61, causal=True, operands={"documents": torch.tensor([0, 5, 5, 40, 61])}
    ),
    # segments and dilation
    "segments": _case(P.segments(8)),
    "causal segments": _case(P.segments(8), causal=True),
    "segment longer than the sequence": _case(P.segments(64), causal=True),
    "one offset": _case(P.dilated(12, 3, offset=2), causal=True),
    "interleaved offsets": _case(P.dilated(12, 3, offset="interleave")),
    "offsets in blocks": _case(P.dilated(12, 3, offset="block"), heads=7),
    "segments that no rate divides": _case(P.dilated(10, 4, offset="interleave"), causal=True),
    "segments and a window": _case(P.segments(16) & P.window(4), causal=True),
    "dilated within documents": _case(P.dilated(12, 2, offset="interleave") & P.documents([20, 17]), causal=True),
    # mixtures, every rule
    "longnet": _case(P.longnet(**_LADDER)),
    "causal longnet": _case(P.longnet(**_LADDER), causal=True),
    "longnet in blocks": _case(P.longnet([8, 32], [2, 3], offset="block"), heads=5, causal=True),
    "longnet detached": _case(P.longnet(**_LADDER, mix="lse-detached"), causal=True),
    "longnet mean": _case(P.longnet(**_LADDER, mix="mean"), causal=True),
    "longnet sum": _case(P.longnet(**_LADDER, mix="sum")),
    "longnet with padding": _case(P.longnet(**_LADDER) & P.padding(), operands={"key_padding": _REAL}, causal=True),
    "detached with rows that no branch covers": _case(P.longnet([8, 12], [4, 3], mix="lse-detached")),
    "grouped": _case(P.grouped([8, 16, 32], [1, 2, 4]), heads=5),
    "grouped mean": _case(P.grouped([8, 16], [1, 2], mix="mean"), heads=5, causal=True),
    "fewer heads than groups": _case(P.grouped([8, 16, 32], [1, 2, 4]), heads=2),
    "mix of windows": _case(P.mix([P.window(3), P.segments(16), P.sinks(2)]), causal=True),
    "weighted sum": _case(P.mix([P.window(3), P.segments(16)], rule="sum", weights=[-0.25, 1.5])),
    "mean of equal branches": _case(P.mix([P.causal(), P.causal()], rule="mean")),
    "detached mix": _case(P.mix([P.window(3), P.dilated(9, 3, offset=1)], rule="lse-detached"), causal=True),
    "mixture of one": _case(P.mix([P.window(3)], rule="mean")),
    # grouped-query attention
    "grouped queries": _case(causal=True, kv_heads=2),
    "one key head": _case(P.window(7), kv_heads=1),
    "unlike offsets in a group": _case(P.longnet([8, 24], [2, 3]), heads=6, kv_heads=2, causal=True),
    "unlike offsets, mean": _case(P.longnet([8, 24], [2, 3], mix="mean"), heads=6, kv_heads=3),
    "offsets in blocks, grouped": _case(P.longnet([12, 24], [2, 4], offset="block"), heads=8, kv_heads=4),
    "mask of grouped heads": _case(P.mask(lambda h, q, k: (q + k + h) % 2 == 0), kv_heads=2),
    # unlike lengths: rows align at the end
    "more keys": _case(seq_len=11, kv_len=37, causal=True),
    "more keys in segments": _case(P.longnet(**_LADDER), seq_len=11, kv_len=37, causal=True),
    "one query": _case(P.window(6), seq_len=1, kv_len=37, causal=True, kv_heads=1),
    "more queries": _case(seq_len=23, kv_len=9, causal=True),
    "more queries in segments": _case(P.longnet(**_LADDER), seq_len=23, kv_len=9),
    "more queries detached": _case(P.longnet(**_LADDER, mix="lse-detached"), seq_len=23, kv_len=9, causal=True),
    "more queries, mean": _case(P.longnet(**_LADDER, mix="mean"), seq_len=23, kv_len=9, causal=True),
    # rows without a key
    "no key at all": _case(~P.full()),
    "rows without a key": _case(P.dilated(12, 4, offset=3), causal=True),
    "documents longer than the queries": _case(P.documents([30, 7]), seq_len=9, kv_len=37),
    "an element without real keys": _case(
        P.padding(), operands={"key_padding": torch.stack([torch.ones(37), torch.zeros(37)]).bool()}
    ),
    # numerics
    "value dim": _case(causal=True, value_dim=5),
    "wider values": _case(P.longnet(**_LADDER), value_dim=12, kv_heads=2),
    "softcap": _case(P.window(9), softcap=2.5, causal=True),
    "softcap over branches": _case(P.longnet(**_LADDER), softcap=1.0),
    "scale": _case(P.longnet(**_LADDER), scale=0.9, causal=True),
    "large scale": _case(scale=2.0, causal=True),
    # operands
    "runtime documents": _case(P.documents(), operands={"documents": _ENDS}, causal=True),
    "documents of each element": _case(P.documents(), operands={"documents": _ENDS_EACH.int()}, kv_heads=2),
    "documents in segments": _case(P.segments(12) & P.documents(), operands={"documents": _ENDS}, causal=True),
    "runtime padding": _case(P.padding(), operands={"key_padding": _REAL}),
    "padding for all": _case(P.padding(), operands={"key_padding": _REAL[1:]}, causal=True),
    "documents and padding": _case(
        P.documents() & P.padding(), operands={"documents": _ENDS_EACH, "key_padding": _REAL}, causal=True
    ),
    "documents or sinks": _case(P.documents() | P.sinks(2), operands={"documents": _ENDS}, causal=True),
    "offset": _case(P.window(9), seq_len=7, kv_len=37, q_offset=True, operands={"q_offset": 12}, causal=True),
    "offset tensor": _case(seq_len=7, kv_len=37, q_offset=True, operands={"q_offset": torch.tensor(30)}, causal=True),
    "offset of each element": _case(
        P.longnet([8, 16], [1, 2]), seq_len=5, kv_len=37, q_offset=True, causal=True,
        operands={"q_offset": torch.tensor([3, 32])},
    ),
    "offset without a condition": _case(seq_len=5, kv_len=9, q_offset=True, operands={"q_offset": 2}),
    "offset of each element, all operands": _case(
        P.documents() & P.padding(), seq_len=5, kv_len=37, q_offset=True, causal=True, kv_heads=2,
        operands={"q_offset": torch.tensor([3, 30]), "documents": _ENDS_EACH, "key_padding": _REAL},
    ),
}  # fmt: skip
