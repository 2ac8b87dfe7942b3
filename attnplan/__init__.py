"""A compiler for attention: say which attention you want, get a proved and priced plan that runs it.

Examples
--------
>>> import attnplan
>>> from attnplan import AttentionSpec, patterns as P
>>> spec = AttentionSpec(seq_len=1024, heads=4, head_dim=32, pattern=P.window(128), causal=True, dtype="float32")
>>> plan = attnplan.compile(spec)
>>> import torch
>>> q, k, v = (torch.randn(1, 4, 1024, 32) for _ in range(3))
>>> plan(q, k, v).shape
torch.Size([1, 4, 1024, 32])
"""

from attnplan import patterns
from attnplan.api import attention, cache_clear, compile, load  # noqa: A004
from attnplan.errors import (
    AttnPlanError,
    KernelError,
    MemoryBudgetError,
    NoBackendError,
    PassError,
    RingError,
    SpecError,
    StreamError,
    VerifyError,
)
from attnplan.plan import Plan
from attnplan.spec import AttentionSpec, Dim
from attnplan.tracing import compile_report

__version__ = "0.1.0"

__all__ = [
    "AttentionSpec",
    "AttnPlanError",
    "Dim",
    "KernelError",
    "MemoryBudgetError",
    "NoBackendError",
    "PassError",
    "Plan",
    "RingError",
    "SpecError",
    "StreamError",
    "VerifyError",
    "attention",
    "cache_clear",
    "compile",
    "compile_report",
    "load",
    "patterns",
]
