"""Modules: attention patterns as parts of a model."""

from attnplan.nn.attention import PlannedAttention

__all__ = ["PlannedAttention"]
