"""Layers that call plans, and their comparison in eager and compiled, for tests of traces."""

from __future__ import annotations

import torch
from torch import nn

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P

S = 64


class Layer(nn.Module):
    def __init__(self, plan):
        super().__init__()
        self.plan, self.mix = plan, nn.Linear(16, 16)

    def forward(self, q, k, v, **operands):
        return self.plan(self.mix(q), k, v, **operands) * 2


def plan_of(pattern=None, causal=False, backend="auto", **options):
    given = {"seq_len": S, "heads": 4, "head_dim": 16, "dtype": "float32", **options}
    return attnplan.compile(AttentionSpec(pattern=pattern or P.full(), causal=causal, **given), backend=backend)


def inputs(seq_len=S, batch=2, kv_len=None):
    sizes = ((batch, 4, n, 16) for n in (seq_len, kv_len or seq_len, kv_len or seq_len))
    return tuple(torch.randn(s, requires_grad=True) for s in sizes)


def same(compiled, layer, given, **operands):
    """Assert that a compiled layer gives what it gives in eager, forward and backward."""
    got, expected = compiled(*given, **operands), layer(*given, **operands)
    assert torch.equal(got, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(x, given, grad) for x in (got, expected)), strict=True):
        assert torch.equal(a, b)


WAYS = {
    "one call of SDPA": lambda: plan_of(causal=True),
    "strided views": lambda: plan_of(P.longnet([16, 32], [1, 2]), causal=True),
    "branches": lambda: plan_of(P.mix([P.window(4), P.full()], rule="mean")),
    "gathered tiles": lambda: plan_of(P.window(4) | P.global_tokens(4)),
    "plain torch": lambda: plan_of(P.window(4), softcap=2.0),
    "float64": lambda: plan_of(P.window(4), backend="reference"),
}
