"""Specs, graphs and plans for the tests of our own kernels; each file imports what it needs."""

from __future__ import annotations

import sys

import pytest
import torch

from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.backends import registry
from attnplan.backends.eager import FLASH_CPU
from attnplan.cost import Prediction, resolve
from attnplan.passes import BatchBranches, Canonicalize, FuseMerge, Lattice, Pipeline, PullMerge, SplitHeads, Views
from attnplan.plan import Plan
from attnplan.search import Candidate, Found, Lowered, _start

_FRONT = (Canonicalize(), SplitHeads(), Lattice())
VARIANTS = {
    "views": lambda s: (Views(s.layout, s.batch), FuseMerge(), PullMerge()),
    "batch": lambda s: (FuseMerge(), PullMerge(), BatchBranches(s.layout, s.batch)),
    "both": lambda s: (Views(s.layout, s.batch), FuseMerge(), PullMerge(), BatchBranches(s.layout, s.batch)),
    "copied": lambda s: (FuseMerge(), PullMerge(), BatchBranches(s.layout, s.batch, whole=False)),
}


def spec_of(pattern, seq_len=64, heads=4, **options):
    return AttentionSpec(
        **{"batch": 2, "head_dim": 8, "seq_len": seq_len, "heads": heads, "pattern": pattern, **options}
    )


SPECS = {
    "longnet": spec_of(P.longnet([16, 32, 64], [1, 2, 4])),
    "ragged": spec_of(P.longnet([16, 50], [1, 3]), seq_len=83, causal=True),
    "grouped queries": spec_of(P.longnet([16, 32], [1, 2]), heads=8, kv_heads=4, causal=True),
    "unlike offsets in a group": spec_of(P.longnet([16, 48], [2, 3]), seq_len=75, heads=6, kv_heads=2),
    "rows without a key": spec_of(P.longnet([16, 24], [4, 3]), seq_len=75, heads=3),
    "mean": spec_of(P.longnet([16, 32], [1, 2], mix="mean"), causal=True),
    "detached": spec_of(P.longnet([16, 32], [1, 2], mix="lse-detached"), causal=True),
    "grouped": spec_of(P.grouped([8, 16, 32], [1, 2, 4]), seq_len=70, heads=7),
    "grouped mean": spec_of(P.grouped([8, 16, 32], [1, 2, 4], mix="mean"), heads=7, causal=True),
    "offsets in blocks": spec_of(P.longnet([16, 32], [1, 2], offset="block"), heads=6, causal=True),
    "a whole branch": spec_of(P.longnet([16, 64], [2, 1]), causal=True),
}  # fmt: skip


def graph_of(spec, variant):
    """Return the graph of a spec under one variant, every pass proved."""
    return Pipeline((*_FRONT, *VARIANTS[variant](spec))).run(*_start(spec))[0]


def plan_of(spec, variant, schedule=FLASH_CPU, backend="eager", device="cpu"):
    graph, target = graph_of(spec, variant), resolve(device)
    candidate = Candidate(variant, backend, schedule.name, Prediction(0.0, 0, ()))
    lowered = Lowered("lattice", graph, ())
    found = Found(lowered, candidate, registry().get(backend), schedule, (candidate,))
    return Plan(spec, target, found, {}, strict=True)


@pytest.fixture
def interpreted(monkeypatch):
    """Make Triton interpret its kernels, here alone; skip where it is not installed."""
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "attnplan.runtime.fused.triton_kernels", raising=False)
    yield
    sys.modules.pop("attnplan.runtime.fused.triton_kernels", None)


def parts_with_extremes():
    """Return parts over rows of 2 heads whose LSEs are huge, tiny and -inf, and rows that no part holds."""
    places = [
        (0, 0, ((2, 1, 0), (2, 0, 8), (4, 0, 2))),
        (0, 1, ((2, 1, 1), (3, 0, 4))),
        (1, 0, ((1, 0, 0), (13, 0, 1))),
    ]
    outs, lses = [], []
    for i, (_, _, axes) in enumerate(places):
        sizes = (2, *(n for n, _, _ in axes))
        outs.append(torch.randn(*sizes, 8, generator=torch.Generator().manual_seed(i)))
        lse = torch.randn(sizes, generator=torch.Generator().manual_seed(i + 9)) * 60
        lses.append(lse.masked_fill(lse.abs() < 20, -torch.inf))
        outs[-1] = outs[-1].masked_fill(lses[-1].unsqueeze(-1) == -torch.inf, 0)
    return places, outs, lses
