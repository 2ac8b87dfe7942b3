"""Predicted peaks of plans for CUDA, whose kernels and joins stand here as what they allocate."""

from __future__ import annotations

import pytest
import torch

import attnplan
from attnplan import AttentionSpec
from attnplan.backends.eager.emit import Emitter
from attnplan.runtime.fused import gather, pull
from attnplan.runtime.kernels_all import KERNELS
from attnplan.runtime.opaque import Opaque
from bench.memory import MIB, measured, patterns

LENGTH = 8192


class Writing(Opaque):
    """Allocates what flash-attn 4 does, and writes where it is told."""

    sums_per_query_head = False

    def forward(self, q, k, v, asked):
        batch, heads, length, _ = q.shape
        out = asked.into[0] if asked.into and asked.into[0] is not None else None
        if out is None:
            out = q.new_empty((batch, length, heads, v.shape[3])).transpose(1, 2)
        return out, q.new_empty((batch, heads, length), dtype=torch.float32)

    def backward(self, grad, q, k, v, out, lse, asked):
        batch, heads, length, features = q.shape
        rows = -(-length // 128) * 128
        lse = lse.contiguous()
        into = asked.into or (None, None, None)
        made = [torch.empty_like(x) if y is None else y for x, y in zip((q, k, v), into, strict=True)]
        sums = [torch.empty(batch, heads, rows * n, dtype=torch.float32) for n in (features, 1, 1)]
        if k.shape[1] != heads:
            own = heads if self.sums_per_query_head else k.shape[1]
            sums += [torch.empty(batch, own, k.shape[2] * features, dtype=torch.float32) for _ in "kv"]
        return tuple(made)


class Returning(Writing):
    """A kernel that returns new tensors."""

    sums_per_query_head = True

    def forward(self, q, k, v, asked):
        return super().forward(q, k, v, asked._replace(into=()))

    def backward(self, grad, q, k, v, out, lse, asked):
        return super().backward(grad, q, k, v, out, lse, asked._replace(into=()))


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """Let kernels and joins allocate, and compute nothing."""
    monkeypatch.setitem(KERNELS, "fa4", Writing("fa4"))
    for name in ("fa2", "fa3", "cudnn", "flash-cuda", "efficient"):
        monkeypatch.setitem(KERNELS, name, Returning(name))
    for module, kind in ((pull, pull._Pull), (gather, gather.Gather)):
        monkeypatch.setattr(module, "runs_triton", lambda *tensors: True)
        monkeypatch.setattr(kind, "_launch", lambda *args: None)
    monkeypatch.setattr(Emitter, "direct", lambda self, kernel: None)


def peak(plan):
    """Return what a call of a plan's program allocates on the CPU beside its results."""
    spec, program = plan.spec, plan._emit(plan.spec, plan.graph)
    q, k, v, grad = (
        torch.empty(spec.batch, heads, LENGTH, spec.head_dim, dtype=torch.bfloat16)
        for heads in (spec.heads, spec.kv_heads, spec.kv_heads, spec.heads)
    )

    def run():
        if not spec.training:
            with torch.no_grad():
                return (program(q, k, v, {}, False)[0],)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, _ = program(*leaves, {}, False)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    run()  # tables of joins stay
    return measured(run, "cpu").allocated


QUICK = (("longnet causal", "flash", False), ("causal, grouped heads", "flash", True), ("grouped", "eager", True))


@pytest.mark.parametrize(
    ("name", "backend", "training"),
    [
        c if c in QUICK else pytest.param(*c, marks=pytest.mark.slow)
        for c in [(n, b, t) for n in patterns(256) for b in ("flash", "eager") for t in (False, True)]
    ],
)
def test_the_peak_on_cuda_is_predicted(name, backend, training):
    spec = AttentionSpec(
        seq_len=LENGTH, heads=8, head_dim=64, dtype="bfloat16", training=training, **patterns(256)[name]
    )
    free = attnplan.compile(spec, device="h100", backend=backend)
    for share in (1.0, 0.5, 0.25):
        try:
            budget = int(free.predicted.peak_bytes * share)
            plan = attnplan.compile(spec, device="h100", backend=backend, max_memory=budget)
        except attnplan.errors.MemoryBudgetError:
            continue
        got, predicted = peak(plan), plan.predicted.peak_bytes
        assert got <= predicted <= max(1.3 * got, got + 16 * MIB), f"{plan}: {predicted / MIB:.2f}, {got / MIB:.2f}"


def test_pieces_of_a_kernel_that_writes_need_no_room_for_their_rows():
    spec = AttentionSpec(seq_len=LENGTH, heads=8, head_dim=64, dtype="bfloat16", causal=True)
    whole, tight = (
        attnplan.compile(spec, device="h100", backend="flash", strategy="dense", max_memory=size)
        for size in ("1 MiB", "350 KiB")
    )
    assert (whole.schedule, tight.schedule) == ("fa4", "fa4")
    assert tight.predicted.memory.workspace < whole.predicted.memory.workspace
    assert peak(tight) <= peak(whole) / 4, "the LSE of a quarter of the heads at most"
