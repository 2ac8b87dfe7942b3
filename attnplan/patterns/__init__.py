"""Which (query, key) pairs may meet: the pattern algebra and mixtures of patterns.

Patterns are closed under ``&``, ``|`` and ``~``; ``a | b`` is a set union under one softmax. A mixture
(:func:`longnet`, :func:`grouped`, :func:`mix`) gives each of its branches a softmax of its own.
"""

from attnplan.patterns.bands import band, causal, full, window
from attnplan.patterns.base import Pattern, Shape
from attnplan.patterns.blocks import block_window, blocks, random_blocks
from attnplan.patterns.custom import mask
from attnplan.patterns.grids import neighborhood
from attnplan.patterns.keys import global_tokens, sinks
from attnplan.patterns.mixtures import Mixture, grouped, longnet, mix
from attnplan.patterns.operands import documents, padding
from attnplan.patterns.parse import parse
from attnplan.patterns.presets import (
    a_shape,
    bigbird,
    chunked,
    longformer,
    longlora,
    prefix_lm,
    sparse_transformer,
    streaming,
    vertical_slash,
)
from attnplan.patterns.segments import dilated, heads, segments
from attnplan.patterns.strides import columns, strided

__all__ = [
    "Mixture",
    "Pattern",
    "Shape",
    "a_shape",
    "band",
    "bigbird",
    "block_window",
    "blocks",
    "causal",
    "chunked",
    "columns",
    "dilated",
    "documents",
    "full",
    "global_tokens",
    "grouped",
    "heads",
    "longformer",
    "longlora",
    "longnet",
    "mask",
    "mix",
    "neighborhood",
    "padding",
    "parse",
    "prefix_lm",
    "random_blocks",
    "segments",
    "sinks",
    "sparse_transformer",
    "streaming",
    "strided",
    "vertical_slash",
    "window",
]
