"""Which (query, key) pairs may meet: the pattern algebra and mixtures of patterns.

Patterns are closed under ``&``, ``|`` and ``~``; ``a | b`` is a set union under one softmax. A mixture
(:func:`longnet`, :func:`grouped`, :func:`mix`) gives each of its branches a softmax of its own.
"""

from attnplan.patterns.bands import band, causal, full, window
from attnplan.patterns.base import Pattern, Shape
from attnplan.patterns.custom import mask
from attnplan.patterns.keys import global_tokens, sinks
from attnplan.patterns.mixtures import Mixture, grouped, longnet, mix
from attnplan.patterns.operands import documents, padding
from attnplan.patterns.parse import parse
from attnplan.patterns.segments import dilated, heads, segments

__all__ = [
    "Mixture",
    "Pattern",
    "Shape",
    "band",
    "causal",
    "dilated",
    "documents",
    "full",
    "global_tokens",
    "grouped",
    "heads",
    "longnet",
    "mask",
    "mix",
    "padding",
    "parse",
    "segments",
    "sinks",
    "window",
]
