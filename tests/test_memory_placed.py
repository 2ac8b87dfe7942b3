"""Predicted peaks of plans for CUDA, whose kernels and joins stand here as what they allocate."""

from __future__ import annotations

import pytest
import torch

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.backends.eager.emit import Emitter
from attnplan.cost import resolve
from attnplan.ir import Attend
from attnplan.ir.slots import slot_condition
from attnplan.plan import Plan
from attnplan.runtime import views
from attnplan.runtime.fused import gather, pull
from attnplan.runtime.kernels_all import KERNELS
from attnplan.runtime.opaque import Opaque
from attnplan.search import every_way
from bench.memory import MIB, measured, patterns

LENGTH = 8192


class Writing(Opaque):
    """Allocates what flash-attn 4 does, and writes where it is told."""

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
            sums += [torch.empty(batch, k.shape[1], k.shape[2] * features, dtype=torch.float32) for _ in "kv"]
        return tuple(made)


class Returning(Opaque):
    """A kernel that returns new tensors: where q has its rows, or row by row of all heads.

    Its backward may copy the gradient of the output, and the output, where they do not lie row by row. Keys that heads
    share have a gradient for each head. All as measured on an H100 of the kernels that it stands for.
    """

    def __init__(self, name, *, rows_first=False, in_order=True):
        super().__init__(name)
        self.rows_first, self.in_order = rows_first, in_order

    def like(self, x, features=None):
        features = features or x.shape[3]
        if self.rows_first:
            return x.new_empty((x.shape[0], x.shape[2], x.shape[1], features)).transpose(1, 2)
        return torch.empty_like(x[..., :features])

    def forward(self, q, k, v, asked):
        return self.like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)

    def backward(self, grad, q, k, v, out, lse, asked):
        batch, heads, length, features = q.shape
        kept = [x.transpose(1, 2).contiguous() for x in (grad, out)] if self.in_order else []
        kept.append(lse.contiguous())
        made = [self.like(x) for x in (q, k, v)]
        rows = -(-length // 128) * 128
        kept += [torch.empty(batch, heads, rows * n, dtype=torch.float32) for n in (features, 1, 1)]
        if k.shape[1] != heads:
            kept += [q.new_empty((batch, heads, *k.shape[2:])) for _ in "kv"]
        return tuple(made)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """Let kernels and joins allocate, and compute nothing."""
    monkeypatch.setitem(KERNELS, "fa4", Writing("fa4"))
    for name in ("fa2", "fa3", "cudnn"):
        monkeypatch.setitem(KERNELS, name, Returning(name, in_order=False))
    monkeypatch.setitem(KERNELS, "flash-cuda", Returning("flash-cuda"))
    monkeypatch.setitem(KERNELS, "efficient", Returning("efficient", rows_first=True))
    for module, kind in ((pull, pull._Pull), (gather, gather.Gather)):
        monkeypatch.setattr(module, "runs_triton", lambda *tensors: True)
        monkeypatch.setattr(kind, "_launch", lambda *args: None)
    monkeypatch.setattr(Emitter, "direct", lambda self, kernel: None)
    monkeypatch.setattr(views, "add_rows", lambda *args: None)  # a CPU copies what has another dtype, CUDA does not


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


PATTERNS = {
    "documents": {"pattern": P.documents([4096, 512, 2048, 128, 1408]), "causal": True},
    "streaming": {"pattern": P.window(511) | P.sinks(4), "causal": True},
    "longformer": {"pattern": P.window(256) | P.global_tokens(64)},
    "longnet": {"pattern": P.longnet([1024, 2048, 4096], [1, 2, 4])},
    "grouped": {"pattern": P.grouped([1024, 2048, 4096], [1, 2, 4]), "causal": True},
    "mean": {"pattern": P.longnet([1024, 4096], [1, 4], mix="mean")},
    "shared keys": {"pattern": P.longnet([1024, 4096], [1, 4]), "kv_heads": 2},
}
STANDING_IN = ("fa2", "fa3", "fa4", "cudnn", "flash", "efficient")


def ways(spec):
    """Iterate over the plans for an H100 whose kernels stand here: of no tiles, masks or data of a call."""
    target = resolve("h100")
    for candidate, way in every_way(spec, target):
        if way is None or candidate.backend not in ("eager", "flash") or candidate.schedule not in STANDING_IN:
            continue
        graph, windows = way.lowered.graph, "window" in way.schedule.native
        each = [(op.tile, slot_condition(op, *(n.type.rows for n in graph.args(x)[:2]))) for x, op in graph.of(Attend)]
        if all(tile is None and (condition != "mask" or windows) for tile, condition in each):
            yield Plan(spec, target, way, {"backend": candidate.backend})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [n if n == "documents" else pytest.param(n, marks=pytest.mark.slow) for n in PATTERNS])
def test_the_peak_of_every_way_is_predicted(name, training):
    spec = AttentionSpec(seq_len=LENGTH, heads=8, head_dim=64, dtype="bfloat16", training=training, **PATTERNS[name])
    tried = 0
    for plan in ways(spec):
        got, predicted = peak(plan), plan.predicted.peak_bytes
        assert got <= predicted <= max(1.3 * got, got + 16 * MIB), f"{plan}: {predicted / MIB:.2f}, {got / MIB:.2f}"
        tried += 1
    assert tried >= 6


def test_parts_that_share_no_row_are_written_into_the_output():
    spec = AttentionSpec(seq_len=LENGTH, heads=8, head_dim=64, dtype="bfloat16", **PATTERNS["documents"])
    plans = {p.schedule: p for p in ways(spec) if p.strategy == "decompose"}
    output = LENGTH * 8 * 64 * 2
    assert peak(plans["fa4"]) <= plans["fa4"].predicted.peak_bytes < output / 4
    assert plans["fa3"].predicted.peak_bytes > peak(plans["fa3"]) >= output


def test_pieces_of_a_kernel_that_writes_need_no_room_for_their_rows():
    spec = AttentionSpec(seq_len=LENGTH, heads=8, head_dim=64, dtype="bfloat16", causal=True)
    whole = next(p for p in ways(spec) if p.schedule == "fa4")
    tight = attnplan.compile(spec, device="h100", backend="flash", strategy="dense", max_memory="350 KiB")
    assert tight.schedule == "fa4"
    assert tight.predicted.memory.workspace < whole.predicted.memory.workspace
    assert peak(tight) <= peak(whole) / 4, "the LSE of a quarter of the heads at most"
