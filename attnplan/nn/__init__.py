"""Modules: attention patterns as parts of a model, and the names of the published dilated-attention libraries."""

from typing import Any

from attnplan.nn.attention import PlannedAttention
from attnplan.nn.blocksparse import (
    BlockSparseRingDilatedAttention,
    BlockSparseRingMultiheadDilatedAttention,
    SparsePatternConfig,
)
from attnplan.nn.dilated import DilatedAttention, ImprovedDilatedAttention
from attnplan.nn.factory import create_dilated_attention, create_multihead_dilated_attention
from attnplan.nn.longnet import LongNetAttention, MultiheadLongNetAttention
from attnplan.nn.multihead import ImprovedMultiheadDilatedAttention, MultiheadDilatedAttention
from attnplan.nn.ring import RingAttentionCorrectV2, RingDilatedAttentionV2

__all__ = [
    "BlockSparseRingDilatedAttention",
    "BlockSparseRingMultiheadDilatedAttention",
    "DilatedAttention",
    "ImprovedDilatedAttention",
    "ImprovedMultiheadDilatedAttention",
    "LongNetAttention",
    "MultiheadDilatedAttention",
    "MultiheadLongNetAttention",
    "PlannedAttention",
    "RingAttentionCorrectV2",
    "RingDilatedAttentionV2",
    "SparsePatternConfig",
    "create_dilated_attention",
    "create_multihead_dilated_attention",
]


def __getattr__(name: str) -> Any:
    if name == "RingDilatedAttention":
        raise AttributeError(
            "RingDilatedAttention divided the queries among ranks that never met the other keys, and was deleted by "
            "its authors; use RingDilatedAttentionV2 for its dilation, or RingAttentionCorrectV2 for a dense ring"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
